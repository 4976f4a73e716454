// Sums over positions of x[position + tap][k] * grad[position][n]: how a slab of positions is packed, which of its
// positions a tap reaches, and the loop that multiplies.
#pragma once

#include "common/numbers.h"
#include "gated_causal_conv/cpu.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t PANEL = 2 * LANES;  // columns of grad that are multiplied at once
// Positions whose products are summed in registers before they join the totals: short sums keep rounding at the level
// of a blocked matrix product, and a panel of so many positions stays in the L1 cache.
constexpr int64_t BLOCK = 128;
constexpr int64_t SLAB_FLOATS = 128 << 10;  // of x and grad, packed at a time: what the L2 cache holds,
constexpr int64_t LEAST_SLAB = 256;         // or so many positions, lest wide matrices pass by for too few products
constexpr int64_t PACKED_AT_ONCE = 8;       // positions whose rows stay in the L1 cache while strips take them apart

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Positions begin <= p < end of a grid B, T, H, W.
struct Box {
    int64_t begin[4], end[4];

    int64_t extent(int axis) const { return end[axis] - begin[axis]; }
    int64_t rows() const { return extent(0) * extent(1) * extent(2); }
    int64_t positions() const { return rows() * extent(3); }

    // The place of a position in a dense array of the box.
    int64_t place(int64_t b, int64_t t, int64_t y, int64_t x) const {
        return (((b - begin[0]) * extent(1) + t - begin[1]) * extent(2) + y - begin[2]) * extent(3) + x - begin[3];
    }
};

// Channels of x in tiles of nearly the same size, so that none is computed in vain: first those with one row more.
struct Tiles {
    int64_t count = 0, rows = 0, longer = 0;  // rows of the shorter ones

    Tiles() = default;
    explicit Tiles(int64_t Cin) : count(divide_up(Cin, TILE_ROWS)), rows(Cin / count), longer(Cin % count) {}

    int64_t first(int64_t tile) const { return tile * rows + least(tile, longer); }
    int64_t rows_of(int64_t tile) const { return rows + (tile < longer); }
};

// Neighbouring positions that a tap reaches, as places in the packed slab.
struct Run {
    int32_t x, grad, count;
};

// All positions of a slab that one tap reaches, in order.
class Reached {
  public:
    // in, out: the packed positions of x and of grad; shift: from a position of grad to the one of x; size: of x's grid
    Reached(const Box& in, const Box& out, const int64_t (&shift)[3], const int64_t (&size)[3]) : in_(in), out_(out) {
        reached_ = out;
        for (int axis = 0; axis < 3; ++axis) {
            shift_[axis] = shift[axis];
            reached_.begin[axis + 1] = most(out.begin[axis + 1], -shift[axis]);
            reached_.end[axis + 1] = least(out.end[axis + 1], size[axis] - shift[axis]);
            if (reached_.extent(axis + 1) <= 0) reached_.end[0] = reached_.begin[0];  // none
        }
        for (int axis = 0; axis < 4; ++axis) at_[axis] = reached_.begin[axis];
    }

    // Writes the runs of the next BLOCK positions, or of what is left, and returns how many runs there are.
    int64_t next(Run (&runs)[BLOCK]) {
        int64_t count = 0, free = BLOCK;
        while (free > 0 && at_[0] < reached_.end[0]) {
            const int64_t taken = least(free, reached_.end[3] - at_[3]);
            const int64_t x = in_.place(at_[0], at_[1] + shift_[0], at_[2] + shift_[1], at_[3] + shift_[2]);
            const int64_t grad = out_.place(at_[0], at_[1], at_[2], at_[3]);
            const Run* last = runs + count - 1;
            if (count && last->x + last->count == x && last->grad + last->count == grad)
                runs[count - 1].count += (int32_t)taken;
            else
                runs[count++] = {(int32_t)x, (int32_t)grad, (int32_t)taken};
            free -= taken;
            advance(taken);
        }
        return count;
    }

  private:
    void advance(int64_t positions) {
        at_[3] += positions;
        for (int axis = 3; axis > 0 && at_[axis] == reached_.end[axis]; --axis) {
            at_[axis] = reached_.begin[axis];
            ++at_[axis - 1];
        }
    }

    Box in_, out_, reached_;
    int64_t shift_[3], at_[4];
};

// Adds to totals [ROWS][PANEL] what the positions of the runs contribute. x: a strip [positions][ROWS];
// grad: a panel [positions][PANEL].
template <int ROWS>
void add_products(const Run* runs, int64_t count, const float* x, const float* grad, float* totals) {
    Floats sums[ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
        sums[r][0] = sums[r][1] = repeat(0.0f);
        __builtin_prefetch(totals + r * PANEL, 1);  // needed at the end; wide matrices do not stay in any cache
    }
    for (const Run* run = runs; run != runs + count; ++run) {
        const float* value = x + (int64_t)run->x * ROWS;
        const float* column = grad + (int64_t)run->grad * PANEL;
        const float* const end = column + (int64_t)run->count * PANEL;
#pragma GCC unroll 2
        for (; column != end; column += PANEL, value += ROWS) {
            const Floats left = load<Floats>(column), right = load<Floats>(column + LANES);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
                const Floats factor = repeat(value[r]);
                sums[r][0] = multiply_add(factor, left, sums[r][0]);
                sums[r][1] = multiply_add(factor, right, sums[r][1]);
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
        float* to = totals + r * PANEL;
        store(to, load<Floats>(to) + sums[r][0]);
        store(to + LANES, load<Floats>(to + LANES) + sums[r][1]);
    }
}

template <int ROWS>
void add_products_of(int64_t rows, const Run* runs, int64_t count, const float* x, const float* grad, float* totals) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return add_products_of<ROWS - 1>(rows, runs, count, x, grad, totals);
    add_products<ROWS>(runs, count, x, grad, totals);
}

inline void widen_some(const float* from, int64_t count, float* to) {
    __builtin_memcpy(to, from, (size_t)count * sizeof(float));
}

inline void widen_some(const BFloat16* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

// Channels side by side are copied faster where the compiler knows it.
template <int ROWS, bool DENSE, class T>
void pack_strip(const T* from, int64_t step, int64_t channel_step, int64_t count, float* to) {
    for (int64_t p = 0; p < count; ++p, from += step, to += ROWS) {
        if constexpr (DENSE)
            widen_some(from, ROWS, to);
        else
            for (int r = 0; r < ROWS; ++r) to[r] = widen(from[r * channel_step]);
    }
}

template <int ROWS, bool DENSE, class T>
void pack_strip_of(int64_t rows, const T* from, int64_t step, int64_t channel_step, int64_t count, float* to) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return pack_strip_of<ROWS - 1, DENSE>(rows, from, step, channel_step, count, to);
    pack_strip<ROWS, DENSE>(from, step, channel_step, count, to);
}

// Neighbouring positions of x as strips [tile][positions of the slab][rows of the tile], from place `at` on.
template <bool DENSE, class T>
void pack_x(const T* from, int64_t step, int64_t channel_step, int64_t count, const Tiles& tiles, float* packed,
            int64_t positions, int64_t at) {
    for (int64_t p = 0; p < count; p += PACKED_AT_ONCE)
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
            const int64_t first = tiles.first(tile), rows = tiles.rows_of(tile);
            float* strip = packed + first * positions + (at + p) * rows;
            pack_strip_of<TILE_ROWS, DENSE>(rows, from + p * step + first * channel_step, step, channel_step,
                                            least(PACKED_AT_ONCE, count - p), strip);
        }
}

// Neighbouring positions of grad as panels [panel][positions of the slab][PANEL], zero beyond Cout.
template <bool DENSE, class T>
void pack_grad(const T* from, int64_t step, int64_t channel_step, int64_t count, int64_t Cout, float* packed,
               int64_t positions, int64_t at) {
    const int64_t whole = Cout / PANEL * PANEL;
    for (int64_t p = 0; p < count; ++p, from += step) {
        float* to = packed + (at + p) * PANEL;
        int64_t n = 0;
        for (; n < whole; n += PANEL, to += PANEL * positions) {
            if constexpr (DENSE)
                widen_some(from + n, PANEL, to);
            else
                for (int64_t c = 0; c < PANEL; ++c) to[c] = widen(from[(n + c) * channel_step]);
        }
        for (int64_t c = 0; n + c < Cout; ++c) to[c] = widen(from[(n + c) * channel_step]);
        for (int64_t c = Cout - n; n < Cout && c < PANEL; ++c) to[c] = 0;
    }
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
