// One head's rows at the positions of a box: staged as float32 side by side, transposed, and left where they belong.
#pragma once

#include "axial_attention/cpu.h"
#include "axial_attention/cpu_lanes.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t whole_vectors(int64_t count) { return divide_up(count, LANES) * LANES; }

// A tensor as the boxes see it.
struct Operand {
    Heads heads;
    int64_t box[3], width;
    const int64_t* places;  // [positions of a box], from the box's first position
    int64_t step;           // between neighbours in `places`, or -1 where it varies

    bool present() const { return heads.data; }
    bool readable() const { return heads.type == FLOAT32 && (heads.strides[5] == 1 || width == 1); }
    // Whether a product may store its rows of whole vectors here.
    bool writable() const { return readable() && step >= 0 && width % LANES == 0; }
    int64_t position(const int64_t (&cell)[4]) const {
        int64_t at = cell[0] * heads.strides[0];
        for (int axis = 0; axis < 3; ++axis) at += cell[axis + 1] * box[axis] * heads.strides[axis + 1];
        return at;
    }
};

// The same at one box and head: `at` is the element of its first position.
struct Rows {
    const Operand* operand;
    int64_t at;

    int64_t place(int64_t i) const { return at + operand->places[i]; }
    float* row(int64_t i) const { return (float*)operand->heads.data + place(i); }  // of float32
};

// What the next box will read, fetched in the order in which it lies, a few cache lines at a time, while this box is
// computed. Head by head it would be a line or two, thousands of bytes from the next, which no prefetcher foresees.
struct Ahead {
    struct Span {
        Rows rows;
        int64_t next, end, bytes;
    };
    Span spans[5];
    int count = 0;
    int64_t at = 0;

    void add(const Rows& rows, int64_t begin, int64_t end, int64_t width) {
        const int64_t size = rows.operand->heads.type == FLOAT32 ? 4 : 2;
        if (begin < end) spans[count++] = {rows, begin, end, width * size};
    }
    __attribute__((always_inline)) void fetch(int64_t lines) {
        for (; count && lines; --lines) {
            Span& span = spans[count - 1];
            const Operand& operand = *span.rows.operand;
            const int64_t size = operand.heads.type == FLOAT32 ? 4 : 2;
            __builtin_prefetch((const char*)operand.heads.data + span.rows.place(span.next) * size + at, 0, 2);
            at += 64;
            if (at < span.bytes) continue;
            at = 0;
            if (++span.next == span.end) --count;
        }
    }
};

template <class T>
inline void widen_row(const T* from, int64_t step, int64_t width, float* to) {
    int64_t e = 0;
    for (; step == 1 && e + LANES <= width; e += LANES) store(to + e, widened(from + e));
    for (; e < width; ++e) to[e] = widen(from[e * step]);
}

template <class T>
inline void narrow_row(const float* from, int64_t step, int64_t width, T* to) {
    if (step == 1)
        for (int64_t e = 0; e < width; ++e) narrow(from[e], to[e]);
    else
        for (int64_t e = 0; e < width; ++e) narrow(from[e], to[e * step]);
}

template <class T>
void stage_rows_of(const Rows& rows, int64_t begin, int64_t count, float* to) {
    const Operand& operand = *rows.operand;
    const int64_t step = operand.heads.strides[5], width = operand.width, to_step = whole_vectors(width);
    const T* from = (const T*)operand.heads.data + rows.at;
    for (const int64_t* place = operand.places + begin; count-- > 0; ++place, to += to_step)
        widen_row(from + *place, step, width, to);
}

template <class T>
void leave_rows_of(const Rows& rows, int64_t begin, int64_t count, const float* from, int64_t from_step) {
    const Operand& operand = *rows.operand;
    const int64_t step = operand.heads.strides[5], width = operand.width;
    T* to = (T*)operand.heads.data + rows.at;
    for (const int64_t* place = operand.places + begin; count-- > 0; ++place, from += from_step)
        narrow_row(from, step, width, to + *place);
}

// Rows of any type and layout as float32, each of whole vectors, of which the rest is not touched.
inline void stage_rows(const Rows& rows, int64_t begin, int64_t count, float* to) {
    if (rows.operand->heads.type == FLOAT32) return stage_rows_of<float>(rows, begin, count, to);
    if (rows.operand->heads.type == BFLOAT16) return stage_rows_of<BFloat16>(rows, begin, count, to);
    stage_rows_of<Float16>(rows, begin, count, to);
}

inline void leave_rows(const Rows& rows, int64_t begin, int64_t count, const float* from, int64_t from_step) {
    if (rows.operand->heads.type == FLOAT32) return leave_rows_of<float>(rows, begin, count, from, from_step);
    if (rows.operand->heads.type == BFLOAT16) return leave_rows_of<BFloat16>(rows, begin, count, from, from_step);
    leave_rows_of<Float16>(rows, begin, count, from, from_step);
}

// to[e][j] = from[j][e], for `count` rows and all whole vectors of a row; both in whole vectors, so that what lies
// behind a row or below the last one is read as well, and written where nobody looks.
inline void turn_rows(const float* from, int64_t width, int64_t count, float* to, int64_t to_step) {
    const int64_t step = whole_vectors(width);
    for (int64_t j = 0; j < count; j += LANES, from += LANES * step)
        for (int64_t e = 0; e < width; e += LANES) {
            Floats square[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) square[i] = load<Floats>(from + i * step + e);
            turn(square);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) store(to + (e + i) * to_step + j, square[i]);
        }
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
