"""Triton kernels of the lookup: codes made ready, the screening pass, the second look. Why it is exact: README.md."""

import triton
import triton.language as tl

LOW = tl.constexpr(2.0**-11)  # what a half keeps of 1: the unit in which the rest of a number is stored
FARTHEST = tl.constexpr(100)  # a row beyond 2^100 codebook widths is only looked at twice, never screened
PARTS = tl.constexpr(512)  # at most so many programs make the codes ready


@triton.jit
def _exponent(b_size):
    """Of 2 in a non-negative float32, kept to where both 2^e and 2^-e are normal numbers."""
    b_e = ((b_size.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    return tl.minimum(tl.maximum(b_e, -126), 126)


@triton.jit
def _power(b_e):
    """2^e."""
    return ((b_e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _load_rows(ptr, o_n, m_n, o_d, D, stride_n, stride_d):
    """Rows o_n, columns o_d in float32; zero outside."""
    p = ptr + o_n[:, None].to(tl.int64) * stride_n + o_d[None, :].to(tl.int64) * stride_d
    return tl.load(p, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _rounded(b, KIND: tl.constexpr):
    """float32 to the nearest of another kind; to bfloat16 by hand, where Triton's interpreter would cut."""
    if KIND == tl.bfloat16:
        b_bits = b.to(tl.int32, bitcast=True)
        b_bits = tl.where(b == b, b_bits + 0x7FFF + ((b_bits >> 16) & 1), b_bits | 0x400000)
        return (b_bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return b.to(KIND)


@triton.jit(do_not_specialize=["K", "S"])
def _centre_kernel(
    codebook_ptr, centre_ptr, peak_ptr, counters_ptr, K, D, S, stride_ck, stride_cd,
    DP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """centre [DP]: mean of S codes evenly spread; peak: the largest |e - centre| of this block; counters: zeroed."""
    i_p = tl.program_id(0)
    o_k = i_p * BLOCK_K + tl.arange(0, BLOCK_K)
    acc_peak = tl.zeros((BLOCK_K,), tl.float32)
    for i_d in range(0, DP, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for i_s in range(0, S, BLOCK_K):
            o_s = i_s + tl.arange(0, BLOCK_K)
            b_e = _load_rows(codebook_ptr, o_s * K // S, o_s < S, o_d, D, stride_ck, stride_cd)
            acc += tl.where(tl.abs(b_e) < float("inf"), b_e, 0.0) * (1.0 / S)
        b_centre = tl.sum(acc, axis=0)  # every program finds the same, so nobody waits for another
        b_e = _load_rows(codebook_ptr, o_k, o_k < K, o_d, D, stride_ck, stride_cd) - b_centre[None, :]
        b_size = tl.where((o_k < K)[:, None] & (tl.abs(b_e) < float("inf")), tl.abs(b_e), 0.0)
        acc_peak = tl.maximum(acc_peak, tl.max(b_size, axis=1))
        if i_p == 0:
            tl.store(centre_ptr + o_d, b_centre)
    tl.store(peak_ptr + i_p, tl.max(acc_peak, axis=0))
    if i_p == 0:
        tl.store(counters_ptr + tl.arange(0, 2), tl.zeros((2,), tl.int64))


@triton.jit(do_not_specialize=["K", "P"])
def _encode_kernel(
    codebook_ptr, centre_ptr, peak_ptr, high_ptr, low_ptr, half_norm_ptr, reach_ptr, slack_ptr, exponent_ptr,
    K, D, P, stride_ck, stride_cd, DP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Centred codes in units of 2^exponent as high + low 2^-11 [K padded, DP] float16, with what bounds their errors.

    half_norm: |e|^2 / 2, +inf where there is no code; reach, slack: the largest |e| and |e - high| of this block.
    """
    i_p = tl.program_id(0)
    o_k = i_p * BLOCK_K + tl.arange(0, BLOCK_K)
    o_p = tl.arange(0, PARTS)
    peak = tl.max(tl.load(peak_ptr + o_p, mask=o_p < P, other=0.0), axis=0)
    e = tl.where(peak > 0, tl.minimum(_exponent(peak) + 1, 126), 0)
    acc_square, acc_rest = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for i_d in range(0, DP, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        b_e = _load_rows(codebook_ptr, o_k, o_k < K, o_d, D, stride_ck, stride_cd)
        b_e = (b_e - tl.load(centre_ptr + o_d)[None, :]) * _power(-e)
        b_rest = b_e - b_e.to(tl.float16).to(tl.float32)
        acc_square += tl.sum(b_e * b_e, axis=1)
        acc_rest += tl.sum(b_rest * b_rest, axis=1)
    m_k = (o_k < K) & (acc_square < float("inf"))  # a code that is not finite is no code
    for i_d in range(0, DP, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        b_e = _load_rows(codebook_ptr, o_k, m_k, o_d, D, stride_ck, stride_cd)
        b_e = tl.where(m_k[:, None], (b_e - tl.load(centre_ptr + o_d)[None, :]) * _power(-e), 0.0)
        b_high = b_e.to(tl.float16)
        o_out = o_k[:, None] * DP + o_d[None, :]
        tl.store(high_ptr + o_out, b_high)
        tl.store(low_ptr + o_out, ((b_e - b_high.to(tl.float32)) * (1.0 / LOW)).to(tl.float16))
    tl.store(half_norm_ptr + o_k, tl.where(m_k, acc_square * 0.5, float("inf")))
    tl.store(reach_ptr + i_p, tl.sqrt(tl.max(tl.where(m_k, acc_square, 0.0), axis=0)))
    tl.store(slack_ptr + i_p, tl.sqrt(tl.max(tl.where(m_k, acc_rest, 0.0), axis=0)))
    if i_p == 0:
        tl.store(exponent_ptr, e)


@triton.jit
def _finish(
    x_ptr, codebook_ptr, indices_ptr, quantized_ptr, distance_ptr, keys_ptr, o_n, m_n, b_index, K, D,
    stride_xn, stride_xd, stride_ck, stride_cd, DP: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """Stores what follows from the chosen codes. Returns which rows are not finite."""
    BLOCK_D: tl.constexpr = DP if DP < 2048 // o_n.shape[0] else 2048 // o_n.shape[0]
    acc_square = tl.zeros_like(b_index).to(tl.float32)
    acc_bad = tl.zeros_like(b_index)
    for i_d in tl.range(0, DP, BLOCK_D, num_stages=1):
        o_d = i_d + tl.arange(0, BLOCK_D)
        b_x = _load_rows(x_ptr, o_n, m_n, o_d, D, stride_xn, stride_xd)
        b_e = _load_rows(codebook_ptr, b_index, m_n, o_d, D, stride_ck, stride_cd)
        m = m_n[:, None] & (o_d < D)[None, :]
        p = quantized_ptr + o_n[:, None].to(tl.int64) * D + o_d[None, :]
        tl.store(p, _rounded(b_e, quantized_ptr.dtype.element_ty), mask=m)
        acc_square += tl.sum((b_x - b_e) * (b_x - b_e), axis=1)
        acc_bad |= tl.max(tl.where(tl.abs(b_x) < float("inf"), 0, 1), axis=1)
    m_bad = m_n & (acc_bad != 0)
    tl.store(indices_ptr + o_n, b_index.to(tl.int64), mask=m_n)
    tl.store(distance_ptr + o_n, tl.where(m_bad, float("nan"), acc_square), mask=m_n)
    if STATISTICS:
        tl.store(keys_ptr + o_n, tl.where(m_bad, K, b_index).to(keys_ptr.dtype.element_ty), mask=m_n)
    return m_bad


@triton.jit
def _load_centred(x_ptr, centre_ptr, o_n, m_n, o_d, D, stride_xn, stride_xd):
    return _load_rows(x_ptr, o_n, m_n, o_d, D, stride_xn, stride_xd) - tl.load(centre_ptr + o_d)[None, :]


@triton.jit
def _halves(x_ptr, centre_ptr, o_n, m_n, o_d, b_unit, D, stride_xn, stride_xd):
    """Centred rows in the units that make their largest element 1 to 4: what a float16 keeps, and the rest."""
    b_a = _load_centred(x_ptr, centre_ptr, o_n, m_n, o_d, D, stride_xn, stride_xd) * b_unit[:, None]
    b_high = b_a.to(tl.float16)
    return b_high, b_a - b_high.to(tl.float32)


@triton.jit
def _row_exponent(x_ptr, centre_ptr, o_n, m_n, D, stride_xn, stride_xd, DP: tl.constexpr):
    """Of the largest element of each centred row."""
    STEP: tl.constexpr = 32 if DP > 32 else DP
    b_peak = tl.zeros((o_n.shape[0],), tl.float32)
    for i_d in tl.range(0, DP, STEP, num_stages=1):
        b_a = _load_centred(x_ptr, centre_ptr, o_n, m_n, i_d + tl.arange(0, STEP), D, stride_xn, stride_xd)
        b_peak = tl.maximum(b_peak, tl.max(tl.abs(b_a), axis=1))
    return _exponent(b_peak)


@triton.jit
def _measure(x_ptr, centre_ptr, o_n, m_n, D, stride_xn, stride_xd, DP: tl.constexpr, STEP: tl.constexpr):
    """Of each centred row: exponent, square length, square of what float16 loses; and the row in float16.

    A wide row is read three times, from the cache after the first: at once in float32 it would leave no registers.
    """
    o_d = tl.arange(0, DP)
    if DP <= STEP:
        b_a = _load_centred(x_ptr, centre_ptr, o_n, m_n, o_d, D, stride_xn, stride_xd)
        b_e = _exponent(tl.max(tl.abs(b_a), axis=1))
        b_a = b_a * _power(-b_e)[:, None]
        acc_square = tl.sum(b_a * b_a, axis=1)
        b_high = tl.where((acc_square < float("inf"))[:, None], b_a, 0.0).to(tl.float16)
        b_rest = b_a - b_high.to(tl.float32)
        acc_rest = tl.sum(b_rest * b_rest, axis=1)
    else:
        b_e = _row_exponent(x_ptr, centre_ptr, o_n, m_n, D, stride_xn, stride_xd, DP)
        acc_square = tl.zeros((o_n.shape[0],), tl.float32)
        acc_rest = tl.zeros((o_n.shape[0],), tl.float32)
        for i_d in tl.range(0, DP, 32, num_stages=1):
            o_part = i_d + tl.arange(0, 32)
            b_part, b_rest = _halves(x_ptr, centre_ptr, o_n, m_n, o_part, _power(-b_e), D, stride_xn, stride_xd)
            b_a = b_part.to(tl.float32) + b_rest
            acc_square += tl.sum(b_a * b_a, axis=1)
            acc_rest += tl.sum(b_rest * b_rest, axis=1)
        b_a = _load_centred(x_ptr, centre_ptr, o_n, m_n, o_d, D, stride_xn, stride_xd) * _power(-b_e)[:, None]
        b_high = tl.where((acc_square < float("inf"))[:, None], b_a, 0.0).to(tl.float16)
    return b_e, acc_square, acc_rest, b_high


@triton.jit(do_not_specialize=["N", "K", "P"])
def _screen_kernel(
    x_ptr, codebook_ptr, centre_ptr, high_ptr, half_norm_ptr, reach_ptr, slack_ptr, exponent_ptr,
    indices_ptr, quantized_ptr, distance_ptr, keys_ptr, doubtful_ptr, counters_ptr,
    N, K, D, P, stride_xn, stride_xd, stride_ck, stride_cd, DP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CERTIFY: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """The nearest code by one pass of float16 products; with CERTIFY, lists the rows where that may be wrong."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    o_n = first + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_e, acc_square, acc_rest, b_high = _measure(
        x_ptr, centre_ptr, o_n, m_n, D, stride_xn, stride_xd, DP, 64
    )  # fmt: skip
    m_fine = acc_square < float("inf")
    o_p = tl.arange(0, PARTS)
    reach = tl.max(tl.load(reach_ptr + o_p, mask=o_p < P, other=0.0), axis=0)
    slack = tl.max(tl.load(slack_ptr + o_p, mask=o_p < P, other=0.0), axis=0)
    b_away = b_e - tl.load(exponent_ptr)
    b_scale = _power(tl.minimum(tl.maximum(b_away, -FARTHEST), FARTHEST))
    b_length = tl.sqrt(tl.where(m_fine, acc_square, 0.0))
    b_top = b_length * reach * (1 + 2.0**-6)  # no product is above it, so every score is positive ...
    # the two roundings to float16, as they were; then sums, products and half norms in float32
    b_error = tl.sqrt(acc_rest) * reach * (1 + 2.0**-9) + b_length * slack
    b_error = 1.01 * b_scale * (b_error + b_length * reach * ((DP + 24) * 2.0**-22))
    b_error += reach * reach * ((DP + 16) * 2.0**-25)
    b_error = tl.where(tl.abs(b_away) > FARTHEST, float("inf"), b_error)
    b_error = tl.where(m_fine, b_error, -1.0)  # one vector says it all: registers are short in the loop

    b_best, b_tile = tl.full((BLOCK_N,), 0x7FFFFFFF, tl.int32), tl.zeros((BLOCK_N,), tl.int32)
    b_second = b_best
    KEEP: tl.constexpr = -BLOCK_K
    o_c = tl.arange(0, BLOCK_K)
    for i_k in tl.range(0, K, BLOCK_K):
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        b_codes = tl.load(high_ptr + (i_k + o_c)[:, None] * DP + tl.arange(0, DP)[None, :])  # [BLOCK_K, DP]
        acc = tl.dot(b_high, tl.trans(b_codes), acc, input_precision="ieee")
        b_half = tl.load(half_norm_ptr + i_k + o_c)
        b_score = b_scale[:, None] * (b_top[:, None] - acc) + b_half[None, :]
        # ... and as integers they keep their order, with room in their last bits for the column
        b_key = (b_score.to(tl.int32, bitcast=True) & KEEP) | o_c[None, :]
        if CERTIFY:
            b_one, b_other = tl.split(tl.reshape(b_key, (BLOCK_N, BLOCK_K // 2, 2)))
            b_less, b_more = tl.minimum(b_one, b_other), tl.maximum(b_one, b_other)
            b_least = tl.min(b_less, axis=1)
            b_next = tl.min(tl.where(b_less == b_least[:, None], b_more, b_less), axis=1)
            b_second = tl.minimum(tl.minimum(b_second, b_next), tl.maximum(b_best, b_least))
        else:
            b_least = tl.min(b_key, axis=1)
        m_new = (b_least & KEEP) < (b_best & KEEP)
        b_tile = tl.where(m_new, i_k, b_tile)
        b_best = tl.where(m_new, b_least, b_best)

    b_index = tl.where(b_error < 0, 0, b_tile + (b_best & (BLOCK_K - 1)))
    # counted from the tile's first row: the addresses from above would fill registers all through the loop
    o_r = tl.arange(0, BLOCK_N)
    m_r = o_r < tl.minimum(N - first, BLOCK_N).to(tl.int32)
    m_bad = _finish(
        x_ptr + first * stride_xn, codebook_ptr, indices_ptr + first, quantized_ptr + first * D, distance_ptr + first,
        keys_ptr + first, o_r, m_r, b_index, K, D, stride_xn, stride_xd, stride_ck, stride_cd, DP, STATISTICS,
    )  # fmt: skip
    n_bad = tl.sum(m_bad.to(tl.int32), axis=0)
    if n_bad > 0:
        tl.atomic_add(counters_ptr, n_bad.to(tl.int64))
    if CERTIFY:
        b_least = (b_best & KEEP).to(tl.float32, bitcast=True) * (1 + BLOCK_K * 2.0**-22)
        m_sure = (b_second & KEEP).to(tl.float32, bitcast=True) - b_least > 2 * b_error
        m_doubt = m_r & (b_error >= 0) & (m_sure == 0)
        n_doubt = tl.sum(m_doubt.to(tl.int32), axis=0)
        if n_doubt > 0:
            o_list = tl.atomic_add(counters_ptr + 1, n_doubt.to(tl.int64)) + tl.cumsum(m_doubt.to(tl.int32), axis=0) - 1
            tl.store(doubtful_ptr + o_list, (first + o_r).to(tl.int32), mask=m_doubt)


@triton.jit(do_not_specialize=["K"])
def _second_look_kernel(
    x_ptr, codebook_ptr, centre_ptr, high_ptr, low_ptr, half_norm_ptr, exponent_ptr,
    indices_ptr, quantized_ptr, distance_ptr, keys_ptr, doubtful_ptr, counters_ptr,
    K, D, stride_xn, stride_xd, stride_ck, stride_cd, DP: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """The nearest code of the listed rows, products of 22-bit numbers: three float16 products each."""
    count = tl.load(counters_ptr + 1)
    o_c = tl.arange(0, BLOCK_K)
    for i_n in tl.range(tl.program_id(0).to(tl.int64) * BLOCK_N, count, tl.num_programs(0) * BLOCK_N, num_stages=1):
        o_i = i_n + tl.arange(0, BLOCK_N)
        m_n = o_i < count
        o_n = tl.load(doubtful_ptr + o_i, mask=m_n, other=0).to(tl.int64)
        b_e = _row_exponent(x_ptr, centre_ptr, o_n, m_n, D, stride_xn, stride_xd, DP)
        b_unit = _power(-b_e)
        b_scale = b_e - tl.load(exponent_ptr)
        b_scale = _power(tl.minimum(tl.maximum(b_scale, -FARTHEST), FARTHEST))
        b_best, b_index = tl.full((BLOCK_N,), float("inf"), tl.float32), tl.zeros((BLOCK_N,), tl.int32)
        for i_k in tl.range(0, K, BLOCK_K):
            b_half = tl.load(half_norm_ptr + i_k + o_c)
            acc_high, acc_low = tl.zeros((BLOCK_N, BLOCK_K), tl.float32), tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for i_d in tl.range(0, DP, CHUNK):
                o_d = i_d + tl.arange(0, CHUNK)
                o_codes = (i_k + o_c)[:, None] * DP + o_d[None, :]
                b_high_codes = tl.trans(tl.load(high_ptr + o_codes))  # [CHUNK, BLOCK_K]
                b_low_codes = tl.trans(tl.load(low_ptr + o_codes))
                b_high, b_rest = _halves(x_ptr, centre_ptr, o_n, m_n, o_d, b_unit, D, stride_xn, stride_xd)
                b_low = (b_rest * (1.0 / LOW)).to(tl.float16)
                acc_low = tl.dot(b_low, b_high_codes, acc_low, input_precision="ieee")
                acc_low = tl.dot(b_high, b_low_codes, acc_low, input_precision="ieee")
                acc_high = tl.dot(b_high, b_high_codes, acc_high, input_precision="ieee")
            b_score = b_half[None, :] - b_scale[:, None] * (acc_high + LOW * acc_low)
            b_least = tl.min(b_score, axis=1)
            b_column = tl.min(tl.where(b_score == b_least[:, None], o_c[None, :], BLOCK_K), axis=1)
            b_index = tl.where(b_least < b_best, i_k + b_column, b_index)
            b_best = tl.minimum(b_least, b_best)
        _finish(
            x_ptr, codebook_ptr, indices_ptr, quantized_ptr, distance_ptr, keys_ptr, o_n, m_n, b_index, K, D,
            stride_xn, stride_xd, stride_ck, stride_cd, DP, STATISTICS,
        )  # fmt: skip
