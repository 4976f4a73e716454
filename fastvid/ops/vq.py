"""Nearest-codebook lookup and the exponential moving average of its codebook."""

from torch import Tensor

from fastvid.kernels.nearest_codebook import reference
from fastvid.kernels.nearest_codebook.reference import Nearest


def nearest_codebook(x: Tensor, codebook: Tensor) -> Nearest:
    """The nearest code of every row, and what the codebook's moving average needs of the batch.

    x, codebook: [N, D] and [K, D], floating; distances and sums are taken in float32 or wider.
    Returns:     Nearest(indices [N] int64, quantized [N, D], squared_distance [N], counts [K] int64, sums [K, D]).
                 Ties go to the lowest index. Not differentiable: see fastvid.nn.VectorQuantize for straight-through.
    Raises:      ValueError if the widths D differ, the codebook is empty or either input is not floating.
    Source:      van den Oord et al. 2017, arXiv:1711.00937, eq. 1 and appendix A.1.
    """
    if codebook.ndim != 2 or x.ndim != 2 or x.shape[1] != codebook.shape[1] or codebook.shape[0] == 0:
        raise ValueError(
            f"nearest_codebook: `x` must be [N, D] and `codebook` [K, D] with K > 0, "
            f"got {list(x.shape)} and {list(codebook.shape)}; pass rows of the codebook's width."
        )
    if not (x.is_floating_point() and codebook.is_floating_point()):
        raise ValueError(f"nearest_codebook: both inputs must be floating, got {x.dtype} and {codebook.dtype}.")
    wide = x.detach().to(codebook.dtype) if codebook.dtype.itemsize > 2 else x.detach().float()
    return reference.nearest_codebook(wide, codebook.detach().to(wide.dtype))


def nearest_codebook_ema_(
    codebook: Tensor, cluster_size: Tensor, cluster_sum: Tensor, counts: Tensor, sums: Tensor,
    decay: float = 0.99, eps: float = 1e-5,
) -> None:
    """Move a codebook towards one batch's statistics: N, m <- moving averages, e <- m / smoothed N, all in place.

    codebook, cluster_sum: [K, D]; cluster_size: [K]; all float32 or wider whatever the module's dtype.
    counts, sums:          [K] and [K, D] of this batch (all-reduced by the caller when training is distributed).
    decay, eps:            share of the old state kept, in [0, 1); Laplace smoothing of the counts.
    Raises:                ValueError for a state in half precision or a decay outside [0, 1).
    Source:                van den Oord et al. 2017, arXiv:1711.00937, appendix A.1.
    """
    if min(t.dtype.itemsize for t in (codebook, cluster_size, cluster_sum)) < 4:
        raise ValueError("nearest_codebook_ema_: the state must be float32 or wider: in half precision it stalls.")
    if not 0 <= decay < 1:
        raise ValueError(f"nearest_codebook_ema_: `decay` must lie in [0, 1), got {decay}.")
    reference.nearest_codebook_ema_(codebook, cluster_size, cluster_sum, counts, sums, decay, eps)
