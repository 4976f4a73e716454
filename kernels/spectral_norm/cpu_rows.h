// Loops over a few rows of a matrix at a time, and over runs of its elements.
#pragma once

#include "common/math.h"
#include "common/numbers.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int ROWS = 4;  // at a time: a vector is loaded once for all of them

inline Floats widened(const float* from) { return load<Floats>(from); }

inline Floats widened(const BFloat16* from) {
    typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
    return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

inline Doubles doubles(const float* from) {
    typedef float Few __attribute__((vector_size(VECTOR_BYTES / 2)));
    return __builtin_convertvector(load<Few>(from), Doubles);
}

inline Doubles doubles(const BFloat16* from) {
    float values[DOUBLES];
    for (int lane = 0; lane < DOUBLES; ++lane) values[lane] = widen(from[lane]);
    return doubles(values);
}

inline void put(float* to, Floats values) { store(to, values); }

inline void put(BFloat16* to, Floats values) {
    for (int lane = 0; lane < LANES; ++lane) narrow(values[lane], to[lane]);
}

inline float sum_of_lanes(Floats v) {
    float left = 0, right = 0;
    for (int lane = 0; lane < LANES; lane += 2) {
        left += v[lane];
        right += v[lane + 1];
    }
    return left + right;
}

// products[r] = row r times v.
template <int R, class T>
void multiply_rows(const T* rows, int64_t cols, const float* v, float* products) {
    Floats even[R] = {}, odd[R] = {};
    int64_t c = 0;
    for (; c + 2 * LANES <= cols; c += 2 * LANES) {
        const Floats first = load<Floats>(v + c), second = load<Floats>(v + c + LANES);
        for (int r = 0; r < R; ++r) {
            even[r] = multiply_add(widened(rows + r * cols + c), first, even[r]);
            odd[r] = multiply_add(widened(rows + r * cols + c + LANES), second, odd[r]);
        }
    }
    for (int r = 0; r < R; ++r) {
        float rest = 0;
        for (int64_t at = c; at < cols; ++at) rest += widen(rows[r * cols + at]) * v[at];
        products[r] = sum_of_lanes(even[r] + odd[r]) + rest;
    }
}

// sums += factors[r] times row r.
template <int R, class T>
void add_rows(const T* rows, int64_t cols, const float* factors, float* sums) {
    Floats factor[R];
    for (int r = 0; r < R; ++r) factor[r] = repeat(factors[r]);
    int64_t c = 0;
    for (; c + LANES <= cols; c += LANES) {
        Floats sum = load<Floats>(sums + c);
        for (int r = 0; r < R; ++r) sum = multiply_add(widened(rows + r * cols + c), factor[r], sum);
        store(sums + c, sum);
    }
    for (; c < cols; ++c)
        for (int r = 0; r < R; ++r) sums[c] += widen(rows[r * cols + c]) * factors[r];
}

// The sum of products of two runs of elements, in double: it may be far smaller than what it is made of.
template <class T>
double product_of(const T* a, const T* b, int64_t count) {
    Doubles sums[4] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES)
        for (int k = 0; k < 4; ++k) sums[k] += doubles(a + i + k * DOUBLES) * doubles(b + i + k * DOUBLES);
    double sum = 0;
    for (; i < count; ++i) sum += (double)widen(a[i]) * widen(b[i]);
    const Doubles all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int lane = 0; lane < DOUBLES; ++lane) sum += all[lane];
    return sum;
}

template <class T>
void divide(const T* from, int64_t count, float by, T* to) {
    const Floats divisor = repeat(by);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) put(to + i, widened(from + i) / divisor);
    for (; i < count; ++i) narrow(widen(from[i]) / by, to[i]);
}

// to = (grad - factor v) / by
template <class T>
void move_row(const T* grad, const float* v, int64_t cols, float factor, float by, T* to) {
    const Floats factors = repeat(-factor), divisor = repeat(by);
    int64_t c = 0;
    for (; c + LANES <= cols; c += LANES)
        put(to + c, multiply_add(load<Floats>(v + c), factors, widened(grad + c)) / divisor);
    for (; c < cols; ++c) narrow((widen(grad[c]) - factor * v[c]) / by, to[c]);
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
