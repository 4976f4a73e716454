"""The native attention with its projections: against float64, and its bits whatever the threads and the company."""

from random import Random

import pytest
import torch
from fastvid.kernels.axial_attention import cases, reference
from torch import Tensor

from fastvid import _native, ops
from fastvid.testing import assert_within_yardstick

pytestmark = pytest.mark.skipif(
    _native.load() is None, reason=f"needs the native library, which is not there: {_native.why_not()}"
)
DTYPES = [torch.float32, torch.bfloat16]
Projected = cases.Projected
OWN = [
    Projected("blocks with a rest", (2, 3, 5, 26), 24, 3, 4, (1, 2, 3), "causal"),
    Projected("sums in parts", (1, 2, 3, 4), 520, 5, 60, (3,)),
    Projected("one long box", (1, 2, 3, 67), 16, 2, 8, ((2, 3, 67),), "strict", D=5),
    Projected("long lines", (1, 1, 2, 300), 17, 3, 5, (3, 2), "causal"),
    Projected("heads that fill no panel", (1, 2, 2, 9), 9, 11, 1, (3, 2), D=2),
]


def attend(*args, **words) -> Tensor:
    """The native kernel on arguments of the op."""
    return ops.axial_self_attention(*args, **words, backend="cpu")


def assert_same_bits(ours: Tensor, other: Tensor) -> None:
    assert ours.dtype == other.dtype and ours.shape == other.shape
    assert torch.equal(ours.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.fixture
def threads():
    """A function that sets torch's thread count, which the kernel follows; set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*cases.PROJECTED, cases.NOTHING, *OWN], ids=str)
def test_values(case, dtype, level):
    args = case.make(dtype=dtype)
    found = attend(*args)
    assert found.is_contiguous()
    cases.judge_projected(args, found)


def any_strides(random: Random, *shape: int) -> Tensor:
    """Random values of this shape: side by side, turned, every other one, or the same all along one axis."""
    kind = random.choice(["dense", "turned", "sparse", "expanded"])
    if kind == "turned":
        return torch.randn(*shape[:-2], shape[-1], shape[-2]).mT if len(shape) == 2 else channels_first(shape)
    if kind == "sparse":
        return torch.randn(*shape[:-1], 2 * shape[-1])[..., 1::2]
    if kind == "expanded":
        same = random.randrange(len(shape))
        return torch.randn([1 if axis == same else size for axis, size in enumerate(shape)]).expand(shape)
    return torch.randn(shape)


def channels_first(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape[0], shape[-1], *shape[1:-1]).movedim(1, -1)


def test_drawn_calls(level):
    """Any strides, as many channels out as one likes, any scale, a bias or none."""
    random = Random(int(torch.randint(1 << 30, ())))
    for _ in range(40):
        case, dtype, Cout = cases.drawn_projected(random), random.choice(DTYPES), random.randint(1, 40)
        C, A, E, D = case.C, case.heads, case.E, case.D
        shapes = ((A * E, C), (A * E, C), (A * D, C), (Cout, A * D))
        weights = [(any_strides(random, *s) * s[1] ** -0.5).to(dtype) for _ in case.axes for s in shapes]
        weights = [weight if random.random() < 0.5 else weight.mT.contiguous().mT for weight in weights]
        x, scale = any_strides(random, *case.grid, C).to(dtype), random.choice([0.1, 0.4])
        bias = torch.randn(Cout).to(dtype) if random.random() < 0.5 else None
        fours = [tuple(weights[i : i + 4]) for i in range(0, len(weights), 4)]
        found = attend(x, fours, case.axes, A, case.mask, bias, scale)
        boxes = [size for axis in case.axes for size in box_of(axis, case.grid)]
        exact, peer = (
            reference.axial_self_attention(
                x.to(kind), [weight.to(kind) for weight in weights], None if bias is None else bias.to(kind), boxes, A,
                case.mask, [scale] * len(case.axes),
            )[0]
            for kind in (torch.float64, dtype)
        )  # fmt: skip
        assert_within_yardstick(found, exact, peer)


def box_of(axis, grid: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(grid[i] if i == axis else 1 for i in (1, 2, 3)) if isinstance(axis, int) else axis


@pytest.mark.parametrize("case", [*OWN, cases.PROJECTED[-1]], ids=str)
def test_threads_agree_to_the_last_bit(case, threads):
    args = case.make()
    threads(1)
    alone = attend(*args)
    for count in (2, 3, 7):
        threads(count)
        assert_same_bits(attend(*args), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_is_the_same_in_every_batch(dtype, level):
    x, *rest = Projected("", (5, 2, 6, 7), 19, 3, 8, (1, 2, 3), "causal").make(dtype=dtype)
    whole = attend(x, *rest)
    for some in (slice(1), slice(2, 3), slice(1, 4)):
        assert_same_bits(attend(x[some], *rest), whole[some])


def test_a_box_knows_no_other(level):
    x, *rest = Projected("", (1, 4, 6, 8), 20, 2, 8, ((2, 3, 4),)).make()
    whole = attend(x, *rest)
    assert_same_bits(attend(x.flip(1).roll(3, 2)[:, :, :3].flip(1), *rest), whole[:, :, 3:])
    spoilt = x.clone()
    spoilt[:, 2, 1, 5] = float("nan")
    found = attend(spoilt, *rest)
    assert found[:, 2:, :3, 4:].isnan().any(-1).all()
    found[:, 2:, :3, 4:] = whole[:, 2:, :3, 4:]
    assert_same_bits(found, whole)


@pytest.mark.parametrize("mask", ["causal", "strict"])
def test_what_comes_later_has_no_influence(mask, level):
    x, *rest = Projected("", (2, 3, 4, 37), 18, 2, 8, (3,), mask).make()
    before = attend(x, *rest)
    for place in (0, 5, 36):
        later = x.clone()
        later[..., place:, :] += torch.randn_like(later[..., place:, :])
        assert_same_bits(attend(later, *rest)[..., :place, :], before[..., :place, :])


def test_who_sees_nothing_gives_the_bias(level):
    x, projections, axes, heads, _, bias, _ = Projected("", (2, 3, 4, 5), 18, 2, 8, (1,)).make()
    found = attend(x, projections, axes, heads, "strict", bias)
    assert_same_bits(found[:, 0], bias.expand(2, 4, 5, 18))
    assert not torch.equal(found[:, 1], found[:, 0])


def test_several_axes_are_a_sum(level):
    x, projections, axes, heads, mask, bias, _ = Projected("", (2, 3, 5, 7), 19, 3, 8, (1, 2, (1, 5, 7))).make()
    parts = [attend(x, [four], [axis], heads, mask) for four, axis in zip(projections, axes, strict=True)]
    assert_same_bits(attend(x, projections, axes, heads, mask), parts[0] + parts[1] + parts[2])
    first = attend(x, projections[:1], axes[:1], heads, mask, bias)
    assert_same_bits(attend(x, projections, axes, heads, mask, bias), first + parts[1] + parts[2])


def test_half_precision_is_rounded_once(level):
    args = Projected("", (2, 2, 5, 9), 20, 2, 12, (2, 3), "causal").make(dtype=torch.bfloat16)
    assert_same_bits(attend(*args), attend(*cases.in_dtype(args, torch.float32)).bfloat16())


def test_arguments_are_left_as_they_are():
    args = cases.PROJECTED[1].make()
    x, (weight, *_), bias = args[0].clone(), [four[0].clone() for four in args[1]], args[5].clone()
    assert_same_bits(attend(*args), attend(*args))
    assert torch.equal(args[0], x) and torch.equal(args[1][0][0], weight) and torch.equal(args[5], bias)
