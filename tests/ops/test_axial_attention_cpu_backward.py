"""The native gradients of attention inside boxes: against float64, and the same bits whatever the threads."""

from random import Random

import pytest
import torch
from fastvid.kernels.axial_attention import cases, reference
from torch import Tensor

from fastvid import _native
from fastvid.ops import _cpu_attention
from fastvid.testing import assert_within_yardstick, poisoned_memory

pytestmark = pytest.mark.skipif(
    _native.load() is None, reason=f"needs the native library, which is not there: {_native.why_not()}"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FIELDS = ("q", "k", "v", "bias", "out", "lse", "grad_out", "grad_lse", "box", "mask", "scale", "wanted")
NAMES = ("grad_q", "grad_k", "grad_v", "grad_bias")
TILES = cases.Case("tiles-both-ways", (1, 1, 1, 150), 2, 24, (1, 1, 150), "strict", D=20, bias=True, keys=(1, 1, 130))
CASES = [
    *cases.ALL,
    TILES,
    cases.Case("more-queries-than-keys", (1, 1, 1, 140), 1, 8, (1, 1, 140), "causal", keys=(1, 1, 70)),
    cases.Case("keys-that-nobody-sees", (1, 1, 2, 3), 1, 8, (1, 1, 3), "strict", keys=(1, 2, 90)),
    cases.Case("no-keys", (1, 1, 3, 4), 2, 8, (1, 1, 4), keys=(1, 3, 0)),
    cases.Case("chunks-of-boxes", (2, 3, 7, 4), 3, 16, (1, 1, 4), "causal", bias=True),
    cases.Case("one-chunk", (2, 1, 1, 4), 1, 1, (1, 1, 4), bias=True),
]


def make(case, dtype=torch.float32, **changes) -> dict:
    """Arguments of a case by name, some of them others."""
    return dict(zip(FIELDS, case.make_backward(dtype=dtype), strict=True)) | changes


def differentiate(args: dict) -> tuple[Tensor, ...]:
    given = tuple(args[name] for name in FIELDS)
    assert _cpu_attention.why_not_backward(*given) is None
    with poisoned_memory():
        return _cpu_attention.axial_attention_backward(*given)


def judge(args: dict) -> None:
    found, given = differentiate(args), tuple(args[name] for name in FIELDS)
    wide = (a.double() if isinstance(a, Tensor) else a for a in given)
    exact, peer = reference.axial_attention_backward(*wide), reference.axial_attention_backward(*given)
    for name, ours, true, same in zip(NAMES, found, exact, peer, strict=True):
        try:
            assert_within_yardstick(ours, true, same)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        assert ours.is_contiguous(), name


def assert_same_bits(ours: tuple, others: tuple) -> None:
    for name, a, b in zip(NAMES[: len(ours)], ours, others, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), name


@pytest.fixture
def threads():
    """A function that sets torch's thread count, which the kernel follows; set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, dtype, level):
    judge(make(case, dtype))


def test_drawn_calls(level):
    random = Random(int(torch.randint(1 << 30, ())))
    for _ in range(40):
        args = make(cases.drawn(random), random.choice(DTYPES))
        if random.random() < 0.3:
            args["grad_lse"] = torch.randn_like(args["lse"])
            args["grad_out"] = random.choice([args["grad_out"], None])
        judge(args)


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
@pytest.mark.parametrize("case", [TILES, cases.ALL[5]], ids=str)
def test_one_gradient_alone(case, wanted):
    args = make(case)
    every = differentiate(args)
    alone = differentiate(args | {"wanted": [i == wanted for i in range(4)]})
    for i, (ours, all_of_them) in enumerate(zip(alone, every, strict=True)):
        assert torch.equal(ours, all_of_them) if i == wanted else ours.shape == (0,)


@pytest.mark.parametrize("case", [TILES, cases.ALL[5], cases.ALL[7]], ids=str)
def test_only_the_statistics_have_a_gradient(case, level):
    args = make(case, grad_out=None)
    judge(args | {"grad_lse": torch.randn_like(args["lse"])})


@pytest.mark.parametrize("case", [TILES, *CASES[-2:], cases.ALL[7]], ids=str)
def test_threads_agree_to_the_last_bit(case, threads):
    args = make(case)
    threads(1)
    alone = differentiate(args)
    for count in (2, 3, 7):
        threads(count)
        assert_same_bits(differentiate(args), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_agree_to_the_last_bit(dtype):
    args = make(TILES, dtype)
    plain = differentiate(args)
    inputs = ("q", "k", "v", "out", "grad_out")
    first = lambda tensor: tensor.movedim(-1, 1).contiguous().movedim(1, -1)  # noqa: E731
    apart = lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0]  # noqa: E731
    for layout in (first, apart):
        bias = args["bias"].mT.contiguous().mT
        assert_same_bits(differentiate(args | {name: layout(args[name]) for name in inputs} | {"bias": bias}), plain)
    same = args["grad_out"][:, :, :, :1, :, :1].expand_as(args["grad_out"])
    assert_same_bits(*(differentiate(args | {"grad_out": grad}) for grad in (same, same.contiguous())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision_is_rounded_once(dtype):
    args = make(TILES, dtype)
    wide = {name: a.float() if isinstance(a, Tensor) else a for name, a in args.items()}
    for name, ours, exact in zip(NAMES, differentiate(args), differentiate(wide), strict=True):
        assert torch.equal(ours, exact.to(ours.dtype)), name


def test_a_fused_tensor_is_as_three(level):
    args = make(next(case for case in cases.ALL if case.name == "columns"))
    q, k, v = reference.unpacked(args["q"], None, None)
    apart = differentiate(args | {"q": q, "k": k, "v": v, "wanted": [True] * 3 + [False]})
    fused = differentiate(args)
    assert_same_bits(reference.unpacked(fused[0], None, None), apart[:3])
    assert all(grad.shape == (0,) for grad in fused[1:])


def test_a_box_depends_on_itself_alone(level, threads):
    threads(2)
    args = make(cases.Case("lines", (2, 1, 9, 17), 3, 20, (1, 1, 17), "causal"))
    whole, order = differentiate(args), torch.randperm(9)
    moved = {name: a[:, :, order] if isinstance(a, Tensor) else a for name, a in args.items()}
    assert_same_bits(differentiate(moved)[:3], tuple(grad[:, :, order] for grad in whole[:3]))
    args["q"][0, 0, 4] = float("nan")
    touched = differentiate(args)
    for ours, before in zip(touched[:3], whole[:3], strict=True):
        assert ours[0, 0, 4].isnan().all()
        ours[0, 0, 4] = before[0, 0, 4]
    assert_same_bits(touched, whole)


@pytest.mark.parametrize("mask, reach", [("causal", 40), ("strict", 41)])
def test_what_is_not_seen_has_no_influence(mask, reach, level):
    args = make(cases.Case("line", (1, 1, 1, 100), 2, 8, (1, 1, 100), mask))
    before = differentiate(args)
    args["k"][:, :, :, 40:] += 1.0
    args["v"][:, :, :, 40:] -= 1.0
    after = differentiate(args)
    assert torch.equal(after[0][:, :, :, :reach], before[0][:, :, :, :reach])
    assert not torch.equal(after[0][:, :, :, reach], before[0][:, :, :, reach])


def test_large_scores_and_hidden_rows(level):
    args = make(cases.Case("line", (1, 1, 2, 9), 2, 8, (1, 1, 9), bias=True))
    args["bias"][0, 3], args["bias"][1, :, 4] = float("-inf"), float("-inf")
    args["q"] *= 40
    given = (args["q"], args["k"], args["v"], args["bias"], args["box"], "none", args["scale"], True)
    args["out"], args["lse"] = _cpu_attention.axial_attention(*given)
    assert (args["lse"][:, :, :, 3, 0] == float("-inf")).all()
    judge(args)
    grad_q, grad_k, grad_v, grad_bias = differentiate(args)
    assert not grad_q[:, :, :, 3, 0].any() and not grad_bias[0, 3].any()
    assert not grad_k[:, :, :, 4, 1].any() and not grad_v[:, :, :, 4, 1].any()


def test_nothing_to_sum():
    args = make(cases.EMPTY, bias=torch.randn(2, 4, 4), wanted=[True] * 4)
    found = differentiate(args)
    assert [grad.shape for grad in found[:3]] == [args[name].shape for name in "qkv"] and not found[3].any()


def test_autograd_of_the_op_agrees():
    args = make(cases.ALL[5])
    inputs, settled = [args[name] for name in ("q", "k", "v", "bias")], (args["box"], args["mask"], args["scale"], True)
    weights = [torch.randn_like(args[name]) for name in ("out", "lse")]

    def gradients(attention, dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        return torch.autograd.grad(attention(*leaves, *settled), leaves, [weight.to(dtype) for weight in weights])

    found = gradients(torch.ops.fastvid.axial_attention, torch.float32)
    exact, peer = (gradients(reference.axial_attention, dtype) for dtype in (torch.float64, torch.float32))
    for ours, true, same in zip(found, exact, peer, strict=True):
        assert_within_yardstick(ours, true, same)
