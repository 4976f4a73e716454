// Products of a few rows with what lies in panels, and rows of weights from rows of scores.
//
// Every sum has one order, whatever is evaluated together: a score sums e = 0 .. E - 1, a row of weights is summed lane
// by lane (key j to lane j modulo LANES), and an output sums STRETCH keys at a time from zero, then joins them.
#pragma once

#include "axial_attention/cpu_lanes.h"
#include "common/panel.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int SHORT_ROWS = TILE_ROWS < 8 ? 8 : TILE_ROWS;  // rows of a tile of one vector
constexpr int64_t STRETCH = 64;                      // keys whose values are summed before the sum joins the total
constexpr int MOST_BAND = 48;                        // rows whose scores become weights together

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

// The sum of a stretch of keys from `key` on joins `to`: what that held before the first one counts `before` times (null:
// not at all); after the last one all is multiplied by `by`.
inline void join(Floats sum, int64_t key, bool last, const float* before, float by, float* to) {
    if (key > 0)
        sum += load<Floats>(to);
    else if (before)
        sum = multiply_add(load<Floats>(to), repeat(*before), sum);
    store(to, last ? sum * by : sum);
}

// to[r] = by[r] * (before[r] * to[r] + sum over j of weights[r][j] * values[j]); before null: without what to holds.
// values: [keys][PANEL].
template <int ROWS, int VECTORS>
inline void mix_panel(const float* weights, int64_t stride, const float* values, int64_t keys, const float* before,
                      const float* by, float* const* to, int64_t skip) {
    const float* weight[ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) weight[r] = weights + r * stride;
    for (int64_t key = 0; key == 0 || key < keys; key += STRETCH) {
        Floats total[ROWS][VECTORS];
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) total[r][v] = repeat(0.0f);
        const int64_t end = keys - key < STRETCH ? keys : key + STRETCH;
#pragma GCC unroll 2
        for (int64_t j = key; j < end; ++j, values += PANEL) {
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
            for (int v = 0; v < VECTORS; ++v)
                join(total[r][v], key, end == keys, before ? before + r : nullptr, by[r], to[r] + skip + v * LANES);
    }
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

// What is known of each of some queries: the largest score so far, -infinity where it sees nothing, the sum of
// exp(score - largest), what earlier sums are to be multiplied by, and what the last ones. Room for whole vectors.
struct Weights {
    float *largest, *sum, *before, *by;

    Weights from(int64_t query) const { return {largest + query, sum + query, before + query, by + query}; }

    void begin(int64_t rows) const {
        for (int64_t r = 0; r < rows; ++r) {
            largest[r] = -INFINITE;
            sum[r] = 0;
        }
    }

    // by = 1 / sum, 0 for a query that sees nothing
    void invert(int64_t rows) const {
        for (int64_t r = 0; r < rows; r += LANES) {
            const Floats total = load<Floats>(sum + r);
            store(by + r, total == 0 ? repeat(0.0f) : 1 / total);
        }
    }

    float log_of_sum(int64_t r) const {
        return sum[r] == 0 ? -INFINITE : (float)(largest[r] + log(repeat((double)sum[r]))[0]);
    }
};

// Lanes [start, start + seen) of a row of scores are keys that its query sees; `count` of them are to be written.
struct Span {
    int64_t start, seen, count;
};

// The largest score of each row, lane by lane, after what is not seen has become -infinity.
inline void find_largest(float* scores, int64_t stride, int64_t rows, const Span* spans, Floats* parts) {
    for (int64_t r = 0; r < rows; ++r, scores += stride) {
        const int64_t start = spans[r].start, end = start + spans[r].seen, whole = end / LANES * LANES;
        if (start) store(scores, from_lane(load<Floats>(scores), start, -INFINITE));
        if (end > whole) store(scores + whole, first_lanes(load<Floats>(scores + whole), end - whole, -INFINITE));
        Floats high = repeat(-INFINITE);
        for (int64_t j = 0; j < end; j += LANES) high = larger(high, load<Floats>(scores + j));
        parts[r] = high;
    }
}

// Rows of scores become exp(score - shift), zero where no key is seen; parts: their sums, lane by lane.
inline void take_exponentials(float* scores, int64_t stride, int64_t rows, const Span* spans, const float* shift,
                              Floats* parts) {
    for (int64_t r = 0; r < rows; ++r, scores += stride) {
        const Floats from = repeat(shift[r]);
        const int64_t end = spans[r].start + spans[r].seen;
        Floats sum = repeat(0.0f);
        int64_t j = 0;
        for (; j < end; j += LANES) {
            const Floats value = exp_of_negative(load<Floats>(scores + j) - from);
            store(scores + j, value);
            sum += value;
        }
        for (; j < spans[r].count; j += LANES) store(scores + j, repeat(0.0f));
        parts[r] = sum;
    }
}

// Rows of scores become weights, to be divided by their sum in the end. parts: [rows], room for whole vectors of rows,
// as everywhere. Many rows at once, so that no step waits for the one before.
inline void weigh(float* scores, int64_t stride, int64_t rows, const Span* spans, const Weights& weights,
                  Floats* parts) {
    find_largest(scores, stride, rows, spans, parts);
    float shift[MOST_BAND + LANES];
    for (int64_t r = 0; r < rows; r += LANES) {
        const Floats old = load<Floats>(weights.largest + r), now = larger(old, largest_of_rows(parts + r));
        const Floats from = now == -INFINITE ? repeat(0.0f) : now;
        store(shift + r, from);
        store(weights.before + r, exp_of_negative(old - from));
        store(weights.largest + r, now);
    }
    take_exponentials(scores, stride, rows, spans, shift, parts);
    for (int64_t r = 0; r < rows; r += LANES)
        store(weights.sum + r,
              multiply_add(load<Floats>(weights.sum + r), load<Floats>(weights.before + r), sums_of_rows(parts + r)));
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
