"""Best of N: of several predictions of a clip the one nearest to the truth, as stochastic predictors are judged."""

from typing import NamedTuple

import torch
from torch import Tensor


class BestOf(NamedTuple):
    """index [B] int64: the sample chosen. value [B]: its mean over frames. curve [B, n]: its frames.
    mean [B]: over samples and frames; what a single prediction is worth. All but the index float64."""

    index: Tensor
    value: Tensor
    curve: Tensor
    mean: Tensor


def best_of(values: Tensor, higher_is_better: bool) -> BestOf:
    """Choose each clip's best sample by its mean over the predicted frames, apart for every metric.

    values:           [B, S, n], floating: a metric of each frame of S samples per clip; infinite is allowed.
    higher_is_better: True for SSIM and PSNR, False for LPIPS; a wrong one would report the worst sample.
    Returns:          BestOf; the first of equal samples is chosen.
    Raises:           ValueError for other shapes or dtypes, nothing in them, or a NaN.
    Source:           Denton and Fergus 2018, arXiv:1802.07687; Castrejon, Ballas, Courville 2019, arXiv:1904.12165:
                      100 samples, the best per metric.
    """
    if values.ndim != 3 or not values.is_floating_point() or values.numel() == 0:
        raise ValueError(
            f"best_of: `values` must be floating [B, S, n], none of them 0, got {values.dtype} {list(values.shape)}."
        )
    values = values.double()
    means = values.mean(dim=2)  # [B, S]
    if means.isnan().any():
        raise ValueError(f"best_of: {int(means.isnan().sum())} of {means.numel()} samples hold a NaN; none is better.")
    best = means.amax(dim=1, keepdim=True) if higher_is_better else means.amin(dim=1, keepdim=True)
    index = (means == best).int().argmax(dim=1)  # [B]
    rows = torch.arange(len(values), device=values.device)
    return BestOf(index, best.squeeze(1), values[rows, index], means.mean(dim=1))
