// float32 from and to the 16-bit types, by their bits, so that every compiler and processor gives the same ones.
#pragma once

#include "common/simd.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

inline float float_of(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Whether no element is a NaN or an infinity.
inline bool finite_row(const float* row, int64_t D) {
    uint32_t largest = 0;  // exponent and fraction: in the order of magnitudes
    for (int64_t d = 0; d < D; ++d) {
        const uint32_t size = bits_of(row[d]) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    return largest < 0x7f800000;
}

inline float widen(float value) { return value; }

inline float widen(BFloat16 value) { return float_of((uint32_t)value.bits << 16); }

inline float widen(Float16 value) {
    const uint32_t sign = (uint32_t)(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
    const float scaled = float_of(magnitude << 13) * 0x1p112f;  // subnormals come out right by the multiplication
    const uint32_t special = (magnitude << 13) | 0x7f800000;    // infinities and NaN keep their fraction
    return float_of(sign | (magnitude >= 0x7c00 ? special : bits_of(scaled)));
}

inline void narrow(float value, float& to) { to = value; }

inline void narrow(float value, BFloat16& to) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    to.bits = (uint16_t)(value != value ? 0x7fc0 : rounded);
}

inline void narrow(float value, Float16& to) {
    const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    const float size = float_of(magnitude);
    uint32_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7e00;
    } else if (size >= 65520.0f) {
        half = 0x7c00;
    } else if (size < 0x1p-14f) {
        half = bits_of(size + 0.5f) - bits_of(0.5f);  // 0.5 has the spacing of the subnormals
    } else {
        half = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    to.bits = (uint16_t)(sign | half);
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
