"""Triton kernels of the reverse scan: back through a frame's candidate, then through its gates to the frame before."""

import triton
import triton.language as tl
from fastvid.kernels.conv_gru.triton_product import _convolved, _gathered, _read, _rows, _tile_of, _write


@triton.jit(do_not_specialize=["N", "H", "W", "splits"])
def _back_candidate_kernel(
    grad_ptr, weight_ptr, kept_ptr, h_ptr, to_kept_ptr, carry_ptr, part_ptr, count_ptr, N, H, W, C, splits,
    stride_db, stride_dy, stride_dx, stride_kb, stride_ky, stride_kx, stride_hb, stride_hy, stride_hx,
    stride_tb, stride_ty, stride_tx,
    K: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """From a frame's gradient before c's activation, in grad [.., 3C], that before r's, there too; carry [N, C] gets
    what r . h hands back to the state before. weight: the candidate's, turned around. h: None for zeros; to_kept: the
    gradient of kept, or None."""
    i_split, i_o, o_n = _tile_of(tl.cdiv(C, BLOCK_O), splits, BLOCK_N)
    o_c = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    acc = _convolved(None if h_ptr is None else grad_ptr + 2 * C, weight_ptr, i_split, splits, o_c, o_c < C, o_n, N, H,
                     W, C, stride_db, stride_dy, stride_dx, K, STEPS, EVEN, BLOCK_I)  # fmt: skip
    acc, whole = _gathered(acc, part_ptr, count_ptr, i_split, splits, SPLIT)
    if whole:
        m = (o_c < C)[:, None] & (o_n < N)[None, :]
        b_r = _read(kept_ptr, _rows(o_n, H, W, stride_kb, stride_ky, stride_kx), o_c, m)
        b_grad = tl.zeros(m.shape, tl.float32)
        if h_ptr is not None:
            o_carry = o_n.to(tl.int64) * C
            _write(carry_ptr, o_carry, o_c, _read(carry_ptr, o_carry, o_c, m) + acc * b_r, m)
            b_grad = acc * _read(h_ptr, _rows(o_n, H, W, stride_hb, stride_hy, stride_hx), o_c, m)
        if to_kept_ptr is not None:
            b_grad += _read(to_kept_ptr, _rows(o_n, H, W, stride_tb, stride_ty, stride_tx), o_c, m)
        o_grad = _rows(o_n, H, W, stride_db, stride_dy, stride_dx)
        _write(grad_ptr, o_grad, o_c, b_grad * b_r * (1.0 - b_r), m)


@triton.jit(do_not_specialize=["N", "H", "W", "splits"])
def _back_gates_kernel(
    later_ptr, weight_ptr, carry_ptr, first_ptr, grad_ptr, kept_ptr, h_ptr, to_state_ptr, to_kept_ptr,
    part_ptr, count_ptr, N, H, W, C, splits,
    stride_db, stride_dy, stride_dx, stride_kb, stride_ky, stride_kx, stride_hb, stride_hy, stride_hx,
    stride_sb, stride_sy, stride_sx, stride_tb, stride_ty, stride_tx, RELU: tl.constexpr,
    K: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """What the gates of the frame after, `later` [.., 3C], hand back to a frame's state (None: there is none), with
    what carry [N, C] holds of that; from it, the gradients before u's and c's activations into grad [.., 3C], and into
    carry what u hands on. Where `first` [N, C] is given the state is the one before all frames, and its gradient goes
    there. to_state, to_kept: gradients of what the frame returned, or None. `later` and `grad` have the same strides.
    """
    i_split, i_o, o_n = _tile_of(tl.cdiv(C, BLOCK_O), splits, BLOCK_N)
    o_c = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    acc = _convolved(later_ptr, weight_ptr, i_split, splits, o_c, o_c < C, o_n, N, H, W, 2 * C, stride_db, stride_dy,
                     stride_dx, K, STEPS, EVEN, BLOCK_I)  # fmt: skip
    acc, whole = _gathered(acc, part_ptr, count_ptr, i_split, splits, SPLIT)
    if whole:
        m, o_carry = (o_c < C)[:, None] & (o_n < N)[None, :], o_n.to(tl.int64) * C
        if later_ptr is not None:
            acc += _read(carry_ptr, o_carry, o_c, m)
        if first_ptr is not None:
            _write(first_ptr, o_carry, o_c, acc, m)
        else:
            if to_state_ptr is not None:
                acc += _read(to_state_ptr, _rows(o_n, H, W, stride_sb, stride_sy, stride_sx), o_c, m)
            o_kept = _rows(o_n, H, W, stride_kb, stride_ky, stride_kx)
            b_u, b_c = _read(kept_ptr, o_kept, o_c + C, m), _read(kept_ptr, o_kept, o_c + 2 * C, m)
            b_to_u, b_to_c = -acc * b_c, acc * (1.0 - b_u)
            if h_ptr is not None:
                b_h = _read(h_ptr, _rows(o_n, H, W, stride_hb, stride_hy, stride_hx), o_c, m)
                b_to_u = acc * (b_h - b_c)
            if to_kept_ptr is not None:
                o_to = _rows(o_n, H, W, stride_tb, stride_ty, stride_tx)
                b_to_u += _read(to_kept_ptr, o_to, o_c + C, m)
                b_to_c += _read(to_kept_ptr, o_to, o_c + 2 * C, m)
            b_to_c = tl.where(b_c > 0, b_to_c, 0.0) if RELU else b_to_c * (1.0 - b_c * b_c)
            o_grad = _rows(o_n, H, W, stride_db, stride_dy, stride_dx)
            _write(grad_ptr, o_grad, o_c + C, b_to_u * b_u * (1.0 - b_u), m)
            _write(grad_ptr, o_grad, o_c + 2 * C, b_to_c, m)
            _write(carry_ptr, o_carry, o_c, acc * b_u, m)
