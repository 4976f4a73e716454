"""The launcher of the native noise."""

import torch
from torch import Tensor

from fastvid import _native


def why_not(seed: int, samples: Tensor, *_) -> str | None:
    """Why the native gumbel_row cannot serve these arguments, in a few words; None when it can."""
    if samples.device.type != "cpu":
        return f"takes tensors on the CPU, got {samples.device}"
    if samples.dtype != torch.int64:
        return f"takes int64 samples, got {samples.dtype}"
    return _native.why_not("cpu")


def gumbel_row(seed: int, samples: Tensor, stream: int, t: int, y: int, width: int, classes: int) -> tuple[Tensor, ...]:
    """One row of noise [B, W, V] by the native kernel, to the last bit that of the reference; arguments as ops'."""
    samples = samples.contiguous()
    noise = torch.empty(len(samples), width, classes)
    outcome = _native.load("cpu").fastvid_gumbel_row(
        samples.data_ptr(), len(samples), width, classes, seed, stream, t, y, noise.data_ptr()
    )
    if outcome:
        raise RuntimeError(f"gumbel_row: the native kernel refused its arguments with {outcome}; report this.")
    return (noise,)
