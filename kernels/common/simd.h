// Vectors of one instruction set level. A source that includes this is compiled once per level, with
// FASTVID_LEVEL as the name of the level and of its namespace, and holds no template of the standard library: the
// linker keeps one copy of such a template, and if that is the v4 copy, older processors run into it.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(FASTVID_GENERIC) && defined(__x86_64__)
#include <immintrin.h>
#define FASTVID_X86 1
#endif

namespace fastvid::FASTVID_LEVEL {
namespace {

#if defined(FASTVID_X86) && defined(__AVX512BW__)
constexpr int VECTOR_BYTES = 64;
constexpr int TILE_ROWS = 12;  // rows of a microkernel: 2 accumulators each, 2 code vectors and 2 more in 32 registers
#elif defined(FASTVID_X86) && defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
constexpr int TILE_ROWS = 6;  // the same in 16 registers
#else
constexpr int VECTOR_BYTES = 16;
constexpr int TILE_ROWS = 6;
#endif
constexpr int LANES = VECTOR_BYTES / 4;
#if defined(FASTVID_X86)
constexpr bool PAIR_INSTRUCTION = true;  // multiply_pairs is one instruction and beats float32
#else
constexpr bool PAIR_INSTRUCTION = false;
#endif

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef int16_t Shorts __attribute__((vector_size(VECTOR_BYTES)));

template <class Vector>
inline Vector load(const void* from) {  // any alignment
    Vector v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}

template <class Vector>
inline void store(void* to, Vector v) {
    __builtin_memcpy(to, &v, sizeof v);
}

inline Floats repeat(float value) {
#if defined(FASTVID_X86) && defined(__AVX512BW__)
    return _mm512_set1_ps(value);
#elif defined(FASTVID_X86) && defined(__AVX2__)
    return _mm256_set1_ps(value);
#elif defined(FASTVID_X86)
    return _mm_set1_ps(value);
#else
    Floats v;
    for (int lane = 0; lane < LANES; ++lane) v[lane] = value;
    return v;
#endif
}

// Lane i: a[2i] * b[2i] + a[2i+1] * b[2i+1]; `pair` is two int16 side by side, the same for every lane.
inline Ints multiply_pairs(int32_t pair, Shorts b) {
#if defined(FASTVID_X86) && defined(__AVX512BW__)
    return (Ints)_mm512_madd_epi16(_mm512_set1_epi32(pair), (__m512i)b);
#elif defined(FASTVID_X86) && defined(__AVX2__)
    return (Ints)_mm256_madd_epi16(_mm256_set1_epi32(pair), (__m256i)b);
#elif defined(FASTVID_X86)
    return (Ints)_mm_madd_epi16(_mm_set1_epi32(pair), (__m128i)b);
#else
    const Ints pairs = (Ints)b;
    const int32_t first = (int16_t)(pair & 0xffff), second = pair >> 16;
    return first * ((Ints)((__UINT32_TYPE__ __attribute__((vector_size(VECTOR_BYTES))))pairs << 16) >> 16) +
           second * (pairs >> 16);
#endif
}

// a * b + c; rounded once or twice, as the level can
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(FASTVID_X86) && defined(__AVX512BW__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(FASTVID_X86) && defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

inline Floats smaller(Floats a, Floats b) {
#if defined(FASTVID_X86) && defined(__AVX512BW__)
    return _mm512_min_ps(a, b);
#elif defined(FASTVID_X86) && defined(__AVX2__)
    return _mm256_min_ps(a, b);
#elif defined(FASTVID_X86)
    return _mm_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

inline float smallest_lane(Floats v) {
    typedef float Four __attribute__((vector_size(16)));
    Four least = load<Four>(&v);
    for (int at = 16; at < VECTOR_BYTES; at += 16) {
        const Four next = load<Four>((const char*)&v + at);
        least = next < least ? next : least;
    }
    const float left = least[0] < least[1] ? least[0] : least[1], right = least[2] < least[3] ? least[2] : least[3];
    return left < right ? left : right;
}

// Bit i: v[i] <= limit[i].
inline uint32_t lanes_at_most(Floats v, Floats limit) {
#if defined(FASTVID_X86) && defined(__AVX512BW__)
    return _mm512_cmp_ps_mask(v, limit, _CMP_LE_OQ);
#elif defined(FASTVID_X86) && defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(v, limit, _CMP_LE_OQ));
#elif defined(FASTVID_X86)
    return (uint32_t)_mm_movemask_ps(_mm_cmple_ps(v, limit));
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < LANES; ++lane) bits |= (uint32_t)(v[lane] <= limit[lane]) << lane;
    return bits;
#endif
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
