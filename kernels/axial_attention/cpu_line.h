// Attention of one head inside one box, or of several at once where a box has so few keys that a vector holds more.
//
// A query's result depends on what it sees alone, whatever is evaluated with it: see cpu_tile.h for the order of sums;
// weights are scaled anew only where a chunk of MOST_KEYS keys ends, counted from the first key.
#pragma once

#include "axial_attention/cpu_few.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// A few queries against the keys in progress.
struct Tile {
    const Task& task;
    const Place& place;
    const LineScratch& scratch;
    int64_t first, rows;  // queries
    int64_t key, keys;    // those in scratch, from `key` on
    int64_t count;        // of them, seen by the last query
    int64_t stride;       // of scores
};

// Scores of a tile become weights; before: what its earlier sums are to be multiplied by.
inline void weigh_tile(const Tile& tile, Weights& weights, float (&before)[ROOM]) {
    const Task& task = tile.task;
    const LineScratch& scratch = tile.scratch;
    const float* queries[TILE_ROWS];
    Span spans[TILE_ROWS];
    for (int64_t r = 0; r < tile.rows; ++r) {
        queries[r] = query_row(task, tile.place.q, tile.first + r, scratch.queries + r * task.E);
        const int64_t seen = task.seen(tile.first + r) - tile.key;
        spans[r] = {0, seen < 0 ? 0 : seen < tile.count ? seen : tile.count};
    }
    score_rows<TILE_ROWS>(tile.rows, queries, task.E, scratch.keys, tile.count, task.scale, scratch.scores,
                          tile.stride);
    for (int64_t r = 0; r < tile.rows; ++r)
        add_bias(task, tile.place.bias, tile.first + r, tile.key, tile.count, scratch.scores + r * tile.stride);
    weigh(scratch.scores, tile.stride, tile.rows, spans, tile.count, weights, before);
}

inline void mix(const Tile& tile, const float* before, const float* by, float* const* to) {
    mix_rows<TILE_ROWS>(tile.rows, tile.scratch.scores, tile.stride, tile.scratch.values, tile.keys * PANEL, tile.count,
                        tile.task.D, before, by, to);
}

// All keys at once: weights and sums never leave the tile.
inline void attend_tile(const Tile& tile) {
    const Task& task = tile.task;
    const bool direct = task.out.direct(task.D) && task.D % LANES == 0;
    Weights weights;
    float by[ROOM], before[ROOM];
    float* to[TILE_ROWS];
    weights.begin();
    weigh_tile(tile, weights, before);
    weights.invert(by);
    for (int64_t r = 0; r < tile.rows; ++r)
        to[r] = direct ? (float*)task.out.row(tile.place.out, tile.first + r)
                       : tile.scratch.sums + r * tile.scratch.width;
    mix(tile, nullptr, by, to);
    for (int64_t r = 0; r < tile.rows; ++r)
        finish_row(task, tile.place, tile.first + r, weights, r, direct ? nullptr : to[r]);
}

// One chunk of keys of several: weights and sums [rows][width] go on where the last one ended.
inline void continue_tile(const Tile& tile, Weights& weights, float* sums) {
    float by[ROOM], before[ROOM];
    float* to[TILE_ROWS];
    weigh_tile(tile, weights, before);
    for (int64_t r = 0; r < tile.rows; ++r) {
        by[r] = 1;
        to[r] = sums + r * tile.scratch.width;
    }
    mix(tile, before, by, to);
}

inline void end_tile(const Tile& tile, const Weights& weights, float* sums) {
    float by[ROOM];
    weights.invert(by);
    for (int64_t r = 0; r < tile.rows; ++r, sums += tile.scratch.width) {
        for (int64_t d = 0; d < tile.task.D; ++d) sums[d] *= by[r];
        finish_row(tile.task, tile.place, tile.first + r, weights, r, sums);
    }
}

// Queries [first, last) of one head of one box, at most MOST_QUERIES; next: what is attended to after it, or null.
inline void attend_block(const Task& task, const Place& place, int64_t first, int64_t last, const LineScratch& scratch,
                         const Place* next = nullptr) {
    if (last - first <= FEW) return attend_few(task, place, first, last - first, scratch, next);
    const int64_t count = last - first, tiles = (count + TILE_ROWS - 1) / TILE_ROWS, seen = task.seen(last - 1);
    const bool once = task.m <= MOST_KEYS;
    if (!once) __builtin_memset(scratch.sums, 0, (size_t)(count * scratch.width) * sizeof(float));
    for (int64_t t = 0; t < tiles && !once; ++t) scratch.weights[t].begin();
    for (int64_t key = 0; key < seen || key == 0; key += MOST_KEYS) {
        const int64_t keys = seen - key < MOST_KEYS ? seen - key : MOST_KEYS;
        const bool end = key + MOST_KEYS >= seen;
        gather_keys(task, place.k, key, keys, scratch.keys);
        gather_values(task, place.v, key, keys, scratch.values);
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t from = t * count / tiles, to = (t + 1) * count / tiles;
            const int64_t sees = task.seen(first + to - 1) - key, here = sees < 0 ? 0 : sees < keys ? sees : keys;
            const Tile tile{task, place, scratch, first + from, to - from, key, keys, here, rounded_up(keys, PANEL)};
            if (next) fetch_ahead(task, *next, t, tiles);
            if (once) {
                attend_tile(tile);
                continue;
            }
            if (here > 0) continue_tile(tile, scratch.weights[t], scratch.sums + from * scratch.width);
            if (end) end_tile(tile, scratch.weights[t], scratch.sums + from * scratch.width);
        }
    }
}

// All queries of `count` heads, of one box or of several.
inline void attend(const Task& task, const Place* places, int64_t count, const LineScratch& scratch) {
    const int64_t together = task.m > 0 && 2 * task.m <= LANES ? LANES / slot_of(task.m) : 1;
    for (int64_t i = 0; i < count; i += together) {
        if (together > 1) {
            attend_short(task, places + i, count - i < together ? count - i : together, scratch);
            continue;
        }
        const Place* next = i + 1 < count ? places + i + 1 : nullptr;
        for (int64_t first = 0; first < task.n; first += MOST_QUERIES)
            attend_block(task, places[i], first, first + MOST_QUERIES < task.n ? first + MOST_QUERIES : task.n, scratch,
                         next);
    }
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
