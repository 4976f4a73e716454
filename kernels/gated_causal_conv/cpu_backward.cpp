// The gradients of the gated convolution on the CPU, apart from the input's, which is a convolution again (cpu.cpp).
// README.md beside this file has the design; compiled once per instruction set level (see common/simd.h).
#include "gated_causal_conv/cpu.h"

#include <cstdlib>

#include "common/crew.h"
#include "common/pool.h"
#include "gated_causal_conv/cpu_backward_gate.h"
#include "gated_causal_conv/cpu_backward_weight.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t PIECE_FLOATS = 16 << 10;  // packed or written by one piece
constexpr int64_t LEAST_PIECES = 48;        // of a slab's products, where there are so many: threads end together

struct Memory {
    void* block = nullptr;

    bool take(int64_t floats) { return posix_memalign(&block, 64, (size_t)most(floats, 16) * sizeof(float)) == 0; }
    ~Memory() { free(block); }
};

// A weight gradient: slab by slab of positions, x and grad are packed and then multiplied, by all threads.
struct WeightJob {
    WeightGradCall call;
    Tiles tiles;
    int64_t panels, parts;          // parts: of the tiles, each with pieces of its own
    int64_t nearest[3], farthest[3];  // of what the taps read, from a position of grad
    int64_t chunk[4];               // extents of a slab, at most
    Box in, out;                    // of the slab at hand: what is read of x, and positions of grad
    bool first;                     // slab
    float *packed_x, *packed_grad;
    float* totals;  // [taps, Cin, stride]: grad_weight itself, where it is float32 and whole panels
    int64_t stride;

    bool direct() const { return totals == call.grad_weight; }
    int64_t rows_at_once(int64_t width, int64_t channels) const {
        return most(1, PIECE_FLOATS / most(1, width * channels));
    }
    int64_t x_rows() const { return rows_at_once(in.extent(3), call.Cin); }
    int64_t grad_rows() const { return rows_at_once(out.extent(3), call.Cout); }
    int64_t x_pieces() const { return divide_up(in.rows(), x_rows()); }
};

int64_t x_floats(const WeightJob& job) {
    int64_t positions = job.chunk[0];
    for (int axis = 0; axis < 3; ++axis)
        positions *= least(job.call.in[axis], job.chunk[axis + 1] + job.farthest[axis] - job.nearest[axis]);
    return positions * job.call.Cin;
}

int64_t grad_floats(const WeightJob& job) {
    return job.chunk[0] * job.chunk[1] * job.chunk[2] * job.chunk[3] * job.panels * PANEL;
}

void plan(WeightJob& job) {
    const WeightGradCall& call = job.call;
    job.tiles = {call.Cin};
    job.panels = divide_up(call.Cout, PANEL);
    job.parts = least(job.tiles.count(), divide_up(LEAST_PIECES, call.taps * job.panels));
    job.stride = job.panels * PANEL;
    for (int axis = 0; axis < 3; ++axis) {
        int64_t low = call.offsets[axis], high = low;
        for (int64_t tap = 1; tap < call.taps; ++tap) {
            low = least(low, call.offsets[tap * 3 + axis]);
            high = most(high, call.offsets[tap * 3 + axis]);
        }
        job.nearest[axis] = call.origin[axis] + low;
        job.farthest[axis] = call.origin[axis] + high;
    }
    const int64_t whole[] = {call.B, call.size[0], call.size[1], call.size[2]};
    for (int axis = 0; axis < 4; ++axis) job.chunk[axis] = whole[axis];
    for (int axis = 0; axis < 4; ++axis)  // whole rows of few frames rather than some columns of many
        while (job.chunk[axis] > 1 && x_floats(job) + grad_floats(job) > SLAB_FLOATS)
            job.chunk[axis] = divide_up(job.chunk[axis], 2);
}

// Position (b, t, y, 0) of row `row` of a box, in elements from the view's beginning.
struct Row {
    int64_t b, t, y;

    Row(const Box& box, int64_t row) {
        y = box.begin[2] + row % box.extent(2);
        t = box.begin[1] + row / box.extent(2) % box.extent(1);
        b = box.begin[0] + row / box.extent(2) / box.extent(1);
    }

    template <class T>
    const T* of(const View& view, int64_t x) const {
        return (const T*)view.data + b * view.strides[0] + t * view.strides[1] + y * view.strides[2] +
               x * view.strides[3];
    }
};

template <bool DENSE, class T>
void pack_x_row(const WeightJob& job, int64_t row) {
    const View& x = job.call.x;
    const T* from = Row(job.in, row).of<T>(x, job.in.begin[3]);
    const int64_t count = job.in.extent(3);
    pack_x<DENSE>(from, x.strides[3], x.strides[4], count, job.tiles, job.packed_x, job.in.positions(), row * count);
}

template <bool DENSE, class T>
void pack_grad_row(const WeightJob& job, int64_t row) {
    const View& grad = job.call.grad;
    const T* from = Row(job.out, row).of<T>(grad, job.out.begin[3]);
    const int64_t count = job.out.extent(3);
    pack_grad<DENSE>(from, grad.strides[3], grad.strides[4], count, job.call.Cout, job.packed_grad,
                     job.out.positions(), row * count);
}

template <class T>
void pack_some(const WeightJob& job, const View& view, int64_t first, int64_t last) {
    const bool of_x = &view == &job.call.x, dense = view.strides[4] == 1;
    for (int64_t row = first; row < last; ++row) {
        if (of_x)
            dense ? pack_x_row<true, T>(job, row) : pack_x_row<false, T>(job, row);
        else
            dense ? pack_grad_row<true, T>(job, row) : pack_grad_row<false, T>(job, row);
    }
}

// Piece i of packing: some rows of x, or after those of grad.
void pack_piece(void* context, int64_t i) {
    const WeightJob& job = *(const WeightJob*)context;
    const bool of_x = i < job.x_pieces();
    const View& view = of_x ? job.call.x : job.call.grad;
    const int64_t at_once = of_x ? job.x_rows() : job.grad_rows();
    const int64_t first = (of_x ? i : i - job.x_pieces()) * at_once;
    const int64_t last = least(first + at_once, (of_x ? job.in : job.out).rows());
    view.type == FLOAT32 ? pack_some<float>(job, view, first, last) : pack_some<BFloat16>(job, view, first, last);
}

// Piece i of multiplying: one tap, one panel of grad and some tiles of x, over all positions of the slab.
void multiply_piece(void* context, int64_t i) {
    const WeightJob& job = *(const WeightJob*)context;
    const WeightGradCall& call = job.call;
    const Tiles& tiles = job.tiles;
    const int64_t part = i % job.parts, tap = i / job.parts % call.taps, panel = i / job.parts / call.taps;
    const int64_t begin = part * tiles.count() / job.parts, end = (part + 1) * tiles.count() / job.parts;
    float* totals = job.totals + tap * call.Cin * job.stride + panel * PANEL;
    if (job.first)
        for (int64_t k = tiles.first(begin); k < tiles.first(end); ++k)
            __builtin_memset(totals + k * job.stride, 0, PANEL * sizeof(float));
    int64_t shift[3];
    for (int axis = 0; axis < 3; ++axis) shift[axis] = call.origin[axis] + call.offsets[tap * 3 + axis];
    Reached reached(job.in, job.out, shift, call.in);
    const int64_t positions = job.in.positions();
    const float* grad = job.packed_grad + panel * PANEL * job.out.positions();
    Run runs[BLOCK];
    while (const int64_t count = reached.next(runs))
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t k = tiles.first(tile);
            add_products_of<TILE_ROWS>(tiles.rows(tile), runs, count, job.packed_x + k * positions, grad,
                                       totals + k * job.stride, job.stride);
        }
}

// Piece i of the end: the rows of one tap leave the totals.
template <class T>
void write_piece(void* context, int64_t i) {
    const WeightJob& job = *(const WeightJob*)context;
    const int64_t Cin = job.call.Cin, Cout = job.call.Cout;
    for (int64_t k = i * Cin; k < (i + 1) * Cin; ++k) {
        const float* from = job.totals + k * job.stride;
        T* to = (T*)job.call.grad_weight + k * Cout;
        for (int64_t n = 0; n < Cout; ++n) narrow(from[n], to[n]);
    }
}

// The slab that begins at `begin`, and what its taps read of x.
void set_slab(WeightJob& job, const int64_t (&begin)[4]) {
    const int64_t whole[] = {job.call.B, job.call.size[0], job.call.size[1], job.call.size[2]};
    for (int axis = 0; axis < 4; ++axis) {
        job.in.begin[axis] = job.out.begin[axis] = begin[axis];
        job.in.end[axis] = job.out.end[axis] = least(begin[axis] + job.chunk[axis], whole[axis]);
        if (axis == 0) continue;
        job.in.begin[axis] = most(0, job.out.begin[axis] + job.nearest[axis - 1]);
        job.in.end[axis] = least(job.call.in[axis - 1], job.out.end[axis] + job.farthest[axis - 1]);
        job.in.end[axis] = most(job.in.begin[axis], job.in.end[axis]);
    }
}

void weigh(Crew& crew, void* context) {
    WeightJob& job = *(WeightJob*)context;
    const WeightGradCall& call = job.call;
    job.first = true;
    int64_t at[4];
    for (at[0] = 0; at[0] < call.B; at[0] += job.chunk[0])
        for (at[1] = 0; at[1] < call.size[0]; at[1] += job.chunk[1])
            for (at[2] = 0; at[2] < call.size[1]; at[2] += job.chunk[2])
                for (at[3] = 0; at[3] < call.size[2]; at[3] += job.chunk[3]) {
                    set_slab(job, at);
                    crew.each(job.x_pieces() + divide_up(job.out.rows(), job.grad_rows()), pack_piece, &job);
                    crew.each(call.taps * job.panels * job.parts, multiply_piece, &job);
                    job.first = false;
                }
    if (!job.direct()) crew.each(call.taps, call.type == FLOAT32 ? write_piece<float> : write_piece<BFloat16>, &job);
}

// The gradient at the sum before the activation: chunks of positions, whose sums for the bias are added up in order.
struct GateJob {
    GateCall call;
    int64_t positions, chunk, chunks;
    int64_t next;  // chunk that is taken by whoever is free
    float* sums;   // [chunks, Cout], or null
    int64_t channels() const { return call.activation == PLAIN ? call.Cout : call.Cout / 2; }
};

constexpr int64_t LEAST_CHUNK = 64, MOST_CHUNKS = 256;
constexpr int64_t SUMMED = 64;  // positions whose gradients are summed before they join the chunk's

struct GateScratch {
    float *pre, *grad_out, *grad_pre, *grad;  // [STAGED, Cout]
    float* sums;                              // [Cout]
};

void differentiate(const GateJob& job, const GradRow& row) {
    const GateCall& call = job.call;
    if (call.activation == PLAIN || !row.grad_out) return differentiate_row<Plain>(row, call.Cout);
    if (call.activation == GATE) return differentiate_row<Gated<slopes_of_gate>>(row, call.Cout / 2);
    differentiate_row<Gated<slopes_of_glu>>(row, call.Cout / 2);
}

// Neighbouring positions of one row of the grid.
void differentiate_rows(const GateJob& job, const GateScratch& scratch, int64_t first, int64_t count) {
    const GateCall& call = job.call;
    const int64_t* size = call.size;
    const int64_t at[] = {first / (size[0] * size[1] * size[2]), first / (size[1] * size[2]) % size[0],
                          first / size[2] % size[1], first % size[2]};
    const bool staged = !call.grad.data || !readable(call.grad);
    const View absent = {};
    const View& of_pre = call.grad_out.data ? call.pre : absent;
    const Rows pre = rows_of(of_pre, at, count, call.Cout, scratch.pre);
    const Rows grad_out = rows_of(call.grad_out, at, count, job.channels(), scratch.grad_out);
    const Rows grad_pre = rows_of(call.grad_pre, at, count, call.Cout, scratch.grad_pre);
    const Rows to = staged ? Rows{scratch.grad, call.Cout} : rows_of(call.grad, at, count, call.Cout, nullptr);
    for (int64_t p = 0; p < count; ++p)
        differentiate(job, {pre[p], grad_out[p], grad_pre[p], to[p], job.sums ? scratch.sums : nullptr});
    if (staged && call.grad.data) leave_rows(call.grad, at, count, call.Cout, scratch.grad);
}

void differentiate_chunk(const GateJob& job, const GateScratch& scratch, int64_t chunk) {
    const int64_t Cout = job.call.Cout, W = job.call.size[2];
    const int64_t end = least((chunk + 1) * job.chunk, job.positions);
    float* sums = job.sums + chunk * Cout;
    if (job.sums) __builtin_memset(sums, 0, (size_t)Cout * sizeof(float));
    for (int64_t begin = chunk * job.chunk; begin < end; begin += SUMMED) {
        if (job.sums) __builtin_memset(scratch.sums, 0, (size_t)Cout * sizeof(float));
        const int64_t stop = least(begin + SUMMED, end);
        for (int64_t p = begin, count; p < stop; p += count) {
            count = least(least(STAGED, stop - p), W - p % W);
            differentiate_rows(job, scratch, p, count);
        }
        for (int64_t c = 0; c < Cout && job.sums; ++c) sums[c] += scratch.sums[c];
    }
}

void differentiate_chunks(void* context) {
    GateJob& job = *(GateJob*)context;
    const int64_t Cout = job.call.Cout;
    Memory memory;
    if (!memory.take((4 * STAGED + 1) * Cout)) return;  // the others do its share
    float* at = (float*)memory.block;
    const GateScratch scratch = {at, at + STAGED * Cout, at + 2 * STAGED * Cout, at + 3 * STAGED * Cout,
                                 at + 4 * STAGED * Cout};
    for (;;) {
        const int64_t chunk = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
        if (chunk >= job.chunks) return;
        differentiate_chunk(job, scratch, chunk);
    }
}

}  // namespace

Outcome gate_backward(const GateCall& call) {
    GateJob job = {};
    job.call = call;
    job.positions = call.B * call.size[0] * call.size[1] * call.size[2];
    job.chunk = most(LEAST_CHUNK, divide_up(divide_up(job.positions, MOST_CHUNKS), SUMMED) * SUMMED);
    job.chunks = divide_up(job.positions, job.chunk);
    Memory sums;
    if (call.grad_bias && !sums.take(job.chunks * call.Cout)) return NO_MEMORY;
    job.sums = (float*)sums.block;
    run_together((int)least(call.threads, job.chunks), differentiate_chunks, &job);
    if (job.next < job.chunks) return NO_MEMORY;  // every thread went without
    for (int64_t c = 0; c < call.Cout && call.grad_bias; ++c) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < job.chunks; ++chunk) sum += job.sums[chunk * call.Cout + c];
        call.grad_bias[c] = (float)sum;
    }
    return DONE;
}

Outcome weight_gradient(const WeightGradCall& call) {
    const int64_t positions = call.B * call.size[0] * call.size[1] * call.size[2];
    if (!positions || !call.taps || !call.Cin || !call.Cout) {
        const int64_t bytes = call.type == FLOAT32 ? 4 : 2;
        __builtin_memset(call.grad_weight, 0, (size_t)(call.taps * call.Cin * call.Cout * bytes));
        return DONE;
    }
    WeightJob job = {};
    job.call = call;
    plan(job);
    const bool direct = call.type == FLOAT32 && call.Cout % PANEL == 0;
    Memory packed_x, packed_grad, totals;
    if (!packed_x.take(x_floats(job)) || !packed_grad.take(grad_floats(job)) ||
        (!direct && !totals.take(call.taps * call.Cin * job.stride)))
        return NO_MEMORY;
    job.packed_x = (float*)packed_x.block;
    job.packed_grad = (float*)packed_grad.block;
    job.totals = direct ? (float*)call.grad_weight : (float*)totals.block;
    Crew::run(call.threads, weigh, &job);
    return DONE;
}

}  // namespace fastvid::FASTVID_LEVEL
