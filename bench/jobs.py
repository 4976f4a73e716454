"""A race of a job that knows how to draw its values, every way to do it, and what is right.

Whatever a way can make of the values before the clock runs, it may: another layout, a mask merged with a bias.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peak import floor
from timing import Contestant, GateError, Race
from torch import Tensor

from fastvid.ops._op import SERVES
from fastvid.testing import assert_within_yardstick

OURS, PEERS = 2.0, 16.0  # how many times plain torch's error is allowed: ours, and a peer that does the same job
Values = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Way:
    """ready(values): what `run` takes, made before the clock runs. read: the results of `run` as they are compared."""

    ready: Callable[[Values], Any]
    run: Callable[[Any], tuple[Tensor, ...]]
    missing: str | None = None
    read: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda results: results

    def __call__(self, values: Values) -> tuple[Tensor, ...]:
        """From values to what is compared."""
        return tuple(part.detach() for part in self.read(self.run(self.ready(values))))


class Job(Protocol):
    """What a race asks for: its device and parts of a result in words, least operations and bytes, contestants that
    stand for the fastest of others; a round's values, the ways, what is right for float64 values and what plain torch
    makes of them; and (index of a result, values of that share) for each share that is judged by itself."""

    device: str
    parts: list[str]
    work: tuple[float, int]
    best: dict[str, tuple[str, ...]]
    draw: Callable[[int], Values]
    ways: Callable[[Values], dict[str, Way]]
    exact: Callable[[Values], tuple[Tensor, ...]]
    plain: Callable[[Values], tuple[Tensor, ...]]
    samples: Callable[[Values], Iterator[tuple[Any, Values]]]


def race(job: Job) -> Race:
    """Everybody who can do the job. Each has run once on the gate's values when it is handed over."""
    values = job.draw(-1)
    contestants, results, able = [], {}, {}
    for name, way in job.ways(values).items():
        found, why = (None, way.missing) if way.missing else _tried(name, way, values)
        contestants.append(Contestant(name, functools.partial(_run, name, way) if found else None, why))
        if found:
            able[name], results[name] = way, found
    contestants += [Contestant(name, best_of=of) for name, of in job.best.items()]
    operations, bytes_moved = job.work
    return Race(
        gate=lambda: _gate(job, values, results),
        inputs=lambda number: _inputs(job.draw(number), able),
        contestants=contestants,
        floor=lambda: floor(operations, bytes_moved, job.device, torch.get_num_threads()),
        device=job.device,
    )


def _tried(name: str, way: Way, values: Values) -> tuple[tuple[Tensor, ...] | None, str | None]:
    """What a way computes of these values, or None and why it cannot. What is ours may not fail."""
    try:
        return way(values), None
    except Exception as error:
        if name == "fastvid":
            raise
        return None, f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def _inputs(values: Values, able: dict[str, Way]) -> dict[str, Any]:
    return {name: way.ready(values) for name, way in able.items()}


def _run(name: str, way: Way, given: dict[str, Any]) -> tuple[Tensor, ...]:
    return way.run(given[name])


def _gate(job: Job, values: Values, results: dict[str, tuple[Tensor, ...]]) -> str:
    """Every result against float64, measured by the error of plain torch in the same dtype; sample by sample, as all of
    it in float64 may not fit. The results are let go of."""
    for where, sample in job.samples(values):
        exact = job.exact(tuple(None if x is None else x.double() for x in sample))
        plain = job.plain(sample)
        for name, found in results.items():
            for part, ours, true, torchs in zip(job.parts, found, exact, plain, strict=True):
                try:
                    assert_within_yardstick(ours[where], true, torchs, OURS if name == "fastvid" else PEERS)
                except AssertionError as error:
                    raise GateError(f"{name}: {part}: {error}") from None
    results.clear()
    parts = ", ".join(job.parts[:4]) + (f" and {len(job.parts) - 4} more" if len(job.parts) > 4 else "")
    return f"{parts} within {OURS:g} times plain torch's error against float64, peers within {PEERS:g} times"


def with_gradients(
    forward: Callable[..., tuple[Tensor, ...]], learned: Values, grads: Values, held: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """What a function of some tensors returns, and the gradients of these and of parameters that it holds."""
    leaves = [x.detach().requires_grad_() for x in learned]
    outs = forward(*leaves)
    return *outs, *torch.autograd.grad(outs, [*leaves, *held], grads)


def told(op: Any, *args, backend: str, **kwargs) -> str | None:
    """Why a backend cannot serve a call; None when it can."""
    said = op.reasons(*args, backend=backend, **kwargs)[backend]
    return None if said == SERVES else said
