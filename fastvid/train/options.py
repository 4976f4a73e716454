"""What a training run may be told, and which of it may change when the run is continued."""

import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from fastvid.errors import UsageError

# these decide when the run writes, reports or stops, never what the weights become
FREE_ON_RESUME = ("checkpoint_every", "sample_every", "log_every", "minutes", "threads")


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train`, checked when made (UsageError).

    steps, warmup:     optimizer steps in all, and those over which the learning rate rises from zero.
    batch_size:        clips per step over all processes together.
    decay:             "cosine" takes the learning rate to zero at the last step, "none" keeps it.
    clip_norm:         largest L2 norm of the whole gradient.
    ema_decay:         Polyak averaging of the weights; ramps up from 0.1 so that early averages forget the start.
    minutes:           stop cleanly, with a checkpoint, after this much wall time; None never does.
    sample_every:      steps between sample sheets; 0 draws none.
    threads:           torch's CPU threads; None leaves them as they are. Other numbers round differently.
    """

    steps: int = 100_000
    batch_size: int = 16
    learning_rate: float = 3e-4
    warmup: int = 500
    decay: Literal["cosine", "none"] = "cosine"
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    checkpoint_every: int = 1000
    sample_every: int = 1000
    log_every: int = 50
    minutes: float | None = None
    threads: int | None = None

    def __post_init__(self):
        at_least = {"steps": 1, "batch_size": 1, "warmup": 0, "weight_decay": 0, "seed": 0, "checkpoint_every": 1,
                    "sample_every": 0, "log_every": 1}
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise UsageError(f"--{_dashed(name)} must be at least {low}, got {getattr(self, name)}.")
        for name in ("learning_rate", "clip_norm", "minutes", "threads"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UsageError(f"--{_dashed(name)} must be above 0, got {value}.")
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"--ema-decay must lie in [0, 1), got {self.ema_decay}.")
        if self.decay not in ("cosine", "none"):
            raise UsageError(f"--decay must be cosine or none, got {self.decay}.")

    def set_threads(self) -> None:
        """Give torch the asked number of CPU threads. Raises nothing."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def rate_at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0. Raises nothing."""
        rate = self.learning_rate * min(1.0, (step + 1) / (self.warmup + 1))
        if self.decay == "none":
            return rate
        return rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def ema_at(self, step: int) -> float:
        """Share of the old average kept at step `step`, counted from 0. Raises nothing."""
        return min(self.ema_decay, (1 + step) / (10 + step))

    def fixed(self) -> dict:
        """The options that must stay the same for a continued run to equal an unbroken one. Raises nothing."""
        # without a schedule the number of steps is only where to stop
        free = (*FREE_ON_RESUME, "steps") if self.decay == "none" else FREE_ON_RESUME
        return {name: value for name, value in asdict(self).items() if name not in free}


def _dashed(name: str) -> str:
    return name.replace("_", "-")
