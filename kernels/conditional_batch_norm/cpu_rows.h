// Positions side by side, channel by channel: what the normalisation and its gradient share. A channel's value depends
// on nothing but that channel, so how channels are cut into pieces and vectors changes no bit of it.
#pragma once

#include "common/math.h"
#include "common/numbers.h"
#include "conditional_batch_norm/cpu.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t STRIP = 32;         // positions that are summed in float32 before they join a total in double
constexpr int64_t SLICE_BYTES = 256 << 10;  // of a frame's piece, which is read twice: at most, so that caches hold it
constexpr int64_t LEAST_CHANNELS = 32;      // of a piece, as shorter runs of memory are slow to find
constexpr int64_t LEAST_VALUES = 16 << 10;  // per thread

typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));

// The same operations on a vector and, for the last channels, on one number.
template <class V>
struct Lane;

template <>
struct Lane<Floats> {
    static Floats of(float value) { return repeat(value); }
    static Floats take(const float* from) { return load<Floats>(from); }
    static Floats take(const BFloat16* from) {
        return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
    }
    static void put(float* to, Floats v) { store(to, v); }
    static void put(BFloat16* to, Floats v) {
        const Words bits = (Words)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
        const Words kept = v != v ? Words{} + 0x7fc0 : rounded;
        store(to, __builtin_convertvector(kept, Halves));
    }
    static Floats fused(Floats a, Floats b, Floats c) { return multiply_add(a, b, c); }
    static Floats not_below_zero(Floats v) { return larger(Floats{}, v); }  // NaN stays
    static Floats where_above_zero(Floats gate, Floats v) { return gate <= 0 ? Floats{} : v; }
};

template <>
struct Lane<float> {
    static float of(float value) { return value; }
    template <class T>
    static float take(const T* from) {
        return widen(*from);
    }
    template <class T>
    static void put(T* to, float v) {
        narrow(v, *to);
    }
    static float fused(float a, float b, float c) { return a * b + c; }
    static float not_below_zero(float v) { return v < 0 ? 0 : v; }
    static float where_above_zero(float gate, float v) { return gate <= 0 ? 0 : v; }
};

// body.template at<V>(c) for all n channels.
template <class Body>
inline void over_channels(int64_t n, Body body) {
    int64_t c = 0;
    for (; c + LANES <= n; c += LANES) body(c, Floats{});
    for (; c < n; ++c) body(c, 0.0f);
}

// `count` positions with n channels each, `step` elements apart.
template <class T>
struct Run {
    T* at;
    int64_t step;

    T* operator[](int64_t p) const { return at + p * step; }
    Run from(int64_t p) const { return {at + p * step, step}; }
};

// One piece: channels first .. first + n of frame t, of all samples.
struct Slice {
    int64_t t, first, n;
};

// How a call is cut: frames by parts of the channels, and each sample's frame into rows.
struct Cut {
    int64_t rows, columns;  // of a frame; all positions in one row where they are side by side
    int64_t width, parts, pieces;

    Cut(int64_t B, int64_t T, int64_t H, int64_t W, int64_t C, int64_t bytes, int threads, bool joined) {
        rows = joined ? 1 : H;
        columns = joined ? H * W : W;
        const int64_t positions = B * H * W > 0 ? B * H * W : 1;
        width = SLICE_BYTES / (positions * bytes);
        const int64_t busy = C * T / (4 * (int64_t)threads);  // some pieces for every thread
        width = threads > 1 && busy < width ? busy : width;
        width = (width + LEAST_CHANNELS - 1) / LEAST_CHANNELS * LEAST_CHANNELS;
        width = width < LEAST_CHANNELS ? LEAST_CHANNELS : width;
        width = width > C ? C : width;
        parts = (C + width - 1) / width;
        pieces = T * parts;
    }

    Slice slice(int64_t piece, int64_t C) const {
        const int64_t first = piece % parts * width;
        return {piece / parts, first, C - first < width ? C - first : width};
    }
};

inline bool side_by_side(const Maps& maps, int64_t W) { return !maps.data || maps.strides[2] == W * maps.strides[3]; }

template <class T>
inline Run<T> row_of(const Maps& maps, const Slice& slice, int64_t b, int64_t y) {
    T* data = (T*)maps.data + b * maps.strides[0] + slice.t * maps.strides[1] + y * maps.strides[2];
    return {data + slice.first, maps.strides[3]};
}

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// Threads that find enough to do.
inline int useful_threads(int threads, int64_t values, int64_t pieces) {
    const int64_t most = lesser(greater(1, values / LEAST_VALUES), pieces);
    return (int)lesser(threads, most);
}

// What maps a value: (x - mean) * factor + bias, by channel.
struct Affine {
    float *mean, *scale, *factor, *bias;  // scale: 1 / sqrt(var + eps); factor: times the sample's gain

    void cut(Cutter& cutter, int64_t width) {
        mean = cutter.cut<float>(width);
        scale = cutter.cut<float>(width);
        factor = cutter.cut<float>(width);
        bias = cutter.cut<float>(width);
    }

    void set_frame(const float* means, const float* vars, float eps, int64_t n) const {
        for (int64_t c = 0; c < n; ++c) {
            mean[c] = means[c];
            scale[c] = 1.0f / __builtin_sqrtf(vars[c] + eps);
        }
    }

    void set_sample(const float* gains, const float* biases, int64_t n) const {
        for (int64_t c = 0; c < n; ++c) {
            factor[c] = scale[c] * gains[c];
            bias[c] = biases[c];
        }
    }
};

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
