"""The native gated convolution: against float64, and the same bits whatever the threads, the batch and the layout."""

from random import Random

import pytest
import torch
from fastvid.kernels.gated_causal_conv import cases
from torch import Tensor

from fastvid import _native
from fastvid.ops import _cpu_conv
from fastvid.testing import poisoned_memory

pytestmark = pytest.mark.skipif(
    _native.load() is None, reason=f"needs the native library, which is not there: {_native.why_not()}"
)
DTYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS = ["gate", "glu", "none"]
WIDE = cases.Case("several blocks, tap groups and panels", (2, 3, 7, 29), (50, 2 * 37), cases.PLANE_XT)
DEEP = cases.Case("a tap in several groups", (1, 2, 3, 70), (515, 2 * 9), cases.LEFT_5)


def conv(*args) -> tuple[Tensor, Tensor]:
    """The launcher on arguments of the op."""
    x, weight, bias, taps, addend, residual, activation, origin, size, keep = args
    flat = [offset for tap in taps for offset in tap]
    settled = (x, weight, bias, flat, addend, residual, activation, [*origin], [*(size or x.shape[1:4])], keep)
    assert _cpu_conv.why_not(*settled) is None
    with poisoned_memory():
        return _cpu_conv.gated_causal_conv(*settled)


def changed(args: tuple, **changes) -> tuple:
    names = ("x", "weight", "bias", "taps", "addend", "residual", "activation", "origin", "size", "keep")
    return tuple(changes.get(name, value) for name, value in zip(names, args, strict=True))


def assert_same_bits(ours: tuple, others: tuple) -> None:
    for name, a, b in zip(("out", "pre"), ours, others, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), name


@pytest.fixture
def threads():
    """A function that sets torch's thread count, which the kernel follows; set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*cases.ALL, WIDE, DEEP], ids=str)
def test_values(case, dtype, level):
    args = case.make(dtype=dtype)
    cases.judge(args, conv(*args))


def any_strides(random: Random, *shape: int) -> Tensor:
    """Random values of this shape: side by side, channels first, every other one, or with a run of equal ones."""
    kind = random.choice(["dense", "channels first", "sparse", "expanded"])
    if kind == "channels first":
        return torch.randn(shape[0], shape[-1], *shape[1:-1]).movedim(1, -1)
    if kind == "sparse":
        return torch.randn(*shape[:-1], 2 * shape[-1])[..., 1::2]
    if kind == "expanded":
        return torch.randn([random.choice([1, n]) for n in shape]).expand(shape)
    return torch.randn(shape)


def drawn(random: Random) -> tuple:
    """Arguments of a call that nobody chose: taps of either sign, odd channel counts, an output grid of its own."""
    grid = tuple(random.choice(sizes) for sizes in ((1, 2, 3), (1, 2, 3), (1, 2, 5), (1, 3, 8, 17)))
    count, Cin, C = random.choice([1, 2, 3, 8, 13]), random.choice([1, 3, 5, 17, 40]), random.choice([1, 3, 5, 17])
    taps = tuple(tuple(random.randint(-3, 3) for _ in range(3)) for _ in range(count))
    activation = random.choice(ACTIVATIONS)
    Cout = C if activation == "none" else 2 * C
    own = random.random() < 0.5
    size = tuple(random.randint(1, 5) for _ in range(3)) if own else None
    origin = tuple(random.randint(-2, 2) for _ in range(3)) if own else (0, 0, 0)
    outputs = (grid[0], *(size or grid[1:]))
    weight = any_strides(random, count, Cin, Cout) * (count * Cin) ** -0.5
    weight = weight if random.random() < 0.5 else weight.mT.contiguous().mT
    bias, addend, residual = torch.randn(Cout), any_strides(random, *outputs, Cout), any_strides(random, *outputs, C)
    some = [tensor if random.random() < 0.6 else None for tensor in (bias, addend, residual)]
    return any_strides(random, *grid, Cin), weight, some[0], taps, *some[1:], activation, origin, size, True


def test_drawn_calls(level):
    random = Random(int(torch.randint(1 << 30, ())))
    for _ in range(60):
        args, dtype = drawn(random), random.choice(DTYPES)
        x, weight, bias, _, addend, *_ = args
        halved = {"x": x, "weight": weight, "bias": bias, "addend": addend}
        halved = {name: tensor if tensor is None else tensor.to(dtype) for name, tensor in halved.items()}
        args = changed(args, **halved)  # the residual stays float32, and the output with it
        with_residual = args[5] is not None and dtype != torch.float32
        if with_residual:
            out, pre = conv(*args)
            assert (out.dtype, pre.dtype) == (torch.float32, dtype)
            args = changed(args, residual=args[5].to(dtype))
        cases.judge(args, conv(*args))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_half_precision_is_rounded_once(activation):
    args = cases.Case("", (2, 2, 5, 9), (20, 36), cases.PLANE_YT, activation).make(dtype=torch.bfloat16)
    wide = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
    assert_same_bits(conv(*args), tuple(tensor.bfloat16() for tensor in conv(*wide)))


@pytest.mark.parametrize("case", [WIDE, DEEP], ids=str)
def test_threads_agree_to_the_last_bit(case, threads):
    args = case.make()
    threads(1)
    alone = conv(*args)
    for count in (2, 3, 7):
        threads(count)
        assert_same_bits(conv(*args), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_is_the_same_in_every_batch(dtype, level):
    args = cases.Case("", (5, 2, 6, 7), (19, 22), cases.PLANE_XT).make(dtype=dtype)
    x, _, _, _, addend, residual, *_ = args
    whole = conv(*args)
    for some in (slice(1), slice(2, 3), slice(1, 4)):
        part = conv(*changed(args, x=x[some], addend=addend[some], residual=residual[some]))
        assert_same_bits(part, tuple(tensor[some] for tensor in whole))


def test_a_part_of_the_grid_is_the_same_as_in_the_whole(level):
    args = WIDE.make()
    whole = conv(*args)
    for origin, size in [
        ((2, 3, 0), (1, 1, 29)),
        ((1, 0, 0), (1, 7, 29)),
        ((0, 2, 4), (3, 5, 1)),
        ((2, 6, 28), (1, 1, 1)),
    ]:
        part = tuple(slice(start, start + n) for start, n in zip(origin, size, strict=True))
        cut = {name: args[i][(slice(None), *part)] for name, i in (("addend", 4), ("residual", 5))}
        assert_same_bits(
            conv(*changed(args, origin=origin, size=size, **cut)),
            tuple(tensor[(slice(None), *part)] for tensor in whole),
        )


def test_what_no_tap_reads_has_no_influence(level):
    args = WIDE.make()
    before, x = conv(*args), args[0].clone()
    where = (1, 1, 4, 11)
    x[where] = float("nan")
    after = conv(*changed(args, x=x))
    reads = torch.zeros(WIDE.grid, dtype=torch.bool)
    for tap in WIDE.taps:
        position = [p - d for p, d in zip(where[1:], tap, strict=True)]
        if all(0 <= p < n for p, n in zip(position, WIDE.grid[1:], strict=True)):
            reads[(where[0], *position)] = True
    for old, new in zip(before, after, strict=True):
        assert new[reads].isnan().all() and torch.equal(new[~reads], old[~reads])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_agree_to_the_last_bit(dtype):
    args = WIDE.make(dtype=dtype)
    x, weight, _, _, addend, residual, *_ = args
    plain = conv(*args)
    first = lambda tensor: tensor.movedim(-1, 1).contiguous().movedim(1, -1)  # noqa: E731
    apart = lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0]  # noqa: E731
    for layout in (first, apart):
        assert_same_bits(conv(*changed(args, x=layout(x), addend=layout(addend), residual=layout(residual))), plain)
    assert_same_bits(conv(*changed(args, weight=weight.mT.contiguous().mT)), plain)
    assert_same_bits(conv(*changed(args, weight=apart(weight))), plain)
    everywhere = addend[:, :1, :1, :1].expand_as(addend)
    assert_same_bits(conv(*changed(args, addend=everywhere)), conv(*changed(args, addend=everywhere.contiguous())))


def test_pre_is_what_the_output_came_from():
    args = WIDE.make()
    out, pre = conv(*args)
    plain, none = conv(*changed(args, activation="none", residual=None))
    assert torch.equal(plain, pre) and none.shape == (0,)
    alone, nothing = conv(*changed(args, keep=False))
    assert torch.equal(alone, out) and nothing.shape == (0,)


def test_gates_that_are_closed_or_wide_open(level):
    weight, taps = torch.ones(1, 1, 2), ((0, 0, 0),)
    x = torch.tensor([-1e30, -200.0, 0.0, 200.0, 1e30]).view(1, 1, 1, 5, 1)
    out, _ = conv(x, weight, None, taps, None, None, "gate", (0, 0, 0), None, False)
    assert out.flatten().tolist() == [0, 0, 0, 1, 1]
    out, _ = conv(x, weight, None, taps, None, None, "glu", (0, 0, 0), None, False)
    assert out.flatten().tolist()[2:] == [0, 200, x[..., 4, 0].item()]


def test_nothing_to_sum():
    bias, taps = torch.randn(6), ((0, 0, -1), (9, 0, 0))
    for case in (cases.EMPTY, cases.Case("", (2, 1, 2, 3), (4, 6), taps, origin=(3, 3, 3), size=(1, 2, 0))):
        args = case.make()
        cases.judge(args, conv(*args))
    out, _ = conv(
        torch.randn(1, 2, 2, 3, 4), torch.randn(0, 4, 6), bias, (), None, None, "none", (0, 0, 0), None, False
    )
    assert torch.equal(out, bias.expand(1, 2, 2, 3, 6))
    far = conv(torch.randn(1, 2, 2, 3, 4), torch.randn(2, 4, 6), bias, taps, None, None, "none", (5, 5, 5), None, False)
    assert torch.equal(far[0], out)


def test_refusals():
    args = [torch.zeros(1, 1, 1, 2, 3), torch.zeros(1, 3, 4), None, [0, 0, 0], None, None]
    assert _cpu_conv.why_not(*args) is None
    for dtype in (torch.float64, torch.float16):
        told = f"takes float32 and bfloat16, got {dtype}"
        assert told in _cpu_conv.why_not(args[0].to(dtype), *args[1:])
        assert told in _cpu_conv.why_not_backward(args[0], args[1].to(dtype), None, None, None)
    assert "takes tensors on the CPU, got meta" in _cpu_conv.why_not(*(a.to("meta") for a in args[:2]), *args[2:])
