// A packed model as structures: what packed.py wrote, found again through its table.
#pragma once

#include "pixelcnn_sampler/cpu_product.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// Words of the table, in the order of HEADER in packed.py.
enum Word {
    VERSION, CODES, WIDTH, STRIDE, LAYERS, CONDITION_CHANNELS, HEADS, HEAD_STRIDE, WEIGHT_TYPE, WAVEFRONT, HEAD_WIDTH,
    FRAMES_SEEN, RADIUS, INPUT_V_PAST, INPUT_V_NOW, INPUT_H_PAST, INPUT_H_NOW, V_PAST, V_NOW, H_PAST, H_NOW, FIRST_TAP,
    FIRST_GLOBAL, FIRST_LAYER, LAYER_WORDS, CHANNELS, WORDS, HEADER_WORDS
};
constexpr int64_t PACKED_VERSION = 1, GLOBAL_SECTIONS = 10, LAYER_SECTIONS = 24;
constexpr int64_t MOST_TAPS = 128, MOST_LOOKUPS = 4096, MOST_LAYERS = 4096, MOST_HEAD_WIDTH = 1024;

struct Tap {
    int64_t dt, dy, dx;
};

struct Taps {
    const Tap* all;
    int64_t past, now;  // those of earlier frames come first

    const Tap* present() const { return all + past; }
};

struct Layer {
    Matrix v_past, v_now, h_past, h_now, cond, link, out, qkv, att_out;
    const float *v_bias, *h_bias, *out_bias, *qkv_bias, *qkv_position, *att_bias;
    int64_t attention;  // how many layers below have attention; -1: this one has none
};

struct Model {
    const uint8_t* weights;
    const int64_t* table;
    int64_t K, C, S, L, Cc, A, E, D, r, frames, attentions;
    float query_scale;
    bool axial, short_cache;  // keys and values in bfloat16
    Taps input_v, input_h, vertical, horizontal;
    const float *table_v, *bias_v, *table_h, *bias_h, *head1_bias, *head2_bias;
    Matrix head1, head2;
    Layer* layers;

    const float* floats(int64_t at) const { return at < 0 ? nullptr : (const float*)(weights + at); }

    Matrix matrix(const int64_t* words, int64_t taps, int64_t rows) const {
        return {words[0] < 0 ? nullptr : weights + words[0], floats(words[1]), taps, rows, (int32_t)table[WEIGHT_TYPE]};
    }
};

// Everything but the layers, which need memory. False for a table that describes no model.
inline bool read_model(const uint8_t* weights, const int64_t* table, int64_t words, Model& model) {
    if (words < HEADER_WORDS || table[VERSION] != PACKED_VERSION || table[WORDS] != words) return false;
    const int64_t* t = table;
    const int64_t taps = t[INPUT_V_PAST] + t[INPUT_V_NOW] + t[INPUT_H_PAST] + t[INPUT_H_NOW] + t[V_PAST] + t[V_NOW] +
                         t[H_PAST] + t[H_NOW];
    for (int word = INPUT_V_PAST; word <= H_NOW; ++word)
        if (t[word] < 0 || t[word] > (word < V_PAST ? MOST_LOOKUPS : MOST_TAPS)) return false;
    const bool whole = t[FIRST_TAP] == HEADER_WORDS && t[FIRST_GLOBAL] == t[FIRST_TAP] + 3 * taps &&
                       t[FIRST_LAYER] == t[FIRST_GLOBAL] + GLOBAL_SECTIONS && t[LAYER_WORDS] == LAYER_SECTIONS &&
                       t[LAYERS] >= 0 && t[LAYERS] <= MOST_LAYERS &&
                       words == t[FIRST_LAYER] + t[LAYERS] * LAYER_SECTIONS;
    if (!whole || t[CODES] < 1 || t[WIDTH] < 8 || t[WIDTH] % 8 || t[STRIDE] != (t[WIDTH] + 15) / 16 * 16 ||
        t[CONDITION_CHANNELS] < 0 || t[HEADS] < 0 || t[HEAD_STRIDE] % 8 ||
        t[HEAD_STRIDE] < 0 || t[HEAD_STRIDE] > MOST_HEAD_WIDTH || t[RADIUS] < 0 || t[FRAMES_SEEN] < 1)
        return false;
    model.weights = weights;
    model.table = table;
    model.K = t[CODES], model.C = t[WIDTH], model.S = t[STRIDE], model.L = t[LAYERS];
    model.Cc = t[CONDITION_CHANNELS], model.A = t[HEADS], model.E = t[HEAD_STRIDE], model.D = t[HEADS] * t[HEAD_STRIDE];
    model.r = t[RADIUS], model.frames = t[FRAMES_SEEN];
    model.axial = t[WAVEFRONT] != 0;
    model.short_cache = t[WEIGHT_TYPE] != 0;
    model.query_scale = t[HEAD_WIDTH] > 0 ? 1 / __builtin_sqrtf((float)t[HEAD_WIDTH]) : 1;
    const Tap* tap = (const Tap*)(t + t[FIRST_TAP]);
    model.input_v = {tap, t[INPUT_V_PAST], t[INPUT_V_NOW]};
    model.input_h = {tap += t[INPUT_V_PAST] + t[INPUT_V_NOW], t[INPUT_H_PAST], t[INPUT_H_NOW]};
    model.vertical = {tap += t[INPUT_H_PAST] + t[INPUT_H_NOW], t[V_PAST], t[V_NOW]};
    model.horizontal = {tap + t[V_PAST] + t[V_NOW], t[H_PAST], t[H_NOW]};
    const int64_t* g = t + t[FIRST_GLOBAL];
    model.table_v = model.floats(g[0]), model.bias_v = model.floats(g[1]);
    model.table_h = model.floats(g[2]), model.bias_h = model.floats(g[3]);
    model.head1 = model.matrix(g + 4, 1, model.C), model.head1_bias = model.floats(g[6]);
    model.head2 = model.matrix(g + 7, 1, model.C), model.head2_bias = model.floats(g[9]);
    model.attentions = 0;
    for (int64_t l = 0; l < model.L; ++l) model.attentions += t[t[FIRST_LAYER] + l * LAYER_SECTIONS + 14] >= 0;
    return true;
}

inline void read_layers(Model& model, Layer* layers) {
    const int64_t C = model.C, D = model.D;
    model.layers = layers;
    int64_t attentions = 0;
    for (int64_t l = 0; l < model.L; ++l) {
        const int64_t* w = model.table + model.table[FIRST_LAYER] + l * LAYER_SECTIONS;
        Layer& layer = layers[l];
        layer.v_past = model.matrix(w + 0, model.vertical.past, C);
        layer.v_now = model.matrix(w + 2, model.vertical.now, C);
        layer.h_past = model.matrix(w + 4, model.horizontal.past, C);
        layer.h_now = model.matrix(w + 6, model.horizontal.now, C);
        layer.cond = model.matrix(w + 8, 1, model.Cc);
        layer.link = model.matrix(w + 10, 1, 2 * C);
        layer.out = model.matrix(w + 12, 1, C);
        layer.qkv = model.matrix(w + 14, 1, C);
        layer.att_out = model.matrix(w + 16, 1, D);
        layer.v_bias = model.floats(w[18]), layer.h_bias = model.floats(w[19]), layer.out_bias = model.floats(w[20]);
        layer.qkv_bias = model.floats(w[21]), layer.qkv_position = model.floats(w[22]);
        layer.att_bias = model.floats(w[23]);
        layer.attention = w[14] >= 0 ? attentions++ : -1;
    }
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
