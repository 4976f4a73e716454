"""Launchers of the native spectral normalisation: all weights of a call become one list of integers."""

from array import array
from struct import Struct

import torch
from torch import Tensor

from fastvid import _native

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # enum Type of kernels/common/types.h
_NO_MEMORY = 1  # enum Outcome of kernels/common/types.h

# The structures of kernels/spectral_norm/cpu.h; the weights they point to are lists of 64-bit integers.
_NORM_CALL = Struct("@PPqqdq")  # weights, sigma, count, iterations, eps, threads
_GRAD_CALL = Struct("@PPqq")  # weights, sigma, count, threads


def why_not(weights: list[Tensor], u: list[Tensor], v: list[Tensor], *_) -> str | None:
    """Why the native spectral_norm cannot serve these arguments, in a few words; None when it can."""
    return _refusal(weights)


def why_not_backward(grads: list[Tensor], weights: list[Tensor], *_) -> str | None:
    """Why the native spectral_norm_backward cannot serve these arguments; None when it can."""
    for grad, weight in zip(grads, weights, strict=True):
        if grad.dtype != weight.dtype:
            return f"takes a gradient of its weight's dtype, got {grad.dtype} beside {weight.dtype}"
    return _refusal(weights)


def _refusal(weights: list[Tensor]) -> str | None:
    for weight in weights:
        if weight.device.type != "cpu":
            return f"takes tensors on the CPU, got {weight.device}"
        if weight.dtype not in TYPES:
            return f"takes float32 and bfloat16, got {weight.dtype}"
    return _native.why_not("cpu")


def spectral_norm(
    weights: list[Tensor], u: list[Tensor], v: list[Tensor], iterations: int, eps: float, dims: list[int]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Power iterations, sigma and W / sigma of all weights by the native kernel, on torch's thread count.

    Arguments and results as ops' of this name. Raises: MemoryError when the kernel finds no memory for its scratch.
    """
    out = [torch.empty_like(weight) for weight in weights]
    u, v = ([one.contiguous() for one in ones] for ones in (u, v))
    left, right = ([torch.empty_like(one) for one in ones] if iterations else [] for ones in (u, v))
    sigma, kept, fields = torch.empty(len(weights)), [], array("q")
    for i, (weight, to, dim) in enumerate(zip(weights, out, dims, strict=True)):
        rows = weight.shape[dim]
        matrix = weight if dim == 0 and weight.is_contiguous() else weight.movedim(dim, 0).contiguous()
        source = weight if weight.stride() == to.stride() else torch.empty_like(to).copy_(weight)
        kept += matrix, source
        new = (left[i].data_ptr(), right[i].data_ptr()) if iterations else (0, 0)
        fields.extend((
            matrix.data_ptr(), source.data_ptr(), to.data_ptr(), u[i].data_ptr(), v[i].data_ptr(), *new,
            rows, weight.numel() // max(rows, 1), TYPES[weight.dtype],
        ))  # fmt: skip
    threads = torch.get_num_threads()
    call = _NORM_CALL.pack(fields.buffer_info()[0], sigma.data_ptr(), len(weights), iterations, eps, threads)
    _check(_native.load("cpu").fastvid_spectral_norm(call))
    return out, left, right, sigma


def spectral_norm_backward(
    grads: list[Tensor], weights: list[Tensor], u: list[Tensor], v: list[Tensor], sigma: Tensor, dims: list[int]
) -> tuple[list[Tensor]]:
    """The gradients of all weights by the native kernel, on torch's thread count; arguments as ops' of this name.

    Raises: MemoryError when the kernel finds no memory for its scratch.
    """
    found, kept, moved, fields = [], [], [], array("q")
    sigma, u, v = sigma.contiguous(), [one.contiguous() for one in u], [one.contiguous() for one in v]
    for i, (grad, weight, dim) in enumerate(zip(grads, weights, dims, strict=True)):
        rows = weight.shape[dim]
        dense, given = (t if dim == 0 and t.is_contiguous() else t.movedim(dim, 0).contiguous() for t in (weight, grad))
        to = torch.empty_like(dense)
        kept += dense, given
        if dense is weight:
            found.append(to)
        else:
            found.append(torch.empty_like(weight))
            moved.append((found[-1], to.movedim(0, dim)))
        fields.extend((
            given.data_ptr(), dense.data_ptr(), to.data_ptr(), u[i].data_ptr(), v[i].data_ptr(),
            rows, weight.numel() // max(rows, 1), TYPES[weight.dtype],
        ))  # fmt: skip
    threads = torch.get_num_threads()
    call = _GRAD_CALL.pack(fields.buffer_info()[0], sigma.data_ptr(), len(weights), threads)
    _check(_native.load("cpu").fastvid_spectral_norm_backward(call))
    for to, done in moved:
        to.copy_(done)
    return (found,)


def _check(outcome: int) -> None:
    if outcome == _NO_MEMORY:
        raise MemoryError("spectral_norm: no memory for the kernel's scratch; pass fewer weights at once.")
    if outcome:
        raise RuntimeError(f"spectral_norm: the native kernel refused its arguments with {outcome}; report this.")
