// Elementary functions on vectors. A lane's result depends on that lane alone; NaN gives NaN. Worst errors, in units in
// the last place over all arguments: exp and elu 1.1, sigmoid 2.4, tanh 2.6, gate 5; tests/native/sampler_math.cpp
// measures and holds them.
#pragma once

#include "common/simd.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t Longs __attribute__((vector_size(VECTOR_BYTES)));
constexpr int DOUBLES = VECTOR_BYTES / 8;

inline Doubles repeat(double value) {
#if defined(FASTVID_X86) && defined(__AVX512BW__)
    return _mm512_set1_pd(value);
#elif defined(FASTVID_X86) && defined(__AVX2__)
    return _mm256_set1_pd(value);
#elif defined(FASTVID_X86)
    return _mm_set1_pd(value);
#else
    Doubles v;
    for (int lane = 0; lane < DOUBLES; ++lane) v[lane] = value;
    return v;
#endif
}

inline Longs repeat(uint64_t value) {
    double bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return (Longs)repeat(bits);
}

inline Ints repeat(int32_t value) {
    float bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return (Ints)repeat(bits);
}

// a * b + c; rounded once or twice, as the level can
inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
#if defined(FASTVID_X86) && defined(__AVX512BW__)
    return _mm512_fmadd_pd(a, b, c);
#elif defined(FASTVID_X86) && defined(__FMA__)
    return _mm256_fmadd_pd(a, b, c);
#else
    return a * b + c;
#endif
}

// Like `smaller`, the second argument where either is NaN.
inline Floats larger(Floats a, Floats b) {
#if defined(FASTVID_X86) && defined(__AVX512BW__)
    return _mm512_max_ps(a, b);
#elif defined(FASTVID_X86) && defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(FASTVID_X86)
    return _mm_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// c[0] + c[1] x + c[2] x^2 + ...
template <int COUNT, class Vector, class Number>
inline Vector polynomial(const Number (&c)[COUNT], Vector x) {
    Vector sum = repeat(c[COUNT - 1]);
#pragma GCC unroll 8
    for (int i = COUNT - 2; i >= 0; --i) sum = multiply_add(sum, x, repeat(c[i]));
    return sum;
}

// x = power ln 2 + r with |r| <= ln 2 / 2: expm1(r), and the power as an integer.
struct Reduced {
    Floats rest;
    Ints power;
};

inline Reduced reduce(Floats x) {
    const float shift = 0x1.8p23f;  // leaves the rounded integer in the low bits
    const Floats shifted = multiply_add(x, repeat(0x1.715476p+0f), repeat(shift));
    const Floats power = shifted - repeat(shift);
    // ln 2 in two parts; the first has so few bits that its product with the power is exact
    Floats r = multiply_add(power, repeat(-0x1.62e4p-1f), x);
    r = multiply_add(power, repeat(-0x1.7f7d1cp-20f), r);
    // (expm1(r) - r) / r^2, within 2^-26
    const float terms[] = {0.500000006f, 0.166665417f, 0.041666278f, 0.00836676484f, 0.00139467618f};
    return {multiply_add(r * r, polynomial(terms, r), r), (Ints)shifted - (Ints)repeat(shift)};
}

// 2^power, for powers in [-126, 127]
inline Floats power_of_two(Ints power) { return (Floats)((power + 127) << 23); }

inline Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

inline Floats with_sign(Floats x, Floats sign) {
    return (Floats)(((Ints)x & 0x7fffffff) | ((Ints)sign & INT32_MIN));
}

inline Floats exp(Floats x) {
    const Reduced part = reduce(smaller(repeat(89.0f), larger(repeat(-104.5f), x)));
    const Ints half = part.power >> 1;  // two steps reach the subnormals, and infinity
    return (part.rest + 1) * power_of_two(half) * power_of_two(part.power - half);
}

// expm1(x) for x <= 0
inline Floats expm1_of_negative(Floats x) {
    const Reduced part = reduce(larger(repeat(-80.0f), x));
    const Floats scale = power_of_two(part.power);
    return multiply_add(part.rest, scale, scale - 1);
}

// exp(x) for x <= 0
inline Floats exp_of_negative(Floats x) {
    const Reduced part = reduce(larger(repeat(-104.5f), x));
    return (part.rest + 1) * power_of_two(part.power + 64) * 0x1p-64f;  // rounded once, where it is subnormal
}

// x > 0 ? x : expm1(x)
inline Floats elu(Floats x) {
    const Floats below = expm1_of_negative(smaller(repeat(0.0f), x));
    return x > 0 ? x : below;
}

inline Floats tanh(Floats x) {
    const Floats falling = expm1_of_negative(magnitude(x) * -2.0f);
    return with_sign(falling / (falling + 2.0f), x);
}

inline Floats sigmoid(Floats x) {
    const Floats falling = exp_of_negative(-magnitude(x)), one = repeat(1.0f);
    return (x < 0 ? falling : one) / (falling + 1);
}

// tanh(a) * sigmoid(b), with one division
inline Floats gate(Floats a, Floats b) {
    const Floats t = expm1_of_negative(magnitude(a) * -2.0f), e = exp_of_negative(-magnitude(b)), one = repeat(1.0f);
    const Floats below = t + 2.0f;
    return with_sign(t * (b < 0 ? e : one) / multiply_add(below, e, below), a);
}

// The natural logarithm of positive, normal, finite numbers.
inline Doubles log(Doubles x) {
    // x = 2^power * m with m in [sqrt(1/2), sqrt(2)); the bias keeps the power positive
    const Longs bits = (Longs)x, bias = repeat((uint64_t)1024);
    const Longs power = (bits - repeat((uint64_t)0x3fe6a09e667f3bcd) + (bias << 52)) >> 52;
    const Doubles m = (Doubles)(bits - ((power - bias) << 52));
    const Doubles k = (Doubles)(power | (Longs)repeat(0x1p52)) - repeat(0x1p52 + 1024);
    // log(1 + f) = f - f^2 / 2 + s (f^2 / 2 + rest(s^2)) with s = f / (2 + f): what is uncertain is small beside f
    const Doubles f = m - 1, s = f / (f + 2), z = s * s, half = f * f * 0.5;
    const double terms[] = {0x1.5555555555558p-1, 0x1.99999999951bep-2, 0x1.2492492e0f0a4p-2, 0x1.c71c62c2129f2p-3,
                            0x1.7462be2d8033bp-3, 0x1.39fd33ebf6d06p-3, 0x1.2b662be05f4ddp-3};
    const double even[] = {terms[0], terms[2], terms[4], terms[6]}, odd[] = {terms[1], terms[3], terms[5]};
    const Doubles zz = z * z, series = multiply_add(polynomial(odd, zz), z, polynomial(even, zz));
    const Doubles rest = multiply_add(s, half + z * series, k * 0x1.a39ef35793c76p-33);
    const Doubles large = k * 0x1.62e42feep-1, sum = large + f;  // exact, and rounded
    return sum + ((f - (sum - large)) - (half - rest));
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
