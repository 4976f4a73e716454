"""Named sizes of the noise rows: tested, timed and tuned from this one list."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One row of W codes of V classes for B samples."""

    name: str
    B: int
    W: int
    V: int

    def __str__(self) -> str:
        return self.name

    def make(self, device: torch.device | str = "cpu") -> Tensor:
        """Identities of B samples, [B] int64, far apart."""
        return torch.arange(self.B, device=device) * 1_000_003 % (1 << 32)


ALL = [
    Case("one-code", 1, 1, 1),
    Case("odd", 3, 5, 37),
    Case("dino64-bottom", 10, 16, 512),
    Case("paper-top", 1, 32, 512),
]
