"""Named sizes of the image convolution, and how results are judged: tested, timed and tuned from this list."""

from dataclasses import dataclass
from random import Random

import torch
from fastvid.kernels.image_conv import reference
from torch import Tensor

from fastvid.testing import Subject, assert_within_yardstick


@dataclass(frozen=True)
class Case:
    """N images of H by W and Cin channels, mapped to Cout. extras: with a bias and a residual."""

    name: str
    images: tuple[int, int, int]
    channels: tuple[int, int]
    extras: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def work(self) -> int:
        """Multiply-adds, those with what is outside the images included."""
        N, H, W = self.images
        return N * H * W * 9 * self.channels[0] * self.channels[1]

    def make(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
        """Fresh random arguments of ops.image_conv, by position."""
        Cin, Cout = self.channels
        fresh = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
        x, weight = fresh(*self.images, Cin), fresh(Cout, Cin, 3, 3) * (9 * Cin) ** -0.5
        return (x, weight, *((fresh(Cout), fresh(*self.images, Cout)) if self.extras else (None, None)))

    def make_backward(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
        """Fresh random arguments of ops.image_conv_backward, by position."""
        x, weight, _, _ = self.make(device, dtype)
        grad = torch.randn((*self.images, self.channels[1]), device=device, dtype=dtype)
        return x, weight, grad, [True, True, self.extras]


ALL = [
    Case("one-position", (1, 1, 1), (2, 3), extras=False),
    Case("row", (2, 1, 9), (3, 5)),
    Case("odd", (3, 5, 7), (17, 9)),
    Case("even", (2, 4, 6), (8, 16), extras=False),
    Case("gru-4", (2, 4, 4), (64, 48)),
    Case("map-8", (3, 8, 8), (64, 64)),
    Case("map-16", (1, 16, 16), (48, 40), extras=False),
    Case("wide", (1, 6, 31), (33, 24)),
    Case("deep", (1, 8, 8), (300, 32), extras=False),
]
EMPTY = Case("empty", (0, 2, 3), (4, 6))
LARGE = [  # for timing: layers of DVD-GAN's generator, twelve frames of a sample in one call
    Case("gan-8", (12, 8, 8), (512, 512), extras=False),
    Case("gan-16", (12, 16, 16), (256, 256), extras=False),
    Case("gan-32", (12, 32, 32), (128, 128), extras=False),
    Case("gan-64", (12, 64, 64), (64, 64), extras=False),
    Case("gan-64-narrow", (12, 64, 64), (32, 32), extras=False),
]


def drawn(random: Random) -> Case:
    """A size that nobody chose."""
    images = (random.randint(1, 3), random.randint(1, 9), random.randint(1, 12))
    channels = (random.choice([1, 3, 8, 20, 33, 70]), random.choice([1, 3, 8, 16, 20, 37]))
    return Case(f"{images} {channels[0]}->{channels[1]}", images, channels, random.random() < 0.6)


def judge(args: tuple, result: tuple[Tensor, ...]) -> None:
    """Raise AssertionError unless the output is as near to the float64 answer as plain torch's of the same dtype."""
    _judge_each(("out",), args, result, reference.image_conv)


def judge_backward(args: tuple, result: tuple[Tensor, ...]) -> None:
    """The same of the three gradients."""
    _judge_each(("grad_x", "grad_weight", "grad_bias"), args, result, reference.image_conv_backward)


def _judge_each(names: tuple[str, ...], args: tuple, result: tuple, definition) -> None:
    exact = definition(*(a.double() if isinstance(a, Tensor) else a for a in args))
    for name, ours, true, same in zip(names, result, exact, definition(*args), strict=True):
        try:
            assert_within_yardstick(ours, true, same)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


SUBJECTS = [
    Subject(
        "image_conv", ALL, EMPTY, drawn, Case.make, judge, dtypes=(torch.float32,),
        call=lambda op, args: (op(*args),),
    ),
    Subject(
        "image_conv_backward", ALL, EMPTY, drawn, Case.make_backward, judge_backward, dtypes=(torch.float32,),
        call=lambda op, args: op(*args),
    ),
]  # fmt: skip
