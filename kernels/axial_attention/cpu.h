// What the native kernels of attention inside boxes are given, and the entries of every instruction set level. The
// fields are in the order of the structures in fastvid/ops/_cpu_attention.py. What is given overlaps nothing that is
// written.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastvid {

enum Mask : int32_t { EVERYTHING = 0, CAUSAL = 1, STRICT = 2 };

// A tensor [B, T, H, W, A, E]: E is the width of a head's query and key, D the width of its value and output.
struct Heads {
    void* data;          // null: absent
    int64_t strides[6];  // B, T, H, W, A, E, in elements
    int32_t type;        // Type
};

// A tensor [A, n, m].
struct Scores {
    const void* data;    // null: absent
    int64_t strides[3];  // A, i, j; 0 where it is the same everywhere
    int32_t type;
};

// The grid of q is cells times box, that of k and v cells times key_box. In one box, n queries and m keys in raster
// order:
//     s[i, j] = scale * q[i] . k[j] + bias[a, i, j]      CAUSAL: j <= i + m - n;  STRICT: j < i + m - n
//     out[i] = sum over j of softmax(s)[i, j] * v[j],    lse[i] = log of the sum over j of exp(s[i, j])
// A query that sees no key gives 0 and -infinity.
struct AttentionCall {
    Heads q, k, v, out;
    Scores bias;
    float* lse;  // [B, T, H, W, A] side by side, or null
    int64_t B, cells[3], box[3], key_box[3], A, E, D;
    float scale;
    int32_t mask, threads;
};

// With P = exp(s - lse), 0 where a key is not seen, and dS = P * (grad_out . v - sum of grad_out * out + grad_lse):
//     grad_q = scale * dS k,  grad_k = scale * dS^T q,  grad_v = P^T grad_out,  grad_bias = sum of dS over all boxes
// What is null is absent or not wanted; grad_out or grad_lse is there.
struct AttentionGradCall {
    Heads q, k, v, out, grad_out, grad_q, grad_k, grad_v;
    Scores bias;
    const float *lse, *grad_lse;  // [B, T, H, W, A] side by side
    float* grad_bias;             // [A, n, m] side by side
    int64_t B, cells[3], box[3], key_box[3], A, E, D;
    float scale;
    int32_t mask, threads;
};

// A matrix [out, in].
struct Matrix {
    const void* data;
    int64_t strides[2];
    int32_t type;
};

// A tensor [B, T, H, W, C].
struct Positions {
    void* data;
    int64_t strides[5];
    int32_t type;
};

// out = attention of to_q x, to_k x, to_v x inside boxes, times to_out, plus bias, plus what out holds if `add`.
struct SelfAttentionCall {
    Positions x, out;
    Matrix to_q, to_k, to_v, to_out;  // [A * E, C], [A * E, C], [A * D, C], [Cout, A * D]
    const float* bias;                // [Cout], or null
    int64_t B, cells[3], box[3], A, E, D, C, Cout;
    float scale;
    int32_t mask, add, threads;
};

#define FASTVID_ENTRIES(level)                                        \
    namespace level {                                                 \
    Outcome axial_attention(const AttentionCall& call);               \
    Outcome axial_attention_backward(const AttentionGradCall& call);  \
    Outcome axial_self_attention(const SelfAttentionCall& call);      \
    }
FASTVID_ENTRIES(generic)
FASTVID_ENTRIES(v2)
FASTVID_ENTRIES(v3)
FASTVID_ENTRIES(v4)
#undef FASTVID_ENTRIES

}  // namespace fastvid
