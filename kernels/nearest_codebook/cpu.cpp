// nearest_codebook on the CPU: one pass over the rows, block by block: screen, decide, gather, sum. README.md beside
// this file has the design; compiled once per instruction set level (see common/simd.h).
#include "nearest_codebook/cpu.h"

#include "common/numbers.h"
#include "common/pages.h"
#include "common/pool.h"
#include "common/scratch.h"
#include "nearest_codebook/cpu_distance.h"
#include "nearest_codebook/cpu_screen.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t CHUNK_BYTES = 128 << 10;  // of the panel: stays in the L2 cache while a block of rows passes
constexpr int64_t BLOCK_BYTES = 64 << 10;   // of a block of rows, wide and quantised
constexpr int64_t MOST_BLOCK_ROWS = 96, LEAST_BLOCK_ROWS = 24;
constexpr int64_t LEAST_SCREENED_ROWS = 16, LEAST_SCREENED_CODES = 6;  // below, every distance costs less
static_assert(MOST_BLOCK_ROWS % TILE_ROWS == 0 && LEAST_BLOCK_ROWS % TILE_ROWS == 0);

// What all threads share.
struct Job {
    NearestCall call;
    Panel panel;
    bool screened;
    int64_t block_rows, blocks, chunk_tiles;
    int64_t next_tile, next_block;  // taken by whoever is free
    int64_t summed;                 // blocks before this one are in sums and counts
    bool summing;                   // somebody is adding
    uint8_t* assigned;              // [blocks], 1 when the indices of a block are written
    int64_t nonfinite, rescored;
};

struct Scratch {
    float* wide;       // [block_rows, padded D] rows in float32
    float* moved;      // [padded D] one row, minus the centre and scaled
    int32_t* rows;     // [block_rows / TILE_ROWS][pairs][TILE_ROWS] pairs of int16, or float32 [..][D][..]
    float* factors;    // [block_rows] from integer products to negative scores
    Kept* kept;        // [block_rows]
    float* slots;      // [TILE_ROWS, chunk_tiles * LANES]
    float* distances;  // [max(K, 2 MOST_KEPT)]

    void cut(Cutter& cutter, const Job& job) {
        const Panel& panel = job.panel;
        const int64_t rows = job.block_rows, width = padded(panel.D);
        wide = cutter.cut<float>(rows * width);
        moved = cutter.cut<float>(width);
        this->rows = cutter.cut<int32_t>(rows * (panel.quantised ? pairs_of(panel.D) : panel.D));
        factors = cutter.cut<float>(rows);
        kept = cutter.cut<Kept>(rows);
        slots = cutter.cut<float>(TILE_ROWS * padded_tiles(job.chunk_tiles) * LANES);
        distances = cutter.cut<float>(panel.K > 2 * MOST_KEPT ? panel.K : 2 * MOST_KEPT);
    }
};

template <class T>
const T* row_of(const NearestCall& call, int64_t n) {
    return (const T*)call.x + n * call.stride_xn;
}

// Writes row - centre, scaled, and returns its norm, rounded up. All three are padded with zeros.
double move_row(const Panel& panel, const float* row, float* moved) {
    const Floats scale = repeat(panel.scale);
    Floats squares[PARTS] = {};
    for (int64_t d = 0; d < padded(panel.D); d += WIDE) {
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part) {
            const int64_t at = d + part * LANES;
            const Floats v = (load<Floats>(row + at) - load<Floats>(panel.centre + at)) * scale;
            store(moved + at, v);
            squares[part] += v * v;
        }
    }
    return __builtin_sqrt((double)sum_of(squares)) * (1 + ((double)panel.D / WIDE + 16) * UNIT);
}

// Row i of the block as the microkernels read it: element or pair p at [p * TILE_ROWS].
template <class T>
T* packed_row(void* rows, int64_t count, int64_t i) {
    return (T*)rows + i / TILE_ROWS * TILE_ROWS * count + i % TILE_ROWS;
}

void pack_quantised(const float* moved, int64_t D, float steps, int32_t* to) {
    const float shift = 0x1.8p23f;  // leaves the rounded integer in the low bits
    for (int64_t p = 0; p < pairs_of(D); ++p) {
        const uint32_t first = bits_of(moved[2 * p] * steps + shift) & 0xffff;
        const uint32_t second = bits_of(moved[2 * p + 1] * steps + shift);
        to[p * TILE_ROWS] = (int32_t)(second << 16 | first);
    }
}

void pack_float32(const float* moved, int64_t D, float* to) {
    for (int64_t d = 0; d < D; ++d) to[d * TILE_ROWS] = moved[d];
}

// Row n of the call becomes row i of the scratch. Returns false for a row that holds a NaN or an infinity.
template <class T>
bool prepare_row(const Job& job, Scratch& scratch, int64_t n, int64_t i) {
    const Panel& panel = job.panel;
    const int64_t D = panel.D, width = padded(D);
    const T* from = row_of<T>(job.call, n);
    float* wide = scratch.wide + i * width;
    for (int64_t d = 0; d < D; ++d) wide[d] = widen(from[d]);
    for (int64_t d = D; d < width; ++d) wide[d] = 0;
    Kept& kept = scratch.kept[i];
    kept.best = INFINITE;
    kept.count = 0;
    kept.all = true;
    scratch.factors[i] = 0;
    const double norm = move_row(panel, wide, scratch.moved);
    const bool screened = job.screened && norm < FARTHEST * panel.radius;
    const double size = norm > NEAREST * panel.radius ? norm : NEAREST * panel.radius;
    if (screened) {
        kept.all = false;
        kept.margin = (float)(2.0001 * (panel.bound_per_norm * size + panel.bound));
        scratch.factors[i] = (float)(-size * panel.radius / (LARGEST * LARGEST));
    } else {
        __builtin_memset(scratch.moved, 0, (size_t)width * sizeof(float));
    }
    if (panel.quantised)
        pack_quantised(scratch.moved, D, screened ? (float)(LARGEST / size) : 0,
                       packed_row<int32_t>(scratch.rows, pairs_of(D), i));
    else
        pack_float32(scratch.moved, D, packed_row<float>(scratch.rows, D, i));
    return norm < INFINITE || finite_row(wide, D);
}

void screen_rows(const Job& job, Scratch& scratch, int64_t rows) {
    const Panel& panel = job.panel;
    const int64_t D = panel.D, slot_stride = padded_tiles(job.chunk_tiles) * LANES;
    for (int64_t tile = 0; tile < panel.tiles; tile += job.chunk_tiles) {
        const int64_t tiles = panel.tiles - tile < job.chunk_tiles ? panel.tiles - tile : job.chunk_tiles;
        const char* packed = (const char*)panel.packed + tile * panel.tile_bytes;
        const float* half_norms = panel.half_norms + tile * TILE_CODES;
        for (int64_t r = 0; r < TILE_ROWS; ++r)
            for (int64_t t = tiles; t < padded_tiles(tiles); ++t)
                store(scratch.slots + r * slot_stride + t * LANES, repeat(INFINITE));
        for (int64_t i = 0; i < rows; i += TILE_ROWS) {
            if (panel.quantised)
                score_int16(packed_row<int32_t>(scratch.rows, pairs_of(D), i), packed, D, tiles, half_norms,
                            scratch.factors + i, scratch.slots, slot_stride);
            else
                score_float32(packed_row<float>(scratch.rows, D, i), packed, D, tiles, half_norms, scratch.slots,
                              slot_stride);
            for (int r = 0; r < TILE_ROWS && i + r < rows; ++r)
                sift(scratch.kept[i + r], scratch.slots + r * slot_stride, tiles, tile * LANES);
        }
    }
}

Nearest decide(const Job& job, Scratch& scratch, int64_t i, int64_t& rescored) {
    const Panel& panel = job.panel;
    const Kept& kept = scratch.kept[i];
    const float* row = scratch.wide + i * padded(panel.D);
    const int64_t all = panel.alike ? 1 : panel.K;
    int64_t codes[2 * MOST_KEPT], count = 0;
    for (int k = 0; k < kept.count; ++k) {
        if (kept.score[k] > kept.best + kept.margin) continue;
        const int64_t left = kept.slot[k] / LANES * TILE_CODES + kept.slot[k] % LANES;
        for (int64_t code = left; code <= left + LANES; code += LANES)
            if (panel.half_norms[code] < INFINITE) codes[count++] = code;
    }
    const bool listed = !kept.all && count > 0;
    rescored += listed ? count : all;
    return nearest_of(row, job.call.codebook, panel.D, listed ? codes : nullptr, listed ? count : all,
                      scratch.distances);
}

template <class T>
void assign_block(Job& job, Scratch& scratch, int64_t block) {
    const NearestCall& call = job.call;
    const int64_t D = call.D, begin = block * job.block_rows;
    const int64_t rows = call.N - begin < job.block_rows ? call.N - begin : job.block_rows;
    int64_t nonfinite = 0, rescored = 0;
    bool finite[MOST_BLOCK_ROWS];
    for (int64_t i = 0; i < rows; ++i) finite[i] = prepare_row<T>(job, scratch, begin + i, i);
    if (job.screened) screen_rows(job, scratch, rows);
    for (int64_t i = 0; i < rows; ++i) {
        const Nearest found = finite[i] ? decide(job, scratch, i, rescored) : Nearest{0, __builtin_nanf("")};
        nonfinite += !finite[i];
        const int64_t n = begin + i;
        call.indices[n] = found.index;
        call.squared_distance[n] = found.squared_distance;
        const float* code = call.codebook + found.index * D;
        T* quantized = (T*)call.quantized + n * D;
        for (int64_t d = 0; d < D; ++d) narrow(code[d], quantized[d]);
    }
    if (nonfinite) __atomic_fetch_add(&job.nonfinite, nonfinite, __ATOMIC_RELAXED);
    __atomic_fetch_add(&job.rescored, rescored, __ATOMIC_RELAXED);
}

template <class T>
void sum_block(const Job& job, int64_t block) {
    const NearestCall& call = job.call;
    const int64_t D = call.D, begin = block * job.block_rows;
    const int64_t end = begin + job.block_rows < call.N ? begin + job.block_rows : call.N;
    for (int64_t n = begin; n < end; ++n) {
        if (__builtin_isnan(call.squared_distance[n])) continue;
        const T* __restrict row = row_of<T>(call, n);
        float* __restrict sum = call.sums + call.indices[n] * D;
        ++call.counts[call.indices[n]];
        for (int64_t d = 0; d < D; ++d) sum[d] += widen(row[d]);
    }
}

// Blocks are assigned in any order and summed in theirs, by whoever finds the next one ready. So rows are added in
// the order of a plain loop, no thread waits for another, and no second table of sums is needed.
template <class T>
void sum_ready_blocks(Job& job) {
    auto ready = [&] {
        const int64_t next = __atomic_load_n(&job.summed, __ATOMIC_SEQ_CST);
        return next < job.blocks && __atomic_load_n(&job.assigned[next], __ATOMIC_SEQ_CST);
    };
    while (ready()) {
        // whoever holds the flag looks again after giving it back, so a block that is ready is never forgotten
        if (__atomic_exchange_n(&job.summing, true, __ATOMIC_SEQ_CST)) return;
        while (ready()) {
            sum_block<T>(job, job.summed);
            __atomic_store_n(&job.summed, job.summed + 1, __ATOMIC_SEQ_CST);
        }
        __atomic_store_n(&job.summing, false, __ATOMIC_SEQ_CST);
    }
}

template <class T>
void assign_blocks(void* context) {
    Job& job = *(Job*)context;
    Scratch scratch;
    Cutter sizes;
    scratch.cut(sizes, job);
    Memory memory;
    if (!memory.take(sizes.used)) return;  // the others do its share
    Cutter cutter{(char*)memory.block};
    scratch.cut(cutter, job);
    // rows beyond the last one take part in the microkernel and are ignored
    __builtin_memset(memory.block, 0, sizes.used);
    for (;;) {
        const int64_t block = __atomic_fetch_add(&job.next_block, 1, __ATOMIC_RELAXED);
        if (block >= job.blocks) return;
        assign_block<T>(job, scratch, block);
        if (!job.call.sums) continue;
        __atomic_store_n(&job.assigned[block], 1, __ATOMIC_SEQ_CST);
        sum_ready_blocks<T>(job);
    }
}

void pack_tiles(void* context) {
    Job& job = *(Job*)context;
    for (;;) {
        const int64_t tile = __atomic_fetch_add(&job.next_tile, 1, __ATOMIC_RELAXED);
        if (tile >= job.panel.tiles) return;
        pack_tile(job.panel, job.call.codebook, tile);
    }
}

int64_t within(int64_t value, int64_t least, int64_t most) {
    return value < least ? least : value > most ? most : value;
}

void plan(Job& job) {
    const NearestCall& call = job.call;
    Panel& panel = job.panel;
    panel.K = call.K;
    panel.D = call.D;
    panel.tiles = (call.K + TILE_CODES - 1) / TILE_CODES;
    panel.quantised = call.screen == SCREEN_INT16 || (call.screen == SCREEN_AUTO && PAIR_INSTRUCTION);
    panel.tile_bytes = (panel.quantised ? pairs_of(call.D) : call.D) * 2 * VECTOR_BYTES;
    const bool worth_packing = call.N >= LEAST_SCREENED_ROWS && call.K >= LEAST_SCREENED_CODES;
    job.screened = call.screen == SCREEN_AUTO ? worth_packing : call.screen != SCREEN_NONE;
    const int64_t fitting = BLOCK_BYTES / (padded(call.D) * 6) / TILE_ROWS * TILE_ROWS;
    job.block_rows = within(fitting, LEAST_BLOCK_ROWS, MOST_BLOCK_ROWS);
    job.blocks = (call.N + job.block_rows - 1) / job.block_rows;
    job.chunk_tiles = within(CHUNK_BYTES / panel.tile_bytes, 1, MOST_CHUNK_TILES);
}

struct Shared {
    double* mean;

    void cut(Cutter& cutter, Job& job) {
        Panel& panel = job.panel;
        panel.packed = cutter.cut<char>(panel.tiles * panel.tile_bytes);
        panel.half_norms = cutter.cut<float>(panel.tiles * TILE_CODES);
        panel.centre = cutter.cut<float>(padded(panel.D));
        job.assigned = cutter.cut<uint8_t>(job.blocks);
        mean = cutter.cut<double>(panel.D);
    }
};

template <class T>
Outcome run(const NearestCall& call) {
    Job job = {};
    job.call = call;
    plan(job);
    Shared shared;
    Cutter sizes;
    shared.cut(sizes, job);
    Memory memory;
    if (!memory.take(sizes.used)) return NO_MEMORY;
    Cutter cutter{(char*)memory.block};
    shared.cut(cutter, job);
    __builtin_memset(job.panel.centre, 0, (size_t)padded(call.D) * sizeof(float));
    __builtin_memset(job.assigned, 0, (size_t)job.blocks);
    if (job.screened) {
        measure(job.panel, call.codebook, shared.mean);
        set_scale_and_bound(job.panel);
        run_together(job.panel.tiles > 64 ? call.threads : 1, pack_tiles, &job);
    }
    expect_to_fill(call.quantized, (size_t)(call.N * call.D) * sizeof(T));
    if (call.sums) {
        __builtin_memset(call.counts, 0, (size_t)call.K * sizeof *call.counts);
        __builtin_memset(call.sums, 0, (size_t)(call.K * call.D) * sizeof *call.sums);
    }
    run_together(job.blocks < call.threads ? (int)job.blocks : call.threads, assign_blocks<T>, &job);
    *call.nonfinite = job.nonfinite;
    if (call.rescored) *call.rescored = job.rescored;
    // no block is left unless every thread went without memory
    return job.next_block < job.blocks ? NO_MEMORY : DONE;
}

}  // namespace

Outcome nearest_codebook(const NearestCall& call) {
    switch (call.x_type) {
        case FLOAT32: return run<float>(call);
        case BFLOAT16: return run<BFloat16>(call);
        case FLOAT16: return run<Float16>(call);
        default: return BAD_ARGUMENT;
    }
}

}  // namespace fastvid::FASTVID_LEVEL
