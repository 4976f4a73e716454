// How one call is cut: columns into panels, the sum into groups, positions into blocks of tiles.
#pragma once

#include "common/numbers.h"
#include "common/scratch.h"
#include "gated_causal_conv/cpu.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t PANEL = 2 * LANES;      // columns of a panel
constexpr int64_t MOST_BLOCK = 192;       // positions whose sums of one panel are in progress at once
constexpr int64_t MOST_GROUP = 256;       // products that are summed before the sum joins the total
constexpr int64_t WIDE = 8;               // panels that are packed together
constexpr int64_t THREAD_WORK = 1 << 19;  // multiply-adds, about 10 microseconds: less is not worth another thread
static_assert(MOST_BLOCK % TILE_ROWS == 0);

// Products that are summed in registers: elements [begin, end) of the rows of taps [first, last). What is in a group
// depends on the number of taps and of channels alone, so a position's result depends on nothing else.
struct Group {
    int64_t first, last, begin, end;
};

struct Plan {
    ConvCall call;
    int64_t channels;             // of out
    int64_t panels, panel_width;  // panel_width: channels of `out` that a panel makes
    int64_t N, block, blocks;     // positions, in the order t, b, y, x
    int64_t groups, taps_of_group, parts_of_tap;
    int64_t pieces_of_block;
    int threads;
    bool ahead;                // all panels are packed before anything is multiplied, else where they are used
    int64_t together;          // panels whose sums of one block are in progress at once
    bool staged;               // x is copied to float32 rows first, as far as it is read
    int64_t low[3], extent[3];  // the part of x that is read
    int64_t x_strides[4], x_start;  // of the rows that are read: B, T, H, W; of element [0, 0, 0, 0] of x
    const float* rows;
    float* packed;  // [panels][taps][Cin][PANEL]
    float* staging;  // [B, extent.., Cin]
    float* bias;    // [panels][PANEL]
    float* zeros;   // [Cin]: a row outside the grid
    int64_t next_piece, next_matrix, next_line;  // taken by whoever is free

    void cut(Cutter& cutter) {
        const int64_t rows_read = call.B * extent[0] * extent[1] * extent[2];
        packed = cutter.cut<float>(ahead ? panels * call.taps * call.Cin * PANEL : 0);
        staging = cutter.cut<float>(staged ? rows_read * call.Cin : 0);
        bias = cutter.cut<float>(panels * PANEL);
        zeros = cutter.cut<float>(call.Cin);
    }

    // Most rows of a panel that belong to one group.
    int64_t group_rows() const {
        return parts_of_tap > 1 ? (call.Cin + parts_of_tap - 1) / parts_of_tap : taps_of_group * call.Cin;
    }

    Group group(int64_t g) const {
        if (parts_of_tap == 1) {
            const int64_t first = g * taps_of_group, last = first + taps_of_group;
            return {first, last < call.taps ? last : call.taps, 0, call.Cin};
        }
        const int64_t tap = g / parts_of_tap, part = g % parts_of_tap;
        return {tap, tap + 1, part * call.Cin / parts_of_tap, (part + 1) * call.Cin / parts_of_tap};
    }
};

// The column that is lane `lane` of a panel, or -1. With a gate, a panel holds channels of the first half and, behind
// them, the same channels of the second half.
inline int64_t column_of(const Plan& plan, int64_t panel, int64_t lane) {
    if (plan.call.activation == PLAIN) {
        const int64_t column = panel * PANEL + lane;
        return column < plan.call.Cout ? column : -1;
    }
    const int64_t channel = panel * LANES + lane % LANES;
    return channel >= plan.channels ? -1 : lane < LANES ? channel : plan.channels + channel;
}

inline int64_t at_most(int64_t value, int64_t most) { return value < most ? value : most; }

inline int64_t at_least(int64_t value, int64_t least) { return value > least ? value : least; }

// The part of x that some tap of some position reads; at least one element of every axis that is not empty.
inline void find_part(Plan& plan) {
    const ConvCall& call = plan.call;
    for (int axis = 0; axis < 3; ++axis) {
        int64_t least = INT64_MAX, most = INT64_MIN;
        for (int64_t i = 0; i < call.taps; ++i) {
            const int64_t offset = call.offsets[3 * i + axis];
            least = at_most(offset, least);
            most = at_least(offset, most);
        }
        const int64_t low = call.taps ? at_least(call.origin[axis] + least, 0) : 0;
        const int64_t high = call.taps ? at_most(call.origin[axis] + call.size[axis] + most, call.in[axis]) : 0;
        plan.low[axis] = low;
        plan.extent[axis] = at_least(high - low, 0);
    }
}

inline void plan_rows(Plan& plan) {
    const ConvCall& call = plan.call;
    const View& x = call.x;
    find_part(plan);
    plan.staged = x.type != FLOAT32 || (x.strides[4] != 1 && call.Cin > 1);
    if (plan.staged) {
        const int64_t* extent = plan.extent;
        const int64_t line = extent[2] * call.Cin;
        const int64_t strides[] = {extent[0] * extent[1] * line, extent[1] * line, line, call.Cin};
        for (int axis = 0; axis < 4; ++axis) plan.x_strides[axis] = strides[axis];
        plan.x_start = -(plan.low[0] * strides[1] + plan.low[1] * strides[2] + plan.low[2] * strides[3]);
    } else {
        for (int axis = 0; axis < 4; ++axis) plan.x_strides[axis] = x.strides[axis];
        plan.x_start = 0;
    }
}

inline void make_plan(Plan& plan) {
    const ConvCall& call = plan.call;
    plan.channels = call.activation == PLAIN ? call.Cout : call.Cout / 2;
    plan.panel_width = call.activation == PLAIN ? PANEL : LANES;
    plan.panels = (plan.channels + plan.panel_width - 1) / plan.panel_width;
    plan.N = call.B * call.size[0] * call.size[1] * call.size[2];
    plan.blocks = (plan.N + MOST_BLOCK - 1) / MOST_BLOCK;
    const int64_t block = plan.blocks ? (plan.N + plan.blocks - 1) / plan.blocks : 0;
    plan.block = (block + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    plan.blocks = plan.blocks ? (plan.N + plan.block - 1) / plan.block : 0;
    plan.parts_of_tap = call.Cin > MOST_GROUP ? (call.Cin + MOST_GROUP - 1) / MOST_GROUP : 1;
    plan.taps_of_group = call.Cin > 0 && call.Cin < MOST_GROUP ? MOST_GROUP / call.Cin : 1;
    plan.groups = plan.parts_of_tap > 1 ? call.taps * plan.parts_of_tap
                                        : (call.taps + plan.taps_of_group - 1) / plan.taps_of_group;
    plan.ahead = plan.blocks > 1;
    plan.together = plan.ahead ? 1 : at_most(WIDE, plan.panels);
    const int64_t work = plan.N * call.taps * call.Cin * call.Cout;
    plan.threads = (int)at_most(call.threads, 1 + work / THREAD_WORK);
    // one thread takes a block at once; several even out by smaller pieces, but what is packed at use is packed wide
    const int64_t wanted = plan.threads < 2 ? 1 : (plan.ahead ? 8 : 2) * (int64_t)plan.threads;
    plan.pieces_of_block = plan.blocks ? at_most((wanted + plan.blocks - 1) / plan.blocks, plan.panels) : 1;
    plan_rows(plan);
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
