"""Triton kernel of the convolution over live taps, with the gate behind it; the helpers that its backward shares."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
NONE, GATE, GLU = (tl.constexpr(number) for number in range(3))
NOWHERE = tl.constexpr(-(2**30))  # a row and a column that no tap brings into the grid


@triton.jit
def _rounded(b, KIND: tl.constexpr):
    """float32 to the nearest of another kind; to bfloat16 by hand in Triton's interpreter, which would cut."""
    if INTERPRETED and KIND == tl.bfloat16:
        b_bits = b.to(tl.int32, bitcast=True)
        b_bits = tl.where(b == b, b_bits + 0x7FFF + ((b_bits >> 16) & 1), b_bits | 0x400000)
        return (b_bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return b.to(KIND)


@triton.jit
def _factor(b):
    """What a product takes: the interpreter would multiply the bits of bfloat16 as integers."""
    return b.to(tl.float32) if INTERPRETED and b.dtype == tl.bfloat16 else b


@triton.jit
def _tanh(b):
    """tanh to two units in the last place, and the sign-free exp(-2 |b|) that its derivative is made of."""
    b_fall = tl.exp(-2.0 * tl.abs(b))
    b_far = (1.0 - b_fall) / (1.0 + b_fall)
    b_square = b * b  # odd polynomial, fitted to the least relative error for |b| < 0.55: 4e-8
    b_near = ((1.643757336e-2 * b_square - 5.267180875e-2) * b_square + 1.332072467e-1) * b_square - 3.333294690e-1
    b_near = b + b * b_square * b_near
    return tl.where(tl.abs(b) < 0.55, b_near, tl.where(b < 0, -b_far, b_far)), b_fall


@triton.jit
def _sigmoid(b):
    """sigmoid, and the exp(-|b|) that its derivative is made of."""
    b_fall = tl.exp(-tl.abs(b))
    return tl.where(b < 0, b_fall, 1.0) / (1.0 + b_fall), b_fall


@triton.jit
def _place(o_p, HO, WO):
    """Sample, row and column of the positions of one frame, counted through all samples."""
    b_rest = o_p // WO
    return b_rest // HO, b_rest % HO, o_p % WO


@triton.jit
def _strided(o_b, i_t, o_y, o_x, stride_b, stride_t, stride_y, stride_x):
    """64-bit offsets of positions of frame i_t in a tensor [B, T, H, W, C]."""
    o = o_b.to(tl.int64) * stride_b + o_y.to(tl.int64) * stride_y + o_x.to(tl.int64) * stride_x
    return o + i_t.to(tl.int64) * stride_t


@triton.jit
def _with(acc, ptr, o_rows, stride_c, o_c, m):
    """acc plus what an addend or a residual has there."""
    p = ptr + o_rows[:, None] + o_c[None, :].to(tl.int64) * stride_c
    return acc + tl.load(p, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _halves(acc):
    """The first and the second half of the columns."""
    N: tl.constexpr = acc.shape[0]
    HALF: tl.constexpr = acc.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(acc, (N, 2, HALF)), (0, 2, 1)))


@triton.jit
def _finish(
    acc_a, acc_b, residual_ptr, out_ptr, pre_ptr, o_out, o_row, m_n, o_o, COLUMNS, stride_rc, ACTIVATION: tl.constexpr
):
    """Stores the sums where they are wanted, and what follows from them."""
    m = m_n[:, None] & (o_o < COLUMNS)[None, :]
    if pre_ptr is not None:
        p_pre = pre_ptr + (o_out[:, None] * (2 * COLUMNS) + o_o[None, :])
        tl.store(p_pre, _rounded(acc_a, pre_ptr.dtype.element_ty), mask=m)
        tl.store(p_pre + COLUMNS, _rounded(acc_b, pre_ptr.dtype.element_ty), mask=m)
    if ACTIVATION != NONE:
        b_s, _ = _sigmoid(acc_b)
        if ACTIVATION == GATE:
            acc_a, _ = _tanh(acc_a)
        acc_a *= b_s
    if residual_ptr is not None:
        acc_a = _with(acc_a, residual_ptr, o_row, stride_rc, o_o, m)
    tl.store(out_ptr + (o_out[:, None] * COLUMNS + o_o[None, :]), _rounded(acc_a, out_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["positions", "TO", "HO", "WO", "H", "W", "start_t", "start_y", "start_x"])
def _conv_kernel(
    x_ptr, weight_ptr, bias_ptr, addend_ptr, residual_ptr, out_ptr, pre_ptr, taps_ptr, frames_ptr,
    positions, TO, HO, WO, H, W, start_t, start_y, start_x, CIN, COLUMNS,
    stride_xb, stride_xt, stride_xy, stride_xx, stride_xc, stride_wt, stride_wi, stride_wo,
    stride_ab, stride_at, stride_ay, stride_ax, stride_ac, stride_rb, stride_rt, stride_ry, stride_rx, stride_rc,
    ACTIVATION: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A tile of positions of one frame by BLOCK_O columns of the result; a gate has two sums, fed by one tile of x.

    positions: B HO WO, of one frame of the result [B, TO, HO, WO, COLUMNS]; H, W: of x, whose position `start` belongs
    to the result's first. taps [live, 4] int32: offset and slice of the weight, sorted by dt; frames [TO, 2]: the taps
    that lie inside for a frame. Column n of a gate is n and n + COLUMNS of the weight. STEPS: tiles of input channels.
    """
    columns = tl.cdiv(COLUMNS, BLOCK_O)
    i_tile, i_o = tl.program_id(0) // columns, tl.program_id(0) % columns
    tiles = tl.cdiv(positions, BLOCK_N)
    i_t = TO - 1 - i_tile // tiles  # frames with the most taps first
    o_n = (i_tile % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_i = tl.arange(0, BLOCK_I)
    m_n, m_o = o_n < positions, o_o < COLUMNS
    o_b, o_y, o_x = _place(o_n, HO, WO)

    acc_a = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    acc_b = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    m = m_n[:, None] & m_o[None, :]
    # before the products: afterwards registers are scarce
    if bias_ptr is not None:
        acc_a += tl.load(bias_ptr + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION != NONE:
            acc_b += tl.load(bias_ptr + COLUMNS + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    if addend_ptr is not None:
        o_row = _strided(o_b, i_t, o_y, o_x, stride_ab, stride_at, stride_ay, stride_ax)
        acc_a = _with(acc_a, addend_ptr, o_row, stride_ac, o_o, m)
        if ACTIVATION != NONE:
            acc_b = _with(acc_b, addend_ptr, o_row, stride_ac, o_o + COLUMNS, m)

    o_y = tl.where(m_n, o_y + start_y, NOWHERE)
    o_x += start_x
    o_row = _strided(o_b, i_t + start_t, o_y, o_x, stride_xb, stride_xt, stride_xy, stride_xx)
    p_x = x_ptr + (o_row[:, None] + o_i[None, :].to(tl.int64) * stride_xc)
    p_w = weight_ptr + (o_i[:, None].to(tl.int64) * stride_wi + o_o[None, :].to(tl.int64) * stride_wo)
    half = tl.full((), COLUMNS, tl.int64) * stride_wo
    first, last = tl.load(frames_ptr + 2 * i_t), tl.load(frames_ptr + 2 * i_t + 1)
    p_tap = taps_ptr + 4 * first
    dt, dy, dx, i_w = tl.load(p_tap), tl.load(p_tap + 1), tl.load(p_tap + 2), tl.load(p_tap + 3)
    for i in tl.range(first * STEPS, last * STEPS):
        i_i = (i % STEPS) * BLOCK_I
        m_y = (o_y + dy >= 0) & (o_y + dy < H)
        m_x = (m_y & (o_x + dx >= 0) & (o_x + dx < W))[:, None]
        m_w = m_o[None, :]
        if not EVEN:
            m_x = m_x & (o_i < CIN - i_i)[None, :]
            m_w = m_w & (o_i < CIN - i_i)[:, None]
        move = dt.to(tl.int64) * stride_xt + dy.to(tl.int64) * stride_xy + dx.to(tl.int64) * stride_xx
        b_x = _factor(tl.load(p_x + (move + i_i.to(tl.int64) * stride_xc), mask=m_x, other=0.0))
        p_slice = p_w + (i_w.to(tl.int64) * stride_wt + i_i.to(tl.int64) * stride_wi)
        b_a = _factor(tl.load(p_slice, mask=m_w, other=0.0))
        acc_a = tl.dot(b_x, b_a, acc_a, input_precision="ieee")
        if ACTIVATION != NONE:
            b_b = _factor(tl.load(p_slice + half, mask=m_w, other=0.0))
            acc_b = tl.dot(b_x, b_b, acc_b, input_precision="ieee")
        # of the next step, so that its tiles are not behind two loads; the table ends with a tap that is not taken
        p_tap = taps_ptr + 4 * ((i + 1) // STEPS)
        dt, dy, dx, i_w = tl.load(p_tap), tl.load(p_tap + 1), tl.load(p_tap + 2), tl.load(p_tap + 3)

    # the last tap's slice is not negative: nothing is added, but the compiler cannot know, and so the positions are
    # worked out again in place of filling registers all through the loop
    o_n += i_w >> 31
    m_n = o_n < positions
    o_b, o_y, o_x = _place(o_n, HO, WO)
    o_out = ((o_b.to(tl.int64) * TO + i_t) * HO + o_y) * WO + o_x
    o_row = _strided(o_b, i_t, o_y, o_x, stride_rb, stride_rt, stride_ry, stride_rx)
    if BLOCK_O > 64 and ACTIVATION != NONE:  # one half after the other, for want of registers
        acc_a, acc_c = _halves(acc_a)
        acc_b, acc_d = _halves(acc_b)
        o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O // 2)
        _finish(acc_a, acc_b, residual_ptr, out_ptr, pre_ptr, o_out, o_row, m_n, o_o, COLUMNS, stride_rc, ACTIVATION)
        o_o += BLOCK_O // 2
        _finish(acc_c, acc_d, residual_ptr, out_ptr, pre_ptr, o_out, o_row, m_n, o_o, COLUMNS, stride_rc, ACTIVATION)
    else:
        _finish(acc_a, acc_b, residual_ptr, out_ptr, pre_ptr, o_out, o_row, m_n, o_o, COLUMNS, stride_rc, ACTIVATION)
