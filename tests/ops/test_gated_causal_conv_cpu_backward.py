"""The native gradients of the gated convolution: against float64, and the same bits whatever the threads."""

import pytest
import torch
from fastvid.kernels.gated_causal_conv import cases, reference

from fastvid import _native, ops
from fastvid.ops import _cpu_conv
from fastvid.testing import assert_within_yardstick

pytestmark = pytest.mark.skipif(
    _native.load() is None, reason=f"needs the native library, which is not there: {_native.why_not()}"
)
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("grad_x", "grad_weight", "grad_bias", "grad_addend")
FAR = ((-6, 0, -9), (-3, 2, 0), (0, 0, 9), (0, 0, 0))  # more apart than the slabs of a wide matrix
CASES = [  # grid, channels, taps, activation, origin, size
    cases.Case("odd", (2, 3, 4, 5), (7, 22), cases.PLANE_XT),
    cases.Case("odd-plain", (1, 2, 5, 7), (13, 19), cases.CUBE_ABOVE, "none"),
    cases.Case("odd-glu", (3, 2, 3, 9), (5, 2), cases.PLANE_YT, "glu"),
    cases.Case("one", (1, 1, 1, 1), (1, 2), cases.LEFT_5, extras=False),
    cases.Case("nothing-reached", (1, 1, 1, 2), (3, 4), ((-1, 0, 0), (0, 0, 5)), extras=False),
    cases.Case("row-pass", (2, 1, 3, 9), (8, 16), cases.ROWS_5, origin=(0, 2, 0), size=(1, 1, 9)),
    cases.Case("beyond", (1, 2, 3, 4), (6, 10), cases.PLANE_XT, "glu", origin=(-1, 1, -2), size=(4, 1, 9)),
    cases.Case("slabs", (3, 4, 17, 20), (33, 66), cases.PLANE_XT),
    cases.Case("far-apart", (1, 7, 5, 40), (130, 128), FAR),
    cases.Case("wide-line", (1, 1, 1, 1500), (96, 48), cases.LEFT_5, "none"),
]


def exact_of(args):
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    return reference.gated_causal_conv_backward(*wide)


def judge(args, found):
    every = zip(NAMES, args[-1], found, exact_of(args), reference.gated_causal_conv_backward(*args), strict=True)
    for name, wanted, ours, exact, peer in every:
        try:
            assert_within_yardstick(ours, exact, peer)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        assert wanted or ours.shape == (0,), name


@pytest.fixture
def threads():
    """A function that sets torch's thread count, which the kernels follow; set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, dtype, level):
    args = case.make_backward(dtype=dtype)
    assert _cpu_conv.why_not_backward(*args) is None
    judge(args, _cpu_conv.gated_causal_conv_backward(*args))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("start", ["out", "pre", "both"])
def test_any_gradient_may_be_all_there_is(activation, start, level):
    case = cases.Case("", (2, 2, 3, 5), (4, 18), cases.PLANE_XT, activation)
    x, weight, pre, grad_out, _, *rest, _ = case.make_backward()
    grad_out = None if start == "pre" else grad_out
    grad_pre = None if start == "out" else torch.randn(2, 2, 3, 5, 18)
    for wanted in ([True] * 4, [False, True, False, False], [False, False, True, False], [True, False, False, True]):
        args = (x, weight, None if grad_out is None else pre, grad_out, grad_pre, *rest, wanted)
        judge(args, _cpu_conv.gated_causal_conv_backward(*args))


def views(tensor):
    """The same values in other memory: torch's own layout, every other channel, a window of something larger."""
    yield tensor.movedim(-1, 1).contiguous().movedim(1, -1)
    yield torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1).flatten(-2)[..., ::2]
    B, T, H, W, C = tensor.shape
    larger = tensor.new_full((B, T, H + 2, W + 3, C + 1), torch.nan)
    larger[:, :, 1:-1, 2:-1, 1:] = tensor
    yield larger[:, :, 1:-1, 2:-1, 1:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[7]], ids=str)
def test_any_strides(case, dtype, level):
    args = case.make_backward(dtype=dtype)
    plain = _cpu_conv.gated_causal_conv_backward(*args)
    five = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.ndim == 5]
    for among in zip(*(views(args[i]) for i in five), strict=True):
        scattered = list(args)
        for i, view in zip(five, among, strict=True):
            scattered[i] = view
        found = _cpu_conv.gated_causal_conv_backward(*scattered)
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_a_gradient_that_is_the_same_everywhere(level):
    x, weight, pre, grad_out, _, *rest, wanted = CASES[0].make_backward()
    once = grad_out[:1, :1, :1, :1, :1].expand_as(grad_out)  # what sum() hands back
    found = _cpu_conv.gated_causal_conv_backward(x, weight, pre, once, None, *rest, wanted)
    dense = _cpu_conv.gated_causal_conv_backward(x, weight, pre, once.contiguous(), None, *rest, wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


def test_a_wider_gradient_of_the_output():
    x, weight, pre, grad_out, grad_pre, *rest = CASES[0].make_backward(dtype=torch.bfloat16)
    args = (x, weight, pre, torch.randn(grad_out.shape), grad_pre, *rest)  # that of a float32 residual
    found = _cpu_conv.gated_causal_conv_backward(*args)
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 4
    judge(args, found)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_whatever_the_threads(case, threads, level):
    args = case.make_backward()
    results = []
    for count in (1, 2, 5, 2):
        threads(count)
        results.append(_cpu_conv.gated_causal_conv_backward(*args))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_saturated_and_not_finite(level):
    a = torch.tensor([0.0, -0.0, 1e-30, 20.0, -20.0, 90.0, -200.0, torch.inf, -torch.inf, torch.nan, 1.0])
    pre = torch.stack(torch.meshgrid(a, a, indexing="ij"), dim=-1).view(1, 1, 11, 11, 2).contiguous()
    x, weight, ones = torch.zeros(1, 1, 11, 11, 1), torch.zeros(1, 1, 2), torch.ones(1, 1, 11, 11, 1)
    for activation in ("gate", "glu"):
        wanted = [False, False, False, True]
        args = (x, weight, pre, ones, None, [0, 0, 0], activation, [0, 0, 0], wanted)
        ours, exact = _cpu_conv.gated_causal_conv_backward(*args)[3], exact_of(args)[3]
        finite, unknown = exact.isfinite(), pre.isnan().any(dim=-1)
        torch.testing.assert_close(ours.double()[finite], exact[finite], rtol=1e-5, atol=1e-6)
        assert torch.equal(ours[unknown].isnan(), exact[unknown].isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_batch(dtype, level):
    args = cases.EMPTY.make_backward(dtype=dtype)
    found = _cpu_conv.gated_causal_conv_backward(*args)
    assert found[0].shape == args[0].shape and found[3].shape == (0, 1, 2, 3, 6)
    assert torch.equal(found[1], torch.zeros_like(args[1])) and torch.equal(found[2], torch.zeros(6, dtype=dtype))


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_training_through_the_op(case):
    x, weight, bias, taps, addend, residual, activation, origin, size, _ = case.make()
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias, addend, residual)]
    gradients = []
    for backend in ("cpu", "reference"):
        with ops.served() as record:
            done = ops.gated_causal_conv(*tensors[:3], taps, *tensors[3:], activation, origin, size, backend=backend)
            loss = done.out.square().mean() + done.pre.sin().mean()
            gradients.append(torch.autograd.grad(loss, tensors))
        assert set(record.values()) == {backend}
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
