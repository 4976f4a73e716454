// The gradient of spectral normalisation on the CPU: <grad, matrix> in one pass, the gradient in another.
// README.md beside this file has the design; compiled once per instruction set level (see common/simd.h).
#include "common/pages.h"
#include "spectral_norm/cpu.h"
#include "spectral_norm/cpu_pieces.h"
#include "spectral_norm/cpu_rows.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

struct GradJob {
    NormGradCall call;
    Pieces runs, sweeps;  // elements of all weights; their rows
    double* products;     // of each run
    int64_t from, to;     // the group at hand

    void cut(Cutter& cutter, int64_t run_count, int64_t sweep_count) {
        runs.cut(cutter, call.count, run_count);
        sweeps.cut(cutter, call.count, sweep_count);
        products = cutter.cut<double>(run_count);
    }

    int64_t elements(int64_t i) const { return call.weights[i].rows * call.weights[i].cols; }
    int64_t step(int64_t i) const { return rows_of_piece(call.weights[i].rows, call.weights[i].cols); }
};

template <class T>
double product_of_run(const WeightToMove& weight, const Piece& piece) {
    return product_of((const T*)weight.grad + piece.begin, (const T*)weight.matrix + piece.begin,
                      piece.end - piece.begin);
}

void multiply_run(void* context, int64_t i) {
    const GradJob& job = *(const GradJob*)context;
    const Piece& piece = job.runs.list[job.runs.first[job.from] + i];
    const WeightToMove& weight = job.call.weights[piece.weight];
    job.products[piece.index] =
        weight.type == FLOAT32 ? product_of_run<float>(weight, piece) : product_of_run<BFloat16>(weight, piece);
}

template <class T>
void move_rows(const WeightToMove& weight, const Piece& piece, double share, float sigma) {
    for (int64_t r = piece.begin; r < piece.end; ++r) {
        const int64_t at = r * weight.cols;
        move_row((const T*)weight.grad + at, weight.v, weight.cols, (float)(share * weight.u[r]), sigma,
                 (T*)weight.grad_matrix + at);
    }
}

void move_some(void* context, int64_t i) {
    const GradJob& job = *(const GradJob*)context;
    const Piece& piece = job.sweeps.list[job.sweeps.first[job.from] + i];
    const WeightToMove& weight = job.call.weights[piece.weight];
    const float sigma = job.call.sigma[piece.weight];
    double product = 0;
    for (int64_t run = job.runs.first[piece.weight]; run < job.runs.first[piece.weight + 1]; ++run)
        product += job.products[run];
    const double share = product / sigma;
    weight.type == FLOAT32 ? move_rows<float>(weight, piece, share, sigma)
                           : move_rows<BFloat16>(weight, piece, share, sigma);
}

void move_all(Crew& crew, void* context) {
    GradJob& job = *(GradJob*)context;
    for (job.from = 0; job.from < job.call.count; job.from = job.to) {
        int64_t elements = job.elements(job.from);
        for (job.to = job.from + 1; job.to < job.call.count; ++job.to)
            if ((elements += job.elements(job.to)) > GROUP_ELEMENTS) break;
        crew.each(job.runs.first[job.to] - job.runs.first[job.from], multiply_run, &job);
        crew.each(job.sweeps.first[job.to] - job.sweeps.first[job.from], move_some, &job);
    }
}

}  // namespace

Outcome spectral_norm_backward(const NormGradCall& call) {
    GradJob job = {};
    job.call = call;
    int64_t runs = 0, sweeps = 0, elements = 0;
    for (int64_t i = 0; i < call.count; ++i) {
        runs += pieces_of(job.elements(i), RUN_ELEMENTS);
        sweeps += pieces_of(call.weights[i].rows, job.step(i));
        elements += job.elements(i);
    }
    Cutter size;
    job.cut(size, runs, sweeps);
    Memory memory;
    if (!memory.take(size.used)) return NO_MEMORY;
    Cutter cutter{(char*)memory.block};
    job.cut(cutter, runs, sweeps);
    for (int64_t i = 0; i < call.count; ++i) {
        job.runs.add(i, job.elements(i), RUN_ELEMENTS);
        job.sweeps.add(i, call.weights[i].rows, job.step(i));
        expect_to_fill(call.weights[i].grad_matrix, job.elements(i) * (call.weights[i].type == FLOAT32 ? 4 : 2));
    }
    Crew::run(elements > ALONE ? (int)call.threads : 1, move_all, &job);
    return DONE;
}

}  // namespace fastvid::FASTVID_LEVEL
