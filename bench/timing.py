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
    given:       seconds of a contestant that is a figure rather than a program.
    """

    name: str
    run: Callable[[Any], Any] | None = None
    missing: str | None = None
    scaled_from: int | None = None
    whole: int | None = None
    given: float | None = None


@dataclass(frozen=True)
class Race:
    """A case made ready: a gate that raises GateError or tells what it compared, inputs per round, contestants."""

    gate: Callable[[], str]
    inputs: Callable[[int], Any]
    contestants: list[Contestant]
    floor: Callable[[], tuple[float, str]] | None = None  # least seconds on this machine, and how they were counted
    device: str = "cpu"


@dataclass
class Times:
    """Seconds of one contestant, one per round; the most bytes it held beyond those before it ran, and beyond those and
    what it returned."""

    seconds: list[float] = field(default_factory=list)
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
            work = functools.partial(contestant.run, inputs)
            if number == 0:
                held = times[contestant.name]
                held.peak_bytes, held.extra_bytes = peak_growth(work, race.device)
                continue
            seconds = seconds_of(work, race.device)
            scale = contestant.whole / contestant.scaled_from if contestant.scaled_from else 1.0
            times[contestant.name].seconds.append(seconds * scale)
    return times


def seconds_of(work: Callable[[], Any], device: str = "cpu") -> float:
    """Wall-clock seconds of one call, until the device has finished too."""
    gc.collect()
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


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
