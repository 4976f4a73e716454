// Attention of single positions over what came before them. Every sum has one order, whatever else is evaluated.
// Raster models see all earlier positions: their keys lie in blocks, [block, E, BLOCK], so that scores are formed for a
// block of positions at once, without sums across lanes. Axial models see three lines of positions, found by stride:
// their keys lie like the values, [position, value_width].
#pragma once

#include "pixelcnn_sampler/cpu_state.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int BLOCK_PARTS = BLOCK / LANES;

inline Floats widened(const float* from) { return load<Floats>(from); }

inline Floats widened(const BFloat16* from) {
    typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
    return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

// Positions first, first + stride, ...
struct Line {
    int64_t first, stride, count;
};

struct Seen {
    Line line[3];
    int64_t count;

    int64_t position(int64_t i) const {
        for (const Line& one : line) {
            if (i < one.count) return one.first + i * one.stride;
            i -= one.count;
        }
        return 0;
    }
};

// What the position of a cell may look at, itself included.
inline Seen seen_from(const State& state, int64_t t, const Cell& cell) {
    const int64_t H = state.job.H, W = state.job.W, frame = t * H * W, n = frame + cell.y * W + cell.x;
    if (!state.model.axial) return {{{0, 1, n + 1}, {}, {}}, n + 1};
    return {{{n - cell.x, 1, cell.x + 1}, {frame + cell.x, W, cell.y}, {cell.y * W + cell.x, H * W, t}},
            cell.x + 1 + cell.y + t};
}

template <class T>
T* cache_of(void* cache, const State& state, int64_t b, int64_t attention, int64_t head) {
    const Model& model = state.model;
    return (T*)cache + ((b * model.attentions + attention) * model.A + head) * state.positions * state.value_width;
}

template <class T>
void remember(const State& state, int64_t attention, int64_t b, int64_t n, const float* qkv) {
    const Model& model = state.model;
    const int64_t E = model.E, width = state.value_width;
    for (int64_t head = 0; head < model.A; ++head) {
        const float *key = qkv + model.D + head * E, *value = key + model.D;
        T* keys = cache_of<T>(state.keys, state, b, attention, head);
        T* values = cache_of<T>(state.values, state, b, attention, head) + n * width;
        T* to = model.axial ? keys + n * width : keys + n / BLOCK * E * BLOCK + n % BLOCK;
        const int64_t step = model.axial ? 1 : BLOCK;
        for (int64_t e = 0; e < E; ++e) {
            narrow(key[e], to[e * step]);
            narrow(value[e], values[e]);
        }
        for (int64_t e = E; e < width; ++e) {
            narrow(0, values[e]);
            if (model.axial) narrow(0, to[e]);
        }
    }
}

// Scores of `blocks` blocks of positions.
template <int BLOCKS, class T>
inline void score_blocks(const float* query, const T* keys, int64_t E, float* scores) {
    Floats sums[BLOCKS][BLOCK_PARTS] = {};
    for (int64_t e = 0; e < E; ++e) {
        const Floats q = repeat(query[e]);
#pragma GCC unroll 4
        for (int block = 0; block < BLOCKS; ++block)
#pragma GCC unroll 4
            for (int part = 0; part < BLOCK_PARTS; ++part) {
                const T* at = keys + (block * E + e) * BLOCK + part * LANES;
                sums[block][part] = multiply_add(q, widened(at), sums[block][part]);
            }
    }
    for (int block = 0; block < BLOCKS; ++block)
        for (int part = 0; part < BLOCK_PARTS; ++part)
            store(scores + block * BLOCK + part * LANES, sums[block][part]);
}

template <class T>
void score_raster(const float* query, const T* keys, int64_t E, int64_t count, float* scores) {
    const int64_t blocks = (count + BLOCK - 1) / BLOCK;
    int64_t block = 0;
    for (; block + 4 <= blocks; block += 4)
        score_blocks<4>(query, keys + block * E * BLOCK, E, scores + block * BLOCK);
    for (; block < blocks; ++block) score_blocks<1>(query, keys + block * E * BLOCK, E, scores + block * BLOCK);
}

inline float sum_of_block(const Floats (&parts)[BLOCK_PARTS]) {
    float lanes[BLOCK], sum = 0;
    __builtin_memcpy(lanes, parts, sizeof lanes);
    for (float lane : lanes) sum += lane;
    return sum;
}

template <class T>
void score_axial(const float* query, const T* keys, int64_t width, const Seen& seen, float* scores) {
    for (int64_t i = 0; i < seen.count; ++i) {
        const T* key = keys + seen.position(i) * width;
        Floats sums[BLOCK_PARTS] = {};
        for (int64_t e = 0; e < width; e += BLOCK)
            for (int part = 0; part < BLOCK_PARTS; ++part)
                sums[part] = multiply_add(load<Floats>(query + e + part * LANES),
                                          widened(key + e + part * LANES), sums[part]);
        scores[i] = sum_of_block(sums);
    }
}

// Scores become weights that are not divided yet by their sum, which is returned. Scores have room up to a whole block.
inline float weigh(float* scores, int64_t count) {
    const int64_t end = rounded(count, BLOCK);
    for (int64_t i = count; i < end; ++i) scores[i] = scores[0];
    const float largest = largest_of(scores, end);
    Floats sums[BLOCK_PARTS] = {};
    for (int64_t i = 0; i < end; i += BLOCK) {
        for (int part = 0; part < BLOCK_PARTS; ++part) {
            float* at = scores + i + part * LANES;
            store(at, exp(load<Floats>(at) - repeat(largest)));
        }
        for (int64_t tail = count > i ? count : i; tail < i + BLOCK; ++tail) scores[tail] = 0;
        for (int part = 0; part < BLOCK_PARTS; ++part) sums[part] += load<Floats>(scores + i + part * LANES);
    }
    return sum_of_block(sums);
}

// Columns e .. e + BLOCK of the weighted sum of values: position i goes to partial sum i % 4.
template <class T>
void mix(const float* weights, const T* values, int64_t width, const Seen& seen, float (&to)[BLOCK]) {
    Floats sums[4][BLOCK_PARTS] = {};
    int64_t i = 0;
    for (const Line& line : seen.line) {
        int64_t k = 0;
        for (; k < line.count && i % 4; ++k, ++i) {
            const T* at = values + (line.first + k * line.stride) * width;
            for (int part = 0; part < BLOCK_PARTS; ++part)
                sums[i % 4][part] = multiply_add(repeat(weights[i]), widened(at + part * LANES), sums[i % 4][part]);
        }
        for (; k + 4 <= line.count; k += 4, i += 4) {
#pragma GCC unroll 4
            for (int one = 0; one < 4; ++one) {
                const T* at = values + (line.first + (k + one) * line.stride) * width;
#pragma GCC unroll 4
                for (int part = 0; part < BLOCK_PARTS; ++part)
                    sums[one][part] =
                        multiply_add(repeat(weights[i + one]), widened(at + part * LANES), sums[one][part]);
            }
        }
        for (; k < line.count; ++k, ++i) {
            const T* at = values + (line.first + k * line.stride) * width;
            for (int part = 0; part < BLOCK_PARTS; ++part)
                sums[i % 4][part] = multiply_add(repeat(weights[i]), widened(at + part * LANES), sums[i % 4][part]);
        }
    }
    for (int part = 0; part < BLOCK_PARTS; ++part)
        store(to + part * LANES, (sums[0][part] + sums[1][part]) + (sums[2][part] + sums[3][part]));
}

// One head of one cell. query: its part of the row of queries. scores: room for all positions.
template <class T>
void attend_head(const State& state, int64_t attention, int64_t b, int64_t head, const Seen& seen, const float* query,
                 float* scores, float* attended) {
    const Model& model = state.model;
    const int64_t E = model.E, width = state.value_width;
    const T* keys = cache_of<T>(state.keys, state, b, attention, head);
    const T* values = cache_of<T>(state.values, state, b, attention, head);
    float scaled[MOST_HEAD_WIDTH];
    for (int64_t e = 0; e < width; ++e) scaled[e] = e < E ? query[e] * model.query_scale : 0;
    if (model.axial)
        score_axial(scaled, keys, width, seen, scores);
    else
        score_raster(scaled, keys, E, seen.count, scores);
    const float sum = weigh(scores, seen.count);
    for (int64_t e = 0; e < width; e += BLOCK) {
        float mixed[BLOCK];
        mix(scores, values + e, width, seen, mixed);
        for (int64_t lane = 0; lane < BLOCK && e + lane < E; ++lane) attended[e + lane] = mixed[lane] / sum;
    }
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
