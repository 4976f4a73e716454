"""Launchers of the native gated convolution: tensors become views of pointers and strides, a call one structure.

A structure is packed as bytes: made of ctypes fields it takes longer than the kernel's work on a row of a small model.
"""

from array import array
from struct import Struct

import torch
from torch import Tensor

from fastvid import _native

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # enum Type of kernels/common/types.h
ACTIVATIONS = {"none": 0, "gate": 1, "glu": 2}  # enum Activation of kernels/gated_causal_conv/cpu.h
_NO_MEMORY = 1  # enum Outcome of kernels/common/types.h

# The structures of kernels/gated_causal_conv/cpu.h, field by field, aligned as a C compiler aligns them.
_VIEW, _MATRICES = "P5qi", "P3qi"
_ABSENT = (0,) * 7
_CONV_CALL = Struct(
    # x, out, pre, addend, residual; weight; bias, bias_type; B, in, size, origin; Cin, Cout, taps
    f"@{5 * _VIEW}{_MATRICES}Pi q3q3q3q3q"
    # offsets; activation, threads
    "P2i"
)
_GATE_CALL = Struct(
    # pre, grad_out, grad_pre, grad; grad_bias; B, size, Cout; activation, threads
    f"@{4 * _VIEW}P q3qq2i"
)
_WEIGHT_GRAD_CALL = Struct(
    # x, grad; grad_weight, type; B, in, size, origin; Cin, Cout, taps; offsets, threads
    f"@{2 * _VIEW}Pi q3q3q3q3qPi"
)


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, taps: list[int], addend: Tensor | None,
            residual: Tensor | None, *_) -> str | None:  # fmt: skip
    """Why the native gated_causal_conv cannot serve these arguments, in a few words; None when it can."""
    return _refusal(x, weight, bias, addend, residual)


def why_not_backward(x: Tensor, weight: Tensor, pre: Tensor | None, grad_out: Tensor | None, grad_pre: Tensor | None,
                     *_) -> str | None:  # fmt: skip
    """Why the native gated_causal_conv_backward cannot serve these arguments; None when it can."""
    return _refusal(x, weight, pre, grad_out, grad_pre)


def _refusal(*tensors: Tensor | None) -> str | None:
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            return f"takes tensors on the CPU, got {tensor.device}"
        if tensor is not None and tensor.dtype not in TYPES:
            return f"takes float32 and bfloat16, got {tensor.dtype}"
    return _native.why_not("cpu")


def gated_causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, taps: list[int], addend: Tensor | None, residual: Tensor | None,
    activation: str, origin: list[int], size: list[int], keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The convolution and its gate by the native kernel, on torch's thread count; arguments as ops' of this name.

    taps:    dt, dy, dx of every tap in one list, of either sign.
    Returns: out and pre, dense; pre [0] unless it is kept and differs from out.
    Raises:  MemoryError when the kernel finds no memory for its scratch.
    """
    grid, Cout = (x.shape[0], *size), weight.shape[2]
    kept = keep and activation != "none"
    out = (x if residual is None else residual).new_empty(*grid, Cout if activation == "none" else Cout // 2)
    pre = x.new_empty(*grid, Cout) if kept else x.new_empty(0)
    _convolve(x, weight, bias, taps, addend, residual, activation, origin, out, pre if kept else None)
    return out, pre


def gated_causal_conv_backward(
    x: Tensor, weight: Tensor, pre: Tensor | None, grad_out: Tensor | None, grad_pre: Tensor | None, taps: list[int],
    activation: str, origin: list[int], wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients by the native kernels, on torch's thread count; arguments as ops' of this name.

    grad_out, grad_pre: one of them at least. wanted: whether of x, weight, bias, addend.
    Returns: grad_x, grad_weight, grad_bias, grad_addend, dense; [0] for what is not wanted.
    Raises:  MemoryError when a kernel finds no memory for its scratch.
    """
    of_x, of_weight, of_bias, of_addend = wanted
    grad, grad_bias = _at_the_sum(x, weight, pre, grad_out, grad_pre, activation, wanted)
    grad_x, grad_weight = x.new_empty(x.shape if of_x else 0), weight.new_empty(weight.shape if of_weight else 0)
    if of_x:
        back, start = [-offset for offset in taps], [-at for at in origin]
        _convolve(grad, weight.transpose(1, 2), None, back, None, None, "none", start, grad_x, None)
    if of_weight:
        weight_gradient(x, grad, taps, origin, grad_weight)
    return grad_x, grad_weight, grad_bias, grad if of_addend else x.new_empty(0)


def _at_the_sum(x: Tensor, weight: Tensor, pre: Tensor | None, grad_out: Tensor | None, grad_pre: Tensor | None,
                activation: str, wanted: list[bool]) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """The gradient at the sum before the activation, None where only the bias is wanted, and the bias's own."""
    of_x, of_weight, of_bias, of_addend = wanted
    incoming = [gradient for gradient in (grad_out, grad_pre) if gradient is not None]
    passed_on = len(incoming) == 1 and (activation == "none" or grad_out is None)
    grad = incoming[0] if passed_on else None
    written = None
    if of_addend or (grad is None and (of_x or of_weight)):
        written = grad = x.new_empty(*incoming[0].shape[:4], weight.shape[2])  # an op returns no argument of its own
    sums = torch.empty(weight.shape[2]) if of_bias else None  # float32, whatever the dtype
    if written is not None or of_bias:
        call = _GATE_CALL.pack(
            *_view(pre), *_view(grad_out), *_view(grad_pre), *_view(written), _pointer(sums),
            *incoming[0].shape[:4], weight.shape[2], ACTIVATIONS[activation], torch.get_num_threads(),
        )  # fmt: skip
        _check(_native.load("cpu").fastvid_gate_backward(call))
    return grad, weight.new_empty(0) if sums is None else sums.to(weight.dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, taps: list[int], addend: Tensor | None,
              residual: Tensor | None, activation: str, origin: list[int], out: Tensor, pre: Tensor | None) -> None:
    offsets = array("i", taps)
    bias = None if bias is None else bias.contiguous()
    call = _CONV_CALL.pack(
        *_view(x), *_view(out), *_view(pre), *_view(addend), *_view(residual),
        weight.data_ptr(), *weight.stride(), TYPES[weight.dtype],
        _pointer(bias), TYPES[(weight if bias is None else bias).dtype],
        *x.shape[:4], *out.shape[1:4], *origin, *weight.shape[1:], weight.shape[0],
        offsets.buffer_info()[0], ACTIVATIONS[activation], torch.get_num_threads(),
    )  # fmt: skip
    _check(_native.load("cpu").fastvid_gated_causal_conv(call))


def weight_gradient(x: Tensor, grad: Tensor, taps: list[int], origin: list[int], grad_weight: Tensor) -> None:
    """The weight's gradient into grad_weight [taps, Cin, Cout], dense, from x [B, T, H, W, Cin] and grad [.., Cout]."""
    offsets = array("i", taps)
    call = _WEIGHT_GRAD_CALL.pack(
        *_view(x), *_view(grad), grad_weight.data_ptr(), TYPES[grad_weight.dtype],
        *x.shape[:4], *grad.shape[1:4], *origin, *grad_weight.shape[1:], grad_weight.shape[0],
        offsets.buffer_info()[0], torch.get_num_threads(),
    )  # fmt: skip
    _check(_native.load("cpu").fastvid_weight_gradient(call))


def _view(tensor: Tensor | None) -> tuple[int, ...]:
    return _ABSENT if tensor is None else (tensor.data_ptr(), *tensor.stride(), TYPES[tensor.dtype])


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(outcome: int) -> None:
    if outcome == _NO_MEMORY:
        raise MemoryError("gated_causal_conv: no memory for the kernel's scratch; pass a smaller batch.")
    if outcome:
        raise RuntimeError(f"gated_causal_conv: the native kernel refused its arguments with {outcome}; report this.")
