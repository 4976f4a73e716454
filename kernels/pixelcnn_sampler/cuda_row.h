// What one launch of the persistent sampler is given: one row of codes for B samples. See README.md beside this file.
//
// A matrix is cut into strips of 8 outputs: lanes 4q..4q+3 and 8+4q..8+4q+3 of a packed panel, so that a strip of a
// paired matrix holds 4 tanh channels and their 4 sigmoid channels. CTA i owns strips i, i + ctas, ... of every matrix;
// its weights lie in memory in the order in which it uses them. What a CTA computes depends on strips alone, never on
// how many CTAs there are.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTVID_BOTH __host__ __device__ __forceinline__
#else
#define FASTVID_BOTH inline
#endif

namespace fastvid::sampler {

constexpr int STRIP = 8;     // outputs that are summed together
constexpr int DEPTH = 3;     // strips of weights under way where they are not resident
constexpr int SUMMARY = 6;   // numbers a strip of classes says about a draw: see cuda_draw.h
constexpr int MAX_THREADS = 256;
constexpr int SCAN = 8;      // threads that go through the strips of one sample's draw

// A value and the launch and column it belongs to: whoever reads both at once knows whether the value is there.
using Packet = uint64_t;

// One strip of one matrix in the order of use; the same for all CTAs. Written by fastvid/ops/_cuda_sampler.py.
struct Task {
    int32_t offset;    // in the CTA's weights, in units of 16 bytes
    int32_t segments;  // taps
    int32_t rows;      // of one segment
    int32_t owners;    // CTAs 0..owners-1 have such a strip
};

// Every field is 8 bytes, so that the mirror in fastvid/ops/_cuda_sampler.py cannot be padded differently.
struct Row {
    int64_t B, T, H, W, K, C, L, A, E;  // E: stride of a head
    int64_t taps;                       // present horizontal taps: columns x - taps + 1 .. x
    int64_t weight_type;                // 0 float32, 1 bfloat16, 2 int8; keys and values are float32 only with 0
    int64_t axial;                      // attention sees its own column, row and place in time only
    int64_t t, y;                       // of this row
    int64_t ctas, threads, chunk;       // chunk: keys that one CTA attends to
    int64_t tag;                        // packets of column x carry tag + x + 1; larger in every launch
    int64_t patience;                   // nanoseconds after which a launch that still waits gives up
    int64_t seed, stream, step;         // of the noise; step: its t
    int64_t code_stride;                // from sample to sample in codes, given, logprob and margin
    int64_t plane_layer, plane_sample;  // strides of `plane` in floats
    int64_t task_count, weight_bytes;   // of one CTA
    int64_t resident_tasks, resident_bytes, shared_bytes;  // set by plan()
    double temperature, scale;                             // scale: of queries
    const int64_t* samples;                                // [B]
    const char* weights;                                   // [ctas, weight_bytes]
    const Task* tasks;                                     // [task_count], in the memory of the device
    const Task* host_tasks;                                // the same for the launcher
    const int64_t* attention;                              // [L]: which attention follows the layer, or -1
    const float* strip_scale;                              // [ctas, task_count, 8] for int8, or null
    const float* start;                                    // [B, W, C]: input layer without the present row's codes
    const float* table;                                    // [taps - 1, K, table_stride]: input layer's present row
    int64_t table_stride;
    const float* base;                                     // [L, B, W, 2C]: pre-gate features without present taps
    const float* out_bias;                                 // [L, C]
    const float* qkv_bias;                                 // [attentions, 3D]
    const float* qkv_position;                             // [attentions, 3, 3D]
    const float* att_bias;                                 // [attentions, C]
    const float* head_bias;                                // [C + K]
    void* cache;                                           // [attentions, B, 2, A, T H W, E]: keys, values
    float* plane;                                          // every layer's input in this row, or null: later frames
    const int64_t* given;                                  // [B, W] or null
    int64_t* codes;                                        // [B, W], like logprob and margin
    float* logprob;
    float* margin;
    Packet* streams;    // [L + 1, B, taps, C]: every layer's input at column x modulo taps; of the head, activated
    Packet* gated;      // [L, B, C]
    Packet* attended;   // [attentions, B, C]: the stream before attention
    Packet* qkv;        // [attentions, B, W, 3D]
    Packet* parts;      // [attentions, B, A, chunks, E + 2]: weighted values, largest score, sum of weights
    Packet* hidden;     // [B, C]: of the head
    Packet* summaries;  // [W, B, SUMMARY, strips of K]
    int32_t* trouble;   // [1]: set by a CTA that waited too long, and then seen by all

    FASTVID_BOTH int64_t attention_width() const { return A * E; }
};

// Strips of a matrix with so many outputs; panels are whole.
FASTVID_BOTH int strips_of(int64_t outputs) { return (int)((outputs + 15) / 16 * 2); }

// The output that is number j of a strip of a plain matrix.
FASTVID_BOTH int output_of(int strip, int j) { return strip / 2 * 16 + strip % 2 * 4 + (j & 3) + (j >> 2) * 8; }

// The strip of a plain matrix that an output belongs to.
FASTVID_BOTH int strip_of(int output) { return output / 16 * 2 + output % 8 / 4; }

// Bytes of a strip's row.
FASTVID_BOTH int row_bytes(int64_t weight_type) { return weight_type == 0 ? 32 : weight_type == 1 ? 16 : 8; }

// Keys in memory that the whole row sees; its own columns follow them.
FASTVID_BOTH int64_t keys_before(const Row& row) { return row.axial ? row.t + row.y : (row.t * row.H + row.y) * row.W; }

// Most chunks of keys that a position of the grid has: the stride of `parts`.
FASTVID_BOTH int64_t most_chunks(const Row& row) {
    const int64_t keys = row.axial ? row.T + row.H + row.W : row.T * row.H * row.W;
    return (keys + row.chunk - 1) / row.chunk;
}

// Where things lie in the memory of a CTA, in bytes.
struct Layout {
    int64_t scratch, partial, choice, codes, weights;

    FASTVID_BOTH Layout(const Row& row, int tile) {
        const int64_t D = row.A * row.E, threads = row.threads;
        const int64_t inputs = tile * (row.taps * row.C > D ? row.taps * row.C : D);
        const int64_t attend = row.A ? row.chunk * (row.E / 8 + 2) + 2 * threads + threads * 8 : 0;
        const int64_t settle = tile * ((int64_t)strips_of(row.K) * SUMMARY + SCAN * 6);
        int64_t floats = inputs > attend ? inputs : attend;
        if (settle > floats) floats = settle;
        scratch = 0;
        partial = up(scratch + floats * 4);
        choice = up(partial + 2 * (threads / 32) * tile * STRIP * 4);  // two of them: see Worker::fold
        codes = up(choice + 2 * tile * STRIP * 4);
        weights = up(codes + row.B * row.taps * 4);
    }

    FASTVID_BOTH static int64_t up(int64_t bytes) { return (bytes + 127) / 128 * 128; }
};

// How many samples a CTA takes at once.
inline int tile_of(int64_t B) { return B > 1 ? 4 : 1; }

// Decides which weights stay in the memory of a CTA that has so many bytes. False: not even the moving ones fit.
inline bool plan(Row& row, int64_t shared_bytes) {
    const Layout layout(row, tile_of(row.B));
    const int64_t room = shared_bytes - layout.weights;
    row.resident_tasks = row.task_count;
    row.resident_bytes = row.weight_bytes;
    int64_t ring = 0;
    if (row.weight_bytes > room) {
        for (int64_t i = 0; i < row.task_count; ++i) {
            const Task& task = row.host_tasks[i];
            const int64_t bytes = (int64_t)task.segments * task.rows * row_bytes(row.weight_type);
            ring = bytes > ring ? bytes : ring;
        }
        ring = Layout::up(ring) * DEPTH;
        if (ring > room) return false;
        row.resident_tasks = 0;
        while ((int64_t)row.host_tasks[row.resident_tasks + 1].offset * 16 <= room - ring - 128) ++row.resident_tasks;
        row.resident_bytes = (int64_t)row.host_tasks[row.resident_tasks].offset * 16;
    }
    row.shared_bytes = layout.weights + Layout::up(row.resident_bytes) + ring;
    return true;
}

}  // namespace fastvid::sampler
