"""Attention along an axis with its projections: in one pass where nobody wants a gradient, else part by part."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid import ops

Projection = tuple[Tensor, Tensor, Tensor, Tensor]  # to_q, to_k [A * E, C], to_v [A * D, C], to_out [Cout, A * D]
Span = int | tuple[int, int, int]  # the axis 1, 2 or 3 of [B, T, H, W, C], or a box of so many positions along each


def self_attention(
    x: Tensor, projections: Sequence[Projection], spans: Sequence[Span], heads: int, mask: str = "none",
    bias: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The sum over spans of to_out(attention), plus `bias`; each span has a projection of its own.

    x:       [B, T, H, W, C], any strides. bias: [Cout] or None. mask, scale: as in fastvid.ops.axial_attention.
    Returns: [B, T, H, W, Cout], contiguous.
    """
    if _in_one_pass(x, projections):
        return ops.axial_self_attention(x, projections, spans, heads, mask, bias, scale)
    x, out = x.contiguous(), None  # one copy for all projections, none where channels lie last
    for (*to_qkv, to_out), span in zip(projections, spans, strict=True):
        attended = _attend(x, to_qkv, span, heads, mask, scale).flatten(-2)  # [B, T, H, W, A * D]
        out = F.linear(attended, to_out, bias) if out is None else out + F.linear(attended, to_out)
    return out


def heads_of(x: Tensor, weights: Sequence[Tensor], heads: int) -> tuple[Tensor, ...]:
    """x times each weight, by one product for all of them. -> [B, T, H, W, A, width] each, views of one tensor."""
    widths = [weight.shape[0] for weight in weights]
    return tuple(part.unflatten(-1, (heads, -1)) for part in F.linear(x, torch.cat([*weights])).split(widths, -1))


def zeros_as(parameter: Tensor, *size: int) -> Tensor:
    """Zeros where a parameter is, in the dtype that a product with it has: autocast's where that is on."""
    device = parameter.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast and parameter.dtype != torch.float64 else parameter.dtype
    return torch.zeros(size, device=parameter.device, dtype=dtype)


def span_words(span: Span) -> dict[str, Span]:
    """A span as the words of fastvid.ops.axial_attention."""
    return {"axis": span} if isinstance(span, int) else {"box": span}


def _attend(
    x: Tensor, to_qkv: Sequence[Tensor], span: Span, heads: int, mask: str, scale: float | None
) -> Tensor:  # fmt: skip
    """-> [B, T, H, W, A, D]"""
    if to_qkv[0].shape == to_qkv[2].shape:
        qkv = F.linear(x, torch.cat([*to_qkv])).unflatten(-1, (3, heads, -1))  # [B, T, H, W, 3, A, E]
        return ops.axial_attention(qkv, mask=mask, scale=scale, **span_words(span)).out
    return ops.axial_attention(*heads_of(x, to_qkv, heads), mask=mask, scale=scale, **span_words(span)).out


def _in_one_pass(x: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether the op that has no gradient is the one to call: on the CPU, in the dtypes of its native kernel."""
    autocast = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    if x.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    given = [x, *(weight for projection in projections for weight in projection)]
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
