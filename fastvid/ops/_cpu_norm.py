"""Launchers of the native conditional batch normalisation: maps of channels side by side, a call one structure."""

from struct import Struct

import torch
from torch import Tensor

from fastvid import _native
from fastvid.kernels.conditional_batch_norm import reference

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # enum Type of kernels/common/types.h
_NO_MEMORY = 1  # enum Outcome of kernels/common/types.h

# The structures of kernels/conditional_batch_norm/cpu.h, field by field, aligned as a C compiler aligns them.
_MAPS = "P4q"
_ABSENT = (0,) * 5
_NORM_CALL = Struct(
    # x, out; mean, var, gain, bias; B, T, H, W, C; eps; type, measure, relu, upsample, threads
    f"@{2 * _MAPS}4P5qf5i"
)
_NORM_GRAD_CALL = Struct(
    # x, grad_out, grad_x; mean, var, gain, bias, sums; B, T, H, W, C; eps; type, own, relu, upsample, threads
    f"@{3 * _MAPS}5P5qf5i"
)


def why_not(x: Tensor, *_) -> str | None:
    """Why the native kernels cannot serve these arguments, in a few words; None when they can."""
    if x.device.type != "cpu":
        return f"takes tensors on the CPU, got {x.device}"
    if x.dtype not in TYPES:
        return f"takes float32 and bfloat16, got {x.dtype}"
    return _native.why_not("cpu")


def why_not_backward(x: Tensor, mean: Tensor, var: Tensor, gain: Tensor, bias: Tensor, grad_out: Tensor,
                     *_) -> str | None:  # fmt: skip
    """The same of the gradients."""
    if grad_out.dtype != x.dtype:
        return f"takes x and grad_out of one dtype, got {x.dtype} and {grad_out.dtype}"
    return why_not(x)


def frame_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [T, C] of x [B, T, H, W, C] by the native kernel, on torch's thread count."""
    mean, var = torch.empty(x.shape[1], x.shape[4]), torch.empty(x.shape[1], x.shape[4])
    _normalise(x, None, mean, var, None, None, 0.0, False, False, measure=True)
    return mean, var


def conditional_norm(
    x: Tensor, mean: Tensor, var: Tensor, gain: Tensor, bias: Tensor, eps: float, relu: bool, upsample: bool
) -> tuple[Tensor]:
    """x normalised by given moments, by the native kernel; arguments as ops' of this name.

    Returns: out, dense, in x's dtype.
    Raises:  MemoryError when the kernel finds no memory for its scratch.
    """
    out = _room_for(x, upsample)
    _normalise(x, out, mean, var, gain, bias, eps, relu, upsample, measure=False)
    return (out,)


def conditional_batch_norm(
    x: Tensor, gain: Tensor, bias: Tensor, eps: float, relu: bool, upsample: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x normalised by its own moments, and these, by the native kernel; arguments and errors as conditional_norm's."""
    mean, var = torch.empty(x.shape[1], x.shape[4]), torch.empty(x.shape[1], x.shape[4])
    out = _room_for(x, upsample)
    _normalise(x, out, mean, var, gain, bias, eps, relu, upsample, measure=True)
    return out, mean, var


def conditional_norm_backward(
    x: Tensor, mean: Tensor, var: Tensor, gain: Tensor, bias: Tensor, grad_out: Tensor, eps: float, relu: bool,
    upsample: bool, own: bool, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients by the native kernel, on torch's thread count; arguments as ops' of this name.

    Returns: grad_x like x, dense, grad_mean, grad_var [T, C], grad_gain, grad_bias [B, C]; [0] for what is not wanted.
    Raises:  MemoryError when the kernel finds no memory for its scratch.
    """
    B, T, _, _, C = x.shape
    x, grad_out = _with_channels_together(x), _with_channels_together(grad_out)
    mean, var, gain, bias = (part.contiguous() for part in (mean, var, gain, bias))
    grad_x = x.new_empty(x.shape if wanted[0] else 0)
    sums = torch.empty(2, B, T, C)
    call = _NORM_GRAD_CALL.pack(
        *_maps(x), *_maps(grad_out), *(_maps(grad_x) if wanted[0] else _ABSENT),
        mean.data_ptr(), var.data_ptr(), gain.data_ptr(), bias.data_ptr(), sums.data_ptr(), *x.shape,
        eps, TYPES[x.dtype], own, relu, upsample, torch.get_num_threads(),
    )  # fmt: skip
    _check(_native.load("cpu").fastvid_conditional_norm_backward(call))
    if not any(wanted[1:]):
        return grad_x, *(part.new_empty(0) for part in (mean, var, gain, bias))
    small = reference.small_gradients(*sums, gain, torch.rsqrt(var + eps))
    return grad_x, *(part if asked else part.new_empty(0) for part, asked in zip(small, wanted[1:], strict=True))


def _normalise(x: Tensor, out: Tensor | None, mean: Tensor, var: Tensor, gain: Tensor | None, bias: Tensor | None,
               eps: float, relu: bool, upsample: bool, measure: bool) -> None:  # fmt: skip
    x, mean, var = _with_channels_together(x), mean.contiguous(), var.contiguous()
    gain, bias = (part if part is None else part.contiguous() for part in (gain, bias))
    call = _NORM_CALL.pack(
        *_maps(x), *(_ABSENT if out is None else _maps(out)),
        mean.data_ptr(), var.data_ptr(), *(0 if part is None else part.data_ptr() for part in (gain, bias)),
        *x.shape, eps, TYPES[x.dtype], measure, relu, upsample, torch.get_num_threads(),
    )  # fmt: skip
    _check(_native.load("cpu").fastvid_conditional_norm(call))


def _room_for(x: Tensor, upsample: bool) -> Tensor:
    B, T, H, W, C = x.shape
    return x.new_empty(B, T, 2 * H, 2 * W, C) if upsample else x.new_empty(x.shape)


def _with_channels_together(maps: Tensor) -> Tensor:
    return maps if maps.stride(4) == 1 or maps.shape[4] == 1 else maps.contiguous()


def _maps(maps: Tensor) -> tuple[int, ...]:
    return maps.data_ptr(), *maps.stride()[:4]


def _check(outcome: int) -> None:
    if outcome == _NO_MEMORY:
        raise MemoryError("conditional_norm: no memory for the kernel's scratch; pass a smaller batch.")
    if outcome:
        raise RuntimeError(f"conditional_norm: the native kernel refused its arguments with {outcome}; report this.")
