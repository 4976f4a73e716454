"""The native convolutional GRU: against float64 on both ways of multiplying, and the same bits whatever helps."""

import pytest
import torch
from fastvid.kernels.conv_gru import cases
from fastvid.kernels.conv_gru.cases import Case

from fastvid import _native
from fastvid.ops import _cpu_gru
from fastvid.testing import poisoned_memory

pytestmark = pytest.mark.skipif(
    _native.load() is None, reason=f"needs the native library, which is not there: {_native.why_not()}"
)
DTYPES = [torch.float32, torch.bfloat16]
TAPS = Case("several blocks of positions, products in groups", (9, 2, 3, 4), 281, hidden=True)
TILES = Case("several blocks of tiles, cut ones at the edges", (3, 2, 13, 11), 37, hidden=True)
SIZES = [*cases.ALL, TILES, Case("just transformed", (1, 2, 6, 6), 9), Case("flat", (1, 2, 1, 40), 9)]
TYPED = [(case, dtype) for case in SIZES for dtype in DTYPES] + [(TAPS, torch.float32)]  # torch's bfloat16 is slow


def scan(*args) -> tuple[torch.Tensor, torch.Tensor]:
    """The launcher on arguments of the op."""
    assert _cpu_gru.why_not(*args) is None
    with poisoned_memory():
        return _cpu_gru.conv_gru(*args)


def reverse(*args) -> tuple[torch.Tensor, ...]:
    assert _cpu_gru.why_not_backward(*args) is None
    with poisoned_memory():
        return _cpu_gru.conv_gru_backward(*args)


def assert_same_bits(ours: tuple, others: tuple) -> None:
    for a, b in zip(ours, others, strict=True):
        assert a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.fixture
def threads():
    """A function that sets torch's thread count, which the kernel follows; set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case, dtype", TYPED, ids=str)
def test_values(case, dtype, level):
    args = case.make(dtype=dtype)
    cases.judge(args, scan(*args))


@pytest.mark.parametrize("case, dtype", TYPED, ids=str)
def test_gradients(case, dtype, level):
    args = case.make_backward(dtype=dtype)
    cases.judge_backward(args, reverse(*args))


@pytest.mark.parametrize("given", ["kept", "both"])
@pytest.mark.parametrize("case", [cases.ALL[2], cases.ALL[-1]], ids=str)
def test_a_gradient_of_what_is_kept(case, given):
    grad, _, *rest = case.make_backward()
    grads = (None if given == "kept" else grad, torch.randn_like(rest[4]))
    cases.judge_backward((*grads, *rest), reverse(*grads, *rest))


@pytest.mark.parametrize("wanted", [[False, True, False, False], [False, False, True, False], [False] * 3 + [True]])
def test_only_what_is_wanted(wanted):
    *args, _ = cases.ALL[2].make_backward()
    every, some = reverse(*args, [True] * 4), reverse(*args, wanted)
    for whole, part, asked in zip(every, some, wanted, strict=True):
        assert torch.equal(whole, part) if asked else part.shape == (0,)


def test_the_gradient_of_a_state_that_nobody_gave():
    *args, wanted = Case("", (2, 2, 3, 4), 5).make_backward()
    args[2] = None
    zeros = [*args]
    zeros[2] = torch.zeros(2, 3, 4, 5)
    assert_same_bits(reverse(*args, [True] * 4), reverse(*zeros, [True] * 4))


def test_no_state_is_a_state_of_zeros():
    gates, _, *rest = TILES.make()
    assert_same_bits(scan(gates, None, *rest), scan(gates, gates.new_zeros(3, 13, 11, 37), *rest))


@pytest.mark.parametrize("case", [TAPS, TILES, cases.ALL[-1]], ids=str)
def test_threads_agree_to_the_last_bit(case, threads):
    args, backward = case.make(), case.make_backward()
    threads(1)
    alone, gradients = scan(*args), reverse(*backward)
    for count in (2, 3, 7):
        threads(count)
        assert_same_bits(scan(*args), alone)
        assert_same_bits(reverse(*backward), gradients)


@pytest.mark.parametrize("case", [TAPS, TILES], ids=str)
def test_a_sample_knows_nothing_of_the_others(case):
    gates, hidden, *rest = case.make()
    whole = scan(gates, hidden, *rest)
    for b in range(len(gates)):
        alone = scan(gates[b : b + 1], hidden[b : b + 1], *rest)
        assert_same_bits(alone, tuple(tensor[b : b + 1] for tensor in whole))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_nan_stays_where_it_came_from_and_goes_on(activation):
    gates, hidden, *rest = Case("", (2, 3, 4, 4), 5, activation=activation, hidden=True).make()
    gates[0, 1, 2, 2, 0] = torch.nan  # the reset gate of one channel
    states, kept = scan(gates, hidden, *rest)
    assert states[0, 0].isfinite().all() and states[1].isfinite().all()
    assert kept[0, 1, 2, 2, 0].isnan() and states[0, 1, 1:, 1:].isnan().all() and states[0, 1, 0].isfinite().all()


def test_refuses_what_it_cannot_serve():
    args = cases.ALL[2].make(dtype=torch.float64)
    assert "takes float32 or bfloat16" in _cpu_gru.why_not(*args)
    mixed = cases.ALL[2].make_backward()
    assert "one of them for all" in _cpu_gru.why_not_backward(mixed[0].bfloat16(), *mixed[1:])
    assert "on the CPU, got meta" in _cpu_gru.why_not(args[0].to("meta"), *args[1:])
