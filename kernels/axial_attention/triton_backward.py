"""Triton kernels of the gradients: whole boxes in one tile, long ones by queries and by keys; no atomics, one order."""

import triton
import triton.language as tl
from fastvid.kernels.axial_attention.triton_forward import (
    EVERYTHING,
    LOG2E,
    _bias,
    _binary,
    _factor,
    _places,
    _product,
    _products,
    _read,
    _rounded,
    _seen,
    _strided,
    _write,
)


@triton.jit
def _reference_points(lse_ptr, o_row, m_i):
    """What P = exp2(scores - it) takes: lse for exp2, and infinity where there is no query or it sees nothing."""
    b_lse = tl.load(lse_ptr + o_row, mask=m_i, other=float("inf"))
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)


@triton.jit
def _flat(place, stride_b, stride_t, stride_y, stride_x, row, WIDTH: tl.constexpr, LINE: tl.constexpr):
    """Offsets of places in a tensor whose positions are `row` elements apart and whose heads are WIDTH apart."""
    return _strided(place, stride_b, stride_t, stride_y, stride_x, 0, LINE) * row + place[4] * WIDTH


@triton.jit
def _less(b, ptr, o_row, m_i):
    """b less what is there."""
    if ptr is not None:
        b -= tl.load(ptr + o_row, mask=m_i, other=0.0)
    return b


@triton.jit(do_not_specialize=["units", "CT", "CY", "CX", "QT", "QY", "QX", "KT", "KY", "KX"])
def _box_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, grad_ptr, lse_ptr, grad_lse_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr,
    delta_ptr, units, CT, CY, CX, QT, QY, QX, KT, KY, KX, A, scale, row_q, row_k, row_v,
    stride_qb, stride_qt, stride_qy, stride_qx, stride_qa, stride_qe,
    stride_kb, stride_kt, stride_ky, stride_kx, stride_ka, stride_ke,
    stride_vb, stride_vt, stride_vy, stride_vx, stride_va, stride_vd,
    stride_gb, stride_gt, stride_gy, stride_gx, stride_ga, stride_gd,
    stride_ba, stride_bi, stride_bj, stride_ob, stride_ot, stride_oy, stride_ox,
    stride_pb, stride_pt, stride_py, stride_px,
    E: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, LINE: tl.constexpr, WHOLE: tl.constexpr,
    PACK: tl.constexpr, SLOT_N: tl.constexpr, SLOT_M: tl.constexpr, STEP: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All gradients of units that fit one tile, keys down and queries across; slots as in _tile_kernel.

    grad: of out. Strides o and p count positions of queries and keys; row_q, row_k, row_v: elements from one position
    to the next in the gradients. delta is for _bias_kernel. With a bias it is had from out, as it is for long boxes;
    without, out is not read and the same sums are had from P and its gradient.
    """
    n, m = QT * QY * QX, KT * KY * KX
    columns: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i_tile = tl.program_id(0)
    o_i, o_j = tl.arange(0, PACK * SLOT_N), tl.arange(0, PACK * SLOT_M)
    if PACK == 1:
        i_u, i_v = i_tile, i_tile
        m_i, m_j = o_i < n, o_j < m
        m_own = m_i[None, :]
    else:
        i_u, i_v = i_tile * PACK + o_i // SLOT_N, i_tile * PACK + o_j // SLOT_M
        o_i, o_j = o_i % SLOT_N, o_j % SLOT_M
        m_i, m_j = (o_i < n) & (i_u < units), (o_j < m) & (i_v < units)
        m_own = m_i[None, :] & (i_u[None, :] == i_v[:, None])
    place = _places(i_u, o_i, A, CT, CY, CX, QT, QY, QX, LINE)
    key = _places(i_v, o_j, A, CT, CY, CX, KT, KY, KX, LINE)
    o_v = _strided(key, stride_vb, stride_vt, stride_vy, stride_vx, stride_va, LINE)
    o_g = _strided(place, stride_gb, stride_gt, stride_gy, stride_gx, stride_ga, LINE)
    o_q = _strided(place, stride_qb, stride_qt, stride_qy, stride_qx, stride_qa, LINE)
    o_k = _strided(key, stride_kb, stride_kt, stride_ky, stride_kx, stride_ka, LINE)
    o_row = _flat(place, stride_ob, stride_ot, stride_oy, stride_ox, A, 1, LINE)

    if STEP >= E:
        b_q = _read(q_ptr, o_q, m_i, stride_qe, 0, E, BLOCK_E)
        b_k = _read(k_ptr, o_k, m_j, stride_ke, 0, E, BLOCK_E)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
    else:
        b_s = _products(k_ptr, o_k, m_j, stride_ke, q_ptr, o_q, m_i, stride_qe, E, STEP)
    m_own = _seen(o_i[None, :], o_j[:, None], m_own, m_j[:, None], m - n, MASK)
    i_a = place[4] if PACK == 1 else place[4][None, :]
    b_bias = _bias(bias_ptr, i_a, o_i[None, :], o_j[:, None], m_i[None, :], m_j[:, None], stride_ba, stride_bi,
                   stride_bj, WHOLE)  # fmt: skip
    b_s = _binary(b_s, scale, b_bias, m_own)
    b_p = tl.exp2(b_s - _reference_points(lse_ptr, o_row, m_i)[None, :])
    b_slope = tl.zeros((PACK * SLOT_M, PACK * SLOT_N), tl.float32)
    b_delta = tl.zeros((PACK * SLOT_N,), tl.float32)
    for i in tl.static_range(columns):
        b_v_grad = tl.zeros((PACK * SLOT_M, BLOCK_D), tl.float32)
        if grad_ptr is not None:
            b_g = _read(grad_ptr, o_g, m_i, stride_gd, i * BLOCK_D, D, BLOCK_D)
            b_v = _read(v_ptr, o_v, m_j, stride_vd, i * BLOCK_D, D, BLOCK_D)
            b_slope = tl.dot(b_v, tl.trans(b_g), b_slope, input_precision="ieee")
            if bias_ptr is not None:
                b_out = _read(out_ptr, o_row * D, m_i, 1, i * BLOCK_D, D, BLOCK_D)
                b_delta += tl.sum(b_g.to(tl.float32) * b_out.to(tl.float32), axis=1)
            if grad_v_ptr is not None:
                b_v_grad = _product(b_p, b_g, q_ptr.dtype.element_ty)
        if grad_v_ptr is not None:
            o_out = _flat(key, stride_pb, stride_pt, stride_py, stride_px, row_v, D, LINE)
            _write(grad_v_ptr, o_out, m_j, i * BLOCK_D, b_v_grad, D, BLOCK_D)
    if bias_ptr is None:
        b_delta = tl.sum(b_p * b_slope, axis=0)
    b_delta = _less(b_delta, grad_lse_ptr, o_row, m_i)
    if delta_ptr is not None:
        tl.store(delta_ptr + o_row, b_delta, mask=m_i)
    b_p = _factor(_rounded(b_p * (b_slope - b_delta[None, :]) * scale, q_ptr.dtype.element_ty))
    if grad_k_ptr is not None:
        o_out = _flat(key, stride_pb, stride_pt, stride_py, stride_px, row_k, E, LINE)
        if STEP < E:
            b_q = _read(q_ptr, o_q, m_i, stride_qe, 0, E, BLOCK_E)
        b_grad = tl.dot(b_p, b_q, input_precision="ieee")
        _write(grad_k_ptr, o_out, m_j, 0, b_grad, E, BLOCK_E)
    if grad_q_ptr is not None:
        o_out = _flat(place, stride_ob, stride_ot, stride_oy, stride_ox, row_q, E, LINE)
        if STEP < E:
            b_k = _read(k_ptr, o_k, m_j, stride_ke, 0, E, BLOCK_E)
        b_grad = tl.dot(tl.trans(b_p), b_k, input_precision="ieee")
        _write(grad_q_ptr, o_out, m_i, 0, b_grad, E, BLOCK_E)


@triton.jit(do_not_specialize=["CT", "CY", "CX", "QT", "QY", "QX", "KT", "KY", "KX"])
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, grad_ptr, lse_ptr, grad_lse_ptr, grad_q_ptr, delta_ptr,
    CT, CY, CX, QT, QY, QX, KT, KY, KX, A, scale, row_q,
    stride_qb, stride_qt, stride_qy, stride_qx, stride_qa, stride_qe,
    stride_kb, stride_kt, stride_ky, stride_kx, stride_ka, stride_ke,
    stride_vb, stride_vt, stride_vy, stride_vx, stride_va, stride_vd,
    stride_gb, stride_gt, stride_gy, stride_gx, stride_ga, stride_gd,
    stride_ba, stride_bi, stride_bj, stride_ob, stride_ot, stride_oy, stride_ox,
    E: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, LINE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STEP: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_N queries of one unit delta = sum of grad out - grad_lse, for the other kernels, and the gradient."""
    n, m = QT * QY * QX, KT * KY * KX
    tiles = tl.cdiv(n, BLOCK_N)
    i_u, i_first = tl.program_id(0) // tiles, (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_N
    o_i, o_c = i_first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    m_i = o_i < n
    place = _places(i_u, o_i, A, CT, CY, CX, QT, QY, QX, LINE)
    o_row = _flat(place, stride_ob, stride_ot, stride_oy, stride_ox, A, 1, LINE)
    b_delta = tl.zeros((BLOCK_N,), tl.float32)
    if grad_ptr is not None:
        o_g = _strided(place, stride_gb, stride_gt, stride_gy, stride_gx, stride_ga, LINE)
        b_g = _read(grad_ptr, o_g, m_i, stride_gd, 0, D, BLOCK_D)
        b_out = _read(out_ptr, o_row * D, m_i, 1, 0, D, BLOCK_D)
        b_delta = tl.sum(b_g.to(tl.float32) * b_out.to(tl.float32), axis=1)
    b_delta = _less(b_delta, grad_lse_ptr, o_row, m_i)
    tl.store(delta_ptr + o_row, b_delta, mask=m_i)
    if grad_q_ptr is not None:
        o_q = _strided(place, stride_qb, stride_qt, stride_qy, stride_qx, stride_qa, LINE)
        if STEP >= E:
            b_q = _read(q_ptr, o_q, m_i, stride_qe, 0, E, BLOCK_E)
        b_lse = _reference_points(lse_ptr, o_row, m_i)
        end = m
        if MASK != EVERYTHING:
            end = tl.minimum(m, tl.maximum(0, tl.minimum(i_first + BLOCK_N, n) + (m - n)))
        acc = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        for i_j in tl.range(0, end, BLOCK_M):
            o_j = i_j + o_c
            m_j = o_j < end
            key = _places(i_u, o_j, A, CT, CY, CX, KT, KY, KX, LINE)
            o_k = _strided(key, stride_kb, stride_kt, stride_ky, stride_kx, stride_ka, LINE)
            if STEP >= E:
                b_k = _read(k_ptr, o_k, m_j, stride_ke, 0, E, BLOCK_E)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            else:
                b_s = _products(q_ptr, o_q, m_i, stride_qe, k_ptr, o_k, m_j, stride_ke, E, STEP)
            m_s = _seen(o_i[:, None], o_j[None, :], m_i[:, None], m_j[None, :], m - n, MASK)
            b_bias = _bias(bias_ptr, place[4], o_i[:, None], o_j[None, :], m_i[:, None], m_j[None, :], stride_ba,
                           stride_bi, stride_bj, WHOLE)  # fmt: skip
            b_s = _binary(b_s, scale, b_bias, m_s)
            b_p = tl.exp2(b_s - b_lse[:, None])
            if grad_ptr is not None:
                o_v = _strided(key, stride_vb, stride_vt, stride_vy, stride_vx, stride_va, LINE)
                if STEP >= D:
                    b_v = _read(v_ptr, o_v, m_j, stride_vd, 0, D, BLOCK_D)
                    b_p *= tl.dot(b_g, tl.trans(b_v), input_precision="ieee") - b_delta[:, None]
                else:
                    b_slope = _products(grad_ptr, o_g, m_i, stride_gd, v_ptr, o_v, m_j, stride_vd, D, STEP)
                    b_p *= b_slope - b_delta[:, None]
            else:
                b_p *= -b_delta[:, None]
            if STEP < E:
                b_k = _read(k_ptr, o_k, m_j, stride_ke, 0, E, BLOCK_E)
            b_p = _factor(_rounded(b_p * scale, q_ptr.dtype.element_ty))
            acc = tl.dot(b_p, b_k, acc, input_precision="ieee")
        o_out = _flat(place, stride_ob, stride_ot, stride_oy, stride_ox, row_q, E, LINE)
        _write(grad_q_ptr, o_out, m_i, 0, acc, E, BLOCK_E)


@triton.jit(do_not_specialize=["CT", "CY", "CX", "QT", "QY", "QX", "KT", "KY", "KX"])
def _keys_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, grad_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    CT, CY, CX, QT, QY, QX, KT, KY, KX, A, scale, row_k, row_v,
    stride_qb, stride_qt, stride_qy, stride_qx, stride_qa, stride_qe,
    stride_kb, stride_kt, stride_ky, stride_kx, stride_ka, stride_ke,
    stride_vb, stride_vt, stride_vy, stride_vx, stride_va, stride_vd,
    stride_gb, stride_gt, stride_gy, stride_gx, stride_ga, stride_gd,
    stride_ba, stride_bi, stride_bj, stride_ob, stride_ot, stride_oy, stride_ox,
    stride_pb, stride_pt, stride_py, stride_px,
    E: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, LINE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STEP: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_M keys and values of one unit, keys down, through its queries in tiles of BLOCK_N."""
    n, m = QT * QY * QX, KT * KY * KX
    tiles = tl.cdiv(m, BLOCK_M)
    i_u, i_first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    o_j, o_c = i_first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m_j = o_j < m
    key = _places(i_u, o_j, A, CT, CY, CX, KT, KY, KX, LINE)
    o_k = _strided(key, stride_kb, stride_kt, stride_ky, stride_kx, stride_ka, LINE)
    o_v = _strided(key, stride_vb, stride_vt, stride_vy, stride_vx, stride_va, LINE)
    if STEP >= E:
        b_k = _read(k_ptr, o_k, m_j, stride_ke, 0, E, BLOCK_E)
    if grad_ptr is not None and STEP >= D:
        b_v = _read(v_ptr, o_v, m_j, stride_vd, 0, D, BLOCK_D)
    begin = 0
    if MASK != EVERYTHING:  # query i is the first that may see key i - (m - n)
        begin = tl.maximum(0, i_first - (m - n)) // BLOCK_N * BLOCK_N
    acc_k = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    acc_v = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i_i in tl.range(begin, n, BLOCK_N):
        o_i = i_i + o_c
        m_i = o_i < n
        place = _places(i_u, o_i, A, CT, CY, CX, QT, QY, QX, LINE)
        o_row = _flat(place, stride_ob, stride_ot, stride_oy, stride_ox, A, 1, LINE)
        o_q = _strided(place, stride_qb, stride_qt, stride_qy, stride_qx, stride_qa, LINE)
        if STEP >= E:
            b_q = _read(q_ptr, o_q, m_i, stride_qe, 0, E, BLOCK_E)
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        else:
            b_s = _products(k_ptr, o_k, m_j, stride_ke, q_ptr, o_q, m_i, stride_qe, E, STEP)
        m_s = _seen(o_i[None, :], o_j[:, None], m_i[None, :], m_j[:, None], m - n, MASK)
        b_bias = _bias(bias_ptr, key[4], o_i[None, :], o_j[:, None], m_i[None, :], m_j[:, None], stride_ba, stride_bi,
                       stride_bj, WHOLE)  # fmt: skip
        b_s = _binary(b_s, scale, b_bias, m_s)
        b_p = tl.exp2(b_s - _reference_points(lse_ptr, o_row, m_i)[None, :])
        b_delta = tl.load(delta_ptr + o_row, mask=m_i, other=0.0)
        if grad_ptr is not None:
            o_g = _strided(place, stride_gb, stride_gt, stride_gy, stride_gx, stride_ga, LINE)
            b_g = _read(grad_ptr, o_g, m_i, stride_gd, 0, D, BLOCK_D)
            b_weights = _factor(_rounded(b_p, q_ptr.dtype.element_ty))
            acc_v = tl.dot(b_weights, b_g, acc_v, input_precision="ieee")
            if STEP >= D:
                b_p *= tl.dot(b_v, tl.trans(b_g), input_precision="ieee") - b_delta[None, :]
            else:
                b_slope = _products(v_ptr, o_v, m_j, stride_vd, grad_ptr, o_g, m_i, stride_gd, D, STEP)
                b_p *= b_slope - b_delta[None, :]
        else:
            b_p *= -b_delta[None, :]
        if STEP < E:
            b_q = _read(q_ptr, o_q, m_i, stride_qe, 0, E, BLOCK_E)
        b_p = _factor(_rounded(b_p * scale, q_ptr.dtype.element_ty))
        acc_k = tl.dot(b_p, b_q, acc_k, input_precision="ieee")
    if grad_k_ptr is not None:
        o_out = _flat(key, stride_pb, stride_pt, stride_py, stride_px, row_k, E, LINE)
        _write(grad_k_ptr, o_out, m_j, 0, acc_k, E, BLOCK_E)
    if grad_v_ptr is not None:
        o_out = _flat(key, stride_pb, stride_pt, stride_py, stride_px, row_v, D, LINE)
        _write(grad_v_ptr, o_out, m_j, 0, acc_v, D, BLOCK_D)
