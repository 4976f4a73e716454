// How the weights of a call are cut into pieces of work, and taken in groups that stay in the caches.
#pragma once

#include "common/crew.h"
#include "common/scratch.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t GROUP_ELEMENTS = 128 << 10;  // of weights whose passes follow each other, unless one alone has more
constexpr int64_t PIECE_ELEMENTS = 64 << 10;   // of rows that one thread takes at a time
constexpr int64_t MOST_PIECES = 16;            // of a weight's rows: each has sums of its own over them
constexpr int64_t RUN_ELEMENTS = 32 << 10;     // that one thread divides at a time
constexpr int64_t ALONE = 64 << 10;            // elements of a call that are not worth another thread

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Some rows, or some elements, of one weight; `index` counts those of all weights.
struct Piece {
    int64_t weight, begin, end, index;
};

// The pieces of all weights, one after the other; those of weight i are [first[i], first[i + 1]).
struct Pieces {
    Piece* list;
    int64_t* first;

    void cut(Cutter& cutter, int64_t weights, int64_t pieces) {
        list = cutter.cut<Piece>(pieces);
        first = cutter.cut<int64_t>(weights + 1);
    }

    // Appends those of one weight, `step` of its `extent` each.
    void add(int64_t weight, int64_t extent, int64_t step) {
        int64_t at = weight ? first[weight] : first[0] = 0;
        for (int64_t begin = 0; begin < extent; begin += step, ++at)
            list[at] = {weight, begin, begin + step < extent ? begin + step : extent, at};
        first[weight + 1] = at;
    }
};

inline int64_t rows_of_piece(int64_t rows, int64_t cols) {
    const int64_t few = divide_up(rows, MOST_PIECES), small = divide_up(PIECE_ELEMENTS, cols ? cols : 1);
    return divide_up(few > small ? few : small, 4) * 4;
}

inline int64_t pieces_of(int64_t extent, int64_t step) { return divide_up(extent, step); }

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
