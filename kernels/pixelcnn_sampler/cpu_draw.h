// Gumbel noise by counter, and the draw of a code. reference.py beside this file is the definition of both.
#pragma once

#include "common/math.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// Where a code is drawn: what its noise is a function of.
struct Place {
    uint64_t seed;
    uint32_t sample, stream, t, y, x;  // t: with the first step added
};

struct Drawn {
    int64_t code;
    float margin;   // best minus second best score; infinite for one class
    float logprob;  // log softmax of the logits at the code
};

struct Counter {
    uint32_t word[4];
};

// Philox4x32-10
inline Counter philox(Counter counter, uint64_t key) {
    uint32_t* c = counter.word;
    uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = (uint64_t)c[0] * 0xD2511F53, p1 = (uint64_t)c[2] * 0xCD9E8D57;
        counter = {{(uint32_t)(p1 >> 32) ^ c[1] ^ low, (uint32_t)p1, (uint32_t)(p0 >> 32) ^ c[3] ^ high, (uint32_t)p0}};
        low += 0x9E3779B9;
        high += 0xBB67AE85;
    }
    return counter;
}

// The noise of K classes, exactly. to: [K].
inline void gumbel(const Place& place, int64_t K, float* to) {
    Counter words = {};
    for (int64_t k = 0; k < K; ++k) {
        if (k % 4 == 0)
            words = philox({{(uint32_t)(k / 4) + (place.stream << 16), place.x + (place.y << 16), place.t,
                             place.sample}}, place.seed);
        const double uniform = ((words.word[k % 4] >> 8) + 0.5) * 0x1p-24;
        to[k] = (float)-__builtin_log(-__builtin_log(uniform));
    }
}

// Log softmax of logits [K] at a code.
inline float logprob_of(const float* logits, int64_t K, int64_t code) {
    double largest = logits[0], sum = 0;
    for (int64_t k = 0; k < K; ++k) largest = logits[k] > largest ? logits[k] : largest;
    for (int64_t k = 0; k < K; ++k) sum += __builtin_exp(logits[k] - largest);
    return (float)(logits[code] - largest - __builtin_log(sum));
}

// The code with the largest logits[k] / temperature + noise[k], lowest index on ties, and its margin; no logprob.
inline Drawn draw_with(const float* logits, const float* noise, int64_t K, float temperature) {
    Drawn drawn = {0, __builtin_inff(), 0};
    float best = logits[0] / temperature + noise[0], second = -__builtin_inff();
    for (int64_t k = 1; k < K; ++k) {
        const float score = logits[k] / temperature + noise[k];
        if (score > best) {
            second = best;
            best = score;
            drawn.code = k;
        } else if (score > second) {
            second = score;
        }
    }
    if (K > 1) drawn.margin = best - second;
    return drawn;
}

// Bytes of scratch that `draw` wants for K classes.
inline int64_t draw_bytes(int64_t K) { return (K + 15) / 16 * 16 * 2 * (int64_t)sizeof(float); }

// The draw at a place: that of draw_with for the noise of `gumbel`, to the last bit, and its logprob.
// scratch: draw_bytes(K), on a boundary of 64 bytes.
inline Drawn draw(const float* logits, int64_t K, float temperature, const Place& place, void* scratch) {
    gumbel(place, K, (float*)scratch);
    Drawn drawn = draw_with(logits, (const float*)scratch, K, temperature);
    drawn.logprob = logprob_of(logits, K, drawn.code);
    return drawn;
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
