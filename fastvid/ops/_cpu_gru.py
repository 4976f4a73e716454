"""Launchers of the native convolutional GRU: tensors become pointers, a call one structure, packed as bytes."""

from struct import Struct

import torch
from torch import Tensor

from fastvid import _native
from fastvid.ops import _cpu_conv

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # enum Type of kernels/common/types.h
_NO_MEMORY = 1  # enum Outcome of kernels/common/types.h

# The structures of kernels/conv_gru/cpu.h, field by field, aligned as a C compiler aligns them.
_CALL = Struct(
    # gates, hidden, weight_gates, weight_candidate, states, kept; B, T, gate_frames, H, W, C, k; type, tanh, threads
    "@6P7q3i"
)
_GRAD_CALL = Struct(
    # grad_states, grad_kept, hidden, weight_gates, weight_candidate, states, kept, grad_gates, grad_hidden
    # B, T, H, W, C, k; type, tanh, threads
    "@9P6q3i"
)


def why_not(gates: Tensor, hidden: Tensor | None, weight_gates: Tensor, weight_candidate: Tensor, *_) -> str | None:
    """Why the native conv_gru cannot serve these arguments, in a few words; None when it can."""
    return _refusal(gates, hidden, weight_gates, weight_candidate)


def why_not_backward(grad_states: Tensor | None, grad_kept: Tensor | None, hidden: Tensor | None, weight_gates: Tensor,
                     weight_candidate: Tensor, states: Tensor, kept: Tensor, *_) -> str | None:  # fmt: skip
    """Why the native conv_gru_backward cannot serve these arguments; None when it can."""
    return _refusal(grad_states, grad_kept, hidden, weight_gates, weight_candidate, states, kept)


def _refusal(*tensors: Tensor | None) -> str | None:
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if tensor.device.type != "cpu":
            return f"takes tensors on the CPU, got {tensor.device}"
        if tensor.dtype not in TYPES or tensor.dtype != given[0].dtype:
            return f"takes float32 or bfloat16, one of them for all, got {tensor.dtype}"
    return _native.why_not("cpu")


def conv_gru(
    gates: Tensor, hidden: Tensor | None, weight_gates: Tensor, weight_candidate: Tensor, steps: int, activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The scan by the native kernel, on torch's thread count; arguments as ops' of this name, any strides.

    Returns: states and kept, dense; kept [0] unless asked for.
    Raises:  MemoryError when the kernel finds no memory for its scratch.
    """
    gates, hidden, weight_gates, weight_candidate = map(_dense, (gates, hidden, weight_gates, weight_candidate))
    B, frames, H, W, _ = gates.shape
    C, k = weight_candidate.shape[0], weight_candidate.shape[-1]
    states = gates.new_empty(B, steps, H, W, C)
    kept = gates.new_empty(B, steps, H, W, 3 * C) if keep else gates.new_empty(0)
    call = _CALL.pack(
        *map(_pointer, (gates, hidden, weight_gates, weight_candidate, states, kept if keep else None)),
        B, steps, frames, H, W, C, k, TYPES[gates.dtype], activation == "tanh", torch.get_num_threads(),
    )  # fmt: skip
    _check(_native.load("cpu").fastvid_conv_gru(call))
    return states, kept


def conv_gru_backward(
    grad_states: Tensor | None, grad_kept: Tensor | None, hidden: Tensor | None, weight_gates: Tensor,
    weight_candidate: Tensor, states: Tensor, kept: Tensor, frames: int, activation: str, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients by the native kernels, on torch's thread count; arguments as ops' of this name, any strides.

    Returns: grad_gates, grad_hidden, grad_weight_gates, grad_weight_candidate, dense; [0] for what is not wanted.
    Raises:  MemoryError when a kernel finds no memory for its scratch.
    """
    grad_states, grad_kept, hidden, weight_gates, weight_candidate, states, kept = map(
        _dense, (grad_states, grad_kept, hidden, weight_gates, weight_candidate, states, kept)
    )
    (B, T, H, W, C), k = states.shape, weight_candidate.shape[-1]
    grad = torch.empty_like(kept)  # [B, T, H, W, 3C]
    found = [states.new_empty(0) for _ in wanted]
    if wanted[1]:
        found[1] = states.new_empty(B, H, W, C)
    call = _GRAD_CALL.pack(
        *map(_pointer, (grad_states, grad_kept, hidden, weight_gates, weight_candidate, states, kept, grad)),
        _pointer(found[1] if wanted[1] else None),
        B, T, H, W, C, k, TYPES[states.dtype], activation == "tanh", torch.get_num_threads(),
    )  # fmt: skip
    _check(_native.load("cpu").fastvid_conv_gru_backward(call))
    if wanted[0]:
        found[0] = grad if frames == T else grad.sum(dim=1, keepdim=True)
    if wanted[2] or wanted[3]:
        found[2:] = _of_weights(hidden, states, kept, grad, k, wanted[2:])
    return tuple(found)


def _of_weights(hidden: Tensor | None, states: Tensor, kept: Tensor, grad: Tensor, k: int,
                wanted: list[bool]) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of both weights, each one product over all frames."""
    C = states.shape[-1]
    start = torch.zeros_like(states[:, :1]) if hidden is None else hidden[:, None]
    earlier = torch.cat([start, states[:, :-1]], dim=1)  # [B, T, H, W, C]
    of_gates = of_candidate = states.new_empty(0)
    if wanted[0]:
        of_gates = _of_weight(earlier, grad[..., : 2 * C], k)
    if wanted[1]:
        of_candidate = _of_weight(earlier * kept[..., :C], grad[..., 2 * C :], k)
    return of_gates, of_candidate


def _of_weight(x: Tensor, grad: Tensor, k: int) -> Tensor:
    """[B, T, H, W, C] and [B, T, H, W, Cout] -> [Cout, C, k, k]."""
    taps = [offset for y in range(k) for x in range(k) for offset in (0, y - k // 2, x - k // 2)]
    found = x.new_empty(k * k, x.shape[-1], grad.shape[-1])
    _cpu_conv.weight_gradient(x, grad, taps, [0, 0, 0], found)
    return found.permute(2, 1, 0).reshape(grad.shape[-1], x.shape[-1], k, k).contiguous()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(outcome: int) -> None:
    if outcome == _NO_MEMORY:
        raise MemoryError("conv_gru: no memory for the kernel's scratch; pass a smaller batch.")
    if outcome:
        raise RuntimeError(f"conv_gru: the native kernel refused its arguments with {outcome}; report this.")
