"""The gated causal convolution against torch's dense one with a masked kernel, and what only the op itself promises."""

import pytest
import torch
import torch.nn.functional as F
from fastvid.kernels.gated_causal_conv import cases, reference

import fastvid
from fastvid import ops
from fastvid.testing import assert_within_yardstick

WHOLE = [case for case in cases.ALL if case.size is None]  # those whose output grid is the input's


def dense(x, weight, bias, taps, addend=None, residual=None, activation="gate"):
    """A zero-padded F.conv3d whose kernel is zero at every dead tap, and the gate in passes of its own."""
    reach = [max(abs(tap[axis]) for tap in taps) for axis in range(3)]
    kernel = x.new_zeros(weight.shape[2], weight.shape[1], *(2 * r + 1 for r in reach))
    for i, tap in enumerate(taps):
        kernel[(slice(None), slice(None), *(r + d for r, d in zip(reach, tap, strict=True)))] = weight[i].T
    pre = F.conv3d(x.movedim(-1, 1), kernel, bias, padding=tuple(reach)).movedim(1, -1)
    pre = pre if addend is None else pre + addend
    if activation == "none":
        out = pre
    else:
        a, b = pre.chunk(2, dim=-1)
        out = (torch.tanh(a) if activation == "gate" else a) * torch.sigmoid(b)
    return out if residual is None else out + residual


def differentiable(args, dtype=None):
    return [a.detach().to(dtype or a.dtype).requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_equals_dense_masked_convolution(case):
    args, upstream = case.make()[:7], torch.randn((*case.grid, case.make()[5].shape[-1] if case.extras else 0))
    results, gradients = [], []
    for function, dtype in ((ops.gated_causal_conv, None), (dense, torch.float64), (dense, None)):
        given = differentiable(args, dtype)
        out = function(*given)
        out = out.out if isinstance(out, ops.Gated) else out
        upstream = torch.randn_like(out) if out.shape != upstream.shape else upstream
        results.append(out)
        inputs = [tensor for tensor in given if isinstance(tensor, torch.Tensor)]
        gradients.append(torch.autograd.grad(out, inputs, upstream.to(out.dtype)))
    assert_within_yardstick(*results)
    for ours, exact, peer in zip(*gradients, strict=True):
        assert_within_yardstick(ours, exact, peer)


@pytest.mark.parametrize("activation", ["gate", "glu", "none"])
def test_gradcheck(activation):
    case = cases.Case("", (2, 2, 3, 4), (3, 4), cases.PLANE_XT[-4:], activation, origin=(0, 1, 0), size=(2, 2, 4))
    x, weight, bias, taps, addend, residual, *_ = case.make(dtype=torch.float64)
    inputs = differentiable((x, weight, bias, addend, residual))

    def both(x, weight, bias, addend, residual):
        done = ops.gated_causal_conv(
            x, weight, bias, taps, addend, residual, activation, origin=case.origin, size=case.size
        )
        return tuple(done)

    assert torch.autograd.gradcheck(both, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(both, inputs, fast_mode=True)


def test_a_gradient_of_pre_alone():
    case = cases.ALL[6]
    given, peer = differentiable(case.make()), differentiable(case.make())
    for mine, theirs in zip(given, peer, strict=True):
        if isinstance(mine, torch.Tensor):
            theirs.data.copy_(mine.data)
    pre = ops.gated_causal_conv(*given).pre
    pre.square().sum().backward()
    flat = [offset for tap in case.taps for offset in tap]
    plain = reference.causal_conv(*peer[:3], flat, (0, 0, 0), case.grid[1:])
    (plain + peer[4]).square().sum().backward()
    assert given[5].grad is None
    for mine, theirs in zip((given[i].grad for i in (0, 1, 2, 4)), (peer[i].grad for i in (0, 1, 2, 4)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["", "reference"])
def test_what_is_ahead_never_touches_what_is_behind(backend):
    case = cases.ALL[6]
    x, weight, bias, taps, addend, residual, *_ = case.make()
    given = (weight, bias, taps, addend, residual)
    before = ops.gated_causal_conv(x, *given, keep=True, backend=backend).pre
    where = (1, 2, 3)
    x[(0, *where)] += 1
    after = ops.gated_causal_conv(x, *given, keep=True, backend=backend).pre
    changed = (before != after).any(dim=-1)
    reached = {tuple(p - d for p, d in zip(where, tap, strict=True)) for tap in taps}
    inside = {p for p in reached if all(0 <= q < n for q, n in zip(p, case.grid[1:], strict=True))}
    assert not changed[1].any() and {tuple(p) for _, *p in changed.nonzero().tolist()} == inside


def test_rows_frames_and_cached_strips_are_parts_of_the_whole():
    x, weight, bias, taps, addend, *_ = cases.ALL[6].make()
    whole = ops.gated_causal_conv(x, weight, bias, taps, addend, keep=True)
    T, H, W = x.shape[1:4]
    row = ops.gated_causal_conv(
        x, weight, bias, taps, addend[:, 1:2, 2:3], origin=(1, 2, 0), size=(1, 1, W), keep=True
    )
    assert torch.equal(row.out, whole.out[:, 1:2, 2:3]) and torch.equal(row.pre, whole.pre[:, 1:2, 2:3])
    strip = ops.causal_conv(x[:, 1:], weight, bias, taps, addend=addend[:, 2:], origin=(1, 0, 0), size=(1, H, W))
    missing = [tap for tap in taps if tap[0] == -2]
    rest = ops.causal_conv(
        x[:, :1], weight[: len(missing)], None, [(dt + 2, dy, dx) for dt, dy, dx in missing], size=(1, H, W)
    )
    torch.testing.assert_close(strip + rest, whole.pre[:, 2:], rtol=1e-5, atol=1e-5)


def step(x, weight, bias, addend, residual):
    done = ops.gated_causal_conv(x, weight, bias, cases.PLANE_XT, addend, residual)
    return done.out.square().sum() + done.pre.sin().sum()


def test_compiles_whole_and_trains_alike():
    args = cases.ALL[6].make()
    given = differentiable([args[i] for i in (0, 1, 2, 4, 5)])
    other = differentiable([args[i] for i in (0, 1, 2, 4, 5)])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(step(*given), compiled(*other), rtol=0, atol=0)
        step(*given).backward()
        compiled(*other).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(given, other, strict=True))


def test_one_graph_for_every_grid():
    args, graphs = cases.ALL[6].make(), []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: ops.gated_causal_conv(x, *args[1:4]).out, fullgraph=True, backend=count, dynamic=True
    )
    for width in (7, 6, 5):  # none that another axis has too, which would be taken for the same
        x = args[0][:, :, :, :width].contiguous()
        assert torch.equal(compiled(x), ops.gated_causal_conv(x, *args[1:4]).out)
    assert len(graphs) == 1


def test_explains_who_serves():
    told = ops.gated_causal_conv.explain(*cases.ALL[6].make(), backend="reference")
    assert "reference: serves" in " ".join(told.split())


def test_the_gradient_is_served_by_who_served_the_forward():
    given = differentiable([cases.ALL[6].make()[i] for i in (0, 1, 2, 4, 5)])
    with fastvid.backend("reference"):
        loss = step(*given)
    with ops.served() as record:
        loss.backward()
    assert record == {"gated_causal_conv_backward": "reference"}


def test_autocast_as_convolutions_do():
    given = differentiable([cases.ALL[6].make()[i] for i in (0, 1, 2, 4, 5)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        done = ops.gated_causal_conv(given[0], given[1], given[2], cases.PLANE_XT, given[3], given[4])
        plain = ops.gated_causal_conv(given[0], given[1], given[2], cases.PLANE_XT, given[3])
    assert (done.out.dtype, done.pre.dtype, plain.out.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    done.out.sum().backward()
    assert {tensor.grad.dtype for tensor in given} == {torch.float32}


def test_no_bias_empty_batch_and_nothing_kept():
    taps = ((0, 0, -1), (0, 0, 0))
    done = ops.gated_causal_conv(torch.zeros(0, 1, 2, 3, 4), torch.randn(2, 4, 6), None, taps)
    assert done.out.shape == (0, 1, 2, 3, 3) and done.pre.shape == (0,)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"taps": ((1, 0, 0), (0, 0, 0))}, "dt <= 0"),
        ({"weight": torch.zeros(3, 4, 6)}, r"\[2 taps, Cin, Cout\]"),
        ({"weight": torch.zeros(2, 4, 5)}, "even Cout"),
        ({"bias": torch.zeros(5)}, r"`bias` must be \[6\]"),
        ({"addend": torch.zeros(1, 2, 2, 2, 5)}, r"`addend` must be \[1, 2, 2, 2, 6\]"),
        ({"residual": torch.zeros(1, 2, 2, 2, 6)}, r"`residual` must be \[1, 2, 2, 2, 3\]"),
        ({"weight": torch.zeros(2, 4, 6).bfloat16()}, "one dtype"),
        ({"activation": "relu"}, "'gate', 'glu', 'none'"),
    ],
)
def test_what_does_not_fit_is_refused(change, told):
    given = {"x": torch.zeros(1, 2, 2, 2, 4), "weight": torch.zeros(2, 4, 6), "bias": None,
             "taps": ((0, 0, -1), (0, 0, 0))}  # fmt: skip
    with pytest.raises(ValueError, match=told):
        ops.gated_causal_conv(**given | change)


def test_a_gradient_needs_something_to_start_from():
    x, weight = torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="both"):
        ops.gated_causal_conv_backward(x, weight, None, None, None, [0, 0, 0], "gate", [0, 0, 0], [True] * 4)
    with pytest.raises(ValueError, match="needs `pre`"):
        ops.gated_causal_conv_backward(x, weight, None, x, None, [0, 0, 0], "gate", [0, 0, 0], [True] * 4)


def test_gate():
    pre = torch.randn(3, 10)
    expected = torch.tanh(pre[:, :5].double()) * torch.sigmoid(pre[:, 5:].double())
    torch.testing.assert_close(ops.gate(pre).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ops.gate(pre, "glu"), F.glu(pre))
    with pytest.raises(ValueError, match="even"):
        ops.gate(torch.zeros(3, 5))
