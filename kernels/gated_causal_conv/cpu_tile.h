// The product of a few rows of x with one panel, and what becomes of the finished sums.
#pragma once

#include "common/math.h"
#include "gated_causal_conv/cpu_plan.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// Where the weights of one group and panel lie: two vectors a row.
struct Weights {
    const float* first;   // of the group's first tap and row
    int64_t second;       // from the first vector to the second
    int64_t next, tap;    // from row to row, from tap to tap
};

// sums[m] += the group's products of row m; rows: [taps of the group][row_stride], live: [taps of the group].
template <int ROWS>
void add_products(const float* const* rows, int64_t row_stride, const uint8_t* live, const Group& group,
                  const Weights& weights, float* sums) {
    const int64_t count = group.end - group.begin;
    Floats total[ROWS][2];
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; ++m) total[m][0] = total[m][1] = repeat(0.0f);
    const float* first = weights.first;
    const int64_t second = weights.second, next = weights.next;
    for (int64_t tap = 0; tap < group.last - group.first; ++tap, rows += row_stride, first += weights.tap) {
        if (!live[tap]) continue;
        const float* x[ROWS];
#pragma GCC unroll 12
        for (int m = 0; m < ROWS; ++m) x[m] = rows[m] + group.begin;
        const float* w = first;
#pragma GCC unroll 2
        for (int64_t k = 0; k < count; ++k, w += next) {
            const Floats left = load<Floats>(w), right = load<Floats>(w + second);
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
              const Weights& weights, float* sums) {
    if constexpr (ROWS > 1)
        if (count < ROWS) return add_rows<ROWS - 1>(count, rows, row_stride, live, group, weights, sums);
    add_products<ROWS>(rows, row_stride, live, group, weights, sums);
}

// Channels of a tensor at one position.
struct Channels {
    char* data;      // null: absent
    int64_t stride;  // in elements
    int32_t type;

    Channels(const View& view, int64_t at)
        : data(view.data ? (char*)view.data + at * size_of(view.type) : nullptr),
          stride(view.strides[4]),
          type(view.type) {}

    static int64_t size_of(int32_t type) { return type == FLOAT32 ? 4 : 2; }

    Floats read(int64_t channel, int64_t count) const {
        if (type == FLOAT32 && stride == 1 && count >= LANES) return load<Floats>((const float*)data + channel);
        float lanes[LANES] = {};
        for (int64_t i = 0; i < at_most(count, LANES); ++i) {
            const int64_t at = (channel + i) * stride;
            lanes[i] = type == FLOAT32 ? ((const float*)data)[at] : widen(((const BFloat16*)data)[at]);
        }
        return load<Floats>(lanes);
    }

    // Of dense channels.
    void write(int64_t channel, int64_t count, Floats value) const {
        if (type == FLOAT32 && count >= LANES) return store((float*)data + channel, value);
        float lanes[LANES];
        store(lanes, value);
        if (type == FLOAT32) {
            for (int64_t i = 0; i < at_most(count, LANES); ++i) ((float*)data)[channel + i] = lanes[i];
        } else if (count >= LANES) {
            for (int64_t i = 0; i < LANES; ++i) narrow(lanes[i], ((BFloat16*)data)[channel + i]);
        } else {
            for (int64_t i = 0; i < count; ++i) narrow(lanes[i], ((BFloat16*)data)[channel + i]);
        }
    }
};

// Offsets of one position in each tensor.
struct Place {
    int64_t out, pre, addend, residual;
};

// From finished sums of one position and panel to pre and out.
inline void finish(const Plan& plan, int64_t panel, const Place& place, const float* sums) {
    const ConvCall& call = plan.call;
    const Channels out(call.out, place.out), pre(call.pre, place.pre);
    const Channels addend(call.addend, place.addend), residual(call.residual, place.residual);
    const bool plain = call.activation == PLAIN;
    const int64_t channel = panel * plan.panel_width, left = plan.channels - channel;
    const int64_t second = plain ? channel + LANES : plan.channels + channel, right = plain ? left - LANES : left;
    Floats a = load<Floats>(sums) + load<Floats>(plan.bias + panel * PANEL);
    Floats b = load<Floats>(sums + LANES) + load<Floats>(plan.bias + panel * PANEL + LANES);
    if (addend.data) {
        a += addend.read(channel, left);
        b += addend.read(second, right);
    }
    if (pre.data) {
        pre.write(channel, left, a);
        pre.write(second, right, b);
    }
    if (!plain) a = call.activation == GATE ? gate(a, b) : a * sigmoid(b);
    if (residual.data) {
        a += residual.read(channel, left);
        if (plain) b += residual.read(second, right);
    }
    out.write(channel, left, a);
    if (plain) out.write(second, right, b);
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
