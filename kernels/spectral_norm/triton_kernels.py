"""Triton kernels of spectral normalisation: each launch goes over all weights, whose pointers are in a table."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# columns of the table, a row for each weight; `launch` in triton_gpu.py fills them
MATRIX, SOURCE, OUT, LEFT, RIGHT, NEW_LEFT, NEW_RIGHT = (tl.constexpr(i) for i in range(7))
ROWS, COLS, PIECE, PIECES, PRODUCTS, SUMS, RUN, RUNS = (tl.constexpr(i) for i in range(7, 15))
FIELDS = tl.constexpr(15)


@triton.jit
def _rounded(b, KIND: tl.constexpr):
    """float32 to the nearest of another kind; to bfloat16 by hand in Triton's interpreter, which would cut."""
    if INTERPRETED and KIND == tl.bfloat16:
        b_bits = b.to(tl.int32, bitcast=True)
        b_bits = tl.where(b == b, b_bits + 0x7FFF + ((b_bits >> 16) & 1), b_bits | 0x400000)
        return (b_bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return b.to(KIND)


@triton.jit
def _pointer(p_weight, FIELD: tl.constexpr, KIND: tl.constexpr, EVEN: tl.constexpr):
    ptr = tl.load(p_weight + FIELD).to(tl.pointer_type(KIND))
    return tl.multiple_of(ptr, 16) if EVEN else ptr


@triton.jit
def _count(p_weight, FIELD: tl.constexpr, EVEN: tl.constexpr):
    count = tl.load(p_weight + FIELD)
    return tl.multiple_of(count, 8) if EVEN else count


@triton.jit
def _sweep_kernel(
    table_ptr, pieces_ptr, products_ptr, scales_ptr, sums_ptr,
    KIND: tl.constexpr, FIRST: tl.constexpr, WITH_SUMS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_R rows of a weight: W v, its largest magnitude, and what these rows add to W^T (W v) over that.

    FIRST: v is the given one; later iterations take the one that the last has made.
    """
    i_weight = tl.load(pieces_ptr + 2 * tl.program_id(0))
    i_piece = tl.load(pieces_ptr + 2 * tl.program_id(0) + 1)
    p_weight = table_ptr + i_weight * FIELDS
    rows, cols = tl.load(p_weight + ROWS), _count(p_weight, COLS, EVEN)
    matrix_ptr = _pointer(p_weight, MATRIX, KIND, EVEN)
    v_ptr = _pointer(p_weight, RIGHT if FIRST else NEW_RIGHT, tl.float32, EVEN)
    o_r = i_piece * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < rows
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i_c in range(0, cols, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < cols
        b_v = tl.load(v_ptr + o_c, mask=m_c, other=0.0)
        p_w = matrix_ptr + o_r[:, None] * cols + o_c[None, :]
        acc += tl.load(p_w, mask=m_r[:, None] & m_c[None, :], other=0.0).to(tl.float32) * b_v[None, :]
    b_product = tl.sum(acc, axis=1)
    tl.store(products_ptr + tl.load(p_weight + PRODUCTS) + o_r, b_product, mask=m_r)
    if WITH_SUMS:
        # over their largest, so that products with W stay within float32 however large or small W is
        scale = tl.max(tl.abs(b_product), axis=0)
        scale = tl.where(scale == 0.0, 1.0, scale)
        tl.store(scales_ptr + tl.load(p_weight + PIECE) + i_piece, scale)
        b_share = b_product / scale
        p_sums = sums_ptr + tl.load(p_weight + SUMS) + i_piece * cols
        for i_c in range(0, cols, BLOCK_C):
            o_c = i_c + tl.arange(0, BLOCK_C)
            m_c = o_c < cols
            p_w = matrix_ptr + o_r[:, None] * cols + o_c[None, :]
            b_w = tl.load(p_w, mask=m_r[:, None] & m_c[None, :], other=0.0).to(tl.float32)
            tl.store(p_sums + o_c, tl.sum(b_w * b_share[:, None], axis=0), mask=m_c)


@triton.jit
def _weigh_kernel(table_ptr, products_ptr, sigma_ptr, BLOCK: tl.constexpr):
    """sigma of a weight whose u and v stay: u times the products."""
    i_weight = tl.program_id(0).to(tl.int64)
    p_weight = table_ptr + i_weight * FIELDS
    rows, products = tl.load(p_weight + ROWS), products_ptr + tl.load(p_weight + PRODUCTS)
    u_ptr = _pointer(p_weight, LEFT, tl.float32, False)
    acc = tl.zeros((BLOCK,), tl.float64)
    for i_r in range(0, rows, BLOCK):
        o_r = i_r + tl.arange(0, BLOCK)
        b_product = tl.load(products + o_r, mask=o_r < rows, other=0.0).to(tl.float64)
        acc += b_product * tl.load(u_ptr + o_r, mask=o_r < rows, other=0.0).to(tl.float64)
    tl.store(sigma_ptr + i_weight, tl.sum(acc, axis=0).to(tl.float32))


@triton.jit
def _conclude_kernel(table_ptr, products_ptr, scales_ptr, sums_ptr, sigma_ptr, eps, BLOCK: tl.constexpr):
    """New u and v and sigma of a weight, from what its pieces found; lengths in float64, where no square overflows."""
    i_weight = tl.program_id(0).to(tl.int64)
    p_weight = table_ptr + i_weight * FIELDS
    rows, cols = tl.load(p_weight + ROWS), tl.load(p_weight + COLS)
    products, sums = products_ptr + tl.load(p_weight + PRODUCTS), sums_ptr + tl.load(p_weight + SUMS)
    scales, pieces = scales_ptr + tl.load(p_weight + PIECE), tl.load(p_weight + PIECES)
    u_ptr = _pointer(p_weight, NEW_LEFT, tl.float32, False)
    v_ptr = _pointer(p_weight, NEW_RIGHT, tl.float32, False)
    acc = tl.zeros((BLOCK,), tl.float64)
    for i_r in range(0, rows, BLOCK):
        o_r = i_r + tl.arange(0, BLOCK)
        b_product = tl.load(products + o_r, mask=o_r < rows, other=0.0).to(tl.float64)
        acc += b_product * b_product
    length = tl.maximum(tl.sqrt(tl.sum(acc, axis=0)).to(tl.float32), eps)
    for i_r in range(0, rows, BLOCK):
        o_r = i_r + tl.arange(0, BLOCK)
        tl.store(u_ptr + o_r, tl.load(products + o_r, mask=o_r < rows, other=0.0) / length, mask=o_r < rows)
    acc = tl.zeros((BLOCK,), tl.float64)
    for i_c in range(0, cols, BLOCK):
        o_c = i_c + tl.arange(0, BLOCK)
        m_c = o_c < cols
        acc_sum = tl.zeros((BLOCK,), tl.float32)
        for i_piece in range(0, pieces):
            acc_sum += tl.load(sums + i_piece * cols + o_c, mask=m_c, other=0.0) * (tl.load(scales + i_piece) / length)
        acc += acc_sum.to(tl.float64) * acc_sum.to(tl.float64)
        tl.store(sums + o_c, acc_sum, mask=m_c)  # over the first piece's
    length = tl.maximum(tl.sqrt(tl.sum(acc, axis=0)).to(tl.float32), eps)
    tl.debug_barrier()
    # v is a multiple of W^T u, so that u^T W v is their product
    acc = tl.zeros((BLOCK,), tl.float64)
    for i_c in range(0, cols, BLOCK):
        o_c = i_c + tl.arange(0, BLOCK)
        b_sum = tl.load(sums + o_c, mask=o_c < cols, other=0.0)
        b_v = b_sum / length
        acc += b_sum.to(tl.float64) * b_v.to(tl.float64)
        tl.store(v_ptr + o_c, b_v, mask=o_c < cols)
    tl.store(sigma_ptr + i_weight, tl.sum(acc, axis=0).to(tl.float32))


@triton.jit
def _divide_kernel(
    table_ptr, runs_ptr, sigma_ptr, KIND: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK elements of a weight over its sigma."""
    i_weight = tl.load(runs_ptr + 2 * tl.program_id(0))
    p_weight = table_ptr + i_weight * FIELDS
    count = tl.load(p_weight + ROWS) * _count(p_weight, COLS, EVEN)
    o = tl.load(runs_ptr + 2 * tl.program_id(0) + 1) * BLOCK + tl.arange(0, BLOCK)
    b_w = tl.load(_pointer(p_weight, SOURCE, KIND, EVEN) + o, mask=o < count, other=0.0).to(tl.float32)
    b_out = b_w / tl.load(sigma_ptr + i_weight)
    tl.store(_pointer(p_weight, OUT, KIND, EVEN) + o, _rounded(b_out, KIND), mask=o < count)


@triton.jit
def _product_kernel(
    table_ptr, runs_ptr, products_ptr, KIND: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """<G, W> of BLOCK elements, in float64: it may be far smaller than what it is made of. G is the table's SOURCE."""
    i_weight = tl.load(runs_ptr + 2 * tl.program_id(0))
    i_run = tl.load(runs_ptr + 2 * tl.program_id(0) + 1)
    p_weight = table_ptr + i_weight * FIELDS
    count = tl.load(p_weight + ROWS) * _count(p_weight, COLS, EVEN)
    o = i_run * BLOCK + tl.arange(0, BLOCK)
    b_w = tl.load(_pointer(p_weight, MATRIX, KIND, EVEN) + o, mask=o < count, other=0.0).to(tl.float32)
    b_g = tl.load(_pointer(p_weight, SOURCE, KIND, EVEN) + o, mask=o < count, other=0.0).to(tl.float32)
    product = tl.sum(b_w.to(tl.float64) * b_g.to(tl.float64), axis=0)
    tl.store(products_ptr + tl.load(p_weight + RUN) + i_run, product)


@triton.jit
def _move_kernel(
    table_ptr, pieces_ptr, products_ptr, sigma_ptr, KIND: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(G - <G, W> / sigma u v^T) / sigma of BLOCK_R rows of a weight."""
    i_weight = tl.load(pieces_ptr + 2 * tl.program_id(0))
    p_weight = table_ptr + i_weight * FIELDS
    rows, cols = tl.load(p_weight + ROWS), _count(p_weight, COLS, EVEN)
    runs, products = tl.load(p_weight + RUNS), products_ptr + tl.load(p_weight + RUN)
    acc = tl.zeros((BLOCK,), tl.float64)
    for i_run in range(0, runs, BLOCK):
        o_run = i_run + tl.arange(0, BLOCK)
        acc += tl.load(products + o_run, mask=o_run < runs, other=0.0)
    sigma = tl.load(sigma_ptr + i_weight)
    share = (tl.sum(acc, axis=0) / sigma.to(tl.float64)).to(tl.float32)
    grad_ptr, out_ptr = _pointer(p_weight, SOURCE, KIND, EVEN), _pointer(p_weight, OUT, KIND, EVEN)
    v_ptr = _pointer(p_weight, RIGHT, tl.float32, EVEN)
    o_r = tl.load(pieces_ptr + 2 * tl.program_id(0) + 1) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_u = share * tl.load(_pointer(p_weight, LEFT, tl.float32, False) + o_r, mask=o_r < rows, other=0.0)
    for i_c in range(0, cols, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m = (o_r < rows)[:, None] & (o_c < cols)[None, :]
        o = o_r[:, None] * cols + o_c[None, :]
        b_v = tl.load(v_ptr + o_c, mask=o_c < cols, other=0.0)
        b_g = tl.load(grad_ptr + o, mask=m, other=0.0).to(tl.float32)
        tl.store(out_ptr + o, _rounded((b_g - b_u[:, None] * b_v[None, :]) / sigma, KIND), mask=m)
