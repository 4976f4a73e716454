"""What the stages of a prediction cost and how their codes came about."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch

from fastvid.ops import Sampled

Report = Callable[[str, int, int], None]  # stage, codes drawn so far in the whole run, codes of the whole run


@dataclass
class Stage:
    """One stage: wall-clock seconds, and of its codes how many there are and how they were drawn.

    passes:    evaluations of the pixel networks, as in ops.pixelcnn_sample; passes / codes is 1 for one by one.
    near_ties: draws that another order of summation might have decided otherwise.
    drift, drift_size: sums over the codes of their log-probability less that by float32 weights, in nats, with its sign
               and without; 0 where nobody asked for it.
    """

    seconds: float = 0.0
    codes: int = 0
    passes: int = 0
    near_ties: int = 0
    drift: float = 0.0
    drift_size: float = 0.0


class Stages(dict[str, Stage]):
    """Stages by name, in the order in which they first ran; one that is missing is made when it is asked for."""

    def __missing__(self, name: str) -> Stage:
        return self.setdefault(name, Stage())

    def add(self, more: "Stages") -> None:
        """Add another run's stages to these, name by name."""
        for name, stage in more.items():
            mine = self[name]
            for field in fields(Stage):
                setattr(mine, field.name, getattr(mine, field.name) + getattr(stage, field.name))


class Ledger:
    """Writes down the stages of a run while it runs, and tells the caller how far it is.

    total: codes of the whole run. report: told after every row of codes, or None.
    """

    def __init__(self, total: int, report: Report | None):
        self.total, self.report, self.done, self.stages = total, report, 0, Stages()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to a stage."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # a GPU's work belongs to the stage that asked for it
        self.stages[name].seconds += time.perf_counter() - start

    def teller(self, name: str, rows: int) -> Callable[[int], None] | None:
        """What a sampler of `rows` samples calls with the codes it has drawn of each."""
        if self.report is None:
            return None

        def advance(codes: int) -> None:
            self.done += rows * codes
            self.report(name, self.done, self.total)

        return advance

    def drew(self, name: str, drawn: Sampled, temperature: float, exact: torch.Tensor | None) -> None:
        """Adds drawn codes to a stage. exact: their log-probabilities by float32 weights, where that is asked."""
        stage = self.stages[name]
        stage.codes += drawn.codes.numel()
        stage.passes += int(drawn.passes.sum())
        stage.near_ties += drawn.near_ties(temperature)
        if exact is not None:
            difference = (drawn.logprob - exact).double()
            stage.drift += float(difference.sum())
            stage.drift_size += float(difference.abs().sum())

    def turn(self) -> Stages:
        """The stages since the last turn, which are then begun anew."""
        written, self.stages = self.stages, Stages()
        return written
