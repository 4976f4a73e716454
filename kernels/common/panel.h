// The product of rows with a packed matrix, panel by panel.
#pragma once

#include "common/simd.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t PANEL = 2 * LANES;  // columns of a panel
constexpr int64_t MOST_SUMMED = 256;  // products that are summed before the sum joins the total

// to[m] = the products of row m with `count` rows of a panel, plus what `to` holds unless `begin` is 0. Out of line, so
// that nothing else competes for registers.
template <int ROWS>
__attribute__((noinline)) void multiply_tile(const float* const* rows, int64_t begin, int64_t count,
                                             const float* weights, float* to, int64_t stride) {
    Floats total[ROWS][2];
    const float* x[ROWS];
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; ++m) {
        total[m][0] = total[m][1] = repeat(0.0f);
        x[m] = rows[m] + begin;
    }
#pragma GCC unroll 2
    for (int64_t k = 0; k < count; ++k, weights += PANEL) {
        const Floats left = load<Floats>(weights), right = load<Floats>(weights + LANES);
#pragma GCC unroll 12
        for (int m = 0; m < ROWS; ++m) {
            const Floats value = repeat(x[m][k]);
            total[m][0] = multiply_add(left, value, total[m][0]);
            total[m][1] = multiply_add(right, value, total[m][1]);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; ++m, to += stride) {
        const Floats left = total[m][0], right = total[m][1];
        store(to, begin ? load<Floats>(to) + left : left);
        store(to + LANES, begin ? load<Floats>(to + LANES) + right : right);
    }
}

template <int ROWS>
void multiply_rows(int64_t left, const float* const* rows, int64_t begin, int64_t count, const float* weights,
                   float* to, int64_t stride) {
    if constexpr (ROWS > 1)
        if (left < ROWS) return multiply_rows<ROWS - 1>(left, rows, begin, count, weights, to, stride);
    multiply_tile<ROWS>(rows, begin, count, weights, to, stride);
}

// to[p][PANEL] = rows[p][K] times a panel [K][PANEL]. Which products are summed together depends on K alone.
inline void multiply_panel(const float* const* rows, int64_t positions, int64_t K, const float* panel, float* to,
                           int64_t stride) {
    const int64_t parts = K > MOST_SUMMED ? (K + MOST_SUMMED - 1) / MOST_SUMMED : 1;
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = part * K / parts, count = (part + 1) * K / parts - begin;
        for (int64_t p = 0; p < positions; p += TILE_ROWS)
            multiply_rows<TILE_ROWS>(positions - p, rows + p, begin, count, panel + begin * PANEL,
                                     to + p * stride, stride);
    }
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
