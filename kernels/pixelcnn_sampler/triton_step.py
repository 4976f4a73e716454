"""Triton kernels of one position after another: the horizontal stream, its attention, the head and the draw.

Each stage is a function of a few panels of one sample. In triton_line.py it stands alone in a kernel, many
programs of which share the panels (wide models), and in one that does every stage of every position of a row (narrow
models). `rows` [L + 1, B W, S] is the row of the horizontal stream that is being drawn, layer by layer.
"""

import triton
import triton.language as tl
from fastvid.kernels.pixelcnn_sampler.triton_pass import INT8, _gate, _halved, _halves


@triton.jit
def _multiplied(
    x_ptr, w_ptr, scale_ptr, o_p, dead, K: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, N: tl.constexpr,
    ELU: tl.constexpr, KIND: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Panels o_p [P] of a matrix [TAPS K, N] times TAPS vectors of K floats, `STRIDE` apart, the first `dead` of them
    outside the grid. Returns the halves [P, 8] of the sums."""
    PANELS: tl.constexpr = o_p.shape[0]
    o_i = tl.arange(0, 8)
    acc_low = tl.zeros((PANELS, BLOCK_K, 8), tl.float32)
    acc_high = tl.zeros((PANELS, BLOCK_K, 8), tl.float32)
    for j in tl.static_range(TAPS):
        for i_k in tl.static_range(0, K, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            m_k = o_k < K
            b_x = tl.load(x_ptr + j * STRIDE + o_k, mask=m_k & (j >= dead), other=0.0)
            if ELU:
                b_x = tl.where(b_x > 0, b_x, tl.exp(tl.minimum(b_x, 0.0)) - 1.0)
            o_row = o_p[:, None] * (TAPS * K) + (j * K + o_k)[None, :]
            m = (o_p < (N + 15) // 16)[:, None] & m_k[None, :]
            b_low, b_high = _halves(w_ptr, o_row[:, :, None], o_i[None, None, :], m[:, :, None], KIND)
            acc_low += b_low * b_x[None, :, None]
            acc_high += b_high * b_x[None, :, None]
    return _finished(tl.sum(acc_low, axis=1), tl.sum(acc_high, axis=1), scale_ptr, o_p, N, KIND)


@triton.jit
def _finished(b_low, b_high, scale_ptr, o_p, N: tl.constexpr, KIND: tl.constexpr):
    """int8 weights are in units of their column."""
    if KIND == INT8:
        o_n = o_p[:, None] * 16 + tl.arange(0, 8)[None, :]
        m_n = o_n < N
        b_low *= tl.load(scale_ptr + o_n, mask=m_n, other=0.0)
        b_high *= tl.load(scale_ptr + o_n + 8, mask=m_n, other=0.0)
    return b_low, b_high


@triton.jit
def _gate_stage(
    h_ptr, base_ptr, w_ptr, scale_ptr, gated_ptr, i_b, i_m, x, o_p,
    C: tl.constexpr, S: tl.constexpr, TAPS: tl.constexpr, KIND: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gated [B, S]: the present taps over a layer's row h [B W, S], added to base [B W, 2C], and the gate."""
    R: tl.constexpr = TAPS - 1
    b_low, b_high = _multiplied(
        h_ptr + (i_m - R) * S, w_ptr, scale_ptr, o_p, R - x, C, TAPS, S, 2 * C, False, KIND, BLOCK_K
    )
    o_i = tl.arange(0, 8)[None, :]
    m = (o_p < C // 8)[:, None]
    p_base = base_ptr + i_m * (2 * C) + (o_p[:, None] * 16 + o_i)
    b_low += tl.load(p_base, mask=m, other=0.0)
    b_high += tl.load(p_base + 8, mask=m, other=0.0)
    tl.store(gated_ptr + i_b * S + (o_p[:, None] * 8 + o_i), _gate(b_low, b_high), mask=m)


@triton.jit
def _plain_stage(
    x_ptr, w_ptr, scale_ptr, bias_ptr, old_ptr, new_ptr, o_p, K: tl.constexpr, N: tl.constexpr,
    ELU: tl.constexpr, ADD: tl.constexpr, KIND: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """new = bias + x (or elu(x)) times a matrix [K, N], and old with ADD; whole panels."""
    b_low, b_high = _multiplied(x_ptr, w_ptr, scale_ptr, o_p, 0, K, 1, 0, N, ELU, KIND, BLOCK_K)
    _put(b_low, b_high, bias_ptr, old_ptr, new_ptr, o_p, N, ADD)


@triton.jit
def _put(b_low, b_high, bias_ptr, old_ptr, new_ptr, o_p, N: tl.constexpr, ADD: tl.constexpr):
    o_n = o_p[:, None] * 16 + tl.arange(0, 8)[None, :]
    m_n = (o_p < (N + 15) // 16)[:, None]
    b_low += tl.load(bias_ptr + o_n, mask=m_n, other=0.0)
    b_high += tl.load(bias_ptr + o_n + 8, mask=m_n, other=0.0)
    if ADD:
        b_low += tl.load(old_ptr + o_n, mask=m_n, other=0.0)
        b_high += tl.load(old_ptr + o_n + 8, mask=m_n, other=0.0)
    tl.store(new_ptr + o_n, b_low, mask=m_n)
    tl.store(new_ptr + o_n + 8, b_high, mask=m_n)


@triton.jit
def _query_stage(
    h_ptr, w_ptr, scale_ptr, bias_ptr, position_ptr, query_ptr, cache_ptr, i_b, B, t, y, x, T, H, W, o_p,
    C: tl.constexpr, A: tl.constexpr, E: tl.constexpr, KIND: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """query [B, A E], and keys and values of a position into the cache [2, B, A, T H W, E]."""
    D: tl.constexpr = A * E
    b_low, b_high = _multiplied(h_ptr, w_ptr, scale_ptr, o_p, 0, C, 1, 0, 3 * D, False, KIND, BLOCK_K)
    tf = tl.div_rn(t + 0.0, T + 0.0) - 0.5
    yf = tl.div_rn(y + 0.0, H + 0.0) - 0.5
    xf = tl.div_rn(x + 0.0, W + 0.0) - 0.5
    N = T.to(tl.int64) * H * W
    n = (t * H + y) * W + x
    for half in tl.static_range(2):
        o_n = o_p[:, None] * 16 + (half * 8 + tl.arange(0, 8))[None, :]
        m_n = o_n < 3 * D
        p = position_ptr + o_n
        b_add = tf * tl.load(p, mask=m_n, other=0.0) + yf * tl.load(p + 3 * D, mask=m_n, other=0.0)
        b_add += xf * tl.load(p + 6 * D, mask=m_n, other=0.0)
        b_add += tl.load(bias_ptr + o_n, mask=m_n, other=0.0)
        b_add += b_high if half else b_low
        tl.store(query_ptr + i_b * D + o_n, b_add, mask=o_n < D)
        # heads are padded to eight columns, so that no half of a panel belongs to two
        o_d = o_n % D
        o_cache = ((((o_n // D - 1) * B + i_b) * A + o_d // E) * N + n) * E + o_d % E
        b_kept = _halved(b_add) if cache_ptr.dtype.element_ty == tl.bfloat16 else b_add
        tl.store(cache_ptr + o_cache, b_kept, mask=(o_n >= D) & m_n)


@triton.jit
def _seen(t, y, x, H, W, AXIAL: tl.constexpr):
    """How many positions this one looks at, itself among them."""
    return t + y + x + 1 if AXIAL else (t * H + y) * W + x + 1


@triton.jit
def _look_stage(
    query_ptr, cache_ptr, part_ptr, peak_ptr, i_b, i_a, i_c, B, t, y, x, T, H, W, scale,
    A: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    KEYS: tl.constexpr, AXIAL: tl.constexpr,
):  # fmt: skip
    """Attention of one head over one chunk of positions: part [B, A, CHUNKS, E], and its peak and weight."""
    o_e = tl.arange(0, BLOCK_E)
    m_e = o_e < E
    i_head = i_b * A + i_a
    N = T.to(tl.int64) * H * W
    seen = _seen(t, y, x, H, W, AXIAL)
    b_q = tl.load(query_ptr + i_head * E + o_e, mask=m_e, other=0.0) * scale
    peak, weight = tl.full((1,), float("-inf"), tl.float32), tl.zeros((1,), tl.float32)
    acc = tl.zeros((BLOCK_E,), tl.float32)
    for i_j in tl.range(i_c * CHUNK, tl.minimum(i_c * CHUNK + CHUNK, seen), KEYS):
        o_j = i_j + tl.arange(0, KEYS)
        m_j = o_j < seen
        if AXIAL:  # earlier frames, then rows above, then codes to the left
            o_before = (o_j * H + y) * W + x
            o_above = (t * H + o_j - t) * W + x
            o_n = tl.where(o_j < t, o_before, tl.where(o_j < t + y, o_above, (t * H + y) * W + o_j - t - y))
        else:
            o_n = o_j
        o_cache = (i_head * N + o_n)[:, None] * E + o_e[None, :]
        m = m_j[:, None] & m_e[None, :]
        b_k = tl.load(cache_ptr + o_cache, mask=m, other=0.0).to(tl.float32)
        b_v = tl.load(cache_ptr + B * A * N * E + o_cache, mask=m, other=0.0).to(tl.float32)
        b_score = tl.where(m_j, tl.sum(b_k * b_q[None, :], axis=1), float("-inf"))
        b_peak = tl.maximum(peak, tl.max(b_score, axis=0))
        b_weight = tl.exp(b_score - b_peak)
        b_less = tl.exp(peak - b_peak)
        acc = acc * b_less + tl.sum(b_weight[:, None] * b_v, axis=0)
        weight = weight * b_less + tl.sum(b_weight, axis=0)
        peak = b_peak
    o_part = i_head * CHUNKS + i_c
    tl.store(part_ptr + o_part * E + o_e, acc, mask=m_e)
    tl.store(peak_ptr + 2 * o_part + tl.arange(0, 1), peak)
    tl.store(peak_ptr + 2 * o_part + 1 + tl.arange(0, 1), weight)


@triton.jit
def _attended_stage(
    part_ptr, peak_ptr, w_ptr, scale_ptr, bias_ptr, h_ptr, i_b, seen, o_p,
    C: tl.constexpr, A: tl.constexpr, E: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """h += the chunks put together, times the output matrix [A E, C]; every program puts them together for itself."""
    o_a = tl.arange(0, BLOCK_A)
    o_e = tl.arange(0, BLOCK_E)
    o_c = tl.arange(0, CHUNKS)
    o_part = (i_b * A + o_a)[None, :] * CHUNKS + o_c[:, None]  # [CHUNKS, BLOCK_A]
    m_part = (o_a < A)[None, :] & (o_c * CHUNK < seen)[:, None]
    b_peak = tl.load(peak_ptr + 2 * o_part, mask=m_part, other=float("-inf"))
    b_weight = tl.load(peak_ptr + 2 * o_part + 1, mask=m_part, other=0.0)
    m = m_part[:, :, None] & (o_e < E)[None, None, :]
    b_part = tl.load(part_ptr + (o_part * E)[:, :, None] + o_e[None, None, :], mask=m, other=0.0)
    b_top = tl.where(o_a < A, tl.max(b_peak, axis=0), 0.0)
    b_share = tl.where(m_part, tl.exp(b_peak - b_top[None, :]), 0.0)
    b_whole = tl.where(o_a < A, tl.sum(b_share * b_weight, axis=0), 1.0)
    b_x = tl.sum(b_share[:, :, None] * b_part, axis=0) / b_whole[:, None]  # [BLOCK_A, BLOCK_E]
    b_x = tl.reshape(b_x, (BLOCK_A * BLOCK_E,))
    o_d = tl.arange(0, BLOCK_A * BLOCK_E)
    o_row = o_p[:, None] * (A * E) + (o_d // BLOCK_E * E + o_d % BLOCK_E)[None, :]
    m_w = (o_p < (C + 15) // 16)[:, None] & ((o_d // BLOCK_E < A) & (o_d % BLOCK_E < E))[None, :]
    b_low, b_high = _halves(w_ptr, o_row[:, :, None], tl.arange(0, 8)[None, None, :], m_w[:, :, None], KIND)
    b_low = tl.sum(b_low * b_x[None, :, None], axis=1)
    b_high = tl.sum(b_high * b_x[None, :, None], axis=1)
    b_low, b_high = _finished(b_low, b_high, scale_ptr, o_p, C, KIND)
    _put(b_low, b_high, bias_ptr, h_ptr, h_ptr, o_p, C, True)


@triton.jit
def _draw_stage(
    logits_ptr, noise_ptr, given_ptr, codes_ptr, logprob_ptr, margin_ptr, table_h_ptr, start_ptr, h_ptr,
    i_b, t, y, x, T, H, W, temperature, CODES: tl.constexpr, LOGITS: tl.constexpr, S: tl.constexpr, TAPS: tl.constexpr,
    GIVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The code at column x of one sample, its score's lead and its log-probability; and h of layer 0 at x + 1.

    logits [B, LOGITS], table_h [TAPS - 1, CODES, S] for the columns x - TAPS + 2 .. x, start [B W, S].
    """
    i_m = i_b * W + x
    i_row = ((i_b.to(tl.int64) * T + t) * H + y) * W
    o_k = tl.arange(0, BLOCK_N)
    m_k = o_k < CODES
    b_logit = tl.load(logits_ptr + i_b * LOGITS + o_k, mask=m_k, other=float("-inf"))
    b_noise = tl.load(noise_ptr + i_m.to(tl.int64) * CODES + o_k, mask=m_k, other=0.0)
    b_score = tl.div_rn(b_logit, temperature) + b_noise
    best, code = tl.max(b_score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    code = tl.minimum(code, CODES - 1).to(tl.int64)  # where a logit is not a number, no lane is the largest
    margin = best - tl.max(tl.where(o_k == code, float("-inf"), b_score), axis=0)
    if GIVEN:
        given = tl.load(given_ptr + i_row + x)
        margin = tl.where(given >= 0, float("inf"), margin)
        code = tl.where(given >= 0, given, code)
    top = tl.max(b_logit, axis=0)
    chosen = tl.sum(tl.where(o_k == code, b_logit, 0.0), axis=0)
    logprob = chosen - top - tl.log(tl.sum(tl.exp(b_logit - top), axis=0))
    tl.store(codes_ptr + i_row + x, code)
    tl.store(logprob_ptr + i_row + x, logprob)
    tl.store(margin_ptr + i_row + x, margin)
    if x + 1 < W:
        o_s = tl.arange(0, BLOCK_S)
        m_s = o_s < S
        b_h = tl.load(start_ptr + (i_m + 1) * S + o_s, mask=m_s, other=0.0)
        for j in tl.static_range(TAPS - 1):
            if j == TAPS - 2:
                seen = code
            else:
                seen = tl.load(codes_ptr + i_row + x - (TAPS - 2 - j), mask=x >= TAPS - 2 - j, other=-1)
            b_h += tl.load(table_h_ptr + (j * CODES + seen) * S + o_s, mask=m_s & (seen >= 0), other=0.0)
        tl.store(h_ptr + (i_m + 1) * S + o_s, b_h, mask=m_s)
