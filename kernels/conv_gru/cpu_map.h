// How the positions of a frame are cut into blocks, and which of them each matrix of weights is multiplied with.
#pragma once

#include "common/panel.h"
#include "common/scratch.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t MOST_POSITIONS = 96;       // of a block
constexpr int64_t MOST_TILES = 48;           // of a block
constexpr int64_t LEAST_TRANSFORMED = 36;    // positions of a frame whose products are worth the transform
constexpr int64_t MOST_SUMS = MOST_TILES * 16;
static_assert(MOST_POSITIONS <= MOST_SUMS);

inline int64_t at_most(int64_t value, int64_t most) { return value < most ? value : most; }

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Either every tap is a matrix of weights, multiplied with the positions that it reaches inside the frame, a block being
// some positions; or, for 3 x 3, tiles of 2 x 2 positions are transformed (F(2x2, 3x3) of Lavin and Gray), which makes
// 16 matrices of the 9 and 16 rows of a tile's 4 x 4 inputs. Which, depends on the extents alone.
struct Map {
    int64_t B, H, W, k, N;  // N: positions of all frames of one time
    bool transformed;
    int64_t matrices;              // taps, or 16
    int64_t tiles_y, tiles_x;      // of a frame
    int64_t slots, block, blocks;  // slots: positions, or tiles
    int32_t *reads, *sums, *counts;  // [blocks][taps][block] positions and places in the block; [blocks][taps]
    int32_t* sample;                 // [N]: of the batch

    Map(int64_t B, int64_t H, int64_t W, int64_t k) : B(B), H(H), W(W), k(k), N(B * H * W) {
        transformed = k == 3 && H * W >= LEAST_TRANSFORMED && H > 1 && W > 1;
        tiles_y = divide_up(H, 2);
        tiles_x = divide_up(W, 2);
        matrices = transformed ? 16 : k * k;
        slots = transformed ? B * tiles_y * tiles_x : N;
        blocks = divide_up(slots, transformed ? MOST_TILES : MOST_POSITIONS);
        block = blocks ? divide_up(slots, blocks) : 0;
        if (transformed) block = at_most(divide_up(block, TILE_ROWS) * TILE_ROWS, MOST_TILES);
        blocks = block ? divide_up(slots, block) : 0;
    }

    int64_t count(int64_t i) const { return at_most(slots - i * block, block); }

    void cut(Cutter& cutter) {
        sample = cutter.cut<int32_t>(N);
        const int64_t listed = transformed ? 0 : blocks * matrices;
        reads = cutter.cut<int32_t>(listed * block);
        sums = cutter.cut<int32_t>(listed * block);
        counts = cutter.cut<int32_t>(listed);
    }

    // Every tap's list of a block holds, in order, the positions of the block from which it stays inside the frame.
    void fill() const {
        for (int64_t n = 0; n < N; ++n) sample[n] = (int32_t)(n / (H * W));
        if (transformed) return;
        for (int64_t i = 0; i < blocks * matrices; ++i) {
            const int64_t first = i / matrices * block, tap = i % matrices;
            const int64_t dy = tap / k - k / 2, dx = tap % k - k / 2;
            int32_t found = 0;
            for (int64_t slot = 0; slot < count(i / matrices); ++slot) {
                const int64_t n = first + slot, x = n % W + dx, y = n / W % H + dy;
                if (x < 0 || x >= W || y < 0 || y >= H) continue;
                reads[i * block + found] = (int32_t)(n + dy * W + dx);
                sums[i * block + found++] = (int32_t)slot;
            }
            counts[i] = found;
        }
    }
};

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
