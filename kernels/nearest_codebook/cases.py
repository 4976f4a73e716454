"""Named sizes of nearest_codebook: tested, timed and tuned from this one list."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """N rows of width D against K codes."""

    name: str
    N: int
    K: int
    D: int

    def __str__(self) -> str:
        return self.name

    def make(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Fresh random rows [N, D] and codebook [K, D]."""
        return (
            torch.randn(self.N, self.D, device=device, dtype=dtype),
            torch.randn(self.K, self.D, device=device, dtype=dtype),
        )


ALL = [
    Case("one-row", 1, 3, 1),
    Case("odd", 77, 13, 5),
    Case("dino64-top", 8 * 256, 512, 16),
    Case("paper-top-clip", 4096, 512, 64),
]
