"""Triton kernels of the statistics and of the moving average. No atomic addition of floats: bits never change."""

import triton
import triton.language as tl
from fastvid.kernels.nearest_codebook.triton_lookup import PARTS, _load_rows

BLOCK_ROWS = tl.constexpr(256)  # at most so many rows of one code are added up by one program


@triton.jit(do_not_specialize=["N", "K", "steps"])
def _starts_kernel(keys_ptr, starts_ptr, N, K, steps, BLOCK: tl.constexpr):
    """starts [K + 1]: where the rows of each code begin among the sorted keys, by bisection."""
    o_k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_low, b_high = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32) + N
    for _ in range(steps):
        b_middle = (b_low + b_high) // 2
        m_open = b_low < b_high
        b_key = tl.load(keys_ptr + b_middle, mask=m_open, other=0).to(tl.int32)
        b_low = tl.where(m_open & (b_key < o_k), b_middle + 1, b_low)
        b_high = tl.where(m_open & (b_key >= o_k), b_middle, b_high)
    tl.store(starts_ptr + o_k, b_low, mask=o_k <= K)


@triton.jit(do_not_specialize=["K"])
def _block_sums_kernel(
    x_ptr, order_ptr, starts_ptr, partial_ptr, sums_ptr, counts_ptr, K, D, stride_xn, stride_xd,
    DP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds up one block of the rows of one code: into sums where it is the only one, else into partial; counts.

    Block t of code j has the number starts[j] // BLOCK_ROWS + j + t: increasing, and known without a prefix sum.
    A code without rows has one block, which is empty.
    """
    i_block = tl.program_id(0)
    # the last code whose first block is not beyond this one: first among every 256th code, then among its neighbours
    o_k = tl.arange(0, 256) * 256
    b_first = tl.load(starts_ptr + o_k, mask=o_k < K, other=0) // BLOCK_ROWS + o_k
    i_k = tl.max(tl.where((o_k < K) & (b_first <= i_block), o_k, 0), axis=0)
    o_k = i_k + tl.arange(0, 256)
    b_first = tl.load(starts_ptr + o_k, mask=o_k < K, other=0) // BLOCK_ROWS + o_k
    i_k = tl.max(tl.where((o_k < K) & (b_first <= i_block), o_k, 0), axis=0)

    first, last = tl.load(starts_ptr + i_k), tl.load(starts_ptr + i_k + 1)
    i_part = i_block - first // BLOCK_ROWS - i_k
    begin = first + i_part * BLOCK_ROWS
    end = tl.minimum(begin + BLOCK_ROWS, last)
    o_d = tl.arange(0, DP)
    acc = tl.zeros((BLOCK_N, DP), tl.float32)
    for i_n in tl.range(begin, end, BLOCK_N):
        o_i = i_n + tl.arange(0, BLOCK_N)
        o_n = tl.load(order_ptr + o_i, mask=o_i < end, other=0)
        acc += _load_rows(x_ptr, o_n, o_i < end, o_d, D, stride_xn, stride_xd)
    b_sum = tl.sum(acc, axis=0)
    if last - first > BLOCK_ROWS:
        tl.store(partial_ptr + i_block.to(tl.int64) * D + o_d, b_sum, mask=(o_d < D) & (begin < end))
    else:
        tl.store(sums_ptr + i_k.to(tl.int64) * D + o_d, b_sum, mask=(o_d < D) & (i_part == 0))
    if i_part == 0:
        tl.store(counts_ptr + i_k, (last - first).to(tl.int64))


@triton.jit
def _code_sums_kernel(starts_ptr, partial_ptr, sums_ptr, D, DP: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sums of the codes whose rows fill several blocks."""
    i_k = tl.program_id(0)
    first, last = tl.load(starts_ptr + i_k), tl.load(starts_ptr + i_k + 1)
    if last - first > BLOCK_ROWS:
        o_d = tl.arange(0, DP)
        acc = tl.zeros((BLOCK_N, DP), tl.float32)
        begin = first // BLOCK_ROWS + i_k
        end = begin + (last - first + BLOCK_ROWS - 1) // BLOCK_ROWS
        for i_n in tl.range(begin, end, BLOCK_N):
            o_n = i_n + tl.arange(0, BLOCK_N)
            acc += _load_rows(partial_ptr, o_n, o_n < end, o_d, D, D, 1)
        tl.store(sums_ptr + i_k.to(tl.int64) * D + o_d, tl.sum(acc, axis=0), mask=o_d < D)


@triton.jit
def _sum64(high, low):
    """A float64 that came as two float32, which is all that a kernel is given of a float."""
    return tl.full((), high, tl.float64) + tl.full((), low, tl.float64)


@triton.jit(do_not_specialize=["K"])
def _average_kernel(
    size_ptr, sum_ptr, counts_ptr, sums_ptr, kept_ptr, partial_ptr, steps_ptr, decay, decay_rest, K, D,
    stride_size, stride_mk, stride_md, stride_counts, stride_sk, stride_sd,
    STEPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """N and m moved towards the batch; kept: codes whose sums are finite; partial: sum of N over this block."""
    i_p = tl.program_id(0)
    o_k = (i_p * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    m_k = o_k < K
    weight = (1.0 - _sum64(decay, decay_rest)).to(tl.float32)
    b_bad = tl.zeros((BLOCK_K,), tl.int32)
    for i_d in range(0, D, BLOCK_D):
        b_s = _load_rows(sums_ptr, o_k, m_k, i_d + tl.arange(0, BLOCK_D), D, stride_sk, stride_sd)
        b_bad |= tl.max(tl.where(tl.abs(b_s) < float("inf"), 0, 1), axis=1)
    m_kept = m_k & (b_bad == 0)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        b_s = _load_rows(sums_ptr, o_k, m_kept, o_d, D, stride_sk, stride_sd)
        p_m = sum_ptr + o_k[:, None] * stride_mk + o_d[None, :].to(tl.int64) * stride_md
        m = m_kept[:, None] & (o_d < D)[None, :]
        b_m = tl.load(p_m, mask=m, other=0.0)
        tl.store(p_m, b_m + weight * (b_s - b_m), mask=m)
    b_size = tl.load(size_ptr + o_k * stride_size, mask=m_k, other=0.0)
    b_n = tl.load(counts_ptr + o_k * stride_counts, mask=m_k, other=0).to(tl.float32)
    b_size = tl.where(m_kept, b_size + weight * (b_n - b_size), b_size)
    tl.store(size_ptr + o_k * stride_size, b_size, mask=m_k)
    tl.store(kept_ptr + o_k, m_kept.to(tl.int8), mask=m_k)
    tl.store(partial_ptr + i_p, tl.sum(b_size, axis=0))
    if STEPS:
        if i_p == 0:
            tl.store(steps_ptr, tl.load(steps_ptr) + 1)


@triton.jit(do_not_specialize=["K", "P"])
def _codes_kernel(
    codebook_ptr, size_ptr, sum_ptr, kept_ptr, partial_ptr, steps_ptr, restart_ptr,
    decay, decay_rest, eps, dead_below, restart_size, K, D, P,
    stride_ck, stride_cd, stride_size, stride_mk, stride_md, stride_rk, stride_rd,
    STEPS: tl.constexpr, RESTART: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The codes from N and m; then the dead ones reborn, code, count and sum together."""
    o_k = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    m_k = o_k < K
    o_p = tl.arange(0, PARTS)
    total = tl.sum(tl.load(partial_ptr + o_p, mask=o_p < P, other=0.0), axis=0)
    share = total * 0 + 1.0  # of the moving average's weights that have been given out by now
    if STEPS:
        t, power = tl.load(steps_ptr), _sum64(decay, decay_rest)
        rest = power * 0 + 1.0
        while t > 0:
            rest = tl.where((t & 1) == 1, rest * power, rest)
            power, t = power * power, t >> 1
        share = (1.0 - rest).to(tl.float32)
    total = total / share
    b_size = tl.load(size_ptr + o_k * stride_size, mask=m_k, other=0.0)
    b_seen = b_size / share
    b_smooth = (b_seen + eps) / (total + eps * K) * total
    m_move = (tl.load(kept_ptr + o_k, mask=m_k, other=0) != 0) & (b_smooth > 0)
    m_dead = m_k & (b_seen < dead_below)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        b_m = _load_rows(sum_ptr, o_k, m_move, o_d, D, stride_mk, stride_md)
        b_e = (b_m / share) / b_smooth[:, None]
        m_d = (o_d < D)[None, :]
        m_write = m_move
        if RESTART:
            b_r = _load_rows(restart_ptr, o_k, m_dead, o_d, D, stride_rk, stride_rd)
            p_m = sum_ptr + o_k[:, None] * stride_mk + o_d[None, :].to(tl.int64) * stride_md
            tl.store(p_m, b_r * (restart_size * share), mask=m_dead[:, None] & m_d)
            b_e = tl.where(m_dead[:, None], b_r, b_e)
            m_write = m_move | m_dead
        p_e = codebook_ptr + o_k[:, None] * stride_ck + o_d[None, :].to(tl.int64) * stride_cd
        tl.store(p_e, b_e, mask=m_write[:, None] & m_d)
    if RESTART:
        tl.store(size_ptr + o_k * stride_size, tl.zeros_like(b_size) + restart_size * share, mask=m_dead)
