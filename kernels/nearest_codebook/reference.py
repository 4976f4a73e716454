"""Nearest codebook: the definition, in plain torch. Formula and layout: README.md beside this file."""

from typing import NamedTuple

import torch
from torch import Tensor

ROWS_AT_ONCE = 65536  # bounds the [rows, K] score matrix to 128 MiB at K = 512


class Nearest(NamedTuple):
    """What one read of the rows yields: the lookup and the statistics of the codebook update."""

    indices: Tensor  # [N] int64, lowest index on ties
    quantized: Tensor  # [N, D], rows of the codebook as it was before any update
    squared_distance: Tensor  # [N]
    counts: Tensor  # [K] int64, rows per code
    sums: Tensor  # [K, D], sum of the rows of each code


def nearest_indices(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code of each row; lowest index on ties. [N, D], [K, D] -> [N]."""
    # moving both by the mean code leaves the order of distances alone and shrinks the rounding error
    centre = codebook.mean(dim=0)
    codes = codebook - centre
    half_norms = codes.square().sum(dim=1) / 2  # [K]
    chunks = [half_norms - (rows - centre) @ codes.T for rows in x.split(ROWS_AT_ONCE)]  # each [rows, K]
    return torch.cat([scores.argmin(dim=1) for scores in chunks]) if chunks else x.new_zeros(0, dtype=torch.int64)


def nearest_codebook(x: Tensor, codebook: Tensor) -> Nearest:
    """Nearest code of each row, with the per-code counts and sums. [N, D], [K, D] -> Nearest."""
    indices = nearest_indices(x, codebook)
    quantized = codebook[indices]
    counts = indices.new_zeros(codebook.shape[0]).scatter_add_(0, indices, torch.ones_like(indices))
    sums = torch.zeros_like(codebook).index_add_(0, indices, x)
    return Nearest(indices, quantized, (x - quantized).square().sum(dim=1), counts, sums)


def nearest_codebook_ema_(
    codebook: Tensor, cluster_size: Tensor, cluster_sum: Tensor, counts: Tensor, sums: Tensor, decay: float, eps: float
) -> None:
    """Move N, m and e = m / N~ in place towards one batch's counts and sums; N~ is Laplace-smoothed."""
    cluster_size.mul_(decay).add_(counts.to(cluster_size.dtype), alpha=1 - decay)
    cluster_sum.mul_(decay).add_(sums, alpha=1 - decay)
    total = cluster_size.sum()
    smoothed = (cluster_size + eps) / (total + eps * cluster_size.numel()) * total
    codebook.copy_(cluster_sum / smoothed[:, None])
