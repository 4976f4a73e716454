// What is copied before anything is multiplied: weights into panels, and x where its rows are not float32 side by side.
#pragma once

#include "gated_causal_conv/cpu_plan.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// Whether LANES columns from this lane of a panel on exist and follow one another.
inline bool whole(const Plan& plan, int64_t panel, int64_t lane) {
    return column_of(plan, panel, lane) >= 0 && column_of(plan, panel, lane + LANES - 1) >= 0;
}

// One vector of a panel, column by column.
template <class T>
void pack_columns(const Plan& plan, int64_t panel, int64_t half, const T* from, int64_t rows, float* to) {
    const int64_t along = plan.call.weight.strides[1], across = plan.call.weight.strides[2];
    for (int64_t lane = half; lane < half + LANES; ++lane) {
        const int64_t column = column_of(plan, panel, lane);
        if (column < 0)
            for (int64_t k = 0; k < rows; ++k) to[k * PANEL + lane] = 0;
        else
            for (int64_t k = 0; k < rows; ++k) to[k * PANEL + lane] = widen(from[k * along + column * across]);
    }
}

template <class T>
void pack_panels(const Plan& plan, int64_t first, int64_t last, const T* from, int64_t rows, float* to,
                 int64_t panel_stride) {
    const int64_t along = plan.call.weight.strides[1];
    int64_t easy = first;  // panels before this one are copied row by row: what lies side by side is read at once
    if (plan.call.weight.strides[2] == 1)
        while (easy < last && whole(plan, easy, 0) && whole(plan, easy, LANES)) ++easy;
    for (int64_t k = 0; k < rows && easy > first; ++k)
        for (int64_t half = 0; half < PANEL; half += LANES) {
            const T* row = from + k * along + column_of(plan, first, half);
            const int64_t next = plan.call.activation == PLAIN ? PANEL : LANES;
            for (int64_t panel = first; panel < easy; ++panel, row += next) {
                float* place = to + (panel - first) * panel_stride + k * PANEL + half;
                for (int64_t lane = 0; lane < LANES; ++lane) place[lane] = widen(row[lane]);
            }
        }
    for (int64_t panel = easy; panel < last; ++panel)
        for (int64_t half = 0; half < PANEL; half += LANES)
            pack_columns(plan, panel, half, from, rows, to + (panel - first) * panel_stride);
}

// Rows [begin, end) of a tap's matrix, the columns of panels [first, last), which lie panel_stride apart.
inline void pack_rows(const Plan& plan, int64_t first, int64_t last, int64_t tap, int64_t begin, int64_t end, float* to,
                      int64_t panel_stride) {
    const Matrices& weight = plan.call.weight;
    const int64_t start = tap * weight.strides[0] + begin * weight.strides[1];
    if (weight.type == FLOAT32)
        pack_panels(plan, first, last, (const float*)weight.data + start, end - begin, to, panel_stride);
    else
        pack_panels(plan, first, last, (const BFloat16*)weight.data + start, end - begin, to, panel_stride);
}

inline float bias_at(const ConvCall& call, int64_t column) {
    if (!call.bias || column < 0) return 0;
    return call.bias_type == FLOAT32 ? ((const float*)call.bias)[column] : widen(((const BFloat16*)call.bias)[column]);
}

template <class T>
void stage_line(const Plan& plan, const T* from, float* to) {
    const int64_t W = plan.extent[2], C = plan.call.Cin;
    const int64_t next = plan.call.x.strides[3], channel = plan.call.x.strides[4];
    if (channel == 1) {
        for (int64_t x = 0; x < W; ++x, from += next, to += C)
            for (int64_t c = 0; c < C; ++c) to[c] = widen(from[c]);
        return;
    }
    constexpr int64_t STRIP = 16;  // positions whose rows stay in the L1 cache while channels pass
    for (int64_t x = 0; x < W; x += STRIP) {
        const int64_t count = at_most(W - x, STRIP);
        for (int64_t c = 0; c < C; ++c)
            for (int64_t i = 0; i < count; ++i) to[(x + i) * C + c] = widen(from[(x + i) * next + c * channel]);
    }
}

// Line (b, t, y) of the part of x that is read.
inline void stage(const Plan& plan, int64_t line) {
    const int64_t* extent = plan.extent;
    const View& x = plan.call.x;
    const int64_t y = line % extent[1] + plan.low[1], t = line / extent[1] % extent[0] + plan.low[0];
    const int64_t b = line / extent[1] / extent[0];
    const int64_t at = b * x.strides[0] + t * x.strides[1] + y * x.strides[2] + plan.low[2] * x.strides[3];
    float* to = plan.staging + line * extent[2] * plan.call.Cin;
    if (x.type == FLOAT32)
        stage_line(plan, (const float*)x.data + at, to);
    else
        stage_line(plan, (const BFloat16*)x.data + at, to);
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
