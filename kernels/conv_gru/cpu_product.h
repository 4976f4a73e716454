// One convolution of one frame: what every block of positions sums up for every panel, handed to what finishes it.
#pragma once

#include "common/crew.h"
#include "conv_gru/cpu_pack.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t THREAD_WORK = 1 << 18;  // multiply-adds of a convolution: less is not worth another thread
constexpr int64_t LEAST_PIECES = 4;       // for each thread, so that they even out

// sums[slots[m]] += row reads[m] of `in` times a panel's matrix [count][PANEL]. Out of line, so that nothing else
// competes for registers.
template <int ROWS>
__attribute__((noinline)) void add_products(const float* in, int64_t stride, const int32_t* reads, const int32_t* slots,
                                            int64_t count, const float* weights, float* sums) {
    Floats total[ROWS][2];
    const float* x[ROWS];
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; ++m) {
        total[m][0] = total[m][1] = repeat(0.0f);
        x[m] = in + reads[m] * stride;
    }
#pragma GCC unroll 2
    for (int64_t i = 0; i < count; ++i, weights += PANEL) {
        const Floats left = load<Floats>(weights), right = load<Floats>(weights + LANES);
#pragma GCC unroll 12
        for (int m = 0; m < ROWS; ++m) {
            const Floats value = repeat(x[m][i]);
            total[m][0] = multiply_add(left, value, total[m][0]);
            total[m][1] = multiply_add(right, value, total[m][1]);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; ++m) {
        float* to = sums + slots[m] * PANEL;
        store(to, load<Floats>(to) + total[m][0]);
        store(to + LANES, load<Floats>(to + LANES) + total[m][1]);
    }
}

template <int ROWS>
void add_rows(int64_t rows, const float* in, int64_t stride, const int32_t* reads, const int32_t* slots, int64_t count,
              const float* weights, float* sums) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return add_rows<ROWS - 1>(rows, in, stride, reads, slots, count, weights, sums);
    add_products<ROWS>(in, stride, reads, slots, count, weights, sums);
}

// What differs along an axis of four becomes what is multiplied.
inline void difference(const Floats* from, int step, Floats* to) {
    to[0] = from[0] - from[2 * step];
    to[step] = from[step] + from[2 * step];
    to[2 * step] = from[2 * step] - from[step];
    to[3 * step] = from[step] - from[3 * step];
}

// The convolution of `in` by packed weights.
struct Product {
    const Map* map;
    const float* in;       // [N][rows]
    const float* packed;   // [panels][matrices][rows][PANEL]
    int64_t rows, panels;  // rows: channels of in, with padding
    int64_t parts;         // of the panels of a block, each a piece
    float* shared;         // [slots][16][rows] transformed, where several pieces need a block's, else null
    bool nothing;          // in is nought: nothing is multiplied

    int64_t pieces() const { return map->blocks * parts; }

    void plan(const Map& of, const Weights& weights, int threads) {
        map = &of;
        rows = weights.all_rows();
        panels = weights.panels();
        const int64_t wanted = threads < 2 ? 1 : divide_up(threads * LEAST_PIECES, map->blocks);
        parts = at_most(wanted, panels);
    }

    bool in_common() const { return map->transformed && parts > 1; }
    int64_t packed_floats() const { return panels * map->matrices * rows * PANEL; }
    int64_t transformed_floats() const { return map->transformed ? map->block * 16 * rows : 0; }

    // Tile `slot` -> [16][rows], the matrices `next` floats apart.
    void transform(int64_t slot, float* to, int64_t next) const {
        const int64_t H = map->H, W = map->W, tx = slot % map->tiles_x, ty = slot / map->tiles_x % map->tiles_y;
        const int64_t b = slot / map->tiles_x / map->tiles_y;
        const float* corner = in + ((b * H + 2 * ty - 1) * W + 2 * tx - 1) * rows;
        bool inside[16];
        for (int64_t i = 0; i < 16; ++i) {
            const int64_t y = 2 * ty - 1 + i / 4, x = 2 * tx - 1 + i % 4;
            inside[i] = y >= 0 && y < H && x >= 0 && x < W;
        }
        for (int64_t c = 0; c < rows; c += LANES) {
            Floats d[16], once[16], twice[16];
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; ++i)
                d[i] = inside[i] ? load<Floats>(corner + (i / 4 * W + i % 4) * rows + c) : repeat(0.0f);
#pragma GCC unroll 4
            for (int x = 0; x < 4; ++x) difference(d + x, 4, once + x);
#pragma GCC unroll 4
            for (int y = 0; y < 4; ++y) difference(once + 4 * y, 1, twice + 4 * y);
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; ++i) store(to + i * next + c, twice[i]);
        }
    }

    // All tiles of a block -> [16][tiles][rows].
    void transform_block(int64_t block, float* to) const {
        const int64_t count = map->count(block);
        for (int64_t i = 0; i < count; ++i) transform(block * map->block + i, to + i * rows, count * rows);
    }

    static void transform_piece(void* product, int64_t i) {
        const Product& of = *(const Product*)product;
        const int64_t block = i / of.map->block, slot = i % of.map->block, count = of.map->count(block);
        if (slot < count)
            of.transform(i, of.shared + (block * of.map->block * 16 + slot) * of.rows, count * of.rows);
    }

    // The listed rows of `from` times one matrix of a panel.
    void multiply(const float* from, const int32_t* reads, const int32_t* slots, int64_t count, const float* weights,
                  float* sums) const {
        const int64_t groups = divide_up(rows, MOST_SUMMED), tiles = divide_up(count, TILE_ROWS);
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t begin = g * rows / groups, end = (g + 1) * rows / groups;
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t first = tile * count / tiles, last = (tile + 1) * count / tiles;
                add_rows<TILE_ROWS>(last - first, from + begin, rows, reads + first, slots + first, end - begin,
                                    weights + begin * PANEL, sums);
            }
        }
    }

    // sums: [slots of the block][PANEL], or [16][tiles][PANEL].
    void sum_up(int64_t block, int64_t panel, const float* transformed, const int32_t* in_order, float* sums) const {
        const int64_t count = map->count(block), matrices = map->matrices;
        const int64_t places = map->transformed ? 16 * count : count;
        __builtin_memset(sums, 0, (size_t)(places * PANEL) * sizeof(float));
        for (int64_t i = 0; i < matrices && !nothing; ++i) {
            const float* weights = packed + (panel * matrices + i) * rows * PANEL;
            const int64_t list = (block * matrices + i);
            if (map->transformed)
                multiply(transformed, in_order + i * count, in_order + i * count, count, weights, sums);
            else
                multiply(in, map->reads + list * map->block, map->sums + list * map->block, map->counts[list], weights,
                         sums);
        }
    }

    // finish(panel, position, first vector, second vector)
    template <class Finish>
    void hand_over(int64_t block, int64_t panel, const float* sums, const Finish& finish) const {
        const int64_t count = map->count(block), first = block * map->block;
        if (!map->transformed) {
            for (int64_t i = 0; i < count; ++i, sums += PANEL)
                finish(panel, first + i, load<Floats>(sums), load<Floats>(sums + LANES));
            return;
        }
        for (int64_t i = 0; i < count; ++i) {
            const int64_t slot = first + i, tx = slot % map->tiles_x, ty = slot / map->tiles_x % map->tiles_y;
            const int64_t b = slot / map->tiles_x / map->tiles_y, n = (b * map->H + 2 * ty) * map->W + 2 * tx;
            Floats a[4], c[4];
            gather(sums + i * PANEL, count * PANEL, a);
            gather(sums + i * PANEL + LANES, count * PANEL, c);
            const bool right = 2 * tx + 1 < map->W, below = 2 * ty + 1 < map->H;
            finish(panel, n, a[0], c[0]);
            if (right) finish(panel, n + 1, a[1], c[1]);
            if (below) finish(panel, n + map->W, a[2], c[2]);
            if (right && below) finish(panel, n + map->W + 1, a[3], c[3]);
        }
    }

    // 16 sums of a tile, `next` floats apart -> its 2 x 2 positions.
    static void gather(const float* sums, int64_t next, Floats* to) {
        Floats once[8];
#pragma GCC unroll 4
        for (int x = 0; x < 4; ++x) {
            const Floats m[] = {load<Floats>(sums + x * next), load<Floats>(sums + (4 + x) * next),
                                load<Floats>(sums + (8 + x) * next), load<Floats>(sums + (12 + x) * next)};
            once[x] = m[0] + m[1] + m[2];
            once[4 + x] = m[1] - m[2] - m[3];
        }
        for (int y = 0; y < 2; ++y) {
            const Floats* m = once + 4 * y;
            to[2 * y] = m[0] + m[1] + m[2];
            to[2 * y + 1] = m[1] - m[2] - m[3];
        }
    }
};

// What one piece needs: as many as there are threads, each taken by whoever has none.
struct Desk {
    float* sums;         // [MOST_SUMS][PANEL]
    float* transformed;  // [16][tiles of a block][rows]
    int32_t taken;
};

struct Desks {
    Desk* all;
    int64_t count;
    int32_t* in_order;  // [MOST_SUMS]: 0, 1, 2, ..

    void cut(Cutter& cutter, int64_t threads, int64_t transformed_floats) {
        count = threads;
        all = cutter.cut<Desk>(threads);
        in_order = cutter.cut<int32_t>(MOST_SUMS);
        for (int64_t i = 0; i < threads; ++i) {
            float* sums = cutter.cut<float>(MOST_SUMS * PANEL);
            float* transformed = cutter.cut<float>(transformed_floats);
            if (all) all[i] = {sums, transformed, 0};
        }
        for (int32_t i = 0; in_order && i < MOST_SUMS; ++i) in_order[i] = i;
    }

    Desk& take() const {
        for (int64_t i = 0;; i = (i + 1) % count)
            if (!__atomic_exchange_n(&all[i].taken, 1, __ATOMIC_ACQUIRE)) return all[i];
    }
};

template <class Finish>
struct Pass {
    Product* product;
    const Desks* desks;
    const Finish* finish;

    static void piece(void* pass, int64_t i) {
        const Pass& of = *(const Pass*)pass;
        const Product& product = *of.product;
        const int64_t block = i / product.parts, part = i % product.parts;
        Desk& desk = of.desks->take();
        const float* transformed = desk.transformed;
        if (product.in_common())
            transformed = product.shared + block * product.map->block * 16 * product.rows;
        else if (product.map->transformed && !product.nothing)
            product.transform_block(block, desk.transformed);
        const int64_t first = part * product.panels / product.parts, last = (part + 1) * product.panels / product.parts;
        for (int64_t panel = first; panel < last; ++panel) {
            product.sum_up(block, panel, transformed, of.desks->in_order, desk.sums);
            product.hand_over(block, panel, desk.sums, *of.finish);
        }
        __atomic_store_n(&desk.taken, 0, __ATOMIC_RELEASE);
    }
};

// The whole convolution, and what becomes of it.
template <class Finish>
void convolve(Crew& crew, Product& product, const Desks& desks, const Finish& finish) {
    if (product.in_common() && !product.nothing)
        crew.each(product.map->blocks * product.map->block, Product::transform_piece, &product);
    Pass<Finish> pass{&product, &desks, &finish};
    crew.each(product.pieces(), Pass<Finish>::piece, &pass);
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
