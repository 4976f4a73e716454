"""What a training run may be told, and which of it may change when the run is continued."""

import math
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch

from fastvid.errors import UsageError

# these decide when the run writes, reports or stops, never what the weights become
FREE_ON_RESUME = ("checkpoint_every", "sample_every", "log_every", "minutes", "threads", "checkpointing")


@dataclass(frozen=True)
class RunOptions:
    """What every training may be told, checked when made (UsageError).

    steps, warmup:     optimizer steps in all, and those over which the learning rate rises from zero.
    batch_size:        clips per step over all processes together.
    decay:             "cosine" takes the learning rate to zero at the last step, "none" keeps it.
    ema_decay:         Polyak averaging of the weights; ramps up from 0.1 so that early averages forget the start.
    minutes:           stop cleanly, with a checkpoint, after this much wall time; None never does.
    sample_every:      steps between sample sheets; 0 draws none.
    threads:           torch's CPU threads; None leaves them as they are. Other numbers round differently.
    """

    steps: int = 100_000
    batch_size: int = 16
    warmup: int = 500
    decay: Literal["cosine", "none"] = "cosine"
    ema_decay: float = 0.999
    seed: int = 0
    checkpoint_every: int = 1000
    sample_every: int = 1000
    log_every: int = 50
    minutes: float | None = None
    threads: int | None = None

    # the least value that each may have, and those that must be above 0 where they are not None
    AT_LEAST: ClassVar = {"steps": 1, "batch_size": 1, "warmup": 0, "seed": 0, "checkpoint_every": 1,
                          "sample_every": 0, "log_every": 1}
    POSITIVE: ClassVar = ("minutes", "threads")

    def __post_init__(self):
        for name, low in self.AT_LEAST.items():
            if getattr(self, name) < low:
                raise UsageError(f"--{_dashed(name)} must be at least {low}, got {getattr(self, name)}.")
        for name in self.POSITIVE:
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

    def rate_at(self, step: int, full: float) -> float:
        """Learning rate of step `step`, counted from 0, where `full` is the rate without a schedule. Raises nothing."""
        rate = full * min(1.0, (step + 1) / (self.warmup + 1))
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


@dataclass(frozen=True)
class TrainOptions(RunOptions):
    """Options of a training with one loss, checked when made (UsageError).

    learning_rate: Adam's, before warm-up and decay.
    clip_norm:     largest L2 norm of the whole gradient.
    rest:          as of RunOptions.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    AT_LEAST: ClassVar = RunOptions.AT_LEAST | {"weight_decay": 0}
    POSITIVE: ClassVar = (*RunOptions.POSITIVE, "learning_rate", "clip_norm")


@dataclass(frozen=True)
class GANOptions(RunOptions):
    """Options of a DVD-GAN's training, checked when made (UsageError).

    generator_rate, discriminator_rate: Adam's learning rates; None takes the paper's of the variant.
    discriminator_steps: turns of the discriminators before each of the generator.
    ema_decay, ema_start: averaging of the generator's weights from that step on; before it the average is a copy.
    precision:     "bfloat16" computes both networks' layers in it (autocast), losses and statistics stay float32.
    checkpointing: recompute the generator's activations in its backward pass in place of keeping them.
    rest:          as of RunOptions.
    """

    warmup: int = 0
    decay: Literal["cosine", "none"] = "none"
    ema_decay: float = 0.9999
    ema_start: int = 20_000
    generator_rate: float = 1e-4
    discriminator_rate: float | None = None
    discriminator_steps: int = 2
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpointing: bool = False

    AT_LEAST: ClassVar = RunOptions.AT_LEAST | {"ema_start": 0, "discriminator_steps": 1}
    POSITIVE: ClassVar = (*RunOptions.POSITIVE, "generator_rate", "discriminator_rate")

    def __post_init__(self):
        super().__post_init__()
        if self.precision not in ("float32", "bfloat16"):
            raise UsageError(f"--precision must be float32 or bfloat16, got {self.precision}.")

    def ema_at(self, step: int) -> float:
        """Share of the old average kept at step `step`, counted from 0. Raises nothing."""
        return self.ema_decay if step >= self.ema_start else 0.0


def _dashed(name: str) -> str:
    return name.replace("_", "-")
