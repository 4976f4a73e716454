"""Causal attention over the earlier positions of a video grid: all of them in raster order, or those on its axes."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalAttention(nn.Module):
    """Multi-head attention in which a position sees itself and earlier ones; queries, keys and values know where they
    are by three coordinates in [-0.5, 0.5).

    channels, heads: C and A; the heads are C / A wide.
    axial:           False: every earlier position in raster order. True: one softmax over (t, y, x' <= x),
                     (t, y' < y, x) and (t' < t, y, x), T + H + W - 2 keys at most, none of them above and to the
                     right. The parameters are the same; training still forms all N^2 scores and masks them.
    Raises:          ValueError if A does not divide C.
    Source:          Chen et al. 2018 (PixelSNAIL), arXiv:1712.09763, for the coordinates; Razavi et al. 2019,
                     arXiv:1906.00446, for the place in the stack.
    """

    def __init__(self, channels: int, heads: int, axial: bool = False):
        super().__init__()
        if channels % heads:
            raise ValueError(f"CausalAttention: `heads` must divide `channels`, got {heads} and {channels}.")
        self.heads, self.axial = heads, axial
        self.qkv = nn.Linear(channels, 3 * channels)
        self.qkv_position = nn.Linear(3, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, H, W, C] -> the same shape; the residual is the caller's."""
        B, T, H, W, C = h.shape
        qkv = self.qkv(h) + self.qkv_position(coordinates(T, H, W).to(h))  # [B, T, H, W, 3C]
        q, k, v = qkv.view(B, T * H * W, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # [B, A, N, E] each
        mask = _mask_for(h) if self.axial else None
        attended = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.out(attended.transpose(1, 2).reshape(B, T, H, W, C))


def axial_mask(T: int, H: int, W: int, device: torch.device | str = "cpu") -> Tensor:
    """Which keys a query of axial causal attention sees: itself and what lies before it on one of its three axes.

    Returns: [N, N] bool, N = T H W in raster order, queries first; on `device`.
    """
    n = torch.arange(T * H * W, device=device)
    t, y, x = n // (H * W), n // W % H, n % W
    same_t, same_y, same_x = (axis[:, None] == axis for axis in (t, y, x))  # [N, N] each
    on_an_axis = same_t & same_y | same_t & same_x | same_y & same_x
    return on_an_axis & (n <= n[:, None])


_kept_mask = lru_cache(maxsize=8)(axial_mask)


def _mask_for(h: Tensor) -> Tensor:
    """The mask of h's grid, made once per grid and device; a compiled graph forms it itself."""
    grid = (*h.shape[1:4], h.device)
    if torch.compiler.is_compiling() or type(h) is not Tensor:
        return axial_mask(*grid)
    with torch.inference_mode(False):  # a mask first made under inference mode must serve training too
        return _kept_mask(*grid)


def coordinates(T: int, H: int, W: int) -> Tensor:
    """Where each position is. -> [T, H, W, 3] float32, (t, y, x) each in [-0.5, 0.5)."""
    axes = [torch.arange(n, dtype=torch.float32) / n - 0.5 for n in (T, H, W)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
