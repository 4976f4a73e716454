"""DVD-GAN's separable self-attention: along H, then W, then T, in place of attention between all positions."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as spectrally_normed

from fastvid import ops
from fastvid.nn.projected import heads_of, self_attention, zeros_as

NAMES = "T", "H", "W"


class FrameCache(NamedTuple):
    """What SeparableAttention.step remembers: written for the frames so far."""

    keys: Tensor  # [B, T, H, W, 1, E]
    values: Tensor  # [B, T, H, W, 1, D]


class SeparableAttention(nn.Module):
    """Self-attention with a gain that starts at zero, along H, then W, then T: a position sees all others after three
    layers, at the memory of a line.

    channels:      C, a multiple of 8: one head, with keys of C / 8 channels and values of C / 2.
    pool:          keys and values are max-pooled over so many positions along the attended axis, one number or one each
                   for T, H, W; BigGAN pools by 2.
    causal:        along T a frame sees itself and earlier ones; `step` then takes a video frame by frame.
    spectral_norm: of all projections, by torch.nn.utils.parametrizations; one power iteration a training step.
    Parameters:    along_h, along_w and along_t, each with theta, phi, g, o, without biases, and gamma, a scalar.
    Raises:        ValueError for channels that are no multiple of 8, or a causal T axis that is pooled.
    Source:        Clark et al. 2019, arXiv:1907.06571v1, for the order; Zhang et al. 2018, arXiv:1805.08318, for the
                   layer; Brock et al. 2018, arXiv:1809.11096, for the widths.
    """

    def __init__(
        self, channels: int, pool: int | Sequence[int] = 1, causal: bool = False, spectral_norm: bool = False
    ):  # fmt: skip
        super().__init__()
        pools = (pool,) * 3 if isinstance(pool, int) else tuple(pool)
        if channels < 8 or channels % 8:
            raise ValueError(f"SeparableAttention: `channels` must be a multiple of 8, got {channels}.")
        if len(pools) != 3 or min(pools) < 1:
            raise ValueError(f"SeparableAttention: `pool` must be a number from 1, or three for T, H, W; got {pool!r}.")
        if causal and pools[0] > 1:
            raise ValueError(
                f"SeparableAttention: frames pooled by {pools[0]} would tell of later ones; for `causal` pass "
                f"pool=(1, {pools[1]}, {pools[2]})."
            )
        self.channels, self.causal = channels, causal
        self.along_h = _GainedAttention(channels, 2, pools[1], "none", spectral_norm)
        self.along_w = _GainedAttention(channels, 3, pools[2], "none", spectral_norm)
        self.along_t = _GainedAttention(channels, 1, pools[0], "causal" if causal else "none", spectral_norm)

    def forward(self, x: Tensor) -> Tensor:
        """x plus what it attends to, three times.

        x:       [B, C, T, H, W], any strides.
        Returns: the same shape, channels last in memory.
        Raises:  ValueError for another number of axes or channels, or a grid that pooling does not divide.
        """
        if x.ndim != 5 or x.shape[1] != self.channels:
            wanted = f"the input must be [B, {self.channels}, T, H, W]"
            raise ValueError(f"SeparableAttention: {wanted}, got {list(x.shape)}.")
        x = x.movedim(1, -1).contiguous()  # [B, T, H, W, C]
        return self.along_t(self.along_w(self.along_h(x))).movedim(-1, 1)

    def new_cache(self, batch: int, shape: tuple[int, int, int]) -> FrameCache:
        """An empty cache for `step`. batch: B; shape: T, H, W of the whole video. Raises ValueError unless causal."""
        if not self.causal:
            raise ValueError("SeparableAttention: a step needs a layer made with causal=True.")
        keys, values = (zeros_as(self.along_t.gamma, batch, *shape, 1, self.channels // part) for part in (8, 2))
        return FrameCache(keys, values)

    @torch.no_grad()
    def step(self, frame: Tensor, cache: FrameCache, t: int) -> Tensor:
        """What forward gives for frame t, from it and the cache, to which it is added.

        frame:   [B, C, H, W]; every frame before it has been stepped through. cache: made by new_cache, under the same
                 autocast.
        Returns: the same shape; without gradients.
        Raises:  ValueError for a frame of another shape or outside of the cache's.
        """
        B, T, H, W = cache.keys.shape[:4]
        if tuple(frame.shape) != (B, self.channels, H, W) or not 0 <= t < T:
            wanted, got = f"{[B, self.channels, H, W]} as one of {T} frames", f"{list(frame.shape)} as frame {t}"
            raise ValueError(f"SeparableAttention.step: `frame` must be {wanted}, got {got}.")
        x = frame.movedim(1, -1)[:, None].contiguous()  # [B, 1, H, W, C]
        return self.along_t.step(self.along_w(self.along_h(x)), cache, t)[:, 0].movedim(-1, 1)


class _GainedAttention(nn.Module):
    """x + gamma * o(attention) along one axis of [B, T, H, W, C]; scores have no scale."""

    def __init__(self, channels: int, axis: int, pool: int, mask: str, spectral_norm: bool):
        super().__init__()
        self.axis, self.pool, self.mask = axis, pool, mask
        linear = lambda cin, cout: nn.Linear(cin, cout, bias=False)  # noqa: E731
        self.theta, self.phi = linear(channels, channels // 8), linear(channels, channels // 8)
        self.g, self.o = linear(channels, channels // 2), linear(channels // 2, channels)
        if spectral_norm:
            for layer in (self.theta, self.phi, self.g, self.o):
                spectrally_normed(layer)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.pool == 1:
            projection = (self.theta.weight, self.phi.weight, self.g.weight, self._gained())
            return x + self_attention(x, [projection], [self.axis], 1, self.mask, scale=1.0)
        q, k, v = self._heads(x)
        return self._joined(x, ops.axial_attention(q, self._pooled(k), self._pooled(v), self.axis, scale=1.0).out)

    def step(self, x: Tensor, cache: FrameCache, t: int) -> Tensor:
        q, k, v = self._heads(x)  # [B, 1, H, W, 1, width]
        cache.keys[:, t : t + 1], cache.values[:, t : t + 1] = k, v
        keys, values = cache.keys[:, : t + 1], cache.values[:, : t + 1]
        return self._joined(x, ops.axial_attention(q, keys, values, self.axis, mask=self.mask, scale=1.0).out)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return heads_of(x, (self.theta.weight, self.phi.weight, self.g.weight), 1)

    def _gained(self) -> Tensor:
        # on the weight the gain costs nothing; on the output it would be a pass over the video, and another back
        return self.gamma * self.o.weight

    def _joined(self, x: Tensor, attended: Tensor) -> Tensor:
        return x + F.linear(attended.flatten(-2), self._gained())

    def _pooled(self, x: Tensor) -> Tensor:
        """[B, T, H, W, 1, E] -> the same with fewer positions along the axis."""
        if x.shape[self.axis] % self.pool:
            raise ValueError(
                f"SeparableAttention: `pool` {self.pool} must divide {NAMES[self.axis - 1]} = {x.shape[self.axis]}."
            )
        return x.unflatten(self.axis, (-1, self.pool)).max(dim=self.axis + 1).values
