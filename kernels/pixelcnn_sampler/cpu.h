// What the sampler is given, and its entries of every instruction set level.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastvid {

class Crew;

constexpr int64_t OPEN_CODE = -1;  // in `given` and `draft`: nothing is known

// One job; the fields in the order of _Job in fastvid/ops/_cpu_sampler.py. Grids are [B, T, H, W], dense.
struct SamplerJob {
    const uint8_t* weights;   // a packed model, 64-byte aligned; see packed.py
    const int64_t* table;     // its words
    const float* condition;   // [B, T, H, W, Cc]
    const int64_t* samples;   // [B] identities
    const int64_t* given;     // or null: every code is drawn
    const int64_t* draft;     // or null
    int64_t* codes;           // [B, T, H, W]
    float* logprob;           // [B, T, H, W]
    float* margin;            // [B, T, H, W]
    int64_t* passes;          // [B, T, H]
    void* state;              // sampler_bytes() of memory, 64-byte aligned, the job's alone
    int64_t state_bytes;
    int64_t words;  // of the table
    int64_t B, T, H, W;
    int64_t seed, stream, first_step;
    double temperature;
    int64_t window;     // positions of a row evaluated at once; 0: whatever pays
    int64_t wavefront;  // whether frames are drawn along anti-diagonals
    int64_t threads;
};

// One row of codes of B samples: standard Gumbel noise.
struct NoiseCall {
    const int64_t* samples;  // [B]
    float* noise;            // [B, W, K]
    int64_t B, W, K;
    int64_t seed, stream, t, y;
};

// bytes: how much state a job needs, or -1 for a job that makes no sense. start: once, before anything else.
// row: draws row y of frame t; rows come in raster order, the last one maybe again. frame: the whole of frame t, along
// its anti-diagonals.
#define FASTVID_ENTRIES(level)                                       \
    namespace level {                                                \
    int64_t sampler_bytes(const SamplerJob& job);                    \
    Outcome sampler_start(const SamplerJob& job);                    \
    Outcome sampler_row(const SamplerJob& job, int64_t t, int64_t y); \
    Outcome sampler_frame(const SamplerJob& job, int64_t t);         \
    void gumbel_row(const NoiseCall& call);                          \
    }
FASTVID_ENTRIES(generic)
FASTVID_ENTRIES(v2)
FASTVID_ENTRIES(v3)
FASTVID_ENTRIES(v4)
#undef FASTVID_ENTRIES

}  // namespace fastvid
