// The 3 x 3 convolution of images on the CPU: tiles and weights are transformed, multiplied point by point, and turned
// back with the bias and the residual while they are near.
// README.md beside this file has the design; compiled once per instruction set level (see common/simd.h).
#include "image_conv/cpu.h"

#include "common/pages.h"
#include "common/pool.h"
#include "image_conv/cpu_plan.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// The channels of the 16 positions that a tile reads; y, x: of its first output.
void find_positions(const Plan& plan, const float* image, int64_t y, int64_t x, const float** d) {
    const ImageCall& call = plan.call;
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const int64_t down = y + i - 1, along = x + j - 1;
            const bool inside = down >= 0 && down < call.H && along >= 0 && along < call.W;
            d[4 * i + j] = inside ? image + down * call.x_strides[1] + along * call.x_strides[2] : plan.zeros;
        }
}

// Where the tiles of a block write, and what they read in its transformed form.
void transform_block(const Plan& plan, Scratch& scratch, int64_t block, int64_t count) {
    if (scratch.block == block) return;
    scratch.block = block;
    const ImageCall& call = plan.call;
    const int64_t* strides = call.residual_strides;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t tile = block * plan.block + i, line = tile / plan.columns, n = line / plan.rows;
        const int64_t x = tile % plan.columns * 2, y = line % plan.rows * 2;
        scratch.places[i] = {((n * call.H + y) * call.W + x) * call.Cout,
                             n * strides[0] + y * strides[1] + x * strides[2], y + 1 < call.H, x + 1 < call.W};
        const float* d[POINTS];
        find_positions(plan, call.x + n * call.x_strides[0], y, x, d);
        transform_tile(d, call.Cin, scratch.tiles + i * plan.width, plan.point_step);
    }
}

// LANES channels from some channel on, of which `lanes` exist, of one output and what joins it.
inline void finish(Floats value, int64_t lanes, const float* joins, float* to) {
    if (lanes == LANES) return store(to, joins ? value + load<Floats>(joins) : value);
    float all[LANES];
    store(all, value);
    for (int64_t lane = 0; lane < lanes; ++lane) to[lane] = joins ? all[lane] + joins[lane] : all[lane];
}

// From a panel's products, [POINTS][block][PANEL], to the outputs of `count` tiles.
void finish_panel(const Plan& plan, const Place* places, int64_t count, int64_t panel, const float* sums) {
    const ImageCall& call = plan.call;
    const int64_t below = call.W * call.Cout, beside = call.Cout;
    const int64_t* strides = call.residual_strides;
    for (int64_t half = 0; half < PANEL; half += LANES) {
        const int64_t channel = panel * PANEL + half, lanes = at_most(call.Cout - channel, LANES);
        if (lanes <= 0) return;
        const Floats bias = load<Floats>(plan.bias + channel);
        for (int64_t i = 0; i < count; ++i) {
            const Place& place = places[i];
            float* to = call.out + place.out + channel;
            const float* joins = call.residual ? call.residual + place.residual + channel : nullptr;
            Floats out[2][2];
            transform_output(sums + i * PANEL + half, plan.panel_step, out);
            finish(out[0][0] + bias, lanes, joins, to);
            if (place.two_columns)
                finish(out[0][1] + bias, lanes, joins ? joins + strides[2] : joins, to + beside);
            if (!place.two_rows) continue;
            joins = joins ? joins + strides[1] : joins;
            finish(out[1][0] + bias, lanes, joins, to + below);
            if (place.two_columns)
                finish(out[1][1] + bias, lanes, joins ? joins + strides[2] : joins, to + below + beside);
        }
    }
}

// The panels [first, last), a group at most, of a block of `count` tiles.
void multiply_group(const Plan& plan, Scratch& scratch, int64_t count, int64_t first, int64_t last) {
    const int64_t Cin = plan.call.Cin;
    for (int64_t point = 0; point < POINTS; ++point)
        for (int64_t panel = first; panel < last; ++panel)
            multiply_panel(scratch.rows + point * plan.block, count, Cin,
                           plan.packed_panel(panel) + point * plan.packed_step,
                           scratch.sums + ((panel - first) * POINTS + point) * plan.panel_step, PANEL);
    for (int64_t panel = first; panel < last; ++panel)
        finish_panel(plan, scratch.places, count, panel,
                     scratch.sums + (panel - first) * POINTS * plan.panel_step);
}

void multiply_pieces(void* context) {
    Plan& plan = *(Plan*)context;
    Scratch scratch = plan.scratch(__atomic_fetch_add(&plan.next_scratch, 1, __ATOMIC_RELAXED));
    for (int64_t i = 0; i < POINTS * plan.block; ++i)
        scratch.rows[i] = scratch.tiles + i / plan.block * plan.point_step + i % plan.block * plan.width;
    const int64_t pieces = plan.blocks * plan.pieces_of_block;
    const int64_t slice = plan.last_panel - plan.first_panel, groups = divide_up(slice, plan.group);
    for (;;) {
        const int64_t piece = __atomic_fetch_add(&plan.next_piece, 1, __ATOMIC_RELAXED);
        if (piece >= pieces) return;
        const int64_t block = piece / plan.pieces_of_block, part = piece % plan.pieces_of_block;
        const int64_t count = at_most(plan.tiles - block * plan.block, plan.block);
        transform_block(plan, scratch, block, count);
        const int64_t end = at_most((part + 1) * groups / plan.pieces_of_block * plan.group, slice);
        for (int64_t i = part * groups / plan.pieces_of_block * plan.group; i < end; i += plan.group)
            multiply_group(plan, scratch, count, plan.first_panel + i,
                           plan.first_panel + at_most(i + plan.group, end));
    }
}

void pack(void* context) {
    Plan& plan = *(Plan*)context;
    const ImageCall& call = plan.call;
    for (;;) {
        const int64_t i = __atomic_fetch_add(&plan.next_part, 1, __ATOMIC_RELAXED);
        const int64_t panel = plan.first_panel + i / plan.parts, begin = i % plan.parts * PIECE_ROWS;
        if (panel >= plan.last_panel) return;
        pack_weights(call.weight, call.weight_strides, panel * PANEL, at_most(call.Cout - panel * PANEL, PANEL), begin,
                     at_most(begin + PIECE_ROWS, call.Cin), plan.packed_step, plan.packed_panel(panel));
    }
}

}  // namespace

Outcome image_conv(const ImageCall& call) {
    Plan plan = {};
    plan.call = call;
    make_plan(plan);
    if (plan.tiles == 0) return DONE;
    Cutter sizes;
    plan.cut(sizes);
    Memory memory;
    if (!memory.take(sizes.used)) return NO_MEMORY;
    Cutter cutter{(char*)memory.block};
    plan.cut(cutter);
    expect_to_fill(memory.block, sizes.used);
    expect_to_fill(call.out, (size_t)(call.N * call.H * call.W * call.Cout) * sizeof(float));
    __builtin_memset(plan.zeros, 0, (size_t)plan.width * sizeof(float));
    for (int64_t i = 0; i < plan.panels * PANEL; ++i) plan.bias[i] = call.bias && i < call.Cout ? call.bias[i] : 0;
    for (int64_t first = 0; first < plan.panels; first += plan.slice) {
        plan.first_panel = first;
        plan.last_panel = at_most(first + plan.slice, plan.panels);
        plan.next_part = plan.next_piece = plan.next_scratch = 0;
        run_together(plan.threads, pack, &plan);
        run_together((int)at_most(plan.blocks * plan.pieces_of_block, plan.threads), multiply_pieces, &plan);
    }
    return DONE;
}

}  // namespace fastvid::FASTVID_LEVEL
