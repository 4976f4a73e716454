// Distances of single codes, summed in an order that is the same at every level, so that every level, screen and
// number of threads gives the same bits.
#pragma once

#include "common/simd.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int WIDE = 16;  // partial sums of a distance: one vector of the widest level, several of the others
constexpr int PARTS = WIDE / LANES;

inline int64_t padded(int64_t D) { return (D + WIDE - 1) / WIDE * WIDE; }

// Partial sums i and i + 8, then i and i + 4, and so on.
inline float sum_of(const Floats (&parts)[PARTS]) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    const auto* all = (const char*)parts;
    const Eight eight = load<Eight>(all) + load<Eight>(all + 32);
    const Four four = load<Four>(&eight) + load<Four>((const char*)&eight + 16);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

inline void add_squares(Floats (&sums)[PARTS], const float* row, const float* code) {
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; ++part) {
        const Floats away = load<Floats>(row + part * LANES) - load<Floats>(code + part * LANES);
        sums[part] += away * away;
    }
}

// |row - code|^2 in float32. `row` is padded with zeros to a multiple of WIDE, `code` ends at D.
inline float distance32(const float* row, const float* code, int64_t D) {
    Floats sums[PARTS] = {};
    int64_t d = 0;
    for (; d + WIDE <= D; d += WIDE) add_squares(sums, row + d, code + d);
    if (d < D) {
        float tail[WIDE] = {};
        __builtin_memcpy(tail, code + d, (size_t)(D - d) * sizeof(float));
        add_squares(sums, row + d, tail);
    }
    return sum_of(sums);
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
        first = distances[i] < best ? i : first;
        best = distances[i] < best ? distances[i] : best;
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
