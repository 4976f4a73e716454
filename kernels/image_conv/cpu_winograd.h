// F(2x2, 3x3): the 2 x 2 outputs of a tile from the 4 x 4 inputs around them by 16 products where the definition has 36.
//
//     out = A^T [ (G g G^T) * (B^T d B) ] A,    d: 4 x 4 inputs, g: 3 x 3 weights, *: element by element
//     B^T = 1  0 -1  0    G = 1    0    0    A^T = 1  1  1  0
//           0  1  1  0        1/2  1/2  1/2        0  1 -1 -1
//           0 -1  1  0        1/2 -1/2  1/2
//           0  1  0 -1        0    0    1
// The 16 elements are numbered row by row; each is one product of matrices, [tiles, Cin] times [Cin, Cout].
#pragma once

#include "common/panel.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int POINTS = 16;  // elements of a transformed tile

// One vector of channels of a tile: from 16 places `at` elements behind d[i] to 16 places `step` apart.
inline void transform_input(const float* const* d, int64_t at, float* to, int64_t step) {
    const auto in = [&](int y, int x) { return load<Floats>(d[4 * y + x] + at); };
    const auto put = [&](int y, Floats a, Floats b, Floats c, Floats e) {
        float* row = to + 4 * y * step;
        store(row, a - c);
        store(row + step, b + c);
        store(row + 2 * step, c - b);
        store(row + 3 * step, b - e);
    };
    put(0, in(0, 0) - in(2, 0), in(0, 1) - in(2, 1), in(0, 2) - in(2, 2), in(0, 3) - in(2, 3));
    put(1, in(1, 0) + in(2, 0), in(1, 1) + in(2, 1), in(1, 2) + in(2, 2), in(1, 3) + in(2, 3));
    put(2, in(2, 0) - in(1, 0), in(2, 1) - in(1, 1), in(2, 2) - in(1, 2), in(2, 3) - in(1, 3));
    put(3, in(1, 0) - in(3, 0), in(1, 1) - in(3, 1), in(1, 2) - in(3, 2), in(1, 3) - in(3, 3));
}

// A tile's Cin channels; d: the 16 positions' channels. to: [POINTS], `step` apart, [Cin up to whole vectors], where
// what lies behind Cin is zero.
inline void transform_tile(const float* const* d, int64_t Cin, float* to, int64_t step) {
    const int64_t whole = Cin / LANES * LANES;
    for (int64_t c = 0; c < whole; c += LANES) transform_input(d, c, to + c, step);
    if (whole == Cin) return;
    float rest[POINTS][LANES] = {};
    const float* rows[POINTS];
    for (int i = 0; i < POINTS; ++i) {
        rows[i] = rest[i];
        for (int64_t c = whole; c < Cin; ++c) rest[i][c - whole] = d[i][c];
    }
    transform_input(rows, 0, to + whole, step);
}

// One vector of a kernel's columns: g: [9] places `step` apart, to: [POINTS] places `to_step` apart.
inline void transform_weight(const float* g, int64_t step, float* to, int64_t to_step) {
    Floats t[4][3];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
        const Floats a = load<Floats>(g + j * step), b = load<Floats>(g + (3 + j) * step);
        const Floats c = load<Floats>(g + (6 + j) * step), half = (a + c) * 0.5f, middle = b * 0.5f;
        t[0][j] = a, t[1][j] = half + middle, t[2][j] = half - middle, t[3][j] = c;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const Floats half = (t[i][0] + t[i][2]) * 0.5f, middle = t[i][1] * 0.5f;
        store(to + 4 * i * to_step, t[i][0]);
        store(to + (4 * i + 1) * to_step, half + middle);
        store(to + (4 * i + 2) * to_step, half - middle);
        store(to + (4 * i + 3) * to_step, t[i][2]);
    }
}

// The four outputs of one vector of channels; m: [POINTS] places `step` apart.
inline void transform_output(const float* m, int64_t step, Floats (&out)[2][2]) {
    Floats above[4], below[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const Floats b = load<Floats>(m + (4 + j) * step), c = load<Floats>(m + (8 + j) * step);
        above[j] = load<Floats>(m + j * step) + (b + c);
        below[j] = (b - c) - load<Floats>(m + (12 + j) * step);
    }
    out[0][0] = above[0] + (above[1] + above[2]), out[0][1] = (above[1] - above[2]) - above[3];
    out[1][0] = below[0] + (below[1] + below[2]), out[1][1] = (below[1] - below[2]) - below[3];
}

// Four rows of `count` elements, `stride` apart, as columns: to[i * PANEL + row].
inline void turn(const float* rows, int64_t stride, int64_t count, float* to) {
    typedef float Four __attribute__((vector_size(16)));
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const Four a = load<Four>(rows + i), b = load<Four>(rows + stride + i);
        const Four c = load<Four>(rows + 2 * stride + i), d = load<Four>(rows + 3 * stride + i);
        const Four ab = {a[0], b[0], a[1], b[1]}, cd = {c[0], d[0], c[1], d[1]};
        const Four ba = {a[2], b[2], a[3], b[3]}, dc = {c[2], d[2], c[3], d[3]};
        store(to + i * PANEL, Four{ab[0], ab[1], cd[0], cd[1]});
        store(to + (i + 1) * PANEL, Four{ab[2], ab[3], cd[2], cd[3]});
        store(to + (i + 2) * PANEL, Four{ba[0], ba[1], dc[0], dc[1]});
        store(to + (i + 3) * PANEL, Four{ba[2], ba[3], dc[2], dc[3]});
    }
    for (; i < count; ++i)
        for (int row = 0; row < 4; ++row) to[i * PANEL + row] = rows[row * stride + i];
}

constexpr int64_t PACKED_AT_ONCE = 16;  // rows of a panel whose weights are gathered before they are transformed

// A panel of transformed weights, [POINTS][Cin][PANEL] with the points `step` apart: columns [column, column + count)
// of all Cout, rows [begin, end). strides: Cout, Cin, rows and columns of the kernel, in elements, of any sign. Columns
// from `count` on are zero.
inline void pack_weights(const float* weight, const int64_t (&strides)[4], int64_t column, int64_t count, int64_t begin,
                         int64_t end, int64_t step, float* to) {
    float gathered[PACKED_AT_ONCE * 9][PANEL];
    if (count < PANEL) __builtin_memset(gathered, 0, sizeof gathered);
    const bool dense = strides[1] == 9 && strides[2] == 3 && strides[3] == 1;
    for (int64_t k = begin; k < end; k += PACKED_AT_ONCE) {
        const int64_t rows = end - k < PACKED_AT_ONCE ? end - k : PACKED_AT_ONCE;
        const float* start = weight + column * strides[0] + k * strides[1];
        int64_t done = 0;  // lanes
        for (; done + 4 <= count && dense; done += 4)
            turn(start + done * strides[0], strides[0], 9 * rows, gathered[0] + done);
        for (int64_t lane = done; lane < count; ++lane) {
            const float* g = start + lane * strides[0];
            for (int64_t r = 0; r < rows; ++r, g += strides[1])
                for (int i = 0; i < 9; ++i) gathered[9 * r + i][lane] = g[i / 3 * strides[2] + i % 3 * strides[3]];
        }
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t half = 0; half < PANEL; half += LANES)
                transform_weight(gathered[9 * r] + half, PANEL, to + (k + r) * PANEL + half, step);
    }
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
