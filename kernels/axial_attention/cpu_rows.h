// What attention of one head inside one box is given, its scratch, and the way from any memory into that scratch.
#pragma once

#include "axial_attention/cpu.h"
#include "axial_attention/cpu_tile.h"
#include "common/scratch.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t MOST_KEYS = 256;     // keys that are turned and weighed before the next ones
constexpr int64_t MOST_QUERIES = 192;  // queries that share turned keys
constexpr int64_t MOST_SCORES = 3072;  // of a band: three eighths of the nearest cache
static_assert(MOST_KEYS % PANEL == 0 && MOST_BAND % LANES == 0);

// Rows of a head in a box: row i begins at[i] elements after the head's place, its elements are `step` apart.
struct Rows {
    const int64_t* at;
    int64_t step;
    int32_t type;

    int64_t bytes() const { return type == FLOAT32 ? 4 : 2; }
    const void* row(const void* data, int64_t i) const { return (const char*)data + at[i] * bytes(); }
    bool direct(int64_t width) const { return type == FLOAT32 && (step == 1 || width == 1); }
};

// What all boxes and heads of a call share: n queries and m keys of width E, m values of width D.
struct Task {
    Rows q, k, v, out;
    const int64_t* lse_at;    // as Rows::at; unused without lse
    int64_t bias_strides[2];  // i, j
    int32_t bias_type;
    int64_t n, m, E, D;
    float scale;
    int32_t mask;
    int64_t together = 1;  // heads whose rows are gathered at once, so that what lies side by side is read at once

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

inline int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// What one thread needs for any boxes and heads of a task.
struct LineScratch {
    float* keys;        // [heads together][panels of keys][E][PANEL]
    float* values;      // [heads together][panels of D][keys][PANEL]
    float* gathered;    // [heads together][queries][E], or null: queries are read where they lie
    float* queries;     // [SHORT_ROWS][E]
    float* scores;      // [rows of a band][keys]
    float* sums;        // [queries][width]
    Weights weights;    // [queries]
    Floats* parts;      // [rows of a band]
    const void** rows;  // [keys]
    int64_t width;      // of a row of sums: whole panels of D
    int64_t stride;     // of a row of scores: whole panels of keys
    int64_t band;       // rows of a band, at most: whole vectors

    void cut(Cutter& cutter, const Task& task) {
        stride = rounded_up(task.m < MOST_KEYS ? task.m : MOST_KEYS, PANEL);
        width = rounded_up(task.D, PANEL);
        band = stride * MOST_BAND <= MOST_SCORES ? MOST_BAND : rounded_up(MOST_SCORES / stride, LANES);
        const int64_t block = rounded_up(task.n < MOST_QUERIES ? task.n : MOST_QUERIES, MOST_BAND) + LANES;
        keys = cutter.cut<float>(task.together * stride * task.E);
        values = cutter.cut<float>((2 * task.m <= LANES ? MOST_BAND * task.m : task.together * stride) * width);
        gathered = task.together > 1 ? cutter.cut<float>(task.together * task.n * task.E) : nullptr;
        queries = cutter.cut<float>(SHORT_ROWS * task.E);
        scores = cutter.cut<float>((band > SHORT_ROWS ? band : SHORT_ROWS) * stride);
        sums = cutter.cut<float>((task.m > MOST_KEYS ? block : MOST_BAND) * width);
        weights = {cutter.cut<float>(block), cutter.cut<float>(block), cutter.cut<float>(block),
                   cutter.cut<float>(block)};
        parts = cutter.cut<Floats>(MOST_BAND + LANES);
        rows = cutter.cut<const void*>(stride);
    }
};

inline float element(const void* data, int32_t type, int64_t at) {
    if (type == FLOAT32) return ((const float*)data)[at];
    return type == BFLOAT16 ? widen(((const BFloat16*)data)[at]) : widen(((const Float16*)data)[at]);
}

template <class T>
inline void copy_elements(const T* row, int64_t step, int64_t width, float* to) {
    int64_t e = 0;
    for (; step == 1 && e + LANES <= width; e += LANES) store(to + e, widened(row + e));
    for (; e < width; ++e) to[e] = widen(row[e * step]);
}

// The first `width` elements of a row, side by side as float32.
inline void copy_row(const void* row, int64_t step, int32_t type, int64_t width, float* to) {
    if (type == FLOAT32) return copy_elements((const float*)row, step, width, to);
    if (type == BFLOAT16) return copy_elements((const BFloat16*)row, step, width, to);
    copy_elements((const Float16*)row, step, width, to);
}

inline void write_row(const float* from, int64_t width, void* row, int64_t step, int32_t type) {
    if (type == FLOAT32)
        for (int64_t d = 0; d < width; ++d) ((float*)row)[d * step] = from[d];
    else if (type == BFLOAT16)
        for (int64_t d = 0; d < width; ++d) narrow(from[d], ((BFloat16*)row)[d * step]);
    else
        for (int64_t d = 0; d < width; ++d) narrow(from[d], ((Float16*)row)[d * step]);
}

// Elements e .. e + LANES of LANES rows, turned: lane i of lanes[j] is element e + j of row i. Those that are not there
// are not read.
template <class T>
inline void load_turned(const void* const* rows, int64_t step, int64_t e, int64_t E, Floats (&lanes)[LANES]) {
    if (step == 1 && e + LANES <= E) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) lanes[i] = widened((const T*)rows[i] + e);
        return turn(lanes);
    }
    for (int j = 0; j < LANES && e + j < E; ++j) {
        float column[LANES];
        for (int i = 0; i < LANES; ++i) column[i] = widen(((const T*)rows[i])[(e + j) * step]);
        lanes[j] = load<Floats>(column);
    }
}

// LANES keys become columns of a panel: to[e * PANEL + lane].
template <class T>
inline void turn_keys(const void* const* rows, int64_t step, int64_t E, float* to) {
    for (int64_t e = 0; e < E; e += LANES, to += LANES * PANEL) {
        Floats lanes[LANES];
        load_turned<T>(rows, step, e, E, lanes);
        if (e + LANES <= E)
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) store(to + i * PANEL, lanes[i]);
        else
            for (int64_t i = 0; i < E - e; ++i) store(to + i * PANEL, lanes[i]);
    }
}

inline void turn_keys(const void* const* rows, const Rows& k, int64_t E, float* to) {
    if (k.type == FLOAT32) return turn_keys<float>(rows, k.step, E, to);
    if (k.type == BFLOAT16) return turn_keys<BFloat16>(rows, k.step, E, to);
    turn_keys<Float16>(rows, k.step, E, to);
}

// Rows first + j .. of LANES keys; beyond `count`, copies of the last one.
inline void find_rows(const Rows& rows, const void* data, int64_t first, int64_t j, int64_t count,
                      const void* (&to)[LANES]) {
    for (int lane = 0; lane < LANES; ++lane)
        to[lane] = rows.row(data, first + (j + lane < count ? j + lane : count - 1));
}

// Keys [first, first + count) into panels.
inline void gather_keys(const Task& task, const void* k, int64_t first, int64_t count, float* to) {
    for (int64_t j = 0; j < count; j += LANES) {
        const void* rows[LANES];
        find_rows(task.k, k, first, j, count, rows);
        turn_keys(rows, task.k, task.E, to + j / PANEL * task.E * PANEL + j % PANEL);
    }
}

// Row j of `count` values into panels of channels, zeros where there is no channel.
inline void gather_value(const Task& task, const void* row, int64_t j, int64_t count, float* to) {
    const int64_t whole = task.v.direct(PANEL) ? task.D / PANEL * PANEL : 0;
    float* place = to + j * PANEL;
    int64_t d = 0;
    for (; d < whole; d += PANEL, place += count * PANEL) {
        store(place, load<Floats>((const float*)row + d));
        store(place + LANES, load<Floats>((const float*)row + d + LANES));
    }
    for (; d < task.D; d += PANEL, place += count * PANEL) {
        const int64_t width = task.D - d < PANEL ? task.D - d : PANEL;
        if (width < PANEL) __builtin_memset(place, 0, PANEL * sizeof(float));
        copy_row((const char*)row + d * task.v.step * task.v.bytes(), task.v.step, task.v.type, width, place);
    }
}

inline void gather_values(const Task& task, const void* v, int64_t first, int64_t count, float* to) {
    for (int64_t j = 0; j < count; ++j) gather_value(task, task.v.row(v, first + j), j, count, to);
}

// All rows of some heads, row by row: those of one box lie side by side, where those of one head may be far apart.
inline void gather_heads(const Task& task, const Place* places, int64_t heads, const LineScratch& scratch) {
    const int64_t keys = task.seen(task.n - 1), key_size = scratch.stride * task.E, value_size = scratch.stride * scratch.width;
    for (int64_t j = 0; j < keys; j += LANES)
        for (int64_t head = 0; head < heads; ++head) {
            const void* rows[LANES];
            find_rows(task.k, places[head].k, 0, j, keys, rows);
            turn_keys(rows, task.k, task.E,
                      scratch.keys + head * key_size + j / PANEL * task.E * PANEL + j % PANEL);
        }
    for (int64_t j = 0; j < keys; ++j)
        for (int64_t head = 0; head < heads; ++head)
            gather_value(task, task.v.row(places[head].v, j), j, keys, scratch.values + head * value_size);
    for (int64_t i = 0; i < task.n; ++i)
        for (int64_t head = 0; head < heads; ++head)
            copy_row(task.q.row(places[head].q, i), task.q.step, task.q.type, task.E,
                     scratch.gathered + (head * task.n + i) * task.E);
}

// A row of q as float32 side by side: itself, or a copy.
inline const float* query_row(const Task& task, const void* q, int64_t i, float* copy) {
    const void* row = task.q.row(q, i);
    if (task.q.direct(task.E)) return (const float*)row;
    copy_row(row, task.q.step, task.q.type, task.E, copy);
    return copy;
}

inline void add_bias(const Task& task, const void* bias, int64_t i, int64_t key, int64_t count, float* scores) {
    if (!bias) return;
    const int64_t step = task.bias_strides[1], at = i * task.bias_strides[0] + key * step;
    if (task.bias_type == FLOAT32 && step == 1)
        for (int64_t j = 0; j < count; ++j) scores[j] += ((const float*)bias)[at + j];
    else
        for (int64_t j = 0; j < count; ++j) scores[j] += element(bias, task.bias_type, at + j * step);
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
