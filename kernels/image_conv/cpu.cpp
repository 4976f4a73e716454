// The 3 x 3 convolution of images on the CPU: tiles and weights are transformed, multiplied point by point, and turned
// back with the bias and the residual while they are near.
// README.md beside this file has the design; compiled once per instruction set level (see common/simd.h).
#include "image_conv/cpu.h"

#include "common/pages.h"
#include "common/pool.h"
#include "image_conv/cpu_plan.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// What one thread needs.
struct Scratch {
    float* tiles;        // [POINTS][block][width], point_step apart
    const float** rows;  // [POINTS][block]: of the tiles
    float* sums;         // [group][POINTS][block][PANEL], the points panel_step apart
    int64_t block = -1;  // whose tiles these are

    void cut(Cutter& cutter, const Plan& plan) {
        tiles = cutter.cut<float>(POINTS * plan.point_step);
        rows = cutter.cut<const float*>(POINTS * plan.block);
        sums = cutter.cut<float>(plan.group * POINTS * plan.panel_step);
    }
};

// The channels of the 16 positions that a tile reads.
void find_positions(const Plan& plan, const Tile& tile, const float** d) {
    const ImageCall& call = plan.call;
    const float* image = call.x + tile.n * call.x_strides[0];
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const int64_t y = tile.y + i - 1, x = tile.x + j - 1;
            const bool inside = y >= 0 && y < call.H && x >= 0 && x < call.W;
            d[4 * i + j] = inside ? image + y * call.x_strides[1] + x * call.x_strides[2] : plan.zeros;
        }
}

void transform_block(const Plan& plan, Scratch& scratch, int64_t block, int64_t count) {
    if (scratch.block == block) return;
    scratch.block = block;
    for (int64_t i = 0; i < count; ++i) {
        const float* d[POINTS];
        find_positions(plan, Tile(plan, block * plan.block + i), d);
        transform_tile(d, plan.call.Cin, scratch.tiles + i * plan.width, plan.point_step);
    }
}

// From a panel's products to one tile's outputs, of which `count` channels exist.
void finish_tile(const Plan& plan, const Tile& tile, int64_t channel, int64_t count, const float* sums,
                 const float* bias) {
    const ImageCall& call = plan.call;
    for (int64_t half = 0; half < count; half += LANES) {
        Floats out[2][2];
        transform_output(sums + half, plan.panel_step, out);
        const int64_t lanes = at_most(count - half, LANES);
        for (int i = 0; i < 2 && tile.y + i < call.H; ++i)
            for (int j = 0; j < 2 && tile.x + j < call.W; ++j) {
                const int64_t y = tile.y + i, x = tile.x + j, c = channel + half;
                float* to = call.out + ((tile.n * call.H + y) * call.W + x) * call.Cout + c;
                const int64_t* strides = call.residual_strides;
                const float* joins = call.residual + tile.n * strides[0] + y * strides[1] + x * strides[2] + c;
                Floats value = out[i][j] + load<Floats>(bias + half);
                if (lanes == LANES) {
                    store(to, call.residual ? value + load<Floats>(joins) : value);
                    continue;
                }
                for (int64_t lane = 0; lane < lanes; ++lane)
                    to[lane] = call.residual ? value[lane] + joins[lane] : value[lane];
            }
    }
}

// The panels [first, last), a group at most, of a block of `count` tiles.
void multiply_group(const Plan& plan, Scratch& scratch, int64_t block, int64_t count, int64_t first, int64_t last) {
    const int64_t Cin = plan.call.Cin;
    for (int64_t point = 0; point < POINTS; ++point)
        for (int64_t panel = first; panel < last; ++panel)
            multiply_panel(scratch.rows + point * plan.block, count, Cin,
                           plan.packed + (panel * POINTS + point) * Cin * PANEL,
                           scratch.sums + ((panel - first) * POINTS + point) * plan.panel_step, PANEL);
    for (int64_t panel = first; panel < last; ++panel)
        for (int64_t i = 0; i < count; ++i)
            finish_tile(plan, Tile(plan, block * plan.block + i), panel * PANEL,
                        at_most(plan.call.Cout - panel * PANEL, PANEL),
                        scratch.sums + (panel - first) * POINTS * plan.panel_step + i * PANEL,
                        plan.bias + panel * PANEL);
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
    for (int64_t i = 0; i < POINTS * plan.block; ++i)
        scratch.rows[i] = scratch.tiles + i / plan.block * plan.point_step + i % plan.block * plan.width;
    const int64_t pieces = plan.blocks * plan.pieces_of_block;
    for (;;) {
        const int64_t piece = __atomic_fetch_add(&plan.next_piece, 1, __ATOMIC_RELAXED);
        if (piece >= pieces) return;
        const int64_t block = piece / plan.pieces_of_block, part = piece % plan.pieces_of_block;
        const int64_t count = at_most(plan.tiles - block * plan.block, plan.block);
        transform_block(plan, scratch, block, count);
        const int64_t end = at_most((part + 1) * plan.groups / plan.pieces_of_block * plan.group, plan.panels);
        for (int64_t panel = part * plan.groups / plan.pieces_of_block * plan.group; panel < end; panel += plan.group)
            multiply_group(plan, scratch, block, count, panel, at_most(panel + plan.group, end));
    }
}

void pack(void* context) {
    Plan& plan = *(Plan*)context;
    const ImageCall& call = plan.call;
    for (;;) {
        const int64_t i = __atomic_fetch_add(&plan.next_part, 1, __ATOMIC_RELAXED);
        if (i >= plan.panels * plan.parts) return;
        const int64_t panel = i / plan.parts, begin = i % plan.parts * PIECE_ROWS;
        pack_weights(call.weight, call.weight_strides, panel * PANEL, at_most(call.Cout - panel * PANEL, PANEL), begin,
                     at_most(begin + PIECE_ROWS, call.Cin), call.Cin,
                     plan.packed + panel * POINTS * call.Cin * PANEL);
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
    __builtin_memset(plan.zeros, 0, (size_t)plan.width * sizeof(float));
    for (int64_t i = 0; i < plan.panels * PANEL; ++i) plan.bias[i] = call.bias && i < call.Cout ? call.bias[i] : 0;
    run_together(plan.threads, pack, &plan);
    const int64_t pieces = plan.blocks * plan.pieces_of_block;
    run_together((int)at_most(pieces, plan.threads), multiply_pieces, &plan);
    // no piece is left unless every thread went without memory
    return plan.next_piece < pieces ? NO_MEMORY : DONE;
}

}  // namespace fastvid::FASTVID_LEVEL
