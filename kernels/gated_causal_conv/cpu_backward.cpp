// The gradients of the gated convolution on the CPU, apart from the input's, which is a convolution again (cpu.cpp).
// README.md beside this file has the design; compiled once per instruction set level (see common/simd.h).
#include "gated_causal_conv/cpu.h"

#include "common/crew.h"
#include "common/pool.h"
#include "common/scratch.h"
#include "gated_causal_conv/cpu_backward_gate.h"
#include "gated_causal_conv/cpu_backward_weight.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t PIECE_FLOATS = 16 << 10;  // packed by one piece
constexpr int64_t LEAST_PIECES = 48;        // of a slab's products, where there are so many: threads end together
constexpr int64_t WRITTEN_ROWS = 64;        // of the totals, by one piece
constexpr int64_t LEAST_CHUNK = 64, MOST_CHUNKS = 256;  // of positions that gate_backward gives to one thread
constexpr int64_t SUMMED = 64;  // positions whose gradients are summed before they join the chunk's

// A weight gradient: slab by slab of positions, x and grad are packed and then multiplied, by all threads.
struct WeightJob {
    WeightGradCall call;
    Tiles tiles;
    int64_t panels, parts;            // parts: of the tiles, each with pieces of its own
    int64_t nearest[3], farthest[3];  // of what the taps read, from a position of grad
    int64_t chunk[4];                 // extents of a slab, at most
    Box in, out;                      // of the slab at hand: what is read of x, and positions of grad
    bool first;                       // slab
    float *packed_x, *packed_grad;    // [tiles][positions][rows of the tile], [panels][positions][PANEL]
    float* totals;                    // [taps][panels][Cin][PANEL]

    int64_t x_rows() const { return rows_at_once(in.extent(3) * call.Cin); }
    int64_t grad_rows() const { return rows_at_once(out.extent(3) * call.Cout); }
    int64_t x_pieces() const { return divide_up(in.rows(), x_rows()); }
    int64_t grad_pieces() const { return divide_up(out.rows(), grad_rows()); }
    static int64_t rows_at_once(int64_t floats_of_row) { return most(1, PIECE_FLOATS / most(1, floats_of_row)); }

    int64_t slab_positions() const { return chunk[0] * chunk[1] * chunk[2] * chunk[3]; }
    int64_t grad_floats() const { return slab_positions() * panels * PANEL; }
    int64_t x_floats() const {
        int64_t positions = chunk[0];
        for (int axis = 0; axis < 3; ++axis)
            positions *= least(call.in[axis], chunk[axis + 1] + farthest[axis] - nearest[axis]);
        return positions * call.Cin;
    }
    bool too_large() const {
        return x_floats() + grad_floats() > SLAB_FLOATS && slab_positions() > LEAST_SLAB;
    }

    void cut(Cutter& cutter) {
        packed_x = cutter.cut<float>(x_floats());
        packed_grad = cutter.cut<float>(grad_floats());
        totals = cutter.cut<float>(call.taps * panels * call.Cin * PANEL);
    }
};

void plan(WeightJob& job) {
    const WeightGradCall& call = job.call;
    job.tiles = Tiles(call.Cin);
    job.panels = divide_up(call.Cout, PANEL);
    job.parts = least(job.tiles.count, divide_up(LEAST_PIECES, call.taps * job.panels));
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
        while (job.chunk[axis] > 1 && job.too_large()) job.chunk[axis] = divide_up(job.chunk[axis], 2);
}

// Row `row` of a box.
struct Row {
    int64_t b, t, y;

    Row(const Box& box, int64_t row) {
        y = box.begin[2] + row % box.extent(2);
        t = box.begin[1] + row / box.extent(2) % box.extent(1);
        b = box.begin[0] + row / box.extent(2) / box.extent(1);
    }

    template <class T>
    const T* of(const View& view, int64_t x) const {
        const int64_t at[] = {b, t, y, x};
        return (const T*)view.data + place_in(view, at);
    }
};

// Whether some tap reads this row of x: taps far apart in time or height leave most rows between them out.
bool is_read(const WeightJob& job, const Row& row) {
    const WeightGradCall& call = job.call;
    for (int64_t tap = 0; tap < call.taps; ++tap) {
        const int64_t t = row.t - call.origin[0] - call.offsets[tap * 3];
        const int64_t y = row.y - call.origin[1] - call.offsets[tap * 3 + 1];
        if (t >= job.out.begin[1] && t < job.out.end[1] && y >= job.out.begin[2] && y < job.out.end[2]) return true;
    }
    return false;
}

template <bool DENSE, class T>
void pack_x_row(const WeightJob& job, int64_t i) {
    const View& x = job.call.x;
    const Row row(job.in, i);
    const int64_t count = job.in.extent(3);
    if (!is_read(job, row)) return;
    pack_x<DENSE>(row.of<T>(x, job.in.begin[3]), x.strides[3], x.strides[4], count, job.tiles, job.packed_x,
                  job.in.positions(), i * count);
}

template <bool DENSE, class T>
void pack_grad_row(const WeightJob& job, int64_t i) {
    const View& grad = job.call.grad;
    const int64_t count = job.out.extent(3);
    pack_grad<DENSE>(Row(job.out, i).of<T>(grad, job.out.begin[3]), grad.strides[3], grad.strides[4], count,
                     job.call.Cout, job.packed_grad, job.out.positions(), i * count);
}

template <bool DENSE, class T>
void pack_rows(const WeightJob& job, bool of_x, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
        of_x ? pack_x_row<DENSE, T>(job, row) : pack_grad_row<DENSE, T>(job, row);
}

// Piece i of packing: some rows of x, or after those of grad.
void pack_piece(void* context, int64_t i) {
    const WeightJob& job = *(const WeightJob*)context;
    const bool of_x = i < job.x_pieces();
    const View& view = of_x ? job.call.x : job.call.grad;
    const int64_t at_once = of_x ? job.x_rows() : job.grad_rows();
    const int64_t first = (of_x ? i : i - job.x_pieces()) * at_once;
    const int64_t last = least(first + at_once, (of_x ? job.in : job.out).rows());
    if (view.strides[4] == 1)
        view.type == FLOAT32 ? pack_rows<true, float>(job, of_x, first, last)
                             : pack_rows<true, BFloat16>(job, of_x, first, last);
    else
        view.type == FLOAT32 ? pack_rows<false, float>(job, of_x, first, last)
                             : pack_rows<false, BFloat16>(job, of_x, first, last);
}

// Piece i of multiplying: one tap, one panel of grad and some tiles of x, over all positions of the slab. Nobody else
// adds to these totals, so the order of the sum is that of the slabs and blocks, whoever computes it.
void multiply_piece(void* context, int64_t i) {
    const WeightJob& job = *(const WeightJob*)context;
    const WeightGradCall& call = job.call;
    const Tiles& tiles = job.tiles;
    const int64_t part = i % job.parts, tap = i / job.parts % call.taps, panel = i / job.parts / call.taps;
    const int64_t begin = part * tiles.count / job.parts, end = (part + 1) * tiles.count / job.parts;
    float* totals = job.totals + (tap * job.panels + panel) * call.Cin * PANEL;
    if (job.first) {
        const int64_t rows = tiles.first(end) - tiles.first(begin);
        __builtin_memset(totals + tiles.first(begin) * PANEL, 0, (size_t)(rows * PANEL) * sizeof(float));
    }
    int64_t shift[3];
    for (int axis = 0; axis < 3; ++axis) shift[axis] = call.origin[axis] + call.offsets[tap * 3 + axis];
    Reached reached(job.in, job.out, shift, call.in);
    const int64_t positions = job.in.positions();
    const float* grad = job.packed_grad + panel * PANEL * job.out.positions();
    Run runs[BLOCK];
    while (const int64_t count = reached.next(runs))
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t k = tiles.first(tile);
            add_products_of<TILE_ROWS>(tiles.rows_of(tile), runs, count, job.packed_x + k * positions, grad,
                                       totals + k * PANEL);
        }
}

// Piece i of the end: some rows of one tap leave the totals.
template <class T>
void write_piece(void* context, int64_t i) {
    const WeightJob& job = *(const WeightJob*)context;
    const int64_t Cin = job.call.Cin, Cout = job.call.Cout, parts = divide_up(Cin, WRITTEN_ROWS);
    const int64_t tap = i / parts, first = i % parts * WRITTEN_ROWS, last = least(first + WRITTEN_ROWS, Cin);
    for (int64_t k = first; k < last; ++k) {
        T* to = (T*)job.call.grad_weight + (tap * Cin + k) * Cout;
        const float* from = job.totals + (tap * job.panels * Cin + k) * PANEL;
        for (int64_t n = 0; n < Cout; n += PANEL, from += Cin * PANEL)
            for (int64_t c = 0; c < least(PANEL, Cout - n); ++c) narrow(from[c], to[n + c]);
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
                    crew.each(job.x_pieces() + job.grad_pieces(), pack_piece, &job);
                    crew.each(call.taps * job.panels * job.parts, multiply_piece, &job);
                    job.first = false;
                }
    crew.each(call.taps * divide_up(call.Cin, WRITTEN_ROWS),
              call.type == FLOAT32 ? write_piece<float> : write_piece<BFloat16>, &job);
}

// The gradient at the sum before the activation: chunks of positions, whose sums for the bias are added up in order.
struct GateJob {
    GateCall call;
    int64_t positions, chunk, chunks;
    int64_t next;  // chunk that is taken by whoever is free
    float* sums;   // [chunks, Cout], or null
    int64_t channels() const { return call.activation == PLAIN ? call.Cout : call.Cout / 2; }
};

struct GateScratch {
    float *pre, *grad_out, *grad_pre, *grad;  // [STAGED, Cout]
    float* sums;                              // [Cout]

    void cut(Cutter& cutter, int64_t Cout) {
        pre = cutter.cut<float>(STAGED * Cout);
        grad_out = cutter.cut<float>(STAGED * Cout);
        grad_pre = cutter.cut<float>(STAGED * Cout);
        grad = cutter.cut<float>(STAGED * Cout);
        sums = cutter.cut<float>(Cout);
    }
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
    GateScratch scratch;
    Cutter sizes;
    scratch.cut(sizes, job.call.Cout);
    Memory memory;
    if (!memory.take(sizes.used)) return;  // the others do its share
    Cutter cutter{(char*)memory.block};
    scratch.cut(cutter, job.call.Cout);
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
    if (call.grad_bias && !sums.take((size_t)(job.chunks * call.Cout) * sizeof(float))) return NO_MEMORY;
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
    Cutter sizes;
    job.cut(sizes);
    Memory memory;
    if (!memory.take(sizes.used)) return NO_MEMORY;
    Cutter cutter{(char*)memory.block};
    job.cut(cutter);
    Crew::run(call.threads, weigh, &job);
    return DONE;
}

}  // namespace fastvid::FASTVID_LEVEL
