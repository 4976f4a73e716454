"""Triton kernels of a frame's two halves: the gates with r . h, the candidate with the new state."""

import triton
import triton.language as tl
from fastvid.kernels.conv_gru.triton_product import (
    _convolved,
    _gathered,
    _read,
    _rows,
    _sigmoid,
    _tanh,
    _tile_of,
    _write,
)


@triton.jit(do_not_specialize=["N", "H", "W", "splits"])
def _gates_kernel(
    h_ptr, weight_ptr, gates_ptr, kept_ptr, product_ptr, part_ptr, count_ptr, N, H, W, C, splits,
    stride_hb, stride_hy, stride_hx, stride_gb, stride_gy, stride_gx, stride_kb, stride_ky, stride_kx,
    K: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """r and u of a frame into kept [.., 3C], and r . h into product [N, C]. h: the state before, None for zeros."""
    half = tl.cdiv(C, BLOCK_O)  # tiles of r, and of u
    i_split, i_o, o_n = _tile_of(2 * half, splits, BLOCK_N)
    o_c = i_o % half * BLOCK_O + tl.arange(0, BLOCK_O)
    o_o, m_o = i_o // half * C + o_c, o_c < C
    acc = _convolved(h_ptr, weight_ptr, i_split, splits, o_o, m_o, o_n, N, H, W, C, stride_hb, stride_hy, stride_hx,
                     K, STEPS, EVEN, BLOCK_I)  # fmt: skip
    acc, whole = _gathered(acc, part_ptr, count_ptr, i_split, splits, SPLIT)
    if whole:
        m = m_o[:, None] & (o_n < N)[None, :]
        b = _sigmoid(acc + _read(gates_ptr, _rows(o_n, H, W, stride_gb, stride_gy, stride_gx), o_o, m))
        _write(kept_ptr, _rows(o_n, H, W, stride_kb, stride_ky, stride_kx), o_o, b, m)
        if h_ptr is not None:
            m = m & (i_o < half)
            b *= _read(h_ptr, _rows(o_n, H, W, stride_hb, stride_hy, stride_hx), o_c, m)
            _write(product_ptr, o_n.to(tl.int64) * C, o_c, b, m)


@triton.jit(do_not_specialize=["N", "H", "W", "splits"])
def _candidate_kernel(
    product_ptr, weight_ptr, gates_ptr, kept_ptr, h_ptr, state_ptr, part_ptr, count_ptr, N, H, W, C, splits,
    stride_hb, stride_hy, stride_hx, stride_gb, stride_gy, stride_gx, stride_kb, stride_ky, stride_kx,
    stride_sb, stride_sy, stride_sx, RELU: tl.constexpr,
    K: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """c of a frame into kept, and the frame's state. product: r . h, [N, C]; it and h are None where h is zero."""
    i_split, i_o, o_n = _tile_of(tl.cdiv(C, BLOCK_O), splits, BLOCK_N)
    o_c = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    acc = _convolved(product_ptr, weight_ptr, i_split, splits, o_c, o_c < C, o_n, N, H, W, C, H * W * C, W * C, C,
                     K, STEPS, EVEN, BLOCK_I)  # fmt: skip
    acc, whole = _gathered(acc, part_ptr, count_ptr, i_split, splits, SPLIT)
    if whole:
        m = (o_c < C)[:, None] & (o_n < N)[None, :]
        b_c = acc + _read(gates_ptr, _rows(o_n, H, W, stride_gb, stride_gy, stride_gx), o_c + 2 * C, m)
        if RELU:
            b_c = tl.where(b_c < 0, 0.0, b_c)  # NaN stays
        else:
            b_c = _tanh(b_c)
        o_kept = _rows(o_n, H, W, stride_kb, stride_ky, stride_kx)
        _write(kept_ptr, o_kept, o_c + 2 * C, b_c, m)
        b_u = _read(kept_ptr, o_kept, o_c + C, m)
        b_c *= 1.0 - b_u
        if h_ptr is not None:
            b_c += b_u * _read(h_ptr, _rows(o_n, H, W, stride_hb, stride_hy, stride_hx), o_c, m)
        _write(state_ptr, _rows(o_n, H, W, stride_sb, stride_sy, stride_sx), o_c, b_c, m)
