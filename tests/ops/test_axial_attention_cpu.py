"""Native attention inside boxes: against float64, and the same bits whatever is evaluated beside a query."""

import itertools
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
CASES = [
    *cases.ALL,
    cases.Case("two-frames", (2, 2, 3, 5), 3, 16, (2, 1, 1), "causal", bias=True),
    cases.Case("one-key", (1, 1, 3, 7), 5, 8, (1, 1, 7), keys=(1, 3, 1)),
    cases.Case("no-keys", (1, 1, 3, 4), 2, 8, (1, 1, 4), keys=(1, 3, 0)),
    cases.Case("chunks-of-keys", (1, 1, 1, 40), 1, 24, (1, 1, 40), "causal", D=20, keys=(1, 1, 600)),
    cases.Case("blocks-of-queries", (1, 1, 1, 290), 1, 16, (1, 1, 290), "strict", bias=True),
    cases.Case("more-queries-than-keys", (1, 1, 1, 310), 1, 8, (1, 1, 310), "causal", keys=(1, 1, 270)),
    cases.Case("two-queries", (1, 1, 2, 2), 2, 19, (1, 1, 2), "causal", D=32, keys=(1, 2, 530), bias=True),
]


def attend(q, k=None, v=None, bias=None, box=(1, 1, 1), mask="none", scale=None, keep=True) -> tuple[Tensor, Tensor]:
    """The launcher on arguments of the op."""
    given = (q, k, v, bias, [*box], mask, q.shape[-1] ** -0.5 if scale is None else scale, keep)
    assert _cpu_attention.why_not(*given) is None
    with poisoned_memory():
        return _cpu_attention.axial_attention(*given)


def plain(q, k, v, bias, box, mask, scale) -> tuple[Tensor, Tensor]:
    """A dense masked softmax, box by box, in the dtype of its arguments; lse of what sees nothing is 0."""
    q, k, v = reference.unpacked(q, k, v)
    cells = [size // extent for size, extent in zip(q.shape[1:4], box, strict=True)]
    key_box = [size // count for size, count in zip(k.shape[1:4], cells, strict=True)]
    out, lse = q.new_empty(*q.shape[:-1], v.shape[-1]), torch.empty(q.shape[:-1], dtype=q.dtype)
    for cell in itertools.product(*map(range, cells)):
        here, there = (
            (slice(None), *(slice(c * b, (c + 1) * b) for c, b in zip(cell, extent, strict=True)))
            for extent in (box, key_box)
        )
        queries, keys, values = (x.flatten(1, 3).transpose(1, 2) for x in (q[here], k[there], v[there]))
        scores = queries @ keys.mT * scale + (0 if bias is None else bias)  # [B, A, n, m]
        ahead = torch.arange(keys.shape[2]) - torch.arange(queries.shape[2])[:, None] - keys.shape[2] + queries.shape[2]
        hidden = {"none": ahead != ahead, "causal": ahead > 0, "strict": ahead >= 0}[mask]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num() * ~hidden
        total = scores.masked_fill(hidden, float("-inf")).logsumexp(-1).masked_fill(hidden.all(-1), 0)
        shape = out[here].shape
        out[here] = (weights @ values).transpose(1, 2).reshape(shape)
        lse[here] = total.transpose(1, 2).reshape(shape[:-1])
    return out, lse


def judge(q, k=None, v=None, bias=None, box=(1, 1, 1), mask="none", scale=None) -> None:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = attend(q, k, v, bias, box, mask, scale)
    wide = (None if tensor is None else tensor.double() for tensor in (q, k, v, bias))
    own = (None if tensor is None else tensor.to(q.dtype) for tensor in (q, k, v, bias))
    exact, peer = plain(*wide, box, mask, scale), plain(*own, box, mask, scale)
    assert_within_yardstick(out, exact[0], peer[0])
    unseen = lse == float("-inf")
    assert out.is_contiguous() and lse.dtype == torch.float32 and not out[unseen].any()
    assert (exact[1][unseen] == 0).all()
    # statistics are float32 whatever the dtype
    single = plain(*(None if tensor is None else tensor.float() for tensor in (q, k, v, bias)), box, mask, scale)
    assert_within_yardstick(lse.masked_fill(unseen, 0), exact[1], single[1])
    alone, nothing = attend(q, k, v, bias, box, mask, scale, keep=False)
    assert torch.equal(alone, out) and nothing.shape == (0,)


def assert_same_bits(ours: tuple, others: tuple) -> None:
    for name, a, b in zip(("out", "lse"), ours, others, strict=True):
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
    q, k, v, _, box, mask, bias, *_ = case.make(dtype=dtype)
    judge(q, k, v, bias, box, mask)


def any_strides(random: Random, *shape: int) -> Tensor:
    """Random values of this shape: side by side, heads or elements first, every other one, or the same along axes."""
    kind = random.choice(["dense", "dense", "heads first", "elements first", "sparse", "expanded"])
    if kind == "heads first":
        return torch.randn(shape[0], shape[4], *shape[1:4], shape[5]).movedim(1, 4)
    if kind == "elements first":
        return torch.randn(shape[0], shape[5], *shape[1:5]).movedim(1, 5)
    if kind == "sparse":
        return torch.randn(*shape[:-1], 2 * shape[-1])[..., 1::2]
    if kind == "expanded":
        return torch.randn([random.choice([1, n]) for n in shape]).expand(shape)
    return torch.randn(shape)


def drawn(random: Random) -> dict:
    """Arguments of a call that nobody chose."""
    cells = [random.choice([1, 1, 2, 3]) for _ in range(3)]
    boxes = [random.choice([1, 2, 3]), random.choice([1, 1, 2]), random.choice([1, 2, 3, 5, 8, 16, 17])]
    box, keys = random.sample(boxes, 3), random.sample(boxes, 3)
    grids = [[c * b for c, b in zip(cells, extent, strict=True)] for extent in (box, keys)]
    B, A, E, D = random.choice([1, 2]), random.choice([1, 2, 3]), *random.choices([1, 3, 8, 16, 20, 32], k=2)
    dtype, n, m = random.choice(DTYPES), torch.Size(box).numel(), torch.Size(keys).numel()
    q, k, v = (any_strides(random, B, *grid, A, width).to(dtype)
               for grid, width in zip((grids[0], grids[1], grids[1]), (E, E, D), strict=True))  # fmt: skip
    bias = random.choice([None, torch.randn(A, n, m), torch.randn(m, n, A).permute(2, 1, 0).to(dtype),
                          torch.randn(A, 1, m).expand(A, n, m)])  # fmt: skip
    return {"q": q, "k": k, "v": v, "bias": bias, "box": box, "mask": random.choice(reference.MASKS),
            "scale": random.choice([None, 1.0, -0.3])}  # fmt: skip


def test_drawn_calls(level):
    random = Random(int(torch.randint(1 << 30, ())))
    for _ in range(50):
        judge(**drawn(random))


@pytest.mark.parametrize("name", ["frames", "blocks", "chunks-of-keys", "two-queries", "pooled"])
def test_half_precision_is_rounded_once(name):
    case = next(case for case in CASES if case.name == name)
    for dtype in DTYPES[1:]:
        q, k, v, _, box, mask, bias, *_ = case.make(dtype=dtype)
        wide = (None if tensor is None else tensor.float() for tensor in (q, k, v))
        out, lse = attend(*wide, bias, box, mask)
        assert_same_bits(attend(q, k, v, bias, box, mask), (out.to(dtype), lse))


@pytest.mark.parametrize("case", [case for case in CASES if case.work > 10_000], ids=str)
def test_threads_agree_to_the_last_bit(case, threads):
    q, k, v, _, box, mask, bias, *_ = case.make()
    if k is not None:  # enough for several threads
        q, k, v = (tensor.repeat_interleave(3, dim=4) for tensor in (q, k, v))
        bias = None if bias is None else bias.repeat_interleave(3, dim=0)
    threads(1)
    alone = attend(q, k, v, bias, box, mask)
    for count in (2, 3, 7):
        threads(count)
        assert_same_bits(attend(q, k, v, bias, box, mask), alone)


@pytest.mark.parametrize("axis, grid", [(1, (7, 2, 3)), (2, (2, 18, 2)), (3, (1, 2, 37)), (3, (1, 1, 530))], ids=str)
@pytest.mark.parametrize("mask", ["causal", "strict"])
def test_steps_are_the_whole_to_the_last_bit(axis, grid, mask, level):
    q, k, v = torch.randn(3, 2, *grid, 2, 24).unbind(0)
    box = [size if i + 1 == axis else 1 for i, size in enumerate(grid)]
    whole = attend(q, k, v, None, box, mask)
    last = grid[axis - 1]
    for i in range(last) if last < 100 else (0, 1, 7, 8, 191, 192, 255, 256, 257, 511, 512, 529):
        step = attend(q.narrow(axis, i, 1), *(x.narrow(axis, 0, i + 1) for x in (k, v)), None, (1, 1, 1), mask)
        assert_same_bits(step, tuple(tensor.narrow(axis, i, 1) for tensor in whole))


@pytest.mark.parametrize("box", [(4, 1, 1), (1, 3, 1), (1, 1, 10), (2, 3, 5), (4, 3, 10), (2, 1, 1)], ids=str)
def test_a_box_and_a_head_are_the_same_alone(box, level):
    qkv = torch.randn(2, 4, 3, 10, 3, 5, 12)
    whole = attend(qkv, box=box, mask="causal")
    for b, t, y, x, a in [(0, 0, 0, 0, 0), (1, 4 - box[0], 3 - box[1], 10 - box[2], 4), (1, 0, 3 - box[1], 0, 2)]:
        part = (slice(b, b + 1), slice(t, t + box[0]), slice(y, y + box[1]), slice(x, x + box[2]))
        alone = attend(qkv[part][..., a : a + 1, :], box=box, mask="causal")
        assert_same_bits(alone, (whole[0][part][..., a : a + 1, :], whole[1][part][..., a : a + 1]))


@pytest.mark.parametrize("box", [(4, 1, 1), (1, 3, 1), (1, 1, 20)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_agree_to_the_last_bit(box, dtype):
    qkv = torch.randn(2, 4, 3, 20, 3, 4, 16).to(dtype)
    q, k, v = qkv.unbind(-3)
    dense = attend(qkv, box=box, mask="causal")
    for layout in (
        lambda tensor: tensor.contiguous(),
        lambda tensor: tensor.movedim(-1, 1).contiguous().movedim(1, -1),
        lambda tensor: tensor.movedim(-2, 1).contiguous().movedim(1, -2),
        lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0],
    ):
        assert_same_bits(attend(layout(q), layout(k), layout(v), box=box, mask="causal"), dense)
        assert_same_bits(attend(q, layout(k), v, box=box, mask="causal"), dense)


def test_a_bias_that_repeats_is_the_same_laid_out():
    q, k, v = torch.randn(3, 1, 1, 4, 40, 2, 8).unbind(0)
    for bias in (torch.randn(2, 1, 40).expand(2, 40, 40), torch.randn(40, 40, 2).permute(2, 1, 0), torch.randn(1)):
        bias = bias.expand(2, 40, 40)
        whole = attend(q, k, v, bias.contiguous(), box=(1, 1, 40), mask="causal")
        assert_same_bits(attend(q, k, v, bias, box=(1, 1, 40), mask="causal"), whole)


@pytest.mark.parametrize("length", [4, 40, 300])
def test_a_query_that_sees_nothing_gives_nothing(length, level):
    qkv = torch.randn(1, 1, 2, length, 3, 2, 8)
    out, lse = attend(qkv, box=(1, 1, length), mask="strict")
    assert not out[:, :, :, 0].any() and (lse[:, :, :, 0] == float("-inf")).all()
    assert out[:, :, :, 1:].any(-1).all() and lse[:, :, :, 1:].isfinite().all()
    q, k, v = qkv.unbind(-3)
    out, lse = attend(q, k[:, :, :, :0], v[:, :, :, :0], box=(1, 1, length))
    assert not out.any() and (lse == float("-inf")).all()


@pytest.mark.parametrize("length", [3, 21, 270])
def test_scores_beyond_all_exponentials(length, level):
    q, k, v = torch.randn(3, 1, 1, 1, length, 1, 16).unbind(0)
    judge(q * 1e3, k, v, box=(1, 1, length), mask="causal", scale=1.0)
    judge(q * 1e18, k * 1e18, v, box=(1, 1, length), scale=1.0)
    hidden = torch.zeros(1, length, length)
    hidden[:, :, length // 2] = float("-inf")
    out, lse = attend(q, k, v, hidden, box=(1, 1, length))
    rest = [i for i in range(length) if i != length // 2]
    seen = attend(q, k[:, :, :, rest], v[:, :, :, rest], box=(1, 1, length))
    torch.testing.assert_close((out, lse), seen)


@pytest.mark.parametrize("box", [(1, 1, 12), (3, 1, 1), (1, 2, 12)], ids=str)
def test_nan_stays_in_its_box(box, level):
    qkv = torch.randn(1, 3, 4, 12, 3, 2, 8)
    before = attend(qkv, box=box)[0]
    where = (0, 1, 2, 5)
    qkv[(*where, 2, 1)] = float("nan")  # a value of head 1
    after = attend(qkv, box=box)[0]
    reached = torch.zeros(before.shape, dtype=torch.bool)
    spans = (slice(p // b * b, p // b * b + b) for p, b in zip(where[1:], box, strict=True))
    reached[(slice(None), *spans, 1)] = True
    assert after[reached].isnan().all() and torch.equal(after[~reached], before[~reached])


def test_nothing_to_do():
    for shape in ((0, 2, 3, 4, 3, 2, 8), (2, 0, 3, 4, 3, 2, 8)):
        out, lse = attend(torch.zeros(shape), box=(1, 1, 4))
        assert out.shape == (*shape[:4], 2, 8) and lse.shape == (*shape[:4], 2)


def test_refusals():
    q = torch.zeros(1, 1, 1, 2, 3, 1, 4)
    assert _cpu_attention.why_not(q, None, None, None) is None
    told = "takes float32, bfloat16, float16, got torch.float64"
    assert told in _cpu_attention.why_not(q.double(), None, None, None)
    assert told in _cpu_attention.why_not(q, None, None, torch.zeros(1, 2, 2).double())
    assert told in _cpu_attention.why_not_backward(q, None, None, None, q, q, q.double())
    assert "takes float32, bfloat16, got torch.float16" in _cpu_attention.why_not_self(q, [q.half()])
    assert "takes tensors on the CPU, got meta" in _cpu_attention.why_not(q.to("meta"), None, None, None)
