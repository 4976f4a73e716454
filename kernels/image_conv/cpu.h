// What the native image convolution is given, and the entries of every instruction set level. The fields are in the
// order of the structure in fastvid/ops/_cpu_image.py. Everything is float32.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastvid {

//     out[n, y, x] = bias + residual[n, y, x] + sum over i, j of  weight[:, :, i, j] @ x[n, y + i - 1, x + j - 1]
// zero outside x. `out` overlaps nothing that is read.
struct ImageCall {
    const float* x;          // [N, H, W, Cin]
    int64_t x_strides[3];    // N, H, W, in elements; channels lie side by side
    const float* weight;     // [Cout, Cin, 3, 3]
    int64_t weight_strides[4];
    const float* bias;       // [Cout] side by side, or null
    const float* residual;   // [N, H, W, Cout], or null
    int64_t residual_strides[3];
    float* out;              // [N, H, W, Cout], dense
    int64_t N, H, W, Cin, Cout;
    int32_t threads;
};

#define FASTVID_ENTRIES(level) \
    namespace level {          \
    Outcome image_conv(const ImageCall& call); \
    }
FASTVID_ENTRIES(generic)
FASTVID_ENTRIES(v2)
FASTVID_ENTRIES(v3)
FASTVID_ENTRIES(v4)
#undef FASTVID_ENTRIES

}  // namespace fastvid
