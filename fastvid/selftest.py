"""The laws of every op on the user's own machine: a line per op, backend and device."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from fastvid import laws, ops

SHAPES = 40  # sizes drawn at random per op and backend: what keeps the whole under a minute


@dataclass(frozen=True)
class Outcome:
    """One backend of one op on one device: why it was not tried, or which laws it broke."""

    op: str
    backend: str
    device: str
    skipped: str | None
    broken: dict[str, str]
    seconds: float

    @property
    def word(self) -> str:
        """pass, FAIL or skip."""
        return "skip" if self.skipped else "FAIL" if self.broken else "pass"


def outcomes(shapes: int = SHAPES) -> Iterator[Outcome]:
    """Try every backend of every op on every device. shapes: how many sizes are drawn at random for each."""
    for device in laws.devices():
        for subject in laws.subjects():
            for backend in ops.OPS[subject.op].backends:
                yield _outcome(subject, backend.name, device, shapes)


def _outcome(subject, backend: str, device: str, shapes: int) -> Outcome:
    start = time.perf_counter()
    skipped, broken = laws.why_not(subject, backend, device, asked=False), {}
    if skipped is None:
        held = laws.hold(laws.Bench(subject, backend, device, shapes=shapes))
        broken = {law: reason for law, reason in held if reason}
    return Outcome(subject.op, backend, device, skipped, broken, time.perf_counter() - start)


def selftest() -> int:
    """Print a line per op, backend and device. Returns 0, or 1 if a law is broken."""
    found = []
    for one in outcomes():
        found.append(one)
        told = one.skipped or f"{len(laws.LAWS)} laws, {one.seconds:.1f} s"
        print(f"{one.word}  {one.op:22} {one.backend:9} on {one.device}: {told}", flush=True)
        for law, reason in one.broken.items():
            print(f"      {law}: {' '.join(reason.split())}")
    failed = sum(bool(one.broken) for one in found)
    tried = sum(one.skipped is None for one in found)
    print(f"{tried - failed} of {tried} backends that can run here hold every law")
    return 1 if failed else 0
