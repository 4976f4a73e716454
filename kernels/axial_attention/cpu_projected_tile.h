// The product of rows with panels, and what becomes of the last one.
#pragma once

#include "axial_attention/cpu_projected_plan.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

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
    const int64_t parts = at_least(parts_of(K, MOST_SUMMED), 1);
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = part * K / parts, count = (part + 1) * K / parts - begin;
        for (int64_t p = 0; p < positions; p += TILE_ROWS)
            multiply_rows<TILE_ROWS>(at_most(positions - p, TILE_ROWS), rows + p, begin, count, panel + begin * PANEL,
                                     to + p * stride, stride);
    }
}

// Asks for what finish_panel will write: its sums take longer than memory.
inline void fetch_places(const Plan& plan, int64_t panel, const int64_t* places, int64_t positions) {
    const Positions& out = plan.call.out;
    const char* first = (const char*)out.data + panel * PANEL * out.strides[4] * bytes_of(out.type);
    for (int64_t p = 0; p < positions; ++p) __builtin_prefetch(first + places[p] * bytes_of(out.type), 1);
}

// A panel's sums, [positions][PANEL], go to out at the positions' places.
inline void finish_panel(const Plan& plan, int64_t panel, const int64_t* places, const float* sums,
                         int64_t positions) {
    const Positions& out = plan.call.out;
    const int64_t first = panel * PANEL, count = at_most(plan.call.Cout - first, PANEL), step = out.strides[4];
    const float* bias = plan.bias + first;
    const bool add = plan.call.add;
    if (out.type == FLOAT32 && step == 1 && count == PANEL) {
        const Floats left = load<Floats>(bias), right = load<Floats>(bias + LANES), none = repeat(0.0f);
        for (int64_t p = 0; p < positions; ++p, sums += PANEL) {
            float* to = (float*)out.data + places[p] + first;
            store(to, load<Floats>(sums) + left + (add ? load<Floats>(to) : none));
            store(to + LANES, load<Floats>(sums + LANES) + right + (add ? load<Floats>(to + LANES) : none));
        }
        return;
    }
    for (int64_t p = 0; p < positions; ++p, sums += PANEL)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = places[p] + (first + i) * step;
            const float value = sums[i] + bias[i] + (add ? element(out.data, out.type, at) : 0.0f);
            write_row(&value, 1, (char*)out.data + at * bytes_of(out.type), 1, out.type);
        }
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
