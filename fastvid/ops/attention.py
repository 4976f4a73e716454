"""Attention inside the boxes of a video grid: along an axis, in blocks, over what came before; and with projections."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvid.errors import UsageError
from fastvid.kernels.axial_attention import reference
from fastvid.kernels.axial_attention.reference import MASKS
from fastvid.ops import _cpu_attention
from fastvid.ops._autocast import autocast
from fastvid.ops._op import Backend, lazy, never, op, triton

TRITON = "axial_attention.triton_gpu"
Box = tuple[int, int, int]  # extents along T, H, W
Projections = tuple[Tensor, Tensor, Tensor, Tensor]  # to_q, to_k, to_v, to_out


class Attended(NamedTuple):
    """What axial_attention returns."""

    out: Tensor  # [B, T, H, W, A, D]
    lse: Tensor  # [B, T, H, W, A], or [0]


class AttentionGradients(NamedTuple):
    """What axial_attention_backward returns; [0] for what was not wanted."""

    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor
    grad_bias: Tensor


def _fake(q, k, v, bias, box, mask, scale, keep) -> tuple[Tensor, Tensor]:
    heads = [*q.shape[:4], q.shape[-2]]
    out = q.new_empty(*heads, (q if v is None else v).shape[-1])
    return out, q.new_empty(heads if keep else [0], dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_backward(q, k, v, bias, out, lse, grad_out, grad_lse, box, mask, scale, wanted) -> tuple[Tensor, ...]:
    return tuple(
        q.new_empty(0) if given is None or not asked else given.new_empty(given.shape)
        for given, asked in zip((q, k, v, bias), wanted, strict=True)
    )


@op(
    "(Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor out, Tensor lse, Tensor? grad_out, Tensor? grad_lse,"
    " SymInt[] box, str mask, float scale, bool[] wanted)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)",
    backends=[
        triton(lazy(TRITON, "axial_attention_backward"), lazy(TRITON, "why_not_backward")),
        Backend("cpu", _cpu_attention.axial_attention_backward, _cpu_attention.why_not_backward),
        Backend("reference", reference.axial_attention_backward, never),
    ],
    fake=_fake_backward,
    result=AttentionGradients,
)
def axial_attention_backward(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, out: Tensor, lse: Tensor,
    grad_out: Tensor | None, grad_lse: Tensor | None, box: Sequence[int], mask: str, scale: float,
    wanted: Sequence[bool],
) -> AttentionGradients:  # fmt: skip
    """The gradients of axial_attention: what autograd calls. The softmax is had again from `lse`.

    q, k, v, bias: as they were given; k and v None where q holds all three. box: of the queries, three extents.
    out, lse:  what axial_attention returned with keep=True.
    grad_out:  gradient of `out`; grad_lse: of `lse`; one of them may be None.
    wanted:    which of the four gradients to compute: of q (all three parts of a fused one), k, v and bias.
    Returns:   AttentionGradients, each in shape and dtype of what it is of; sums in float32, float64 for float64.
    Raises:    ValueError if there is no gradient to start from.
    Source:    Dao et al. 2022, arXiv:2205.14135, section 3, for the recomputation.
    """
    if grad_out is None and grad_lse is None:
        raise ValueError("axial_attention_backward: both `grad_out` and `grad_lse` are None; pass at least one.")


def _keep_for_backward(ctx, inputs, output) -> None:
    q, k, v, bias, ctx.box, ctx.mask, ctx.scale, _keep = inputs
    ctx.save_for_backward(q, k, v, bias, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
    q, k, v, bias, out, lse = ctx.saved_tensors
    wanted, grads = [*ctx.needs_input_grad[:4]], [None] * 4
    if any(wanted) and not (grad_out is None and grad_lse is None):
        args = (q, k, v, bias, out, lse, grad_out, grad_lse, ctx.box, ctx.mask, ctx.scale, wanted)
        # a gradient of the gradient is had from the definition, which torch can differentiate
        found = (
            reference.axial_attention_backward(*args) if torch.is_grad_enabled()
            else axial_attention_backward(*args, backend=ctx.backend)
        )  # fmt: skip
        grads = [grad if asked else None for grad, asked in zip(found, wanted, strict=True)]
    return *grads, None, None, None, None


@op(
    "(Tensor q, Tensor? k, Tensor? v, Tensor? bias, SymInt[] box, str mask, float scale, bool keep)"
    " -> (Tensor out, Tensor lse)",
    backends=[
        triton(lazy(TRITON, "axial_attention"), lazy(TRITON, "why_not")),
        Backend("cpu", _cpu_attention.axial_attention, _cpu_attention.why_not),
        Backend("reference", reference.axial_attention, never),
    ],
    fake=_fake,
    result=Attended,
    backward=_backward,
    setup_context=_keep_for_backward,
)
def axial_attention(
    q: Tensor, k: Tensor | None = None, v: Tensor | None = None, axis: int | None = None, box: int | Box | None = None,
    mask: str = "none", bias: Tensor | None = None, scale: float | None = None, keep: bool = False,
) -> Attended:  # fmt: skip
    """Multi-head attention of every position to those in its own box of the grid, read and written where they lie.

    q, k, v: [B, T, H, W, A, E], [B, Tk, Hk, Wk, A, E] and [B, Tk, Hk, Wk, A, D], floating, any strides; or q alone,
             [B, T, H, W, 3, A, E], holding all three. A heads.
    axis:    1, 2 or 3: attend along T, H or W. Each line is a box of its own.
    box:     with an axis, a number: lines are cut into blocks of so many positions. Without, (bt, bh, bw): boxes of so
             many frames, rows and columns, (T, H, W) for everything. The grid must divide into whole boxes; the keys'
             grid divides into as many, so keys may be fewer than queries (pooled) or more (a cache).
    mask:    with n queries and m keys in a box, each in raster order, query i sees "none": every key; "causal": keys
             j <= i + m - n; "strict": j < i + m - n. So the last query stands at the last key, and a step of a model is
             the same call with one query over a cache of all keys so far.
    bias:    [A, n, m] or None, added to the scores; any strides, in q's dtype or float32. See relative_bias.
    scale:   of the products q k; E ** -0.5 by default.
    keep:    whether `lse` is wanted; it is also kept where a gradient will need it.
    Returns: Attended(out [B, T, H, W, A, D] in q's dtype, lse [B, T, H, W, A], the logarithm of the softmax's sum, or
             [0]). A query that sees nothing has out 0 and lse -inf. Scores, their statistics and sums are float32
             (float64 for float64). A box's result depends on that box alone. Under autocast q, k and v go to the lower
             precision.
    Raises:  ValueError if shapes, dtypes or devices disagree or the grid has a remainder.
    Source:  Ho et al. 2019, arXiv:1912.12180, for the axes; Weissenborn et al. 2020, arXiv:1906.02634, for the blocks.
    """
    _check_mask("axial_attention", mask)
    q, k, v = autocast(q, k, v)
    queries, keys = _check_shapes(q, k, v)
    box = _settled_box(tuple(queries.shape[1:4]), axis, box)
    _check_boxes(queries, keys, box, bias)
    given = [tensor for tensor in (q, k, v, bias) if tensor is not None]
    if len({tensor.device for tensor in given}) > 1 or len({t.dtype for t in given if t is not bias}) > 1:
        told = ", ".join(f"{str(tensor.dtype)[6:]} on {tensor.device}" for tensor in given)
        raise ValueError(f"axial_attention: one dtype and one device are wanted, got {told}; convert with .to().")
    keep = keep or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
    return q, k, v, bias, box, mask, int(q.shape[-1]) ** -0.5 if scale is None else float(scale), keep


def _check_mask(name: str, mask: str) -> None:
    if mask not in MASKS:
        known = ", ".join(map(repr, MASKS))
        raise ValueError(f"{name}: `mask` must be one of {known}, got {mask!r}.")


def _check_whole(name: str, grid: Box, box: list[int]) -> None:
    """The queries' grid divides into boxes."""
    if any(b < 1 or extent % b for extent, b in zip(grid, box, strict=True)):
        told = f"the grid {grid} must divide into boxes {tuple(box)}; crop or pad it, or choose others"
        raise ValueError(f"{name}: {told}.")


def _check_shapes(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """One tensor with the queries' shape and one with the keys'."""
    if not q.is_floating_point() or (k is None) != (v is None):
        got = f"{q.dtype} {_shapes(q, k, v)}"
        raise ValueError(f"axial_attention: wanted floating q, k and v, or one fused q, got {got}.")
    if k is None:
        if q.ndim != 7 or q.shape[4] != 3:
            raise ValueError(f"axial_attention: a fused `q` must be [B, T, H, W, 3, A, E], got {_shapes(q)}.")
        return q.select(4, 0), q.select(4, 1)
    (B, *_, A, E), six = (q.shape[:1] + q.shape[-2:], q.ndim == k.ndim == v.ndim == 6)
    if not six or k.shape[:4] != v.shape[:4] or (k.shape[0], *k.shape[-2:]) != (B, A, E) or v.shape[4] != A:
        wanted = "`q` [B, T, H, W, A, E], `k` [B, Tk, Hk, Wk, A, E] and `v` [B, Tk, Hk, Wk, A, D]"
        raise ValueError(f"axial_attention: {wanted} are wanted, got {_shapes(q, k, v)}.")
    return q, k


def _shapes(*tensors: Tensor | None) -> str:
    return ", ".join(str(list(tensor.shape)) for tensor in tensors if tensor is not None)


def _settled_box(grid: Box, axis: int | None, box: int | Sequence[int] | None) -> list[int]:
    """The queries' box as three extents."""
    if axis is None:
        if isinstance(box, int) or box is None or len(box) != 3:
            raise ValueError(f"axial_attention: without an `axis`, `box` must be (bt, bh, bw), got {box!r}.")
        return [*box]
    if axis not in (1, 2, 3) or not (box is None or isinstance(box, (int, torch.SymInt))):
        wanted = "`axis` must be 1 (T), 2 (H) or 3 (W), and `box` with it a number"
        raise ValueError(f"axial_attention: {wanted}, got axis {axis!r} and box {box!r}.")
    extents = [1, 1, 1]
    extents[axis - 1] = grid[axis - 1] if box is None else box
    return extents


def _check_boxes(q: Tensor, k: Tensor, box: list[int], bias: Tensor | None) -> None:
    grid, key_grid = tuple(q.shape[1:4]), tuple(k.shape[1:4])
    _check_whole("axial_attention", grid, box)
    cells = reference.cells_of(grid, box)
    if any(extent < 1 or extent % count for extent, count in zip(key_grid, cells, strict=True)):
        raise ValueError(f"axial_attention: the keys' grid {key_grid} must divide into {cells} boxes, as the queries'.")
    if bias is not None:
        n, m = box[0] * box[1] * box[2], k.shape[1] * k.shape[2] * k.shape[3] // (cells[0] * cells[1] * cells[2])
        if tuple(bias.shape) != (q.shape[4], n, m) or bias.dtype not in (q.dtype, torch.float32):
            wanted = f"[{q.shape[4]}, {n}, {m}] in {q.dtype} or float32"
            raise ValueError(f"axial_attention: `bias` must be {wanted}, got {list(bias.shape)} {bias.dtype}.")


def relative_bias(tables: Sequence[Tensor | None], box: Box) -> Tensor:
    """The bias of axial_attention that depends on distances alone: a learned table per head and axis, summed.

    tables:  for T, H and W, [A, 2 b - 1] or None, b the box's extent along that axis. Entry d + b - 1 is for a key
             that lies d positions after its query.
    box:     (bt, bh, bw), of queries and keys both.
    Returns: [A, n, n] with n = bt bh bw, in the tables' dtype; gradients flow to the tables.
    Raises:  ValueError for a table of another length, or none at all.
    Source:  Weissenborn et al. 2020, arXiv:1906.02634, section 3.1 (block-local self-attention).
    """
    if len(tables) != 3 or all(table is None for table in tables):
        raise ValueError("relative_bias: wants three tables, for T, H and W, of which some may be None.")
    total: Tensor | None = None
    for axis, (table, b) in enumerate(zip(tables, box, strict=True)):
        if table is None:
            continue
        if table.ndim != 2 or table.shape[1] != 2 * b - 1:
            got = list(table.shape)
            raise ValueError(f"relative_bias: axis {axis + 1} of {b} takes a table [A, {2 * b - 1}], got {got}.")
        place = torch.arange(b, device=table.device)
        along = table[:, place - place[:, None] + b - 1]  # [A, b, b]
        shape = [len(table), 1, 1, 1, 1, 1, 1]
        shape[1 + axis], shape[4 + axis] = b, b
        total = along.view(shape) if total is None else total + along.view(shape)
    return total.expand(-1, *box, *box).flatten(4, 6).flatten(1, 3)


@op(
    "(Tensor x, Tensor[] weights, Tensor? bias, SymInt[] boxes, int heads, str mask, float[] scales) -> Tensor",
    backends=[
        Backend("cpu", _cpu_attention.axial_self_attention, _cpu_attention.why_not_self),
        Backend("reference", reference.axial_self_attention, never),
    ],
    fake=lambda x, weights, *_: (x.new_empty(*x.shape[:4], weights[3].shape[0]),),
    result=Tensor,
)
def axial_self_attention(
    x: Tensor, projections: Sequence[Projections], axes: Sequence[int | Box], heads: int, mask: str = "none",
    bias: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention of x to itself with its projections, summed over several axes; for inference, as it has no gradient.

    x:           [B, T, H, W, C], floating, any strides.
    projections: for each attention (to_q [A E, C], to_k [A E, C], to_v [A D, C], to_out [Cout, A D]), as F.linear has
                 them, any strides.
    axes:        for each attention 1, 2 or 3, or a box (bt, bh, bw), as in axial_attention; so is `mask`.
    heads:       A. scale: E ** -0.5 by default. bias: [Cout] or None, added once.
    Returns:     [B, T, H, W, Cout] in x's dtype, contiguous: bias + sum of to_out(attention). On the CPU q, k and v
                 never exist as a whole, and are float32 whatever the dtype.
    Raises:      ValueError if shapes, dtypes or devices disagree; UsageError where a gradient would be wanted.
    Source:      Ho et al. 2019, arXiv:1912.12180, section 3.
    """
    _check_mask("axial_self_attention", mask)
    if x.ndim != 5 or not x.is_floating_point() or not projections or len(projections) != len(axes):
        raise ValueError(
            f"axial_self_attention: wanted a floating `x` [B, T, H, W, C] and an axis for each of the projections, got "
            f"{list(x.shape)} {x.dtype}, {len(projections)} projections and {len(axes)} axes."
        )
    weights = [weight for four in projections for weight in four]
    x, bias, *weights = autocast(x, bias, *weights)
    given = [x, *weights] if bias is None else [x, bias, *weights]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        told = "it has no gradient; call it under torch.no_grad(), or axial_attention between your own projections"
        raise UsageError(f"axial_self_attention: {told}.")
    if len({(tensor.dtype, tensor.device) for tensor in given}) > 1:
        told = ", ".join(sorted({f"{str(tensor.dtype)[6:]} on {tensor.device}" for tensor in given}))
        raise ValueError(f"axial_self_attention: one dtype and one device are wanted, got {told}; convert with .to().")
    grid, boxes, scales = tuple(x.shape[1:4]), [], []
    for four, axis in zip(projections, axes, strict=True):
        _check_projections(x, four, heads, bias)
        boxes += _settled_box(grid, axis, None) if isinstance(axis, int) else _settled_box(grid, None, axis)
        _check_whole("axial_self_attention", grid, boxes[-3:])
        scales.append((int(four[0].shape[0]) // heads) ** -0.5 if scale is None else float(scale))
    return x, weights, bias, boxes, heads, mask, scales


def _check_projections(x: Tensor, four: Projections, heads: int, bias: Tensor | None) -> None:
    C, shapes = x.shape[-1], [list(weight.shape) for weight in four]
    to_q, to_k, to_v, to_out = four
    fits = all(weight.ndim == 2 for weight in four) and to_q.shape == to_k.shape
    fits = fits and to_q.shape[1] == to_v.shape[1] == C and to_out.shape[1] == to_v.shape[0]
    fits = fits and heads >= 1 and to_q.shape[0] % heads == 0 and to_v.shape[0] % heads == 0
    if not fits or (bias is not None and tuple(bias.shape) != (to_out.shape[0],)):
        raise ValueError(
            f"axial_self_attention: to_q and to_k must be [A E, {C}], to_v [A D, {C}], to_out [Cout, A D] and bias "
            f"[Cout], with {heads} heads, got {shapes}{'' if bias is None else f' and {list(bias.shape)}'}."
        )
