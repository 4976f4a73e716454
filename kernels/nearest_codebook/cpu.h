// What one call of each op is given, and the entries of every instruction set level.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastvid {

// How the codes that may be nearest are found. What comes out is the same, to the last bit.
enum Screen : int32_t { SCREEN_AUTO = 0, SCREEN_INT16 = 1, SCREEN_FLOAT32 = 2, SCREEN_NONE = 3 };

struct NearestCall {
    const void* x;  // [N, D] of x_type, elements of a row side by side
    int32_t x_type;
    int64_t stride_xn;      // from row to row, in elements
    const float* codebook;  // [K, D]
    int64_t N, K, D;
    int64_t* indices;         // [N]
    void* quantized;          // [N, D] of x_type
    float* squared_distance;  // [N]
    int64_t* counts;          // [K], or null: no statistics
    float* sums;              // [K, D], or null
    int64_t* nonfinite;       // [1]
    int32_t threads;
    int32_t screen;
    int64_t* rescored;  // [1] or null: codes whose distance was computed one by one
};

// What one call of nearest_codebook_ema_ is given; every row has its elements side by side and D from row to row.
struct UpdateCall {
    float* codebook;        // [K, D]
    float* cluster_size;    // [K]
    float* cluster_sum;     // [K, D]
    const int64_t* counts;  // [K]
    const float* sums;      // [K, D]
    int64_t K, D;
    double decay;
    float eps;
    int64_t* steps;  // [1] or null
    float dead_below;
    const float* restart;  // [K, D] or null
    float restart_size;
    int32_t threads;
};

#define FASTVID_ENTRIES(level)                           \
    namespace level {                                    \
    Outcome nearest_codebook(const NearestCall& call);   \
    void update_codebook(const UpdateCall& call);        \
    }
FASTVID_ENTRIES(generic)
FASTVID_ENTRIES(v2)
FASTVID_ENTRIES(v3)
FASTVID_ENTRIES(v4)
#undef FASTVID_ENTRIES

}  // namespace fastvid
