"""Named sizes of the conditional batch normalisation, and how results are judged: tested, timed and tuned from here."""

from dataclasses import dataclass
from math import prod
from random import Random

import torch
from fastvid.kernels.conditional_batch_norm import reference
from torch import Tensor

from fastvid.testing import Subject, assert_within_yardstick

EPS = 1e-5
HINGE = 1e-3  # nearer to the ReLU's corner than this, rounding decides whether a gradient passes


@dataclass(frozen=True)
class Case:
    """Maps [B, T, H, W, C], `offset` away from the origin. own: a gradient goes through the moments, too."""

    name: str
    shape: tuple[int, int, int, int, int]
    relu: bool = True
    upsample: bool = False
    offset: float = 0.0
    own: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def work(self) -> int:
        """Values read or written."""
        return prod(self.shape) * (5 if self.upsample else 2)

    def make_moments(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor]:
        """Fresh random arguments of ops.frame_moments."""
        spread = 0.5 + torch.rand(self.shape[1], 1, 1, self.shape[4], device=device)
        x = torch.randn(self.shape, device=device) * spread + self.offset
        return (x.to(dtype),)

    def make_batch(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
        """Fresh random arguments of ops.conditional_batch_norm, by position."""
        (x,), (B, C) = self.make_moments(device, dtype), (self.shape[0], self.shape[4])
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        sign = torch.where(torch.rand(B, C, device=device) < 0.2, -1, 1)
        gain = ((0.5 + torch.rand(B, C, device=device)) * sign).to(wide)
        return x, gain, torch.randn(B, C, device=device).to(wide) / 2, EPS, self.relu, self.upsample

    def make(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
        """Fresh random arguments of ops.conditional_norm, by position."""
        x, gain, bias, *rest = self.make_batch(device, dtype)
        moments = reference.frame_moments(x)
        return x, moments.mean, moments.var, gain, bias, *rest

    def make_backward(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
        """Fresh random arguments of ops.conditional_norm_backward, by position; none decided by rounding."""
        x, *others, relu, upsample = self.make(device, dtype)
        while (close := _before_relu(x, *others).abs() < HINGE).any():
            x = torch.where(close, (torch.randn_like(x, dtype=torch.float32) + self.offset).to(dtype), x)
        B, T, H, W, C = self.shape
        grown = (B, T, 2 * H, 2 * W, C) if upsample else self.shape
        grad_out = torch.randn(grown, device=device).to(dtype)
        *others, eps = others
        wanted = [True, not self.own, not self.own, True, True]
        return x, *others, grad_out, eps, relu, upsample, self.own, wanted


def _before_relu(x: Tensor, mean: Tensor, var: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    given = (tensor.double() for tensor in (x, mean, var, gain, bias))
    return reference.conditional_norm(*given, eps, relu=False, upsample=False)[0]


ALL = [
    Case("one-value", (1, 1, 1, 1, 1)),
    Case("one-pixel", (2, 3, 1, 1, 5), upsample=True),
    Case("odd", (3, 2, 5, 7, 19), upsample=True),
    Case("odd-linear", (2, 3, 7, 3, 33), relu=False, upsample=True, own=False),
    Case("far-away", (2, 2, 9, 8, 16), offset=1e3),
    Case("one-frame", (4, 1, 6, 6, 24), own=False),
    Case("group-4", (2, 4, 4, 4, 64)),
    Case("group-8", (2, 3, 8, 8, 48), upsample=True),
    Case("wide-row", (1, 2, 3, 41, 70), relu=False),
]
EMPTY = Case("empty", (0, 2, 3, 4, 5), upsample=True)
LARGE = [  # DVD-GAN at ch = 32, two clips of 48 frames: a block's first and second normalisation
    Case("group-8-32", (2, 48, 8, 8, 256), upsample=True),
    Case("group-16-32", (2, 48, 16, 16, 256), upsample=True),
    Case("group-32-32", (2, 48, 32, 32, 128), upsample=True),
    Case("group-64-32", (2, 48, 64, 64, 64)),
]


def drawn(random: Random) -> Case:
    """A size that nobody chose."""
    B, T, C = random.randint(1, 4), random.randint(1, 4), random.randint(1, 70)
    H, W = random.randint(1, 9), random.randint(1, 9)
    relu, upsample, own = (random.random() < share for share in (0.7, 0.5, 0.5))
    offset = random.choice([0.0, 0.0, 3.0, 1e3])
    told = f"{[B, T, H, W, C]}{' relu' * relu}{' upsample' * upsample} around {offset}{' own' * own}"
    return Case(told, (B, T, H, W, C), relu, upsample, offset, own)


def judge_moments(args: tuple, result: tuple[Tensor, Tensor]) -> None:
    """Raise AssertionError unless both are as near to the float64 answer as plain torch's of the same dtype."""
    exact, peer = reference.frame_moments(args[0].double()), reference.frame_moments(args[0])
    _judge_each(("mean", "var"), result, exact, peer, mean=_size_of_terms(args[0]))


def judge(args: tuple, result: Tensor) -> None:
    """The same of what is normalised."""
    exact, peer = reference.conditional_norm(*_exactly(args)), reference.conditional_norm(*args)
    _judge_each(("out",), (result,), exact, peer)


def judge_batch(args: tuple, result: tuple[Tensor, ...]) -> None:
    """The same with x's own moments."""
    exact, peer = reference.conditional_batch_norm(*_exactly(args)), reference.conditional_batch_norm(*args)
    _judge_each(reference.Normed._fields, result, exact, peer, mean=_size_of_terms(args[0]))


def judge_backward(args: tuple, result: tuple[Tensor, ...]) -> None:
    """The same of the gradients."""
    exactly = _exactly(args)
    exact, peer = reference.conditional_norm_backward(*exactly), reference.conditional_norm_backward(*args)
    # what goes through the moments takes away from what does not
    direct = reference.conditional_norm_backward(*exactly[:-2], False, exactly[-1]).grad_x
    largest = float(direct.abs().max()) if direct.numel() else 0.0
    _judge_each(reference.NormGradients._fields, result, exact, peer, grad_x=largest)


def _exactly(args: tuple) -> tuple:
    return tuple(arg.double() if isinstance(arg, Tensor) else arg for arg in args)


def _size_of_terms(x: Tensor) -> float | None:
    """Of what a mean is the sum of, positive and negative."""
    return float(x.double().abs().mean(dim=(0, 2, 3)).max()) if x.numel() else None


def _judge_each(names: tuple[str, ...], result: tuple, exact: tuple, peer: tuple, **largest: float | None) -> None:
    for name, ours, true, same in zip(names, result, exact, peer, strict=True):
        try:
            assert_within_yardstick(ours, true, same, largest=largest.get(name))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


SUBJECTS = [
    Subject(name, ALL, EMPTY, drawn, make, judged, dtypes=(torch.float32, torch.bfloat16),
            call=lambda op, args: op(*args))
    for name, make, judged in (
        ("frame_moments", Case.make_moments, judge_moments),
        ("conditional_norm", Case.make, judge),
        ("conditional_batch_norm", Case.make_batch, judge_batch),
        ("conditional_norm_backward", Case.make_backward, judge_backward),
    )
]  # fmt: skip
