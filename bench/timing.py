"""Contestants timed fairly: interleaved, on the same fresh inputs, with what each adds to the memory."""

import ctypes
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


class GateError(Exception):
    """A contestant does not do its job: its times would mean nothing."""


@dataclass(frozen=True)
class Contestant:
    """One way to do a case's job.

    run:         called with the round's inputs, timed; None where it cannot run, `missing` then says why.
    scaled_from: units of work that one run does where the whole job has `whole`; times are scaled up to the job.
    sampled:     which of the units a run does, in words.
    others:      further parts of the job, each timed by itself and scaled by its own factor, after `run`.
    given:       seconds of a contestant that is a figure rather than a program.
    passes:      how many sequential evaluations a run took, told from what it returned; scaled as its time is.
    best_of:     other contestants, whichever of them is fastest here: a peer that may choose how it is done.
    """

    name: str
    run: Callable[[Any], Any] | None = None
    missing: str | None = None
    scaled_from: int | None = None
    whole: int | None = None
    sampled: str = "spread over the grid"
    others: tuple[tuple[Callable[[Any], Any], float], ...] = ()
    given: float | None = None
    passes: Callable[[Any], float] | None = None
    best_of: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[tuple[Callable[[Any], Any], float], ...]:
        """Everything that is timed, with the factor from its seconds to the job's."""
        first = (self.run, self.whole / self.scaled_from if self.scaled_from else 1.0)
        return (first, *self.others) if self.run else ()


@dataclass(frozen=True)
class Race:
    """A case made ready: a gate that raises GateError or tells what it compared, inputs per round, contestants."""

    gate: Callable[[], str]
    inputs: Callable[[int], Any]
    contestants: list[Contestant]
    floor: Callable[[], tuple[float, str]] | None = None  # least seconds on this machine, and how they were counted
    device: str = "cpu"
    codes: int | None = None  # drawn by the whole job, where contestants tell their passes


@dataclass
class Times:
    """Seconds of one contestant, one per round, and its passes where it tells them; the most bytes it held beyond those
    before it ran, and beyond those and what it returned."""

    seconds: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    extra_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def run_race(race: Race, rounds: int, tell: Callable[[str], None] = lambda _: None) -> dict[str, Times]:
    """Time every contestant that can run, A B C A B C: each round all get the same inputs, which no round shares.

    The run before the rounds warms up and is watched for memory, so that watching costs no timed run anything.
    Returns the times by name; a contestant that is missing or given has none.
    """
    able = [contestant for contestant in race.contestants if contestant.run is not None]
    times = {contestant.name: Times() for contestant in able}
    for number in range(rounds + 1):
        inputs = race.inputs(number)
        for contestant in able:
            tell(f"{'memory' if number == 0 else f'round {number} of {rounds}'}: {contestant.name}")
            of = times[contestant.name]
            if number == 0:
                works = [functools.partial(run, inputs) for run, _ in contestant.parts]
                of.peak_bytes, of.extra_bytes = peak_growth(lambda works=works: [work() for work in works], race.device)
                continue
            _measure(contestant, inputs, race.device, of)
    return times


def _measure(contestant: Contestant, inputs: Any, device: str, times: Times) -> None:
    """One round of one contestant: the seconds of its parts, scaled and added up, and its passes."""
    seconds, passes = 0.0, 0.0
    for run, scale in contestant.parts:
        spent, result = timed(functools.partial(run, inputs), device)
        seconds += spent * scale
        passes += contestant.passes(result) * scale if contestant.passes else 0.0
    times.seconds.append(seconds)
    if contestant.passes:
        times.passes.append(passes)


def seconds_of(work: Callable[[], Any], device: str = "cpu") -> float:
    """Wall-clock seconds of one call, until the device has finished too."""
    return timed(work, device)[0]


def timed(work: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Wall-clock seconds of one call, until the device has finished too, and what it returned."""
    gc.collect()
    _wait(device)
    start = time.perf_counter()
    result = work()
    _wait(device)
    return time.perf_counter() - start, result


def peak_growth(work: Callable[[], Any], device: str = "cpu") -> tuple[int | None, int | None]:
    """Bytes by which one call raises the memory in use, at its peak: allocated on a GPU, resident on a CPU.

    Returns them with and without what the call returned. Memory that it keeps for the next call is not in the figure if
    an earlier call took it. None where the system cannot say (resident peaks can be started afresh on Linux alone).
    """
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        _wait(device)
        peak = torch.cuda.max_memory_allocated() - before
        return peak, max(0, peak - returned_bytes(result))
    _return_free_memory()
    before = _restart_resident_peak()
    result = work()
    if before is None:
        return None, None
    peak = max(0, _status("VmHWM") - before)
    return peak, max(0, peak - returned_bytes(result))


def returned_bytes(result: Any) -> int:
    """Bytes of the tensors and arrays in a result, or in its tuples and lists."""
    if isinstance(result, (tuple, list)):
        return sum(map(returned_bytes, result))
    return getattr(result, "nbytes", 0)


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Torch's threads while inside: `count`, or as found for None. Yields how many there are."""
    import torch

    found = torch.get_num_threads()
    try:
        torch.set_num_threads(count or found)
        yield count or found
    finally:
        torch.set_num_threads(found)


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _return_free_memory() -> None:
    # memory that the allocator kept from an earlier contestant would hide what this one needs
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _restart_resident_peak() -> int | None:
    """Set the peak of the resident memory to what is resident now, and return that."""
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
