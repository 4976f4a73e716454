"""Causal attention over the earlier positions of a video grid: all of them in raster order, or those on its axes."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid import ops


class AttentionCache(NamedTuple):
    """What CausalAttention3d.step remembers: written for the positions so far, in raster order."""

    keys: Tensor  # [B, T, H, W, A, E]
    values: Tensor  # [B, T, H, W, A, E]
    placed: Tensor  # [T, H, W, 3C], what the coordinates add to queries, keys and values


class CausalAttention3d(nn.Module):
    """Multi-head attention in which a position sees itself and earlier ones; queries, keys and values know where they
    are by three coordinates in [-0.5, 0.5).

    channels, heads: C and A; the heads are C / A wide.
    axial:           False: every earlier position in raster order. True: one softmax over (t, y, x' <= x),
                     (t, y' < y, x) and (t' < t, y, x), T + H + W - 2 keys at most, none of them above and to the
                     right. The parameters are the same.
    Raises:          ValueError if A does not divide C.
    Source:          Chen et al. 2018 (PixelSNAIL), arXiv:1712.09763, for the coordinates; Razavi et al. 2019,
                     arXiv:1906.00446, for the place in the stack.
    """

    def __init__(self, channels: int, heads: int, axial: bool = False):
        super().__init__()
        if channels % heads:
            raise ValueError(f"CausalAttention3d: `heads` must divide `channels`, got {heads} and {channels}.")
        self.heads, self.axial = heads, axial
        self.qkv = nn.Linear(channels, 3 * channels)
        self.qkv_position = nn.Linear(3, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, H, W, C] -> the same shape; the residual is the caller's."""
        qkv = self._split(self.qkv(h) + self._placed(h))  # [B, T, H, W, 3, A, E]
        if not self.axial:
            q, k, v = qkv.flatten(1, 3).permute(2, 0, 3, 1, 4)  # [B, A, N, E] each
            # in raster order this is plain causal attention, which torch has fast
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)  # [B, N, A, E]
            return self.out(attended.reshape(h.shape))
        parts = [ops.axial_attention(qkv, axis=3, mask="causal", keep=True)]
        # along the others a position does not see itself again, and nothing at all where there is one position
        parts += [ops.axial_attention(qkv, axis=a, mask="strict", keep=True) for a in (2, 1) if h.shape[a] > 1]
        return self.out(_merged(parts).flatten(-2))

    def new_cache(self, batch: int, grid: tuple[int, int, int]) -> AttentionCache:
        """An empty cache for `step` over a grid (T, H, W), in the parameters' dtype and on their device."""
        weight = self.qkv.weight
        # a head's positions side by side in memory, as a step reads them one after the other
        size = batch, self.heads, *grid, weight.shape[1] // self.heads
        keys, values = (weight.new_empty(size).movedim(1, -2) for _ in range(2))
        return AttentionCache(keys, values, self._placed(weight.new_empty(1, *grid, 0)))

    @torch.no_grad()
    def step(self, h: Tensor, cache: AttentionCache, position: tuple[int, int, int]) -> Tensor:
        """What forward gives at a run of positions of one row, from those and the cache, to which it adds them.

        h:        [B, n, C], for the positions (t, y, x), ..., (t, y, x + n - 1); every position before them in raster
                  order has been stepped through.
        cache:    made by new_cache, for the whole grid. position: (t, y, x).
        Returns:  [B, n, C]; without gradients.
        Raises:   ValueError for a run that leaves its row, or another batch than the cache's.
        """
        (t, y, x), n = position, h.shape[1]
        B, T, H, W = cache.keys.shape[:4]
        if h.shape[0] != B or not (0 <= t < T and 0 <= y < H and 0 <= x < x + n <= W):
            wanted, got = f"[{B}, n, C] within a row of the grid {(T, H, W)}", f"{list(h.shape)} at {position}"
            raise ValueError(f"CausalAttention3d.step: `h` must be {wanted}, got {got}.")
        row = slice(x, x + n)
        q, k, v = self._split(self.qkv(h) + cache.placed[t, y, row])[:, None, None].unbind(-3)  # [B, 1, 1, n, A, E]
        cache.keys[:, t, y, row], cache.values[:, t, y, row] = k[:, 0, 0], v[:, 0, 0]
        if self.axial:
            attended = _merged(_on_axes(q, cache, t, y, row))
        else:
            so_far = (t * H + y) * W + x + n
            keys, values = (kept.flatten(1, 3)[:, None, None, :so_far] for kept in cache[:2])  # [B, 1, 1, N, A, E]
            attended = ops.axial_attention(q, keys, values, axis=3, mask="causal").out
        return self.out(attended.flatten(-2)[:, 0, 0])

    def _placed(self, h: Tensor) -> Tensor:
        return self.qkv_position(coordinates(*h.shape[1:4]).to(h))  # [T, H, W, 3C]

    def _split(self, qkv: Tensor) -> Tensor:
        return qkv.unflatten(-1, (3, self.heads, -1))


def _on_axes(q: Tensor, cache: AttentionCache, t: int, y: int, row: slice) -> list[ops.Attended]:
    """What a run of queries sees on each axis that has something; [B, 1, 1, n, A, E] each."""
    keys, values = cache[:2]
    so_far = (slice(None), slice(t, t + 1), slice(y, y + 1), slice(row.stop))
    parts = [ops.axial_attention(q, keys[so_far], values[so_far], axis=3, mask="causal", keep=True)]
    above, before = (slice(None), slice(t, t + 1), slice(y), row), (slice(None), slice(t), slice(y, y + 1), row)
    for seen, axis in ((above, 2), (before, 1)):
        if keys[seen].numel():
            parts.append(ops.axial_attention(q, keys[seen], values[seen], axis=axis, keep=True))
    return parts


def _merged(parts: list[ops.Attended]) -> Tensor:
    """Attention to several sets of keys as one softmax over them all, by their logsumexps."""
    shares = torch.stack([part.lse for part in parts]).softmax(dim=0)  # [parts, B, T, H, W, A]
    return sum(share.unsqueeze(-1).to(part.out.dtype) * part.out for share, part in zip(shares, parts, strict=True))


def coordinates(T: int, H: int, W: int) -> Tensor:
    """Where each position is. -> [T, H, W, 3] float32, (t, y, x) each in [-0.5, 0.5)."""
    axes = [torch.arange(n, dtype=torch.float32) / n - 0.5 for n in (T, H, W)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
