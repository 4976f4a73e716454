// The gradients at one box and head, tile by tile of its scores.
#pragma once

#include "axial_attention/cpu_backward_product.h"
#include "common/math.h"
#include "common/scratch.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t MOST_TILE = 64;  // queries and keys whose scores are in scratch at once

// What is the same at every box and head.
struct Task {
    AttentionGradCall call;
    int64_t n, m;                                                  // queries and keys of a box
    int64_t tile_queries, tile_keys, row_keys;                     // row_keys: tile_keys in whole vectors
    Operand q, k, v, out, grad_out, grad_q, grad_k, grad_v, lse, grad_lse;

    int64_t E_floats() const { return whole_vectors(call.E); }
    int64_t D_floats() const { return whole_vectors(call.D); }
    bool wants_slopes() const { return grad_q.present() || grad_k.present() || call.grad_bias; }
    bool one_tile_of_keys() const { return m <= tile_keys; }
    bool one_tile_of_queries() const { return n <= tile_queries; }
    // Whether products store these gradients where they belong, instead of in scratch.
    bool direct_q() const { return one_tile_of_keys() && grad_q.writable(); }
    bool direct(const Operand& of_keys) const { return one_tile_of_queries() && of_keys.writable(); }
};

struct Scratch {
    // rows here are of whole vectors
    float *queries, *given, *grad_queries;  // [n, E], [n, D], [n, E]
    float *lse, *grad_lse, *delta;          // [n]; delta: the sum of grad_out * out
    float *keys, *grad_keys, *values, *grad_values;  // [row_keys, E], [row_keys, E], [row_keys, D], [row_keys, D]
    float *turned_keys, *turned_values;     // [E, row_keys], [D, row_keys]
    float *weights, *slopes;                // [tile_queries, row_keys]: exp(s - lse), and the gradient at s
    float *bias;                            // [row_keys]
    float* out;                             // [D]: one row

    void cut(Cutter& cutter, const Task& task) {
        const int64_t E = task.E_floats(), D = task.D_floats(), row = task.row_keys;
        queries = cutter.cut<float>(task.n * E);
        given = cutter.cut<float>(task.n * D);
        grad_queries = cutter.cut<float>(task.n * E);
        lse = cutter.cut<float>(task.n);
        grad_lse = cutter.cut<float>(task.n);
        delta = cutter.cut<float>(task.n);
        keys = cutter.cut<float>(row * E);
        grad_keys = cutter.cut<float>(row * E);
        values = cutter.cut<float>(row * D);
        grad_values = cutter.cut<float>(row * D);
        turned_keys = cutter.cut<float>(E * row);
        turned_values = cutter.cut<float>(D * row);
        weights = cutter.cut<float>(task.tile_queries * row);
        slopes = cutter.cut<float>(task.tile_queries * row);
        bias = cutter.cut<float>(row);
        out = cutter.cut<float>(D);
    }
};

// One box and head.
struct Place {
    Rows q, k, v, out, grad_out, grad_q, grad_k, grad_v, lse, grad_lse;
    int64_t head;
    float* bias_sums;  // [n, m] of this head, to which gradients at scores are added, or null
};

// Part of what the heads of the next box read, from its first head on; nothing where boxes are more than the nearer
// caches hold.
inline Ahead ahead_of(const Task& task, const Place& next, int64_t part, int64_t parts) {
    Ahead ahead;
    if (!task.one_tile_of_keys() || !task.one_tile_of_queries()) return ahead;
    const Rows* const read[] = {&next.out, &next.grad_out, &next.v, &next.k, &next.q};
    for (const Rows* rows : read)
        if (rows->operand->present() && rows->operand->heads.strides[5] == 1) {
            const int64_t count = rows == &next.k || rows == &next.v ? task.m : task.n;
            ahead.add(*rows, part * count / parts, (part + 1) * count / parts, rows->operand->width * parts);
        }
    return ahead;
}

inline float product_of(const float* a, const float* b, int64_t count) {
    Floats sum = {};
    int64_t d = 0;
    for (; d + LANES <= count; d += LANES) sum = multiply_add(load<Floats>(a + d), load<Floats>(b + d), sum);
    float rest = 0;
    for (; d < count; ++d) rest += a[d] * b[d];
    return sum_of_lanes(sum) + rest;
}

// Everything about the queries that does not depend on keys.
inline void stage_queries(const Task& task, const Place& place, const Scratch& scratch) {
    const int64_t D = task.D_floats();
    stage_rows(place.q, 0, task.n, scratch.queries);
    for (int64_t i = 0; i < task.n; ++i) {
        scratch.lse[i] = *place.lse.row(i);
        scratch.grad_lse[i] = task.grad_lse.present() ? *place.grad_lse.row(i) : 0.0f;
        scratch.delta[i] = 0;
    }
    if (!task.grad_out.present()) return;
    stage_rows(place.grad_out, 0, task.n, scratch.given);
    if (!task.wants_slopes()) return;
    const bool readable = task.out.readable();
    for (int64_t i = 0; i < task.n; ++i) {
        if (!readable) stage_rows(place.out, i, 1, scratch.out);
        scratch.delta[i] = product_of(scratch.given + i * D, readable ? place.out.row(i) : scratch.out, task.call.D);
    }
}

inline const float* bias_row(const Scores& bias, int64_t head, int64_t i, int64_t j, int64_t count, float* to) {
    const int64_t at = head * bias.strides[0] + i * bias.strides[1] + j * bias.strides[2], step = bias.strides[2];
    if (bias.type == FLOAT32) widen_row((const float*)bias.data + at, step, count, to);
    if (bias.type == BFLOAT16) widen_row((const BFloat16*)bias.data + at, step, count, to);
    if (bias.type == FLOAT16) widen_row((const Float16*)bias.data + at, step, count, to);
    return to;
}

struct ScoreRow {
    float *weights, *slopes;  // come as products of q and k, and of grad_out and v
    const float* bias;        // or null
    float scale, lse, grad_lse, delta;
    bool wants_slopes, whole;  // whole: there are no keys but these

    // Keys from `seen` to `end` are hidden: whatever their lanes hold becomes zero.
    void differentiate(int64_t seen, int64_t end) const {
        // a single key's slope is delta, but rounded in another order: the difference is to be exactly zero
        const float mean = whole && wants_slopes && seen == 1 ? slopes[0] : delta;
        for (int64_t j = 0; j < seen; j += LANES) differentiate_lanes(j, seen, mean);
        const Floats zero = {};
        for (int64_t j = whole_vectors(seen); j < end; j += LANES) {
            store(weights + j, zero);
            if (wants_slopes) store(slopes + j, zero);
        }
    }
    void differentiate_lanes(int64_t j, int64_t seen, float mean) const {
        Floats s = load<Floats>(weights + j) * scale;
        if (bias) s += load<Floats>(bias + j);
        Floats weight = exp(s - lse), slope = {};
        if (wants_slopes) slope = weight * (load<Floats>(slopes + j) - mean + grad_lse);
        if (j + LANES > seen) weight = first_lanes(weight, seen - j, 0.0f), slope = first_lanes(slope, seen - j, 0.0f);
        store(weights + j, weight);
        if (wants_slopes) store(slopes + j, slope);
    }
};

// Scores of tiles become weights and gradients.
inline void differentiate_scores(const Task& task, const Place& place, const Scratch& scratch, const Sight& sight,
                                 int64_t i0, int64_t j0) {
    const AttentionGradCall& call = task.call;
    const int64_t end = whole_vectors(sight.keys);
    for (int64_t i = 0; i < sight.queries; ++i) {
        const float lse = scratch.lse[i0 + i];
        const int64_t seen = lse == -INFINITE ? 0 : sight.seen(i);
        ScoreRow row{scratch.weights + i * task.row_keys, scratch.slopes + i * task.row_keys,
                     nullptr, call.scale, lse, scratch.grad_lse[i0 + i], scratch.delta[i0 + i],
                     task.wants_slopes(), task.one_tile_of_keys()};
        if (call.bias.data) row.bias = bias_row(call.bias, place.head, i0 + i, j0, seen, scratch.bias);
        row.differentiate(seen, end);
        if (!place.bias_sums) continue;
        float* sums = place.bias_sums + (i0 + i) * task.m + j0;
        for (int64_t j = 0; j < seen; ++j) sums[j] += row.slopes[j];
    }
}

struct Target {
    float* to;
    int64_t step;
};

// The scores of queries from i0 and keys from j0, and what they add to the gradients. first: tile of these keys.
inline void differentiate_tile(const Task& task, const Place& place, const Scratch& scratch, const Sight& sight,
                               int64_t i0, int64_t j0, bool first, const Target& of_keys, const Target& of_values,
                               Ahead& ahead) {
    const AttentionGradCall& call = task.call;
    const int64_t E = task.E_floats(), D = task.D_floats(), row = task.row_keys;
    const float *queries = scratch.queries + i0 * E, *given = scratch.given + i0 * D;
    multiply_scores({queries, E, scratch.turned_keys, row, scratch.weights, row, 1.0f, false}, sight, call.E, ahead);
    if (task.wants_slopes()) {
        if (task.grad_out.present())
            multiply_scores({given, D, scratch.turned_values, row, scratch.slopes, row, 1.0f, false}, sight, call.D,
                            ahead);
        else
            __builtin_memset(scratch.slopes, 0, (size_t)(sight.queries * row) * sizeof(float));
    }
    differentiate_scores(task, place, scratch, sight, i0, j0);
    if (task.grad_v.present() && task.grad_out.present())
        multiply_queries({scratch.weights, row, given, D, of_values.to, of_values.step, 1.0f, !first}, sight, D, ahead);
    if (task.grad_k.present())
        multiply_queries({scratch.slopes, row, queries, E, of_keys.to, of_keys.step, call.scale, !first}, sight, E,
                         ahead);
    if (!task.grad_q.present()) return;
    const bool direct = task.direct_q();
    const int64_t step = direct ? task.grad_q.step : E;
    float* to = direct ? place.grad_q.row(i0) : scratch.grad_queries + i0 * E;
    multiply_keys({scratch.slopes, row, scratch.keys, E, to, step, call.scale, j0 > 0}, sight, E, ahead);
}

inline void stage_keys(const Task& task, const Place& place, const Scratch& scratch, int64_t begin, int64_t count) {
    const AttentionGradCall& call = task.call;
    stage_rows(place.k, begin, count, scratch.keys);
    turn_rows(scratch.keys, call.E, count, scratch.turned_keys, task.row_keys);
    if (!task.wants_slopes() || !task.grad_out.present()) return;
    stage_rows(place.v, begin, count, scratch.values);
    turn_rows(scratch.values, call.D, count, scratch.turned_values, task.row_keys);
}

inline Target target_of(const Task& task, const Operand& operand, const Rows& rows, int64_t begin, float* scratch) {
    if (operand.present() && task.direct(operand)) return {rows.row(begin), operand.step};
    return {scratch, whole_vectors(operand.width)};
}

inline void clear(const Target& target, int64_t rows, int64_t floats) {
    for (int64_t r = 0; r < rows; ++r) __builtin_memset(target.to + r * target.step, 0, (size_t)floats * sizeof(float));
}

inline void differentiate_box(const Task& task, const Place& place, const Scratch& scratch, Ahead& ahead) {
    stage_queries(task, place, scratch);
    const int64_t shift = task.call.mask == EVERYTHING ? INT64_MAX / 2 : task.m - task.n + (task.call.mask == CAUSAL);
    int64_t j0 = 0;
    do {  // a box without keys has gradients of its queries
        const int64_t keys = least(task.tile_keys, task.m - j0);
        const Target of_keys = target_of(task, task.grad_k, place.grad_k, j0, scratch.grad_keys);
        const Target of_values = target_of(task, task.grad_v, place.grad_v, j0, scratch.grad_values);
        stage_keys(task, place, scratch, j0, keys);
        bool first = true;
        for (int64_t i0 = 0; i0 < task.n; i0 += task.tile_queries) {
            const Sight sight{least(task.tile_queries, task.n - i0), keys, shift + i0 - j0};
            const bool last = i0 + task.tile_queries >= task.n;
            if (!last && j0 > 0 && !sight.seen(sight.queries - 1)) continue;
            differentiate_tile(task, place, scratch, sight, i0, j0, first, of_keys, of_values, ahead);
            first = false;
        }
        if (task.grad_v.present() && !task.grad_out.present()) clear(of_values, keys, task.call.D);
        if (task.grad_k.present() && !task.direct(task.grad_k))
            leave_rows(place.grad_k, j0, keys, of_keys.to, of_keys.step);
        if (task.grad_v.present() && !task.direct(task.grad_v))
            leave_rows(place.grad_v, j0, keys, of_values.to, of_values.step);
        j0 += task.tile_keys;
    } while (j0 < task.m);
    if (task.grad_q.present() && !task.direct_q())
        leave_rows(place.grad_q, 0, task.n, scratch.grad_queries, task.E_floats());
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
