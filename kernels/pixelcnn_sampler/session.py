"""What every sampler is given and how it is driven: a Job, and rows or frames in order."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from fastvid.kernels.pixelcnn_sampler.packed import Packed, Table
from torch import Tensor

OPEN = -1  # in `given`: a code that is to be drawn

# Scores of two float32 evaluations that add in different orders differ by less than half of this, times 1 / temperature
# where that is above 1: a draw whose two best scores are nearer than that may come out either way.
NEAR_TIE = 1e-4

Progress = Callable[[int], None]  # told how many codes of each sample have just become final


class Sampled(NamedTuple):
    """A grid of codes and how they came about; see fastvid.ops.pixelcnn_sample."""

    logprob: Tensor
    margin: Tensor
    codes: Tensor
    passes: Tensor

    def near_ties(self, temperature: float = 1.0) -> int:
        """Codes whose two best scores are so near that another order of summation might have drawn the other one."""
        return int((self.margin < NEAR_TIE * max(1.0, 1.0 / temperature)).sum())


@dataclass
class Job:
    """The arguments of fastvid.ops.pixelcnn_sample, and room for its results, which sessions write in place.

    codes [B, T, H, W] int64 starts as `given`, OPEN where a code is to be drawn; logprob and margin [B, T, H, W]
    float32; passes [B, T, H] int64, zeros. Inputs and results are contiguous.
    """

    packed: Packed
    condition: Tensor
    samples: Tensor
    seed: int
    stream: int
    first_step: int
    temperature: float
    window: int
    order: str
    given: Tensor | None
    draft: Tensor | None
    table: Table = field(init=False)
    codes: Tensor = field(init=False)
    logprob: Tensor = field(init=False)
    margin: Tensor = field(init=False)
    passes: Tensor = field(init=False)

    def __post_init__(self):
        self.table, self.condition = Table(self.packed.table), self.condition.contiguous()
        self.draft = None if self.draft is None else self.draft.contiguous()
        grid = self.condition.shape[:4]
        new = self.condition.new_empty
        self.codes = new(grid, dtype=torch.int64).fill_(OPEN) if self.given is None else self.given.clone(
            memory_format=torch.contiguous_format
        )
        self.logprob, self.margin = new(grid), new(grid)
        self.passes = new(grid[:3], dtype=torch.int64).zero_()

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """B, T, H, W."""
        return tuple(self.condition.shape[:4])

    @property
    def wavefront(self) -> bool:
        """Whether frames are to be drawn along anti-diagonals, by a session that can."""
        return self.order == "wavefront" or (self.order == "auto" and bool(self.table.wavefront))

    @property
    def noise(self) -> tuple[int, Tensor, int]:
        """The first arguments of `gumbel_row`: seed, samples, stream."""
        return self.seed, self.samples, self.stream


class Session(Protocol):
    """The caches of one backend for one job. `frame(t)` is there in backends that draw along anti-diagonals."""

    def row(self, t: int, y: int) -> None:
        """Make row y of frame t final in the job's results; rows are asked for in raster order, or again."""


def run(
    session: Callable[[Job], Session], weights: Tensor, table: Tensor, *arguments, progress: Progress | None = None
) -> tuple[Tensor, ...]:
    """Sample a whole grid with a backend's session; `arguments` are the op's, from `condition` on.

    Returns logprob, margin, codes and passes as fastvid.ops.pixelcnn_sample does.
    """
    job = Job(Packed(weights, table), *arguments)
    B, T, H, W = job.grid
    if B * T * H * W:
        made = session(job)
        for t in range(T):
            if job.wavefront and hasattr(made, "frame"):
                made.frame(t)
                _tell(progress, H * W)
                continue
            for y in range(H):
                made.row(t, y)
                _tell(progress, W)
    return job.logprob, job.margin, job.codes, job.passes


def _tell(progress: Progress | None, codes: int) -> None:
    if progress is not None:
        progress(codes)
