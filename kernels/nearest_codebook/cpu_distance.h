// Distances of single codes, summed in an order that is the same at every level, so that every level, screen and
// number of threads gives the same bits.
#pragma once

#include "common/simd.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int WIDE = 16;  // partial sums of a distance
typedef float WideFloats __attribute__((vector_size(4 * WIDE)));
typedef double WideDoubles __attribute__((vector_size(8 * WIDE)));

inline int64_t padded(int64_t D) { return (D + WIDE - 1) / WIDE * WIDE; }

template <class Vector, class Float>
inline Float sum_of(Vector v) {
    for (int half = WIDE / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) v[i] += v[i + half];
    return v[0];
}

// |row - code|^2 in float32. `row` is padded with zeros to a multiple of WIDE, `code` ends at D.
inline float distance32(const float* row, const float* code, int64_t D) {
    WideFloats sum = {};
    int64_t d = 0;
    for (; d + WIDE <= D; d += WIDE) {
        const WideFloats away = load<WideFloats>(row + d) - load<WideFloats>(code + d);
        sum += away * away;
    }
    if (d < D) {
        float tail[WIDE] = {};
        __builtin_memcpy(tail, code + d, (size_t)(D - d) * sizeof(float));
        const WideFloats away = load<WideFloats>(row + d) - load<WideFloats>(tail);
        sum += away * away;
    }
    return sum_of<WideFloats, float>(sum);
}

inline double distance64(const float* row, const float* code, int64_t D) {
    double sum[4] = {};
    for (int64_t d = 0; d < D; ++d) {
        const double away = (double)row[d] - code[d];
        sum[d % 4] += away * away;
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

struct Nearest {
    int64_t index;
    float squared_distance;
};

// The nearest of the `count` codes listed in `codes` (null: codes 0 .. count - 1); the lowest index on ties.
// float32 decides where it can; what lies within its rounding of the best is decided in float64. So the answer is
// that of float64 whichever codes are listed beside the nearest. `distances` is scratch of `count`.
inline Nearest nearest_of(const float* row, const float* codebook, int64_t D, const int64_t* codes, int64_t count,
                          float* distances) {
    const float rounding = (float)(4 * ((double)(D / WIDE) + 8) * 0x1p-24);
    float best = __builtin_inff();
    int64_t first = -1;
    for (int64_t i = 0; i < count; ++i) {
        distances[i] = distance32(row, codebook + (codes ? codes[i] : i) * D, D);
        if (distances[i] < best) best = distances[i], first = i;
    }
    const bool reliable = best >= 1e-30f && best <= 1e37f;  // no square underflowed, none overflowed
    const float limit = reliable ? best + best * rounding : __builtin_inff();
    int64_t close = 0;
    for (int64_t i = 0; i < count; ++i) close += distances[i] <= limit;
    if (reliable && close == 1) return {codes ? codes[first] : first, best};
    double least = __builtin_inf();
    Nearest found = {0, __builtin_nanf("")};
    for (int64_t i = 0; i < count; ++i) {
        if (!(distances[i] <= limit)) continue;
        const int64_t k = codes ? codes[i] : i;
        const double distance = distance64(row, codebook + k * D, D);
        if (distance < least || (distance == least && k < found.index)) {
            least = distance;
            found = {k, reliable ? distances[i] : (float)distance};
        }
    }
    return found;
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
