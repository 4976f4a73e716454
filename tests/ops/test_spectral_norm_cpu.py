"""The native spectral normalisation: against float64 at every level, and the same bits whatever the threads."""

import pytest
import torch
from fastvid.kernels.spectral_norm import cases, reference

from fastvid import _native, ops
from fastvid.ops import _cpu_spectral
from fastvid.testing import poisoned_memory

pytestmark = pytest.mark.skipif(
    _native.load() is None, reason=f"needs the native library, which is not there: {_native.why_not()}"
)
# several pieces of rows, some with a rest; runs of elements that end within a row; more than one group
WIDE = cases.Case("pieces and groups", ((131, 1031), (33, 5000), (7, 3, 3, 3), (300, 40, 3, 3)))


def norm(*args):
    """The launcher on arguments of the op, flat."""
    assert _cpu_spectral.why_not(*args) is None
    with poisoned_memory():
        return cases._flat(_cpu_spectral.spectral_norm(*args))


def gradient(*args):
    assert _cpu_spectral.why_not_backward(*args) is None
    with poisoned_memory():
        return cases._flat(_cpu_spectral.spectral_norm_backward(*args))


@pytest.fixture
def threads():
    """A function that sets torch's thread count, which the kernel follows; set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*cases.ALL, WIDE], ids=str)
def test_values(case, dtype, level):
    args = case.make(dtype=dtype)
    cases.judge(args, norm(*args))
    given = case.make_backward(dtype=dtype)
    cases.judge_backward(given, gradient(*given))


@pytest.mark.parametrize("scale", [1e20, 1e-22])
def test_products_beyond_float32_are_divided_before_they_are_multiplied(scale):
    weights, u, v, iterations, _, dims = cases.ALL[2].make()
    args = [weight * scale for weight in weights], u, v, iterations, 1e-30, dims
    exact = cases._flat(reference.spectral_norm(*cases._exactly(args)))
    for ours, true in zip(norm(*args), exact, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-6 * float(true.abs().max()))


@pytest.mark.parametrize("case", [WIDE, cases.ALL[8]], ids=str)
def test_threads_change_no_bit(case, threads):
    args, given = case.make(), case.make_backward()
    threads(1)
    alone = norm(*args), gradient(*given)
    for count in (2, 5):
        threads(count)
        for mine, theirs in zip(alone, (norm(*args), gradient(*given)), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_weight_does_not_depend_on_its_neighbours():
    args = WIDE.make()
    together = _cpu_spectral.spectral_norm(*args)
    for i in range(len(args[0])):
        weights, u, v, iterations, eps, dims = args
        alone = _cpu_spectral.spectral_norm([weights[i]], [u[i]], [v[i]], iterations, eps, [dims[i]])
        assert torch.equal(alone[0][0], together[0][i]) and torch.equal(alone[3][0], together[3][i])


def test_memory_formats():
    plain = torch.randn(12, 6, 3, 3)
    for weight in (plain.contiguous(memory_format=torch.channels_last), torch.randn(6, 12, 3, 3).transpose(0, 1),
                   torch.randn(12, 6, 3, 6)[..., ::2]):  # fmt: skip
        u, v, grad = torch.randn(12), torch.randn(54), torch.randn_like(weight)
        native = _cpu_spectral.spectral_norm([weight], [u], [v], 1, 1e-12, [0])
        other = reference.spectral_norm([weight], [u], [v], 1, 1e-12, [0])
        torch.testing.assert_close(native[0][0], other[0][0])
        assert native[0][0].stride() == torch.empty_like(weight).stride()
        given = [grad], [weight], *native[1:3], native[3], [0]
        moved = _cpu_spectral.spectral_norm_backward(*given)
        torch.testing.assert_close(moved[0][0], reference.spectral_norm_backward(*given)[0][0])
        assert moved[0][0].stride() == torch.empty_like(weight).stride()


def test_says_why_it_does_not_serve():
    weights, u, v = [torch.randn(3, 4, dtype=torch.float64)], [torch.ones(3).double()], [torch.ones(4).double()]
    told = ops.spectral_norm.explain(weights, u, v)
    assert "cpu:       takes float32 and bfloat16, got torch.float64" in told and "reference: serves" in told
    refusal = _cpu_spectral.why_not_backward([torch.ones(2, 2).bfloat16()], [torch.ones(2, 2)], [], [])
    assert refusal == "takes a gradient of its weight's dtype, got torch.bfloat16 beside torch.float32"


def test_degenerate_weights():
    empty = ([torch.empty(0, 5), torch.empty(4, 0)], [torch.empty(0), torch.ones(4)], [torch.ones(5), torch.empty(0)])
    for iterations in (0, 1):
        done = _cpu_spectral.spectral_norm(*empty, iterations, 1e-12, [0, 0])
        assert done[3].tolist() == [0.0, 0.0] and [tuple(out.shape) for out in done[0]] == [(0, 5), (4, 0)]
    (moved,) = _cpu_spectral.spectral_norm_backward(empty[0], *empty, torch.ones(2), [0, 0])
    assert [tuple(one.shape) for one in moved] == [(0, 5), (4, 0)]
    for value in (float("nan"), float("inf")):
        out, _, _, sigma = _cpu_spectral.spectral_norm([torch.full((3, 4), value)], [torch.ones(3)], [torch.ones(4)],
                                                       1, 1e-12, [0])  # fmt: skip
        assert not sigma.isfinite().any() and out[0].isnan().all()
