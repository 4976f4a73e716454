// The draw of one code: every strip of classes says what is best in it, and everybody picks the best of the strips.
//
// What a strip says, SUMMARY packets: the two halves of its best key, the logit of the given code where it has it and
// else of its best class, its second best score, its largest logit, and the sum of exp(logit - largest).
#pragma once

#include "pixelcnn_sampler/cuda_cta.h"

namespace fastvid::sampler {

// Philox4x32-10 of one counter.
FASTVID_BOTH void philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed, uint32_t* words) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1, c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

FASTVID_BOTH float gumbel(const Row& row, int64_t sample, int x, int code) {
    uint32_t words[4];
    philox((uint32_t)(code / 4) + ((uint32_t)row.stream << 16), (uint32_t)x + ((uint32_t)row.y << 16),
           (uint32_t)row.step, (uint32_t)row.samples[sample], (uint64_t)row.seed, words);
    const uint32_t word = code % 4 < 2 ? (code % 4 ? words[1] : words[0]) : (code % 4 == 2 ? words[2] : words[3]);
    const double uniform = ((double)(word >> 8) + 0.5) * 0x1p-24;
    return (float)-log(-log(uniform));
}

// Larger for a better score, and among equal ones for a lower code; 0 is worse than all. NaN is best, as in argmax.
FASTVID_BOTH uint64_t key_of(float score, int code) {
    const uint32_t bits = bits_of_float(score + 0.0f);  // one zero only
    const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)(score != score ? 0xffffffffu : ordered) << 32 | (0xffffffffu - (uint32_t)code);
}

FASTVID_BOTH int code_of(uint64_t key) { return (int)(0xffffffffu - (uint32_t)key); }

FASTVID_BOTH float score_of(uint64_t key) {
    const uint32_t ordered = (uint32_t)(key >> 32);
    return key ? float_of_bits(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered) : -INFINITY;
}

struct Best {
    uint64_t key = 0;
    float second = -INFINITY;

    FASTVID_BOTH void meet(uint64_t other, float other_second) {
        const float loser = score_of(other > key ? key : other);
        second = fmaxf(fmaxf(second, other_second), loser);
        key = other > key ? other : key;
    }
};

FASTVID_BOTH int given_at(const Row& row, int64_t sample, int x) {
    return row.given ? (int)row.given[sample * row.code_stride + x] : -1;
}

FASTVID_BOTH Packet* summary_at(const Row& row, int x, int64_t sample, int field) {
    return row.summaries + ((x * row.B + sample) * SUMMARY + field) * strips_of(row.K);
}

// One strip of one sample: 8 logits and scores.
template <class W>
FASTVID_BOTH void summarize(W& w, int x, int strip, int64_t sample, const float* logits, const float* scores) {
    const Row& row = w.row;
    const int given = given_at(row, sample, x);
    Best best;
    float told = -INFINITY, largest = -INFINITY, sum = 0;
    for (int j = 0; j < STRIP; ++j) {
        const int code = output_of(strip, j);
        if (code >= row.K) continue;
        const uint64_t key = key_of(scores[j], code);
        if (key > best.key && given < 0) told = logits[j];
        if (code == given) told = logits[j];
        best.meet(key, -INFINITY);
        largest = fmaxf(largest, logits[j]);
    }
    for (int j = 0; j < STRIP; ++j)
        if (output_of(strip, j) < row.K) sum += expf(logits[j] - largest);
    const float fields[SUMMARY] = {float_of_bits((uint32_t)(best.key >> 32)), float_of_bits((uint32_t)best.key),
                                   told, best.second, largest, sum};
#pragma unroll
    for (int field = 0; field < SUMMARY; ++field)
        w.m.publish(summary_at(row, x, sample, field) + strip, fields[field], w.tag(x));
}

// The codes of column x, which everybody finds for itself; the last CTA writes them down.
template <class W>
struct Settle {
    using Lane = typename W::L;

    W& w;
    const Row& row;
    const int x, strips, fields;
    float* const said;                        // [TILE, fields, strips]
    float *const high, *const low, *const second, *const told, *const largest, *const sums;  // [TILE, SCAN] each

    FASTVID_BOTH Settle(W& worker, int column)
        : w(worker), row(w.row), x(column), strips(strips_of(row.K)), fields(w.m.cta + 1 == row.ctas ? SUMMARY : 2),
          said(w.input), high(said + W::TILE * strips * SUMMARY), low(high + W::TILE * SCAN),
          second(low + W::TILE * SCAN), told(second + W::TILE * SCAN), largest(told + W::TILE * SCAN),
          sums(largest + W::TILE * SCAN) {}

    FASTVID_BOTH bool writes() const { return fields == SUMMARY; }
    FASTVID_BOTH const float* field(int b, int which) const { return said + (b * fields + which) * strips; }

    FASTVID_BOTH static uint64_t joined(float high, float low) {
        return (uint64_t)bits_of_float(high) << 32 | bits_of_float(low);
    }

    FASTVID_BOTH bool run() {
        for (int first = 0; first < row.B; first += W::TILE) {
            const int n = w.samples(first), half = fields * strips / 2;
            w.gather(
                n * half, w.tag(x), [&](int i) { return summary_at(row, x, first + i / half, 0) + i % half * 2; },
                [&](int i, float a, float b) { said[2 * i] = a, said[2 * i + 1] = b; });
            if (!w.m.agree()) return false;
            w.m.each([&](int thread, Lane&) {
                if (thread < n * SCAN) scan(thread / SCAN, thread % SCAN);
            });
            w.m.sync();
            if (writes()) {
                w.m.each([&](int thread, Lane&) {
                    if (thread < n * SCAN) add(thread / SCAN, thread % SCAN);
                });
                w.m.sync();
            }
            w.m.each([&](int thread, Lane&) {
                if (thread < n) decide(thread, first + thread);
            });
            w.m.sync();
        }
        return true;
    }

    FASTVID_BOTH void scan(int b, int start) {
        Best best;
        float top = -INFINITY;
        for (int strip = start; strip < strips; strip += SCAN) {
            const uint64_t key = joined(field(b, 0)[strip], field(b, 1)[strip]);
            best.meet(key, writes() ? field(b, 3)[strip] : -INFINITY);
            if (writes()) top = fmaxf(top, field(b, 4)[strip]);
        }
        const int at = b * SCAN + start;
        high[at] = float_of_bits((uint32_t)(best.key >> 32)), low[at] = float_of_bits((uint32_t)best.key);
        second[at] = best.second, largest[at] = top;
    }

    FASTVID_BOTH float top_of(int b) const {
        float top = -INFINITY;
        for (int i = 0; i < SCAN; ++i) top = fmaxf(top, largest[b * SCAN + i]);
        return top;
    }

    FASTVID_BOTH void add(int b, int start) {
        const float top = top_of(b);
        float sum = 0;
        for (int strip = start; strip < strips; strip += SCAN)
            if (field(b, 5)[strip] > 0) sum = fmaf(field(b, 5)[strip], expf(field(b, 4)[strip] - top), sum);
        sums[b * SCAN + start] = sum;
    }

    FASTVID_BOTH void decide(int b, int64_t sample) {
        Best best;
        for (int i = 0; i < SCAN; ++i) best.meet(joined(high[b * SCAN + i], low[b * SCAN + i]), second[b * SCAN + i]);
        const int given = given_at(row, sample, x), code = given < 0 ? code_of(best.key) : given;
        w.codes[sample * w.taps + x % w.taps] = code;
        if (!writes()) return;
        float sum = 0;
        for (int i = 0; i < SCAN; ++i) sum += sums[b * SCAN + i];
        const int strip = strip_of(code);
        const int64_t at = sample * row.code_stride + x;
        row.codes[at] = code;
        row.logprob[at] = (field(b, 2)[strip] - top_of(b)) - logf(sum);
        row.margin[at] = given < 0 ? score_of(best.key) - best.second : INFINITY;
    }
};

}  // namespace fastvid::sampler
