"""Which random numbers a sample draws."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvid import ops


@dataclass(frozen=True)
class Noise:
    """Which random numbers a batch of samples draws: a pure function of these fields and the position.

    seed: 64-bit. samples: one identity in [0, 2^32) per batch row. stream: which grid, in [0, 2^15).
    first_step: latent time of the grid's t = 0, in [0, 2^32).
    Raises ValueError for an identity that does not fit.
    """

    seed: int
    samples: tuple[int, ...]
    stream: int = 0
    first_step: int = 0

    def __post_init__(self):
        if not all(0 <= identity < 1 << 32 for identity in self.samples):
            raise ValueError(f"Noise: `samples` must lie in [0, 2^32), got {self.samples}.")

    def row(self, t: int, y: int, width: int, classes: int, device: torch.device) -> Tensor:
        """Gumbel noise of one row of codes. -> [B, W, K] float32."""
        samples = torch.tensor(self.samples, dtype=torch.int64, device=device)
        return ops.gumbel_row(self.seed, samples, self.stream, self.first_step + t, y, width, classes)
