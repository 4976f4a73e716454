// The screen: approximate scores of all codes with a proven bound on their error, so that only a few codes are left
// whose distance has to be computed in full. README.md beside this file derives the bound.
#pragma once

#include "common/numbers.h"
#include "common/simd.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int TILE_CODES = 2 * LANES;  // codes of a microkernel; two codes, `LANES` apart, share a slot of the scores
constexpr float INFINITE = __builtin_inff();
constexpr double UNIT = 0x1p-24;       // half the spacing of float32 at 1
constexpr double LARGEST = 32766;      // of the norm of a quantised row or code: so no product overflows an int32
constexpr double FARTHEST = 0x1p26;    // rows farther from the centre than this many codebook radii are not screened
constexpr double NEAREST = 0x1p-40;    // rows nearer to it than this many radii are screened as if they were so far

// The codebook as the screen reads it: moved by `centre`, scaled by a power of two so that the longest code has a norm
// of about 1, and packed in tiles [tile][D / 2][TILE_CODES][2] int16 or [tile][D][TILE_CODES] float32.
struct Panel {
    int64_t K, D, tiles;
    int64_t tile_bytes;
    bool quantised;
    void* packed;
    float* half_norms;  // [tiles * TILE_CODES]; infinite for padding and for codes that are not finite
    float* centre;      // [D]
    float scale;        // power of two that x - centre is multiplied by
    double radius;      // norm of the longest moved and scaled code, rounded up
    bool alike;         // all codes are finite and the same
    double bound_per_norm, bound;  // error of a score <= bound_per_norm * |row| + bound
};

inline int64_t pairs_of(int64_t D) { return (D + 1) / 2; }

constexpr int64_t STRIP = 64;  // elements of a code that are moved at a time

// Writes a strip of a code, minus the centre and scaled, and returns its squared norm.
inline double move_strip(const Panel& panel, const float* code, int64_t begin, double scale, double (&moved)[STRIP]) {
    const int64_t count = panel.D - begin < STRIP ? panel.D - begin : STRIP;
    for (int64_t i = 0; i < count; ++i) moved[i] = ((double)code[begin + i] - panel.centre[begin + i]) * scale;
    for (int64_t i = count; i % 8; ++i) moved[i] = 0;
    double squares[8] = {};
    for (int64_t i = 0; i < count; i += 8)
        for (int lane = 0; lane < 8; ++lane) squares[lane] += moved[i + lane] * moved[i + lane];
    for (int lane = 1; lane < 8; ++lane) squares[0] += squares[lane];
    return squares[0];
}

// Finds the mean of the finite codes and, as `radius`, the norm of the code that is farthest from it.
// mean: scratch of D. half_norms: infinite here for codes that are not finite.
inline void measure(Panel& panel, const float* codebook, double* mean) {
    const int64_t K = panel.K, D = panel.D;
    int64_t finite = 0;
    for (int64_t d = 0; d < D; ++d) mean[d] = 0;
    for (int64_t k = 0; k < K; ++k) {
        const float* code = codebook + k * D;
        panel.half_norms[k] = finite_row(code, D) ? 0 : INFINITE;
        if (panel.half_norms[k] != 0) continue;
        ++finite;
        for (int64_t d = 0; d < D; ++d) mean[d] += code[d];
    }
    for (int64_t d = 0; d < D; ++d) panel.centre[d] = finite ? (float)(mean[d] / (double)finite) : 0;
    double longest = 0;
    for (int64_t k = 0; k < K; ++k) {
        if (panel.half_norms[k] != 0) continue;
        double square = 0, moved[STRIP];
        for (int64_t d = 0; d < D; d += STRIP) square += move_strip(panel, codebook + k * D, d, 1, moved);
        longest = square > longest ? square : longest;
    }
    panel.radius = __builtin_sqrt(longest) * (1 + 1e-9);
    panel.alike = longest == 0 && finite == K;
}

inline void set_scale_and_bound(Panel& panel) {
    const int exponent = panel.radius > 0 ? __builtin_ilogb(panel.radius) : 0;
    panel.scale = (float)__builtin_ldexp(1, -(exponent < -126 ? -126 : exponent > 126 ? 126 : exponent));
    panel.radius *= panel.scale;
    const double D = (double)panel.D, E = panel.radius;
    const double step = 0.502 * __builtin_sqrt(D) / LARGEST;  // of a quantised vector's norm: half a step per element
    const double product = panel.quantised ? step * (2 + step) + 10 * UNIT : (D + 12) * UNIT;
    panel.bound_per_norm = 1.01 * E * product;
    panel.bound = 1.01 * 2 * UNIT * E * E;  // of the half norms, and of adding one to a product
}

// Writes a strip of moved elements, of column c of a tile; `begin` is even.
inline void pack_strip(const Panel& panel, const double (&moved)[STRIP], int64_t begin, char* packed, int64_t c) {
    const int64_t count = panel.D - begin < STRIP ? panel.D - begin : STRIP;
    if (!panel.quantised) {
        for (int64_t i = 0; i < count; ++i) ((float*)packed)[(begin + i) * TILE_CODES + c] = (float)moved[i];
        return;
    }
    const double steps = panel.radius > 0 ? LARGEST / panel.radius : 0;
    const double shift = 0x1.8p52;  // leaves the rounded integer in the low bits
    int64_t bits[STRIP];
    for (int64_t i = 0; i < (count + 1) / 2 * 2; ++i) {
        const double rounded = moved[i] * steps + shift;
        __builtin_memcpy(&bits[i], &rounded, sizeof rounded);
    }
    for (int64_t i = 0; i < count; i += 2)
        ((uint32_t*)packed)[(begin + i) / 2 * TILE_CODES + c] =
            (uint32_t)bits[i + 1] << 16 | ((uint32_t)bits[i] & 0xffff);
}

inline void pack_tile(const Panel& panel, const float* codebook, int64_t tile) {
    char* packed = (char*)panel.packed + tile * panel.tile_bytes;
    __builtin_memset(packed, 0, (size_t)panel.tile_bytes);
    for (int64_t c = 0; c < TILE_CODES; ++c) {
        const int64_t k = tile * TILE_CODES + c;
        if (k >= panel.K) panel.half_norms[k] = INFINITE;
        if (k >= panel.K || panel.half_norms[k] == INFINITE) continue;
        double square = 0, moved[STRIP];
        for (int64_t d = 0; d < panel.D; d += STRIP) {
            square += move_strip(panel, codebook + k * panel.D, d, panel.scale, moved);
            pack_strip(panel, moved, d, packed, c);
        }
        panel.half_norms[k] = (float)(square / 2);
    }
}

// Writes for TILE_ROWS rows and `tiles` tiles, in each slot, the smaller score of two codes.
// rows: [D / 2][TILE_ROWS] pairs of int16. One pointer for all of them: six would not fit the registers.
inline void score_int16(const int32_t* rows, const char* packed, int64_t D, int64_t tiles, const float* half_norms,
                        const float* factors, float* slots, int64_t slot_stride) {
    const int32_t* const end = rows + pairs_of(D) * TILE_ROWS;
    const char* code = packed;
    for (int64_t tile = 0; tile < tiles; ++tile, half_norms += TILE_CODES) {
        Ints dot[TILE_ROWS][2] = {};
#pragma GCC unroll 2
        for (const int32_t* pair = rows; pair != end; pair += TILE_ROWS, code += 2 * VECTOR_BYTES) {
            const Shorts left = load<Shorts>(code), right = load<Shorts>(code + VECTOR_BYTES);
#pragma GCC unroll 12
            for (int i = 0; i < TILE_ROWS; ++i) {
                dot[i][0] += multiply_pairs(pair[i], left);
                dot[i][1] += multiply_pairs(pair[i], right);
            }
        }
        const Floats left = load<Floats>(half_norms), right = load<Floats>(half_norms + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < TILE_ROWS; ++i) {
            const Floats factor = repeat(factors[i]);  // negative
            const Floats a = multiply_add(__builtin_convertvector(dot[i][0], Floats), factor, left);
            const Floats b = multiply_add(__builtin_convertvector(dot[i][1], Floats), factor, right);
            store(slots + i * slot_stride + tile * LANES, smaller(a, b));
        }
    }
}

// The same in float32. rows: [D][TILE_ROWS], moved and scaled.
inline void score_float32(const float* rows, const char* packed, int64_t D, int64_t tiles, const float* half_norms,
                          float* slots, int64_t slot_stride) {
    const float* const end = rows + D * TILE_ROWS;
    const char* code = packed;
    for (int64_t tile = 0; tile < tiles; ++tile, half_norms += TILE_CODES) {
        Floats dot[TILE_ROWS][2] = {};
        for (const float* value = rows; value != end; value += TILE_ROWS, code += 2 * VECTOR_BYTES) {
            const Floats left = load<Floats>(code), right = load<Floats>(code + VECTOR_BYTES);
#pragma GCC unroll 12
            for (int i = 0; i < TILE_ROWS; ++i) {
                dot[i][0] = multiply_add(repeat(value[i]), left, dot[i][0]);
                dot[i][1] = multiply_add(repeat(value[i]), right, dot[i][1]);
            }
        }
        const Floats left = load<Floats>(half_norms), right = load<Floats>(half_norms + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < TILE_ROWS; ++i)
            store(slots + i * slot_stride + tile * LANES, smaller(left - dot[i][0], right - dot[i][1]));
    }
}

constexpr int MOST_KEPT = 24;
constexpr int64_t SLOT_BYTES = 16 << 10;  // scores of one microkernel's rows: half of an L1 cache
constexpr int64_t MOST_CHUNK_TILES = SLOT_BYTES / (TILE_ROWS * VECTOR_BYTES);

// Slots of one row and chunk are padded with this many tiles of infinity.
constexpr int64_t padded_tiles(int64_t tiles) { return (tiles + 3) / 4 * 4; }

// What is known of one row while tiles pass by: its best score so far, and the slots within the margin of it.
struct Kept {
    float best;
    float margin;  // twice the bound
    int32_t count;
    bool all;  // more than fit, or a row that cannot be screened: every code is to be looked at
    int64_t slot[MOST_KEPT];
    float score[MOST_KEPT];
};

inline void keep(Kept& kept, int64_t slot, float score, float limit) {
    if (kept.count == MOST_KEPT) {
        kept.count = 0;
        for (int i = 0; i < MOST_KEPT; ++i) {
            if (kept.score[i] > limit) continue;
            kept.slot[kept.count] = kept.slot[i];
            kept.score[kept.count++] = kept.score[i];
        }
        if (kept.count == MOST_KEPT) {
            kept.all = true;
            return;
        }
    }
    kept.slot[kept.count] = slot;
    kept.score[kept.count++] = score;
}

// Takes the scores of `tiles` tiles, the first of which has slot number `first`, into account.
inline void sift(Kept& kept, const float* slots, int64_t tiles, int64_t first) {
    if (kept.all) return;
    // One candidate somewhere in the row is the rule, so its place is found without a branch that depends on it:
    // first among the smallest of every four vectors, then within the four.
    Floats fours[(MOST_CHUNK_TILES + 3) / 4];
    Floats least = repeat(INFINITE);
    const int64_t groups = (tiles + 3) / 4;
    for (int64_t g = 0; g < groups; ++g) {
        const float* four = slots + g * 4 * LANES;
        fours[g] = smaller(smaller(load<Floats>(four), load<Floats>(four + LANES)),
                           smaller(load<Floats>(four + 2 * LANES), load<Floats>(four + 3 * LANES)));
        least = smaller(least, fours[g]);
    }
    const float best = smallest_lane(least);
    kept.best = best < kept.best ? best : kept.best;
    const float limit = kept.best + kept.margin;
    if (best > limit || best == INFINITE) return;
    const Floats limits = repeat(limit);
    for (int64_t begin = 0; begin < groups; begin += 64) {
        const int64_t end = begin + 64 < groups ? begin + 64 : groups;
        uint64_t near = 0;
        for (int64_t g = begin; g < end; ++g) near |= (uint64_t)(lanes_at_most(fours[g], limits) != 0) << (g - begin);
        for (; near; near &= near - 1) {
            const int64_t slot = (begin + __builtin_ctzll(near)) * 4 * LANES;
            uint64_t lanes = 0;
            for (int t = 0; t < 4; ++t)
                lanes |= (uint64_t)lanes_at_most(load<Floats>(slots + slot + t * LANES), limits) << (t * LANES);
            for (; lanes && !kept.all; lanes &= lanes - 1) {
                const int64_t found = slot + __builtin_ctzll(lanes);
                keep(kept, first + found, slots[found], limit);
            }
        }
    }
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
