// The matrix products of one position: present taps with the gate, the 1x1 maps of a layer, attention's, the head's.
//
// One function serves them all, with the phase as an argument: code that is there once compiles and is cached once.
#pragma once

#include "pixelcnn_sampler/cuda_attend.h"
#include "pixelcnn_sampler/cuda_draw.h"

namespace fastvid::sampler {

enum Phase { TAPS, OUT, QKV, ATTEND, ATT_OUT, HEAD1, HEAD2, SETTLE };

// A matrix product of layer l at column x.
template <class W>
struct Product {
    using Lane = typename W::L;
    using Cached = typename W::Weight::Cached;

    W& w;
    const Row& row;
    const Phase phase;
    const int l, x, C, D;
    const int64_t attention;

    FASTVID_BOTH Product(W& worker, Phase which, int layer, int column)
        : w(worker), row(w.row), phase(which), l(layer), x(column), C((int)row.C), D((int)row.attention_width()),
          attention(row.attention[layer]) {}

    FASTVID_BOTH int outputs() const {
        return phase == TAPS ? 2 * C : phase == QKV ? 3 * D : phase == HEAD2 ? (int)row.K : C;
    }
    FASTVID_BOTH int rows() const { return phase == ATT_OUT ? D : C; }
    FASTVID_BOTH int segments() const { return phase == TAPS ? w.taps : 1; }

    // Taps that reach out of the row on its left.
    FASTVID_BOTH int skipped() const { return segments() - 1 > x ? segments() - 1 - x : 0; }

    // Every layer's input at a column; the last one's output, through the head's first activation, is number L.
    FASTVID_BOTH Packet* stream(int layer, int64_t sample, int column) const {
        return row.streams + ((layer * row.B + sample) * w.taps + column % w.taps) * C;
    }
    FASTVID_BOTH Packet* gated(int64_t sample) const { return row.gated + (l * row.B + sample) * C; }
    FASTVID_BOTH Packet* attended(int64_t sample) const { return row.attended + (attention * row.B + sample) * C; }

    // The sample's output of this phase, and what it is added to.
    FASTVID_BOTH bool adds() const { return phase == OUT || phase == ATT_OUT; }
    FASTVID_BOTH const Packet* residual(int64_t sample) const {
        return phase == OUT ? stream(l, sample, x) : attended(sample);
    }
    FASTVID_BOTH const float* bias() const {
        switch (phase) {
            case OUT: return row.out_bias + l * C;
            case QKV: return row.qkv_bias + attention * 3 * D;
            case ATT_OUT: return row.att_bias + attention * C;
            default: return row.head_bias + (phase == HEAD2 ? C : 0);
        }
    }

    FASTVID_BOTH void early(int first, int n) {
        for (int tap = skipped(); tap < segments() - 1; ++tap) {
            const int at = x - (segments() - 1) + tap;
            w.stage(stream(l, first, at), w.taps * C, C, n, at, w.input + tap * W::TILE * C);
        }
    }

    FASTVID_BOTH void now(int first, int n) {
        if (phase == TAPS && l == 0) return look_up(first, n);
        if (phase == ATT_OUT) return merge(w, attention, x, first, n);
        const bool one_of_columns = phase == TAPS || phase == HEAD1;
        const Packet* from = phase == TAPS    ? stream(l, first, x)
                             : phase == HEAD1 ? stream((int)row.L, first, x)
                             : phase == OUT   ? gated(first)
                             : phase == QKV   ? attended(first)
                                              : row.hidden + first * C;
        float* to = w.input + (segments() - 1) * W::TILE * C;
        w.stage(from, one_of_columns ? w.taps * C : C, C, n, x, to);
    }

    // The first layer's input: everybody looks it up, and the owners of the outgoing strips hand it on.
    FASTVID_BOTH void look_up(int first, int n) {
        const int left = w.taps - 1;
        float* to = w.input + left * W::TILE * C;
        w.m.each([&](int thread, Lane&) {
            for (int i = thread; i < n * C; i += w.m.threads) {
                const int b = w.tile_index(i, C), c = i - b * C;
                float h = row.start[((first + b) * row.W + x) * C + c];
                for (int tap = left > x ? left - x : 0; tap < left; ++tap) {
                    const int code = w.codes[(first + b) * w.taps + (x - left + tap) % w.taps];
                    h += row.table[(tap * row.K + code) * row.table_stride + c];
                }
                to[i] = h;
                if (strip_of(c) % w.ctas == w.m.cta) publish_stream(0, first + b, c, h);
            }
        });
    }

    // What an output needs besides the product, before the wait for the inputs.
    FASTVID_BOTH void prepare(int thread, Lane& lane, int strip, int first) {
        const int each = phase == TAPS ? STRIP / 2 : STRIP, b = thread / each, j = thread % each;
        if (b >= w.samples(first)) return;
        const int64_t sample = first + b;
        if (phase == TAPS) {
            const float* base = row.base + ((l * row.B + sample) * row.W + x) * 2 * C + strip * 4 + j;
            lane.addend[0] = base[0], lane.addend[1] = base[C];
            return;
        }
        const int at = output_of(strip, j);
        if (at >= outputs()) return;
        lane.addend[0] = bias()[at];
        if (phase == QKV) lane.addend[0] += position(at);
        if (phase == HEAD2) lane.addend[1] = gumbel(row, sample, x, at);
        if (adds()) lane.addend[1] = w.m.await(residual(sample) + at, w.tag(x));
    }

    FASTVID_BOTH float position(int at) const {
        const float tf = (float)row.t / (float)row.T - 0.5f, yf = (float)row.y / (float)row.H - 0.5f;
        const float xf = (float)x / (float)row.W - 0.5f;
        const float* p = row.qkv_position + attention * 9 * D + at;
        return tf * p[0] + yf * p[3 * D] + xf * p[6 * D];
    }

    template <class Sum>
    FASTVID_BOTH void finish(int thread, Lane& lane, int strip, int first, Sum sum) {
        const int each = phase == TAPS ? STRIP / 2 : STRIP, b = thread / each, j = thread % each;
        if (b >= w.samples(first)) return;
        const int64_t sample = first + b;
        const float value = lane.addend[0] + sum(b, j);
        if (phase == TAPS) {
            const float s = lane.addend[1] + sum(b, j + 4);
            return w.m.publish(gated(sample) + strip * 4 + j, tanhf(value) * (1.0f / (1.0f + expf(-s))), w.tag(x));
        }
        const int at = output_of(strip, j);
        if (at >= outputs()) return;
        const float added = lane.addend[1] + value;
        switch (phase) {
            case OUT:
                if (attention >= 0) return w.m.publish(attended(sample) + at, added, w.tag(x));
                [[fallthrough]];
            case ATT_OUT: return publish_stream(l + 1, sample, at, added);
            case QKV: return publish_attention(sample, at, value);
            case HEAD1: return w.m.publish(row.hidden + sample * C + at, elu(value), w.tag(x));
            default:
                w.chosen[thread] = value;
                w.chosen[W::TILE * STRIP + thread] = value / (float)row.temperature + lane.addend[1];
        }
    }

    // Hands the input of `layer` on, to this launch and, through `plane`, to later frames.
    FASTVID_BOTH void publish_stream(int layer, int64_t sample, int c, float value) {
        w.m.publish(stream(layer, sample, x) + c, layer < row.L ? value : elu(value), w.tag(x));
        if (row.plane && layer < row.L)
            row.plane[layer * row.plane_layer + sample * row.plane_sample + x * C + c] = value;
    }

    // Queries, already scaled, keys and values; keys and values as the cache holds them.
    FASTVID_BOTH void publish_attention(int64_t sample, int at, float value) {
        if (at < D) {
            value *= (float)row.scale;
        } else {
            const int64_t N = row.T * row.H * row.W, place = (row.t * row.H + row.y) * row.W + x;
            const int E = (int)row.E, which = at / D - 1, head = at % D / E;
            const int64_t line = ((attention * row.B + sample) * 2 + which) * row.A + head;
            value = keep(value, ((Cached*)row.cache)[(line * N + place) * E + at % E]);
        }
        w.m.publish(row.qkv + ((attention * row.B + sample) * row.W + x) * 3 * D + at, value, w.tag(x));
    }

    // After all threads have finished a strip of classes.
    FASTVID_BOTH bool summarizes() const { return phase == HEAD2; }
    FASTVID_BOTH void after(int thread, int strip, int first) {
        if (thread >= w.samples(first)) return;
        const float* logits = w.chosen + thread * STRIP;
        summarize(w, x, strip, first + thread, logits, logits + W::TILE * STRIP);
    }
};

}  // namespace fastvid::sampler
