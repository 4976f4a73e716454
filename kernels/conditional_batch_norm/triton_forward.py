"""Triton kernels of the moments of frames and of the conditional norm, with the upsampling behind it.

A frame's H W positions are taken in tiles; where they lie evenly in memory (FLAT) a tile needs no division.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _rounded(b, KIND: tl.constexpr):
    """float32 to the nearest of another kind; to bfloat16 by hand in Triton's interpreter, which would cut."""
    if INTERPRETED and KIND == tl.bfloat16:
        b_bits = b.to(tl.int32, bitcast=True)
        b_bits = tl.where(b == b, b_bits + 0x7FFF + ((b_bits >> 16) & 1), b_bits | 0x400000)
        return (b_bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return b.to(KIND)


@triton.jit
def _plane(o_n, W, stride_y, stride_x, FLAT: tl.constexpr):
    """64-bit offsets of positions of one frame."""
    if FLAT:
        return o_n.to(tl.int64) * stride_x
    return (o_n // W).to(tl.int64) * stride_y + (o_n % W).to(tl.int64) * stride_x


@triton.jit
def _frame(i_b, i_t, stride_b, stride_t):
    return i_b.to(tl.int64) * stride_b + i_t.to(tl.int64) * stride_t


@triton.jit
def _loaded(ptr, o_rows, o_c, stride_c, m):
    p = ptr + (o_rows[:, None] + o_c[None, :].to(tl.int64) * stride_c)
    return tl.load(p, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _added(b):
    """Sum over the first axis: first of every eight neighbours, as long sums of rounded terms drift."""
    return tl.sum(tl.sum(tl.reshape(b, (b.shape[0] // 8, 8, b.shape[1])), axis=1), axis=0)


@triton.jit
def _any_frame(
    x_ptr, o_n, i_t, HW, W, o_c, stride_xb, stride_xt, stride_xy, stride_xx, stride_xc, m, FLAT: tl.constexpr
):
    """Values at positions of one frame, counted through all samples."""
    o_b = o_n // HW
    o_row = o_b.to(tl.int64) * stride_xb + _plane(o_n - o_b * HW, W, stride_xy, stride_xx, FLAT)
    return _loaded(x_ptr, o_row + i_t.to(tl.int64) * stride_xt, o_c, stride_xc, m)


@triton.jit(do_not_specialize=["N", "T", "HW", "W", "rows"])
def _moments_kernel(
    x_ptr, part_ptr, N, T, HW, W, rows, C, stride_xb, stride_xt, stride_xy, stride_xx, stride_xc,
    FLAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The moments of `rows` of a frame's N = B H W positions, part [splits, 3, T, C].

    They are the mean of the first tile, the mean of what is beyond that, and the squared distances from the mean. Each
    place of the tile keeps a running mean of its own. So nothing cancels where x is far from zero.
    """
    columns = tl.cdiv(C, BLOCK_C)
    i_c, i_rest = tl.program_id(0) % columns, tl.program_id(0) // columns
    i_t, i_s = i_rest % T, i_rest // T
    o_i = tl.arange(0, BLOCK_N)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = (o_c < C)[None, :]
    begin = i_s * rows
    count = tl.minimum(rows, N - begin)
    b_x = _any_frame(x_ptr, begin + o_i, i_t, HW, W, o_c, stride_xb, stride_xt, stride_xy, stride_xx, stride_xc,
                     (o_i < count)[:, None] & m_c, FLAT)  # fmt: skip
    b_near = tl.sum(b_x, axis=0) / tl.minimum(count, BLOCK_N)
    acc_mean, acc_far = tl.zeros((BLOCK_N, BLOCK_C), tl.float32), tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for i in tl.range(0, count, BLOCK_N):
        m = (i + o_i < count)[:, None] & m_c
        b_x = _any_frame(x_ptr, begin + i + o_i, i_t, HW, W, o_c, stride_xb, stride_xt, stride_xy, stride_xx, stride_xc,
                         m, FLAT) - b_near[None, :]  # fmt: skip
        b_from = tl.where(m, b_x - acc_mean, 0.0)
        acc_mean += b_from * (1.0 / (i // BLOCK_N + 1))
        acc_far += b_from * tl.where(m, b_x - acc_mean, 0.0)
    b_n = tl.maximum((count - o_i + BLOCK_N - 1) // BLOCK_N, 0).to(tl.float32)[:, None]  # of a place of the tile
    b_mean = _added(acc_mean * b_n) / count
    b_from = acc_mean - b_mean[None, :]
    b_far = _added(acc_far + b_n * b_from * b_from)
    frames = T.to(tl.int64) * C
    p_part = part_ptr + ((i_s.to(tl.int64) * 3 * T + i_t) * C + o_c)
    tl.store(p_part, b_near, mask=o_c < C)
    tl.store(p_part + frames, b_mean, mask=o_c < C)
    tl.store(p_part + 2 * frames, b_far, mask=o_c < C)


@triton.jit
def _split_means(part_ptr, i, o, b_first, N, rows, splits, length, BLOCK_S: tl.constexpr):
    """How many positions BLOCK_S splits have, and their means, counted from b_first; where; and the mask."""
    o_s = i + tl.arange(0, BLOCK_S)
    m = (o_s < splits)[:, None] & (o < length)[None, :]
    b_n = tl.minimum(N - o_s * rows, rows).to(tl.float32)[:, None]
    p_part = part_ptr + (o_s[:, None].to(tl.int64) * 3 * length + o[None, :])
    b_near = tl.load(p_part, mask=m, other=0.0) - b_first
    return b_n, b_near + tl.load(p_part + length, mask=m, other=0.0), p_part, m


@triton.jit(do_not_specialize=["N", "rows", "splits", "length"])
def _merge_kernel(
    part_ptr, mean_ptr, var_ptr, N, rows, splits, length, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr
):
    """mean, var [length]: the splits' moments made into one, always in the same order."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_first = tl.load(part_ptr + o, mask=o < length, other=0.0)[None, :]
    acc = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for i in tl.range(0, splits, BLOCK_S):
        b_n, b_mean, _, m = _split_means(part_ptr, i, o, b_first, N, rows, splits, length, BLOCK_S)
        acc += tl.where(m, b_n * b_mean, 0.0)
    b_beyond = tl.sum(acc, axis=0)[None, :] / N
    acc = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for i in tl.range(0, splits, BLOCK_S):
        b_n, b_mean, p_part, m = _split_means(part_ptr, i, o, b_first, N, rows, splits, length, BLOCK_S)
        b_from = b_mean - b_beyond
        acc += tl.where(m, b_n * b_from * b_from, 0.0) + tl.load(p_part + 2 * length, mask=m, other=0.0)
    tl.store(mean_ptr + o, tl.sum(b_first + b_beyond, axis=0), mask=o < length)
    tl.store(var_ptr + o, tl.sum(acc, axis=0) / N, mask=o < length)


@triton.jit
def _rate(b_var, eps):
    """1 / deviation, each step rounded to the nearest: a few channels' work, on which gradients that cancel depend."""
    b = tl.sqrt_rn(b_var + eps)
    return tl.div_rn(tl.full(b.shape, 1.0, tl.float32), b)


@triton.jit
def _scales(mean_ptr, var_ptr, gain_ptr, bias_ptr, i_b, i_t, o_c, C, eps):
    """What a frame's channels are moved and scaled by: mean, 1 / deviation, gain and bias, [BLOCK_C] each."""
    m_c = o_c < C
    o_frame, o_sample = i_t.to(tl.int64) * C + o_c, i_b.to(tl.int64) * C + o_c
    b_mean = tl.load(mean_ptr + o_frame, mask=m_c, other=0.0)
    b_rate = _rate(tl.load(var_ptr + o_frame, mask=m_c, other=1.0), eps)
    b_gain = tl.load(gain_ptr + o_sample, mask=m_c, other=0.0).to(tl.float32)
    b_bias = tl.load(bias_ptr + o_sample, mask=m_c, other=0.0).to(tl.float32)
    return b_mean[None, :], b_rate[None, :], b_gain[None, :], b_bias[None, :]


@triton.jit
def _normal(b_x, b_mean, b_rate, b_gain, b_bias, RELU: tl.constexpr):
    b = (b_x - b_mean) * b_rate * b_gain + b_bias
    if RELU:
        b = tl.where(b < 0, 0.0, b)  # NaN stays
    return b


@triton.jit
def _put(p, b, m, KIND: tl.constexpr):
    tl.store(p, _rounded(b, KIND), mask=m)


@triton.jit(do_not_specialize=["T", "H", "W", "rows", "chunks"])
def _norm_kernel(
    x_ptr, mean_ptr, var_ptr, gain_ptr, bias_ptr, out_ptr, T, H, W, rows, chunks, C, eps,
    stride_xb, stride_xt, stride_xy, stride_xx, stride_xc,
    RELU: tl.constexpr, UPSAMPLE: tl.constexpr, FLAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`rows` of a frame's H W positions: normalised, scaled, cut at zero; upsampled, each makes four of out.

    A position in the middle of four new ones shares 1/4 of each with its neighbour there and keeps 3/4; at the edge the
    neighbour is the position itself.
    """
    columns = tl.cdiv(C, BLOCK_C)
    i_c, i_rest = tl.program_id(0) % columns, tl.program_id(0) // columns
    i_chunk, i_bt = i_rest % chunks, i_rest // chunks
    i_b, i_t = i_bt // T, i_bt % T
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_mean, b_rate, b_gain, b_bias = _scales(mean_ptr, var_ptr, gain_ptr, bias_ptr, i_b, i_t, o_c, C, eps)
    p_x = x_ptr + _frame(i_b, i_t, stride_xb, stride_xt)
    end = tl.minimum((i_chunk + 1) * rows, H * W)
    for i in tl.range(i_chunk * rows, end, BLOCK_N):
        o_n = i + tl.arange(0, BLOCK_N)
        m = (o_n < end)[:, None] & (o_c < C)[None, :]
        if not UPSAMPLE:
            b_x = _loaded(p_x, _plane(o_n, W, stride_xy, stride_xx, FLAT), o_c, stride_xc, m)
            b_out = _normal(b_x, b_mean, b_rate, b_gain, b_bias, RELU)
            p_out = out_ptr + ((i_bt.to(tl.int64) * H * W + o_n)[:, None] * C + o_c[None, :])
            _put(p_out, b_out, m, out_ptr.dtype.element_ty)
        else:
            o_y, o_x = o_n // W, o_n % W
            o_left = tl.maximum(o_x - 1, 0).to(tl.int64) * stride_xx
            o_right = tl.minimum(o_x + 1, W - 1).to(tl.int64) * stride_xx
            p_out = out_ptr + ((i_bt.to(tl.int64) * 4 * H * W + o_y.to(tl.int64) * 4 * W + 2 * o_x)[:, None] * C
                               + o_c[None, :])  # fmt: skip
            b_above, b_above_right = b_mean, b_mean
            b_here, b_here_right = b_mean, b_mean
            for dy in tl.static_range(-1, 2):
                o_row = tl.minimum(tl.maximum(o_y + dy, 0), H - 1).to(tl.int64) * stride_xy
                b_x = _loaded(p_x, o_row + o_x.to(tl.int64) * stride_xx, o_c, stride_xc, m)
                b_middle = 0.75 * _normal(b_x, b_mean, b_rate, b_gain, b_bias, RELU)
                b_x = _loaded(p_x, o_row + o_left, o_c, stride_xc, m)
                b_l = 0.25 * _normal(b_x, b_mean, b_rate, b_gain, b_bias, RELU) + b_middle
                b_x = _loaded(p_x, o_row + o_right, o_c, stride_xc, m)
                b_r = 0.25 * _normal(b_x, b_mean, b_rate, b_gain, b_bias, RELU) + b_middle
                if dy == -1:
                    b_above, b_above_right = 0.25 * b_l, 0.25 * b_r
                elif dy == 0:
                    b_here, b_here_right = 0.75 * b_l, 0.75 * b_r
                    _put(p_out, b_above + b_here, m, out_ptr.dtype.element_ty)
                    _put(p_out + C, b_above_right + b_here_right, m, out_ptr.dtype.element_ty)
                else:
                    p_out += 2 * W.to(tl.int64) * C
                    _put(p_out, b_here + 0.25 * b_l, m, out_ptr.dtype.element_ty)
                    _put(p_out + C, b_here_right + 0.25 * b_r, m, out_ptr.dtype.element_ty)
