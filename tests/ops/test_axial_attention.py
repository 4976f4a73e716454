"""Attention inside boxes against a dense masked softmax over the whole grid, and what only the op itself promises."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from fastvid.kernels.axial_attention import cases, reference

import fastvid
from fastvid import ops
from fastvid.testing import assert_within_yardstick

SAME_GRID = [case for case in cases.ALL if case.keys is None]
SERVING = [b.name for b in ops.axial_attention.backends if b.name != "triton"]  # its own tests hold it to these


def dense(q, k, v, case, bias):
    """One softmax over all positions of the grid behind an N x N mask made of loops over boxes."""
    (B, *grid), A = case.grid, case.heads
    N = grid[0] * grid[1] * grid[2]
    mask, place = torch.zeros(N, N, dtype=torch.bool), {}
    for n, p in enumerate(itertools.product(*map(range, grid))):
        cell = tuple(c // b for c, b in zip(p, case.box, strict=True))
        place[n] = cell, sum(1 for other, _ in place.values() if other == cell)
    added = q.new_zeros(A, N, N)
    for i, j in itertools.product(range(N), repeat=2):
        (cell, query), (other, key) = place[i], place[j]
        sees = {"none": True, "causal": key <= query, "strict": key < query}[case.mask]
        mask[i, j] = cell == other and sees
        if bias is not None and cell == other:
            added[:, i, j] = bias[:, query, key]
    q, k, v = (x.reshape(B, N, A, -1).transpose(1, 2) for x in (q, k, v))  # [B, A, N, E] each
    scores = (q @ k.mT * q.shape[-1] ** -0.5 + added).masked_fill(~mask, float("-inf"))
    weights = torch.where(mask.any(-1, keepdim=True), scores, 0.0).softmax(-1) * mask.any(-1, keepdim=True)
    return (weights @ v).transpose(1, 2).reshape(B, *grid, A, -1)


def differentiable(args, dtype=None):
    return [a.detach().to(dtype or a.dtype).requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize("case", [case for case in SAME_GRID if case.name != "rows"], ids=str)
def test_equals_dense_masked_attention(case):
    args = case.make()
    q, k, v = reference.unpacked(*args[:3])
    results, gradients = [], []
    for ours, dtype in ((True, torch.float32), (False, torch.float64), (False, torch.float32), (True, torch.float64)):
        given = differentiable([q, k, v, *args[6:7]], dtype)
        out = (
            ops.axial_attention(*given[:3], box=case.box, mask=case.mask, bias=given[3]).out if ours
            else dense(*given[:3], case, given[3])
        )  # fmt: skip
        results.append(out)
        if dtype == torch.float64:
            upstream = torch.linspace(-1, 2, out.numel(), dtype=dtype).view(out.shape)
            gradients.append(torch.autograd.grad(out, [x for x in given if x is not None], upstream))
    assert_within_yardstick(*results[:3])
    # the gradients are those of the definition, which the laws hold the kernels to
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mask", reference.MASKS)
def test_gradcheck(mask):
    case = cases.Case("", (2, 2, 2, 3), 2, 3, (1, 2, 3), mask, D=4, bias=True, keys=(2, 2, 6))
    q, k, v, _, box, _, bias, *_ = case.make(dtype=torch.float64)

    def both(q, k, v, bias):
        done = ops.axial_attention(q, k, v, box=box, mask=mask, bias=bias, keep=True)
        return done.out, done.lse.clamp_min(-50.0)  # a query that sees nothing has -inf

    given = differentiable((q, k, v, bias.double()))
    assert torch.autograd.gradcheck(both, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(both, given, fast_mode=True)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_fused_tensor_is_its_three_parts(axis):
    fused, = differentiable([torch.randn(2, 3, 4, 5, 3, 2, 8)])
    parts = differentiable(fused.unbind(-3))
    whole = ops.axial_attention(fused, axis=axis, mask="causal").out
    apart = ops.axial_attention(*parts, axis=axis, mask="causal").out
    upstream = torch.randn_like(whole)
    whole.backward(upstream)
    apart.backward(upstream)
    assert torch.equal(whole, apart)
    assert torch.equal(fused.grad, torch.stack([part.grad for part in parts], -3))


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("mask", ["causal", "strict"])
def test_what_is_ahead_never_touches_what_is_behind(backend, mask):
    qkv = torch.randn(2, 3, 4, 11, 3, 2, 8)
    for box in ((1, 1, 11), (3, 1, 1), (1, 4, 11), (3, 2, 1)):
        before = ops.axial_attention(qkv, box=box, mask=mask, backend=backend).out
        changed, where = qkv.clone(), (1, 2, 7)
        changed[(0, *where)] += 1
        after = ops.axial_attention(changed, box=box, mask=mask, backend=backend).out
        reached = {tuple(p) for p in (before != after).flatten(4).any(-1).nonzero().tolist()}
        cell = tuple(c // b for c, b in zip(where, box, strict=True))
        inside = {(0, *p) for p in itertools.product(range(3), range(4), range(11))
                  if p >= where and tuple(c // b for c, b in zip(p, box, strict=True)) == cell}  # fmt: skip
        # queries of its own it has too, unless it sees nothing that its key could be weighed against
        assert reached <= inside and inside - reached <= {(0, *where)}


@pytest.mark.parametrize("backend", SERVING)
def test_permuted_lines_give_permuted_results(backend):
    qkv, order, rows = torch.randn(3, 4, 9, 6, 3, 2, 16), torch.randperm(6), torch.randperm(9)
    done = ops.axial_attention(qkv, axis=1, mask="causal", keep=True, backend=backend)
    again = ops.axial_attention(qkv[:, :, rows][:, :, :, order], axis=1, mask="causal", keep=True, backend=backend)
    for whole, permuted in zip(done, again, strict=True):
        assert torch.equal(whole[:, :, rows][:, :, :, order], permuted)
    alone = ops.axial_attention(qkv[1:2, :, 3:4], axis=1, mask="causal", backend=backend).out
    assert torch.equal(alone, done.out[1:2, :, 3:4])


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_stacked_steps_equal_the_whole(backend, axis):
    q, k, v = torch.randn(3, 2, 5, 6, 7, 2, 8).double().unbind(0)
    dtype = torch.float64 if backend == "reference" else torch.float32
    q, k, v = (x.to(dtype) for x in (q, k, v))
    whole = ops.axial_attention(q, k, v, axis=axis, mask="causal", backend=backend).out
    for t in range(q.shape[axis]):
        new, seen = [x.narrow(axis, t, 1) for x in (q, whole)], [x.narrow(axis, 0, t + 1) for x in (k, v)]
        step = ops.axial_attention(new[0], *seen, axis=axis, mask="causal", backend=backend).out
        torch.testing.assert_close(step, new[1])


def test_raster_order_is_plain_causal_attention():
    q, k, v = torch.randn(3, 2, 1, 1, 60, 4, 16).unbind(0)
    heads = [x[:, 0, 0].transpose(1, 2) for x in (q, k, v)]
    exact, peer = (
        F.scaled_dot_product_attention(*(x.to(dtype) for x in heads), is_causal=True).transpose(1, 2)[:, None, None]
        for dtype in (torch.float64, torch.float32)
    )
    assert_within_yardstick(ops.axial_attention(q, k, v, axis=3, mask="causal").out, exact, peer)


def test_logsumexps_join_attention_to_several_sets_of_keys():
    q, k, v = torch.randn(3, 1, 1, 4, 6, 2, 8, dtype=torch.float64).unbind(0)
    whole = ops.axial_attention(q, k, v, box=(1, 4, 6)).out
    keys = [(k[:, :, :, part], v[:, :, :, part]) for part in (slice(2), slice(2, 6))]
    parts = [ops.axial_attention(q, *kept, box=(1, 4, 6), keep=True) for kept in keys]
    shares = torch.stack([part.lse for part in parts]).softmax(0)[..., None]
    joined = sum(share * part.out for share, part in zip(shares, parts, strict=True))
    torch.testing.assert_close(joined, whole, rtol=1e-9, atol=1e-12)


def test_relative_bias_depends_on_distance_alone():
    box = (2, 3, 4)
    tables = differentiable([torch.randn(5, 2 * b - 1) for b in box])
    bias = ops.relative_bias(tables, box)
    places = [*itertools.product(*map(range, box))]
    for i, j in [(0, 23), (23, 0), (7, 14), (9, 9)]:
        away = [q - p + b - 1 for p, q, b in zip(places[i], places[j], box, strict=True)]
        expected = sum(table[:, d] for table, d in zip(tables, away, strict=True))
        torch.testing.assert_close(bias[:, i, j], expected)
    bias.sum().backward()
    assert [int(table.grad[0].sum()) for table in tables] == [24 * 24] * 3
    along = ops.relative_bias((None, tables[1], None), (1, 3, 1))
    assert along.shape == (5, 3, 3) and torch.equal(along[:, 2, 0], tables[1][:, 0])


def step(qkv, bias):
    done = ops.axial_attention(qkv, box=(1, 2, 5), mask="causal", bias=bias, keep=True)
    return done.out.square().sum() + done.lse.sin().sum()


def test_compiles_whole_and_trains_alike():
    args = torch.randn(2, 3, 4, 5, 3, 2, 8), torch.randn(2, 10, 10)
    given, other = differentiable(args), differentiable(args)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(step(*given), compiled(*other), rtol=0, atol=0)
        step(*given).backward()
        compiled(*other).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(given, other, strict=True))


def test_one_graph_for_every_grid():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: ops.axial_attention(x, axis=2, mask="causal").out, fullgraph=True, backend=count, dynamic=True
    )
    for height, width in ((7, 11), (6, 13), (5, 17)):  # none that another axis has too, which would be taken for it
        x = torch.randn(2, 4, height, width, 3, 2, 8)
        assert torch.equal(compiled(x), ops.axial_attention(x, axis=2, mask="causal").out)
    assert len(graphs) == 1


def test_autocast_keeps_statistics_in_full():
    for dtype in (torch.bfloat16, torch.float16):
        given = differentiable([torch.randn(1, 2, 3, 8, 2, 16) * 4 for _ in range(3)])
        with torch.autocast("cpu", dtype=dtype):
            done = ops.axial_attention(*given, axis=3, mask="causal")
        assert (done.out.dtype, done.lse.dtype) == (dtype, torch.float32)
        exact = ops.axial_attention(*(x.detach().to(dtype).double() for x in given), axis=3, mask="causal", keep=True)
        torch.testing.assert_close(done.lse.double(), exact.lse, rtol=1e-5, atol=1e-4)
        done.out.float().square().sum().backward()
        assert {tensor.grad.dtype for tensor in given} == {torch.float32}


def test_the_gradient_is_served_by_who_served_the_forward():
    given = differentiable((torch.randn(1, 2, 3, 10, 3, 2, 8)[:, :, :2, :5].contiguous(), torch.randn(2, 10, 10)))
    with fastvid.backend("reference"):
        loss = step(*given)
    with ops.served() as record:
        loss.backward()
    assert record == {"axial_attention_backward": "reference"}


def test_self_attention_is_its_parts():
    x, projections, axes, heads, mask, bias, _ = cases.PROJECTED[1].make(dtype=torch.float64)
    expected = bias
    for (to_q, to_k, to_v, to_out), axis in zip(projections, axes, strict=True):
        q, k, v = (F.linear(x, weight).unflatten(-1, (heads, -1)) for weight in (to_q, to_k, to_v))
        attended = ops.axial_attention(q, k, v, axis=axis, mask=mask).out
        expected = expected + F.linear(attended.flatten(-2), to_out)
    found = ops.axial_self_attention(x, projections, axes, heads, mask, bias)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    projections[2][3].requires_grad_()
    with pytest.raises(fastvid.errors.UsageError, match="no gradient"):
        ops.axial_self_attention(x, projections, axes, heads, mask, bias)
    with torch.no_grad():
        assert torch.equal(ops.axial_self_attention(x, projections, axes, heads, mask, bias), found)


def zeros(*shape, **kind):
    return torch.zeros(shape, **kind)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"mask": "future"}, "'none', 'causal', 'strict'"),
        ({"axis": 4}, "`axis` must be 1"),
        ({"axis": None}, r"`box` must be \(bt, bh, bw\)"),
        ({"axis": 3, "box": (1, 1, 2)}, "with it a number"),
        ({"axis": 3, "box": 3}, r"divide into boxes \(1, 1, 3\)"),
        ({"axis": None, "box": (2, 2, 0)}, "divide into boxes"),
        ({"k": zeros(1, 2, 2, 4, 2, 5)}, "are wanted, got"),
        ({"k": None, "v": None}, r"\[B, T, H, W, 3, A, E\]"),
        ({"v": None}, "floating q, k and v"),
        ({"k": zeros(1, 3, 2, 4, 2, 8), "v": zeros(1, 3, 2, 4, 2, 8)}, "divide into .2, 2, 1. boxes"),
        ({"bias": zeros(2, 4, 3)}, r"`bias` must be \[2, 4, 4\]"),
        ({"k": zeros(1, 2, 2, 4, 2, 8, dtype=torch.bfloat16)}, "one dtype"),
    ],
)
def test_what_does_not_fit_is_refused(change, told):
    given = {name: zeros(1, 2, 2, 4, 2, 8) for name in "qkv"} | {"axis": 3}
    with pytest.raises(ValueError, match=told):
        ops.axial_attention(**given | change)


def test_other_refusals():
    q = zeros(1, 1, 1, 2, 1, 2)
    with pytest.raises(ValueError, match="both"):
        ops.axial_attention_backward(q, q, q, None, q, q[..., 0], None, None, [1, 1, 2], "none", 1.0, [True] * 4)
    with pytest.raises(ValueError, match="three tables"):
        ops.relative_bias((None, None, None), (1, 1, 1))
    with pytest.raises(ValueError, match=r"takes a table \[A, 5\]"):
        ops.relative_bias((None, zeros(2, 4), None), (1, 3, 1))
    x, four = zeros(1, 2, 3, 4, 6), tuple(zeros(6, 6) for _ in range(4))
    for given, told in (
        ((x, [four], [1, 2], 2), "an axis for each"), ((x, [four], [1], 4), "with 4 heads"),
        ((x, [four], [(2, 2, 2)], 2), "divide"), ((x.double(), [four], [1], 2), "one dtype"),
        ((x, [four], [1], 2, "past"), "'causal'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            ops.axial_self_attention(*given)
