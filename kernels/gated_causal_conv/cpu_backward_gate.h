// The derivative of an activation, row by row of channels, and how rows of any view become rows of float32.
#pragma once

#include "common/math.h"
#include "common/numbers.h"
#include "gated_causal_conv/cpu.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t STAGED = 16;  // positions that are converted at a time, if a view is not float32 side by side

// A vector, or the first `count` lanes of one.
template <bool WHOLE>
inline Floats load_some(const float* from, int64_t count) {
    if constexpr (WHOLE) return load<Floats>(from);
    Floats v = {};
    __builtin_memcpy(&v, from, (size_t)count * sizeof(float));
    return v;
}

template <bool WHOLE>
inline void store_some(float* to, int64_t count, Floats v) {
    if constexpr (WHOLE) return store(to, v);
    __builtin_memcpy(to, &v, (size_t)count * sizeof(float));
}

struct Slopes {
    Floats a, b;
};

struct Sigmoid {
    Floats value, slope;
};

// With q = exp(-|b|) the slope is q / (1 + q)^2, exact to the end; 1 - sigmoid(b) would be zero from b = 17 on.
inline Sigmoid sigmoid_and_slope(Floats b) {
    const Floats q = exp_of_negative(-magnitude(b)), one = repeat(1.0f);
    const Floats larger = one / (q + 1), smaller = q * larger;
    return {b < 0 ? smaller : larger, smaller * larger};
}

// d/da and d/db of tanh(a) * sigmoid(b).
inline Slopes slopes_of_gate(Floats a, Floats b) {
    const Sigmoid s = sigmoid_and_slope(b);
    const Floats t = tanh(a);
    return {s.value * (repeat(1.0f) - t * t), t * s.slope};
}

// The same of a * sigmoid(b).
inline Slopes slopes_of_glu(Floats a, Floats b) {
    const Sigmoid s = sigmoid_and_slope(b);
    return {s.value, a * s.slope};
}

// One row of every operand; what is absent is null. to: C channels (PLAIN) or both halves of 2C, not null.
struct GradRow {
    const float *pre, *grad_out, *grad_pre;
    float *to, *sums;
};

template <bool WHOLE>
inline void put(const GradRow& row, int64_t at, int64_t count, Floats grad) {
    if (row.grad_pre) grad += load_some<WHOLE>(row.grad_pre + at, count);
    store_some<WHOLE>(row.to + at, count, grad);
    if (row.sums) store_some<WHOLE>(row.sums + at, count, load_some<WHOLE>(row.sums + at, count) + grad);
}

struct Plain {
    template <bool WHOLE>
    static inline void some(const GradRow& row, int64_t, int64_t c, int64_t count) {
        const Floats none = {};
        put<WHOLE>(row, c, count, row.grad_out ? load_some<WHOLE>(row.grad_out + c, count) : none);
    }
};

template <Slopes (*SLOPES)(Floats, Floats)>
struct Gated {
    template <bool WHOLE>
    static inline void some(const GradRow& row, int64_t C, int64_t c, int64_t count) {
        const Slopes slopes = SLOPES(load_some<WHOLE>(row.pre + c, count), load_some<WHOLE>(row.pre + C + c, count));
        const Floats grad = load_some<WHOLE>(row.grad_out + c, count);
        put<WHOLE>(row, c, count, grad * slopes.a);
        put<WHOLE>(row, C + c, count, grad * slopes.b);
    }
};

// C: channels, or of each half.
template <class Activated>
inline void differentiate_row(const GradRow& row, int64_t C) {
    int64_t c = 0;
    for (; c + LANES <= C; c += LANES) Activated::template some<true>(row, C, c, LANES);
    if (c < C) Activated::template some<false>(row, C, c, C - c);
}

// Rows of float32 channels, `step` apart.
struct Rows {
    float* at;
    int64_t step;

    float* operator[](int64_t p) const { return at ? at + p * step : nullptr; }
};

inline bool readable(const View& view) { return view.type == FLOAT32 && view.strides[4] == 1; }

template <class T>
inline void widen_rows(const T* from, const View& view, int64_t count, int64_t channels, float* to) {
    const int64_t step = view.strides[3], channel_step = view.strides[4];
    if (channel_step == 1) {
        for (int64_t p = 0; p < count; ++p)
            for (int64_t c = 0; c < channels; ++c) to[p * channels + c] = widen(from[p * step + c]);
        return;
    }
    for (int64_t c = 0; c < channels; ++c)
        for (int64_t p = 0; p < count; ++p) to[p * channels + c] = widen(from[p * step + c * channel_step]);
}

template <class T>
inline void narrow_rows(const float* from, const View& view, int64_t count, int64_t channels, T* to) {
    const int64_t step = view.strides[3], channel_step = view.strides[4];
    if (channel_step == 1) {
        for (int64_t p = 0; p < count; ++p)
            for (int64_t c = 0; c < channels; ++c) narrow(from[p * channels + c], to[p * step + c]);
        return;
    }
    for (int64_t c = 0; c < channels; ++c)
        for (int64_t p = 0; p < count; ++p) narrow(from[p * channels + c], to[p * step + c * channel_step]);
}

inline int64_t place_in(const View& view, const int64_t (&at)[4]) {
    return at[0] * view.strides[0] + at[1] * view.strides[1] + at[2] * view.strides[2] + at[3] * view.strides[3];
}

// `count` rows from a position on, which lie in one row of the grid; staged holds STAGED of them.
inline Rows rows_of(const View& view, const int64_t (&at)[4], int64_t count, int64_t channels, float* staged) {
    if (!view.data) return {nullptr, 0};
    if (readable(view)) return {(float*)view.data + place_in(view, at), view.strides[3]};
    if (view.type == FLOAT32)
        widen_rows((const float*)view.data + place_in(view, at), view, count, channels, staged);
    else
        widen_rows((const BFloat16*)view.data + place_in(view, at), view, count, channels, staged);
    return {staged, channels};
}

// Staged rows of a view that is written.
inline void leave_rows(const View& view, const int64_t (&at)[4], int64_t count, int64_t channels, const float* staged) {
    if (view.type == FLOAT32)
        narrow_rows(staged, view, count, channels, (float*)view.data + place_in(view, at));
    else
        narrow_rows(staged, view, count, channels, (BFloat16*)view.data + place_in(view, at));
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
