// Attention of one position: chunks of keys are weighed by different CTAs, and whoever needs the result merges them.
#pragma once

#include "pixelcnn_sampler/cuda_cta.h"

namespace fastvid::sampler {

// The place in the grid of key j, which lies in memory.
FASTVID_BOTH int64_t key_at(const Row& row, int64_t j, int x) {
    if (!row.axial) return j;
    const int64_t t = j < row.t ? j : row.t, y = j < row.t ? row.y : j - row.t;
    return (t * row.H + y) * row.W + x;
}

// One head of one sample against one chunk of keys.
template <class W>
struct Chunk {
    using Lane = typename W::L;
    using Cached = typename W::Weight::Cached;

    static constexpr int GROUPS = 16;  // threads that reduce what all threads found

    W& w;
    const Row& row;
    const int x, E, vectors, lanes, pair, head;  // pair: sample * A + head
    const int64_t first_key, before, N;
    const int keys;
    const Packet* const line;  // queries, keys and values of the row's first column, this sample and attention
    const Cached* const cache;
    float *const dots, *const scores, *const ends, *const sums;

    // item: (sample * A + head) * chunks + chunk
    FASTVID_BOTH Chunk(W& worker, int64_t attention, int column, int item, int chunks)
        : w(worker), row(w.row), x(column), E((int)row.E), vectors(E / 8), lanes(w.m.threads / vectors),
          pair(item / chunks), head(pair % (int)row.A), first_key((item - (int64_t)pair * chunks) * row.chunk),
          before(keys_before(row)), N(row.T * row.H * row.W), keys((int)least(row.chunk, before + x + 1 - first_key)),
          line(row.qkv + (attention * row.B + pair / (int)row.A) * row.W * 3 * row.attention_width() + head * E),
          cache((const Cached*)row.cache + ((attention * row.B + pair / (int)row.A) * 2 * row.A + head) * N * E),
          dots(w.input), scores(dots + row.chunk * vectors), ends(scores + row.chunk), sums(ends + 2 * w.m.threads) {}

    FASTVID_BOTH static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

    // Eight numbers of the query (which = 0), or of a key or value of this row (1, 2).
    FASTVID_BOTH void own(int which, int column, int vector, float* to) {
        const Packet* from = line + (column * 3 + which) * row.attention_width() + vector * 8;
        Packet got[4][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) w.m.peek2(from + 2 * i, got[i]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            w.m.await2(from + 2 * i, got[i], w.tag(column));
            to[2 * i] = value_of(got[i][0]), to[2 * i + 1] = value_of(got[i][1]);
        }
    }

    FASTVID_BOTH void any(int which, int j, int vector, float* to) {
        const int64_t key = first_key + j;
        if (key >= before) return own(which, (int)(key - before), vector, to);
        load8(cache + (which - 1) * row.A * N * E + key_at(row, key, x) * E + vector * 8, to);
    }

    // Scores of the keys, by dot products of eight numbers each.
    FASTVID_BOTH bool score() {
        w.m.each([&](int thread, Lane&) {
            const int vector = thread % vectors, lane = thread / vectors;
            if (lane >= lanes) return;
            float query[8], key[8];
            own(0, x, vector, query);
            for (int j = lane; j < keys; j += lanes) {
                any(1, j, vector, key);
                float dot = 0;
#pragma unroll
                for (int i = 0; i < 8; ++i) dot = fmaf(query[i], key[i], dot);
                dots[j * vectors + vector] = dot;
            }
        });
        if (!w.m.agree()) return false;
        w.m.each([&](int thread, Lane&) {
            float largest = -INFINITY;
            for (int j = thread; j < keys; j += w.m.threads) {
                float score = 0;
                for (int vector = 0; vector < vectors; ++vector) score += dots[j * vectors + vector];
                scores[j] = score;
                largest = fmaxf(largest, score);
            }
            ends[thread] = largest;
        });
        w.m.sync();
        return true;
    }

    // Values weighed by exp(score - largest); returns the largest score.
    FASTVID_BOTH float weigh() {
        const int threads = w.m.threads;
        w.m.each([&](int thread, Lane&) {
            if (thread >= GROUPS) return;
            float top = -INFINITY;
            for (int i = thread; i < threads; i += GROUPS) top = fmaxf(top, ends[i]);
            ends[threads + thread] = top;
        });
        w.m.sync();
        float largest = -INFINITY;  // the same in every thread
        for (int i = 0; i < GROUPS; ++i) largest = fmaxf(largest, ends[threads + i]);
        w.m.each([&](int thread, Lane&) {
            float sum = 0;
            for (int j = thread; j < keys; j += threads) sum += scores[j] = expf(scores[j] - largest);
            ends[thread] = sum;
        });
        w.m.sync();
        w.m.each([&](int thread, Lane&) {
            if (thread < GROUPS) {
                float sum = 0;
                for (int i = thread; i < threads; i += GROUPS) sum += ends[i];
                ends[threads + thread] = sum;
            }
            const int vector = thread % vectors, lane = thread / vectors;
            if (lane >= lanes) return;
            float acc[8] = {}, value[8];
            for (int j = lane; j < keys; j += lanes) {
                any(2, j, vector, value);
#pragma unroll
                for (int i = 0; i < 8; ++i) acc[i] = fmaf(scores[j], value[i], acc[i]);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[lane * E + vector * 8 + i] = acc[i];
        });
        return largest;
    }

    FASTVID_BOTH void publish(float largest, Packet* part) {
        w.m.each([&](int thread, Lane&) {
            for (int e = thread; e < E + 2; e += w.m.threads) {
                float value = e < E ? 0 : largest;
                if (e < E)
                    for (int lane = 0; lane < lanes; ++lane) value += sums[lane * E + e];
                if (e == E + 1) {
                    value = 0;
                    for (int i = 0; i < GROUPS; ++i) value += ends[w.m.threads + i];
                }
                w.m.publish(part + e, value, w.tag(x));
            }
        });
        w.m.sync();  // the next chunk, or phase, writes where this one was read
    }
};

FASTVID_BOTH int chunks_at(const Row& row, int x) {
    return (int)((uint32_t)(keys_before(row) + x + row.chunk) / (uint32_t)row.chunk);
}

template <class W>
FASTVID_BOTH Packet* part_at(W& w, int64_t attention, int64_t pair, int chunk) {
    const Row& row = w.row;
    const int64_t place = (attention * row.B * row.A + pair) * w.part_stride + chunk;
    return row.parts + place * (row.E + 2);
}

template <class W>
FASTVID_BOTH bool attend(W& w, int64_t attention, int x) {
    const Row& row = w.row;
    const int chunks = chunks_at(row, x), items = (int)(row.B * row.A) * chunks;
    for (int item = w.m.cta; item < items; item += w.ctas) {
        Chunk<W> chunk(w, attention, x, item, chunks);
        if (!chunk.score()) return false;
        const float largest = chunk.weigh();
        if (!w.m.agree()) return false;
        chunk.publish(largest, part_at(w, attention, chunk.pair, item - chunk.pair * chunks));
    }
    return true;
}

// The attention of a tile of samples, [TILE, D], from its parts in the order of the keys.
template <class W>
FASTVID_BOTH void merge(W& w, int64_t attention, int x, int first, int n) {
    const Row& row = w.row;
    const int D = (int)row.attention_width(), E = (int)row.E, half = D / 2;
    const int chunks = chunks_at(row, x);
    const auto wait = [&](const Packet* from, float& a, float& b) {
        Packet got[2];
        w.m.peek2(from, got);
        w.m.await2(from, got, w.tag(x));
        a = value_of(got[0]), b = value_of(got[1]);
    };
    w.m.each([&](int thread, typename W::L&) {
        for (int i = thread; i < n * half; i += w.m.threads) {
            const int b = w.tile_index(i, half), at = (i - b * half) * 2;
            const Packet* part = part_at(w, attention, (first + b) * row.A + at / E, 0);
            float largest = -INFINITY, top, sum, left, right, above[2] = {0, 0}, below = 0;
            for (int chunk = 0; chunk < chunks; ++chunk) {
                wait(part + chunk * (E + 2) + E, top, sum);
                largest = fmaxf(largest, top);
            }
            for (int chunk = 0; chunk < chunks; ++chunk) {
                wait(part + chunk * (E + 2) + E, top, sum);
                wait(part + chunk * (E + 2) + at % E, left, right);
                const float share = expf(top - largest);
                below = fmaf(share, sum, below);
                above[0] = fmaf(share, left, above[0]), above[1] = fmaf(share, right, above[1]);
            }
            w.input[2 * i] = above[0] / below, w.input[2 * i + 1] = above[1] / below;
        }
    });
}

}  // namespace fastvid::sampler
