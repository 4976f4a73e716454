// Products with packed matrices (packed.py): every output is summed in one order, whatever is computed beside it.
#pragma once

#include "common/math.h"
#include "common/numbers.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t PANEL = 16;  // columns of a panel

enum WeightType : int32_t { WEIGHTS_FLOAT32 = 0, WEIGHTS_BFLOAT16 = 1, WEIGHTS_INT8 = 2 };

// A packed matrix of taps * width rows.
struct Matrix {
    const void* panels;  // on a boundary of 64 bytes
    const float* scale;  // [N] for int8, otherwise null
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

inline float weight_at(const Matrix& matrix, int64_t k, int64_t column) {
    const int64_t row = column / PANEL * matrix.taps * matrix.width + k, lane = column % PANEL;
    if (matrix.type == WEIGHTS_FLOAT32) return ((const float*)matrix.panels)[row * PANEL + lane];
    if (matrix.type == WEIGHTS_INT8) return ((const int8_t*)matrix.panels)[row * PANEL + lane];
    const uint32_t word = ((const uint32_t*)matrix.panels)[row * PANEL / 2 + lane % 8];
    return float_of(lane < 8 ? word << 16 : word & 0xffff0000);
}

// Computes panels [first, last) of a product.
inline void multiply(const Product& product, int64_t first, int64_t last) {
    const Matrix& matrix = product.matrix;
    for (int64_t m = 0; m < product.M; ++m)
        for (int64_t p = first; p < last; ++p) {
            float sums[PANEL];
            for (int64_t lane = 0; lane < PANEL; ++lane) {
                const int64_t n = p * PANEL + lane;
                float start = product.bias ? product.bias[n] : 0;
                if (product.addends) start = product.addends[m][n] + start;
                float sum = matrix.scale ? 0 : start;
                for (int64_t s = 0; s < matrix.taps; ++s) {
                    const float* input = product.inputs[s * product.M + m];
                    for (int64_t k = 0; input && k < matrix.width; ++k)
                        sum = input[k] * weight_at(matrix, s * matrix.width + k, n) + sum;
                }
                sums[lane] = matrix.scale ? sum * matrix.scale[n] + start : sum;
            }
            for (int64_t lane = 0; lane < PANEL && product.outputs; ++lane) {
                const int64_t n = p * PANEL + lane;
                const float sum = product.elu ? elu(repeat(sums[lane]))[0] : sums[lane];
                product.outputs[m][n] = product.residuals ? product.residuals[m][n] + sum : sum;
            }
            for (int64_t lane = 0; lane < 8 && product.gated; ++lane) {
                const int64_t n = p * 8 + lane;
                const float gated = gate(repeat(sums[lane]), repeat(sums[lane + 8]))[0];
                product.gated[m][n] = product.gated_residuals ? product.gated_residuals[m][n] + gated : gated;
            }
        }
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
