// Products of two small matrices in scratch, with the rows or the columns of one of them cut off by a causal mask.
#pragma once

#include "axial_attention/cpu_backward_rows.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t FETCHED = 6;  // cache lines that are fetched ahead during one tile of a product

// to[r][c] = scale * sum over k of a[r][k] * b[k][c], or that added to what is there. If turned, a is [k][r].
struct Product {
    const float* a;
    int64_t a_step;  // between rows of a as it lies
    const float* b;
    int64_t b_step;
    float* to;
    int64_t to_step;
    float scale;
    bool add;
};

// Which keys of a tile the queries of a tile see: query i those before i + shift.
struct Sight {
    int64_t queries, keys, shift;

    int64_t seen(int64_t i) const { return most(0, least(keys, i + shift)); }
    int64_t first(int64_t j) const { return most(0, least(queries, j + 1 - shift)); }  // query that sees key j
};

// ROWS rows and VECTORS vectors of the product, for k in [begin, end). Out of line, so that nothing else competes for
// registers.
template <int ROWS, int VECTORS, bool TURNED>
__attribute__((noinline)) void multiply_tile(const Product& p, int64_t r, int64_t c, int64_t begin, int64_t end) {
    Floats total[ROWS][VECTORS];
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) total[m][v] = repeat(0.0f);
    const int64_t row_step = TURNED ? 1 : p.a_step, k_step = TURNED ? p.a_step : 1, b_step = p.b_step;
    const float* a = p.a + r * row_step + begin * k_step;
    const float* b = p.b + begin * b_step + c;
#pragma GCC unroll 2
    for (int64_t k = begin; k < end; ++k, a += k_step, b += b_step) {
        Floats right[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) right[v] = load<Floats>(b + v * LANES);
#pragma GCC unroll 12
        for (int m = 0; m < ROWS; ++m) {
            const Floats left = repeat(a[m * row_step]);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) total[m][v] = multiply_add(right[v], left, total[m][v]);
        }
    }
    float* to = p.to + r * p.to_step + c;
    const Floats scale = repeat(p.scale);
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; ++m, to += p.to_step)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
            Floats value = total[m][v] * scale;
            if (p.add) value += load<Floats>(to + v * LANES);
            store(to + v * LANES, value);
        }
}

template <int ROWS, int VECTORS, bool TURNED>
inline void multiply_rows(int64_t rows, const Product& p, int64_t r, int64_t c, int64_t begin, int64_t end) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return multiply_rows<ROWS - 1, VECTORS, TURNED>(rows, p, r, c, begin, end);
    multiply_tile<ROWS, VECTORS, TURNED>(p, r, c, begin, end);
}

template <bool TURNED>
inline void multiply_panel(int64_t rows, int64_t vectors, const Product& p, int64_t r, int64_t c, int64_t begin,
                           int64_t end) {
    if (vectors > 1) return multiply_rows<TILE_ROWS, 2, TURNED>(rows, p, r, c, begin, end);
    multiply_rows<TILE_ROWS, 1, TURNED>(rows, p, r, c, begin, end);
}

// Rows cut evenly into the fewest tiles.
struct Cut {
    int64_t rows, tiles = divide_up(rows, TILE_ROWS);

    int64_t first(int64_t tile) const { return tile * rows / tiles; }
};

// Queries times keys: k goes over `width`, and vectors that no query of a tile sees are left as they are.
inline void multiply_scores(const Product& p, const Sight& sight, int64_t width, Ahead& ahead) {
    const Cut cut{sight.queries};
    const int64_t vectors = divide_up(sight.keys, LANES);
    for (int64_t v = 0; v < vectors; v += 2)
        for (int64_t tile = 0; tile < cut.tiles; ++tile) {
            const int64_t r = cut.first(tile), next = cut.first(tile + 1);
            ahead.fetch(FETCHED);
            if (v * LANES >= sight.seen(next - 1)) continue;
            multiply_panel<false>(next - r, least(2, vectors - v), p, r, v * LANES, 0, width);
        }
}

// [queries, keys] times rows of keys.
inline void multiply_keys(const Product& p, const Sight& sight, int64_t width, Ahead& ahead) {
    const Cut cut{sight.queries};
    const int64_t vectors = divide_up(width, LANES);
    for (int64_t v = 0; v < vectors; v += 2)
        for (int64_t tile = 0; tile < cut.tiles; ++tile) {
            const int64_t r = cut.first(tile), next = cut.first(tile + 1);
            ahead.fetch(FETCHED);
            multiply_panel<false>(next - r, least(2, vectors - v), p, r, v * LANES, 0, sight.seen(next - 1));
        }
}

// [queries, keys], transposed, times rows of queries.
inline void multiply_queries(const Product& p, const Sight& sight, int64_t width, Ahead& ahead) {
    const Cut cut{sight.keys};
    const int64_t vectors = divide_up(width, LANES);
    for (int64_t v = 0; v < vectors; v += 2)
        for (int64_t tile = 0; tile < cut.tiles; ++tile) {
            const int64_t r = cut.first(tile), next = cut.first(tile + 1);
            ahead.fetch(FETCHED);
            multiply_panel<true>(next - r, least(2, vectors - v), p, r, v * LANES, sight.first(r), sight.queries);
        }
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
