// What the native kernels of the conditional batch normalisation are given, and the entries of every instruction set
// level. The fields are in the order of the structures in fastvid/ops/_cpu_norm.py.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastvid {

// Maps [B, T, H, W, C] with the channels side by side.
struct Maps {
    void* data;          // null: absent
    int64_t strides[4];  // B, T, H, W, in elements; 0 where it is the same everywhere
};

// out = up(relu((x - mean) / sqrt(var + eps) * gain + bias)); what is written overlaps nothing that is read.
struct FrameNormCall {
    Maps x, out;              // out: 2H and 2W if `upsample`; absent: the moments alone are wanted
    float *mean, *var;        // [T, C]: written if `measure`, else read
    const float *gain, *bias;  // [B, C]
    int64_t B, T, H, W, C;
    float eps;
    int32_t type, measure, relu, upsample, threads;  // type: of x and out, float32 or bfloat16
};

// The gradient at x, through the moments too if `own`, and the sums of which all others are made.
struct FrameNormGradCall {
    Maps x, grad_out, grad_x;  // all of one type; grad_x may be absent
    const float *mean, *var;   // [T, C]
    const float *gain, *bias;  // [B, C]
    float* sums;               // [2, B, T, C]: of the gradient before the ReLU, and of its product with x - mean
    int64_t B, T, H, W, C;
    float eps;
    int32_t type, own, relu, upsample, threads;
};

#define FASTVID_ENTRIES(level)                                    \
    namespace level {                                             \
    Outcome conditional_norm(const FrameNormCall& call);               \
    Outcome conditional_norm_backward(const FrameNormGradCall& call);  \
    }
FASTVID_ENTRIES(generic)
FASTVID_ENTRIES(v2)
FASTVID_ENTRIES(v3)
FASTVID_ENTRIES(v4)
#undef FASTVID_ENTRIES

}  // namespace fastvid
