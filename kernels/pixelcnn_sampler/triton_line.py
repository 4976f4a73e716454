"""The stages of triton_step.py as kernels: one for each stage, and one that draws a whole row by itself."""

import triton
import triton.language as tl
from fastvid.kernels.pixelcnn_sampler.packed import GLOBALS, LAYER
from fastvid.kernels.pixelcnn_sampler.triton_pass import INT8, LAYER_WORDS, T_AT, Y_AT, _item, _section
from fastvid.kernels.pixelcnn_sampler.triton_step import (
    _attended_stage,
    _draw_stage,
    _gate_stage,
    _look_stage,
    _plain_stage,
    _query_stage,
    _seen,
)  # fmt: skip

H_NOW, OUT, OUT_BIAS = (tl.constexpr(LAYER.index(name)) for name in ("h_now", "out", "out_bias"))
QKV, QKV_BIAS, QKV_POSITION = (tl.constexpr(LAYER.index(name)) for name in ("qkv", "qkv_bias", "qkv_position"))
ATT_OUT, ATT_BIAS = (tl.constexpr(LAYER.index(name)) for name in ("att_out", "att_bias"))
HEAD1, HEAD1_BIAS = tl.constexpr(GLOBALS.index("head1")), tl.constexpr(GLOBALS.index("head1_bias"))
HEAD2, HEAD2_BIAS = tl.constexpr(GLOBALS.index("head2")), tl.constexpr(GLOBALS.index("head2_bias"))


@triton.jit(do_not_specialize=["x", "B", "W", "group"])
def _gate_kernel(
    h_ptr, base_ptr, w_ptr, scale_ptr, gated_ptr, x, B, W, group, C: tl.constexpr, S: tl.constexpr, TAPS: tl.constexpr,
    KIND: tl.constexpr, PANELS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """_gate_stage for `PANELS` panels of `group` samples: the second sample finds the weights in the cache."""
    o_p = tl.program_id(0) * PANELS + tl.arange(0, PANELS)
    first = tl.program_id(1) * group
    for i_b in tl.range(first, tl.minimum(first + group, B)):
        _gate_stage(
            h_ptr, base_ptr, w_ptr, scale_ptr, gated_ptr, i_b, i_b * W + x, x, o_p, C, S, TAPS, KIND, BLOCK_K
        )  # fmt: skip


@triton.jit(do_not_specialize=["B", "group"])
def _plain_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, old_ptr, new_ptr, stride_x, stride_old, stride_new, B, group,
    K: tl.constexpr, N: tl.constexpr, ELU: tl.constexpr, ADD: tl.constexpr,
    KIND: tl.constexpr, PANELS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """_plain_stage for `PANELS` panels of `group` samples."""
    o_p = tl.program_id(0) * PANELS + tl.arange(0, PANELS)
    first = tl.program_id(1) * group
    for i_b in tl.range(first, tl.minimum(first + group, B)):
        _plain_stage(
            x_ptr + i_b * stride_x, w_ptr, scale_ptr, bias_ptr, old_ptr + i_b * stride_old, new_ptr + i_b * stride_new,
            o_p, K, N, ELU, ADD, KIND, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["x", "B", "T", "H", "W", "group"])
def _query_kernel(
    place_ptr, h_ptr, w_ptr, scale_ptr, bias_ptr, position_ptr, query_ptr, cache_ptr, x, B, T, H, W, group,
    C: tl.constexpr, S: tl.constexpr, A: tl.constexpr, E: tl.constexpr, KIND: tl.constexpr,
    PANELS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """_query_stage for `PANELS` panels of `group` samples; h [B W, S]."""
    t, y = tl.load(place_ptr + T_AT), tl.load(place_ptr + Y_AT)
    o_p = tl.program_id(0) * PANELS + tl.arange(0, PANELS)
    first = tl.program_id(1) * group
    for i_b in tl.range(first, tl.minimum(first + group, B)):
        _query_stage(
            h_ptr + (i_b * W + x) * S, w_ptr, scale_ptr, bias_ptr, position_ptr, query_ptr, cache_ptr,
            i_b, B, t, y, x, T, H, W, o_p, C, A, E, KIND, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["x", "B", "T", "H", "W"])
def _look_kernel(
    place_ptr, query_ptr, cache_ptr, part_ptr, peak_ptr, x, B, T, H, W, scale,
    A: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    KEYS: tl.constexpr, AXIAL: tl.constexpr,
):  # fmt: skip
    """_look_stage for one chunk of positions, one head, one sample; chunks that nothing is in yet are left alone."""
    t, y = tl.load(place_ptr + T_AT), tl.load(place_ptr + Y_AT)
    i_c, i_b = tl.program_id(0), tl.program_id(1) // A
    if i_c * CHUNK < _seen(t, y, x, H, W, AXIAL):
        _look_stage(
            query_ptr, cache_ptr, part_ptr, peak_ptr, i_b, tl.program_id(1) % A, i_c, B, t, y, x, T, H, W, scale,
            A, E, BLOCK_E, CHUNKS, CHUNK, KEYS, AXIAL,
        )  # fmt: skip


@triton.jit(do_not_specialize=["x", "B", "H", "W", "group"])
def _attended_kernel(
    place_ptr, part_ptr, peak_ptr, w_ptr, scale_ptr, bias_ptr, h_ptr, x, B, H, W, group,
    C: tl.constexpr, S: tl.constexpr, A: tl.constexpr, E: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_E: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, AXIAL: tl.constexpr, KIND: tl.constexpr,
    PANELS: tl.constexpr,
):  # fmt: skip
    """_attended_stage for `PANELS` panels of `group` samples; h [B W, S]."""
    t, y = tl.load(place_ptr + T_AT), tl.load(place_ptr + Y_AT)
    o_p = tl.program_id(0) * PANELS + tl.arange(0, PANELS)
    first = tl.program_id(1) * group
    for i_b in tl.range(first, tl.minimum(first + group, B)):
        _attended_stage(
            part_ptr, peak_ptr, w_ptr, scale_ptr, bias_ptr, h_ptr + (i_b * W + x) * S, i_b,
            _seen(t, y, x, H, W, AXIAL), o_p, C, A, E, BLOCK_A, BLOCK_E, CHUNKS, CHUNK, KIND,
        )  # fmt: skip


@triton.jit(do_not_specialize=["x", "T", "H", "W"])
def _draw_kernel(
    place_ptr, logits_ptr, noise_ptr, given_ptr, codes_ptr, logprob_ptr, margin_ptr, table_h_ptr, start_ptr, h_ptr,
    x, T, H, W, temperature, CODES: tl.constexpr, LOGITS: tl.constexpr, S: tl.constexpr, TAPS: tl.constexpr,
    GIVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """_draw_stage for one sample."""
    t, y = tl.load(place_ptr + T_AT), tl.load(place_ptr + Y_AT)
    _draw_stage(
        logits_ptr, noise_ptr, given_ptr, codes_ptr, logprob_ptr, margin_ptr, table_h_ptr, start_ptr, h_ptr,
        tl.program_id(0), t, y, x, T, H, W, temperature, CODES, LOGITS, S, TAPS, GIVEN, BLOCK_N, BLOCK_S,
    )  # fmt: skip


@triton.jit
def _matrix(w_ptr, f_ptr, table_ptr, word, KIND: tl.constexpr):
    """A matrix and its scales, which lie at the next word."""
    p_w = w_ptr + _section(table_ptr, word, _item(KIND))
    if KIND == INT8:
        return p_w, f_ptr + _section(table_ptr, word + 1, 4)
    else:
        return p_w, f_ptr


@triton.jit
def _line_attention(
    w_ptr, f_ptr, table_ptr, word, query_ptr, cache_ptr, part_ptr, peak_ptr, p_h, i_b, B, t, y, x, T, H, W, scale,
    C: tl.constexpr, S: tl.constexpr, A: tl.constexpr, E: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_E: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, AXIAL: tl.constexpr, KIND: tl.constexpr,
    PANELS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The three stages of attention by one program; a head's positions are one chunk."""
    o_p = tl.arange(0, PANELS)
    p_w, p_scale = _matrix(w_ptr, f_ptr, table_ptr, word + QKV, KIND)
    p_bias = f_ptr + _section(table_ptr, word + QKV_BIAS, 4)
    p_position = f_ptr + _section(table_ptr, word + QKV_POSITION, 4)
    for i_p in tl.range(0, (3 * A * E + 15) // 16, PANELS):
        _query_stage(
            p_h, p_w, p_scale, p_bias, p_position, query_ptr, cache_ptr, i_b, B, t, y, x, T, H, W, i_p + o_p,
            C, A, E, KIND, BLOCK_K,
        )  # fmt: skip
    tl.debug_barrier()
    for i_a in tl.range(0, A):
        _look_stage(
            query_ptr, cache_ptr, part_ptr, peak_ptr, i_b, i_a, 0, B, t, y, x, T, H, W, scale,
            A, E, BLOCK_E, 1, CHUNK, KEYS, AXIAL,
        )  # fmt: skip
    tl.debug_barrier()
    p_w, p_scale = _matrix(w_ptr, f_ptr, table_ptr, word + ATT_OUT, KIND)
    p_bias = f_ptr + _section(table_ptr, word + ATT_BIAS, 4)
    for i_p in tl.range(0, S // 16, PANELS):
        _attended_stage(
            part_ptr, peak_ptr, p_w, p_scale, p_bias, p_h, i_b, CHUNK, i_p + o_p,
            C, A, E, BLOCK_A, BLOCK_E, 1, CHUNK, KIND,
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit(do_not_specialize=["B", "T", "H", "W", "L", "first_layer", "first_global"])
def _line_kernel(
    w_ptr, f_ptr, table_ptr, place_ptr, rows_ptr, base_ptr, gated_ptr, query_ptr, cache_ptr, part_ptr, peak_ptr,
    hidden_ptr, logits_ptr, noise_ptr, given_ptr, codes_ptr, logprob_ptr, margin_ptr, table_h_ptr, start_ptr,
    B, T, H, W, L, first_layer, first_global, temperature, scale,
    C: tl.constexpr, S: tl.constexpr, CODES: tl.constexpr, LOGITS: tl.constexpr, TAPS: tl.constexpr,
    A: tl.constexpr, E: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
    KEYS: tl.constexpr, AXIAL: tl.constexpr, GIVEN: tl.constexpr, KIND: tl.constexpr, PANELS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A row of one sample, position after position, stage after stage. A barrier between two stages makes what one
    thread wrote visible to the others: nobody outside the program reads it."""
    i_b = tl.program_id(0)
    t, y = tl.load(place_ptr + T_AT), tl.load(place_ptr + Y_AT)
    o_p = tl.arange(0, PANELS)
    row, base = B.to(tl.int64) * W * S, B.to(tl.int64) * W * (2 * C)
    for x in tl.range(0, W):
        i_m = i_b * W + x
        p_cache = cache_ptr
        for i_l in tl.range(0, L):
            word = first_layer + i_l * LAYER_WORDS
            p_h = rows_ptr + i_l * row
            p_base = base_ptr + (2 * i_l + 1) * base
            p_w, p_scale = _matrix(w_ptr, f_ptr, table_ptr, word + H_NOW, KIND)
            for i_p in tl.range(0, C // 8, PANELS):
                _gate_stage(p_h, p_base, p_w, p_scale, gated_ptr, i_b, i_m, x, i_p + o_p, C, S, TAPS, KIND, BLOCK_K)
            tl.debug_barrier()
            p_w, p_scale = _matrix(w_ptr, f_ptr, table_ptr, word + OUT, KIND)
            p_bias = f_ptr + _section(table_ptr, word + OUT_BIAS, 4)
            for i_p in tl.range(0, S // 16, PANELS):
                _plain_stage(
                    gated_ptr + i_b * S, p_w, p_scale, p_bias, p_h + i_m * S, p_h + row + i_m * S, i_p + o_p,
                    C, C, False, True, KIND, BLOCK_K,
                )  # fmt: skip
            tl.debug_barrier()
            if A > 0:
                if tl.load(table_ptr + word + QKV) >= 0:
                    _line_attention(
                        w_ptr, f_ptr, table_ptr, word, query_ptr, p_cache, part_ptr, peak_ptr, p_h + row + i_m * S,
                        i_b, B, t, y, x, T, H, W, scale,
                        C, S, A, E, BLOCK_A, BLOCK_E, CHUNK, KEYS, AXIAL, KIND, PANELS, BLOCK_K,
                    )  # fmt: skip
                    p_cache += 2 * (A * E) * B * T.to(tl.int64) * H * W
        p_w, p_scale = _matrix(w_ptr, f_ptr, table_ptr, first_global + HEAD1, KIND)
        p_bias = f_ptr + _section(table_ptr, first_global + HEAD1_BIAS, 4)
        for i_p in tl.range(0, S // 16, PANELS):
            _plain_stage(
                rows_ptr + L * row + i_m * S, p_w, p_scale, p_bias, p_bias, hidden_ptr + i_b * S, i_p + o_p,
                C, C, True, False, KIND, BLOCK_K,
            )  # fmt: skip
        tl.debug_barrier()
        p_w, p_scale = _matrix(w_ptr, f_ptr, table_ptr, first_global + HEAD2, KIND)
        p_bias = f_ptr + _section(table_ptr, first_global + HEAD2_BIAS, 4)
        for i_p in tl.range(0, LOGITS // 16, PANELS):
            _plain_stage(
                hidden_ptr + i_b * S, p_w, p_scale, p_bias, p_bias, logits_ptr + i_b * LOGITS, i_p + o_p,
                C, CODES, True, False, KIND, BLOCK_K,
            )  # fmt: skip
        tl.debug_barrier()
        _draw_stage(
            logits_ptr, noise_ptr, given_ptr, codes_ptr, logprob_ptr, margin_ptr, table_h_ptr, start_ptr, rows_ptr,
            i_b, t, y, x, T, H, W, temperature, CODES, LOGITS, S, TAPS, GIVEN, BLOCK_N, BLOCK_S,
        )  # fmt: skip
        tl.debug_barrier()
