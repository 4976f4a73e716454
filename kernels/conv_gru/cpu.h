// What the native kernels of the convolutional GRU are given, and the entries of every instruction set level. The
// fields are in the order of the structures in fastvid/ops/_cpu_gru.py. All tensors are dense and of one type.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastvid {

// r, u = sigmoid(gates_r,u + weight_gates * h); c = activation(gates_c + weight_candidate * (r . h));
// h becomes u . h + (1 - u) . c and is the state of that frame.
struct GruCall {
    const void* gates;   // [B, gate_frames, H, W, 3C], gate_frames 1 or T
    const void* hidden;  // [B, H, W, C], or null for zeros
    const void* weight_gates;      // [2C, C, k, k]
    const void* weight_candidate;  // [C, C, k, k]
    void* states;                  // [B, T, H, W, C]
    void* kept;                    // [B, T, H, W, 3C]: r, u, c, or null
    int64_t B, T, gate_frames, H, W, C, k;
    int32_t type, tanh, threads;  // Type; whether the candidate's activation is tanh, otherwise relu
};

// The gradient of gates for every frame, and of hidden, from those of states and of kept.
struct GruGradCall {
    const void* grad_states;  // [B, T, H, W, C], or null for zeros
    const void* grad_kept;    // [B, T, H, W, 3C], or null for zeros
    const void* hidden;       // [B, H, W, C], or null for zeros
    const void* weight_gates;
    const void* weight_candidate;
    const void* states;  // as GruCall left them
    const void* kept;
    void* grad_gates;   // [B, T, H, W, 3C]
    void* grad_hidden;  // [B, H, W, C], or null
    int64_t B, T, H, W, C, k;
    int32_t type, tanh, threads;
};

#define FASTVID_ENTRIES(level)                           \
    namespace level {                                    \
    Outcome conv_gru(const GruCall& call);               \
    Outcome conv_gru_backward(const GruGradCall& call);  \
    }
FASTVID_ENTRIES(generic)
FASTVID_ENTRIES(v2)
FASTVID_ENTRIES(v3)
FASTVID_ENTRIES(v4)
#undef FASTVID_ENTRIES

}  // namespace fastvid
