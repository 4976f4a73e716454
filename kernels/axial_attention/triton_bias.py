"""Triton kernels of the bias's gradient: fixed chunks of boxes added up apart, then the chunks in order; no atomics."""

import triton
import triton.language as tl
from fastvid.kernels.axial_attention.triton_backward import _flat, _reference_points
from fastvid.kernels.axial_attention.triton_forward import _bias, _binary, _places, _products, _rounded, _seen, _strided


@triton.jit(do_not_specialize=["boxes", "chunk", "CT", "CY", "CX", "QT", "QY", "QX", "KT", "KY", "KX"])
def _bias_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, grad_ptr, lse_ptr, delta_ptr, part_ptr, boxes, chunk,
    CT, CY, CX, QT, QY, QX, KT, KY, KX, A, scale,
    stride_qb, stride_qt, stride_qy, stride_qx, stride_qa, stride_qe,
    stride_kb, stride_kt, stride_ky, stride_kx, stride_ka, stride_ke,
    stride_vb, stride_vt, stride_vy, stride_vx, stride_va, stride_vd,
    stride_gb, stride_gt, stride_gy, stride_gx, stride_ga, stride_gd,
    stride_ba, stride_bi, stride_bj, stride_ob, stride_ot, stride_oy, stride_ox,
    E: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, LINE: tl.constexpr, WHOLE: tl.constexpr,
    PACK: tl.constexpr, SLOT_N: tl.constexpr, SLOT_M: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Of one head a tile of the scores' gradient, queries down, summed over `chunk` boxes: part [chunks PACK, A, n, m].

    PACK boxes at once, each in slots of SLOT_N rows and SLOT_M columns with a sum of its own; with PACK 1 larger boxes
    take several tiles. chunk: a multiple of PACK. Programs: chunks, heads, tiles of queries, tiles of keys.
    """
    n, m = QT * QY * QX, KT * KY * KX
    across, down = tl.cdiv(m, SLOT_M), tl.cdiv(n, SLOT_N)
    i_rest = tl.program_id(0) // across
    o_i, o_j = tl.arange(0, PACK * SLOT_N), tl.arange(0, PACK * SLOT_M)
    s_i, s_j = o_i // SLOT_N, o_j // SLOT_M
    o_i, o_j = o_i % SLOT_N + i_rest % down * SLOT_N, o_j % SLOT_M + tl.program_id(0) % across * SLOT_M
    i_rest = i_rest // down
    i_a, i_chunk = i_rest % A, i_rest // A
    m_own = (o_i < n)[:, None] & (s_i[:, None] == s_j[None, :])
    b_bias = _bias(bias_ptr, i_a, o_i[:, None], o_j[None, :], (o_i < n)[:, None], (o_j < m)[None, :], stride_ba,
                   stride_bi, stride_bj, WHOLE)  # fmt: skip
    acc = tl.zeros((PACK * SLOT_N, PACK * SLOT_M), tl.float32)
    begin = i_chunk * chunk
    end = tl.minimum(begin + chunk, boxes)
    for i_box in tl.range(begin, end, PACK):
        m_i, m_j = (o_i < n) & (i_box + s_i < end), (o_j < m) & (i_box + s_j < end)
        place = _places((i_box + s_i) * A + i_a, o_i, A, CT, CY, CX, QT, QY, QX, LINE)
        key = _places((i_box + s_j) * A + i_a, o_j, A, CT, CY, CX, KT, KY, KX, LINE)
        o_q = _strided(place, stride_qb, stride_qt, stride_qy, stride_qx, stride_qa, LINE)
        o_k = _strided(key, stride_kb, stride_kt, stride_ky, stride_kx, stride_ka, LINE)
        b_s = _products(q_ptr, o_q, m_i, stride_qe, k_ptr, o_k, m_j, stride_ke, E, STEP)
        m_s = _seen(o_i[:, None], o_j[None, :], m_own & m_i[:, None], m_j[None, :], m - n, MASK)
        o_row = _flat(place, stride_ob, stride_ot, stride_oy, stride_ox, A, 1, LINE)
        b_s = _binary(b_s, scale, b_bias, m_s)
        b_p = tl.exp2(b_s - _reference_points(lse_ptr, o_row, m_i)[:, None])
        b_slope = -tl.load(delta_ptr + o_row, mask=m_i, other=0.0)[:, None]
        if grad_ptr is not None:
            o_v = _strided(key, stride_vb, stride_vt, stride_vy, stride_vx, stride_va, LINE)
            o_g = _strided(place, stride_gb, stride_gt, stride_gy, stride_gx, stride_ga, LINE)
            b_slope += _products(grad_ptr, o_g, m_i, stride_gd, v_ptr, o_v, m_j, stride_vd, D, STEP)
        acc += b_p * b_slope
    o_part = ((i_chunk * PACK + s_i).to(tl.int64) * A + i_a) * n + o_i
    tl.store(part_ptr + (o_part[:, None] * m + o_j[None, :]), acc, mask=m_own & (o_j < m)[None, :])


@triton.jit(do_not_specialize=["parts"])
def _sum_kernel(part_ptr, out_ptr, parts, length, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """out [length]: parts [parts, length] added up, always in the same order: every BLOCK_S-th, then those sums."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_s = tl.arange(0, BLOCK_S)
    acc = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for i in tl.range(0, parts, BLOCK_S):
        m = (i + o_s < parts)[:, None] & (o < length)[None, :]
        acc += tl.load(part_ptr + ((i + o_s)[:, None].to(tl.int64) * length + o[None, :]), mask=m, other=0.0)
    tl.store(out_ptr + o, _rounded(tl.sum(acc, axis=0), out_ptr.dtype.element_ty), mask=o < length)
