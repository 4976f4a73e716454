"""The Triton kernels of axial_attention: on the GPU, or in Triton's interpreter where there is none."""

import pytest
import torch
from fastvid.kernels.axial_attention import cases, reference

pytest.importorskip("triton", reason="Triton is not installed")

from fastvid.kernels.axial_attention import (  # noqa: E402
    triton_configs,
    triton_gpu,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Case = cases.Case
# the interpreter computes by numpy, which speaks of the logarithm of an empty sum
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")


@pytest.fixture
def device(device):
    if device.type == "cpu" and not triton_gpu.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is not set: Triton's kernels run on the CUDA device of this machine")
    return device


def flat(args: tuple) -> tuple:
    """A case's arguments as backends see them; a bias keeps its dtype."""
    q, k, v, _, box, mask, bias, _, keep = args
    return q, k, v, bias, [*box], mask, q.shape[-1] ** -0.5, keep


def judged(case: Case, device, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    args = case.make(device, dtype)
    result = triton_gpu.axial_attention(*flat(args))
    cases.judge(args, result)
    return result


def judged_backward(case: Case, device, dtype=torch.float32) -> None:
    args = case.make_backward(device, dtype)
    cases.judge_backward(args, triton_gpu.axial_attention_backward(*args))


def same_bits(a: tuple, b: tuple) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def alike(a: tuple, b: tuple, device) -> None:
    """The same bits; in the interpreter nearly, whose products, numpy's, depend on where in a tile a row stands."""
    if device.type == "cuda":
        assert same_bits(a, b)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


def kinds_of(case: Case, gradient: bool, dtype=torch.float32) -> list[str]:
    q, k, v, _, box, _, bias, _, _ = case.make("cpu", dtype)
    return [kind for kind, _, _ in triton_gpu.tunable(q, k, v, bias, [*box], gradient)]


# ---- boxes in one tile


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", reference.MASKS)
def test_masks_and_dtypes(mask, dtype, device):
    case = Case("lines", (1, 2, 3, 2), 2, 4, (1, 3, 1), mask, D=6, bias=dtype == torch.bfloat16)
    assert kinds_of(case, False, dtype) == ["tile"] and kinds_of(case, True, dtype)[0] == "box"
    judged(case, device, dtype)
    judged_backward(case, device, dtype)


@pytest.mark.parametrize("name", ["one-position", "step"])
def test_named_sizes(name, device):
    case = next(case for case in cases.ALL if case.name == name)
    judged(case, device)
    judged_backward(case, device)


@pytest.mark.parametrize(
    "case",
    [
        Case("pooled", (1, 2, 6, 2), 1, 3, (1, 6, 1), "causal", D=12, keys=(2, 3, 2)),
        Case("more-keys", (2, 1, 2, 3), 2, 4, (1, 2, 1), "strict", keys=(1, 7, 3)),
        Case("fewer-keys", (1, 4, 2, 4), 1, 2, (2, 2, 2), "causal", keys=(2, 2, 2), bias=True),
        Case("wide", (1, 1, 1, 5), 1, 40, (1, 1, 5), D=140),  # heads in steps, values in several tiles
        Case("three-tiles", (1, 1, 1, 70), 1, 2, (1, 1, 70), keys=(1, 1, 9)),
    ],
    ids=str,
)
def test_sizes(case, device):
    judged(case, device)
    judged_backward(case, device)


def test_fused_views_give_the_bits_of_separate_tensors(device):
    for axis, box in ((0, [4, 1, 1]), (1, [1, 3, 1]), (2, [1, 1, 2])):
        qkv = torch.randn(1, 4, 3, 2, 3, 2, 5, device=device)
        whole = triton_gpu.axial_attention(qkv, None, None, None, box, "causal", 0.5, True)
        parts = [part.contiguous() for part in qkv.unbind(-3)]
        assert same_bits(whole, triton_gpu.axial_attention(*parts, None, box, "causal", 0.5, True)), axis
    grad_out = torch.randn(1, 4, 3, 2, 2, 5, device=device)
    after = (None, *whole, grad_out, None, box, "causal", 0.5)
    grad, *none = triton_gpu.axial_attention_backward(qkv, None, None, *after, [True, False, False, False])
    apart = triton_gpu.axial_attention_backward(*parts, *after, [True] * 3 + [False])
    assert grad.shape == qkv.shape and same_bits(grad.unbind(-3), apart[:3])
    assert [t.shape for t in none] == [(0,)] * 3


def test_any_strides(device):
    q, k, v, bias, *rest = flat(Case("", (2, 2, 2, 3), 2, 4, (2, 1, 3), D=6, bias=True).make(device))
    dense = triton_gpu.axial_attention(q, k, v, bias, *rest)
    first = lambda t: t.movedim(-1, 1).contiguous().movedim(1, -1)  # noqa: E731
    one = bias[:1, :1].expand_as(bias)
    assert same_bits(dense, triton_gpu.axial_attention(first(q), first(k), first(v), first(bias), *rest))
    spread, copied = (triton_gpu.axial_attention(q, k, v, b, *rest) for b in (one, one.contiguous()))
    assert same_bits(spread, copied)


def test_lines_whose_axes_do_not_fold(device):
    # neither samples and frames nor frames and rows are one after the other: lines go as boxes do, to the same bits
    large = torch.randn(2, 3, 5, 2, 3, 1, 4, device=device)
    qkv = large[:, :2, :3]
    tables = [triton_configs.strides(t.stride(), (0, 1, 2)) for t in qkv.unbind(-3)]
    cut = triton_configs.cut((2, 3, 2), (2, 3, 2), (1, 1, 2))
    assert not triton_configs.folded(cut, 2, tables)[0].line and triton_configs.folded(cut, 1, tables)[0].line
    rest = None, [1, 1, 2], "none", 1.0, True
    loose, dense = (triton_gpu.axial_attention(t, None, None, *rest) for t in (qkv, qkv.contiguous()))
    assert same_bits(loose, dense)


# ---- long boxes


@pytest.mark.parametrize(
    "case",
    [
        Case("line", (1, 1, 1, 35), 1, 66, (1, 1, 35), "causal", D=3),
        Case("box", (1, 3, 2, 6), 1, 4, (3, 2, 6), "strict", bias=True),
        Case("more-keys", (1, 1, 1, 5), 1, 66, (1, 1, 5), keys=(1, 1, 35)),
    ],
    ids=str,
)
def test_long_boxes(case, device):
    assert kinds_of(case, True)[:2] == ["queries", "keys"]
    assert kinds_of(case, False) == ["tile" if case.name == "box" else "long"]
    judged(case, device)
    judged_backward(case, device)


@pytest.mark.parametrize(
    "case",
    [
        Case("step", (1, 1, 1, 1), 1, 4, (1, 1, 1), "causal", keys=(1, 1, 300)),
        # the last chunk holds one key, which is hidden from all but the last query, and that from all with "strict"
        Case("few", (1, 1, 1, 3), 1, 4, (1, 1, 3), "strict", keys=(257, 1, 1), D=140),
    ],
    ids=str,
)
def test_split_keys(case, device):
    assert kinds_of(case, False) == ["split"]
    judged(case, device, torch.bfloat16)


def test_a_step_is_the_same_in_any_batch(device):
    # the order of summation is that of the keys, whatever else there is to do
    case = Case("", (2, 1, 1, 1), 1, 4, (1, 1, 1), keys=(1, 1, 258))
    q, k, v, *rest = flat(case.make(device, torch.bfloat16))
    whole = triton_gpu.axial_attention(q, k, v, *rest)
    one = triton_gpu.axial_attention(*(t[1:] for t in (q, k, v)), *rest)
    assert same_bits(one, tuple(t[1:] for t in whole))


# ---- what is seen


def test_a_query_that_sees_nothing_gives_zero(device):
    q, k, v, bias, *rest = flat(Case("", (1, 1, 2, 3), 1, 4, (1, 1, 3), "strict", bias=True).make(device))
    bias[0, 2] = float("-inf")
    out, lse = triton_gpu.axial_attention(q, k, v, bias, *rest)
    assert not out[..., 0, :, :].any() and not out[..., 2, :, :].any() and out[..., 1, :, :].all()
    assert (lse == float("-inf")).flatten(0, 2).tolist() == [[[True], [False], [True]]] * 2
    given = torch.randn_like(out), torch.randn_like(lse)
    grads = triton_gpu.axial_attention_backward(q, k, v, bias, out, lse, *given, *rest[:-1], [True] * 4)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][..., 0, :, :].any() and not grads[0][..., 2, :, :].any() and not grads[3][0, 2].any()


@pytest.mark.parametrize("length", [5, 70])
def test_no_query_sees_what_its_mask_hides(length, device):
    q, k, v, *rest = flat(Case("", (1, 1, 1, length), 1, 4, (1, 1, length), "causal").make(device))
    before = triton_gpu.axial_attention(q, k, v, *rest)
    place = length // 2
    k[:, :, :, place:] += 1
    v[:, :, :, place:] += 1
    after = triton_gpu.axial_attention(q, k, v, *rest)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[:, :, :, :place], other[:, :, :, :place])
        assert (one[:, :, :, place:] != other[:, :, :, place:]).all()


def test_lines_in_another_order_give_the_same(device):
    q, k, v, *rest = flat(Case("", (2, 1, 3, 3), 2, 4, (1, 1, 3)).make(device))
    whole = triton_gpu.axial_attention(q, k, v, *rest)
    order = torch.tensor([2, 0, 1], device=device)
    turned = triton_gpu.axial_attention(*(t[:, :, order] for t in (q, k, v)), *rest)
    alike(turned, tuple(t[:, :, order] for t in whole), device)


@pytest.mark.parametrize("scale", [0.0, 1e4, 1e-12])
def test_tiny_and_huge_scores(scale, device):
    q, k, v, _, *rest, _, _ = flat(Case("", (1, 1, 1, 4), 1, 4, (1, 1, 4)).make(device))
    result = triton_gpu.axial_attention(q, k, v, None, *rest, scale, True)
    exact, peer = (
        reference.axial_attention(*(t.to(dtype) for t in (q, k, v)), None, *rest, scale, True)
        for dtype in (torch.float64, torch.float32)
    )
    cases._judge_each(("out", "lse"), result, exact, peer)


# ---- gradients


@pytest.mark.parametrize("length, asked", [(3, range(4)), (35, [1])])
def test_gradients_that_are_not_wanted_are_empty(length, asked, device):
    case = Case("", (1, 1, 1, length), 1, 4, (1, 1, length), bias=length == 3)
    args = case.make_backward(device)
    every = triton_gpu.axial_attention_backward(*args)
    for i in asked:
        some = triton_gpu.axial_attention_backward(*args[:-1], [i == j for j in range(4)])
        assert [t.numel() > 0 for t in some] == [i == j for j in range(4)]
        assert torch.equal(some[i], every[i])


@pytest.mark.parametrize("length", [3, 35])
def test_a_gradient_of_either_output(length, device):
    case = Case("", (1, 1, 1, length), 1, 4, (1, 1, length), "causal", bias=length == 3)
    q, k, v, bias, out, lse, grad_out, _, *rest = case.make_backward(device)
    grad_lse, ones = torch.randn_like(lse[..., :1]).expand_as(lse), torch.ones((), device=device).expand_as(grad_out)
    for given in ((None, grad_lse), (ones, None)):
        args = q, k, v, bias, out, lse, *given, *rest
        cases.judge_backward(args, triton_gpu.axial_attention_backward(*args))


def test_the_bias_gradient_in_several_chunks(monkeypatch, device):
    case = Case("", (2, 3, 5, 2), 1, 4, (1, 1, 2), bias=True)
    monkeypatch.setattr(triton_configs, "LEAST_STEPS", 1)
    assert triton_configs.chunk_of(16, 30, 1, 4) == 16  # two chunks
    judged_backward(case, device)


def test_same_bits_every_time(device):
    case = Case("", (2, 2, 2, 3), 2, 4, (2, 1, 3), "causal", bias=True)
    args = flat(case.make(device))
    assert same_bits(*(triton_gpu.axial_attention(*args) for _ in range(2)))
    args = case.make_backward(device)
    assert same_bits(*(triton_gpu.axial_attention_backward(*args) for _ in range(2)))


@pytest.mark.parametrize("case", [cases.EMPTY], ids=str)
def test_nothing_to_do(case, device):
    args = flat(case.make(device))
    for ours, theirs in zip(triton_gpu.axial_attention(*args), reference.axial_attention(*args), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    bare = triton_gpu.axial_attention(*args[:-1], False)
    assert bare[1].shape == (0,)
    grads = triton_gpu.axial_attention_backward(*case.make_backward(device))
    assert [t.shape for t in grads] == [t.shape for t in args[:3]] + [(0,)]


# ---- sizes that need more


def test_offsets_are_64_bits_wide(device):
    # rows 2**30 elements apart: only those that are read exist
    if device.type == "cpu":
        pytest.skip("a tensor over 8 GiB of address space is for a GPU")
    x = torch.empty(2**32, dtype=torch.bfloat16, device=device).as_strided((1, 1, 1, 4, 1, 16), (0, 0, 0, 2**30, 16, 1))
    x.copy_(torch.randn(x.shape))
    rest = None, [1, 1, 4], "none", 0.25, True
    spread, packed = (triton_gpu.axial_attention(t, t, t, *rest) for t in (x, x.contiguous()))
    assert same_bits(spread, packed)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case("tile", (1, 1, 2, 3), 1, 4, (1, 1, 3)),
        Case("long", (1, 1, 1, 130), 1, 4, (1, 1, 130)),
        Case("split", (1, 1, 1, 1), 1, 4, (1, 1, 1), keys=(1, 1, 270)),
    ],
    ids=str,
)
def test_configs(case, dtype, device):
    args = case.make(device, dtype)
    q, k, v, bias, box, *_ = flat(args)
    ((_, _, fits),) = triton_gpu.tunable(q, k, v, bias, box, False)
    for config in fits:
        cases.judge(args, triton_gpu.axial_attention(*flat(args), config))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*cases.ALL, *cases.LARGE], ids=str)
def test_real_sizes(case, dtype):
    judged(case, torch.device("cuda"), dtype)
    judged_backward(case, torch.device("cuda"), dtype)
