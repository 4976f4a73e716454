"""Launchers of the native CPU kernels: tensors become pointers, sizes and strides; an outcome becomes an exception."""

import torch
from torch import Tensor

from fastvid import _native

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Type of kernels/common/types.h
SCREENS = {"auto": 0, "int16": 1, "float32": 2, "none": 3}  # enum Screen
_NO_MEMORY = 1  # enum Outcome


def why_not(x: Tensor, codebook: Tensor, statistics: bool = True, precision: str = "exact") -> str | None:
    """Why the native nearest_codebook cannot serve these arguments, in a few words; None when it can.

    x, codebook: [N, D] and [K, D] of any dtype, on any device.
    """
    if x.device.type != "cpu":
        return f"takes tensors on the CPU, got {x.device}"
    if x.dtype not in TYPES or codebook.dtype not in TYPES:
        return f"takes float32, bfloat16 and float16, got {x.dtype} and {codebook.dtype}"
    return _native.why_not("cpu")


def nearest_codebook(
    x: Tensor, codebook: Tensor, statistics: bool = True, precision: str = "exact", screen: str = "auto"
) -> tuple[Tensor, ...]:
    """The nearest code of every row and the statistics of the batch, by the native kernel, on torch's thread count.

    x, codebook: [N, D] and [K, D], float32, bfloat16 or float16, any strides. Any precision is served exactly.
    screen:      how candidates are found, one of SCREENS; the result does not depend on it, to the last bit.
    Returns:     indices, quantized, squared_distance, counts, sums, nonfinite, as ops.nearest_codebook.
    Raises:      MemoryError when the kernel finds no memory for its scratch.
    """
    N, (K, D) = x.shape[0], codebook.shape
    if D > 1 and x.stride(1) != 1:
        x = x.contiguous()
    codebook = codebook.float().contiguous()  # [K, D]
    indices, nonfinite = torch.empty(N, dtype=torch.int64), torch.empty((), dtype=torch.int64)
    quantized, distance = torch.empty(N, D, dtype=x.dtype), torch.empty(N)
    codes = K if statistics else 0
    counts, sums = torch.empty(codes, dtype=torch.int64), torch.empty(codes, D)
    outcome = _native.load("cpu").fastvid_nearest_codebook(
        x.data_ptr(), TYPES[x.dtype], x.stride(0), codebook.data_ptr(), N, K, D,
        indices.data_ptr(), quantized.data_ptr(), distance.data_ptr(),
        counts.data_ptr() if statistics else None, sums.data_ptr() if statistics else None,
        nonfinite.data_ptr(), torch.get_num_threads(), SCREENS[screen], None,
    )  # fmt: skip
    if outcome == _NO_MEMORY:
        raise MemoryError(f"nearest_codebook: no memory for the scratch of {N} rows and {K} codes; pass fewer at once.")
    if outcome:
        raise RuntimeError(f"nearest_codebook: the native kernel refused its arguments with {outcome}; report this.")
    return indices, quantized, distance, counts, sums, nonfinite


def why_not_update(codebook: Tensor, cluster_size: Tensor, cluster_sum: Tensor, counts: Tensor, sums: Tensor,
                   decay: float = 0.99, eps: float = 1e-5, steps: Tensor | None = None, dead_below: float = 0.0,
                   restart: Tensor | None = None, restart_size: float = 1.0) -> str | None:  # fmt: skip
    """Why the native nearest_codebook_ema_ cannot serve these arguments, in a few words; None when it can."""
    floats = [codebook, cluster_size, cluster_sum, sums, *([] if restart is None else [restart])]
    integers = [counts, *([] if steps is None else [steps])]
    if any(tensor.device.type != "cpu" for tensor in floats + integers):
        return f"takes tensors on the CPU, got {codebook.device}"
    if any(tensor.dtype != torch.float32 for tensor in floats) or any(t.dtype != torch.int64 for t in integers):
        return "takes a float32 state and batch with int64 counts and steps"
    if not all(tensor.is_contiguous() for tensor in floats + integers):
        return "takes contiguous tensors"
    return _native.why_not("cpu")


def nearest_codebook_ema_(
    codebook: Tensor, cluster_size: Tensor, cluster_sum: Tensor, counts: Tensor, sums: Tensor, decay: float, eps: float,
    steps: Tensor | None, dead_below: float, restart: Tensor | None, restart_size: float,
) -> None:
    """The moving average by the native kernel, in place, on torch's thread count; arguments as ops' of this name."""
    outcome = _native.load("cpu").fastvid_update_codebook(
        codebook.data_ptr(), cluster_size.data_ptr(), cluster_sum.data_ptr(), counts.data_ptr(), sums.data_ptr(),
        *codebook.shape, decay, eps, None if steps is None else steps.data_ptr(), dead_below,
        None if restart is None else restart.data_ptr(), restart_size, torch.get_num_threads(),
    )  # fmt: skip
    if outcome:
        raise RuntimeError(f"nearest_codebook_ema_: the native kernel refused its arguments with {outcome}; report it.")
