// What the native kernels of spectral normalisation are given, and the entries of every instruction set level. All
// fields have 64 bits: a list of these structures is one list of integers in fastvid/ops/_cpu_spectral.py.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastvid {

// A matrix [rows, cols], dense, float32 or bfloat16, with its singular vectors.
struct NormedWeight {
    const void* matrix;
    const void* weight;    // the matrix's elements in the order that `out` has them
    void* out;             // of the matrix's type: weight / sigma
    const float *u, *v;    // [rows], [cols]
    float *new_u, *new_v;  // written and not read before, if there are iterations
    int64_t rows, cols;
    int64_t type;  // Type
};

//     new_u = matrix v / max(|matrix v|, eps),  new_v = matrix^T new_u / max(|matrix^T new_u|, eps), so often
//     sigma = u^T matrix v of the last u and v,  out = weight / sigma
struct NormCall {
    const NormedWeight* weights;
    float* sigma;  // [count]
    int64_t count, iterations;
    double eps;
    int64_t threads;
};

// The gradient of such a matrix, [rows, cols] like its gradient at `out` and of one type.
struct WeightToMove {
    const void *grad, *matrix;
    void* grad_matrix;
    const float *u, *v;
    int64_t rows, cols;
    int64_t type;
};

//     grad_matrix = (grad - <grad, matrix> / sigma u v^T) / sigma
struct NormGradCall {
    const WeightToMove* weights;
    const float* sigma;  // [count]
    int64_t count, threads;
};

#define FASTVID_ENTRIES(level)                                   \
    namespace level {                                            \
    Outcome spectral_norm(const NormCall& call);                 \
    Outcome spectral_norm_backward(const NormGradCall& call);    \
    }
FASTVID_ENTRIES(generic)
FASTVID_ENTRIES(v2)
FASTVID_ENTRIES(v3)
FASTVID_ENTRIES(v4)
#undef FASTVID_ENTRIES

}  // namespace fastvid
