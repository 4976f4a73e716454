// What a job remembers between calls, in one allocation, and where everything lies in it.
#pragma once

#include "common/crew.h"
#include "pixelcnn_sampler/cpu.h"
#include "pixelcnn_sampler/cpu_draw.h"
#include "pixelcnn_sampler/cpu_model.h"
#include "pixelcnn_sampler/cpu_window.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t MOST_CELLS = 64;  // positions that go through the network together
constexpr int64_t BLOCK = 16;       // positions whose keys lie interleaved; whole vectors at every level
constexpr int64_t MOST_GROUPS = 64;
constexpr int64_t DRAWERS = 8;  // draws that may go on at once

inline int64_t rounded(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Cuts aligned arrays out of one allocation. Run once without memory to learn the size.
struct Slicer {
    char* base = nullptr;
    int64_t used = 0;

    template <class T>
    T* cut(int64_t count) {
        char* at = base + used;
        used += rounded(count * (int64_t)sizeof(T), 64);
        return base ? (T*)at : nullptr;
    }
};

// One position of every sample's grid, in the frame that is being drawn.
struct Cell {
    int64_t b, y, x;
};

// What one thread, or one crew, needs to put up to MOST_CELLS cells through the network.
struct Scratch {
    float *gated, *hidden, *read, *qkv, *attended, *logits;  // [MOST_CELLS, width of each]
    float* scores;                                           // [A, positions]
    char* noise;                                             // [DRAWERS, draw_bytes]
    Habits* habits;

    void cut(Slicer& from, const Model& model, int64_t positions) {
        gated = from.cut<float>(MOST_CELLS * model.S);
        hidden = from.cut<float>(MOST_CELLS * model.S);
        read = from.cut<float>(MOST_CELLS * model.S);
        qkv = from.cut<float>(MOST_CELLS * rounded(3 * model.D, PANEL));
        attended = from.cut<float>(MOST_CELLS * model.D);
        logits = from.cut<float>(MOST_CELLS * rounded(model.K, PANEL));
        scores = from.cut<float>(model.attentions ? model.A * positions : 0);
        noise = from.cut<char>(DRAWERS * rounded(draw_bytes(model.K), 64));
        habits = from.cut<Habits>(1);
    }
};

struct State {
    SamplerJob job;
    Model model;
    int64_t ring, columns, slots, positions, value_width, groups;
    float *v, *h;                             // [B, L, ring, columns, S]; columns beyond the grid are zero
    float *past_v, *past_h;                   // [slots, B, L, W, 2C] sums of what is known before a row is begun
    float *past_input_v, *past_input_h;       // [slots, B, W, S]
    int64_t* line;                            // [B, H, W] codes of the present frame, known or guessed
    int64_t* front;                           // [B] first position of the row that is not settled
    void *keys, *values;                      // [B, attentions, A, positions, value_width]; see cpu_attention.h
    float* zeros;                             // one row
    int64_t* slot_row;                        // [slots] the row t * H + y whose sums a slot holds, or -1
    Scratch scratch[MOST_GROUPS];

    int64_t place(int64_t b, int64_t l, int64_t row, int64_t x) const {
        return (((b * model.L + l) * ring + row % ring) * columns + x + model.r) * model.S;
    }
    float* v_at(int64_t b, int64_t l, int64_t row, int64_t x) const { return v + place(b, l, row, x); }
    float* h_at(int64_t b, int64_t l, int64_t row, int64_t x) const { return h + place(b, l, row, x); }
    int64_t sum_place(int64_t slot, int64_t b, int64_t l, int64_t x) const {
        return (((slot * job.B + b) * model.L + l) * job.W + x) * 2 * model.C;
    }
    int64_t input_place(int64_t slot, int64_t b, int64_t x) const {
        return ((slot * job.B + b) * job.W + x) * model.S;
    }
    // Two slots take turns in raster order; a wavefront has all rows of a frame in flight.
    int64_t slot_of(int64_t t, int64_t y) const { return job.wavefront ? y : (t * job.H + y) % 2; }
};

inline int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

// Lays out the state of a job; false for one that makes no sense. Where `base` is null only the size is found.
inline bool lay_out(const SamplerJob& job, void* base, State& state, int64_t& bytes) {
    Model& model = state.model;
    if (!job.weights || !job.table || job.B < 0 || job.T < 0 || job.H < 0 || job.W < 0 || job.window < 0 ||
        job.threads < 1 || !(job.temperature > 0) || !read_model(job.weights, job.table, job.words, model) ||
        (job.wavefront && !model.axial))
        return false;
    state.job = job;
    const bool remembers = model.frames > 1 || job.wavefront;
    state.ring = remembers ? largest(1, (model.frames > 1 ? model.frames : 1) * job.H) : model.r + 1;
    state.columns = job.W + 2 * model.r;
    state.slots = job.wavefront ? largest(1, job.H) : 2;
    state.positions = rounded(largest(1, job.T * job.H * job.W), BLOCK);
    state.groups = job.threads < job.B ? job.threads : largest(1, job.B);
    if (state.groups > MOST_GROUPS) state.groups = MOST_GROUPS;
    state.value_width = rounded(model.E, BLOCK);
    Slicer from{(char*)base};
    Layer* layers = from.cut<Layer>(model.L);
    const int64_t activations = job.B * model.L * state.ring * state.columns * model.S;
    state.v = from.cut<float>(activations);
    state.h = from.cut<float>(activations);
    const int64_t sums = state.slots * job.B * model.L * job.W * 2 * model.C;
    state.past_v = from.cut<float>(sums);
    state.past_h = from.cut<float>(sums);
    state.past_input_v = from.cut<float>(state.slots * job.B * job.W * model.S);
    state.past_input_h = from.cut<float>(state.slots * job.B * job.W * model.S);
    state.line = from.cut<int64_t>(job.B * job.H * job.W);
    state.front = from.cut<int64_t>(job.B);
    const int64_t cached = job.B * model.attentions * model.A * state.positions * state.value_width;
    state.keys = from.cut<char>(cached * (model.short_cache ? 2 : 4));
    state.values = from.cut<char>(cached * (model.short_cache ? 2 : 4));
    state.zeros = from.cut<float>(model.S);
    state.slot_row = from.cut<int64_t>(state.slots);
    for (int64_t group = 0; group < state.groups; ++group)
        state.scratch[group].cut(from, model, state.positions);
    bytes = from.used;
    if (base) read_layers(model, layers);
    return true;
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
