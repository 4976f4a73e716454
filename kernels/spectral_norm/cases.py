"""Named lists of weights for spectral normalisation, and how results are judged: tested, timed and tuned from here."""

from dataclasses import dataclass
from random import Random

import torch
from fastvid.kernels.spectral_norm import reference
from torch import Tensor

from fastvid.testing import Subject, assert_within_yardstick

EPS = 1e-12


@dataclass(frozen=True)
class Case:
    """Weights by their shapes, and the axis of each that becomes the rows; by default the first.

    scale: of all values.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dims: tuple[int, ...] = ()
    iterations: int = 1
    scale: float = 1.0

    def __str__(self) -> str:
        return self.name

    @property
    def work(self) -> int:
        """Multiply-adds."""
        return sum(torch.Size(shape).numel() for shape in self.shapes) * (2 * self.iterations + 1)

    @property
    def axes(self) -> list[int]:
        """Of every weight."""
        return list(self.dims or (0,) * len(self.shapes))

    def make(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
        """Fresh random arguments of ops.spectral_norm, by position; u and v are on their way to the singular ones."""
        held = torch.float64 if dtype == torch.float64 else torch.float32
        weights = [(torch.randn(shape, device=device) * self.scale).to(dtype) for shape in self.shapes]
        starts = [torch.randn(reference.as_matrix(w, d).shape, device=device, dtype=held)
                  for w, d in zip(weights, self.axes, strict=True)]  # fmt: skip
        u, v = ([torch.nn.functional.normalize(start.sum(axis), dim=0) for start in starts] for axis in (1, 0))
        if self.iterations < 2:  # otherwise the start does not matter
            _, u, v, _ = reference.spectral_norm(weights, u, v, 2, EPS, self.axes)
        return weights, u, v, self.iterations, EPS, self.axes

    def make_backward(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
        """Fresh random arguments of ops.spectral_norm_backward, by position."""
        weights, u, v, _, _, axes = self.make(device, dtype)
        grads = [torch.randn_like(weight) for weight in weights]
        sigma = reference.sigmas(weights, u, v, axes) if weights else torch.empty(0, device=device)
        return grads, weights, u, v, sigma, axes


ALL = [
    Case("one-element", ((1, 1),)),
    Case("one-row-one-column", ((1, 37), (41, 1))),
    Case("odd", ((3, 5, 3, 3), (17, 7), (9, 11, 1, 1), (2, 3, 5, 3, 3))),
    Case("kept", ((24, 16, 3, 3), (33, 20)), iterations=0),
    Case("fresh", ((20, 12), (8, 5, 3, 3)), iterations=15),
    Case("transposed", ((6, 10, 4, 4), (12, 7), (5, 8, 3)), dims=(1, 0, 1)),
    Case("huge", ((16, 24), (7, 9)), scale=1e12),
    Case("tiny", ((16, 24), (7, 9)), scale=1e-9),
    Case("many-small", tuple((4 + i % 5, 3 + i % 7, 3, 3) for i in range(40))),
    Case("long-rows", ((6, 4611), (130, 700))),
    Case("discriminator", ((32, 3, 3, 3, 3), (32, 3, 1, 1), (64, 32, 3, 3), (64, 64, 3, 3), (10, 64), (1, 64))),
]
LARGE = [  # for a GPU: the widest layers of DVD-GAN
    Case("paper-gates", ((2048, 2048, 3, 3), (1024, 1024, 3, 3), (1024, 512, 3, 3))),
]


def drawn(random: Random) -> Case:
    """A size that nobody chose."""
    shapes, dims = [], []
    for _ in range(random.randint(1, 6)):
        kernel = random.choice([(), (1, 1), (3, 3), (5,), (3, 3, 3)])
        shapes.append((random.randint(1, 40), random.randint(1, 40), *kernel))
        dims.append(random.choice([0, 0, 0, 1]))
    iterations = random.choice([0, 1, 1, 1, 2])
    return Case(f"{shapes} along {dims}, {iterations} times", tuple(shapes), tuple(dims), iterations)


def _exactly(given):
    """The same in float64, in lists too."""
    if isinstance(given, (list, tuple)):
        return [_exactly(one) for one in given]
    return given.double() if isinstance(given, Tensor) else given


def judge(args: tuple, result: tuple[Tensor, ...]) -> None:
    """Raise AssertionError unless all outputs are as near to the float64 answer as plain torch's of the same dtype."""
    exact = reference.spectral_norm(*_exactly(args))
    peer = reference.spectral_norm(*args)
    _judge_each(result, _flat(exact), _flat(peer))


def judge_backward(args: tuple, result: tuple[Tensor, ...]) -> None:
    """The same of the gradients."""
    exact = reference.spectral_norm_backward(*_exactly(args))
    _judge_each(result, _flat(exact), _flat(reference.spectral_norm_backward(*args)))


def _judge_each(result: tuple, exact: tuple, peer: tuple) -> None:
    for i, (ours, true, same) in enumerate(zip(result, exact, peer, strict=True)):
        try:
            assert_within_yardstick(ours, true.double(), same)
        except AssertionError as error:
            raise AssertionError(f"output {i}: {error}") from None


def _flat(outputs: tuple) -> tuple[Tensor, ...]:
    return tuple(one for out in outputs for one in (out if isinstance(out, list) else [out]))


SUBJECTS = [
    Subject(
        "spectral_norm", ALL, None, drawn, Case.make, judge, dtypes=(torch.float32, torch.bfloat16),
        call=lambda op, args: _flat(op(*args)),
    ),
    Subject(
        "spectral_norm_backward", ALL, None, drawn, Case.make_backward, judge_backward,
        dtypes=(torch.float32, torch.bfloat16), call=lambda op, args: _flat((op(*args),)),
    ),
]  # fmt: skip
