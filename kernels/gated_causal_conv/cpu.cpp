// The gated convolution on the CPU: packed weights, blocked sums, and the gate on the sums while they are near.
// README.md beside this file has the design; compiled once per instruction set level (see common/simd.h).
#include "gated_causal_conv/cpu.h"

#include "common/pages.h"
#include "common/pool.h"
#include "gated_causal_conv/cpu_finish.h"
#include "gated_causal_conv/cpu_pack.h"
#include "gated_causal_conv/cpu_plan.h"
#include "gated_causal_conv/cpu_tile.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// What one thread needs.
struct Scratch {
    const float** rows;  // [taps][block] rows of x, or of zeros
    uint8_t* live;       // [tiles of a block][taps]: whether a tap reads anything
    float* sums;         // [together][block][PANEL]
    Place* places;       // [block]
    float* packed;       // [together][rows of a group][PANEL], unless all are packed ahead
    int64_t block = -1;  // whose rows these are

    void cut(Cutter& cutter, const Plan& plan) {
        const int64_t taps = plan.call.taps;
        rows = cutter.cut<const float*>(taps * plan.block);
        live = cutter.cut<uint8_t>(taps * (plan.block / TILE_ROWS));
        sums = cutter.cut<float>(plan.together * plan.block * PANEL);
        places = cutter.cut<Place>(plan.block);
        packed = cutter.cut<float>(plan.ahead ? 0 : plan.together * plan.group_rows() * PANEL);
    }
};

int64_t place_in(const View& view, int64_t b, int64_t t, int64_t y, int64_t x) {
    return b * view.strides[0] + t * view.strides[1] + y * view.strides[2] + x * view.strides[3];
}

// The rows that tap i reads from `run` positions on, which are neighbours along x, the first at (b, t, y, x).
void find_rows(const Plan& plan, Scratch& scratch, int64_t i, int64_t b, int64_t t, int64_t y, int64_t x, int64_t slot,
               int64_t run) {
    const ConvCall& call = plan.call;
    const int32_t* offset = call.offsets + 3 * i;
    const float** rows = scratch.rows + i * plan.block + slot;
    t += call.origin[0] + offset[0];
    y += call.origin[1] + offset[1];
    x += call.origin[2] + offset[2];
    const bool inside = t >= 0 && t < call.in[0] && y >= 0 && y < call.in[1];
    const int64_t begin = inside ? at_most(at_least(-x, 0), run) : run;
    const int64_t end = inside ? at_least(at_most(call.in[2] - x, run), begin) : run;
    for (int64_t p = 0; p < begin; ++p) rows[p] = plan.zeros;
    for (int64_t p = end; p < run; ++p) rows[p] = plan.zeros;
    if (begin == end) return;
    const int64_t* strides = plan.x_strides;
    const int64_t start = plan.x_start + b * strides[0] + t * strides[1] + y * strides[2] + x * strides[3];
    for (int64_t p = begin; p < end; ++p) rows[p] = plan.rows + start + p * strides[3];
    for (int64_t tile = (slot + begin) / TILE_ROWS; tile <= (slot + end - 1) / TILE_ROWS; ++tile)
        scratch.live[tile * call.taps + i] = 1;
}

// Where the positions of a block read and write.
void find_block(const Plan& plan, Scratch& scratch, int64_t block, int64_t count) {
    if (scratch.block == block) return;
    scratch.block = block;
    const ConvCall& call = plan.call;
    __builtin_memset(scratch.live, 0, (size_t)(call.taps * (plan.block / TILE_ROWS)));
    for (int64_t slot = 0, run; slot < count; slot += run) {
        const int64_t n = block * plan.block + slot, x = n % call.size[2], line = n / call.size[2];
        const int64_t y = line % call.size[1], frame = line / call.size[1], b = frame % call.B, t = frame / call.B;
        run = at_most(call.size[2] - x, count - slot);
        for (int64_t p = 0; p < run; ++p)
            scratch.places[slot + p] = {place_in(call.out, b, t, y, x + p), place_in(call.pre, b, t, y, x + p),
                                        place_in(call.addend, b, t, y, x + p), place_in(call.residual, b, t, y, x + p)};
        for (int64_t i = 0; i < call.taps; ++i) find_rows(plan, scratch, i, b, t, y, x, slot, run);
    }
}

// The block's sums of one panel and group; weights: [taps][tap_stride].
void add_group(const Plan& plan, const Scratch& scratch, const Group& group, const float* weights, int64_t tap_stride,
               int64_t count, float* sums) {
    const float* const* rows = scratch.rows + group.first * plan.block;
    const uint8_t* live = scratch.live + group.first;
    for (int64_t slot = 0; slot < count; slot += TILE_ROWS)
        add_rows<TILE_ROWS>(at_most(count - slot, TILE_ROWS), rows + slot, plan.block,
                            live + slot / TILE_ROWS * plan.call.taps, group, weights, tap_stride, sums + slot * PANEL);
}

// Panels [first, last) of a block of `count` positions, `together` at most.
void multiply_panels(const Plan& plan, Scratch& scratch, int64_t first, int64_t last, int64_t count) {
    const int64_t Cin = plan.call.Cin, panel_sums = plan.block * PANEL;
    __builtin_memset(scratch.sums, 0, (size_t)((last - first) * panel_sums) * sizeof(float));
    for (int64_t g = 0; g < plan.groups; ++g) {
        const Group group = plan.group(g);
        const int64_t width = group.end - group.begin, here = plan.group_rows() * PANEL;
        for (int64_t tap = group.first; tap < group.last && !plan.ahead; ++tap)
            pack_rows(plan, first, last, tap, group.begin, group.end,
                      scratch.packed + (tap - group.first) * width * PANEL, here);
        for (int64_t panel = first; panel < last; ++panel) {
            const float* ahead = plan.packed + ((panel * plan.call.taps + group.first) * Cin + group.begin) * PANEL;
            const float* weights = plan.ahead ? ahead : scratch.packed + (panel - first) * here;
            add_group(plan, scratch, group, weights, (plan.ahead ? Cin : width) * PANEL, count,
                      scratch.sums + (panel - first) * panel_sums);
        }
    }
    for (int64_t panel = first; panel < last; ++panel)
        finish_panel(plan, panel, scratch.places, scratch.sums + (panel - first) * panel_sums, count);
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
        for (int64_t panel = first; panel < last; panel += plan.together)
            multiply_panels(plan, scratch, panel, at_most(panel + plan.together, last), count);
    }
}

void prepare(void* context) {
    Plan& plan = *(Plan*)context;
    const int64_t Cin = plan.call.Cin, taps = plan.call.taps, stride = taps * Cin * PANEL;
    const int64_t wide = (plan.panels + WIDE - 1) / WIDE, matrices = plan.ahead ? wide * taps : 0;
    const int64_t lines = plan.staged ? plan.call.B * plan.extent[0] * plan.extent[1] : 0;
    for (;;) {
        const int64_t i = __atomic_fetch_add(&plan.next_matrix, 1, __ATOMIC_RELAXED);
        if (i >= matrices) break;
        const int64_t panel = i % wide * WIDE, tap = i / wide;
        pack_rows(plan, panel, at_most(panel + WIDE, plan.panels), tap, 0, Cin,
                  plan.packed + panel * stride + tap * Cin * PANEL, stride);
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
    if (plan.ahead || plan.staged) run_together(plan.threads, prepare, &plan);
    const int64_t pieces = plan.blocks * plan.pieces_of_block;
    run_together((int)at_most(pieces, plan.threads), multiply_pieces, &plan);
    // no piece is left unless every thread went without memory
    return plan.next_piece < pieces ? NO_MEMORY : DONE;
}

}  // namespace fastvid::FASTVID_LEVEL
