"""The native conditional batch normalisation: against float64, and the same bits whatever the threads."""

from random import Random

import pytest
import torch
from fastvid.kernels.conditional_batch_norm import cases
from torch import Tensor

from fastvid import _native, ops
from fastvid.ops import _cpu_norm
from fastvid.testing import poisoned_memory

pytestmark = pytest.mark.skipif(
    _native.load() is None, reason=f"needs the native library, which is not there: {_native.why_not()}"
)
DTYPES = [torch.float32, torch.bfloat16]
WIDE = cases.Case("several slices, strips and rests", (2, 1, 33, 37, 75), upsample=True)  # cut by channels
FLAT = cases.Case("the same, not enlarged", (2, 1, 37, 33, 75))
SUBJECTS = {subject.op: subject for subject in cases.SUBJECTS}
LAUNCHERS = {name: (getattr(_cpu_norm, name), SUBJECTS[name]) for name in SUBJECTS}


def launched(name: str, args: tuple):
    launch, subject = LAUNCHERS[name]
    refuses = _cpu_norm.why_not_backward if name.endswith("backward") else _cpu_norm.why_not
    assert refuses(*args) is None
    with poisoned_memory():
        found = launch(*args)
    return found[0] if name == "conditional_norm" else found


def assert_same_bits(ours, others) -> None:
    for a, b in zip(*((found,) if isinstance(found, Tensor) else found for found in (ours, others)), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.fixture
def threads():
    """A function that sets torch's thread count, which the kernel follows; set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_values(name, dtype, level):
    subject = SUBJECTS[name]
    for case in [*cases.ALL, *([WIDE, FLAT] if dtype == torch.float32 else [])]:
        args = subject.make(case, "cpu", dtype)
        subject.judge(args, launched(name, args))


def laid_out(random: Random, maps: Tensor) -> Tensor:
    """The same maps: side by side, channels first, rows or frames apart, or every other channel."""
    B, T, H, W, C = maps.shape
    kind = random.choice(["dense", "channels first", "columns apart", "rows apart", "time first", "sparse"])
    if kind == "channels first":
        return maps.movedim(-1, 1).contiguous().movedim(1, -1)
    if kind == "time first":
        return maps.transpose(0, 1).contiguous().transpose(0, 1)
    shape = {"columns apart": (B, T, H, W, C + 3), "rows apart": (B, T, H, W + 2, C)}.get(kind, (B, T, H, W, 2 * C))
    room = maps.new_full(shape, torch.nan)
    placed = room[..., ::2] if kind in ("sparse", "dense") else room[:, :, :, :W, :C]
    placed.copy_(maps)
    return maps if kind == "dense" else placed


def test_drawn_calls(level):
    random = Random(int(torch.randint(1 << 30, ())))
    for _ in range(12):
        case, dtype = cases.drawn(random), random.choice(DTYPES)
        for name, subject in SUBJECTS.items():
            args = subject.make(case, "cpu", dtype)
            given = tuple(laid_out(random, a) if isinstance(a, Tensor) and a.ndim == 5 else a for a in args)
            found = launched(name, given)
            subject.judge(args, found)
            if name == "conditional_norm":  # nothing is summed, so the order of positions is nothing to it
                assert_same_bits(found, launched(name, args))


@pytest.mark.parametrize("case", [WIDE, FLAT, cases.ALL[5]], ids=str)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_bits_do_not_depend_on_the_threads(name, case, threads):
    args = SUBJECTS[name].make(case)
    threads(1)
    alone = launched(name, args)
    for count in (2, 3, 8):
        threads(count)
        assert_same_bits(launched(name, args), alone)


@pytest.mark.parametrize("upsample", [False, True])
def test_a_sample_and_a_channel_are_the_same_alone(upsample):
    case = cases.Case("", (3, 2, 9, 7, 48), upsample=upsample)
    x, mean, var, gain, bias, *options = case.make()
    whole = launched("conditional_norm", (x, mean, var, gain, bias, *options))
    one = launched("conditional_norm", (x[1:2], mean, var, gain[1:2], bias[1:2], *options))
    assert torch.equal(whole[1:2], one)
    some = slice(16, 32)  # whole vectors at every level
    part = tuple(tensor[..., some] for tensor in (x, mean, var, gain, bias))
    assert torch.equal(whole[..., some], launched("conditional_norm", (*part, *options)))


def test_half_precision_is_rounded_once():
    args = cases.Case("", (2, 2, 5, 9, 20), upsample=True).make(dtype=torch.bfloat16)
    wide = launched("conditional_norm", (args[0].float(), *args[1:]))
    assert torch.equal(launched("conditional_norm", args), wide.bfloat16())


def test_a_constant_channel_has_no_variance():
    x = torch.full((2, 2, 40, 3, 9), 4097.3)
    mean, var = launched("frame_moments", (x,))
    assert torch.equal(mean, x[0, :, 0, 0]) and (var == 0).all()
    out, *_ = launched("conditional_batch_norm", (x, torch.ones(2, 9), torch.full((2, 9), 0.5), 1e-5, False, False))
    assert (out == 0.5).all()


def test_moments_of_frames_that_jump():
    # whole rows far from what was seen before, so that the mean from which strips are measured is far off
    x = torch.randn(2, 2, 64, 16, 20)
    x[:, :, 2:5] += 3e3
    x[1, :, 40:] -= 2e4
    SUBJECTS["frame_moments"].judge((x,), launched("frame_moments", (x,)))


def test_not_a_number_and_infinity_stay_where_they_are():
    x, gain, bias, *options = cases.ALL[2].make_batch()
    x[0, 0, 0, 0, 3], x[0, 1, 0, 0, 4] = torch.nan, torch.inf
    out, mean, var = launched("conditional_batch_norm", (x, gain, bias, *options))
    for found in (mean, var):
        assert (~found.isfinite()).nonzero().tolist() == [[0, 3], [1, 4]]
    assert out[:, 0, ..., 3].isnan().all()
    assert out[:, 0, ..., :3].isfinite().all() and out[:, 1, ..., 5:].isfinite().all()


def test_only_what_is_wanted_is_made():
    args = cases.ALL[6].make_backward()
    whole = launched("conditional_norm_backward", (*args[:-1], [True] * 5))
    for i in range(5):
        some = launched("conditional_norm_backward", (*args[:-1], [j == i for j in range(5)]))
        assert [part.numel() > 0 for part in some] == [j == i for j in range(5)]
        assert torch.equal(some[i], whole[i])


def test_a_gradient_that_is_the_same_everywhere():
    x, mean, var, gain, bias, grad_out, *rest = cases.ALL[7].make_backward()
    same = torch.randn(()).expand(grad_out.shape)
    assert_same_bits(
        launched("conditional_norm_backward", (x, mean, var, gain, bias, same, *rest)),
        launched("conditional_norm_backward", (x, mean, var, gain, bias, same.contiguous(), *rest)),
    )


def test_what_it_cannot_take_it_says():
    x, *others = cases.ALL[2].make_backward()
    assert "float32 and bfloat16" in _cpu_norm.why_not(x.double())
    assert "of one dtype" in _cpu_norm.why_not_backward(x.bfloat16(), *others)
    assert "on the CPU, got meta" in _cpu_norm.why_not(x.to("meta"))
    told = ops.conditional_norm.explain(*cases.ALL[2].make())
    assert "cpu: serves" in " ".join(told.split())
