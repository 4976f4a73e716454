"""Causal attention over all earlier positions of a video grid, in raster order."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalAttention(nn.Module):
    """Multi-head attention in which a position sees itself and every earlier one; queries, keys and values know where
    they are by three coordinates in [-0.5, 0.5).

    channels, heads: C and A; the heads are C / A wide.
    Raises:          ValueError if A does not divide C.
    Source:          Chen et al. 2018 (PixelSNAIL), arXiv:1712.09763, for the coordinates; Razavi et al. 2019,
                     arXiv:1906.00446, for the place in the stack.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        if channels % heads:
            raise ValueError(f"CausalAttention: `heads` must divide `channels`, got {heads} and {channels}.")
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.qkv_position = nn.Linear(3, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, H, W, C] -> the same shape; the residual is the caller's."""
        B, T, H, W, C = h.shape
        qkv = self.qkv(h) + self.qkv_position(coordinates(T, H, W).to(h))  # [B, T, H, W, 3C]
        q, k, v = qkv.view(B, T * H * W, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # [B, A, N, E] each
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).reshape(B, T, H, W, C))


def coordinates(T: int, H: int, W: int) -> Tensor:
    """Where each position is. -> [T, H, W, 3] float32, (t, y, x) each in [-0.5, 0.5)."""
    axes = [torch.arange(n, dtype=torch.float32) / n - 0.5 for n in (T, H, W)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
