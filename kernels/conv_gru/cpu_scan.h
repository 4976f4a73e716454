// What the forward and the reverse scan share: vectors of channels in memory, and memory for weights and products.
#pragma once

#include "common/math.h"
#include "conv_gru/cpu.h"
#include "conv_gru/cpu_product.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// LANES channels, of which `count` exist; the others are nought.
template <class T>
inline Floats read(const T* from, int64_t count) {
    float lanes[LANES];
    if (count >= LANES)
        for (int i = 0; i < LANES; ++i) lanes[i] = widen(from[i]);
    else
        for (int i = 0; i < LANES; ++i) lanes[i] = i < count ? widen(from[i]) : 0.0f;
    return load<Floats>(lanes);
}

template <>
inline Floats read<float>(const float* from, int64_t count) {
    if (count >= LANES) return load<Floats>(from);
    float lanes[LANES] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
    return load<Floats>(lanes);
}

template <class T>
inline void write(T* to, Floats value, int64_t count) {
    float lanes[LANES];
    store(lanes, value);
    for (int64_t i = 0; i < at_most(count, LANES); ++i) narrow(lanes[i], to[i]);
}

template <>
inline void write<float>(float* to, Floats value, int64_t count) {
    if (count >= LANES) return store(to, value);
    float lanes[LANES];
    store(lanes, value);
    for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// What the type's memory would give back.
template <class T>
inline Floats rounded(Floats value) {
    T there[LANES];
    write(there, value, LANES);
    return read(there, LANES);
}

inline int64_t padded(int64_t channels) { return divide_up(channels, PANEL) * PANEL; }

// Two convolutions that take turns, their weights, and what is packed by whom.
struct Turns {
    const Map& map;
    Weights weights[2];
    Product products[2];
    float* packed[2];
    float* shared;
    Desks desks;
    int32_t type;
    int threads;

    Turns(const Map& map, const Weights& first, const Weights& second, int32_t type, int most_threads)
        : map(map), weights{first, second}, type(type) {
        const int64_t work = map.N * map.matrices * first.all_rows() * first.panels() * PANEL;
        threads = (int)at_most(most_threads, 1 + work / THREAD_WORK);
        for (int i = 0; i < 2; ++i) products[i].plan(map, weights[i], threads);
    }

    void cut(Cutter& cutter) {
        int64_t most = 0, in_common = 0;
        for (int i = 0; i < 2; ++i) {
            packed[i] = cutter.cut<float>(products[i].packed_floats());
            const int64_t floats = products[i].transformed_floats();
            if (products[i].in_common())
                in_common = floats > in_common ? floats : in_common;
            else
                most = floats > most ? floats : most;
        }
        shared = cutter.cut<float>(in_common * map.blocks);
        desks.cut(cutter, threads, most);
        for (int i = 0; i < 2; ++i) {
            products[i].packed = packed[i];
            products[i].shared = shared;
        }
    }

    static void pack_piece(void* turns, int64_t i) {
        const Turns& of = *(const Turns*)turns;
        const int which = i >= of.products[0].panels;
        const int64_t panel = which ? i - of.products[0].panels : i;
        if (of.type == FLOAT32)
            pack_panel<float>(of.weights[which], of.map, panel, of.packed[which]);
        else
            pack_panel<BFloat16>(of.weights[which], of.map, panel, of.packed[which]);
    }

    void pack(Crew& crew) { crew.each(products[0].panels + products[1].panels, pack_piece, this); }
};

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
