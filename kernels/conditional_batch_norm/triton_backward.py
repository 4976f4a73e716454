"""Triton kernels of the gradients of the conditional norm. No atomics: sums have one order."""

import triton
import triton.language as tl
from fastvid.kernels.conditional_batch_norm.triton_forward import (
    _added,
    _frame,
    _loaded,
    _plane,
    _rate,
    _rounded,
    _scales,
)


@triton.jit
def _gathered(p_grad, o_n, o_c, H, W, stride_gy, stride_gx, stride_gc, m):
    """The gradient of an upsampled frame at the positions that it was made of: of both axes four neighbours each.

    Beyond an edge the edge itself was read, so what came out there is told to it a second time.
    """
    o_y, o_x = 2 * (o_n // W), 2 * (o_n % W)
    acc = tl.zeros(m.shape, tl.float32)
    for dx in tl.static_range(-1, 3):
        o_column = tl.minimum(tl.maximum(o_x + dx, 0), 2 * W - 1).to(tl.int64) * stride_gx
        for dy in tl.static_range(-1, 3):
            o_row = tl.minimum(tl.maximum(o_y + dy, 0), 2 * H - 1).to(tl.int64) * stride_gy
            share = (0.75 if dy == 0 or dy == 1 else 0.25) * (0.75 if dx == 0 or dx == 1 else 0.25)
            acc += share * _loaded(p_grad, o_row + o_column, o_c, stride_gc, m)
    return acc


@triton.jit(do_not_specialize=["N", "T", "H", "W", "rows", "chunks"])
def _norm_backward_kernel(
    x_ptr, mean_ptr, var_ptr, gain_ptr, bias_ptr, grad_out_ptr, grad_mean_ptr, grad_var_ptr, grad_x_ptr, part_ptr,
    N, T, H, W, rows, chunks, C, eps,
    stride_xb, stride_xt, stride_xy, stride_xx, stride_xc, stride_gb, stride_gt, stride_gy, stride_gx, stride_gc,
    RELU: tl.constexpr, UPSAMPLE: tl.constexpr, FLAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient at x [B, T, H, W, C], and of `rows` positions the sums that the other gradients are made of.

    part [chunks, B, T, 2, C]: the gradient behind the ReLU, and that times x - mean. grad_mean, grad_var: of moments
    that are x's own, over N = B H W positions; what they hand back to x is added, and may cancel what is there.
    """
    columns = tl.cdiv(C, BLOCK_C)
    i_c, i_rest = tl.program_id(0) % columns, tl.program_id(0) // columns
    i_chunk, i_bt = i_rest % chunks, i_rest // chunks
    i_b, i_t = i_bt // T, i_bt % T
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_mean, b_rate, b_gain, b_bias = _scales(mean_ptr, var_ptr, gain_ptr, bias_ptr, i_b, i_t, o_c, C, eps)
    p_x = x_ptr + _frame(i_b, i_t, stride_xb, stride_xt)
    p_grad = grad_out_ptr + _frame(i_b, i_t, stride_gb, stride_gt)
    o_frame = i_t.to(tl.int64) * C + o_c
    if grad_mean_ptr is not None:
        b_n, b_two = tl.zeros((1, BLOCK_C), tl.float32) + N, tl.full((1, BLOCK_C), 2.0, tl.float32)
        b_move = tl.div_rn(tl.load(grad_mean_ptr + o_frame, mask=o_c < C, other=0.0)[None, :], b_n)
        b_slope = tl.div_rn(b_two, b_n) * tl.load(grad_var_ptr + o_frame, mask=o_c < C, other=0.0)[None, :]
    acc_a, acc_b = tl.zeros((BLOCK_N, BLOCK_C), tl.float32), tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    end = tl.minimum((i_chunk + 1) * rows, H * W)
    for i in tl.range(i_chunk * rows, end, BLOCK_N):
        o_n = i + tl.arange(0, BLOCK_N)
        m = (o_n < end)[:, None] & (o_c < C)[None, :]
        b_x = _loaded(p_x, _plane(o_n, W, stride_xy, stride_xx, FLAT), o_c, stride_xc, m)
        if UPSAMPLE:
            b_grad = _gathered(p_grad, o_n, o_c, H, W, stride_gy, stride_gx, stride_gc, m)
        else:
            b_grad = _loaded(p_grad, _plane(o_n, W, stride_gy, stride_gx, FLAT), o_c, stride_gc, m)
        b_x -= b_mean
        if RELU:
            b_grad = tl.where(b_x * b_rate * b_gain + b_bias <= 0, 0.0, b_grad)  # NaN stays
        if part_ptr is not None:
            acc_a += b_grad
            acc_b += tl.where(m, b_grad * b_x, 0.0)
        if grad_x_ptr is not None:
            b_grad = b_grad * b_gain * b_rate
            if grad_mean_ptr is not None:
                b_grad += b_slope * b_x + b_move
            p_out = grad_x_ptr + ((i_bt.to(tl.int64) * H * W + o_n)[:, None] * C + o_c[None, :])
            tl.store(p_out, _rounded(b_grad, grad_x_ptr.dtype.element_ty), mask=m)
    if part_ptr is not None:
        samples = tl.num_programs(0) // (columns * chunks)  # B T
        p_part = part_ptr + ((i_chunk.to(tl.int64) * samples + i_bt) * 2 * C + o_c)
        tl.store(p_part, _added(acc_a), mask=o_c < C)
        tl.store(p_part + C, _added(acc_b), mask=o_c < C)


@triton.jit(do_not_specialize=["B", "T", "chunks"])
def _small_kernel(
    part_ptr, var_ptr, gain_ptr, grad_mean_ptr, grad_var_ptr, grad_gain_ptr, grad_bias_ptr, B, T, chunks, C, eps,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of a sample the gradients of gain and bias, over its frames; of a frame those of mean and var, over samples."""
    columns = tl.cdiv(C, BLOCK_C)
    i_c, i = tl.program_id(0) % columns, tl.program_id(0) // columns
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o_s, m_c = tl.arange(0, BLOCK_S), o_c < C
    of_frame = i >= B
    each = tl.where(of_frame, B, T)  # of a chunk
    acc_a, acc_b = tl.zeros((BLOCK_S, BLOCK_C), tl.float32), tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for i_s in tl.range(0, chunks * each, BLOCK_S):
        o = i_s + o_s
        m = (o < chunks * each)[:, None] & m_c[None, :]
        o_b, o_t = tl.where(of_frame, o % each, i), tl.where(of_frame, i - B, o % each)
        o_row = ((o // each).to(tl.int64) * B + o_b) * T + o_t
        p_part = part_ptr + (o_row[:, None] * 2 * C + o_c[None, :])
        b_a, b_b = tl.load(p_part, mask=m, other=0.0), tl.load(p_part + C, mask=m, other=0.0)
        p_gain = gain_ptr + (o_b[:, None].to(tl.int64) * C + o_c[None, :])
        b_gain = tl.load(p_gain, mask=m & of_frame, other=1.0)
        p_var = var_ptr + (o_t[:, None].to(tl.int64) * C + o_c[None, :])
        b_rate = tl.where(of_frame, 1.0, _rate(tl.load(p_var, mask=m, other=1.0), eps))
        acc_a += b_a * b_gain
        acc_b += b_b * b_gain * b_rate
    b_a, b_b = _added(acc_a), _added(acc_b)
    o_out = tl.where(of_frame, i - B, i).to(tl.int64) * C + o_c
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + o_out, _rounded(b_a, grad_bias_ptr.dtype.element_ty), mask=m_c & (i < B))
    if grad_gain_ptr is not None:
        tl.store(grad_gain_ptr + o_out, _rounded(b_b, grad_gain_ptr.dtype.element_ty), mask=m_c & (i < B))
    b_rate = _rate(tl.load(var_ptr + o_out, mask=m_c & of_frame, other=1.0), eps)
    if grad_mean_ptr is not None:
        tl.store(grad_mean_ptr + o_out, -b_a * b_rate, mask=m_c & of_frame)
    if grad_var_ptr is not None:
        tl.store(grad_var_ptr + o_out, -0.5 * b_b * (b_rate * b_rate * b_rate), mask=m_c & of_frame)
