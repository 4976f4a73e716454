"""Named sizes of causal_conv: tested, timed and tuned from this one list."""

from dataclasses import dataclass

import torch
from torch import Tensor

PLANE_XT = tuple((dt, 0, dx) for dt in (-2, -1) for dx in (-1, 0, 1)) + ((0, 0, -1), (0, 0, 0))
PLANE_YT = tuple((dt, dy, 0) for dt in (-2, -1) for dy in (-1, 0, 1)) + ((0, -1, 0), (0, 0, 0))
ROWS_5 = tuple((0, dy, dx) for dy in (-2, -1, 0) for dx in (-2, -1, 0, 1, 2))
LEFT_5 = ((0, 0, -2), (0, 0, -1), (0, 0, 0))
CUBE_ABOVE = tuple((dt, dy, dx) for dt in (-1,) for dy in (-1, 0, 1) for dx in (-1, 0, 1)) + (
    (0, -1, -1), (0, -1, 0), (0, -1, 1)
)


@dataclass(frozen=True)
class Case:
    """A grid [B, T, H, W] of Cin channels, mapped to Cout over live taps."""

    name: str
    grid: tuple[int, int, int, int]
    channels: tuple[int, int]
    taps: tuple[tuple[int, int, int], ...]

    def __str__(self) -> str:
        return self.name

    def make(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Fresh random x [B, T, H, W, Cin], weight [taps, Cin, Cout] and bias [Cout]."""
        cin, cout = self.channels
        sizes = ((*self.grid, cin), (len(self.taps), cin, cout), (cout,))
        return tuple(torch.randn(size, device=device, dtype=dtype) for size in sizes)


ALL = [
    Case("top-xt", (2, 3, 8, 8), (48, 96), PLANE_XT),
    Case("top-yt", (2, 3, 8, 8), (48, 96), PLANE_YT),
    Case("bottom-rows", (2, 1, 16, 16), (48, 96), ROWS_5),
    Case("bottom-left", (2, 1, 16, 16), (48, 96), LEFT_5),
    Case("input-cube", (1, 3, 5, 7), (3, 4), CUBE_ABOVE),
    Case("one-position", (1, 1, 1, 1), (1, 2), LEFT_5),
]
