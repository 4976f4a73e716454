"""The laws that every backend of every op holds: run by tests/ops and, on a user's machine, by `fastvid selftest`."""

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from fastvid import ops
from fastvid.ops._op import LATER, SERVES
from fastvid.testing import Subject, poisoned_memory

# rooms whose ops have backends to choose from
ROOMS = (
    "nearest_codebook", "gated_causal_conv", "axial_attention", "pixelcnn_sampler", "conv_gru", "spectral_norm",
    "conditional_batch_norm", "image_conv",
)  # fmt: skip


# what is asked of kernels in Triton's interpreter, which is hundreds of times slower than a GPU; less of what launches
# much (the sampler takes a sixth of a second for a layer at a position): the rooms' own tests hold it to larger sizes
INTERPRETED = {"repeats": 2, "work": 1_000_000, "drawn_work": 5_000}
INTERPRETED_LESS = {
    "nearest_codebook": {"shapes": 60},
    "spectral_norm": {"repeats": 1, "shapes": 8, "work": 10_000, "drawn_work": 30_000},
    "spectral_norm_backward": {"repeats": 1, "shapes": 8, "work": 10_000, "drawn_work": 30_000},
    "pixelcnn_sample": {"repeats": 1, "shapes": 10, "work": 2_100, "drawn_work": 1_000},
    "axial_attention": {"repeats": 1, "shapes": 40, "work": 300_000, "drawn_work": 40_000},
    "axial_attention_backward": {"repeats": 1, "shapes": 25, "work": 150_000, "drawn_work": 30_000},
    "conv_gru": {"repeats": 1, "shapes": 5, "work": 3_000, "drawn_work": 10_000},
    "conv_gru_backward": {"repeats": 1, "shapes": 4, "work": 3_000, "drawn_work": 10_000},
    "gated_causal_conv": {"shapes": 80, "work": 400_000, "drawn_work": 200_000},
    "frame_moments": {"repeats": 1, "shapes": 8, "work": 10_000, "drawn_work": 5_000},
    "conditional_norm": {"repeats": 1, "shapes": 8, "work": 10_000, "drawn_work": 2_500},
    "conditional_batch_norm": {"repeats": 1, "shapes": 5, "work": 7_000, "drawn_work": 2_500},
    "conditional_norm_backward": {"repeats": 1, "shapes": 6, "work": 7_000, "drawn_work": 2_000},
    "gated_causal_conv_backward": {"repeats": 1, "shapes": 30, "work": 150_000, "drawn_work": 60_000},
}


def interpreted(op: str) -> dict[str, int]:
    """Fields of a Bench for an op in Triton's interpreter."""
    return INTERPRETED | INTERPRETED_LESS.get(op, {})


def subjects() -> list[Subject]:
    """Every op that has laws."""
    return [one for room in ROOMS for one in importlib.import_module(f"fastvid.kernels.{room}.cases").SUBJECTS]


def devices() -> list[str]:
    """The devices of this machine that ops can run on."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@dataclass(frozen=True)
class Bench:
    """One backend of one op on one device, and how much is asked of it.

    shapes: sizes drawn at random; repeats: of one call whose bits are compared. seed: of both and of all values.
    work, drawn_work: named and drawn sizes that ask for more operations are left out; None leaves none out.
    """

    subject: Subject
    backend: str
    device: str = "cpu"
    shapes: int = 200
    repeats: int = 5
    seed: int = 0
    work: int | None = None
    drawn_work: int | None = None

    @property
    def cases(self) -> list:
        return [case for case in self.subject.cases if self.work is None or case.work <= self.work]

    def make(self, case, dtype: torch.dtype) -> tuple:
        return self.subject.make(case, self.device, dtype)

    def call(self, args: tuple):
        op = ops.OPS[self.subject.op]
        return self.subject.call(lambda *given: op(*given, backend=self.backend), args)

    def judged(self, case, dtype: torch.dtype) -> None:
        args = self.make(case, dtype)
        self.subject.judge(args, self.call(args))


def why_not(subject: Subject, backend: str, device: str = "cpu", asked: bool = True) -> str | None:
    """Why a backend does not serve an op on this device, asked for by name or not; None where it does."""
    args = subject.make(subject.cases[0], device, subject.dtypes[0])
    reason = reasons(subject, backend if asked else None, args).get(backend, "this op has no such backend")
    return None if reason in (SERVES, LATER) else reason


def reasons(subject: Subject, asked: str | None, args: tuple) -> dict[str, str]:
    """What each backend of the op says to these arguments."""
    return ops.OPS[subject.op].reasons(*args, backend=asked)


def named_sizes(bench: Bench) -> None:
    """Right within the yardstick at every named size, in every dtype."""
    for case in bench.cases:
        for dtype in bench.subject.dtypes:
            with _told(case, dtype):
                bench.judged(case, dtype)


def random_shapes(bench: Bench) -> None:
    """Right within the yardstick at sizes that nobody chose."""
    random = Random(bench.seed)
    endless = iter(lambda: bench.subject.drawn(random), None)
    fitting = (case for case in endless if bench.drawn_work is None or case.work <= bench.drawn_work)
    for case in itertools.islice(fitting, bench.shapes):
        dtype = random.choice(bench.subject.dtypes)
        with _told(case, dtype):
            bench.judged(case, dtype)


def empty_batch(bench: Bench) -> None:
    """No rows, no failure."""
    if bench.subject.empty is not None:
        bench.judged(bench.subject.empty, bench.subject.dtypes[0])


def any_strides(bench: Bench) -> None:
    """Right from arguments that are spread out in memory, or refused with a reason."""
    for dtype in bench.subject.dtypes:
        args = bench.make(bench.cases[-1], dtype)
        spread = tuple([_spread(one) for one in a] if isinstance(a, list) else _spread(a) for a in args)
        if reasons(bench.subject, bench.backend, spread)[bench.backend] == SERVES:
            bench.subject.judge(args, bench.call(spread))


def same_bits(bench: Bench) -> None:
    """The same call gives the same bits every time."""
    args = bench.make(bench.cases[-1], bench.subject.dtypes[0])
    first = bench.call(args)
    for _ in range(bench.repeats):
        same = all(torch.equal(a, b) for a, b in zip(first, bench.call(args), strict=True))
        assert same, "two runs of one call differ"


LAWS: tuple[Callable[[Bench], None], ...] = (named_sizes, random_shapes, empty_batch, any_strides, same_bits)


def hold(bench: Bench) -> Iterator[tuple[str, str | None]]:
    """Each law with None where it holds, or else what broke it; on poisoned memory, seeds set and restored."""
    for law in LAWS:
        with torch.random.fork_rng(), poisoned_memory():
            torch.manual_seed(bench.seed)
            try:
                law(bench)
            except Exception as broken:  # a backend may fail in any way; the others are still to be tried
                yield law.__name__, f"{type(broken).__name__}: {broken}"
            else:
                yield law.__name__, None


class _told:
    """Names the case in the message of what fails inside."""

    def __init__(self, case, dtype: torch.dtype):
        self.where = f"{case} {str(dtype)[6:]}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, AssertionError):
            raise AssertionError(f"{self.where}: {error}") from error


def _spread(tensor):
    """The same values, every second element of twice the memory, rows and columns swapped in it; the rest as it is."""
    if not isinstance(tensor, Tensor) or tensor.ndim < 2:
        return tensor
    wide = tensor.new_zeros(*tensor.shape[:-2], tensor.shape[-1] * 2, tensor.shape[-2] + 3).mT
    wide[..., : tensor.shape[-2], ::2] = tensor
    return wide[..., : tensor.shape[-2], ::2]

