// The gated convolution on the CPU: packed weights, blocked sums, and the gate on the sums while they are near.
// README.md beside this file has the design; compiled once per instruction set level (see common/simd.h).
#include "gated_causal_conv/cpu.h"

#include "common/pages.h"
#include "common/pool.h"
#include "gated_causal_conv/cpu_pack.h"
#include "gated_causal_conv/cpu_plan.h"
#include "gated_causal_conv/cpu_tile.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// What one thread needs.
struct Scratch {
    const float** rows;  // [taps][block] rows of x, or of zeros
    uint8_t* live;       // [tiles of a block][taps]: whether a tap reads anything
    float* sums;         // [block][PANEL]
    Place* places;       // [block]
    float* packed;       // one group of one panel, unless all are packed ahead
    int64_t block = -1;  // whose rows these are

    void cut(Cutter& cutter, const Plan& plan) {
        const int64_t taps = plan.call.taps, group = plan.parts_of_tap > 1 ? MOST_GROUP : plan.taps_of_group * plan.call.Cin;
        rows = cutter.cut<const float*>(taps * plan.block);
        live = cutter.cut<uint8_t>(taps * (plan.block / TILE_ROWS));
        sums = cutter.cut<float>(plan.block * PANEL);
        places = cutter.cut<Place>(plan.block);
        packed = cutter.cut<float>(plan.ahead ? 0 : group * PANEL);
    }
};

int64_t place_in(const View& view, int64_t b, int64_t t, int64_t y, int64_t x) {
    return b * view.strides[0] + t * view.strides[1] + y * view.strides[2] + x * view.strides[3];
}

// Where position n reads and writes; `slot` is its number in the block.
void find_position(const Plan& plan, Scratch& scratch, int64_t n, int64_t slot) {
    const ConvCall& call = plan.call;
    const int64_t x = n % call.size[2], y = n / call.size[2] % call.size[1];
    const int64_t frame = n / call.size[2] / call.size[1], b = frame % call.B, t = frame / call.B;
    scratch.places[slot] = {place_in(call.out, b, t, y, x), place_in(call.pre, b, t, y, x),
                            place_in(call.addend, b, t, y, x), place_in(call.residual, b, t, y, x)};
    uint8_t* live = scratch.live + slot / TILE_ROWS * call.taps;
    for (int64_t i = 0; i < call.taps; ++i) {
        const int32_t* offset = call.offsets + 3 * i;
        const int64_t at[] = {call.origin[0] + t + offset[0], call.origin[1] + y + offset[1],
                              call.origin[2] + x + offset[2]};
        bool inside = true;
        for (int axis = 0; axis < 3; ++axis) inside &= (uint64_t)at[axis] < (uint64_t)call.in[axis];
        const int64_t row = b * plan.x_strides[0] + at[0] * plan.x_strides[1] + at[1] * plan.x_strides[2] +
                            at[2] * plan.x_strides[3];
        scratch.rows[i * plan.block + slot] = inside ? plan.rows + plan.x_start + row : plan.zeros;
        live[i] |= inside;
    }
}

void find_block(const Plan& plan, Scratch& scratch, int64_t block, int64_t count) {
    if (scratch.block == block) return;
    scratch.block = block;
    __builtin_memset(scratch.live, 0, (size_t)(plan.call.taps * (plan.block / TILE_ROWS)));
    for (int64_t slot = 0; slot < count; ++slot) find_position(plan, scratch, block * plan.block + slot, slot);
}

// Whether a panel of the weights can be read where it lies.
bool readable(const Plan& plan, int64_t panel) {
    const Matrices& weight = plan.call.weight;
    return plan.N <= MOST_UNPACKED && weight.type == FLOAT32 && weight.strides[2] == 1 &&
           column_of(plan, panel, LANES - 1) >= 0 && column_of(plan, panel, PANEL - 1) >= 0;
}

Weights weights_of(const Plan& plan, Scratch& scratch, int64_t panel, const Group& group) {
    const ConvCall& call = plan.call;
    const int64_t whole = call.Cin * PANEL, width = group.end - group.begin;
    if (plan.ahead)
        return {plan.packed + (panel * call.taps + group.first) * whole + group.begin * PANEL, LANES, PANEL, whole};
    if (readable(plan, panel)) {
        const int64_t* strides = call.weight.strides;
        const int64_t first = column_of(plan, panel, 0);
        return {(const float*)call.weight.data + group.first * strides[0] + group.begin * strides[1] + first,
                column_of(plan, panel, LANES) - first, strides[1], strides[0]};
    }
    for (int64_t tap = group.first; tap < group.last; ++tap)
        pack_rows(plan, panel, tap, group.begin, group.end, scratch.packed + (tap - group.first) * width * PANEL);
    return {scratch.packed, LANES, PANEL, width * PANEL};
}

void multiply_panel(const Plan& plan, Scratch& scratch, int64_t panel, int64_t count) {
    const int64_t taps = plan.call.taps;
    __builtin_memset(scratch.sums, 0, (size_t)(count * PANEL) * sizeof(float));
    for (int64_t g = 0; g < plan.groups; ++g) {
        const Group group = plan.group(g);
        const Weights weights = weights_of(plan, scratch, panel, group);
        for (int64_t slot = 0; slot < count; slot += TILE_ROWS)
            add_rows<TILE_ROWS>(at_most(count - slot, TILE_ROWS), scratch.rows + group.first * plan.block + slot,
                                plan.block, scratch.live + slot / TILE_ROWS * taps + group.first, group, weights,
                                scratch.sums + slot * PANEL);
    }
    for (int64_t slot = 0; slot < count; ++slot)
        finish(plan, panel, scratch.places[slot], scratch.sums + slot * PANEL);
}

void multiply_pieces(void* context) {
    Plan& plan = *(Plan*)context;
    Scratch scratch;
    Cutter sizes;
    scratch.cut(sizes, plan);
    Memory memory;
    if (!memory.take(sizes.used)) return;  // the others do its share
    Cutter cutter{(char*)memory.block};
    scratch.cut(cutter, plan);
    const int64_t pieces = plan.blocks * plan.pieces_of_block;
    for (;;) {
        const int64_t piece = __atomic_fetch_add(&plan.next_piece, 1, __ATOMIC_RELAXED);
        if (piece >= pieces) return;
        // later frames have more behind them: the short pieces come last, where they even out
        const int64_t block = plan.blocks - 1 - piece / plan.pieces_of_block, part = piece % plan.pieces_of_block;
        const int64_t count = at_most(plan.N - block * plan.block, plan.block);
        find_block(plan, scratch, block, count);
        const int64_t first = part * plan.panels / plan.pieces_of_block;
        const int64_t last = (part + 1) * plan.panels / plan.pieces_of_block;
        for (int64_t panel = first; panel < last; ++panel) multiply_panel(plan, scratch, panel, count);
    }
}

void prepare(void* context) {
    Plan& plan = *(Plan*)context;
    const int64_t Cin = plan.call.Cin, taps = plan.call.taps;
    const int64_t matrices = plan.ahead ? plan.panels * taps : 0;
    const int64_t lines = plan.staged ? plan.call.B * plan.extent[0] * plan.extent[1] : 0;
    for (;;) {
        const int64_t i = __atomic_fetch_add(&plan.next_panel_tap, 1, __ATOMIC_RELAXED);
        if (i >= matrices) break;
        pack_rows(plan, i / taps, i % taps, 0, Cin, plan.packed + i * Cin * PANEL);
    }
    for (;;) {
        const int64_t line = __atomic_fetch_add(&plan.next_line, 1, __ATOMIC_RELAXED);
        if (line >= lines) return;
        stage(plan, line);
    }
}

}  // namespace

Outcome gated_causal_conv(const ConvCall& call) {
    Plan plan = {};
    plan.call = call;
    make_plan(plan);
    if (plan.N == 0 || plan.panels == 0) return DONE;
    Cutter sizes;
    plan.cut(sizes);
    Memory memory;
    if (!memory.take(sizes.used)) return NO_MEMORY;
    Cutter cutter{(char*)memory.block};
    plan.cut(cutter);
    plan.rows = plan.staged ? plan.staging : (const float*)call.x.data;
    expect_to_fill(memory.block, sizes.used);
    __builtin_memset(plan.zeros, 0, (size_t)call.Cin * sizeof(float));
    for (int64_t i = 0; i < plan.panels * PANEL; ++i)
        plan.bias[i] = bias_at(call, column_of(plan, i / PANEL, i % PANEL));
    if (plan.ahead || plan.staged) run_together(call.threads, prepare, &plan);
    const int64_t pieces = plan.blocks * plan.pieces_of_block;
    run_together(pieces < call.threads ? (int)pieces : call.threads, multiply_pieces, &plan);
    // no piece is left unless every thread went without memory
    return plan.next_piece < pieces ? NO_MEMORY : DONE;
}

}  // namespace fastvid::FASTVID_LEVEL
