"""Nearest codebook: the definition, in plain torch. Formula and layout: README.md beside this file."""

from typing import NamedTuple

import torch
from torch import Tensor

ROWS_AT_ONCE = 65536  # bounds the [rows, K] score matrix to 128 MiB at K = 512


class Nearest(NamedTuple):
    """What one read of the rows yields: the lookup and the statistics of the codebook update."""

    indices: Tensor  # [N] int64, lowest index on ties, 0 for a row that is not finite
    quantized: Tensor  # [N, D] in x's dtype, rows of the codebook as it was before any update
    squared_distance: Tensor  # [N], NaN for a row that is not finite
    counts: Tensor  # [K] int64, finite rows per code; [0] without statistics
    sums: Tensor  # [K, D], sum of the finite rows of each code; [0, D] without statistics
    nonfinite: Tensor  # [] int64, rows that hold a NaN or an infinity


def wide_dtype(x: Tensor, codebook: Tensor) -> torch.dtype:
    """What distances and sums are taken in: float64 if either is, else float32."""
    return torch.float64 if torch.float64 in (x.dtype, codebook.dtype) else torch.float32


def nearest_indices(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code of each row; lowest index on ties. [N, D], [K, D] -> [N]."""
    # moving both by the mean code leaves the order of distances alone and shrinks the rounding error
    centre = codebook.mean(dim=0)
    codes = codebook - centre
    half_norms = codes.square().sum(dim=1) / 2  # [K]
    chunks = [half_norms - (rows - centre) @ codes.T for rows in x.split(ROWS_AT_ONCE)]  # each [rows, K]
    return torch.cat([scores.argmin(dim=1) for scores in chunks])


def nearest_codebook(x: Tensor, codebook: Tensor, statistics: bool = True, precision: str = "exact") -> Nearest:
    """Nearest code of each row, with the per-code counts and sums. [N, D], [K, D] -> Nearest; always exact."""
    wide, (K, D) = wide_dtype(x, codebook), codebook.shape
    rows, codes = x.to(wide), codebook.to(wide)
    finite = rows.isfinite().all(dim=1)
    indices = torch.where(finite, nearest_indices(rows, codes), 0)
    quantized = codes[indices]
    distance = torch.where(finite, (rows - quantized).square().sum(dim=1), torch.nan)
    counts, sums = indices.new_zeros(K if statistics else 0), rows.new_zeros(K if statistics else 0, D)
    if statistics:
        counts.scatter_add_(0, indices, finite.long())
        sums.index_add_(0, indices, torch.where(finite[:, None], rows, 0))
    return Nearest(indices, quantized.to(x.dtype), distance, counts, sums, (~finite).sum())


def nearest_codebook_ema_(
    codebook: Tensor, cluster_size: Tensor, cluster_sum: Tensor, counts: Tensor, sums: Tensor, decay: float, eps: float,
    steps: Tensor | None = None, dead_below: float = 0.0, restart: Tensor | None = None, restart_size: float = 1.0,
) -> None:
    """Move N, m and e = m / N~ in place towards one batch's counts and sums; N~ is debiased and Laplace-smoothed."""
    keep = sums.isfinite().all(dim=1)
    size = torch.where(keep, cluster_size.lerp(counts.to(cluster_size.dtype), 1 - decay), cluster_size)
    total_sum = torch.where(keep[:, None], cluster_sum.lerp(sums.to(cluster_sum.dtype), 1 - decay), cluster_sum)
    share = torch.ones_like(size[0])  # of the moving average's weights that have been given out by now
    if steps is not None:
        steps += 1
        share = 1 - decay ** steps.to(size.dtype)
    # dividing both by their common share reads the averages as if they had not started from zero
    seen, seen_sum = size / share, total_sum / share
    smoothed = (seen + eps) / (seen.sum() + eps * size.numel()) * seen.sum()
    codes = torch.where(keep[:, None] & (smoothed > 0)[:, None], seen_sum / smoothed[:, None], codebook)
    if restart is not None:
        # code, count and sum move together: a code revived alone would be averaged back to death at once
        dead = seen < dead_below
        codes = torch.where(dead[:, None], restart.to(codes.dtype), codes)
        size = torch.where(dead, restart_size * share, size)
        total_sum = torch.where(dead[:, None], restart.to(codes.dtype) * (restart_size * share), total_sum)
    codebook.copy_(codes)
    cluster_size.copy_(size)
    cluster_sum.copy_(total_sum)
