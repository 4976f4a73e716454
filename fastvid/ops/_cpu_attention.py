"""Launchers of the native attention inside boxes: tensors become views of pointers and strides, a call one structure.

A structure is packed as bytes: made of ctypes fields it takes longer than the kernel's work on a few boxes.
"""

from struct import Struct

import torch
from torch import Tensor

from fastvid import _native

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Type of kernels/common/types.h
MASKS = {"none": 0, "causal": 1, "strict": 2}  # enum Mask of kernels/axial_attention/cpu.h
_NO_MEMORY = 1  # enum Outcome of kernels/common/types.h

# The structures of kernels/axial_attention/cpu.h, field by field, aligned and padded as a C compiler does it.
_HEADS, _SCORES, _POSITIONS, _MATRIX = "P6qi", "P3qi", "P5qi", "P2qi"
_ATTENTION_CALL = Struct(
    # q, k, v, out; bias; lse; B, cells, box, key_box; A, E, D; scale; mask, threads
    f"@{4 * _HEADS}{_SCORES}P q3q3q3q3q f2i0q"
)
_ATTENTION_GRAD_CALL = Struct(
    # q, k, v, out, grad_out, grad_q, grad_k, grad_v; bias; lse, grad_lse, grad_bias; the rest as above
    f"@{8 * _HEADS}{_SCORES}3P q3q3q3q3q f2i0q"
)
_SELF_ATTENTION_CALL = Struct(
    # x, out; to_q, to_k, to_v, to_out; bias; B, cells, box; A, E, D, C, Cout; scale; mask, add, threads
    f"@{2 * _POSITIONS}{4 * _MATRIX}P q3q3q5q f3i0q"
)
_ABSENT, _NO_SCORES = (0,) * 8, (0,) * 5


def why_not(q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, *_) -> str | None:
    """Why the native axial_attention cannot serve these arguments, in a few words; None when it can."""
    return _refusal(TYPES, q, k, v, bias)


def why_not_backward(q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, out: Tensor, lse: Tensor,
                     grad_out: Tensor | None, *_) -> str | None:  # fmt: skip
    """Why the native axial_attention_backward cannot serve these arguments; None when it can."""
    return _refusal(TYPES, q, k, v, bias, out, grad_out)


def why_not_self(x: Tensor, weights: list[Tensor], *_) -> str | None:
    """Why the native axial_self_attention cannot serve these arguments; None when it can."""
    dtypes = {dtype: TYPES[dtype] for dtype in (torch.float32, torch.bfloat16)}
    return _refusal(dtypes, x, *weights)


def _refusal(dtypes: dict[torch.dtype, int], *tensors: Tensor | None) -> str | None:
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            return f"takes tensors on the CPU, got {tensor.device}"
        if tensor is not None and tensor.dtype not in dtypes:
            return f"takes {', '.join(str(dtype)[6:] for dtype in dtypes)}, got {tensor.dtype}"
    return _native.why_not("cpu")


def axial_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, box: list[int], mask: str, scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention inside boxes by the native kernel, on torch's threads; arguments as ops' of this name.

    k, v:    both None where q [B, T, H, W, 3, A, E] holds q, k and v. box: that of the queries, [bt, bh, bw].
    Returns: out [B, T, H, W, A, D] and lse [B, T, H, W, A] float32, dense; lse [0] unless it is kept.
    Raises:  MemoryError when the kernel finds no memory for its scratch.
    """
    sizes, views = _sizes(q, k, v, box), _views(q, k, v)
    A, D = sizes[-3], sizes[-1]
    out = q.new_empty(*q.shape[:4], A, D)
    lse = torch.empty(*q.shape[:4], A) if keep else torch.empty(0)
    if out.numel() or lse.numel():
        call = _ATTENTION_CALL.pack(
            *views, *_view(out), *_scores(bias), lse.data_ptr() if keep else 0,
            *sizes, scale, MASKS[mask], torch.get_num_threads(),
        )  # fmt: skip
        _check("axial_attention", _native.load("cpu").fastvid_axial_attention(call))
    return out, lse


def axial_attention_backward(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, out: Tensor, lse: Tensor,
    grad_out: Tensor | None, grad_lse: Tensor | None, box: list[int], mask: str, scale: float, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of attention by the native kernel, on torch's threads; arguments as ops' of this name.

    grad_out, grad_lse: one of them at least. wanted: whether of q (where k is None: of all three), k, v, bias.
    Returns: grad_q, grad_k, grad_v, grad_bias, dense; [0] for what is not wanted, and for k and v where k is None.
    Raises:  MemoryError when the kernel finds no memory for its scratch.
    """
    sizes, fused = _sizes(q, k, v, box), k is None
    asked = zip((q, k, v), wanted[:3], strict=True)
    grads = [q.new_empty(tensor.shape if tensor is not None and want else 0) for tensor, want in asked]
    written = _views(grads[0], None, None) if fused and wanted[0] else [part for g in grads for part in _view(_some(g))]
    lse, grad_lse = lse.contiguous(), None if grad_lse is None else grad_lse.float().contiguous()
    sums = torch.zeros(bias.shape) if wanted[3] else None  # float32, whatever the dtype
    if q.numel():
        call = _ATTENTION_GRAD_CALL.pack(
            *_views(q, k, v), *_view(out), *_view(grad_out), *written, *_scores(bias),
            lse.data_ptr(), _pointer(grad_lse), _pointer(sums),
            *sizes, scale, MASKS[mask], torch.get_num_threads(),
        )  # fmt: skip
        _check("axial_attention_backward", _native.load("cpu").fastvid_axial_attention_backward(call))
    return *grads, q.new_empty(0) if sums is None else sums.to(bias.dtype)


def axial_self_attention(
    x: Tensor, weights: list[Tensor], bias: Tensor | None, boxes: list[int], heads: int, mask: str, scale: list[float]
) -> tuple[Tensor]:
    """Self-attention with its projections by the native kernel, on torch's threads; arguments as ops' of this name.

    weights: to_q, to_k, to_v, to_out of every axis. boxes: bt, bh, bw of every axis in one list.
    Returns: the sum over axes plus bias, [B, T, H, W, Cout] in x's dtype, dense.
    Raises:  MemoryError when the kernel finds no memory for its scratch.
    """
    axes, Cout = len(scale), weights[3].shape[0]
    # a sum of several is rounded to x's dtype once
    out = torch.empty(*x.shape[:4], Cout, dtype=x.dtype if axes == 1 else torch.float32)
    added = None if bias is None else bias.float().contiguous()
    for axis in range(axes if out.numel() else 0):
        to_q, _, to_v, _ = weights[4 * axis : 4 * axis + 4]
        box = boxes[3 * axis : 3 * axis + 3]
        cells = [size // one for size, one in zip(x.shape[1:4], box, strict=True)]
        call = _SELF_ATTENTION_CALL.pack(
            *_view(x), *_view(out), *(part for w in weights[4 * axis : 4 * axis + 4] for part in _view(w)),
            0 if axis else _pointer(added), x.shape[0], *cells, *box,
            heads, to_q.shape[0] // heads, to_v.shape[0] // heads, x.shape[4], Cout,
            scale[axis], MASKS[mask], axis > 0, torch.get_num_threads(),
        )  # fmt: skip
        _check("axial_self_attention", _native.load("cpu").fastvid_axial_self_attention(call))
    return (out.to(x.dtype),)


def _sizes(q: Tensor, k: Tensor | None, v: Tensor | None, box: list[int]) -> tuple[int, ...]:
    """B, cells, box, key_box, A, E, D."""
    cells = [size // one for size, one in zip(q.shape[1:4], box, strict=True)]
    if k is None:
        return q.shape[0], *cells, *box, *box, q.shape[5], q.shape[6], q.shape[6]
    key_box = [size // max(count, 1) for size, count in zip(k.shape[1:4], cells, strict=True)]
    return q.shape[0], *cells, *box, *key_box, q.shape[4], q.shape[5], v.shape[5]


def _views(q: Tensor, k: Tensor | None, v: Tensor | None) -> list[int]:
    """q, k and v as the structures have them."""
    if k is not None:
        return [*_view(q), *_view(k), *_view(v)]
    B, T, H, W, part, A, E = q.stride()
    start, step, kind = q.data_ptr(), part * q.element_size(), TYPES[q.dtype]
    return [field for i in range(3) for field in (start + i * step, B, T, H, W, A, E, kind)]


def _view(tensor: Tensor | None) -> tuple[int, ...]:
    return _ABSENT if tensor is None else (tensor.data_ptr(), *tensor.stride(), TYPES[tensor.dtype])


def _scores(bias: Tensor | None) -> tuple[int, ...]:
    return _NO_SCORES if bias is None else _view(bias)


def _some(tensor: Tensor) -> Tensor | None:
    """None for what is not wanted."""
    return tensor if tensor.ndim > 1 else None


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(op: str, outcome: int) -> None:
    if outcome == _NO_MEMORY:
        raise MemoryError(f"{op}: no memory for the kernel's scratch; pass a smaller batch.")
    if outcome:
        raise RuntimeError(f"{op}: the native kernel refused its arguments with {outcome}; report this.")
