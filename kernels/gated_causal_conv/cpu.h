// What the native kernels of the gated convolution are given, and the entries of every instruction set level. The
// fields are in the order of the structures in fastvid/ops/_cpu_conv.py. Any tensor is float32 or bfloat16.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastvid {

enum Activation : int32_t { PLAIN = 0, GATE = 1, GLU = 2 };

// A tensor [B, T, H, W, C].
struct View {
    void* data;          // null: absent
    int64_t strides[5];  // B, T, H, W, C, in elements; 0 where it is the same everywhere
    int32_t type;        // Type
};

// Matrices [taps, in, out].
struct Matrices {
    const void* data;
    int64_t strides[3];
    int32_t type;
};

//     pre[p] = bias + addend[p] + sum over i of  x[origin + p + offsets[i]] @ weight[i]      zero outside x
//     out[p] = activation(pre[p]) + residual[p]
// p goes over `size`; out and residual have Cout channels if PLAIN, else Cout / 2; pre and addend have Cout.
// Whatever is written overlaps nothing that is read.
struct ConvCall {
    View x, out, pre, addend, residual;  // of which pre, addend and residual may be absent
    Matrices weight;                     // [taps, Cin, Cout]
    const void* bias;                    // [Cout] side by side, or null
    int32_t bias_type;
    int64_t B, in[3], size[3], origin[3];  // T, H, W
    int64_t Cin, Cout, taps;
    const int32_t* offsets;  // [taps, 3]: dt, dy, dx, of either sign
    int32_t activation, threads;
};

// grad = activation'(pre) * grad_out + grad_pre, the gradient at the sum before the activation, and its sum over all
// positions. With PLAIN there is no pre and the derivative is 1.
struct GateCall {
    View pre, grad_out, grad_pre;  // [.., Cout], [.., Cout / 2] (PLAIN: Cout), [.., Cout]; an absent gradient is zero
    View grad;                     // [.., Cout], or absent
    float* grad_bias;              // [Cout], or null
    int64_t B, size[3], Cout;
    int32_t activation, threads;
};

// grad_weight[i][k][n] = sum over p of  x[origin + p + offsets[i]][k] * grad[p][n]
struct WeightGradCall {
    View x, grad;
    void* grad_weight;  // [taps, Cin, Cout], dense
    int32_t type;       // of grad_weight
    int64_t B, in[3], size[3], origin[3];
    int64_t Cin, Cout, taps;
    const int32_t* offsets;  // [taps, 3]
    int32_t threads;
};

#define FASTVID_ENTRIES(level)                            \
    namespace level {                                     \
    Outcome gated_causal_conv(const ConvCall& call);      \
    Outcome gate_backward(const GateCall& call);          \
    Outcome weight_gradient(const WeightGradCall& call);  \
    }
FASTVID_ENTRIES(generic)
FASTVID_ENTRIES(v2)
FASTVID_ENTRIES(v3)
FASTVID_ENTRIES(v4)
#undef FASTVID_ENTRIES

}  // namespace fastvid
