"""How rows of a batch are drawn, to start a codebook from them or to give a dead code a new place."""

import torch
from torch import Tensor

SEED_ROWS = 8192  # rows of the first batch that a start by distance chooses from


def uniform_rows(rows: Tensor, count: int) -> Tensor:
    """Rows at random, none twice unless there are too few. [M, D], M > 0 -> [count, D].

    The draws are those of vector-quantize-pytorch, so that equal seeds give equal codebooks.
    """
    M = len(rows)
    if M >= count:
        return rows[torch.randperm(M, device=rows.device)[:count]]
    return rows[torch.randint(0, M, (count,), device=rows.device)]


def stratified_rows(rows: Tensor, far: Tensor, count: int) -> Tensor:
    """Rows at random, none twice unless there are too few, without waiting for the device and without sorting.

    rows:    [M, D], M > 0; far: [M], NaN for rows that must not be drawn.
    Returns: [count, D]. The batch is cut into `count` stretches, one row is drawn of each, and the stretches are handed
             out from a random one on, so that every row is as likely as any other. Without a usable row: any row.
    """
    rank = far.isnan().logical_not().cumsum(0)  # of the usable rows, from 1
    usable = rank[-1]
    slot = (torch.arange(count, device=rows.device) + torch.randint(count, (1,), device=rows.device)) % count
    first, last = slot * usable // count, (slot + 1) * usable // count - 1
    within = (torch.rand(count, device=rows.device) * (last - first + 1)).long()
    wanted = torch.minimum(first + within, torch.maximum(first, last)) + 1
    return rows[torch.searchsorted(rank, wanted).clamp(max=len(rows) - 1)]


def distant_rows(rows: Tensor, far: Tensor, count: int) -> Tensor:
    """Rows drawn in proportion to their squared distance from the nearest code, and a little noise.

    rows:    [M, D], M > 0; far: [M], NaN for rows that must not be drawn. Nothing waits for the device.
    Returns: [count, D]. A common row is near its code already, so it is not drawn again and again.
    Source:  Arthur and Vassilvitskii 2007 (k-means++).
    """
    known = far.nan_to_num(0.0)
    tiny = torch.finfo(far.dtype).tiny
    weights = torch.where(far.isnan(), 0.0, known + known.mean() * 1e-3) + tiny
    picked = rows[torch.multinomial(weights, count, replacement=True)].to(far.dtype)
    return picked + torch.randn_like(picked) * (0.01 / rows.shape[1] ** 0.5)


def distant_start(rows: Tensor, count: int) -> Tensor:
    """First codes, each a row drawn in proportion to its squared distance from the codes before it.

    rows:    [M, D] float32, M > 0, finite.
    Returns: [count, D].
    Source:  Arthur and Vassilvitskii 2007 (k-means++).
    """
    rows = rows[torch.randperm(len(rows), device=rows.device)[:SEED_ROWS]]
    far = (rows - rows.mean(dim=0)).square().sum(dim=1)
    codes = []
    for _ in range(count):
        codes.append(distant_rows(rows, far, 1))
        far = torch.minimum(far, (rows - codes[-1]).square().sum(dim=1))
    return torch.cat(codes)
