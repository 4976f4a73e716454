// Elementary functions on vectors, within 2 units in the last place, the same bits in every lane of every call.
#pragma once

#include "common/simd.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

#define FASTVID_PLAIN(name, formula)                                \
    inline Floats name(Floats v) {                                  \
        for (int lane = 0; lane < LANES; ++lane) {                  \
            const double x = v[lane];                               \
            v[lane] = (float)(formula);                             \
        }                                                           \
        return v;                                                   \
    }
FASTVID_PLAIN(exp, __builtin_exp(x))
FASTVID_PLAIN(tanh, __builtin_tanh(x))
FASTVID_PLAIN(sigmoid, 1 / (1 + __builtin_exp(-x)))
FASTVID_PLAIN(elu, x > 0 ? x : __builtin_expm1(x))
#undef FASTVID_PLAIN

// tanh(a) * sigmoid(b)
inline Floats gate(Floats a, Floats b) { return tanh(a) * sigmoid(b); }

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
