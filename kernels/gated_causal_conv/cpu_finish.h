// What becomes of the finished sums of one panel.
#pragma once

#include "common/math.h"
#include "gated_causal_conv/cpu_plan.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// Where one position begins in each tensor, in elements.
struct Place {
    int64_t out, pre, addend, residual;
};

// LANES channels of one tensor from some channel on, of which `count` exist; DIRECT: all, as float32 side by side.
template <bool DIRECT>
struct Lanes {
    char* data;      // null: absent
    int64_t stride;  // from channel to channel, in elements
    int64_t count;
    int32_t type;

    Lanes(const View& view, int64_t channel, int64_t left)
        : data((char*)view.data), stride(view.strides[4]), count(left < LANES ? left : LANES), type(view.type) {
        if (data) data += channel * stride * (type == FLOAT32 ? 4 : 2);
    }

    bool direct() const { return !data || (type == FLOAT32 && stride == 1 && count == LANES); }

    Floats read(int64_t at) const {
        if constexpr (DIRECT) return load<Floats>((const float*)data + at);
        float lanes[LANES] = {};
        for (int64_t i = 0; i < count; ++i, at += stride)
            lanes[i] = type == FLOAT32 ? ((const float*)data)[at] : widen(((const BFloat16*)data)[at]);
        return load<Floats>(lanes);
    }

    void write(int64_t at, Floats value) const {
        if constexpr (DIRECT) return store((float*)data + at, value);
        float lanes[LANES];
        store(lanes, value);
        for (int64_t i = 0; i < count; ++i, at += stride)
            if (type == FLOAT32)
                ((float*)data)[at] = lanes[i];
            else
                narrow(lanes[i], ((BFloat16*)data)[at]);
    }
};

// The two vectors of a panel, in each tensor.
template <bool DIRECT>
struct Ends {
    Lanes<DIRECT> out, pre, addend, residual, right_out, right_pre, right_addend, right_residual;

    // left, right: the vectors' first channels of pre; of out both have the left one, unless the call is plain.
    Ends(const ConvCall& call, int64_t left, int64_t right, int64_t left_count, int64_t right_count)
        : out(call.out, left, left_count), pre(call.pre, left, left_count), addend(call.addend, left, left_count),
          residual(call.residual, left, left_count), right_out(call.out, right, right_count),
          right_pre(call.pre, right, right_count), right_addend(call.addend, right, right_count),
          right_residual(call.residual, right, right_count) {}

    bool direct() const {
        return out.direct() && pre.direct() && addend.direct() && residual.direct() && right_pre.direct() &&
               right_addend.direct();
    }
};

template <int ACTIVATION, bool DIRECT>
void finish_rows(const Ends<DIRECT>& ends, const float* bias, const Place* places, const float* sums, int64_t count) {
    const Floats bias_a = load<Floats>(bias), bias_b = load<Floats>(bias + LANES);
    for (int64_t p = 0; p < count; ++p, ++places, sums += PANEL) {
        Floats a = load<Floats>(sums) + bias_a, b = load<Floats>(sums + LANES) + bias_b;
        if (ends.addend.data) {
            a += ends.addend.read(places->addend);
            b += ends.right_addend.read(places->addend);
        }
        if (ends.pre.data) {
            ends.pre.write(places->pre, a);
            ends.right_pre.write(places->pre, b);
        }
        if (ACTIVATION == GATE) a = gate(a, b);
        if (ACTIVATION == GLU) a *= sigmoid(b);
        if (ends.residual.data) {
            a += ends.residual.read(places->residual);
            if (ACTIVATION == PLAIN) b += ends.right_residual.read(places->residual);
        }
        ends.out.write(places->out, a);
        if (ACTIVATION == PLAIN) ends.right_out.write(places->out, b);
    }
}

template <bool DIRECT>
void finish_with(const Plan& plan, const Ends<DIRECT>& ends, const float* bias, const Place* places, const float* sums,
                 int64_t count) {
    switch (plan.call.activation) {
        case GATE: return finish_rows<GATE>(ends, bias, places, sums, count);
        case GLU: return finish_rows<GLU>(ends, bias, places, sums, count);
        default: return finish_rows<PLAIN>(ends, bias, places, sums, count);
    }
}

// From the sums of `count` positions to pre and out.
inline void finish_panel(const Plan& plan, int64_t panel, const Place* places, const float* sums, int64_t count) {
    const bool plain = plan.call.activation == PLAIN;
    const int64_t left = panel * plan.panel_width, left_count = plan.channels - left;
    const int64_t right = plain ? left + LANES : plan.channels + left;
    const int64_t right_count = at_least(plain ? left_count - LANES : left_count, 0);
    const float* bias = plan.bias + panel * PANEL;
    const Ends<true> ends(plan.call, left, right, left_count, right_count);
    if (ends.direct() && right_count >= LANES) return finish_with(plan, ends, bias, places, sums, count);
    finish_with(plan, Ends<false>(plan.call, left, right, left_count, right_count), bias, places, sums, count);
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
