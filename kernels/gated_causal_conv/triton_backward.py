"""Triton kernels of the gradients: of the activation, of the weight, the sum of parts. No atomics: one order."""

import triton
import triton.language as tl
from fastvid.kernels.gated_causal_conv.triton_forward import GATE, NONE, _factor, _rounded, _sigmoid, _strided, _tanh


@triton.jit
def _incoming(ptr, o_rows, stride_c, o_c, m):
    p = ptr + o_rows[:, None] + o_c[None, :].to(tl.int64) * stride_c
    return tl.load(p, mask=m, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N", "T", "H", "W", "rows"])
def _gate_kernel(
    pre_ptr, grad_out_ptr, grad_pre_ptr, grad_ptr, part_ptr, N, T, H, W, rows, COLUMNS,
    stride_gb, stride_gt, stride_gy, stride_gx, stride_gc, stride_pb, stride_pt, stride_py, stride_px, stride_pc,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Gradient at the pre-activation sum [N, Cout], and its column sums over `rows` positions, part [chunks, Cout].

    COLUMNS: of grad_out; pre, grad_pre and grad have twice as many where there is an activation.
    """
    columns = tl.cdiv(COLUMNS, BLOCK_O)
    i_chunk, i_o = tl.program_id(0) // columns, tl.program_id(0) % columns
    WIDE: tl.constexpr = 1 if ACTIVATION == NONE else 2
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < COLUMNS
    begin = i_chunk.to(tl.int64) * rows
    end = tl.minimum(begin + rows, N)
    acc_a, acc_b = tl.zeros((BLOCK_N, BLOCK_O), tl.float32), tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for i_n in tl.range(begin, end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m = (o_n < end)[:, None] & m_o[None, :]
        o_flat = o_n[:, None] * (COLUMNS * WIDE) + o_o[None, :]
        b_n = o_n.to(tl.int32)
        o_x, o_y, o_t, o_b = b_n % W, b_n // W % H, b_n // (W * H) % T, b_n // (W * H) // T
        b_out, b_other = tl.zeros((BLOCK_N, BLOCK_O), tl.float32), tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
        if grad_out_ptr is not None:
            o_row = _strided(o_b, o_t, o_y, o_x, stride_gb, stride_gt, stride_gy, stride_gx)
            b_out = _incoming(grad_out_ptr, o_row, stride_gc, o_o, m)
        if ACTIVATION != NONE and grad_out_ptr is not None:
            b_a = tl.load(pre_ptr + o_flat, mask=m, other=0.0).to(tl.float32)
            b_b = tl.load(pre_ptr + o_flat + COLUMNS, mask=m, other=0.0).to(tl.float32)
            b_s, b_fall = _sigmoid(b_b)
            b_slope = b_fall / ((1.0 + b_fall) * (1.0 + b_fall))  # of the sigmoid
            if ACTIVATION == GATE:
                b_a, b_fall = _tanh(b_a)
                b_other = b_out * b_a * b_slope
                b_out *= b_s * (4.0 * b_fall / ((1.0 + b_fall) * (1.0 + b_fall)))
            else:
                b_other = b_out * b_a * b_slope
                b_out *= b_s
        if grad_pre_ptr is not None:
            o_row = _strided(o_b, o_t, o_y, o_x, stride_pb, stride_pt, stride_py, stride_px)
            b_out += _incoming(grad_pre_ptr, o_row, stride_pc, o_o, m)
            if ACTIVATION != NONE:
                b_other += _incoming(grad_pre_ptr, o_row, stride_pc, o_o + COLUMNS, m)
        if grad_ptr is not None:
            tl.store(grad_ptr + o_flat, _rounded(b_out, grad_ptr.dtype.element_ty), mask=m)
            if ACTIVATION != NONE:
                tl.store(grad_ptr + o_flat + COLUMNS, _rounded(b_other, grad_ptr.dtype.element_ty), mask=m)
        if part_ptr is not None:
            acc_a += tl.where(m, b_out, 0.0)
            acc_b += tl.where(m, b_other, 0.0)
    if part_ptr is not None:
        p_part = part_ptr + i_chunk.to(tl.int64) * (COLUMNS * WIDE) + o_o
        tl.store(p_part, tl.sum(acc_a, axis=0), mask=m_o)
        if ACTIVATION != NONE:
            tl.store(p_part + COLUMNS, tl.sum(acc_b, axis=0), mask=m_o)


@triton.jit(do_not_specialize=["B", "T", "TO", "HO", "WO", "H", "W", "start_t", "start_y", "start_x", "taps", "splits"])
def _weight_kernel(
    x_ptr, grad_ptr, part_ptr, taps_ptr, B, T, TO, HO, WO, H, W, start_t, start_y, start_x, taps, splits, CIN, COUT,
    stride_xb, stride_xt, stride_xy, stride_xx, stride_xc,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Of one tap a tile of its gradient [CIN, COUT], summed over one of `splits` shares of its positions.

    part: [splits, taps, CIN, COUT]; taps [taps, 3] int32; grad: [B, TO, HO, WO, COUT]. Positions are taken block by
    block of the frame's plane, each block through all frames that the tap lies inside of, so that what depends on rows
    and columns is computed once for all frames.
    """
    columns = tl.cdiv(COUT, BLOCK_O)
    depths = tl.cdiv(CIN, BLOCK_I)
    i_o = tl.program_id(0) % columns
    i_rest = tl.program_id(0) // columns
    i_i = i_rest % depths
    i_rest = i_rest // depths
    i_tap, i_split = i_rest % taps, i_rest // taps
    p_tap = taps_ptr + 3 * i_tap
    dt, dy, dx = tl.load(p_tap), tl.load(p_tap + 1), tl.load(p_tap + 2)
    begin_t = tl.maximum(0, -start_t - dt)
    frames = tl.maximum(tl.minimum(TO, T - start_t - dt) - begin_t, 0)
    total = tl.cdiv(HO * WO, BLOCK_N).to(tl.int64) * B * frames
    share = tl.cdiv(total, splits)
    begin = tl.minimum(i_split * share, total)
    end = tl.minimum(begin + share, total)

    o_i = i_i * BLOCK_I + tl.arange(0, BLOCK_I)
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_i, m_o = o_i < CIN, o_o < COUT
    acc = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    run = tl.maximum(B * frames, 1)  # blocks of one place, one for each frame
    for i_place in tl.range((begin // run).to(tl.int32), tl.cdiv(end, run).to(tl.int32), num_stages=1):
        o_n = i_place * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < HO * WO
        o_y, o_x = o_n // WO + (start_y + dy), o_n % WO + (start_x + dx)
        m_x = m_n & (o_y >= 0) & (o_y < H) & (o_x >= 0) & (o_x < W)
        o_row = o_y.to(tl.int64) * stride_xy + o_x.to(tl.int64) * stride_xx
        p_x = x_ptr + (o_i[:, None].to(tl.int64) * stride_xc + o_row[None, :])  # turned: [BLOCK_I, BLOCK_N]
        p_grad = grad_ptr + (o_n[:, None].to(tl.int64) * COUT + o_o[None, :])
        i_first = tl.maximum(begin - i_place * run, 0).to(tl.int32)
        i_last = tl.minimum(end - i_place * run, run).to(tl.int32)
        i_b, i_t = (i_first // tl.maximum(frames, 1)).to(tl.int64), i_first % tl.maximum(frames, 1) + begin_t
        for _ in tl.range(i_first, i_last):
            move = i_b * stride_xb + (i_t + (start_t + dt)).to(tl.int64) * stride_xt
            b_x = _factor(tl.load(p_x + move, mask=m_i[:, None] & m_x[None, :], other=0.0))
            o_frame = (i_b * TO + i_t) * (HO * WO) * COUT
            b_grad = _factor(tl.load(p_grad + o_frame, mask=m_n[:, None] & m_o[None, :], other=0.0))
            acc = tl.dot(b_x, b_grad, acc, input_precision="ieee")
            i_t += 1
            full = i_t == begin_t + frames
            i_b, i_t = i_b + full.to(tl.int64), tl.where(full, begin_t, i_t)
    p_part = part_ptr + ((i_split.to(tl.int64) * taps + i_tap) * CIN + o_i[:, None]) * COUT + o_o[None, :]
    tl.store(p_part, _rounded(acc, part_ptr.dtype.element_ty), mask=m_i[:, None] & m_o[None, :])


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
