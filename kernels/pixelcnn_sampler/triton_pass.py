"""Triton kernels of what is known before a row's first code: earlier frames, the vertical stream, the noise.

Rows of cells are m = b W + x. A matrix comes as its packed panels (packed.py): lanes 0..7 and 8..15 of a panel are two
halves, "low" and "high", of which a gate takes the tanh and the sigmoid; columns of results keep the panels' order.
Every output is added up in one order that knows nothing of the batch.
"""

import triton
import triton.language as tl
from fastvid.kernels.pixelcnn_sampler.packed import LAYER, WEIGHTS

FLOAT32, BFLOAT16, INT8 = (tl.constexpr(list(WEIGHTS).index(name)) for name in ("float32", "bfloat16", "int8"))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LAYER_WORDS = tl.constexpr(len(LAYER))
V_PAST, V_NOW, H_PAST = (tl.constexpr(LAYER.index(name)) for name in ("v_past", "v_now", "h_past"))
COND, LINK = tl.constexpr(LAYER.index("cond")), tl.constexpr(LAYER.index("link"))  # the scales are at the next word
V_BIAS, H_BIAS = tl.constexpr(LAYER.index("v_bias")), tl.constexpr(LAYER.index("h_bias"))
T_AT, Y_AT, SEED_AT, STEP_AT = (tl.constexpr(i) for i in (0, 1, 2, 4))  # words of `place`


@triton.jit
def _section(table_ptr, word, ITEM: tl.constexpr):
    """Where a section starts, in items of so many bytes; sections are aligned to 64 bytes."""
    return tl.multiple_of(tl.load(table_ptr + word) // ITEM, 16)


@triton.jit
def _item(KIND: tl.constexpr):
    """Bytes of what a weight pointer points to: a float, a pair of bfloat16, an int8."""
    return 1 if KIND == INT8 else 4


@triton.jit
def _tanh(b):
    """Near zero by its series, where the quotient would cancel."""
    b_square = b * b
    b_near = -1382.0 / 155925.0 * b_square + 62.0 / 2835.0
    b_near = (b_near * b_square - 17.0 / 315.0) * b_square + 2.0 / 15.0
    b_near = b + b * b_square * (b_near * b_square - 1.0 / 3.0)
    b_e = tl.exp(-2.0 * tl.abs(b))
    b_far = (1.0 - b_e) / (1.0 + b_e)
    return tl.where(b_square < 0.09, b_near, tl.where(b < 0, -b_far, b_far))


@triton.jit
def _gate(b_low, b_high):
    return _tanh(b_low) / (1.0 + tl.exp(-b_high))


@triton.jit
def _halves(w_ptr, o_row, o_i, m, KIND: tl.constexpr):
    """Lanes i and 8 + i of rows of panels, as float32."""
    if KIND == BFLOAT16:
        b_pair = tl.load(w_ptr + o_row * 8 + o_i, mask=m, other=0)
        return (b_pair << 16).to(tl.float32, bitcast=True), (b_pair & -65536).to(tl.float32, bitcast=True)
    else:
        b_low = tl.load(w_ptr + o_row * 16 + o_i, mask=m, other=0)
        b_high = tl.load(w_ptr + o_row * 16 + o_i + 8, mask=m, other=0)
        return b_low.to(tl.float32), b_high.to(tl.float32)


@triton.jit
def _halved(b):
    """float32 to the nearest bfloat16; by hand in Triton's interpreter, which would cut."""
    if INTERPRETED:
        b_bits = b.to(tl.int32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
        return b_bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return b.to(tl.bfloat16)


@triton.jit
def _halved_dot(b_x, b_w, acc):
    """A product of bfloat16 numbers; b_w holds such in float32."""
    if INTERPRETED:  # where a product would take the bits for whole numbers
        return tl.dot(b_x.to(tl.float32), b_w, acc, input_precision="ieee")
    else:
        return tl.dot(b_x, b_w.to(tl.bfloat16), acc, input_precision="ieee")


@triton.jit
def _product(
    acc_low, acc_high, x_ptr, o_x, m_x, w_ptr, o_w, o_i, m_n, K, KIND: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Adds rows o_x [M] of K floats times K rows of panels from row o_w [N] on."""
    for i_k in tl.range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_x = tl.load(x_ptr + o_x[:, None] + o_k[None, :], mask=m_x[:, None] & m_k[None, :], other=0.0)
        b_low, b_high = _halves(w_ptr, o_w[None, :] + o_k[:, None], o_i[None, :], m_k[:, None] & m_n[None, :], KIND)
        if KIND == FLOAT32:
            acc_low = tl.dot(b_x, b_low, acc_low, input_precision="ieee")
            acc_high = tl.dot(b_x, b_high, acc_high, input_precision="ieee")
        else:
            # the weights are bfloat16 or small integers, exactly; the activations become a sum of two bfloat16
            b_top = _halved(b_x)
            b_rest = _halved(b_x - b_top.to(tl.float32))
            for part in tl.static_range(2):
                b_one = b_rest if part else b_top
                acc_low = _halved_dot(b_one, b_low, acc_low)
                acc_high = _halved_dot(b_one, b_high, acc_high)
    return acc_low, acc_high


@triton.jit
def _tap_products(
    acc_low, acc_high, x_ptr, w_ptr, table_ptr, first_tap, taps, i_l, o_b, o_x, m_m, t, y, B, H, W, o_w, o_i, m_n,
    C: tl.constexpr, S: tl.constexpr, FRAMES: tl.constexpr, KIND: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds one tap after the other of layer i_l's planes [L, FRAMES, B, H, W, S]; taps outside the grid are dead."""
    for j in tl.range(0, taps):
        dt = tl.load(table_ptr + first_tap + 3 * j).to(tl.int32)
        y_tap = y + tl.load(table_ptr + first_tap + 3 * j + 1).to(tl.int32)
        o_tap = o_x + tl.load(table_ptr + first_tap + 3 * j + 2).to(tl.int32)
        if (t + dt >= 0) & (y_tap >= 0) & (y_tap < H):
            first = (i_l.to(tl.int64) * FRAMES + (t + dt) % FRAMES) * B
            o_cell = (((first + o_b) * H + y_tap) * W + o_tap) * S
            m_cell = m_m & (o_tap >= 0) & (o_tap < W)
            acc_low, acc_high = _product(
                acc_low, acc_high, x_ptr, o_cell, m_cell, w_ptr, o_w + j * C, o_i, m_n, C, KIND, BLOCK_K
            )
    return acc_low, acc_high


@triton.jit
def _scaled(b_sum, f_ptr, table_ptr, word, o_n, m_n, KIND: tl.constexpr):
    """A finished sum of a matrix: int8 weights are in units of their column."""
    if KIND == INT8:
        return b_sum * tl.load(f_ptr + _section(table_ptr, word, 4) + o_n, mask=m_n, other=0.0)[None, :]
    else:
        return b_sum


@triton.jit(do_not_specialize=["t", "y", "seed_low", "seed_high", "step"])
def _place_kernel(place_ptr, t, y, seed_low, seed_high, step):
    """Where the next row is, for kernels that are replayed."""
    tl.store(place_ptr + T_AT, t)
    tl.store(place_ptr + Y_AT, y)
    tl.store(place_ptr + SEED_AT, seed_low)
    tl.store(place_ptr + SEED_AT + 1, seed_high)
    tl.store(place_ptr + STEP_AT, step)


@triton.jit(do_not_specialize=["B", "T", "H", "W", "first_layer", "v_tap", "v_taps", "h_tap", "h_taps"])
def _past_kernel(
    w_ptr, f_ptr, table_ptr, place_ptr, condition_ptr, v_ptr, h_ptr, base_ptr, B, T, H, W, first_layer, v_tap, v_taps,
    h_tap, h_taps, C: tl.constexpr, S: tl.constexpr, FRAMES: tl.constexpr, CONDITION: tl.constexpr, KIND: tl.constexpr,
    BLOCK_M: tl.constexpr, PANELS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """base [L, 2, B W, 2C]: bias, condition and earlier frames' taps of both streams of every layer, for one row."""
    i_l, horizontal = tl.program_id(2) // 2, tl.program_id(2) % 2 == 1
    t, y = tl.load(place_ptr + T_AT), tl.load(place_ptr + Y_AT)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m, o_b = o_m < B * W, o_m // W
    o_x = o_m - o_b * W
    o_p = tl.program_id(0) * PANELS + tl.arange(0, PANELS * 8) // 8
    o_i, m_n = tl.arange(0, PANELS * 8) % 8, o_p < C // 8
    word = first_layer + i_l * LAYER_WORDS
    o_n = o_p * 16 + o_i
    zero = tl.zeros((BLOCK_M, PANELS * 8), tl.float32)
    p_w = w_ptr + _section(table_ptr, word + COND, _item(KIND))
    o_cell = (((o_b.to(tl.int64) * T + t) * H + y) * W + o_x) * CONDITION
    acc_low, acc_high = _product(
        zero, zero, condition_ptr, o_cell, m_m, p_w, o_p * CONDITION, o_i, m_n, CONDITION, KIND, BLOCK_K
    )
    p_bias = f_ptr + _section(table_ptr, word + tl.where(horizontal, H_BIAS, V_BIAS), 4)
    b_low = _scaled(acc_low, f_ptr, table_ptr, word + COND + 1, o_n, m_n, KIND)
    b_high = _scaled(acc_high, f_ptr, table_ptr, word + COND + 1, o_n + 8, m_n, KIND)
    b_low += tl.load(p_bias + o_n, mask=m_n, other=0.0)[None, :]
    b_high += tl.load(p_bias + o_n + 8, mask=m_n, other=0.0)[None, :]
    first_tap, taps = tl.where(horizontal, h_tap, v_tap), tl.where(horizontal, h_taps, v_taps)
    if (taps > 0) & (t > 0):
        section = word + tl.where(horizontal, H_PAST, V_PAST)
        p_x = h_ptr if horizontal else v_ptr
        acc_low, acc_high = _tap_products(
            zero, zero, p_x, w_ptr + _section(table_ptr, section, _item(KIND)), table_ptr, first_tap, taps, i_l, o_b,
            o_x, m_m, t, y, B, H, W, o_p * (taps * C), o_i, m_n, C, S, FRAMES, KIND, BLOCK_K,
        )  # fmt: skip
        b_low += _scaled(acc_low, f_ptr, table_ptr, section + 1, o_n, m_n, KIND)
        b_high += _scaled(acc_high, f_ptr, table_ptr, section + 1, o_n + 8, m_n, KIND)
    m = m_m[:, None] & m_n[None, :]
    o = (tl.program_id(2).to(tl.int64) * (B * W) + o_m)[:, None] * (2 * C) + o_n[None, :]
    tl.store(base_ptr + o, b_low, mask=m)
    tl.store(base_ptr + o + 8, b_high, mask=m)


@triton.jit(do_not_specialize=["B", "T", "H", "W", "v_tap", "v_taps", "h_tap", "h_taps"])
def _start_kernel(
    table_ptr, place_ptr, codes_ptr, table_v_ptr, bias_v_ptr, table_h_ptr, bias_h_ptr, v_ptr, start_ptr, h_ptr,
    B, T, H, W, v_tap, v_taps, h_tap, h_taps,
    CODES: tl.constexpr, S: tl.constexpr, FRAMES: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The input layer: v of layer 0 for a row; start [B W, S], h without the taps of its row; h at the first column."""
    i_m, horizontal = tl.program_id(0), tl.program_id(1) == 1
    t, y = tl.load(place_ptr + T_AT), tl.load(place_ptr + Y_AT)
    i_b = (i_m // W).to(tl.int64)
    x = i_m % W
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < S
    acc = tl.load((bias_h_ptr if horizontal else bias_v_ptr) + o_s, mask=m_s, other=0.0)
    p_table = table_h_ptr if horizontal else table_v_ptr
    first_tap, taps = tl.where(horizontal, h_tap, v_tap), tl.where(horizontal, h_taps, v_taps)
    for j in tl.range(0, taps):
        t_tap = t + tl.load(table_ptr + first_tap + 3 * j).to(tl.int32)
        y_tap = y + tl.load(table_ptr + first_tap + 3 * j + 1).to(tl.int32)
        x_tap = x + tl.load(table_ptr + first_tap + 3 * j + 2).to(tl.int32)
        if (t_tap >= 0) & (y_tap >= 0) & (y_tap < H) & (x_tap >= 0) & (x_tap < W):
            code = tl.load(codes_ptr + ((i_b * T + t_tap) * H + y_tap) * W + x_tap)
            acc += tl.load(p_table + (j * CODES + code) * S + o_s, mask=m_s, other=0.0)
    if horizontal:
        tl.store(start_ptr + i_m.to(tl.int64) * S + o_s, acc, mask=m_s)
        if x == 0:
            tl.store(h_ptr + i_m.to(tl.int64) * S + o_s, acc, mask=m_s)
    else:
        tl.store(v_ptr + ((((t % FRAMES) * B + i_b) * H + y) * W + x) * S + o_s, acc, mask=m_s)


@triton.jit(do_not_specialize=["i_l", "L", "B", "H", "W", "first_layer", "tap", "taps"])
def _row_kernel(
    w_ptr, f_ptr, table_ptr, place_ptr, v_ptr, base_ptr, pre_ptr, i_l, L, B, H, W, first_layer, tap, taps,
    C: tl.constexpr, S: tl.constexpr, FRAMES: tl.constexpr, KIND: tl.constexpr,
    BLOCK_M: tl.constexpr, PANELS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The vertical stream of layer i_l for one row: pre [L, B W, 2C], and v of the layer above."""
    t, y = tl.load(place_ptr + T_AT), tl.load(place_ptr + Y_AT)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m, o_b = o_m < B * W, o_m // W
    o_x = o_m - o_b * W
    o_p = tl.program_id(0) * PANELS + tl.arange(0, PANELS * 8) // 8
    o_i, m_n = tl.arange(0, PANELS * 8) % 8, o_p < C // 8
    word = first_layer + i_l * LAYER_WORDS
    o_n = o_p * 16 + o_i
    zero = tl.zeros((BLOCK_M, PANELS * 8), tl.float32)
    acc_low, acc_high = _tap_products(
        zero, zero, v_ptr, w_ptr + _section(table_ptr, word + V_NOW, _item(KIND)), table_ptr, tap, taps, i_l, o_b, o_x,
        m_m, t, y, B, H, W, o_p * (taps * C), o_i, m_n, C, S, FRAMES, KIND, BLOCK_K,
    )  # fmt: skip
    m = m_m[:, None] & m_n[None, :]
    i_row = i_l.to(tl.int64) * (B * W)
    p_base = base_ptr + (2 * i_row + o_m)[:, None] * (2 * C) + o_n[None, :]
    b_low = _scaled(acc_low, f_ptr, table_ptr, word + V_NOW + 1, o_n, m_n, KIND)
    b_high = _scaled(acc_high, f_ptr, table_ptr, word + V_NOW + 1, o_n + 8, m_n, KIND)
    b_low += tl.load(p_base, mask=m, other=0.0)
    b_high += tl.load(p_base + 8, mask=m, other=0.0)
    p_pre = pre_ptr + (i_row + o_m)[:, None] * (2 * C) + o_n[None, :]
    tl.store(p_pre, b_low, mask=m)
    tl.store(p_pre + 8, b_high, mask=m)
    if i_l + 1 < L:  # nothing looks at the last layer's
        plane = B.to(tl.int64) * H * W * S
        o_v = (((i_l * FRAMES + t % FRAMES).to(tl.int64) * B + o_b) * H + y) * W + o_x
        p_v = v_ptr + o_v[:, None] * S + (o_p * 8 + o_i)[None, :]
        b_v = tl.load(p_v, mask=m, other=0.0)
        tl.store(p_v + FRAMES * plane, b_v + _gate(b_low, b_high), mask=m)


@triton.jit(do_not_specialize=["B", "W", "first_layer"])
def _link_kernel(
    w_ptr, f_ptr, table_ptr, pre_ptr, base_ptr, B, W, first_layer, C: tl.constexpr, KIND: tl.constexpr,
    BLOCK_M: tl.constexpr, PANELS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds to the horizontal half of `base` what the vertical stream of the same layer hands over."""
    i_l = tl.program_id(2)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < B * W
    o_p = tl.program_id(0) * PANELS + tl.arange(0, PANELS * 8) // 8
    o_i, m_n = tl.arange(0, PANELS * 8) % 8, o_p < C // 8
    word = first_layer + i_l * LAYER_WORDS
    o_n = o_p * 16 + o_i
    zero = tl.zeros((BLOCK_M, PANELS * 8), tl.float32)
    i_row = i_l.to(tl.int64) * (B * W)
    acc_low, acc_high = _product(
        zero, zero, pre_ptr, (i_row + o_m) * (2 * C), m_m, w_ptr + _section(table_ptr, word + LINK, _item(KIND)),
        o_p * (2 * C), o_i, m_n, 2 * C, KIND, BLOCK_K,
    )  # fmt: skip
    m = m_m[:, None] & m_n[None, :]
    p_base = base_ptr + (2 * i_row + B * W + o_m)[:, None] * (2 * C) + o_n[None, :]
    b_low = _scaled(acc_low, f_ptr, table_ptr, word + LINK + 1, o_n, m_n, KIND)
    b_high = _scaled(acc_high, f_ptr, table_ptr, word + LINK + 1, o_n + 8, m_n, KIND)
    tl.store(p_base, tl.load(p_base, mask=m, other=0.0) + b_low, mask=m)
    tl.store(p_base + 8, tl.load(p_base + 8, mask=m, other=0.0) + b_high, mask=m)


@triton.jit(do_not_specialize=["W", "stream"])
def _noise_kernel(
    place_ptr, samples_ptr, noise_ptr, W, stream, CODES: tl.constexpr, QUADS: tl.constexpr
):  # fmt: skip
    """noise [B W, CODES]: Gumbel noise of one row as reference.gumbel_row has it, off the path from code to code."""
    i_m = tl.program_id(0)
    i_q = tl.program_id(1) * QUADS
    b_quad = (i_q + tl.arange(0, QUADS) + stream * 65536).to(tl.uint32, bitcast=True)
    b_cell = (b_quad ^ b_quad) + (i_m % W + tl.load(place_ptr + Y_AT) * 65536).to(tl.uint32, bitcast=True)
    b_step = (b_quad ^ b_quad) + tl.load(place_ptr + STEP_AT).to(tl.uint32, bitcast=True)
    b_sample = (b_quad ^ b_quad) + tl.load(samples_ptr + i_m // W).to(tl.uint32)
    key_low = tl.load(place_ptr + SEED_AT).to(tl.uint32, bitcast=True)
    key_high = tl.load(place_ptr + SEED_AT + 1).to(tl.uint32, bitcast=True)
    b_0, b_1, b_2, b_3 = tl.philox_impl(b_quad, b_cell, b_step, b_sample, key_low, key_high, 10)
    b_word = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), (4 * QUADS,))
    b_uniform = ((b_word >> 8).to(tl.float64) + 0.5) * (2.0**-24)
    b_noise = -tl.log(-tl.log(b_uniform))
    o_k = 4 * i_q + tl.arange(0, 4 * QUADS)
    tl.store(noise_ptr + i_m.to(tl.int64) * CODES + o_k, b_noise.to(tl.float32), mask=o_k < CODES)


@triton.jit(do_not_specialize=["B", "H", "W"])
def _keep_kernel(
    place_ptr, rows_ptr, h_ptr, B, H, W, S: tl.constexpr, FRAMES: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """A finished row of the horizontal stream [L, B W, S] into the planes that later frames look at."""
    i_m, i_l = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    t, y = tl.load(place_ptr + T_AT), tl.load(place_ptr + Y_AT)
    o_s = tl.arange(0, BLOCK_S)
    b_h = tl.load(rows_ptr + (i_l * (B * W) + i_m) * S + o_s, mask=o_s < S, other=0.0)
    o_cell = (((i_l * FRAMES + t % FRAMES) * B + i_m // W) * H + y) * W + i_m % W
    tl.store(h_ptr + o_cell * S + o_s, b_h, mask=o_s < S)
