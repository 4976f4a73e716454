// Products with packed matrices (packed.py). Every output is one accumulator that takes tap after tap and k = 0, 1, 2,
// ... in order, whatever is computed beside it: a row's result does not depend on the other rows of a call, nor on how
// panels are shared out.
#pragma once

#include "common/math.h"
#include "common/numbers.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t PANEL = 16;            // columns of a panel
constexpr int PIECES = PANEL / LANES;    // vectors of a panel's row
constexpr int MOST_ROWS = PIECES < 4 ? 6 : 3;  // of a tile
constexpr int MOST_PANELS = 6;
constexpr int MOST_SUMS = PIECES == 1 ? 24 : 12;  // accumulators of a tile: what leaves registers for the rest

constexpr int64_t PREFETCH_BYTES = 8192;  // how far ahead of its use a weight is asked for

enum WeightType : int32_t { WEIGHTS_FLOAT32 = 0, WEIGHTS_BFLOAT16 = 1, WEIGHTS_INT8 = 2 };

// A packed matrix of taps * width rows.
struct Matrix {
    const void* panels;  // on a boundary of 64 bytes
    const float* scale;  // [N] for int8; null: 1
    int64_t taps, width;
    int32_t type;  // WeightType
};

// One product: M rows of input, each `taps` stretches of `width` floats, with some panels of a matrix.
//     sum[m] = addend[m] + bias + input[m] @ matrix       (int8: addend[m] + bias + scale * (input[m] @ matrix))
// Row pointers point at column 0 of their rows, whichever panels are asked for. Outputs may be inputs of no row of
// the call; a residual may be the output itself.
struct Product {
    Matrix matrix;
    int64_t M;
    const float* const* inputs;   // [taps, M]; a tap whose first pointer is null is skipped, for all rows
    const float* bias;            // [N] or null
    const float* const* addends;  // [M] rows of N, or null
    // what becomes of the sums; one of `outputs` and `gated`, or both
    float* const* outputs;          // [M] rows of N that take the sums, or null
    const float* const* residuals;  // [M] rows added to the outputs at the end, or null
    bool elu;                       // outputs take elu(sum) instead (and no residual)
    float* const* gated;            // [M] rows of N / 2 that take gate(sum) of a paired matrix, or null
    const float* const* gated_residuals;  // [M] rows of N / 2 added to `gated`, or null
};

// How one row of a panel becomes vectors.
struct Float32Weights {
    static constexpr int64_t BYTES = PANEL * 4;

    static inline void widen(const char* from, Floats (&to)[PIECES]) {
#pragma GCC unroll 4
        for (int i = 0; i < PIECES; ++i) to[i] = load<Floats>(from + i * VECTOR_BYTES);
    }
};

struct BFloat16Weights {
    static constexpr int64_t BYTES = PANEL * 2;

    static inline void widen(const char* from, Floats (&to)[PIECES]) {
#if defined(FASTVID_X86) && defined(__AVX512BW__)
        const __m512i words = _mm512_broadcast_i64x4(load<__m256i>(from));
        const __m512i places = _mm512_set_epi64(0, 0, 0, 0, 0x1000000010, 0x1000000010, 0x1000000010, 0x1000000010);
        to[0] = (Floats)((Ints)_mm512_sllv_epi32(words, places) & (int32_t)0xffff0000);
#else
#pragma GCC unroll 2
        for (int i = 0; i < PIECES / 2; ++i) {
            const Ints words = load<Ints>(from + i * VECTOR_BYTES);
            to[i] = (Floats)(words << 16);
            to[i + PIECES / 2] = (Floats)(words & (int32_t)0xffff0000);
        }
#endif
    }
};

struct Int8Weights {
    static constexpr int64_t BYTES = PANEL;

    static inline void widen(const char* from, Floats (&to)[PIECES]) {
#pragma GCC unroll 4
        for (int i = 0; i < PIECES; ++i) {
#if defined(FASTVID_X86) && defined(__AVX512BW__)
            to[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
#elif defined(FASTVID_X86) && defined(__AVX2__)
            to[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + i * LANES))));
#elif defined(FASTVID_X86) && defined(__SSE4_1__)
            to[i] = _mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(load<int32_t>(from + i * LANES))));
#else
            typedef int8_t Bytes __attribute__((vector_size(LANES)));
            to[i] = __builtin_convertvector(load<Bytes>(from + i * LANES), Floats);
#endif
        }
    }
};

// What is done with the finished sums of some rows and panels. sums: [rows][panels * PANEL].
__attribute__((noinline)) void finish(const Product& product, int64_t row, int64_t rows, int64_t panel, int64_t panels,
                   const float* sums) {
    const int64_t columns = panels * PANEL, first = panel * PANEL;
    for (int64_t m = row; m < row + rows; ++m, sums += columns) {
        if (product.outputs) {
            float* to = product.outputs[m] + first;
            const float* residual = product.residuals ? product.residuals[m] + first : nullptr;
            for (int64_t i = 0; i < columns; i += LANES) {
                const Floats sum = load<Floats>(sums + i);
                store(to + i, product.elu ? elu(sum) : residual ? load<Floats>(residual + i) + sum : sum);
            }
        }
        if (!product.gated) continue;
        float* to = product.gated[m] + first / 2;
        const float* residual = product.gated_residuals ? product.gated_residuals[m] + first / 2 : nullptr;
        constexpr int HALF = LANES < 8 ? LANES : 8;  // a panel has 8 channels; a vector of 16 takes one for now
        for (int64_t i = 0; i < columns / 2; i += HALF) {
            Floats a = {}, b = {}, base = {};
            __builtin_memcpy(&a, sums + i / 8 * PANEL + i % 8, HALF * sizeof(float));
            __builtin_memcpy(&b, sums + i / 8 * PANEL + i % 8 + 8, HALF * sizeof(float));
            if (residual) __builtin_memcpy(&base, residual + i, HALF * sizeof(float));
            const Floats gated = residual ? base + gate(a, b) : gate(a, b);
            __builtin_memcpy(to + i, &gated, HALF * sizeof(float));
        }
    }
}

// ROWS rows from `row` on, PANELS panels from `panel` on.
template <class Weights, int ROWS, int PANELS>
void tile(const Product& product, int64_t row, int64_t panel) {
    const Matrix& matrix = product.matrix;
    const int64_t width = matrix.width, panel_bytes = matrix.taps * width * Weights::BYTES;
    const bool scaled = Weights::BYTES == PANEL && matrix.scale;  // an absent matrix has neither taps nor a scale
    Floats sums[ROWS][PANELS][PIECES];
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 6
        for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 4
            for (int i = 0; i < PIECES; ++i) {
                const int64_t n = (panel + p) * PANEL + i * LANES;
                sums[m][p][i] = repeat(0.0f);
                if (scaled) continue;
                if (product.bias) sums[m][p][i] = load<Floats>(product.bias + n);
                if (product.addends) sums[m][p][i] += load<Floats>(product.addends[row + m] + n);
            }
    for (int64_t s = 0, taps; s < matrix.taps; s += taps) {
        const float* const* inputs = product.inputs + s * product.M;
        taps = 1;
        if (!inputs[0]) continue;
        const float* x[ROWS];
#pragma GCC unroll 6
        for (int m = 0; m < ROWS; ++m) x[m] = inputs[row + m];
        // taps that lie side by side are one longer loop
        for (bool together = true; s + taps < matrix.taps; ++taps) {
            const float* const* more = inputs + taps * product.M;
            for (int m = 0; m < ROWS; ++m) together &= more[row + m] == x[m] + taps * width;
            if (!together) break;
        }
        const int64_t rows = taps * width;
        const char* weights = (const char*)matrix.panels + panel * panel_bytes + s * width * Weights::BYTES;
        for (int64_t k = 0; k < rows; ++k, weights += Weights::BYTES) {
#pragma GCC unroll 6
            for (int p = 0; p < PANELS; ++p) {
                Floats w[PIECES];
                // fewer rows read several panels at once, which keeps more requests under way than this does
                if (ROWS >= 4) __builtin_prefetch(weights + p * panel_bytes + PREFETCH_BYTES);
                Weights::widen(weights + p * panel_bytes, w);
#pragma GCC unroll 6
                for (int m = 0; m < ROWS; ++m) {
                    const Floats value = repeat(x[m][k]);
#pragma GCC unroll 4
                    for (int i = 0; i < PIECES; ++i) sums[m][p][i] = multiply_add(w[i], value, sums[m][p][i]);
                }
                // reads the inputs again for the next panel: kept, they would push accumulators out of the registers
                const bool crowded = Weights::BYTES < PANEL * 4 && ROWS > 1 && PIECES == 2;
                if (crowded && p + 1 < PANELS) __asm__ volatile("" ::: "memory");
            }
        }
    }
    const bool direct = product.outputs && !product.residuals && !product.elu && !product.gated;
    float finished[ROWS][PANELS * PANEL];
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; ++m) {
        float* to = direct ? product.outputs[row + m] + panel * PANEL : finished[m];
#pragma GCC unroll 6
        for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 4
            for (int i = 0; i < PIECES; ++i) {
                const int64_t n = (panel + p) * PANEL + i * LANES;
                Floats sum = sums[m][p][i];
                if (scaled) {
                    Floats start = repeat(0.0f);
                    if (product.bias) start = load<Floats>(product.bias + n);
                    if (product.addends) start += load<Floats>(product.addends[row + m] + n);
                    sum = multiply_add(sum, load<Floats>(matrix.scale + n), start);
                }
                store(to + p * PANEL + i * LANES, sum);
            }
    }
    if (!direct) finish(product, row, ROWS, panel, PANELS, finished[0]);
}

template <class Weights, int ROWS, int PANELS>
void tile_of_panels(const Product& product, int64_t row, int64_t panel, int64_t panels) {
    if constexpr (PANELS > 1)
        if (panels < PANELS) return tile_of_panels<Weights, ROWS, PANELS - 1>(product, row, panel, panels);
    tile<Weights, ROWS, PANELS>(product, row, panel);
}

constexpr int most_panels(int rows) {
    const int fitting = MOST_SUMS / (rows * PIECES);
    return fitting > MOST_PANELS ? MOST_PANELS : fitting < 1 ? 1 : fitting;
}

template <class Weights, int ROWS>
void tile_of_rows(const Product& product, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return tile_of_rows<Weights, ROWS - 1>(product, row, rows, panel, panels);
    tile_of_panels<Weights, ROWS, most_panels(ROWS)>(product, row, panel, panels);
}

template <class Weights>
void multiply_panels(const Product& product, int64_t first, int64_t last) {
    const int64_t M = product.M, tiles = (M + MOST_ROWS - 1) / MOST_ROWS;
    const int64_t most = most_panels((int)((M + tiles - 1) / tiles)), panels = last - first;
    const int64_t groups = (panels + most - 1) / most;
    // tiles and groups of nearly the same size: small ones wait for their own sums
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t panel = first + group * panels / groups, end = first + (group + 1) * panels / groups;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t row = t * M / tiles, next = (t + 1) * M / tiles;
            tile_of_rows<Weights, MOST_ROWS>(product, row, next - row, panel, end - panel);
        }
    }
}

// Computes panels [first, last) of a product.
inline void multiply(const Product& product, int64_t first, int64_t last) {
    if (product.M < 1 || last <= first) return;
    switch (product.matrix.type) {
        case WEIGHTS_FLOAT32: return multiply_panels<Float32Weights>(product, first, last);
        case WEIGHTS_BFLOAT16: return multiply_panels<BFloat16Weights>(product, first, last);
        default: return multiply_panels<Int8Weights>(product, first, last);
    }
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
