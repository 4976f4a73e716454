// Attention where little work meets much memory: one or two queries over many keys, which are read where they lie, and
// boxes of so few keys that one vector holds those of several.
#pragma once

#include "axial_attention/cpu_rows.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t FEW = 2;          // queries that are not worth a copy of keys and values
constexpr int64_t AHEAD = 32;         // keys that are asked for before they are needed
constexpr int64_t MOST_TOGETHER = 4;  // queries that share a load of a value

// Writes sums, unless they are where they belong (null), and lse of query i, which is row r of the weights.
inline void finish_row(const Task& task, const Place& place, int64_t i, const Weights& weights, int64_t r,
                       const float* sums) {
    if (sums) write_row(sums, task.D, (void*)task.out.row(place.out, i), task.out.step, task.out.type);
    if (place.lse) place.lse[task.lse_at[i]] = weights.log_of_sum(r);
}

// Asks for rows [first, last) of another head; as many of its keys.
inline void fetch_ahead(const Task& task, const Place& next, int64_t first, int64_t last) {
    if (task.k.step != 1 || task.q.step != 1 || task.v.step != 1) return;
    const int64_t key_bytes = task.E * task.k.bytes(), value_bytes = task.D * task.v.bytes();
    for (int64_t j = first, end = last < task.m ? last : task.m; j < end; ++j) {
        const char *key = (const char*)task.k.row(next.k, j), *value = (const char*)task.v.row(next.v, j);
        for (int64_t at = 0; at < key_bytes; at += 64) __builtin_prefetch(key + at, 0, 2);
        for (int64_t at = 0; at < value_bytes; at += 64) __builtin_prefetch(value + at, 0, 2);
    }
    for (int64_t i = first; i < last; ++i) {
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
    for (int64_t key = 0; key == 0 || key < keys; key += STRETCH) {
        Floats total[ROWS][VECTORS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) total[r][v] = repeat(0.0f);
        const int64_t end = keys - key < STRETCH ? keys : key + STRETCH;
        for (int64_t j = key; j < end; ++j) {
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
            for (int v = 0; v < VECTORS; ++v)
                join(total[r][v], key, end == keys, before ? before + r : nullptr, by[r], to[r] + d + v * LANES);
    }
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

// Asks for rows [first, last). Inline, as the compiler takes a call that does no more for one that does nothing.
__attribute__((always_inline)) inline void fetch_rows(const Rows& rows, const void* data, int64_t width, int64_t first,
                                                      int64_t last) {
    const int64_t bytes = rows.step == 1 ? width * rows.bytes() : 0;
    for (int64_t j = first; j < last; ++j)
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)rows.row(data, j) + at);
}

// One or two queries. Values are asked for meanwhile, as those of all these keys are needed next.
template <class T, int ROWS>
void score_few(const Task& task, const Place& place, const float* const* queries, int64_t key, int64_t count, float* to,
               int64_t stride) {
    const void *k = place.k, *rows[2][LANES];
    int64_t j = 0;
    for (; j + 2 * LANES <= count; j += 2 * LANES) {
        const int64_t next = key + j + AHEAD, end = next + 2 * LANES;
        fetch_rows(task.k, k, task.E, next, end < task.m ? end : task.m);
        fetch_rows(task.v, place.v, task.D, key + j, key + j + 2 * LANES);
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
void score_few(int64_t rows, const Task& task, const Place& place, const float* const* queries, int64_t key,
               int64_t count, float* to, int64_t stride) {
    if (rows == 1) return score_few<T, 1>(task, place, queries, key, count, to, stride);
    score_few<T, 2>(task, place, queries, key, count, to, stride);
}

inline void score_few(int64_t rows, const Task& task, const Place& place, const float* const* queries, int64_t key,
                      int64_t count, float* to, int64_t stride) {
    if (task.k.type == FLOAT32) return score_few<float>(rows, task, place, queries, key, count, to, stride);
    if (task.k.type == BFLOAT16) return score_few<BFloat16>(rows, task, place, queries, key, count, to, stride);
    score_few<Float16>(rows, task, place, queries, key, count, to, stride);
}

// `rows` queries, FEW at most, from `first` on.
inline void attend_few(const Task& task, const Place& place, int64_t first, int64_t rows, const LineScratch& scratch) {
    const int64_t seen = task.seen(first + rows - 1), stride = scratch.stride;
    const bool direct = task.v.step == 1 && task.D % LANES == 0;  // values are read where they lie
    const Weights& weights = scratch.weights;
    const float* queries[FEW];
    float* to[FEW];
    weights.begin(rows);
    for (int64_t r = 0; r < rows; ++r) {
        queries[r] = query_row(task, place.q, first + r, scratch.queries + r * task.E);
        to[r] = scratch.sums + r * scratch.width;
        weights.by[r] = 1;
    }
    __builtin_memset(scratch.sums, 0, (size_t)(rows * scratch.width) * sizeof(float));
    for (int64_t key = 0; key < seen; key += MOST_KEYS) {
        const int64_t keys = seen - key < MOST_KEYS ? seen - key : MOST_KEYS;
        Span spans[FEW];
        score_few(rows, task, place, queries, key, keys, scratch.scores, stride);
        for (int64_t r = 0; r < rows; ++r) {
            add_bias(task, place.bias, first + r, key, keys, scratch.scores + r * stride);
            const int64_t sees = task.seen(first + r) - key;
            spans[r] = {0, sees < 0 ? 0 : sees < keys ? sees : keys, keys};
        }
        weigh(scratch.scores, stride, rows, spans, weights, scratch.parts);
        if (!direct) {
            gather_values(task, place.v, key, keys, scratch.values);
            mix_rows<FEW>(rows, scratch.scores, stride, scratch.values, keys * PANEL, keys, task.D, weights.before,
                          weights.by, to);
            continue;
        }
        for (int64_t j = 0; j < keys; ++j) scratch.rows[j] = task.v.row(place.v, key + j);
        if (task.v.type == FLOAT32)
            mix_few<float, FEW>(rows, scratch.scores, stride, scratch.rows, keys, task.D, weights.before, weights.by,
                                to);
        else if (task.v.type == BFLOAT16)
            mix_few<BFloat16, FEW>(rows, scratch.scores, stride, scratch.rows, keys, task.D, weights.before, weights.by,
                                   to);
        else
            mix_few<Float16, FEW>(rows, scratch.scores, stride, scratch.rows, keys, task.D, weights.before, weights.by,
                                  to);
    }
    weights.invert(rows);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t d = 0; d < task.D; ++d) to[r][d] *= weights.by[r];
        finish_row(task, place, first + r, weights, r, to[r]);
    }
}

// Lanes of a vector that the keys of one of several boxes take: a power of two.
inline int64_t slot_of(int64_t m) {
    int64_t slot = 1;
    while (slot < m) slot *= 2;
    return slot;
}

// Boxes of few keys: those of some share a vector, each from a lane of its own on.
struct Short {
    const Task& task;
    const Place* places;
    const LineScratch& scratch;
    int64_t boxes, together, slot;  // all, those of one vector, the lanes of each
    int64_t first, rows;            // queries of each
    Span* spans;                    // [boxes][rows]
    float** to;                     // [boxes][rows]
    const void** values;            // [boxes][m]
};

// Scores of the queries of boxes [box, box + count), which share a vector; the first is row r.
inline void score_together(Short& all, int64_t box, int64_t count, int64_t r) {
    const Task& task = all.task;
    const LineScratch& scratch = all.scratch;
    const void* keys[LANES];
    for (int64_t lane = 0, u = 0, j = 0; lane < LANES; ++lane) {
        keys[lane] = task.k.row(all.places[box + (u < count ? u : 0)].k, j < task.m ? j : 0);
        if (++j == all.slot) ++u, j = 0;
    }
    turn_keys(keys, task.k, task.E, scratch.keys);
    const float* queries[SHORT_ROWS];
    int64_t waiting = 0;
    for (int64_t u = 0; u < count; ++u)
        for (int64_t i = all.first; i < all.first + all.rows; ++i, ++r) {
            queries[waiting] = query_row(task, all.places[box + u].q, i, scratch.queries + waiting * task.E);
            all.spans[r] = {u * all.slot, task.seen(i), LANES};
            ++waiting;
            if (waiting < SHORT_ROWS && (u + 1 < count || i + 1 < all.first + all.rows)) continue;
            score_rows<SHORT_ROWS>(waiting, queries, task.E, scratch.keys, LANES, task.scale,
                                   scratch.scores + (r + 1 - waiting) * LANES, LANES);
            waiting = 0;
        }
}

// Where values are, as float32 side by side, and where the outputs go.
inline void find_ends(Short& all, bool direct) {
    const Task& task = all.task;
    const LineScratch& scratch = all.scratch;
    const bool copied = !task.v.direct(task.D) || task.D % LANES != 0;
    for (int64_t u = 0, i = 0, r = 0; u < all.boxes; ++u) {
        for (int64_t j = 0; j < task.m; ++j, ++i) {
            const void* row = task.v.row(all.places[u].v, j);
            all.values[i] = copied ? scratch.values + i * scratch.width : row;
            if (copied) copy_row(row, task.v.step, task.v.type, task.D, scratch.values + i * scratch.width);
        }
        for (int64_t k = 0; k < all.rows; ++k, ++r)
            all.to[r] = direct ? (float*)task.out.row(all.places[u].out, all.first + k)
                               : scratch.sums + r * scratch.width;
    }
}

inline void attend_together(Short& all) {
    const Task& task = all.task;
    const LineScratch& scratch = all.scratch;
    const Weights& weights = scratch.weights;
    const bool direct = task.out.direct(task.D) && task.D % LANES == 0;
    const int64_t rows = all.boxes * all.rows;
    for (int64_t u = 0; u < all.boxes; u += all.together)
        score_together(all, u, all.boxes - u < all.together ? all.boxes - u : all.together, u * all.rows);
    for (int64_t u = 0, r = 0; u < all.boxes && all.places[0].bias; ++u)
        for (int64_t k = 0; k < all.rows; ++k, ++r)
            add_bias(task, all.places[u].bias, all.first + k, 0, task.m, scratch.scores + r * LANES + all.spans[r].start);
    weights.begin(rows);
    weigh(scratch.scores, LANES, rows, all.spans, weights, scratch.parts);
    weights.invert(rows);
    find_ends(all, direct);
    for (int64_t u = 0, r = 0; u < all.boxes; ++u)
        for (int64_t k = 0, run; k < all.rows; k += run, r += run) {
            run = all.rows - k < MOST_TOGETHER ? all.rows - k : MOST_TOGETHER;
            mix_few<float, MOST_TOGETHER>(run, scratch.scores + r * LANES + all.spans[r].start, LANES,
                                          all.values + u * task.m, task.m,
                                          direct ? task.D : rounded_up(task.D, LANES), nullptr, weights.by + r,
                                          all.to + r);
        }
    if (direct && !all.places[0].lse) return;
    for (int64_t u = 0, r = 0; u < all.boxes; ++u)
        for (int64_t k = 0; k < all.rows; ++k, ++r)
            finish_row(task, all.places[u], all.first + k, weights, r, direct ? nullptr : all.to[r]);
}

// `count` heads, of one box or of several, with so few keys that a vector has room for those of two.
inline void attend_short(const Task& task, const Place* places, int64_t count, const LineScratch& scratch) {
    const int64_t slot = slot_of(task.m), together = LANES / slot;
    const int64_t rows = task.n < MOST_BAND / together ? task.n : MOST_BAND / together;
    const int64_t boxes = rows > 0 ? MOST_BAND / rows / together * together : 1;
    Span spans[MOST_BAND];
    float* to[MOST_BAND];
    const void* values[MOST_BAND * LANES / 2];
    for (int64_t box = 0; box < count; box += boxes)
        for (int64_t first = 0; first < task.n; first += rows) {
            Short all{task, places + box, scratch, count - box < boxes ? count - box : boxes, together, slot, first,
                      task.n - first < rows ? task.n - first : rows, spans, to, values};
            attend_together(all);
        }
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
