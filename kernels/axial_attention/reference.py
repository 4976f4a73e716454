"""Attention inside the boxes of a video grid, its gradients, and with projections: the definition, in plain torch.

See README.md. The cells of a grid are its boxes, counted along each axis; queries and keys have equally many.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MASKS = ("none", "causal", "strict")


def axial_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, box: Sequence[int], mask: str, scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, T, H, W, A, D] and lse [B, T, H, W, A], [0] unless kept; see fastvid.ops.axial_attention."""
    q, k, v = unpacked(q, k, v)
    grid = q.shape[1:4]
    cells = cells_of(grid, box)
    scores = scores_of(boxes(q, cells), boxes(k, cells), bias, mask, scale)  # [B, cells, A, n, m]
    lse = scores.logsumexp(dim=-1, keepdim=True)
    out = _weights(scores, lse).to(v.dtype) @ boxes(v, cells)
    return unboxed(out, grid), unboxed(lse, grid).squeeze(-1) if keep else lse.new_empty(0)


def axial_attention_backward(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, out: Tensor, lse: Tensor,
    grad_out: Tensor | None, grad_lse: Tensor | None, box: Sequence[int], mask: str, scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and bias, [0] where not wanted; see fastvid.ops.axial_attention_backward."""
    fused, (q, k, v) = k is None, unpacked(q, k, v)
    grid, key_grid = q.shape[1:4], k.shape[1:4]
    cells = cells_of(grid, box)
    queries, keys, values, given, lse = (boxes(x, cells) for x in (q, k, v, _or_zeros(grad_out, out), lse[..., None]))
    weights = _weights(scores_of(queries, keys, bias, mask, scale), lse)  # [B, cells, A, n, m]
    delta = (given.to(lse.dtype) * boxes(out, cells).to(lse.dtype)).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - boxes(grad_lse[..., None], cells)
    at_scores = weights * (given.to(lse.dtype) @ values.to(lse.dtype).mT - delta)
    at_products = (at_scores * scale).to(q.dtype)
    found = [
        unboxed(at_products @ keys, grid) if wanted[0] else None,
        unboxed(at_products.mT @ queries, key_grid) if wanted[1] or fused and wanted[0] else None,
        unboxed(weights.to(v.dtype).mT @ given.to(v.dtype), key_grid) if wanted[2] or fused and wanted[0] else None,
        at_scores.sum(dim=(0, 1, 2, 3)).to(bias.dtype) if wanted[3] else None,
    ]
    if fused:
        found[:3] = torch.stack(found[:3], dim=-3) if wanted[0] else None, None, None
    return tuple(q.new_empty(0) if grad is None else grad for grad in found)


def axial_self_attention(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, boxes: Sequence[int], heads: int, mask: str,
    scales: Sequence[float],
) -> tuple[Tensor]:  # fmt: skip
    """out [B, T, H, W, Cout]: a sum over attentions; see fastvid.ops.axial_self_attention.

    weights: to_q, to_k, to_v and to_out of each in turn. boxes: three extents of each. scales: one of each.
    """
    total = 0.0 if bias is None else bias
    for i, scale in enumerate(scales):
        to_q, to_k, to_v, to_out = weights[4 * i : 4 * i + 4]
        q, k, v = (F.linear(x, weight).unflatten(-1, (heads, -1)) for weight in (to_q, to_k, to_v))
        out, _ = axial_attention(q, k, v, None, boxes[3 * i : 3 * i + 3], mask, scale, False)
        total = total + F.linear(out.flatten(-2), to_out)
    return (total,)


def unpacked(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v; without k and v, q holds all three, [B, T, H, W, 3, A, E]."""
    return q.unbind(-3) if k is None else (q, k, v)


def cells_of(grid: Sequence[int], box: Sequence[int]) -> tuple[int, ...]:
    """How many boxes there are along T, H and W."""
    return tuple(extent // b for extent, b in zip(grid, box, strict=True))


def boxes(x: Tensor, cells: Sequence[int]) -> Tensor:
    """[B, T, H, W, A, E] -> [B, ct, ch, cw, A, positions of a box in raster order, E]."""
    for axis, count in zip((1, 3, 5), cells, strict=True):
        x = x.unflatten(axis, (count, x.shape[axis] // count))  # [B, ct, bt, ch, bh, cw, bw, A, E] in the end
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6, 8).flatten(5, 7)


def unboxed(x: Tensor, grid: Sequence[int]) -> Tensor:
    """What `boxes` undoes: [B, ct, ch, cw, A, n, E] -> [B, T, H, W, A, E], contiguous."""
    cells = x.shape[1:4]
    x = x.unflatten(5, tuple(extent // count for extent, count in zip(grid, cells, strict=True)))
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4, 8)  # [B, ct, bt, ch, bh, cw, bw, A, E]
    return x.reshape(x.shape[0], *grid, *x.shape[-2:]).contiguous()


def visible(n: int, m: int, mask: str, device: torch.device) -> Tensor:
    """Which of m keys each of n queries sees, aligned at the end. [n, m] bool."""
    query, key = torch.arange(n, device=device)[:, None] + (m - n), torch.arange(m, device=device)
    return {"none": key == key, "causal": key <= query, "strict": key < query}[mask].expand(n, m)


def scores_of(q: Tensor, k: Tensor, bias: Tensor | None, mask: str, scale: float) -> Tensor:
    """Boxes of queries and keys -> scores [B, cells, A, n, m], -inf where hidden; float32, float64 for float64."""
    full = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(full) @ k.to(full).mT) * scale
    if bias is not None:
        scores = scores + bias
    if mask == "none":
        return scores
    return scores.masked_fill(~visible(*scores.shape[-2:], mask, scores.device), float("-inf"))


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """softmax(scores), by their logsumexp [..., 1]; zeros for a query that sees nothing."""
    return (scores - lse.masked_fill(lse == float("-inf"), 0.0)).exp()


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad
