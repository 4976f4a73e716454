// Spectral normalisation on the CPU: a power iteration in one pass over each weight, then the division in another.
// README.md beside this file has the design; compiled once per instruction set level (see common/simd.h).
#include "spectral_norm/cpu.h"

#include "common/pages.h"
#include "spectral_norm/cpu_pieces.h"
#include "spectral_norm/cpu_rows.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

struct NormJob {
    NormCall call;
    Pieces sweeps, runs;  // rows of all weights; elements of all weights
    int64_t* at;          // of a weight: where its vectors of sums begin
    float* sums;          // a vector [cols] for each sweep, with iterations
    float* products;      // [rows] of the group's weights, one after the other
    int64_t* row;         // of a weight: where its products begin
    int64_t from, to;     // the group at hand
    bool first;           // iteration

    void cut(Cutter& cutter, int64_t sweep_count, int64_t run_count, int64_t sum_count, int64_t row_count) {
        sweeps.cut(cutter, call.count, sweep_count);
        runs.cut(cutter, call.count, run_count);
        at = cutter.cut<int64_t>(call.count);
        row = cutter.cut<int64_t>(call.count);
        sums = cutter.cut<float>(sum_count);
        products = cutter.cut<float>(row_count);
    }

    int64_t elements(int64_t i) const { return call.weights[i].rows * call.weights[i].cols; }
    int64_t step(int64_t i) const { return rows_of_piece(call.weights[i].rows, call.weights[i].cols); }
    float* sums_of(const Piece& piece) const {
        const int64_t cols = call.weights[piece.weight].cols;
        return sums + at[piece.weight] + (piece.index - sweeps.first[piece.weight]) * cols;
    }
};

// products = rows times v, and with SUMS what these rows add to matrix^T (matrix v).
template <bool SUMS, class T>
void sweep_rows(const NormJob& job, const Piece& piece) {
    const NormedWeight& weight = job.call.weights[piece.weight];
    const float* v = job.first ? weight.v : weight.new_v;
    float* products = job.products + job.row[piece.weight];
    float* sums = SUMS ? job.sums_of(piece) : nullptr;
    if (SUMS) __builtin_memset(sums, 0, weight.cols * sizeof(float));
    int64_t r = piece.begin;
    for (; r + ROWS <= piece.end; r += ROWS) {
        const T* rows = (const T*)weight.matrix + r * weight.cols;
        multiply_rows<ROWS>(rows, weight.cols, v, products + r);
        if (SUMS) add_rows<ROWS>(rows, weight.cols, products + r, sums);
    }
    for (; r < piece.end; ++r) {
        const T* rows = (const T*)weight.matrix + r * weight.cols;
        multiply_rows<1>(rows, weight.cols, v, products + r);
        if (SUMS) add_rows<1>(rows, weight.cols, products + r, sums);
    }
}

template <bool SUMS>
void sweep(void* context, int64_t i) {
    const NormJob& job = *(const NormJob*)context;
    const Piece& piece = job.sweeps.list[job.sweeps.first[job.from] + i];
    job.call.weights[piece.weight].type == FLOAT32 ? sweep_rows<SUMS, float>(job, piece)
                                                   : sweep_rows<SUMS, BFloat16>(job, piece);
}

// sigma of a weight whose u and v stay: u times the products.
void weigh(void* context, int64_t i) {
    const NormJob& job = *(const NormJob*)context;
    const int64_t at = job.from + i;
    const NormedWeight& weight = job.call.weights[at];
    double sigma = 0;
    for (int64_t r = 0; r < weight.rows; ++r) sigma += (double)weight.u[r] * job.products[job.row[at] + r];
    job.call.sigma[at] = (float)sigma;
}

// A vector divided by its length or by eps; its length as it was. In double, where no square overflows.
double normalise(const float* from, int64_t count, double eps, float* to) {
    double squares = 0;
    for (int64_t i = 0; i < count; ++i) squares += (double)from[i] * from[i];
    const double length = __builtin_sqrt(squares), by = length < eps ? eps : length;
    for (int64_t i = 0; i < count; ++i) to[i] = (float)(from[i] / by);
    return length;
}

// matrix^T u by itself, for products that are too large or small to be multiplied before they are divided.
template <class T>
void multiply_by_u(const NormedWeight& weight, float* sums) {
    __builtin_memset(sums, 0, weight.cols * sizeof(float));
    for (int64_t r = 0; r < weight.rows; ++r)
        add_rows<1>((const T*)weight.matrix + r * weight.cols, weight.cols, weight.new_u + r, sums);
}

// u, v and sigma of a weight from the products and sums of all its rows.
void conclude(void* context, int64_t i) {
    const NormJob& job = *(const NormJob*)context;
    const int64_t at = job.from + i, cols = job.call.weights[at].cols;
    const NormedWeight& weight = job.call.weights[at];
    const double eps = job.call.eps;
    const double length = normalise(job.products + job.row[at], weight.rows, eps, weight.new_u);
    float* sums = job.sums + job.at[at];  // of the first piece, where those of all come together
    for (int64_t piece = job.sweeps.first[at] + 1; piece < job.sweeps.first[at + 1]; ++piece) {
        const float* more = job.sums_of(job.sweeps.list[piece]);
        for (int64_t c = 0; c < cols; ++c) sums[c] += more[c];
    }
    double scale = length < eps ? eps : length;
    if (!(length > 1e-15 && length < 1e15)) {
        weight.type == FLOAT32 ? multiply_by_u<float>(weight, sums) : multiply_by_u<BFloat16>(weight, sums);
        scale = 1;
    }
    // with v a multiple of the sums, u^T matrix v needs no other product; v is rounded before, as it is used rounded
    normalise(sums, cols, eps * scale, weight.new_v);
    double sigma = 0;
    for (int64_t c = 0; c < cols; ++c) sigma += (double)sums[c] * weight.new_v[c];
    job.call.sigma[at] = (float)(sigma / scale);
}

void divide_run(void* context, int64_t i) {
    const NormJob& job = *(const NormJob*)context;
    const Piece& piece = job.runs.list[job.runs.first[job.from] + i];
    const NormedWeight& weight = job.call.weights[piece.weight];
    const int64_t count = piece.end - piece.begin;
    const float sigma = job.call.sigma[piece.weight];
    if (weight.type == FLOAT32)
        divide((const float*)weight.weight + piece.begin, count, sigma, (float*)weight.out + piece.begin);
    else
        divide((const BFloat16*)weight.weight + piece.begin, count, sigma, (BFloat16*)weight.out + piece.begin);
}

void norm_group(Crew& crew, NormJob& job) {
    const int64_t weights = job.to - job.from, sweeps = job.sweeps.first[job.to] - job.sweeps.first[job.from];
    if (!job.call.iterations) {
        job.first = true;
        crew.each(sweeps, sweep<false>, &job);
        crew.each(weights, weigh, &job);
    }
    for (int64_t k = 0; k < job.call.iterations; ++k) {
        job.first = k == 0;
        crew.each(sweeps, sweep<true>, &job);
        crew.each(weights, conclude, &job);
    }
    crew.each(job.runs.first[job.to] - job.runs.first[job.from], divide_run, &job);
}

void norm_all(Crew& crew, void* context) {
    NormJob& job = *(NormJob*)context;
    for (job.from = 0; job.from < job.call.count; job.from = job.to) {
        int64_t elements = job.elements(job.from);
        for (job.to = job.from + 1; job.to < job.call.count; ++job.to)
            if ((elements += job.elements(job.to)) > GROUP_ELEMENTS) break;
        norm_group(crew, job);
    }
}

}  // namespace

Outcome spectral_norm(const NormCall& call) {
    NormJob job = {};
    job.call = call;
    int64_t sweeps = 0, runs = 0, sums = 0, rows = 0, elements = 0;
    for (int64_t i = 0; i < call.count; ++i) {
        const NormedWeight& weight = call.weights[i];
        const int64_t pieces = pieces_of(weight.rows, job.step(i));
        sweeps += pieces;
        runs += pieces_of(job.elements(i), RUN_ELEMENTS);
        sums += call.iterations ? (pieces ? pieces : 1) * weight.cols : 0;
        rows += weight.rows;
        elements += job.elements(i);
    }
    Cutter size;
    job.cut(size, sweeps, runs, sums, rows);
    Memory memory;
    if (!memory.take(size.used)) return NO_MEMORY;
    Cutter cutter{(char*)memory.block};
    job.cut(cutter, sweeps, runs, sums, rows);
    sums = rows = 0;
    for (int64_t i = 0; i < call.count; ++i) {
        const NormedWeight& weight = call.weights[i];
        job.sweeps.add(i, weight.rows, job.step(i));
        job.runs.add(i, job.elements(i), RUN_ELEMENTS);
        job.at[i] = sums;
        job.row[i] = rows;
        sums += (weight.rows ? pieces_of(weight.rows, job.step(i)) : 1) * weight.cols;
        rows += weight.rows;
        if (!weight.rows && call.iterations) __builtin_memset(job.sums + job.at[i], 0, weight.cols * sizeof(float));
        expect_to_fill(weight.out, job.elements(i) * (weight.type == FLOAT32 ? 4 : 2));
    }
    Crew::run(elements > ALONE ? (int)call.threads : 1, norm_all, &job);
    return DONE;
}

}  // namespace fastvid::FASTVID_LEVEL
