"""Vector quantisation with a codebook that follows the data by moving averages."""

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from fastvid import ops

SEED_ROWS = 8192  # rows of the first batch that the start chooses from


class VectorQuantize(nn.Module):
    """Replaces every row by its nearest code; the codebook is the moving average of the rows it stands for.

    The first training batch seeds the codebook with rows drawn from it, each counted once. A code whose moving
    count falls below `dead_below` is reborn at a row of the batch, its count and sum with it. Every draw is in
    proportion to a row's squared distance from the nearest code, so that a common row is not drawn again and again.
    State is float32.

    dim, codebook_size: D and K.
    decay:              share of the old state kept per batch.
    commitment_weight:  factor of the returned loss.
    dead_below:         rows per batch under which a code counts as dead; 0 never restarts.
    Source:             van den Oord et al. 2017, arXiv:1711.00937, appendix A.1; Razavi et al. 2019, arXiv:1906.00446;
                        Arthur and Vassilvitskii 2007 (k-means++) for the draw.
    """

    def __init__(
        self, dim: int, codebook_size: int, decay: float = 0.99, commitment_weight: float = 0.25,
        eps: float = 1e-5, dead_below: float = 0.05,
    ):
        super().__init__()
        self.dim, self.codebook_size = dim, codebook_size
        self.decay, self.commitment_weight, self.eps, self.dead_below = decay, commitment_weight, eps, dead_below
        self.register_buffer("codebook", torch.randn(codebook_size, dim))
        self.register_buffer("cluster_size", torch.ones(codebook_size))
        self.register_buffer("cluster_sum", self.codebook.clone())
        self.register_buffer("started", torch.tensor(False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise rows, straight-through; in training mode the codebook moves afterwards.

        x:       [..., D], floating.
        Returns: quantized [..., D] in x's dtype (its gradient is x's), indices [...] int64, commitment loss (scalar,
                 mean over elements times `commitment_weight`).
        Raises:  ValueError if the last axis is not D.
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"VectorQuantize: the last axis of `x` must be D = {self.dim}, got {list(x.shape)}.")
        rows = x.reshape(-1, self.dim)  # [N, D]
        if self.training and not self.started:
            self._start(rows.detach().float())
        near = ops.nearest_codebook(rows, self.codebook)
        quantized = near.quantized.to(x.dtype).view_as(x)
        loss = self.commitment_weight * F.mse_loss(x, quantized)
        if self.training:
            self._follow(rows.detach().float(), near)
        return x + (quantized - x).detach(), near.indices.view(x.shape[:-1]), loss

    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors of indices. [...] int64 -> [..., D]."""
        return F.embedding(indices, self.codebook)

    @torch.no_grad()
    def _start(self, rows: Tensor) -> None:
        rows = rows[torch.randperm(rows.shape[0], device=rows.device)[:SEED_ROWS]]
        far = (rows - rows.mean(dim=0)).square().sum(dim=1)
        for code in self.codebook:
            code.copy_(self._draw(rows, far, 1)[0])
            far = torch.minimum(far, (rows - code).square().sum(dim=1))
        self.cluster_sum.copy_(self.codebook)
        self.cluster_size.fill_(1)
        self.started.fill_(True)

    @torch.no_grad()
    def _follow(self, rows: Tensor, near: ops.Nearest) -> None:
        counts, sums = near.counts, near.sums
        if _is_distributed():
            counts, sums = counts.clone(), sums.clone()
            distributed.all_reduce(counts)
            distributed.all_reduce(sums)
        ops.nearest_codebook_ema_(
            self.codebook, self.cluster_size, self.cluster_sum, counts, sums, self.decay, self.eps
        )
        if self.dead_below > 0:
            self._restart_dead(rows, near.squared_distance.float())

    def _restart_dead(self, rows: Tensor, far: Tensor) -> None:
        dead = (self.cluster_size < self.dead_below).nonzero().flatten()
        if dead.numel() == 0:
            return
        # code, count and sum move together: a code revived alone would be averaged back to death at once
        self.codebook[dead] = self._draw(rows, far, dead.numel())
        self.cluster_sum[dead] = self.codebook[dead]
        self.cluster_size[dead] = 1.0

    def _draw(self, rows: Tensor, far: Tensor, count: int) -> Tensor:
        """`count` rows, each with probability in proportion to `far`, and a little noise; the same on every rank."""
        weights = far + far.mean() * 1e-3 + torch.finfo(far.dtype).tiny
        picked = rows[torch.multinomial(weights, count, replacement=True)]
        picked = picked + torch.randn_like(picked) * (0.01 / self.dim**0.5)
        if _is_distributed():
            distributed.broadcast(picked, src=0)
        return picked


def perplexity(indices: Tensor, codebook_size: int) -> Tensor:
    """How many codes a batch uses, as exp of the entropy of their frequencies: between 1 and `codebook_size`."""
    codes = indices.flatten()
    frequency = codes.new_zeros(codebook_size).scatter_add_(0, codes, torch.ones_like(codes)).double()
    frequency = frequency / frequency.sum()
    return torch.exp(torch.special.entr(frequency).sum()).float()


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
