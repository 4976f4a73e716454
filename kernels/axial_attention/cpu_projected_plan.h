// How a call with projections is cut: heads into groups, columns into panels, boxes into blocks.
#pragma once

#include "axial_attention/cpu_boxes.h"
#include "axial_attention/cpu_line.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t WANTED_POSITIONS = 96;  // positions of a block: enough that a panel is worth fetching
constexpr int64_t MOST_HEADS = 8;  // heads whose queries, keys and values are in scratch at once
constexpr int64_t THREAD_WORK = 1 << 19;  // multiply-adds, about 10 microseconds: less is not worth another thread

inline int64_t bytes_of(int32_t type) { return type == FLOAT32 ? 4 : 2; }

inline int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Positions are numbered box by box, in raster order inside a box.
struct Plan {
    SelfAttentionCall call;
    Task task;             // of a head in a box, on rows of `width` and of `hidden`
    int64_t n, N;          // positions of a box, and of all
    int64_t head_width;    // columns of a head: its query, its key, its value
    int64_t together, groups;  // heads of a group; groups
    int64_t group_panels, width;  // panels of a group's columns, and the columns with those that fill them up
    int64_t hidden, out_panels;   // A * D; panels of Cout
    int64_t block, blocks;  // positions of a block, blocks
    bool whole;             // a block is whole boxes, so that it can be finished by itself
    bool staged;            // rows of x are copied to float32 first
    int threads;
    int64_t *x_at, *out_at;        // [n] from the first position of a box to each
    int64_t *row_at, *hidden_at;   // [n] the same in the rows of a group, and in `hidden`
    float* packed_in;              // [groups][group_panels][C][PANEL]
    float* packed_out;             // [out_panels][hidden][PANEL]
    float* bias;                   // [out_panels][PANEL]
    float *all_projected, *all_hidden;  // [groups][N][width] and [N][hidden], unless blocks are whole
    int64_t next[4];  // panel, block, head of a box, block: taken by whoever is free

    void cut(Cutter& cutter) {
        x_at = cutter.cut<int64_t>(n);
        out_at = cutter.cut<int64_t>(n);
        row_at = cutter.cut<int64_t>(n);
        hidden_at = cutter.cut<int64_t>(n);
        packed_in = cutter.cut<float>(groups * group_panels * call.C * PANEL);
        packed_out = cutter.cut<float>(out_panels * hidden * PANEL);
        bias = cutter.cut<float>(out_panels * PANEL);
        all_projected = cutter.cut<float>(whole ? 0 : groups * N * width);
        all_hidden = cutter.cut<float>(whole ? 0 : N * hidden);
    }

    int64_t heads_of(int64_t group) const { return at_most(call.A - group * together, together); }
};

// The fewest heads whose columns leave little of their panels empty.
inline int64_t heads_together(int64_t head_width, int64_t A) {
    int64_t best = 1, least = INT64_MAX;
    for (int64_t heads = 1; heads <= at_most(A, MOST_HEADS) && least > 4; ++heads) {
        const int64_t columns = heads * head_width, empty = parts_of(columns, PANEL) * PANEL - columns;
        const int64_t share = 64 * empty / columns;
        if (share < least) best = heads;
        least = at_most(share, least);
    }
    return best;
}

// Whole boxes of about WANTED_POSITIONS positions, in tiles of which few rows are missing.
inline int64_t positions_together(int64_t n, int64_t boxes) {
    int64_t best = 1, least = INT64_MAX;
    const int64_t first = at_least(WANTED_POSITIONS / 2 / n, 1), last = at_most(boxes, 2 * WANTED_POSITIONS / n);
    for (int64_t count = first; count <= last; ++count) {
        const int64_t positions = count * n, missing = parts_of(positions, TILE_ROWS) * TILE_ROWS - positions;
        const int64_t share = 256 * missing / positions;
        if (share < least || (share == least && positions <= WANTED_POSITIONS)) best = count;
        least = at_most(share, least);
    }
    return at_most(best, boxes) * n;
}

inline void plan_blocks(Plan& plan, int64_t boxes) {
    const SelfAttentionCall& call = plan.call;
    const int64_t projections = call.A * plan.head_width * call.C + plan.hidden * call.Cout;
    const int64_t work = plan.N * (projections + plan.n * call.A * (call.E + call.D));
    plan.threads = (int)at_most(call.threads, 1 + work / THREAD_WORK);
    const int64_t wanted = 4 * plan.threads;  // that many blocks even out
    plan.whole = plan.threads == 1 || boxes >= wanted;
    if (plan.whole) {
        const int64_t share = plan.threads == 1 ? boxes : boxes / wanted;
        plan.block = positions_together(plan.n, share);
    } else {
        plan.block = parts_of(at_most(parts_of(plan.N, wanted), WANTED_POSITIONS), TILE_ROWS) * TILE_ROWS;
    }
    plan.blocks = parts_of(plan.N, plan.block);
}

inline void make_plan(Plan& plan) {
    const SelfAttentionCall& call = plan.call;
    const int64_t boxes = call.B * volume(call.cells);
    plan.n = volume(call.box);
    plan.N = boxes * plan.n;
    plan.head_width = 2 * call.E + call.D;
    plan.together = heads_together(plan.head_width, call.A);
    plan.groups = parts_of(call.A, plan.together);
    plan.group_panels = parts_of(plan.together * plan.head_width, PANEL);
    plan.width = plan.group_panels * PANEL;
    plan.hidden = call.A * call.D;
    plan.out_panels = parts_of(call.Cout, PANEL);
    plan.staged = call.x.type != FLOAT32 || (call.x.strides[4] != 1 && call.C > 1);
    if (plan.N) plan_blocks(plan, boxes);
}

// What is the same for every box; the tables of `plan` exist.
inline void fill_tables(Plan& plan) {
    const SelfAttentionCall& call = plan.call;
    const int64_t *x = call.x.strides, *out = call.out.strides, *box = call.box;
    for (int64_t i = 0; i < plan.n; ++i) {
        const int64_t column = i % box[2], line = i / box[2], row = line % box[1], frame = line / box[1];
        plan.x_at[i] = frame * x[1] + row * x[2] + column * x[3];
        plan.out_at[i] = frame * out[1] + row * out[2] + column * out[3];
        plan.row_at[i] = i * plan.width;
        plan.hidden_at[i] = i * plan.hidden;
    }
    plan.task = {};
    plan.task.q = plan.task.k = plan.task.v = {plan.row_at, 1, FLOAT32};
    plan.task.out = {plan.hidden_at, 1, FLOAT32};
    plan.task.n = plan.task.m = plan.n;
    plan.task.E = call.E;
    plan.task.D = call.D;
    plan.task.scale = call.scale;
    plan.task.mask = call.mask;
}

// Where a box begins in a tensor, in elements.
inline int64_t begin_of(const SelfAttentionCall& call, const Positions& tensor, int64_t box) {
    const int64_t *cells = call.cells, *size = call.box, *strides = tensor.strides;
    const int64_t line = box / cells[2], slab = line / cells[1];
    return slab / cells[0] * strides[0] + slab % cells[0] * size[0] * strides[1] +
           line % cells[1] * size[1] * strides[2] + box % cells[2] * size[2] * strides[3];
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
