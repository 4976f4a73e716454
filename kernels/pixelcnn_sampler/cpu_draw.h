// Gumbel noise by counter, and the draw of a code. reference.py beside this file is the definition of both.
//
// A draw needs exact noise, two logarithms in double, only for the classes that may come first or second. So all
// classes get an upper bound of their noise first. Division, addition and rounding are monotonic: a class whose bound
// gives less than what the second best of a few exact scores has can be neither first nor second. What is drawn, and
// the margin, are those of exact noise for all. tests/native/sampler_math.cpp tries all 2^24 uniform numbers.
#pragma once

#include "common/math.h"
#include "common/numbers.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t CLASSES = 4 * LANES;  // of a step: the noise of two vectors of counters
constexpr float LIKELY = 0.5f;          // rarely is a bound farther from its noise, for classes that lead

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

// Four words of each counter, in the low halves of the lanes.
struct Words {
    Longs word[4];
};

// The product of the low halves of two lanes.
inline Longs multiply_low(Longs a, Longs b) {
#if defined(FASTVID_X86) && defined(__AVX512BW__)
    return (Longs)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(FASTVID_X86) && defined(__AVX2__)
    return (Longs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(FASTVID_X86)
    return (Longs)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// Philox4x32-10 of a vector of counters. High halves are ignored, and hold nothing of use afterwards.
inline Words philox(Words counter, uint64_t key) {
    Longs c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
    uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const Longs p0 = multiply_low(c0, repeat((uint64_t)0xD2511F53));
        const Longs p1 = multiply_low(c2, repeat((uint64_t)0xCD9E8D57));
        c0 = (p1 >> 32) ^ (c1 ^ repeat((uint64_t)low));
        c2 = (p0 >> 32) ^ (c3 ^ repeat((uint64_t)high));
        c1 = p1;
        c3 = p0;
        low += 0x9E3779B9;
        high += 0xBB67AE85;
    }
    return {{c0, c1, c2, c3}};
}

// Words 0 and 1 of counters, and words 2 and 3, to the order of their classes, where lane 1 follows DOUBLES / 2, and so
// on: even lanes hold the first half of the counters, odd ones the second.
inline void interleave(Longs first, Longs last, uint32_t* to) {
#if defined(FASTVID_X86) && defined(__AVX512BW__)
    store(to, _mm512_unpacklo_epi64((__m512i)first, (__m512i)last));
    store(to + LANES, _mm512_unpackhi_epi64((__m512i)first, (__m512i)last));
#elif defined(FASTVID_X86) && defined(__AVX2__)
    store(to, _mm256_unpacklo_epi64((__m256i)first, (__m256i)last));
    store(to + LANES, _mm256_unpackhi_epi64((__m256i)first, (__m256i)last));
#elif defined(FASTVID_X86)
    store(to, _mm_unpacklo_epi64((__m128i)first, (__m128i)last));
    store(to + LANES, _mm_unpackhi_epi64((__m128i)first, (__m128i)last));
#else
    for (int lane = 0; lane < DOUBLES; ++lane) {
        const uint64_t pair[2] = {first[lane], last[lane]};
        __builtin_memcpy(to + (lane % 2 * (DOUBLES / 2) + lane / 2) * 4, pair, sizeof pair);
    }
#endif
}

// The upper 24 bits of the words of classes first .. first + count; `first` is a multiple of CLASSES, and `to` has room
// for `count` rounded up to one.
inline void uniform_bits(const Place& place, int64_t first, int64_t count, uint32_t* to) {
    typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    Longs quads = repeat((uint64_t)((place.stream << 16) + (uint32_t)(first / 4)));
    for (int lane = 0; lane < DOUBLES; ++lane) quads[lane] += (uint64_t)(lane % 2 * (DOUBLES / 2) + lane / 2);
    const Longs column = repeat((uint64_t)(place.x + (place.y << 16))), t = repeat((uint64_t)place.t);
    const Longs sample = repeat((uint64_t)place.sample), low = repeat((uint64_t)0xffffffff);
    for (int64_t k = 0; k < count; k += CLASSES) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const Words words = philox({{quads, column, t, sample}}, place.seed);
            const Longs front = (words.word[0] & low) | words.word[1] << 32;
            const Longs back = (words.word[2] & low) | words.word[3] << 32;
            interleave((Longs)((Bits)front >> 8), (Longs)((Bits)back >> 8), to + k + half * 2 * LANES);
            quads += repeat((uint64_t)DOUBLES);
        }
    }
}

// -log(-log(u)) for u = (bits + 1/2) / 2^24, rounded once from double. Reads and writes `count` rounded up to CLASSES.
inline void exact_noise(const uint32_t* bits, int64_t count, float* to) {
    typedef int32_t Halfs __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef float Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
    constexpr int64_t STEP = 16 * DOUBLES;
    Doubles inner[16];
    for (int64_t k = 0; k < count; k += STEP) {
        const int64_t end = count - k < STEP ? count - k : STEP;
        // one logarithm at a time: a chain of both is too long for the processor to overlap with the next
        for (int64_t i = 0; i < end; i += DOUBLES) {
            const Doubles number = __builtin_convertvector(load<Halfs>(bits + k + i), Doubles) + 0.5;
            inner[i / DOUBLES] = -log(number * 0x1p-24);
        }
        for (int64_t i = 0; i < end; i += DOUBLES)
            store(to + k + i, __builtin_convertvector(-log(inner[i / DOUBLES]), Halves));
    }
}

// Not less than the exact noise, and near it where u is near 1: -log(-log(u)) <= -log(1 - u), and a number's bits, read
// as an integer, are a chord of its logarithm.
inline Floats noise_bound(Ints bits) {
    const Floats distance = __builtin_convertvector(0x1000000 - bits, Floats) - 0.5f;  // (1 - u) 2^24, rounded
    const Floats logarithm = __builtin_convertvector((Ints)distance, Floats);          // (log2 + 127) 2^23, at most
    // 127 + 24 octaves, and a little more than what was rounded
    return multiply_add(logarithm, repeat(-0x1.62e43p-24f), repeat(151 * 0x1.62e43p-1f + 2e-5f));
}

// The noise of K classes, exactly. to: [K].
inline void gumbel(const Place& place, int64_t K, float* to) {
    constexpr int64_t STEP = 8 * CLASSES;
    uint32_t bits[STEP];
    float noise[STEP];
    for (int64_t k = 0; k < K; k += STEP) {
        const int64_t count = K - k < STEP ? K - k : STEP;
        uniform_bits(place, k, count, bits);
        exact_noise(bits, count, count < STEP ? noise : to + k);
        if (count < STEP) __builtin_memcpy(to + k, noise, (size_t)count * sizeof(float));
    }
}

// A vector of row [K] from k on, lowest where the row has ended.
inline Floats load_some(const float* row, int64_t K, int64_t k) {
    if (k + LANES <= K) return load<Floats>(row + k);
    Floats some = repeat(-__builtin_inff());
    __builtin_memcpy(&some, row + k, (size_t)(K - k) * sizeof(float));
    return some;
}

inline float largest_lane(Floats v) { return -smallest_lane(-v); }

inline float largest_of(const float* row, int64_t K) {
    Floats largest = load_some(row, K, 0);
    for (int64_t k = LANES; k < K; k += LANES) largest = larger(load_some(row, K, k), largest);
    return largest_lane(largest);
}

// The logarithm of sum exp(logits - largest); NaN where a logit is NaN or infinite, or all are minus infinity.
inline float log_sum(const float* logits, int64_t K, float largest) {
    Floats sums[4] = {};
    const Floats most = repeat(largest);
    int64_t k = 0;
    for (; k + 4 * LANES <= K; k += 4 * LANES)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[i] += exp_of_negative(load<Floats>(logits + k + i * LANES) - most);
    for (; k < K; k += LANES) sums[0] += exp_of_negative(load_some(logits, K, k) - most);
    const Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double all = 0;
    for (int lane = 0; lane < LANES; ++lane) all += sum[lane];
    return (float)__builtin_log(all);
}

// Log softmax of logits [K] at a code.
inline float logprob_of(const float* logits, int64_t K, int64_t code) {
    const float largest = largest_of(logits, K);
    return logits[code] - largest - log_sum(logits, K, largest);
}

// The two largest scores of each lane, and where the largest was met first.
struct Leaders {
    Floats best, second;
    Ints index;

    inline void meet(Floats score, Ints at) {
        const Ints ahead = score > best;
        second = larger(smaller(score, best), second);
        index = ahead ? at : index;
        best = larger(score, best);
    }
};

// A NaN counts as larger than any number, as in torch: the first one is drawn.
inline Drawn settle(const Leaders& leaders, int64_t K, bool nan_free, const float* logits, const float* noise,
                    float temperature) {
    float best = -__builtin_inff(), second = best;
    Drawn drawn = {K, 0, 0};
    for (int lane = 0; lane < LANES; ++lane) {
        const float score = leaders.best[lane], other = leaders.second[lane];
        const bool ahead = score > best || (score == best && leaders.index[lane] < drawn.code);
        const float behind = ahead ? best : score;
        second = behind > second ? behind : second;
        second = other > second ? other : second;
        drawn.code = ahead ? leaders.index[lane] : drawn.code;
        best = ahead ? score : best;
    }
    drawn.margin = best - second;
    for (int64_t k = K - 1; !nan_free && k >= 0; --k)
        if (__builtin_isnan(logits[k] / temperature + noise[k])) drawn = {k, __builtin_nanf(""), 0};
    return drawn;
}

// The code with the largest logits[k] / temperature + noise[k], lowest index on ties, and its margin; no logprob.
inline Drawn draw_with(const float* logits, const float* noise, int64_t K, float temperature) {
    Leaders leaders = {repeat(-__builtin_inff()), repeat(-__builtin_inff()), {}};
    Ints at, nan = {};
    for (int lane = 0; lane < LANES; ++lane) at[lane] = lane;
    leaders.index = at;
    for (int64_t k = 0; k < K; k += LANES, at += LANES) {
        const Floats score = load_some(logits, K, k) / temperature + load_some(noise, K, k);
        nan |= score != score;
        leaders.meet(score, at);
    }
    int32_t some = 0;
    for (int lane = 0; lane < LANES; ++lane) some |= nan[lane];
    return settle(leaders, K, !some, logits, noise, temperature);
}

inline int64_t padded_classes(int64_t K) { return (K + CLASSES - 1) / CLASSES * CLASSES; }

// Bytes of scratch that `draw` wants for K classes.
inline int64_t draw_bytes(int64_t K) { return (K + 63) / 64 * 64 * 2 * (int64_t)sizeof(float); }

constexpr int MOST_CANDIDATES = 16;

struct Candidates {
    int count;
    int32_t code[MOST_CANDIDATES];
};

// Classes whose score reaches `least`; a count above MOST_CANDIDATES says that there are more.
inline Candidates reaching(const float* scores, int64_t K, float least) {
    Candidates found = {};
    for (int64_t k = 0; k < K; k += LANES) {
        uint32_t reached = lanes_at_most(repeat(least), load<Floats>(scores + k));
        for (; reached; reached &= reached - 1) {
            if (found.count == MOST_CANDIDATES) return {MOST_CANDIDATES + 1, {}};
            found.code[found.count++] = (int32_t)k + __builtin_ctz(reached);
        }
    }
    return found;
}

// The draw among candidates in rising order, all classes whose bound is `reached` or more. Code -1 where another class
// may be first or second: `reached` is then the second best score among them.
inline Drawn draw_among(const Candidates& candidates, const float* logits, float temperature, const uint32_t* bits,
                        float& reached) {
    if (candidates.count > MOST_CANDIDATES) return {-1, 0, 0};
    alignas(64) uint32_t kept[MOST_CANDIDATES + CLASSES] = {};
    alignas(64) float noise[MOST_CANDIDATES + CLASSES];
    for (int i = 0; i < candidates.count; ++i) kept[i] = bits[candidates.code[i]];
    exact_noise(kept, candidates.count, noise);
    Drawn drawn = {-1, 0, 0};
    float best = -__builtin_inff(), second = best;
    for (int i = 0; i < candidates.count; ++i) {
        const float score = logits[candidates.code[i]] / temperature + noise[i];
        second = score > best ? best : score > second ? score : second;
        drawn.code = score > best ? candidates.code[i] : drawn.code;
        best = score > best ? score : best;
    }
    drawn.margin = best - second;
    if (second >= reached) return drawn;
    reached = second;
    return {-1, 0, 0};
}

// The draw at a place: that of draw_with for the noise of `gumbel`, to the last bit, and its logprob.
// scratch: draw_bytes(K), on a boundary of 64 bytes.
inline Drawn draw(const float* logits, int64_t K, float temperature, const Place& place, void* scratch) {
    uint32_t* bits = (uint32_t*)scratch;
    float* bounds = (float*)scratch + padded_classes(K);  // of scores
    uniform_bits(place, 0, K, bits);
    Floats best = repeat(-__builtin_inff()), second = best, largest = best;
    for (int64_t k = 0; k < K; k += LANES) {
        const Floats logit = load_some(logits, K, k);
        const Floats scaled = temperature == 1 ? logit : logit / temperature;
        const Floats bound = scaled + noise_bound(load<Ints>(bits + k));
        store(bounds + k, bound);
        largest = larger(logit, largest);
        second = larger(smaller(bound, best), second);
        best = larger(bound, best);
    }
    const float most = largest_lane(largest), sum = log_sum(logits, K, most);
    float first = -__builtin_inff(), next = first;
    for (int lane = 0; lane < LANES; ++lane) {
        const float bound = best[lane], behind = bound > first ? first : bound;
        next = behind > next ? behind : next;
        next = second[lane] > next ? second[lane] : next;
        first = bound > first ? bound : first;
    }
    Drawn drawn = {-1, 0, 0};
    if (sum == sum && next > -__builtin_inff() && first < __builtin_inff()) {
        float reached = next - LIKELY;
        drawn = draw_among(reaching(bounds, K, reached), logits, temperature, bits, reached);
        // the second best of a few is no more than the second best of all: everybody who may beat it has a look
        if (drawn.code < 0) drawn = draw_among(reaching(bounds, K, reached), logits, temperature, bits, reached);
    }
    if (drawn.code < 0) {
        gumbel(place, K, bounds);
        drawn = draw_with(logits, bounds, K, temperature);
    }
    drawn.logprob = logits[drawn.code] - most - sum;
    return drawn;
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
