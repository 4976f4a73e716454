// The product of a few rows of x with one panel.
#pragma once

#include "gated_causal_conv/cpu_plan.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// sums[m] += the products of row m with one panel's rows of a group, [taps][tap_stride / PANEL][PANEL].
// rows: [taps][row_stride], live: [taps] of the group. Out of line, so that nothing else competes for registers.
template <int ROWS>
__attribute__((noinline)) void add_products(const float* const* rows, int64_t row_stride, const uint8_t* live,
                                            const Group& group, const float* weights, int64_t tap_stride, float* sums) {
    Floats total[ROWS][2];
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; ++m) total[m][0] = total[m][1] = repeat(0.0f);
    const int64_t count = group.end - group.begin, begin = group.begin;
    for (const uint8_t* end = live + (group.last - group.first); live < end;
         ++live, rows += row_stride, weights += tap_stride) {
        if (!*live) continue;
        const float* x[ROWS];
#pragma GCC unroll 12
        for (int m = 0; m < ROWS; ++m) x[m] = rows[m] + begin;
        const float* w = weights;
#pragma GCC unroll 2
        for (int64_t k = 0; k < count; ++k, w += PANEL) {
            const Floats left = load<Floats>(w), right = load<Floats>(w + LANES);
#pragma GCC unroll 12
            for (int m = 0; m < ROWS; ++m) {
                const Floats value = repeat(x[m][k]);
                total[m][0] = multiply_add(left, value, total[m][0]);
                total[m][1] = multiply_add(right, value, total[m][1]);
            }
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; ++m) {
        store(sums + m * PANEL, load<Floats>(sums + m * PANEL) + total[m][0]);
        store(sums + m * PANEL + LANES, load<Floats>(sums + m * PANEL + LANES) + total[m][1]);
    }
}

template <int ROWS>
void add_rows(int64_t count, const float* const* rows, int64_t row_stride, const uint8_t* live, const Group& group,
              const float* weights, int64_t tap_stride, float* sums) {
    if constexpr (ROWS > 1)
        if (count < ROWS) return add_rows<ROWS - 1>(count, rows, row_stride, live, group, weights, tap_stride, sums);
    add_products<ROWS>(rows, row_stride, live, group, weights, tap_stride, sums);
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
