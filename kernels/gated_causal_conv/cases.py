"""Named sizes of the gated causal convolution, and how results are judged: tested, timed and tuned from this list."""

from dataclasses import dataclass
from random import Random

import torch
from fastvid.kernels.gated_causal_conv import reference
from torch import Tensor

from fastvid.testing import Subject, assert_within_yardstick

Taps = tuple[tuple[int, int, int], ...]

PLANE_XT = tuple((dt, 0, dx) for dt in (-2, -1) for dx in (-1, 0, 1)) + ((0, 0, -1), (0, 0, 0))
PLANE_YT = tuple((dt, dy, 0) for dt in (-2, -1) for dy in (-1, 0, 1)) + ((0, -1, 0), (0, 0, 0))
ROWS_5 = tuple((0, dy, dx) for dy in (-2, -1, 0) for dx in (-2, -1, 0, 1, 2))
LEFT_5 = ((0, 0, -2), (0, 0, -1), (0, 0, 0))
CUBE_ABOVE = tuple((dt, dy, dx) for dt in (-1,) for dy in (-1, 0, 1) for dx in (-1, 0, 1)) + (
    (0, -1, -1), (0, -1, 0), (0, -1, 1)
)
CUBE_7 = tuple(
    (dt, dy, dx) for dt in range(-6, 1) for dy in range(-3, 4) for dx in range(-3, 4) if (dt, dy, dx) <= (0, 0, 0)
)


@dataclass(frozen=True)
class Case:
    """A grid [B, T, H, W] of Cin channels, mapped to Cout over live taps.

    extras: with a bias, an addend and a residual. origin, size: of the output grid; by default all of x's.
    """

    name: str
    grid: tuple[int, int, int, int]
    channels: tuple[int, int]
    taps: Taps
    activation: str = "gate"
    extras: bool = True
    origin: tuple[int, int, int] = (0, 0, 0)
    size: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def outputs(self) -> tuple[int, int, int, int]:
        """The output grid, batch included."""
        return (self.grid[0], *(self.size or self.grid[1:]))

    @property
    def work(self) -> int:
        """Multiply-adds, those with what is outside the grid included."""
        B, T, H, W = self.outputs
        return B * T * H * W * len(self.taps) * self.channels[0] * self.channels[1]

    def make(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
        """Fresh random arguments of ops.gated_causal_conv, by position."""
        (Cin, Cout), grid = self.channels, self.outputs
        C = Cout if self.activation == "none" else Cout // 2
        scale = (len(self.taps) * Cin) ** -0.5
        fresh = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
        x, weight = fresh(*self.grid, Cin), fresh(len(self.taps), Cin, Cout) * scale
        bias, addend, residual = (fresh(Cout), fresh(*grid, Cout), fresh(*grid, C)) if self.extras else [None] * 3
        return x, weight, bias, self.taps, addend, residual, self.activation, self.origin, self.size, True

    def make_backward(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
        """Fresh random arguments of ops.gated_causal_conv_backward, by position."""
        x, weight, _, taps, addend, *_ = self.make(device, dtype)
        C = weight.shape[2] if self.activation == "none" else weight.shape[2] // 2
        fresh = lambda channels: torch.randn((*self.outputs, channels), device=device, dtype=dtype)  # noqa: E731
        pre = None if self.activation == "none" else fresh(weight.shape[2])
        grad_pre = None if addend is None or pre is None else fresh(weight.shape[2])
        flat = [offset for tap in taps for offset in tap]
        wanted = [True, True, True, grad_pre is not None]
        return x, weight, pre, fresh(C), grad_pre, flat, self.activation, [*self.origin], wanted


ALL = [
    Case("input-cube", (1, 3, 5, 7), (3, 4), CUBE_ABOVE),
    Case("one-position", (1, 1, 1, 1), (1, 2), LEFT_5, extras=False),
    Case("row-pass", (2, 1, 3, 9), (8, 16), ROWS_5, origin=(0, 2, 0), size=(1, 1, 9)),
    Case("line", (3, 1, 1, 21), (5, 6), LEFT_5, activation="glu"),
    Case("plain", (2, 2, 5, 6), (17, 9), PLANE_YT, activation="none"),
    Case("cube-7", (1, 3, 4, 5), (3, 6), CUBE_7, extras=False),
    Case("small-xt", (2, 3, 4, 8), (16, 32), PLANE_XT),
    Case("top-xt", (2, 3, 8, 8), (48, 96), PLANE_XT),
    Case("top-yt", (2, 3, 8, 8), (48, 96), PLANE_YT, extras=False),
    Case("bottom-rows", (2, 1, 16, 16), (48, 96), ROWS_5),
    Case("bottom-left", (2, 1, 16, 16), (48, 96), LEFT_5, activation="glu"),
]
EMPTY = Case("empty", (0, 1, 2, 3), (4, 6), LEFT_5)
LARGE = [  # for a GPU: the published priors' layers
    Case("paper-top-xt", (8, 3, 32, 32), (512, 1024), PLANE_XT, extras=False),
    Case("paper-bottom-rows", (8, 1, 64, 64), (512, 1024), ROWS_5, extras=False),
    Case("paper-bottom-left", (8, 1, 64, 64), (512, 1024), LEFT_5, extras=False),
]


def drawn(random: Random) -> Case:
    """A size that nobody chose."""
    grid = (random.randint(1, 3), random.randint(1, 4), random.randint(1, 6), random.randint(1, 9))
    cube = [(dt, dy, dx) for dt in range(-3, 1) for dy in range(-3, 4) for dx in range(-3, 4)]
    taps = tuple(random.sample(cube, random.randint(1, 12)))
    activation = random.choice(["gate", "gate", "glu", "none"])
    Cin, Cout = random.randint(1, 40), 2 * random.randint(1, 30)
    origin, size = random.choice([((0, 0, 0), None), ((0, 1, 0), (1, 1, grid[3])), ((-1, 0, 2), (2, 3, 3))])
    named = f"{grid} {Cin}->{Cout} {activation} {taps} from {origin} {size}"
    return Case(named, grid, (Cin, Cout), taps, activation, random.random() < 0.6, origin, size)


def _settled(args: tuple, dtype: torch.dtype) -> tuple:
    """Arguments of the op as its backends see them, in another dtype."""
    x, weight, bias, taps, addend, residual, activation, origin, size, keep = _in(args, dtype)
    flat = [offset for tap in taps for offset in tap]
    return x, weight, bias, flat, addend, residual, activation, [*origin], [*(size or x.shape[1:4])], keep


def _in(args: tuple, dtype: torch.dtype) -> tuple:
    return tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in args)


def judge(args: tuple, result: tuple[Tensor, Tensor]) -> None:
    """Raise AssertionError unless both outputs are as near to the float64 answer as plain torch's of the same dtype."""
    exact = reference.gated_causal_conv(*_settled(args, torch.float64))
    peer = reference.gated_causal_conv(*_settled(args, args[0].dtype))
    _judge_each(("out", "pre"), result, exact, peer)


def judge_backward(args: tuple, result: tuple[Tensor, ...]) -> None:
    """The same of the four gradients."""
    exact = reference.gated_causal_conv_backward(*_in(args, torch.float64))
    peer = reference.gated_causal_conv_backward(*args)
    _judge_each(("grad_x", "grad_weight", "grad_bias", "grad_addend"), result, exact, peer)


def _judge_each(names: tuple[str, ...], result: tuple, exact: tuple, peer: tuple) -> None:
    for name, ours, true, same in zip(names, result, exact, peer, strict=True):
        try:
            assert_within_yardstick(ours, true, same)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


SUBJECTS = [
    Subject(
        "gated_causal_conv", ALL, EMPTY, drawn, Case.make, judge, dtypes=(torch.float32, torch.bfloat16),
        call=lambda op, args: op(*args),
    ),
    Subject(
        "gated_causal_conv_backward", ALL, EMPTY, drawn, Case.make_backward, judge_backward,
        dtypes=(torch.float32, torch.bfloat16), call=lambda op, args: op(*args),
    ),
]  # fmt: skip
