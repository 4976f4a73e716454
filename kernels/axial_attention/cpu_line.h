// Attention of one head inside one box, or of several at once where a box has so few keys that a vector holds more.
//
// Every sum has one order, whatever is evaluated together: a score sums e = 0 .. E - 1, a row of weights is summed lane
// by lane (key j to lane j modulo LANES), an output sums j = 0 .. m - 1, and the scale of the weights changes only
// between chunks of MOST_KEYS keys. So a query's result depends on what it sees alone, not on m, nor on other queries.
#pragma once

#include "axial_attention/cpu.h"
#include "axial_attention/cpu_lanes.h"
#include "common/scratch.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t PANEL = 2 * LANES;       // keys, or channels of values, that one tile multiplies at once
constexpr int64_t MOST_KEYS = 256;         // keys that are turned and weighed before the next ones
constexpr int64_t MOST_QUERIES = 192;      // queries that share turned keys
static_assert(MOST_KEYS % PANEL == 0);

// Rows of a head in a box: row i begins `at[i]` elements after the first one's place, its elements are `step` apart.
struct Rows {
    const int64_t* at;
    int64_t step;
    int32_t type;

    int64_t bytes() const { return type == FLOAT32 ? 4 : 2; }
    bool direct(int64_t width) const { return type == FLOAT32 && (step == 1 || width == 1); }
};

// What all boxes and heads of a call share: n queries and m keys of width E, m values of width D.
struct Task {
    Rows q, k, v, out;
    const int64_t* lse_at;            // as Rows::at; unused without lse
    int64_t bias_strides[2];          // i, j
    int32_t bias_type;
    int64_t n, m, E, D;
    float scale;
    int32_t mask;

    // How many keys query i sees: the first ones.
    int64_t seen(int64_t i) const {
        const int64_t end = mask == EVERYTHING ? m : i + m - n + (mask == CAUSAL);
        return end < 0 ? 0 : end < m ? end : m;
    }
};

// Where one head of one box begins.
struct Place {
    const void *q, *k, *v;
    const void* bias;  // or null
    void* out;
    float* lse;  // or null
};

// The largest score of a query so far, and the sum of exp(score - largest); largest is -infinity where it sees nothing.
struct Weight {
    float largest, sum;
};

// What one thread needs for any boxes and heads of a task.
struct LineScratch {
    float* keys;      // [panels of keys][E][PANEL]
    float* values;    // [panels of D][keys][PANEL]
    float* queries;   // [TILE_ROWS][E]
    float* scores;    // [TILE_ROWS][keys]
    float* sums;      // [queries][whole panels of D]
    Weight* weights;  // [queries]
    int64_t width;    // of a row of sums

    static int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

    void cut(Cutter& cutter, const Task& task) {
        const int64_t keys_here = whole(task.m < MOST_KEYS ? task.m : MOST_KEYS, PANEL);
        const int64_t queries_here = task.m <= MOST_KEYS ? TILE_ROWS : task.n < MOST_QUERIES ? task.n : MOST_QUERIES;
        width = whole(task.D, PANEL);
        keys = cutter.cut<float>(keys_here * task.E);
        values = cutter.cut<float>(keys_here * width);
        queries = cutter.cut<float>(TILE_ROWS * task.E);
        scores = cutter.cut<float>(TILE_ROWS * keys_here);
        sums = cutter.cut<float>(queries_here * width);
        weights = cutter.cut<Weight>(queries_here);
    }
};

inline const void* shifted(const void* data, const Rows& rows, int64_t i) {
    return (const char*)data + rows.at[i] * rows.bytes();
}

inline float element(const void* data, int32_t type, int64_t at) {
    if (type == FLOAT32) return ((const float*)data)[at];
    return type == BFLOAT16 ? widen(((const BFloat16*)data)[at]) : widen(((const Float16*)data)[at]);
}

// The first `width` elements of a row, side by side as float32.
inline void copy_row(const void* row, int64_t step, int32_t type, int64_t width, float* to) {
    if (type == FLOAT32)
        for (int64_t e = 0; e < width; ++e) to[e] = ((const float*)row)[e * step];
    else if (type == BFLOAT16)
        for (int64_t e = 0; e < width; ++e) to[e] = widen(((const BFloat16*)row)[e * step]);
    else
        for (int64_t e = 0; e < width; ++e) to[e] = widen(((const Float16*)row)[e * step]);
}

inline void write_row(const float* from, int64_t width, void* row, int64_t step, int32_t type) {
    if (type == FLOAT32)
        for (int64_t d = 0; d < width; ++d) ((float*)row)[d * step] = from[d];
    else if (type == BFLOAT16)
        for (int64_t d = 0; d < width; ++d) narrow(from[d], ((BFloat16*)row)[d * step]);
    else
        for (int64_t d = 0; d < width; ++d) narrow(from[d], ((Float16*)row)[d * step]);
}

// LANES keys become columns of a panel: to[e * PANEL + lane].
template <class T>
void turn_keys(const void* const* rows, int64_t step, int64_t E, float* to) {
    int64_t e = 0;
    for (; step == 1 && e + LANES <= E; e += LANES) {
        Floats lanes[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) lanes[i] = widened((const T*)rows[i] + e);
        turn(lanes);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) store(to + (e + i) * PANEL, lanes[i]);
    }
    for (; e < E; ++e)
        for (int i = 0; i < LANES; ++i) to[e * PANEL + i] = widen(((const T*)rows[i])[e * step]);
}

inline void turn_keys(const void* const* rows, const Rows& k, int64_t E, float* to) {
    if (k.type == FLOAT32) return turn_keys<float>(rows, k.step, E, to);
    if (k.type == BFLOAT16) return turn_keys<BFloat16>(rows, k.step, E, to);
    turn_keys<Float16>(rows, k.step, E, to);
}

// Keys [first, first + count) into panels; the last panel's missing keys are copies of the last one.
inline void gather_keys(const Task& task, const void* k, int64_t first, int64_t count, float* to) {
    for (int64_t j = 0; j < count; j += LANES) {
        const void* rows[LANES];
        for (int lane = 0; lane < LANES; ++lane)
            rows[lane] = shifted(k, task.k, first + (j + lane < count ? j + lane : count - 1));
        turn_keys(rows, task.k, task.E, to + j / PANEL * task.E * PANEL + j % PANEL);
    }
}

// Values [first, first + count) into panels of channels, zeros where there is no channel.
inline void gather_values(const Task& task, const void* v, int64_t first, int64_t count, float* to) {
    for (int64_t d = 0; d < task.D; d += PANEL, to += count * PANEL) {
        const int64_t width = task.D - d < PANEL ? task.D - d : PANEL;
        const int64_t skip = d * task.v.step * task.v.bytes();
        for (int64_t j = 0; j < count; ++j) {
            float* row = to + j * PANEL;
            const char* from = (const char*)shifted(v, task.v, first + j) + skip;
            if (width < PANEL) __builtin_memset(row, 0, PANEL * sizeof(float));
            if (width == PANEL && task.v.direct(PANEL)) {
                store(row, load<Floats>(from));
                store(row + LANES, load<Floats>(from + VECTOR_BYTES));
            } else {
                copy_row(from, task.v.step, task.v.type, width, row);
            }
        }
    }
}

// scores[r][lane] = scale * rows[r] . column `lane` of a panel [E][PANEL], for VECTORS vectors of it. Out of line, as
// the next one, so that nothing else competes for registers.
template <int ROWS, int VECTORS>
__attribute__((noinline)) void score_tile(const float* const* rows, int64_t E, const float* keys, float scale,
                                          float* scores, int64_t score_stride) {
    Floats total[ROWS][VECTORS];
    const float* q[ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
        q[r] = rows[r];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) total[r][v] = repeat(0.0f);
    }
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
        for (int v = 0; v < VECTORS; ++v) store(scores + r * score_stride + v * LANES, total[r][v] * scale);
}

// to[r] = by[r] * (before[r] * to[r] + sum over j of weights[r][j] * values[j]); before null: without what to holds.
template <int ROWS, int VECTORS>
__attribute__((noinline)) void mix_tile(const float* weights, int64_t weight_stride, const float* values,
                                        int64_t count, const float* before, const float* by, float* const* to) {
    Floats total[ROWS][VECTORS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v)
            total[r][v] = before ? load<Floats>(to[r] + v * LANES) * before[r] : repeat(0.0f);
    for (int64_t j = 0; j < count; ++j, values += PANEL) {
        Floats value[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) value[v] = load<Floats>(values + v * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const Floats weight = repeat(weights[r * weight_stride + j]);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) total[r][v] = multiply_add(weight, value[v], total[r][v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) store(to[r] + v * LANES, total[r][v] * by[r]);
}

template <int ROWS>
void score_rows(int64_t count, const float* const* rows, int64_t E, const float* keys, bool both, float scale,
                float* scores, int64_t score_stride) {
    if constexpr (ROWS > 1)
        if (count < ROWS) return score_rows<ROWS - 1>(count, rows, E, keys, both, scale, scores, score_stride);
    if (both) return score_tile<ROWS, 2>(rows, E, keys, scale, scores, score_stride);
    score_tile<ROWS, 1>(rows, E, keys, scale, scores, score_stride);
}

template <int ROWS>
void mix_rows(int64_t count, const float* weights, int64_t weight_stride, const float* values, int64_t keys, bool both,
              const float* before, const float* by, float* const* to) {
    if constexpr (ROWS > 1)
        if (count < ROWS)
            return mix_rows<ROWS - 1>(count, weights, weight_stride, values, keys, both, before, by, to);
    if (both) return mix_tile<ROWS, 2>(weights, weight_stride, values, keys, before, by, to);
    mix_tile<ROWS, 1>(weights, weight_stride, values, keys, before, by, to);
}

// Scores of `seen` keys become exp(score - largest), up to `count` keys zero. Returns what earlier sums are to be
// multiplied by.
inline float weigh(float* scores, int64_t seen, int64_t count, Weight& weight) {
    const int64_t whole = seen / LANES * LANES, end = seen > whole ? whole + LANES : whole;
    if (seen > whole) store(scores + whole, first_lanes(load<Floats>(scores + whole), seen - whole, -INFINITE));
    Floats high = repeat(weight.largest);
    for (int64_t j = 0; j < end; j += LANES) high = larger(high, load<Floats>(scores + j));
    const float largest = largest_lane(high), shift = largest == -INFINITE ? 0 : largest;
    Floats sum = repeat(0.0f);
    for (int64_t j = 0; j < end; j += LANES) {
        const Floats value = exp_of_negative(load<Floats>(scores + j) - shift);
        store(scores + j, value);
        sum += value;
    }
    for (int64_t j = end; j < count; j += LANES) store(scores + j, repeat(0.0f));
    const float before = weight.sum == 0 ? 0 : exp_of_negative(repeat(weight.largest - shift))[0];
    weight = {largest, weight.sum * before + sum_of_lanes(sum)};
    return before;
}

inline float log_of_sum(Weight weight) {
    if (weight.sum == 0) return -INFINITE;
    return (float)(weight.largest + log(repeat((double)weight.sum))[0]);
}

// A few queries against the keys in progress.
struct Tile {
    const Task& task;
    const Place& place;
    const LineScratch& scratch;
    int64_t first, rows;            // queries
    int64_t key, keys;              // those in scratch, from `key` on
    int64_t count;                  // of them, seen by the last query
    int64_t score_stride;
};

inline void score(const Tile& tile) {
    const Task& task = tile.task;
    const float* queries[TILE_ROWS];
    for (int64_t r = 0; r < tile.rows; ++r) {
        const void* row = shifted(tile.place.q, task.q, tile.first + r);
        queries[r] = (const float*)row;
        if (task.q.direct(task.E)) continue;
        float* copy = tile.scratch.queries + r * task.E;
        copy_row(row, task.q.step, task.q.type, task.E, copy);
        queries[r] = copy;
    }
    for (int64_t j = 0; j < tile.count; j += PANEL)
        score_rows<TILE_ROWS>(tile.rows, queries, task.E, tile.scratch.keys + j * task.E, tile.count - j > LANES,
                              task.scale, tile.scratch.scores + j, tile.score_stride);
    if (!tile.place.bias) return;
    for (int64_t r = 0; r < tile.rows; ++r) {
        float* scores = tile.scratch.scores + r * tile.score_stride;
        const int64_t at = (tile.first + r) * task.bias_strides[0] + tile.key * task.bias_strides[1];
        for (int64_t j = 0; j < tile.count; ++j)
            scores[j] += element(tile.place.bias, task.bias_type, at + j * task.bias_strides[1]);
    }
}

inline void finish(const Task& task, const Place& place, int64_t i, Weight weight, float* sums) {
    if (sums) {
        void* row = (void*)shifted(place.out, task.out, i);
        write_row(sums, task.D, row, task.out.step, task.out.type);
    }
    if (place.lse) place.lse[task.lse_at[i]] = log_of_sum(weight);
}

inline float reciprocal(Weight weight) { return weight.sum == 0 ? 0 : 1 / weight.sum; }

// All keys at once: weights and sums never leave the tile.
inline void attend_tile(const Tile& tile) {
    const Task& task = tile.task;
    const LineScratch& scratch = tile.scratch;
    const bool direct = task.out.direct(task.D) && task.D % LANES == 0;
    Weight weights[TILE_ROWS];
    float by[TILE_ROWS];
    float* to[TILE_ROWS];
    score(tile);
    for (int64_t r = 0; r < tile.rows; ++r) {
        weights[r] = {-INFINITE, 0};
        weigh(scratch.scores + r * tile.score_stride, task.seen(tile.first + r), tile.count, weights[r]);
        by[r] = reciprocal(weights[r]);
        to[r] = direct ? (float*)shifted(tile.place.out, task.out, tile.first + r) : scratch.sums + r * scratch.width;
    }
    for (int64_t d = 0; d < task.D; d += PANEL) {
        mix_rows<TILE_ROWS>(tile.rows, scratch.scores, tile.score_stride, scratch.values + d * tile.keys, tile.count,
                            task.D - d > LANES, nullptr, by, to);
        for (int64_t r = 0; r < tile.rows; ++r) to[r] += PANEL;
    }
    for (int64_t r = 0; r < tile.rows; ++r)
        finish(task, tile.place, tile.first + r, weights[r], direct ? nullptr : scratch.sums + r * scratch.width);
}

// One chunk of keys of several: sums and weights go on where the last one ended. base: first query of the sums.
inline void continue_tile(const Tile& tile, int64_t base) {
    const Task& task = tile.task;
    const LineScratch& scratch = tile.scratch;
    float before[TILE_ROWS], by[TILE_ROWS];
    float* to[TILE_ROWS];
    score(tile);
    for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t i = tile.first + r, seen = task.seen(i) - tile.key;
        const int64_t here = seen < 0 ? 0 : seen < tile.count ? seen : tile.count;
        before[r] = weigh(scratch.scores + r * tile.score_stride, here, tile.count, scratch.weights[i - base]);
        by[r] = 1;
        to[r] = scratch.sums + (i - base) * scratch.width;
    }
    for (int64_t d = 0; d < task.D; d += PANEL) {
        mix_rows<TILE_ROWS>(tile.rows, scratch.scores, tile.score_stride, scratch.values + d * tile.keys, tile.count,
                            task.D - d > LANES, before, by, to);
        for (int64_t r = 0; r < tile.rows; ++r) to[r] += PANEL;
    }
}

// Queries [first, last) of one head of one box, at most MOST_QUERIES.
inline void attend_block(const Task& task, const Place& place, int64_t first, int64_t last,
                         const LineScratch& scratch) {
    const int64_t tiles = (last - first + TILE_ROWS - 1) / TILE_ROWS, seen = last > first ? task.seen(last - 1) : 0;
    const bool once = task.m <= MOST_KEYS;
    for (int64_t i = first; i < last && !once; ++i) {
        scratch.weights[i - first] = {-INFINITE, 0};
        __builtin_memset(scratch.sums + (i - first) * scratch.width, 0, (size_t)scratch.width * sizeof(float));
    }
    for (int64_t key = 0; key < seen || (once && key == 0); key += MOST_KEYS) {
        const int64_t keys = seen - key < MOST_KEYS ? seen - key : MOST_KEYS;
        gather_keys(task, place.k, key, keys, scratch.keys);
        gather_values(task, place.v, key, keys, scratch.values);
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t from = first + t * (last - first) / tiles, to = first + (t + 1) * (last - first) / tiles;
            const int64_t sees = task.seen(to - 1) - key, count = sees < 0 ? 0 : sees < keys ? sees : keys;
            const Tile tile{task, place, scratch, from, to - from, key, keys, count, LineScratch::whole(keys, PANEL)};
            if (once)
                attend_tile(tile);
            else if (count > 0)
                continue_tile(tile, first);
        }
    }
    for (int64_t i = first; i < last && !once; ++i) {
        float* sums = scratch.sums + (i - first) * scratch.width;
        const float by = reciprocal(scratch.weights[i - first]);
        for (int64_t d = 0; d < task.D; ++d) sums[d] *= by;
        finish(task, place, i, scratch.weights[i - first], sums);
    }
}

// All queries of `count` heads, of one box or of several.
inline void attend(const Task& task, const Place* places, int64_t count, const LineScratch& scratch) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t first = 0; first < task.n; first += MOST_QUERIES)
            attend_block(task, places[i], first, first + MOST_QUERIES < task.n ? first + MOST_QUERIES : task.n,
                         scratch);
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
