// Products of a few rows with what lies in panels, and rows of weights from rows of scores.
//
// Every sum has one order, whatever is evaluated together: a score sums e = 0 .. E - 1, a row of weights is summed lane
// by lane (key j to lane j modulo LANES), and an output sums j = 0 .. m - 1.
#pragma once

#include "axial_attention/cpu_lanes.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t PANEL = 2 * LANES;                 // keys, or channels of values, that one tile multiplies at once
constexpr int SHORT_ROWS = TILE_ROWS < 8 ? 8 : TILE_ROWS;  // rows of a tile of one vector
constexpr int ROOM = SHORT_ROWS <= LANES ? LANES : 2 * LANES;  // for a number of each row
static_assert(SHORT_ROWS <= ROOM && ROOM % LANES == 0);

// to[r][lane] = scale * rows[r] . column `lane` of a panel [E][PANEL], for VECTORS vectors of it.
template <int ROWS, int VECTORS>
inline void score_panel(const float* const* rows, int64_t E, const float* keys, float scale, float* to,
                        int64_t stride) {
    Floats total[ROWS][VECTORS];
    const float* q[ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
        q[r] = rows[r];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) total[r][v] = repeat(0.0f);
    }
#pragma GCC unroll 2
    for (int64_t e = 0; e < E; ++e, keys += PANEL) {
        Floats key[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) key[v] = load<Floats>(keys + v * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const Floats value = repeat(q[r][e]);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) total[r][v] = multiply_add(value, key[v], total[r][v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) store(to + r * stride + v * LANES, total[r][v] * scale);
}

// to[r] = by[r] * (before[r] * to[r] + sum over j of weights[r][j] * values[j]); before null: without what to holds.
// values: [keys][PANEL].
template <int ROWS, int VECTORS>
inline void mix_panel(const float* weights, int64_t stride, const float* values, int64_t keys, const float* before,
                      const float* by, float* const* to, int64_t skip) {
    Floats total[ROWS][VECTORS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v)
            total[r][v] = before ? load<Floats>(to[r] + skip + v * LANES) * before[r] : repeat(0.0f);
    const float* weight[ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) weight[r] = weights + r * stride;
#pragma GCC unroll 2
    for (int64_t j = 0; j < keys; ++j, values += PANEL) {
        Floats value[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) value[v] = load<Floats>(values + v * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const Floats one = repeat(weight[r][j]);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) total[r][v] = multiply_add(one, value[v], total[r][v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) store(to[r] + skip + v * LANES, total[r][v] * by[r]);
}

// Scores of `count` keys, [panels][E][PANEL]. Out of line, as the next ones, so that nothing else competes for registers.
template <int ROWS>
__attribute__((noinline)) void score_tile(const float* const* rows, int64_t E, const float* keys, int64_t count,
                                          float scale, float* to, int64_t stride) {
    for (; count > LANES; count -= PANEL, keys += E * PANEL, to += PANEL)
        score_panel<ROWS, 2>(rows, E, keys, scale, to, stride);
    if (count > 0) score_panel<ROWS, 1>(rows, E, keys, scale, to, stride);
}

// Sums over `keys` keys of values [panels][panel_stride / PANEL][PANEL], D channels.
template <int ROWS>
__attribute__((noinline)) void mix_tile(const float* weights, int64_t stride, const float* values, int64_t panel_stride,
                                        int64_t keys, int64_t D, const float* before, const float* by,
                                        float* const* to) {
    int64_t d = 0;
    for (; D - d > LANES; d += PANEL, values += panel_stride)
        mix_panel<ROWS, 2>(weights, stride, values, keys, before, by, to, d);
    if (d < D) mix_panel<ROWS, 1>(weights, stride, values, keys, before, by, to, d);
}

template <int ROWS>
void score_rows(int64_t count, const float* const* rows, int64_t E, const float* keys, int64_t key_count, float scale,
                float* to, int64_t stride) {
    if constexpr (ROWS > 1)
        if (count < ROWS) return score_rows<ROWS - 1>(count, rows, E, keys, key_count, scale, to, stride);
    score_tile<ROWS>(rows, E, keys, key_count, scale, to, stride);
}

template <int ROWS>
void mix_rows(int64_t count, const float* weights, int64_t stride, const float* values, int64_t panel_stride,
              int64_t keys, int64_t D, const float* before, const float* by, float* const* to) {
    if constexpr (ROWS > 1)
        if (count < ROWS)
            return mix_rows<ROWS - 1>(count, weights, stride, values, panel_stride, keys, D, before, by, to);
    mix_tile<ROWS>(weights, stride, values, panel_stride, keys, D, before, by, to);
}

// The largest score of each query so far, -infinity where it sees nothing, and the sum of exp(score - largest).
struct Weights {
    float largest[ROOM], sum[ROOM];

    void begin() {
        for (int r = 0; r < ROOM; ++r) {
            largest[r] = -INFINITE;
            sum[r] = 0;
        }
    }

    // 1 / sum of each, 0 for a query that sees nothing
    void invert(float (&to)[ROOM]) const {
        for (int r = 0; r < ROOM; r += LANES) {
            const Floats total = load<Floats>(sum + r);
            store(to + r, total == 0 ? repeat(0.0f) : 1 / total);
        }
    }

    float log_of_sum(int64_t r) const {
        return sum[r] == 0 ? -INFINITE : (float)(largest[r] + log(repeat((double)sum[r]))[0]);
    }
};

// Lanes [start, start + seen) of the vectors of a row are keys that its query sees.
struct Span {
    int64_t start, seen;
};

// Rows of scores become exp(score - largest), zero where no key is seen, up to `count` keys. before: what earlier sums
// are to be multiplied by.
inline void weigh(float* scores, int64_t stride, int64_t rows, const Span* spans, int64_t count, Weights& weights,
                  float (&before)[ROOM]) {
    Floats parts[ROOM];
    float shift[ROOM], fresh[ROOM];
    for (int64_t r = 0; r < rows; ++r) {
        float* row = scores + r * stride;
        const int64_t start = spans[r].start, end = start + spans[r].seen, whole = end / LANES * LANES;
        if (start) store(row, from_lane(load<Floats>(row), start, -INFINITE));
        if (end > whole) store(row + whole, first_lanes(load<Floats>(row + whole), end - whole, -INFINITE));
        Floats high = repeat(-INFINITE);
        for (int64_t j = 0; j < end; j += LANES) high = larger(high, load<Floats>(row + j));
        parts[r] = high;
    }
    for (int64_t r = rows; r < ROOM; ++r) parts[r] = repeat(-INFINITE);
    largest_of_rows(parts, fresh);
    for (int r = 0; r < ROOM; r += LANES) {
        const Floats old = load<Floats>(weights.largest + r), now = larger(old, load<Floats>(fresh + r));
        const Floats from = now == -INFINITE ? repeat(0.0f) : now;
        store(shift + r, from);
        store(before + r, exp_of_negative(old - from));
        store(weights.largest + r, now);
    }
    for (int64_t r = 0; r < rows; ++r) {
        float* row = scores + r * stride;
        const Floats from = repeat(shift[r]);
        const int64_t end = spans[r].start + spans[r].seen;
        Floats sum = repeat(0.0f);
        int64_t j = 0;
        for (; j < end; j += LANES) {
            const Floats value = exp_of_negative(load<Floats>(row + j) - from);
            store(row + j, value);
            sum += value;
        }
        for (; j < count; j += LANES) store(row + j, repeat(0.0f));
        parts[r] = sum;
    }
    sum_of_rows(parts, fresh);
    for (int r = 0; r < ROOM; r += LANES)
        store(weights.sum + r,
              multiply_add(load<Floats>(weights.sum + r), load<Floats>(before + r), load<Floats>(fresh + r)));
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
