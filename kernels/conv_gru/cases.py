"""Named sizes of the convolutional GRU, and how results are judged: tested, timed and tuned from this list."""

from dataclasses import dataclass
from random import Random

import torch
from fastvid.kernels.conv_gru import reference
from torch import Tensor

from fastvid.testing import Subject, assert_within_yardstick


@dataclass(frozen=True)
class Case:
    """A scan over T frames of H x W positions of C channels.

    hidden: whether there is a state before the first frame. same: the input is the same at every frame.
    """

    name: str
    grid: tuple[int, int, int, int]  # B, T, H, W
    channels: int
    kernel: int = 3
    activation: str = "relu"
    hidden: bool = False
    same: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def work(self) -> int:
        """Multiply-adds, those with what is outside the grid included."""
        B, T, H, W = self.grid
        return B * T * H * W * 3 * (self.kernel * self.channels) ** 2

    def make(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
        """Fresh random arguments of ops.conv_gru, by position."""
        (B, T, H, W), C, k = self.grid, self.channels, self.kernel
        fresh = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
        gates = fresh(B, 1 if self.same else T, H, W, 3 * C)
        weight_gates, weight_candidate = (fresh(n * C, C, k, k) * (k * k * C) ** -0.5 for n in (2, 1))
        hidden = fresh(B, H, W, C) if self.hidden else None
        return gates, hidden, weight_gates, weight_candidate, T, self.activation, True

    def make_backward(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
        """Fresh random arguments of ops.conv_gru_backward, by position."""
        gates, hidden, weight_gates, weight_candidate, T, activation, _ = self.make(device, dtype)
        (B, _, H, W), C = self.grid, self.channels
        fresh = lambda channels: torch.randn((B, T, H, W, channels), device=device, dtype=dtype)  # noqa: E731
        c = fresh(C).relu() if activation == "relu" else fresh(C).tanh()
        kept = torch.cat([fresh(2 * C).sigmoid(), c], dim=-1)
        frames, wanted = gates.shape[1], [True, self.hidden, True, True]
        return fresh(C), None, hidden, weight_gates, weight_candidate, fresh(C), kept, frames, activation, wanted


ALL = [
    Case("one-position", (1, 2, 1, 1), 1),
    Case("point-kernel", (2, 3, 3, 2), 5, kernel=1, activation="tanh", hidden=True),
    Case("odd", (2, 3, 3, 5), 7, hidden=True),
    Case("wide-kernel", (1, 3, 4, 7), 6, kernel=5, activation="tanh"),
    Case("line", (1, 4, 1, 19), 17, hidden=True),
    Case("head", (2, 4, 4, 4), 64, same=True),
    Case("rows", (1, 3, 9, 16), 24, activation="tanh", hidden=True, same=True),
    Case("middle", (2, 3, 8, 8), 48, hidden=True),
]
EMPTY = Case("empty", (0, 2, 2, 3), 4, hidden=True)
LARGE = [  # for a GPU: the published generator's scans for 12 frames of 64 x 64
    Case("paper-head", (8, 12, 4, 4), 1024, same=True),
    Case("paper-8", (8, 12, 8, 8), 1024),
    Case("paper-16", (8, 12, 16, 16), 1024),
    Case("paper-32", (8, 12, 32, 32), 512),
]


def drawn(random: Random) -> Case:
    """A size that nobody chose."""
    grid = (random.randint(1, 3), random.randint(1, 4), random.randint(1, 7), random.randint(1, 9))
    channels, kernel = random.randint(1, 40), random.choice([1, 3, 3, 3, 5])
    activation, hidden, same = random.choice(["relu", "tanh"]), random.random() < 0.5, random.random() < 0.4
    named = f"{grid} {channels} {kernel}x{kernel} {activation} {'hidden' * hidden} {'same' * same}"
    return Case(named, grid, channels, kernel, activation, hidden, same)


def _in(args: tuple, dtype: torch.dtype) -> tuple:
    return tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in args)


def judge(args: tuple, result: tuple[Tensor, Tensor]) -> None:
    """Raise AssertionError unless both outputs are as near to the float64 answer as plain torch's of the same dtype."""
    exact, peer = reference.conv_gru(*_in(args, torch.float64)), reference.conv_gru(*args)
    _judge_each(("states", "kept"), result, exact, peer)


def judge_backward(args: tuple, result: tuple[Tensor, ...]) -> None:
    """The same of the four gradients."""
    exact, peer = reference.conv_gru_backward(*_in(args, torch.float64)), reference.conv_gru_backward(*args)
    _judge_each(("grad_gates", "grad_hidden", "grad_weight_gates", "grad_weight_candidate"), result, exact, peer)


def _judge_each(names: tuple[str, ...], result: tuple, exact: tuple, peer: tuple) -> None:
    for name, ours, true, same in zip(names, result, exact, peer, strict=True):
        try:
            assert_within_yardstick(ours, true, same)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


SUBJECTS = [
    Subject(
        "conv_gru", ALL, EMPTY, drawn, Case.make, judge, dtypes=(torch.float32, torch.bfloat16),
        call=lambda op, args: op(*args),
    ),
    Subject(
        "conv_gru_backward", ALL, EMPTY, drawn, Case.make_backward, judge_backward,
        dtypes=(torch.float32, torch.bfloat16), call=lambda op, args: op(*args),
    ),
]  # fmt: skip
