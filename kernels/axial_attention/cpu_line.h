// Attention of one head inside one box, or of several at once where a box has so few keys that a vector holds more.
//
// A query's result depends on what it sees alone, whatever is evaluated with it: see cpu_tile.h for the order of sums;
// weights are scaled anew only where a chunk of MOST_KEYS keys ends, counted from the first key.
#pragma once

#include "axial_attention/cpu_few.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// Some queries of one head of one box, and the keys in progress.
struct Band {
    const Task& task;
    const Place& place;
    const LineScratch& scratch;
    int64_t key, keys;     // those in scratch, from `key` on
    int64_t first, rows;   // queries
    const Place* next;     // what is attended to afterwards, or null
    Weights weights;       // of the queries
    Span* spans;           // of the queries
    float* const* to;      // where their sums go

    // How many of the keys in scratch query i of the band sees.
    int64_t seen(int64_t i) const {
        const int64_t end = task.seen(first + i) - key;
        return end < 0 ? 0 : end < keys ? end : keys;
    }
};

// Does `tile(from, rows)` for tiles of about equal size.
template <class Tile>
inline void each_tile(int64_t rows, Tile tile) {
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, least = rows / tiles, wider = rows % tiles;
    for (int64_t t = 0, from = 0, count; t < tiles; ++t, from += count) {
        count = least + (t < wider);
        tile(from, count);
    }
}

inline void weigh_band(Band& band) {
    const Task& task = band.task;
    const LineScratch& scratch = band.scratch;
    each_tile(band.rows, [&](int64_t from, int64_t rows) {
        const float* queries[TILE_ROWS];
        const int64_t count = band.seen(from + rows - 1);
        if (band.next) fetch_ahead(task, *band.next, band.first + from, band.first + from + rows);
        for (int64_t r = 0; r < rows; ++r) {
            queries[r] = scratch.gathered
                             ? scratch.gathered + (band.first + from + r) * task.E
                             : query_row(task, band.place.q, band.first + from + r, scratch.queries + r * task.E);
            band.spans[from + r] = {0, band.seen(from + r), count};
        }
        score_rows<TILE_ROWS>(rows, queries, task.E, scratch.keys, count, task.scale,
                              scratch.scores + from * scratch.stride, scratch.stride);
    });
    for (int64_t r = 0; r < band.rows && band.place.bias; ++r)
        add_bias(task, band.place.bias, band.first + r, band.key, band.spans[r].seen,
                 scratch.scores + r * scratch.stride);
    weigh(scratch.scores, scratch.stride, band.rows, band.spans, band.weights, scratch.parts);
}

// by: what the sums are multiplied by; before: what they were.
inline void mix_band(const Band& band, const float* before, const float* by) {
    const LineScratch& scratch = band.scratch;
    each_tile(band.rows, [&](int64_t from, int64_t rows) {
        mix_rows<TILE_ROWS>(rows, scratch.scores + from * scratch.stride, scratch.stride, scratch.values,
                            band.keys * PANEL, band.spans[from].count, band.task.D, before ? before + from : nullptr,
                            by + from, band.to + from);
    });
}

// All keys at once: nothing is kept from band to band.
inline void attend_band(Band& band) {
    const Task& task = band.task;
    const bool direct = task.out.direct(task.D) && task.D % LANES == 0;
    float* to[MOST_BAND];
    for (int64_t r = 0; r < band.rows; ++r)
        to[r] = direct ? (float*)task.out.row(band.place.out, band.first + r)
                       : band.scratch.sums + r * band.scratch.width;
    band.to = to;
    band.weights.begin(band.rows);
    weigh_band(band);
    band.weights.invert(band.rows);
    mix_band(band, nullptr, band.weights.by);
    if (direct && !band.place.lse) return;
    for (int64_t r = 0; r < band.rows; ++r)
        finish_row(task, band.place, band.first + r, band.weights, r, direct ? nullptr : to[r]);
}

// One chunk of keys of several: weights and sums [rows][width] go on where the last one ended.
inline void continue_band(Band& band, float* sums) {
    float* to[MOST_BAND];
    for (int64_t r = 0; r < band.rows; ++r) {
        to[r] = sums + r * band.scratch.width;
        band.weights.by[r] = 1;
    }
    band.to = to;
    weigh_band(band);
    mix_band(band, band.weights.before, band.weights.by);
}

// Queries [first, last) of one head of one box, at most MOST_QUERIES; next: what is attended to after it, or null.
inline void attend_block(const Task& task, const Place& place, int64_t first, int64_t last, const LineScratch& scratch,
                         const Place* next = nullptr) {
    if (last - first <= FEW) return attend_few(task, place, first, last - first, scratch);
    const int64_t count = last - first, seen = task.seen(last - 1);
    const bool once = task.m <= MOST_KEYS;
    if (!once) {
        __builtin_memset(scratch.sums, 0, (size_t)(count * scratch.width) * sizeof(float));
        scratch.weights.begin(count);
    }
    for (int64_t key = 0; key < seen || (once && key == 0); key += MOST_KEYS) {
        const int64_t keys = seen - key < MOST_KEYS ? seen - key : MOST_KEYS;
        gather_keys(task, place.k, key, keys, scratch.keys);
        gather_values(task, place.v, key, keys, scratch.values);
        Span spans[MOST_BAND];
        for (int64_t from = 0; from < count; from += scratch.band) {
            const int64_t rows = count - from < scratch.band ? count - from : scratch.band;
            Band band{task, place, scratch, key, keys, first + from, rows, next, scratch.weights, spans,
                      nullptr};
            if (once) {
                attend_band(band);
            } else if (band.seen(rows - 1) > 0) {
                band.weights = scratch.weights.from(from);
                continue_band(band, scratch.sums + from * scratch.width);
            }
        }
    }
    if (once) return;
    scratch.weights.invert(count);
    for (int64_t i = 0; i < count; ++i) {
        float* sums = scratch.sums + i * scratch.width;
        for (int64_t d = 0; d < task.D; ++d) sums[d] *= scratch.weights.by[i];
        finish_row(task, place, first + i, scratch.weights, i, sums);
    }
}

// The same for all queries of some heads, whose rows are gathered together.
inline void attend_gathered(const Task& task, const Place* places, int64_t heads, const LineScratch& scratch) {
    gather_heads(task, places, heads, scratch);
    LineScratch own = scratch;
    for (int64_t head = 0; head < heads; ++head) {
        Span spans[MOST_BAND];
        for (int64_t from = 0; from < task.n; from += scratch.band) {
            const int64_t rows = task.n - from < scratch.band ? task.n - from : scratch.band;
            Band band{task, places[head], own, 0, task.seen(task.n - 1), from, rows, nullptr, scratch.weights, spans,
                      nullptr};
            attend_band(band);
        }
        own.keys += scratch.stride * task.E;
        own.values += scratch.stride * scratch.width;
        own.gathered += task.n * task.E;
    }
}

// All queries of `count` heads, of one box or of several.
inline void attend(const Task& task, const Place* places, int64_t count, const LineScratch& scratch) {
    if (task.m > 0 && 2 * task.m <= LANES) return attend_short(task, places, count, scratch);
    if (task.together > 1) {
        for (int64_t i = 0; i < count; i += task.together)
            attend_gathered(task, places + i, count - i < task.together ? count - i : task.together, scratch);
        return;
    }
    for (int64_t i = 0; i < count; ++i)
        for (int64_t first = 0; first < task.n; first += MOST_QUERIES)
            attend_block(task, places[i], first, first + MOST_QUERIES < task.n ? first + MOST_QUERIES : task.n, scratch,
                         i + 1 < count ? places + i + 1 : nullptr);
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
