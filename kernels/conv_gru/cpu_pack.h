// Weights into panels: [panels][matrices][rows][PANEL].
#pragma once

#include "common/numbers.h"
#include "conv_gru/cpu_map.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// A convolution's weights as matrices: element (row, column, tap) is data[row * along + column * across + tap], or
// with the taps in reverse order.
struct Weights {
    const void* data;
    int64_t along, across, taps;
    bool reversed;
    int64_t columns;        // of one half
    bool halves;            // a panel has LANES columns of each half, otherwise PANEL of the only one
    int64_t rows, padding;  // rows of each group, of which there may be two; padding: rows of nought after each
    int64_t groups;

    int64_t panels() const { return divide_up(columns, halves ? LANES : PANEL); }
    int64_t all_rows() const { return groups * (rows + padding); }

    // The column that is lane `lane` of a panel, or -1.
    int64_t column(int64_t panel, int64_t lane) const {
        const int64_t in_half = halves ? panel * LANES + lane % LANES : panel * PANEL + lane;
        return in_half >= columns ? -1 : halves && lane >= LANES ? columns + in_half : in_half;
    }
};

// The four numbers that three weights become along an axis.
inline void spread(const Floats& a, const Floats& b, const Floats& c, Floats* to, int step) {
    const Floats ends = (a + c) * 0.5f, half = b * 0.5f;
    to[0] = a;
    to[step] = ends + half;
    to[2 * step] = ends - half;
    to[3 * step] = c;
}

// 3 x 3 taps -> 4 x 4, for LANES columns; to: matrices `next` floats apart.
inline void spread_taps(const float* taps, float* to, int64_t next) {
    Floats g[9], once[12], twice[16];
    for (int i = 0; i < 9; ++i) g[i] = load<Floats>(taps + i * PANEL);
    for (int x = 0; x < 3; ++x) spread(g[x], g[3 + x], g[6 + x], once + x, 3);
    for (int y = 0; y < 4; ++y) spread(once[3 * y], once[3 * y + 1], once[3 * y + 2], twice + 4 * y, 1);
    for (int i = 0; i < 16; ++i) store(to + i * next, twice[i]);
}

// One row of one panel, all taps: gathered into [taps][PANEL], then stored or transformed.
template <class T>
void pack_row(const Weights& weights, const Map& map, const int64_t* at, int64_t row, float* gathered, float* to,
              int64_t next) {
    const T* from = (const T*)weights.data + row * weights.along;
    const int64_t last = weights.taps - 1;
    for (int64_t tap = 0; tap <= last; ++tap) {
        const int64_t offset = weights.reversed ? last - tap : tap;
        float* lanes = map.transformed ? gathered + tap * PANEL : to + tap * next;
        for (int64_t lane = 0; lane < PANEL; ++lane) lanes[lane] = at[lane] < 0 ? 0.0f : widen(from[at[lane] + offset]);
    }
    if (!map.transformed) return;
    for (int64_t half = 0; half < PANEL; half += LANES) spread_taps(gathered + half, to + half, next);
}

template <class T>
void pack_panel(const Weights& weights, const Map& map, int64_t panel, float* packed) {
    const int64_t rows = weights.all_rows(), next = rows * PANEL;
    float* to = packed + panel * map.matrices * next;
    int64_t at[PANEL];
    for (int64_t lane = 0; lane < PANEL; ++lane) {
        const int64_t column = weights.column(panel, lane);
        at[lane] = column < 0 ? -1 : column * weights.across;
    }
    float gathered[9 * PANEL];
    for (int64_t group = 0; group < weights.groups; ++group, to += weights.padding * PANEL) {
        for (int64_t row = 0; row < weights.rows; ++row, to += PANEL)
            pack_row<T>(weights, map, at, group * weights.rows + row, gathered, to, next);
        for (int64_t matrix = 0; matrix < map.matrices; ++matrix)
            __builtin_memset(to + matrix * next, 0, (size_t)(weights.padding * PANEL) * sizeof(float));
    }
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
