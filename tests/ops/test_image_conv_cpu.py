"""The native image convolution: against float64, and the same bits whatever the threads, the batch and the layout."""

from random import Random

import pytest
import torch
from fastvid.kernels.image_conv import cases
from torch import Tensor

from fastvid import _native, ops
from fastvid.ops import _cpu_image
from fastvid.testing import poisoned_memory

pytestmark = pytest.mark.skipif(
    _native.load() is None, reason=f"needs the native library, which is not there: {_native.why_not()}"
)
WIDE = cases.Case("several blocks, groups and parts of panels", (2, 17, 19), (140, 150))
DEEP = cases.Case("products that are summed in parts", (1, 5, 6), (521, 20))


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """The launcher."""
    assert _cpu_image.why_not(x, weight, bias, residual) is None
    with poisoned_memory():
        return _cpu_image.image_conv(x, weight, bias, residual)[0]


@pytest.fixture
def threads():
    """A function that sets torch's thread count, which the kernel follows; set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", [*cases.ALL, cases.EMPTY, WIDE, DEEP], ids=str)
def test_values(case, level):
    args = case.make()
    cases.judge(args, (conv(*args),))


@pytest.mark.parametrize("case", [*cases.ALL, cases.EMPTY], ids=str)
def test_gradients(case, level):
    args = case.make_backward()
    cases.judge_backward(args, _cpu_image.image_conv_backward(*args))


def scattered(random: Random, *shape: int) -> Tensor:
    """Random values of this shape: side by side, channels first, with gaps between rows, or between channels."""
    kind = random.choice(["dense", "channels first", "cut out", "sparse"])
    if kind == "channels first":
        return torch.randn(shape[0], shape[3], *shape[1:3]).movedim(1, -1)
    if kind == "cut out":
        return torch.randn(shape[0], shape[1] + 1, shape[2] + 2, shape[3] + 3)[:, 1:, 1:-1, 2:-1]
    return torch.randn(*shape[:3], 2 * shape[3])[..., ::2] if kind == "sparse" else torch.randn(shape)


def test_drawn_calls(level):
    random = Random(int(torch.randint(1 << 30, ())))
    for _ in range(40):
        case = cases.drawn(random)
        Cin, Cout = case.channels
        turned = torch.randn(3, Cout, 3, Cin).permute(1, 3, 2, 0)
        weight = random.choice([turned, torch.randn(Cout, Cin, 3, 3)])
        some = [tensor if random.random() < 0.6 else None
                for tensor in (torch.randn(2 * Cout)[::2], scattered(random, *case.images, Cout))]  # fmt: skip
        args = (scattered(random, *case.images, Cin), weight * (9 * Cin) ** -0.5, *some)
        cases.judge(args, (conv(*args),))


@pytest.mark.parametrize("case", [WIDE, DEEP], ids=str)
def test_threads_agree_to_the_last_bit(case, threads):
    args = case.make()
    threads(1)
    alone = conv(*args)
    for count in (2, 3, 7):
        threads(count)
        assert torch.equal(conv(*args), alone)


def test_an_image_is_the_same_in_every_batch(level):
    x, weight, bias, residual = cases.Case("", (9, 8, 9), (40, 24)).make()
    whole = conv(x, weight, bias, residual)
    for some in (slice(1), slice(2, 3), slice(3, 9)):
        assert torch.equal(conv(x[some], weight, bias, residual[some]), whole[some])


def test_layouts_agree_to_the_last_bit(level):
    x, weight, bias, residual = WIDE.make()
    plain = conv(x, weight, bias, residual)
    first = lambda tensor: tensor.movedim(-1, 1).contiguous().movedim(1, -1)  # noqa: E731
    assert torch.equal(conv(first(x), first(weight), bias, first(residual)), plain)
    inside = torch.randn(2, 19, 21, 140)
    inside[:, 1:-1, 1:-1] = x
    assert torch.equal(conv(inside[:, 1:-1, 1:-1], weight, bias, residual), plain)


def test_what_is_not_finite_stays_in_the_squares_that_read_it(level):
    x, weight, *_ = cases.Case("", (2, 9, 12), (20, 16)).make()
    before = conv(x, weight)
    x[1, 4, 5, 3] = float("inf")
    changed = (conv(x, weight) != before).any(dim=-1)
    reached = torch.zeros(2, 9, 12, dtype=torch.bool)
    reached[1, 2:6, 4:8] = True  # squares of 2 x 2 whose 4 x 4 inputs have it
    assert not changed[~reached].any() and changed[1, 3:6, 4:7].all()


def test_huge_and_tiny_values(level):
    for scale in (1e-30, 1e30):
        x, weight, *_ = cases.ALL[2].make()
        cases.judge((x * scale, weight, None, None), (conv(x * scale, weight),))


def test_refusals():
    x, weight, grad, wanted = cases.ALL[2].make_backward()
    for dtype in (torch.float64, torch.bfloat16):
        told = f"takes float32, got {dtype}"
        assert told in _cpu_image.why_not(x.to(dtype), weight.to(dtype), None, None)
        assert told in _cpu_image.why_not_backward(x, weight, grad.to(dtype), wanted)
    assert "takes tensors on the CPU, got meta" in _cpu_image.why_not(x.to("meta"), weight.to("meta"), None, None)
    with pytest.raises(ops._op.BackendError, match="takes float32"):
        ops.image_conv(x.bfloat16(), weight.bfloat16(), backend="cpu")


@pytest.mark.parametrize("images, channels, served", [
    ((2, 16, 16), (32, 32), "cpu"), ((2, 16, 16), (64, 3), "reference"), ((2, 16, 16), (3, 64), "reference"),
    ((1, 3, 5), (64, 64), "reference"),
])  # fmt: skip
def test_small_calls_are_left_to_torch_unless_asked_for(images, channels, served):
    args = cases.Case("", images, channels).make()
    with ops.served() as record:
        ops.image_conv(*args)
        assert record == {"image_conv": served}
        ops.image_conv(*args, backend="cpu")
        assert record == {"image_conv": "cpu"}
    if served != "cpu":
        assert "pays from" in ops.image_conv.reasons(*args)["cpu"]
