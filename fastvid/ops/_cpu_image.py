"""Launchers of the native image convolution: tensors become pointers and strides, a call one structure of bytes."""

from struct import Struct

import torch
from torch import Tensor

from fastvid import _native
from fastvid.kernels.image_conv import reference

LEAST_CHANNELS, LEAST_POSITIONS = 32, 256  # measured: see the room's README.md
_NO_MEMORY = 1  # enum Outcome of kernels/common/types.h

# struct ImageCall of kernels/image_conv/cpu.h: x, strides; weight, strides; bias; residual, strides; out; N, H, W, Cin,
# Cout; threads
_CALL = Struct("@P3qP4qPP3qP5qi")


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> str | None:
    """Why the native image_conv cannot serve these arguments, in a few words; None when it can."""
    return _refusal(x, weight, bias, residual)


def why_not_backward(x: Tensor, weight: Tensor, grad: Tensor, wanted: list[bool]) -> str | None:
    """Why the native image_conv_backward cannot serve these arguments; None when it can."""
    return _refusal(x, weight, grad)


def unasked(x: Tensor, weight: Tensor, *_) -> str | None:
    """Why torch's own convolution is as fast or faster at these sizes; None where it is not."""
    N, H, W, _ = x.shape
    positions, channels = N * H * W, min(weight.shape[:2])
    if channels < LEAST_CHANNELS or positions < LEAST_POSITIONS:
        told = f"{LEAST_CHANNELS} channels at both ends and {LEAST_POSITIONS} positions"
        return f"pays from {told} on, got {channels} and {positions}"
    return None


def _refusal(*tensors: Tensor | None) -> str | None:
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            return f"takes tensors on the CPU, got {tensor.device}"
        if tensor is not None and tensor.dtype != torch.float32:
            return f"takes float32, got {tensor.dtype}: its sums of inputs would be rounded to fewer bits"
    return _native.why_not("cpu")


def image_conv(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> tuple[Tensor]:
    """The convolution by the native kernel, on torch's thread count; arguments as ops.image_conv's, float32.

    Raises: MemoryError when the kernel finds no memory for its scratch.
    """
    out = x.new_empty(*x.shape[:3], weight.shape[0])
    _convolve(x, weight.data_ptr(), weight.stride(), bias, residual, out)
    return (out,)


def image_conv_backward(
    x: Tensor, weight: Tensor, grad: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, x's by the native kernel, torch's own for the rest; arguments as ops.image_conv_backward's."""
    of_x, *others = wanted
    _, grad_weight, grad_bias = reference.image_conv_backward(x, weight, grad, [False, *others])
    grad_x = x.new_empty(x.shape if of_x else 0)
    if of_x:
        out, into, down, along = weight.stride()
        # half a turn is the same kernel read from its end
        last = weight.data_ptr() + 2 * (down + along) * weight.element_size()
        _convolve(grad, last, (into, out, -down, -along), None, None, grad_x)
    return grad_x, grad_weight, grad_bias


def _convolve(x: Tensor, weight: int, strides: tuple[int, ...], bias: Tensor | None, residual: Tensor | None,
              out: Tensor) -> None:  # fmt: skip
    x, residual, bias = _side_by_side(x), _side_by_side(residual), None if bias is None else bias.contiguous()
    call = _CALL.pack(
        x.data_ptr(), *x.stride()[:3], weight, *strides, 0 if bias is None else bias.data_ptr(),
        *((0,) * 4 if residual is None else (residual.data_ptr(), *residual.stride()[:3])),
        out.data_ptr(), *x.shape, out.shape[3], torch.get_num_threads(),
    )  # fmt: skip
    outcome = _native.load("cpu").fastvid_image_conv(call)
    if outcome == _NO_MEMORY:
        raise MemoryError("image_conv: no memory for the kernel's scratch; pass a smaller batch.")
    if outcome:
        raise RuntimeError(f"image_conv: the native kernel refused its arguments with {outcome}; report this.")


def _side_by_side(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself where the channels of a position follow one another, else a copy of which this is true."""
    return tensor if tensor is None or tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()
