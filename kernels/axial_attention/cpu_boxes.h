// Where the boxes of a grid lie.
#pragma once

#include "axial_attention/cpu.h"
#include "common/scratch.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

inline int64_t at_most(int64_t value, int64_t most) { return value < most ? value : most; }

inline int64_t at_least(int64_t value, int64_t least) { return value > least ? value : least; }

inline int64_t volume(const int64_t (&extent)[3]) { return extent[0] * extent[1] * extent[2]; }

// A box among the others: its sample, and its cell along T, H and W.
struct Corner {
    int64_t b, cell[3];
};

struct Boxes {
    int64_t cells[3];
    Heads lse;

    Corner corner(int64_t box) const {
        const int64_t x = box % cells[2], line = box / cells[2], y = line % cells[1], slab = line / cells[1];
        return {slab / cells[0], {slab % cells[0], y, x}};
    }

    // The first element of head a in a box.
    void* begin(const Heads& heads, const Corner& corner, const int64_t (&extent)[3], int64_t a) const {
        if (!heads.data) return nullptr;
        int64_t at = corner.b * heads.strides[0] + a * heads.strides[4];
        for (int axis = 0; axis < 3; ++axis) at += corner.cell[axis] * extent[axis] * heads.strides[1 + axis];
        return (char*)heads.data + at * (heads.type == FLOAT32 ? 4 : 2);
    }

    // From the first position of a box to each, in raster order; null while sizes are learnt.
    int64_t* cut(Cutter& cutter, const Heads& heads, const int64_t (&extent)[3]) const {
        int64_t* offsets = cutter.cut<int64_t>(extent[0] * extent[1] * extent[2]);
        if (!offsets) return nullptr;
        for (int64_t t = 0, i = 0; t < extent[0]; ++t)
            for (int64_t y = 0; y < extent[1]; ++y)
                for (int64_t x = 0; x < extent[2]; ++x, ++i)
                    offsets[i] = t * heads.strides[1] + y * heads.strides[2] + x * heads.strides[3];
        return offsets;
    }

    // Whether the positions of two tensors lie alike, so that one table serves both.
    static bool alike(const Heads& a, const Heads& b) {
        return a.strides[1] == b.strides[1] && a.strides[2] == b.strides[2] && a.strides[3] == b.strides[3];
    }
};

// The boxes of a call; lse as a tensor of one number per head.
inline Boxes make_boxes(const AttentionCall& call) {
    const int64_t W = call.cells[2] * call.box[2] * call.A, H = call.cells[1] * call.box[1] * W;
    const int64_t T = call.cells[0] * call.box[0] * H;
    return {{call.cells[0], call.cells[1], call.cells[2]}, {call.lse, {T, H, W, call.A, 1, 1}, FLOAT32}};
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
