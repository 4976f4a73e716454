// What every phase of the persistent sampler is made of: weights on their way, awaited activations, products of strips.
//
// Written once for the device and for a plain loop on the host. A Machine is one CTA: each(f) runs f(thread, lane) for
// all of its threads, where a lane is what a thread keeps in registers; sync() and agree() are barriers between two
// each(); agree() also tells whether everybody got what was awaited. peek2 and publish move packets, copy moves weights.
#pragma once

#include <math.h>

#include "pixelcnn_sampler/cuda_row.h"

namespace fastvid::sampler {

template <int TILE>
struct Lane {
    float acc[TILE][STRIP];
    float addend[2];
};

FASTVID_BOTH float float_of_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

FASTVID_BOTH uint32_t bits_of_float(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

FASTVID_BOTH Packet packet_of(float value, uint32_t tag) { return (Packet)tag << 32 | bits_of_float(value); }
FASTVID_BOTH float value_of(Packet packet) { return float_of_bits((uint32_t)packet); }
FASTVID_BOTH uint32_t tag_of(Packet packet) { return (uint32_t)(packet >> 32); }

FASTVID_BOTH float low_half(uint32_t word) { return float_of_bits(word << 16); }
FASTVID_BOTH float high_half(uint32_t word) { return float_of_bits(word & 0xffff0000u); }

FASTVID_BOTH uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of_float(value);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

struct alignas(16) Quad {
    uint32_t word[4];
};
struct alignas(8) Pair {
    uint32_t word[2];
};

// How a strip of Kin rows lies in memory: the unit one copy moves, the units of a row, and where a row's 8 weights are.
struct Float32 {
    using Unit = Quad;
    using Cached = float;
    static constexpr int UNITS = 2;  // two planes, so that neighbouring threads read neighbouring units
    static constexpr bool SCALED = false;
    FASTVID_BOTH static void load(const char* slot, int rows, int row, float* w) {
        const Quad a = ((const Quad*)slot)[row], b = ((const Quad*)slot)[rows + row];
        for (int i = 0; i < 4; ++i) w[i] = float_of_bits(a.word[i]), w[4 + i] = float_of_bits(b.word[i]);
    }
};
struct BFloat16 {
    using Unit = Quad;
    using Cached = uint16_t;
    static constexpr int UNITS = 1;
    static constexpr bool SCALED = false;
    FASTVID_BOTH static void load(const char* slot, int, int row, float* w) {
        const Quad a = ((const Quad*)slot)[row];
        for (int i = 0; i < 4; ++i) w[i] = low_half(a.word[i]), w[4 + i] = high_half(a.word[i]);
    }
};
struct Int8 {
    using Unit = Pair;
    using Cached = uint16_t;
    static constexpr int UNITS = 1;
    static constexpr bool SCALED = true;
    FASTVID_BOTH static void load(const char* slot, int, int row, float* w) {
        const Pair a = ((const Pair*)slot)[row];
        for (int i = 0; i < 8; ++i) w[i] = (float)(int8_t)(a.word[i / 4] >> (i % 4 * 8));
    }
};

// Keys and values: 8 numbers side by side, and one number as it will be read again.
FASTVID_BOTH void load8(const float* from, float* to) {
    const Quad a = ((const Quad*)from)[0], b = ((const Quad*)from)[1];
    for (int i = 0; i < 4; ++i) to[i] = float_of_bits(a.word[i]), to[4 + i] = float_of_bits(b.word[i]);
}
FASTVID_BOTH void load8(const uint16_t* from, float* to) {
    const Quad a = *(const Quad*)from;
    for (int i = 0; i < 4; ++i) to[2 * i] = low_half(a.word[i]), to[2 * i + 1] = high_half(a.word[i]);
}
FASTVID_BOTH float keep(float value, float& to) { return to = value; }
FASTVID_BOTH float keep(float value, uint16_t& to) { return low_half(to = to_bfloat16(value)); }

FASTVID_BOTH float elu(float x) { return x > 0 ? x : expm1f(x); }

template <class Machine, class Weight_>
struct Worker {
    using Weight = Weight_;
    static constexpr int TILE = Machine::TILE;
    using L = Lane<TILE>;

    Machine& m;
    const Row& row;
    const Layout layout;
    float* const input;  // [taps][TILE][C], or [TILE][D], or what a phase without products needs
    float* const chosen;  // [2][TILE][STRIP]: logits and scores of one strip
    int* const codes;     // [B][taps]: of column x modulo taps
    const int C, taps, ctas;
    const int part_stride;  // most chunks of keys: a division that nobody should wait for
    const int slot_bytes;
    int task = 0, next_task, next_slot = 0, slot = 0, parity = 0;

    FASTVID_BOTH Worker(Machine& machine, const Row& r)
        : m(machine), row(r), layout(r, TILE), input((float*)(machine.shared + layout.scratch)),
          chosen((float*)(machine.shared + layout.choice)), codes((int*)(machine.shared + layout.codes)),
          C((int)r.C), taps((int)r.taps), ctas((int)r.ctas), part_stride(r.A ? (int)most_chunks(r) : 0),
          slot_bytes((int)((r.shared_bytes - layout.weights - Layout::up(r.resident_bytes)) / DEPTH)),
          next_task((int)r.resident_tasks) {
        const int moving = row.resident_tasks < row.task_count ? DEPTH - 1 : 0;
        for (int i = 0; i < row.resident_tasks + moving; ++i) {
            const bool stays = i < row.resident_tasks;
            fetch(stays ? i : next_task, stays ? resident(i) : next_place());
            if (!stays) advance();
        }
        m.all_landed();
    }

    FASTVID_BOTH int samples(int first) const { return row.B - first < TILE ? (int)(row.B - first) : TILE; }
    FASTVID_BOTH static int tile_index(int i, int each) { return TILE == 1 ? 0 : i / each; }
    FASTVID_BOTH uint32_t tag(int x) const { return (uint32_t)(row.tag + x + 1); }
    FASTVID_BOTH char* resident(int i) { return m.shared + layout.weights + (int64_t)row.tasks[i].offset * 16; }

    // A thread copies exactly the rows that it multiplies later, so that its own copies are all it waits for.
    FASTVID_BOTH void fetch(int i, char* to) {
        const Task t = row.tasks[i];
        const char* from = row.weights + m.cta * row.weight_bytes + (int64_t)t.offset * 16;
        if (m.cta < t.owners) {
            m.each([&](int thread, L&) {
                for (int segment = 0; segment < t.segments * Weight::UNITS; ++segment)
                    for (int r = thread; r < t.rows; r += m.threads) {
                        const int64_t at = (int64_t)(segment * t.rows + r) * sizeof(typename Weight::Unit);
                        m.template copy<sizeof(typename Weight::Unit)>(to + at, from + at);
                    }
            });
        }
        m.commit();
    }

    FASTVID_BOTH char* ring(int i) {
        return m.shared + layout.weights + Layout::up(row.resident_bytes) + (int64_t)i * slot_bytes;
    }
    FASTVID_BOTH char* next_place() { return ring(next_slot); }
    FASTVID_BOTH void advance() {
        next_task = next_task + 1 == row.task_count ? (int)row.resident_tasks : next_task + 1;
        next_slot = next_slot + 1 == DEPTH ? 0 : next_slot + 1;
    }

    // The weights of the next task; the ring's next free slot starts to fill. To be read after m.landed().
    FASTVID_BOTH const char* take() {
        const int i = task;
        task = i + 1 == row.task_count ? 0 : i + 1;
        if (i < row.resident_tasks) return resident(i);
        fetch(next_task, next_place());
        advance();
        const char* found = ring(slot);
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
        return found;
    }

    // Waits for pairs of packets and hands their values on: put(i, first, second) for i in 0..pairs-1.
    template <class Address, class Put>
    FASTVID_BOTH void gather(int pairs, uint32_t awaited, Address address, Put put) {
        m.each([&](int thread, L&) {
            for (int first = thread; first < pairs; first += 4 * m.threads) {
                Packet got[4][2];  // all under way before the first is looked at
#pragma unroll
                for (int u = 0; u < 4; ++u)
                    if (first + u * m.threads < pairs) m.peek2(address(first + u * m.threads), got[u]);
#pragma unroll
                for (int u = 0; u < 4; ++u) {
                    const int i = first + u * m.threads;
                    if (i >= pairs) break;
                    m.await2(address(i), got[u], awaited);
                    put(i, value_of(got[u][0]), value_of(got[u][1]));
                }
            }
        });
    }

    // Packets [B, width] of column x and a tile of samples into `to` [TILE, width].
    FASTVID_BOTH void stage(const Packet* from, int64_t sample_stride, int width, int n, int x, float* to) {
        const int half = width / 2;
        const auto address = [&](int i) {
            const int b = tile_index(i, half);
            return from + b * sample_stride + (i - b * half) * 2;
        };
        gather(n * half, tag(x), address, [&](int i, float a, float b) { to[2 * i] = a, to[2 * i + 1] = b; });
    }

    FASTVID_BOTH void clear() {
        m.each([&](int, L& lane) {
#pragma unroll
            for (int b = 0; b < TILE; ++b)
#pragma unroll
                for (int j = 0; j < STRIP; ++j) lane.acc[b][j] = 0;
        });
    }

    // Adds one segment; values [segments, TILE, rows], weights of all segments `height` rows.
    FASTVID_BOTH void multiply(const char* weights, int segment, int height, int rows) {
        const float* values = input + (int64_t)segment * TILE * rows;
        m.each([&](int thread, L& lane) {
#pragma unroll 2
            for (int r = thread; r < rows; r += m.threads) {
                float w[STRIP];
                Weight::load(weights, height, segment * rows + r, w);
#pragma unroll
                for (int b = 0; b < TILE; ++b) {
                    const float value = values[b * rows + r];
#pragma unroll
                    for (int j = 0; j < STRIP; ++j) lane.acc[b][j] = fmaf(value, w[j], lane.acc[b][j]);
                }
            }
        });
    }

    // Sums over the threads of each warp. Two buffers in turn: the barrier of the next product stands between a slow
    // reader of this one and its next writer.
    FASTVID_BOTH const float* fold() {
        float* partial = (float*)(m.shared + layout.partial) + parity * (m.threads / 32) * TILE * STRIP;
        parity ^= 1;
        m.fold(partial);
        return partial;
    }

    // Output j of sample b: the warps' sums in order.
    FASTVID_BOTH float total(const float* partial, const float* scales, int b, int j) const {
        float sum = partial[b * STRIP + j];
        for (int warp = 1; warp < m.threads / 32; ++warp) sum += partial[(warp * TILE + b) * STRIP + j];
        return Weight::SCALED ? sum * scales[j] : sum;
    }

    // One matrix: all strips of this CTA, for all samples, n of them from `first`. P is cuda_layers.h's Product:
    // early(first, n), now(first, n) bring the inputs of all segments but the last, and of the last;
    // prepare(...) reads what outputs need besides the product; finish(..., sum) publishes, with output j of sample
    // first + b in sum(b, j); after(...) runs once every thread has finished, where there is something to do.
    template <class P>
    FASTVID_BOTH bool run(P& p) {
        const int strips = strips_of(p.outputs()), rows = p.rows(), segments = p.segments(), skipped = p.skipped();
        for (int strip = m.cta; strip - m.cta < strips; strip += ctas) {
            const float* scales = Weight::SCALED ? row.strip_scale + (m.cta * row.task_count + task) * STRIP : nullptr;
            const char* weights = take();
            if (strip >= strips) continue;
            for (int first = 0; first < row.B; first += TILE) {
                const bool fresh = strip == m.cta || row.B > TILE;
                m.each([&](int thread, L& lane) { p.prepare(thread, lane, strip, first); });
                clear();
                m.landed();
                for (int segment = skipped; segment < segments; ++segment) {
                    const bool last = segment + 1 == segments;
                    if (fresh && segment == skipped && !last) {
                        p.early(first, samples(first));
                        m.sync();
                    }
                    if (fresh && last) {
                        p.now(first, samples(first));
                        if (!m.agree()) return false;
                    }
                    multiply(weights, segment, segments * rows, rows);
                }
                const float* partial = fold();
                m.sync();
                m.each([&](int thread, L& lane) {
                    p.finish(thread, lane, strip, first, [&](int b, int j) { return total(partial, scales, b, j); });
                });
                if (p.summarizes()) {
                    m.sync();
                    m.each([&](int thread, L&) { p.after(thread, strip, first); });
                }
            }
        }
        return true;
    }
};

}  // namespace fastvid::sampler
