// How one call is cut: columns into panels, panels into groups, tiles into blocks, and where a tile reads and writes.
#pragma once

#include "common/scratch.h"
#include "image_conv/cpu.h"
#include "image_conv/cpu_winograd.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t SLAB_FLOATS = 48 << 10;           // of transformed tiles, all points: a part of the L2 cache
constexpr int64_t LEAST_BLOCK = 48, MOST_BLOCK = 96;  // tiles that a fetched weight serves
constexpr int64_t SLICE_FLOATS = 2 << 20;           // of packed weights at a time: a part of the last cache
constexpr int64_t MOST_GROUP = 4;                   // panels that pass over a block point by point
constexpr int64_t PIECE_ROWS = 128;                 // of a panel, packed by one piece
constexpr int64_t THREAD_WORK = 1 << 18;  // multiply-adds of the definition, about 10 microseconds: less is no gain
constexpr int64_t LINE = 16;              // floats: keeps arrays that are written together out of one cache set

inline int64_t at_most(int64_t value, int64_t most) { return value < most ? value : most; }

inline int64_t at_least(int64_t value, int64_t least) { return value > least ? value : least; }

inline int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Where a tile's first output begins, in elements, and whether it has all four.
struct Place {
    int64_t out, residual;
    bool two_rows, two_columns;
};

// What one thread needs.
struct Scratch {
    float* tiles;        // [POINTS][block][width], the points point_step apart
    const float** rows;  // [POINTS][block]: of the tiles
    float* sums;         // [group][POINTS][block][PANEL], the points panel_step apart
    Place* places;       // [block]
    int64_t block;       // whose tiles these are
};

struct Plan {
    ImageCall call;
    int64_t rows, columns, tiles;  // of 2 x 2 outputs: down an image, along it, in all
    int64_t panels, group, parts;  // group: panels that pass over a block point by point; parts: of packing one panel
    int64_t slice, first_panel, last_panel;  // panels that are packed and then multiplied, and which those are now
    int64_t block, blocks, pieces_of_block;
    int64_t width;  // floats of a transformed position: Cin in whole vectors
    // from point to point of a panel's weights, of a block's transformed tiles and of its products with a panel
    int64_t packed_step, point_step, panel_step;
    int threads;
    float* packed;  // [slice][POINTS][Cin][PANEL], the points packed_step apart
    float* zeros;   // [width]: a position outside
    float* bias;    // [panels][PANEL]
    char* scratches;
    size_t scratch_bytes;
    int64_t next_part, next_piece, next_scratch;  // taken by whoever is free

    Scratch cut_scratch(Cutter& cutter) const {
        Scratch scratch;
        scratch.tiles = cutter.cut<float>(POINTS * point_step);
        scratch.rows = cutter.cut<const float*>(POINTS * block);
        scratch.sums = cutter.cut<float>(group * POINTS * panel_step);
        scratch.places = cutter.cut<Place>(block);
        scratch.block = -1;
        return scratch;
    }

    void cut(Cutter& cutter) {
        Cutter one;
        cut_scratch(one);
        scratch_bytes = one.used;
        packed = cutter.cut<float>(slice * POINTS * packed_step);
        zeros = cutter.cut<float>(width);
        bias = cutter.cut<float>(panels * PANEL);
        scratches = cutter.cut<char>(threads * (int64_t)scratch_bytes);
    }

    Scratch scratch(int64_t number) const {
        Cutter cutter{scratches + number * (int64_t)scratch_bytes};
        return cut_scratch(cutter);
    }

    float* packed_panel(int64_t panel) const { return packed + (panel - first_panel) * POINTS * packed_step; }
};

inline void make_plan(Plan& plan) {
    const ImageCall& call = plan.call;
    plan.rows = divide_up(call.H, 2);
    plan.columns = divide_up(call.W, 2);
    plan.tiles = call.N * plan.rows * plan.columns;
    plan.panels = divide_up(call.Cout, PANEL);
    plan.group = at_most(MOST_GROUP, plan.panels);
    plan.parts = divide_up(call.Cin, PIECE_ROWS);
    plan.width = divide_up(call.Cin, LANES) * LANES;
    const int64_t fitting = at_most(at_least(SLAB_FLOATS / (POINTS * plan.width), LEAST_BLOCK), MOST_BLOCK);
    plan.blocks = divide_up(plan.tiles, fitting);
    plan.block = plan.blocks ? divide_up(divide_up(plan.tiles, plan.blocks), TILE_ROWS) * TILE_ROWS : 0;
    plan.blocks = plan.blocks ? divide_up(plan.tiles, plan.block) : 0;
    plan.packed_step = call.Cin * PANEL + LINE;
    plan.slice = at_least(at_most(SLICE_FLOATS / (POINTS * plan.packed_step), plan.panels), plan.group);
    plan.point_step = plan.block * plan.width + LINE;
    plan.panel_step = plan.block * PANEL + LINE;
    const int64_t work = 9 * call.N * call.H * call.W * call.Cin * call.Cout;
    plan.threads = (int)at_most(call.threads, 1 + work / THREAD_WORK);
    // one thread takes a block at once; several even out by smaller pieces
    const int64_t wanted = plan.threads < 2 ? 1 : 8 * (int64_t)plan.threads;
    plan.pieces_of_block = plan.blocks ? at_most(divide_up(wanted, plan.blocks), divide_up(plan.slice, plan.group)) : 1;
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
