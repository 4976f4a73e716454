// Moves between memory of any type and vectors, and across the lanes of vectors.
#pragma once

#include "common/math.h"
#include "common/numbers.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr float INFINITE = __builtin_inff();

inline Floats widened(const float* from) { return load<Floats>(from); }

inline Floats widened(const BFloat16* from) {
    typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
    return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

inline Floats widened(const Float16* from) {
    typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
    const Ints bits = __builtin_convertvector(load<Halves>(from), Ints);
    const Ints magnitude = (bits & 0x7fff) << 13;
    const Floats scaled = (Floats)magnitude * 0x1p112f;  // subnormals come out right by the multiplication
    const Ints size = (bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : (Ints)scaled;
    return (Floats)(size | (bits & 0x8000) << 16);
}

// The lanes' sum and their maximum: halves are folded onto each other until one lane is left.
inline float sum_of_lanes(Floats v) {
#if defined(FASTVID_X86) && defined(__AVX2__)
#if defined(__AVX512BW__)
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#else
    const __m256 half = v;
#endif
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

inline float largest_lane(Floats v) {
#if defined(FASTVID_X86) && defined(__AVX2__)
#if defined(__AVX512BW__)
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#else
    const __m256 half = v;
#endif
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
#else
    const float left = v[0] > v[2] ? v[0] : v[2], right = v[1] > v[3] ? v[1] : v[3];
    return left > right ? left : right;
#endif
}

// The same of each of LANES rows.
#if defined(FASTVID_X86) && defined(__AVX2__) && !defined(__AVX512BW__)
template <class Fold>
inline Floats fold_rows(const Floats* rows, Fold fold) {
    __m256 halves[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        halves[i] = fold(_mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20),
                         _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31));
    const __m256 even = fold(_mm256_shuffle_ps(halves[0], halves[1], 0x44), _mm256_shuffle_ps(halves[0], halves[1], 0xee));
    const __m256 odd = fold(_mm256_shuffle_ps(halves[2], halves[3], 0x44), _mm256_shuffle_ps(halves[2], halves[3], 0xee));
    return fold(_mm256_shuffle_ps(even, odd, 0x88), _mm256_shuffle_ps(even, odd, 0xdd));
}

inline Floats sums_of_rows(const Floats* rows) {
    return fold_rows(rows, [](Floats a, Floats b) { return a + b; });
}

inline Floats largest_of_rows(const Floats* rows) {
    return fold_rows(rows, [](Floats a, Floats b) { return larger(a, b); });
}
#else
inline Floats sums_of_rows(const Floats* rows) {
    Floats to;
    for (int r = 0; r < LANES; ++r) to[r] = sum_of_lanes(rows[r]);
    return to;
}

inline Floats largest_of_rows(const Floats* rows) {
    Floats to;
    for (int r = 0; r < LANES; ++r) to[r] = largest_lane(rows[r]);
    return to;
}
#endif

// Rows become columns: lane i of v[j] is then what lane j of v[i] was.
#if defined(FASTVID_X86) && defined(__AVX512BW__)
inline void turn(Floats (&v)[LANES]) {
    __m512 pairs[16], fours[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // fours[i + c]: columns c, c + 4, c + 8 and c + 12 of rows i to i + 3
        fours[i] = (__m512)_mm512_unpacklo_pd((__m512d)pairs[i], (__m512d)pairs[i + 2]);
        fours[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)pairs[i], (__m512d)pairs[i + 2]);
        fours[i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)pairs[i + 1], (__m512d)pairs[i + 3]);
        fours[i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)pairs[i + 1], (__m512d)pairs[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512 upper_even = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88);
        const __m512 upper_odd = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xdd);
        const __m512 lower_even = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88);
        const __m512 lower_odd = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xdd);
        v[c] = _mm512_shuffle_f32x4(upper_even, lower_even, 0x88);
        v[c + 4] = _mm512_shuffle_f32x4(upper_odd, lower_odd, 0x88);
        v[c + 8] = _mm512_shuffle_f32x4(upper_even, lower_even, 0xdd);
        v[c + 12] = _mm512_shuffle_f32x4(upper_odd, lower_odd, 0xdd);
    }
}
#elif defined(FASTVID_X86) && defined(__AVX2__)
inline void turn(Floats (&v)[LANES]) {
    __m256 pairs[8], fours[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {  // fours[i + c]: columns c and c + 4 of rows i to i + 3
        fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
        fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
        fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        v[c] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x20);
        v[c + 4] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x31);
    }
}
#elif defined(FASTVID_X86)
inline void turn(Floats (&v)[LANES]) { _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]); }
#else
inline void turn(Floats (&v)[LANES]) {
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < i; ++j) {
            const float lane = v[i][j];
            v[i][j] = v[j][i];
            v[j][i] = lane;
        }
}
#endif

inline Ints lane_numbers() {
    Ints lanes;
    for (int lane = 0; lane < LANES; ++lane) lanes[lane] = lane;
    return lanes;
}

// Lane i: i < count ? v[i] : otherwise.
inline Floats first_lanes(Floats v, int64_t count, float otherwise) {
    return lane_numbers() < (int32_t)count ? v : repeat(otherwise);
}

// Lane i: i >= start ? v[i] : otherwise.
inline Floats from_lane(Floats v, int64_t start, float otherwise) {
    return lane_numbers() < (int32_t)start ? repeat(otherwise) : v;
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
