"""Triton kernels of attention inside boxes: whole boxes in one tile, many keys in a loop, keys split and merged.

A unit is one head of one box; units are numbered with the heads next to each other. Axes are turned by the launcher so
that a box that is a line lies along the last one, x, whichever of the grid's that is (LINE).
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
EVERYTHING, CAUSAL, STRICT = (tl.constexpr(number) for number in range(3))
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


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
def _product(b, b_other, KIND: tl.constexpr):
    """b, float32, rounded to what b_other was loaded as, times it."""
    return tl.dot(_factor(_rounded(b, KIND)), b_other, input_precision="ieee")


@triton.jit
def _places(i_u, o_i, A, CT, CY, CX, ST, SY, SX, LINE: tl.constexpr):
    """Sample, t, y, x and head of positions o_i of unit i_u; CT, CY, CX boxes of ST, SY, SX positions a sample.

    Lines have no t: the launcher counts it with the samples or with y.
    """
    i_box, i_a = i_u // A, i_u % A
    o_x, i_row = i_box % CX * SX, i_box // CX
    o_y, i_frame = i_row % CY, i_row // CY
    if LINE:
        o_b, o_t, o_x = i_frame, i_frame, o_x + o_i
    else:
        o_row = o_i // SX
        o_b, o_t = i_frame // CT, i_frame % CT * ST + o_row // SY
        o_y, o_x = o_y * SY + o_row % SY, o_x + o_i % SX
    return o_b, o_t, o_y, o_x, i_a


@triton.jit
def _strided(place, stride_b, stride_t, stride_y, stride_x, stride_a, LINE: tl.constexpr):
    """64-bit offsets of places in a tensor [B, T, H, W, A, E]."""
    o_b, o_t, o_y, o_x, o_a = place
    o = o_b.to(tl.int64) * stride_b + o_y.to(tl.int64) * stride_y + o_a.to(tl.int64) * stride_a
    if not LINE:
        o += o_t.to(tl.int64) * stride_t
    return o + o_x.to(tl.int64) * stride_x


@triton.jit
def _read(ptr, o_rows, m_rows, stride_c, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns `first` to first + BLOCK of some rows, [rows, BLOCK], zeros where there is nothing."""
    o_c = first + tl.arange(0, BLOCK)
    m = m_rows[:, None]
    if WIDTH % BLOCK:
        m = m & (o_c < WIDTH)[None, :]
    return _factor(tl.load(ptr + (o_rows[:, None] + o_c[None, :].to(tl.int64) * stride_c), mask=m, other=0.0))


@triton.jit
def _write(ptr, o_rows, m_rows, first, b, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """What _read reads, with columns next to each other; rounded."""
    o_c = first + tl.arange(0, BLOCK)
    m = m_rows[:, None]
    if WIDTH % BLOCK:
        m = m & (o_c < WIDTH)[None, :]
    tl.store(ptr + (o_rows[:, None] + o_c[None, :]), _rounded(b, ptr.dtype.element_ty), mask=m)


@triton.jit
def _products(
    ptr, o_rows, m_rows, stride_c, other_ptr, o_others, m_others, stride_o, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Products of rows with other rows, [rows, others], BLOCK columns at a time: a long row of float32 factors in
    registers, as products without tensor cores have them, would spill."""
    acc = tl.dot(
        _read(ptr, o_rows, m_rows, stride_c, 0, WIDTH, BLOCK),
        tl.trans(_read(other_ptr, o_others, m_others, stride_o, 0, WIDTH, BLOCK)), input_precision="ieee",
    )  # fmt: skip
    for i in tl.static_range(1, (WIDTH + BLOCK - 1) // BLOCK):
        b = _read(ptr, o_rows, m_rows, stride_c, i * BLOCK, WIDTH, BLOCK)
        b_other = _read(other_ptr, o_others, m_others, stride_o, i * BLOCK, WIDTH, BLOCK)
        acc = tl.dot(b, tl.trans(b_other), acc, input_precision="ieee")
    return acc


@triton.jit
def _seen(o_i, o_j, m_i, m_j, gap, MASK: tl.constexpr):
    """Which keys j a query i sees; gap = keys less queries."""
    m = m_i & m_j
    if MASK == CAUSAL:
        m = m & (o_j <= o_i + gap)
    elif MASK == STRICT:
        m = m & (o_j < o_i + gap)
    return m


@triton.jit
def _bias(bias_ptr, i_a, o_i, o_j, m_i, m_j, stride_a, stride_i, stride_j, WHOLE: tl.constexpr):
    """The bias of scores for exp2; 0.0 without. o_i, o_j and their masks as rows and columns of the tile, or turned.

    A bias has less than 2**31 elements. WHOLE: there are keys in all columns; a mask of them would keep loads narrow.
    """
    if bias_ptr is None:
        return 0.0
    else:
        m = m_i if WHOLE else m_i & m_j
        o = i_a * stride_a + o_i * stride_i + o_j * stride_j
        return tl.load(bias_ptr + o, mask=m, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def _binary(b_s, scale, b_bias, m):
    """Scores for exp2, of products q k: scaled, with the bias, -inf where not seen: see _top."""
    return tl.where(m, b_s * (scale * LOG2E) + b_bias, float("-inf"))


@triton.jit
def _top(b_top):
    """What to subtract from scores whose maximum is b_top, itself unless they are all -inf: -inf less -inf is NaN."""
    return tl.where(b_top == float("-inf"), 0.0, b_top)


@triton.jit
def _finish(
    acc, b_top, b_sum, out_ptr, lse_ptr, place, o_strides, m_i, first, A, LINE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stores the weighted sums over their weights' sum, and the logarithm of that; 0 and -inf where nothing is seen."""
    o_b, o_t, o_y, o_x = o_strides
    o_row = _strided(place, o_b, o_t, o_y, o_x, 0, LINE) * A + place[4]
    acc = acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    _write(out_ptr, o_row * D, m_i, first, acc, D, BLOCK_D)
    if lse_ptr is not None:
        b_lse = tl.where(b_sum == 0.0, float("-inf"), (_top(b_top) + tl.log2(b_sum)) * LN2)
        tl.store(lse_ptr + o_row, b_lse, mask=m_i & (first == 0))


@triton.jit(do_not_specialize=["units", "CT", "CY", "CX", "QT", "QY", "QX", "KT", "KY", "KX"])
def _tile_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, units, CT, CY, CX, QT, QY, QX, KT, KY, KX, A, scale,
    stride_qb, stride_qt, stride_qy, stride_qx, stride_qa, stride_qe,
    stride_kb, stride_kt, stride_ky, stride_kx, stride_ka, stride_ke,
    stride_vb, stride_vt, stride_vy, stride_vx, stride_va, stride_vd,
    stride_ba, stride_bi, stride_bj, stride_ob, stride_ot, stride_oy, stride_ox,
    E: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, LINE: tl.constexpr, WHOLE: tl.constexpr,
    PACK: tl.constexpr, SLOT_N: tl.constexpr, SLOT_M: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Units whose keys fit one tile: PACK of them side by side, each in slots of SLOT_N rows and SLOT_M columns.

    A slot is a power of two, so that where in a tile a unit stands cannot change how the matrix units group its sums.
    Products of q and k are taken STEP columns at a time. Boxes of QT QY QX queries and KT KY KX keys; strides o, of out
    and lse, count positions. Programs: units, tiles of queries (with PACK 1), tiles of values' columns.
    """
    n, m = QT * QY * QX, KT * KY * KX
    columns: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tiles = tl.cdiv(n, SLOT_N)
    first = tl.program_id(0) % columns * BLOCK_D
    i_tile = tl.program_id(0) // columns
    o_i, o_j = tl.arange(0, PACK * SLOT_N), tl.arange(0, PACK * SLOT_M)
    if PACK == 1:
        i_u, i_v = i_tile // tiles, i_tile // tiles
        o_i += i_tile % tiles * SLOT_N
        m_i, m_j = o_i < n, o_j < m
        m_own = m_i[:, None]
    else:
        i_u, i_v = i_tile * PACK + o_i // SLOT_N, i_tile * PACK + o_j // SLOT_M
        o_i, o_j = o_i % SLOT_N, o_j % SLOT_M
        m_i, m_j = (o_i < n) & (i_u < units), (o_j < m) & (i_v < units)
        m_own = m_i[:, None] & (i_u[:, None] == i_v[None, :])
    place = _places(i_u, o_i, A, CT, CY, CX, QT, QY, QX, LINE)
    key = _places(i_v, o_j, A, CT, CY, CX, KT, KY, KX, LINE)
    o_q = _strided(place, stride_qb, stride_qt, stride_qy, stride_qx, stride_qa, LINE)
    o_k = _strided(key, stride_kb, stride_kt, stride_ky, stride_kx, stride_ka, LINE)
    o_v = _strided(key, stride_vb, stride_vt, stride_vy, stride_vx, stride_va, LINE)
    b_v = _read(v_ptr, o_v, m_j, stride_vd, first, D, BLOCK_D)
    b_s = _products(q_ptr, o_q, m_i, stride_qe, k_ptr, o_k, m_j, stride_ke, E, STEP)
    m_own = _seen(o_i[:, None], o_j[None, :], m_own, m_j[None, :], m - n, MASK)
    i_a = place[4] if PACK == 1 else place[4][:, None]
    b_bias = _bias(bias_ptr, i_a, o_i[:, None], o_j[None, :], m_i[:, None], m_j[None, :], stride_ba, stride_bi,
                   stride_bj, WHOLE)  # fmt: skip
    b_s = _binary(b_s, scale, b_bias, m_own)
    b_top = tl.max(b_s, axis=1)
    b_p = tl.exp2(b_s - _top(b_top)[:, None])
    b_sum = tl.sum(b_p, axis=1)
    acc = _product(b_p, b_v, v_ptr.dtype.element_ty)
    o_strides = stride_ob, stride_ot, stride_oy, stride_ox
    _finish(acc, b_top, b_sum, out_ptr, lse_ptr, place, o_strides, m_i, first, A, LINE, D, BLOCK_D)


@triton.jit(do_not_specialize=["CT", "CY", "CX", "QT", "QY", "QX", "KT", "KY", "KX", "rows"])
def _long_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, part_ptr, rows, CT, CY, CX, QT, QY, QX, KT, KY, KX, A, scale,
    stride_qb, stride_qt, stride_qy, stride_qx, stride_qa, stride_qe,
    stride_kb, stride_kt, stride_ky, stride_kx, stride_ka, stride_ke,
    stride_vb, stride_vt, stride_vy, stride_vx, stride_va, stride_vd,
    stride_ba, stride_bi, stride_bj, stride_ob, stride_ot, stride_oy, stride_ox,
    E: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, LINE: tl.constexpr, WHOLE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_N queries of one unit, through its keys in tiles of BLOCK_M with a running softmax.

    CHUNK: 0, or as many keys as a program takes; then maximum and sum [2, chunks, rows] and weighted sums [chunks,
    rows, D] go to part, float32, for _merge_kernel; rows = units n. Programs: units, tiles of queries (those that see
    most first), chunks, tiles of values' columns. The rest as in _tile_kernel.
    """
    n, m = QT * QY * QX, KT * KY * KX
    columns: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    first = tl.program_id(0) % columns * BLOCK_D
    i_rest = tl.program_id(0) // columns
    begin, end, i_chunk, chunks = 0, m, 0, 1
    if CHUNK:
        chunks = tl.cdiv(m, CHUNK)
        i_chunk = i_rest % chunks
        i_rest = i_rest // chunks
        begin, end = i_chunk * CHUNK, tl.minimum(m, i_chunk * CHUNK + CHUNK)
    tiles = tl.cdiv(n, BLOCK_N)
    i_u, i_first = i_rest // tiles, (tiles - 1 - i_rest % tiles) * BLOCK_N
    if MASK != EVERYTHING:
        end = tl.minimum(end, tl.maximum(begin, tl.minimum(i_first + BLOCK_N, n) + (m - n)))
    o_i, o_c = i_first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    m_i = o_i < n
    place = _places(i_u, o_i, A, CT, CY, CX, QT, QY, QX, LINE)
    o_q = _strided(place, stride_qb, stride_qt, stride_qy, stride_qx, stride_qa, LINE)
    if STEP >= E:
        b_q = _read(q_ptr, o_q, m_i, stride_qe, 0, E, STEP)

    b_top, b_sum = tl.full((BLOCK_N,), float("-inf"), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i_j in tl.range(begin, end, BLOCK_M):
        o_j = i_j + o_c
        m_j = o_j < end
        key = _places(i_u, o_j, A, CT, CY, CX, KT, KY, KX, LINE)
        o_k = _strided(key, stride_kb, stride_kt, stride_ky, stride_kx, stride_ka, LINE)
        if STEP >= E:
            b_k = _read(k_ptr, o_k, m_j, stride_ke, 0, E, STEP)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        else:
            b_s = _products(q_ptr, o_q, m_i, stride_qe, k_ptr, o_k, m_j, stride_ke, E, STEP)
        m_s = _seen(o_i[:, None], o_j[None, :], m_i[:, None], m_j[None, :], m - n, MASK)
        b_bias = _bias(bias_ptr, place[4], o_i[:, None], o_j[None, :], m_i[:, None], m_j[None, :], stride_ba, stride_bi,
                       stride_bj, WHOLE)  # fmt: skip
        b_s = _binary(b_s, scale, b_bias, m_s)
        b_new = tl.maximum(b_top, tl.max(b_s, axis=1))
        b_p = tl.exp2(b_s - _top(b_new)[:, None])
        b_fade = tl.exp2(b_top - _top(b_new))
        b_sum = b_sum * b_fade + tl.sum(b_p, axis=1)
        o_v = _strided(key, stride_vb, stride_vt, stride_vy, stride_vx, stride_va, LINE)
        b_v = _read(v_ptr, o_v, m_j, stride_vd, first, D, BLOCK_D)
        b_p = _factor(_rounded(b_p, v_ptr.dtype.element_ty))
        acc = tl.dot(b_p, b_v, acc * b_fade[:, None], input_precision="ieee")
        b_top = b_new

    if CHUNK:
        o_row = (i_chunk.to(tl.int64) * rows) + i_u.to(tl.int64) * n + o_i
        all_rows = chunks.to(tl.int64) * rows
        tl.store(part_ptr + o_row, b_top, mask=m_i & (first == 0))
        tl.store(part_ptr + all_rows + o_row, b_sum, mask=m_i & (first == 0))
        _write(part_ptr + 2 * all_rows, o_row * D, m_i, first, acc, D, BLOCK_D)
    else:
        o_strides = stride_ob, stride_ot, stride_oy, stride_ox
        _finish(acc, b_top, b_sum, out_ptr, lse_ptr, place, o_strides, m_i, first, A, LINE, D, BLOCK_D)


@triton.jit(do_not_specialize=["rows", "chunks", "CT", "CY", "CX", "QT", "QY", "QX"])
def _merge_kernel(
    part_ptr, out_ptr, lse_ptr, rows, chunks, CT, CY, CX, QT, QY, QX, A, stride_ob, stride_ot, stride_oy, stride_ox,
    D: tl.constexpr, LINE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Joins what _long_kernel left in part, one chunk after the other: BLOCK of the rows, one tile of columns."""
    columns: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    first = tl.program_id(0) % columns * BLOCK_D
    n = QT * QY * QX
    o_r = tl.program_id(0) // columns * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < rows
    all_rows = tl.full((), 1, tl.int64) * chunks * rows
    b_top, b_sum = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    o_row = o_r.to(tl.int64)
    for _ in tl.range(0, chunks):
        b_next = tl.load(part_ptr + o_row, mask=m_r, other=float("-inf"))
        b_part = tl.load(part_ptr + all_rows + o_row, mask=m_r, other=0.0)
        b_acc = _read(part_ptr + 2 * all_rows, o_row * D, m_r, 1, first, D, BLOCK_D)
        b_new = tl.maximum(b_top, b_next)
        b_fade, b_rise = tl.exp2(b_top - _top(b_new)), tl.exp2(b_next - _top(b_new))
        b_sum = b_sum * b_fade + b_part * b_rise
        acc = acc * b_fade[:, None] + b_acc * b_rise[:, None]
        b_top = b_new
        o_row += rows
    place = _places(o_r // n, o_r % n, A, CT, CY, CX, QT, QY, QX, LINE)
    o_strides = stride_ob, stride_ot, stride_oy, stride_ox
    _finish(acc, b_top, b_sum, out_ptr, lse_ptr, place, o_strides, m_r, first, A, LINE, D, BLOCK_D)
