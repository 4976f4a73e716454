"""How far a figure over a sample of clips may be off."""

from collections.abc import Callable

import torch
from torch import Tensor

DRAWS, COVERAGE = 1000, 0.95
_DRAWN_AT_ONCE = 1 << 22  # groups: bounds the tables of draws that are held


def bootstrap_interval(
    values: Tensor, groups: Tensor, statistic: Callable[[Tensor], Tensor] | None = None, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of a figure, by drawing whole groups again.

    Few groups make it too narrow. Of 600 simulated samples of normal values it held the true mean in 52% (2 groups),
    76% (3), 87% (5), 92% (10 and 20) and 94% (50): below ten groups it should not be reported as one of 95%.

    values:    [n, F] or [n], floating, finite: what each window contributes.
    groups:    [n] int64: windows of one clip resemble each other, so they are drawn together.
    statistic: from means over windows [R, F] to figures [R]; None takes the one column as it is.
    Returns:   (low, high) in the units of the figure; equal where there is one group only.
    Raises:    ValueError for no values or another number of groups.
    Source:    Efron 1979, doi:10.1214/aos/1176344552; 1000 draws.
    """
    if values.shape[0] < 1 or groups.shape != values.shape[:1]:
        raise ValueError(
            f"bootstrap_interval: `groups` must be [n] for `values` [n, ...], n > 0, got {list(groups.shape)} and "
            f"{list(values.shape)}."
        )
    columns = values.double().reshape(len(values), -1)  # [n, F]
    _, place = groups.unique(return_inverse=True)
    G = int(place.max()) + 1
    sums = columns.new_zeros(G, columns.shape[1]).index_add_(0, place, columns)
    sizes = torch.bincount(place, minlength=G).double()
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _DRAWN_AT_ONCE // G)
    parts = [_means(sums, sizes, min(at_once, DRAWS - done), generator) for done in range(0, DRAWS, at_once)]
    means = torch.cat(parts)  # [R, F]
    figures = means.squeeze(1) if statistic is None else statistic(means)
    tail = (1 - COVERAGE) / 2
    low, high = torch.quantile(figures, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _means(sums: Tensor, sizes: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Sums [G, F] and sizes [G] of the groups -> means over the windows of groups drawn again [draws, F]."""
    G = len(sums)
    drawn = torch.randint(G, (draws, G), generator=generator)
    weights = torch.zeros(draws, G, dtype=torch.float64).scatter_add_(1, drawn, sums.new_ones(()).expand_as(drawn))
    return (weights @ sums) / (weights @ sizes).unsqueeze(1)
