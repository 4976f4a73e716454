"""What the Triton kernels of conv_gru share: a tile of a same-padded convolution, its channels as rows.

Channels are the rows of a tile and positions its columns: a scan of small maps has few positions, of which the matrix
instructions take as few as 16, but no less than 64 rows.
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
def _factor(b):
    """What a product takes: the interpreter would multiply the bits of bfloat16 as integers."""
    return b.to(tl.float32) if INTERPRETED and b.dtype == tl.bfloat16 else b


@triton.jit
def _sigmoid(b):
    b_fall = tl.exp(-tl.abs(b))
    return tl.where(b < 0, b_fall, 1.0) / (1.0 + b_fall)


@triton.jit
def _tanh(b):
    """tanh to two units in the last place."""
    b_fall = tl.exp(-2.0 * tl.abs(b))
    b_far = (1.0 - b_fall) / (1.0 + b_fall)
    b_square = b * b  # odd polynomial, fitted to the least relative error for |b| < 0.55: 4e-8
    b_near = ((1.643757336e-2 * b_square - 5.267180875e-2) * b_square + 1.332072467e-1) * b_square - 3.333294690e-1
    b_near = b + b * b_square * b_near
    return tl.where(tl.abs(b) < 0.55, b_near, tl.where(b < 0, -b_far, b_far))


@triton.jit
def _rows(o_n, H, W, stride_b, stride_y, stride_x):
    """64-bit offsets of positions, counted through all samples, in a frame [B, H, W, C] of some strides."""
    o_b, o_y, o_x = o_n // W // H, o_n // W % H, o_n % W
    return o_b.to(tl.int64) * stride_b + o_y.to(tl.int64) * stride_y + o_x.to(tl.int64) * stride_x


@triton.jit
def _tile_of(tiles, splits, BLOCK_N: tl.constexpr):
    """Split, tile of columns, of which there are so many, and positions of a program."""
    i_rest = tl.program_id(0) // splits
    return tl.program_id(0) % splits, i_rest % tiles, i_rest // tiles * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _convolved(
    x_ptr, weight_ptr, i_split, splits, o_o, m_o, o_n, N, H, W, CIN, stride_xb, stride_xy, stride_xx,
    K: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A share of the sums over taps and input channels, [BLOCK_O, BLOCK_N] float32.

    x: a frame [B, H, W, CIN], channels side by side, or None for zeros. weight: [columns, K, K, CIN], packed; o_o, m_o:
    its columns, and which of them there are. N: B H W. STEPS: tiles of input channels.
    """
    acc = tl.zeros((o_o.shape[0], o_n.shape[0]), tl.float32)
    if x_ptr is not None:
        HALF: tl.constexpr = K // 2
        o_i = tl.arange(0, BLOCK_I)
        m_n = o_n < N
        o_y, o_x = o_n // W % H, o_n % W
        p_x = x_ptr + (_rows(o_n, H, W, stride_xb, stride_xy, stride_xx)[None, :] + o_i[:, None])
        p_w = weight_ptr + (o_o[:, None].to(tl.int64) * (K * K * CIN) + o_i[None, :])
        total: tl.constexpr = K * K * STEPS
        one = tl.full((), 1, tl.int64)
        share = tl.cdiv(total, splits)
        for i in tl.range(i_split * share, tl.minimum((i_split + 1) * share, total)):
            i_tap, i_i = i // STEPS, (i % STEPS) * BLOCK_I
            dy, dx = i_tap // K - HALF, i_tap % K - HALF
            m_x = (m_n & (o_y + dy >= 0) & (o_y + dy < H) & (o_x + dx >= 0) & (o_x + dx < W))[None, :]
            m_w = m_o[:, None]
            if not EVEN:
                m_x = m_x & (o_i < CIN - i_i)[:, None]
                m_w = m_w & (o_i < CIN - i_i)[None, :]
            move = one * dy * stride_xy + one * dx * stride_xx + i_i
            b_w = _factor(tl.load(p_w + (one * i_tap * CIN + i_i), mask=m_w, other=0.0))
            b_x = _factor(tl.load(p_x + move, mask=m_x, other=0.0))
            acc = tl.dot(b_w, b_x, acc, input_precision="ieee")
    return acc


@triton.jit
def _gathered(acc, part_ptr, count_ptr, i_split, splits, SPLIT: tl.constexpr):
    """The whole sum, and whether this program has it: of a tile's splits the one that arrives last, in a fixed order.

    part: room for a tile of each program. count: one for each tile, zero at the start, and zero again at the end.
    """
    whole = True
    if SPLIT:
        BLOCK_O: tl.constexpr = acc.shape[0]
        BLOCK_N: tl.constexpr = acc.shape[1]
        i_tile = tl.program_id(0) // splits
        o = tl.arange(0, BLOCK_O)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        p_part = part_ptr + (i_tile.to(tl.int64) * splits * (BLOCK_O * BLOCK_N) + o)
        tl.store(p_part + i_split * (BLOCK_O * BLOCK_N), acc)
        tl.debug_barrier()  # every thread's part is on its way before the one that counts says so
        whole = tl.atomic_add(count_ptr + i_tile, 1, sem="acq_rel", scope="gpu") == splits - 1
        if whole:
            acc = tl.zeros((BLOCK_O, BLOCK_N), tl.float32)
            for i in tl.range(0, splits):
                acc += tl.load(p_part + i * (BLOCK_O * BLOCK_N), cache_modifier=".cg")  # of other multiprocessors
            tl.store(count_ptr + i_tile, 0)
    return acc, whole


@triton.jit
def _read(ptr, o_rows, o_c, m):
    """Of a frame, channels side by side, float32; [BLOCK_O, BLOCK_N] as the sums are."""
    return tl.load(ptr + (o_rows[None, :] + o_c[:, None]), mask=m, other=0.0).to(tl.float32)


@triton.jit
def _write(ptr, o_rows, o_c, b, m):
    tl.store(ptr + (o_rows[None, :] + o_c[:, None]), _rounded(b, ptr.dtype.element_ty), mask=m)
