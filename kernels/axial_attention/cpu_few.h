// Attention where little work meets much memory: one or two queries over many keys, which are read where they lie, and
// boxes of so few keys that one vector holds those of several.
#pragma once

#include "axial_attention/cpu_rows.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t FEW = 2;          // queries that are not worth a copy of keys and values
constexpr int64_t MOST_TOGETHER = 4;  // queries that share a load of a value

// Writes sums, unless they are where they belong (null), and lse of query i, which is row r of the weights.
inline void finish_row(const Task& task, const Place& place, int64_t i, const Weights& weights, int64_t r,
                       const float* sums) {
    if (sums) write_row(sums, task.D, (void*)task.out.row(place.out, i), task.out.step, task.out.type);
    if (place.lse) place.lse[task.lse_at[i]] = weights.log_of_sum(r);
}

// Asks for the rows of the next head, part `part` of `parts`.
inline void fetch_ahead(const Task& task, const Place& next, int64_t part, int64_t parts) {
    if (task.k.step != 1 || task.q.step != 1 || task.v.step != 1) return;
    const int64_t key_bytes = task.E * task.k.bytes(), value_bytes = task.D * task.v.bytes();
    for (int64_t j = part * task.m / parts, end = (part + 1) * task.m / parts; j < end; ++j) {
        const char *key = (const char*)task.k.row(next.k, j), *value = (const char*)task.v.row(next.v, j);
        for (int64_t at = 0; at < key_bytes; at += 64) __builtin_prefetch(key + at, 0, 2);
        for (int64_t at = 0; at < value_bytes; at += 64) __builtin_prefetch(value + at, 0, 2);
    }
    for (int64_t i = part * task.n / parts, end = (part + 1) * task.n / parts; i < end; ++i) {
        const char* query = (const char*)task.q.row(next.q, i);
        for (int64_t at = 0; at < task.E * task.q.bytes(); at += 64) __builtin_prefetch(query + at, 0, 2);
    }
}

// Scores of PARTS * LANES keys, keys as they lie.
template <class T, int ROWS, int PARTS>
inline void score_keys(const float* const* queries, const void* const* keys, int64_t step, int64_t E, float scale,
                       float* to, int64_t stride) {
    Floats total[PARTS][ROWS];
    for (int p = 0; p < PARTS; ++p)
        for (int r = 0; r < ROWS; ++r) total[p][r] = repeat(0.0f);
    for (int64_t e = 0; e < E; e += LANES) {
        const int64_t width = E - e < LANES ? E - e : LANES;
#pragma GCC unroll 2
        for (int p = 0; p < PARTS; ++p) {
            Floats lanes[LANES];
            load_turned<T>(keys + p * LANES, step, e, E, lanes);
            if (width == LANES) {
#pragma GCC unroll 16
                for (int i = 0; i < LANES; ++i)
#pragma GCC unroll 2
                    for (int r = 0; r < ROWS; ++r)
                        total[p][r] = multiply_add(repeat(queries[r][e + i]), lanes[i], total[p][r]);
            } else {
                for (int64_t i = 0; i < width; ++i)
                    for (int r = 0; r < ROWS; ++r)
                        total[p][r] = multiply_add(repeat(queries[r][e + i]), lanes[i], total[p][r]);
            }
        }
    }
    for (int p = 0; p < PARTS; ++p)
        for (int r = 0; r < ROWS; ++r) store(to + r * stride + p * LANES, total[p][r] * scale);
}

// to[r][d ..] = by[r] * (before[r] * to[r][d ..] + sum over j of weights[r][j] * values[j][d ..]), VECTORS vectors.
template <class T, int ROWS, int VECTORS>
inline void mix_values(const float* weights, int64_t stride, const void* const* values, int64_t keys, int64_t d,
                       const float* before, const float* by, float* const* to) {
    Floats total[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
            total[r][v] = before ? load<Floats>(to[r] + d + v * LANES) * before[r] : repeat(0.0f);
    for (int64_t j = 0; j < keys; ++j) {
        const T* value = (const T*)values[j] + d;
        Floats part[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) part[v] = widened(value + v * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const Floats weight = repeat(weights[r * stride + j]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) total[r][v] = multiply_add(weight, part[v], total[r][v]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) store(to[r] + d + v * LANES, total[r][v] * by[r]);
}

template <class T, int ROWS>
void mix_few(int64_t rows, const float* weights, int64_t stride, const void* const* values, int64_t keys, int64_t D,
             const float* before, const float* by, float* const* to) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return mix_few<T, ROWS - 1>(rows, weights, stride, values, keys, D, before, by, to);
    constexpr int WIDE = ROWS > 2 ? 2 : 4;
    int64_t d = 0;
    for (; d + WIDE * LANES <= D; d += WIDE * LANES)
        mix_values<T, ROWS, WIDE>(weights, stride, values, keys, d, before, by, to);
    for (; d < D; d += LANES) mix_values<T, ROWS, 1>(weights, stride, values, keys, d, before, by, to);
}

// One or two queries: [first, first + ROWS).
template <class T, int ROWS>
void score_few(const Task& task, const void* k, const float* const* queries, int64_t key, int64_t count, float* to,
               int64_t stride) {
    const void* rows[2][LANES];
    int64_t j = 0;
    for (; j + 2 * LANES <= count; j += 2 * LANES) {
        find_rows(task.k, k, key, j, count, rows[0]);
        find_rows(task.k, k, key, j + LANES, count, rows[1]);
        score_keys<T, ROWS, 2>(queries, rows[0], task.k.step, task.E, task.scale, to + j, stride);
    }
    for (; j < count; j += LANES) {
        find_rows(task.k, k, key, j, count, rows[0]);
        score_keys<T, ROWS, 1>(queries, rows[0], task.k.step, task.E, task.scale, to + j, stride);
    }
}

template <class T>
void score_few(int64_t rows, const Task& task, const void* k, const float* const* queries, int64_t key, int64_t count,
               float* to, int64_t stride) {
    if (rows == 1) return score_few<T, 1>(task, k, queries, key, count, to, stride);
    score_few<T, 2>(task, k, queries, key, count, to, stride);
}

inline void score_few(int64_t rows, const Task& task, const void* k, const float* const* queries, int64_t key,
                      int64_t count, float* to, int64_t stride) {
    if (task.k.type == FLOAT32) return score_few<float>(rows, task, k, queries, key, count, to, stride);
    if (task.k.type == BFLOAT16) return score_few<BFloat16>(rows, task, k, queries, key, count, to, stride);
    score_few<Float16>(rows, task, k, queries, key, count, to, stride);
}

// `rows` queries, FEW at most, from `first` on.
inline void attend_few(const Task& task, const Place& place, int64_t first, int64_t rows, const LineScratch& scratch,
                       const Place*) {
    const int64_t seen = task.seen(first + rows - 1), stride = rounded_up(task.m < MOST_KEYS ? task.m : MOST_KEYS, PANEL);
    const bool direct = task.v.step == 1 && task.D % LANES == 0;  // values are read where they lie
    const float* queries[FEW];
    float* to[FEW];
    Weights weights;
    float by[ROOM], before[ROOM], one[ROOM];
    weights.begin();
    for (int64_t r = 0; r < rows; ++r) {
        queries[r] = query_row(task, place.q, first + r, scratch.queries + r * task.E);
        to[r] = scratch.sums + r * scratch.width;
        one[r] = 1;
    }
    __builtin_memset(scratch.sums, 0, (size_t)(rows * scratch.width) * sizeof(float));
    for (int64_t key = 0; key < seen; key += MOST_KEYS) {
        const int64_t keys = seen - key < MOST_KEYS ? seen - key : MOST_KEYS;
        Span spans[FEW];
        score_few(rows, task, place.k, queries, key, keys, scratch.scores, stride);
        for (int64_t r = 0; r < rows; ++r) {
            add_bias(task, place.bias, first + r, key, keys, scratch.scores + r * stride);
            const int64_t sees = task.seen(first + r) - key;
            spans[r] = {0, sees < 0 ? 0 : sees < keys ? sees : keys};
        }
        weigh(scratch.scores, stride, rows, spans, keys, weights, before);
        if (!direct) {
            gather_values(task, place.v, key, keys, scratch.values);
            mix_rows<FEW>(rows, scratch.scores, stride, scratch.values, keys * PANEL, keys, task.D, before, one, to);
            continue;
        }
        for (int64_t j = 0; j < keys; ++j) scratch.rows[j] = task.v.row(place.v, key + j);
        if (task.v.type == FLOAT32)
            mix_few<float, FEW>(rows, scratch.scores, stride, scratch.rows, keys, task.D, before, one, to);
        else if (task.v.type == BFLOAT16)
            mix_few<BFloat16, FEW>(rows, scratch.scores, stride, scratch.rows, keys, task.D, before, one, to);
        else
            mix_few<Float16, FEW>(rows, scratch.scores, stride, scratch.rows, keys, task.D, before, one, to);
    }
    weights.invert(by);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t d = 0; d < task.D; ++d) to[r][d] *= by[r];
        finish_row(task, place, first + r, weights, r, to[r]);
    }
}

// Lanes of a vector that the keys of one of several boxes take: a power of two.
inline int64_t slot_of(int64_t m) {
    int64_t slot = 1;
    while (slot < m) slot *= 2;
    return slot;
}

// Boxes whose keys share a vector, box u from lane u * slot on.
struct Short {
    const Task& task;
    const Place* places;
    const LineScratch& scratch;
    int64_t slot;
    const void** values;  // [boxes][m]: float32 side by side
};

// Rows [first, first + rows) of the boxes' queries, one after the other.
inline void attend_short_tile(const Short& boxes, int64_t first, int64_t rows) {
    const Task& task = boxes.task;
    const LineScratch& scratch = boxes.scratch;
    const bool direct = task.out.direct(task.D) && task.D % LANES == 0;
    const float* queries[SHORT_ROWS];
    Span spans[SHORT_ROWS];
    float* to[SHORT_ROWS];
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t u = (first + r) / task.n, i = (first + r) % task.n;
        queries[r] = query_row(task, boxes.places[u].q, i, scratch.queries + r * task.E);
        spans[r] = {u * boxes.slot, task.seen(i)};
        to[r] = direct ? (float*)task.out.row(boxes.places[u].out, i) : scratch.sums + r * scratch.width;
    }
    score_rows<SHORT_ROWS>(rows, queries, task.E, scratch.keys, LANES, task.scale, scratch.scores, LANES);
    Weights weights;
    float by[ROOM], before[ROOM];
    for (int64_t r = 0; r < rows; ++r)
        add_bias(task, boxes.places[(first + r) / task.n].bias, (first + r) % task.n, 0, task.m,
                 scratch.scores + r * LANES + spans[r].start);
    weights.begin();
    weigh(scratch.scores, LANES, rows, spans, LANES, weights, before);
    weights.invert(by);
    for (int64_t r = 0, run; r < rows; r += run) {
        const int64_t u = (first + r) / task.n, left = (u + 1) * task.n - first - r;
        run = left < rows - r ? left : rows - r;
        run = run < MOST_TOGETHER ? run : MOST_TOGETHER;
        mix_few<float, MOST_TOGETHER>(run, scratch.scores + r * LANES + u * boxes.slot, LANES, boxes.values + u * task.m,
                                      task.m, direct ? task.D : rounded_up(task.D, LANES), nullptr, by + r, to + r);
    }
    for (int64_t r = 0; r < rows; ++r)
        finish_row(task, boxes.places[(first + r) / task.n], (first + r) % task.n, weights, r,
                   direct ? nullptr : to[r]);
}

// `count` heads, of one box or of several, with room for all their keys in one vector.
inline void attend_short(const Task& task, const Place* places, int64_t count, const LineScratch& scratch) {
    const int64_t slot = slot_of(task.m);
    const bool direct = task.v.direct(task.D) && task.D % LANES == 0;
    const void* keys[LANES];
    const void* values[LANES];
    for (int64_t lane = 0; lane < LANES; ++lane) {
        const int64_t u = lane / slot, j = lane % slot;
        keys[lane] = task.k.row(places[u < count ? u : count - 1].k, j < task.m ? j : task.m - 1);
    }
    turn_keys(keys, task.k, task.E, scratch.keys);
    for (int64_t u = 0, i = 0; u < count; ++u)
        for (int64_t j = 0; j < task.m; ++j, ++i) {
            const void* row = task.v.row(places[u].v, j);
            values[i] = direct ? row : scratch.values + i * scratch.width;
            if (!direct) copy_row(row, task.v.step, task.v.type, task.D, scratch.values + i * scratch.width);
        }
    const Short boxes{task, places, scratch, slot, values};
    const int64_t rows = count * task.n, tiles = (rows + SHORT_ROWS - 1) / SHORT_ROWS;
    for (int64_t t = 0; t < tiles; ++t)
        attend_short_tile(boxes, t * rows / tiles, (t + 1) * rows / tiles - t * rows / tiles);
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
