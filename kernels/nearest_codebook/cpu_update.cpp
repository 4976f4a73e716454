// The moving average of a codebook, as reference.py defines it: one pass over the counts, then one over the codes.
#include "common/numbers.h"
#include "common/pool.h"
#include "nearest_codebook/cpu.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t BLOCK_ELEMENTS = 16 << 10;  // of the codes that a thread takes at a time

struct Job {
    UpdateCall call;
    float weight;  // of the batch
    float share;   // of the moving average's weights that have been given out by now
    float total;   // of N, debiased
    int64_t next_code, codes_at_once;
};

// From where it is a share of the way; near the end counted from there, so that a weight of 1 arrives.
inline float towards(float from, float to, float weight) {
    return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1 - weight);
}

void move_code(const Job& job, int64_t k) {
    const UpdateCall& call = job.call;
    const int64_t D = call.D;
    float* __restrict code = call.codebook + k * D;
    float* __restrict sum = call.cluster_sum + k * D;
    const float* __restrict batch = call.sums + k * D;
    const float seen = call.cluster_size[k] / job.share;
    if (call.restart && seen < call.dead_below) {
        const float* __restrict born = call.restart + k * D;
        const float size = call.restart_size * job.share;
        call.cluster_size[k] = size;
        for (int64_t d = 0; d < D; ++d) {
            code[d] = born[d];
            sum[d] = born[d] * size;
        }
        return;
    }
    if (!finite_row(batch, D)) return;
    for (int64_t d = 0; d < D; ++d) sum[d] = towards(sum[d], batch[d], job.weight);
    const float smoothed = (seen + call.eps) / (job.total + call.eps * (float)call.K) * job.total;
    if (!(smoothed > 0)) return;
    for (int64_t d = 0; d < D; ++d) code[d] = sum[d] / job.share / smoothed;
}

void move_codes(void* context) {
    Job& job = *(Job*)context;
    for (;;) {
        const int64_t first = __atomic_fetch_add(&job.next_code, job.codes_at_once, __ATOMIC_RELAXED);
        if (first >= job.call.K) return;
        const int64_t end = first + job.codes_at_once < job.call.K ? first + job.codes_at_once : job.call.K;
        for (int64_t k = first; k < end; ++k) move_code(job, k);
    }
}

}  // namespace

void update_codebook(const UpdateCall& call) {
    Job job = {};
    job.call = call;
    job.weight = (float)(1 - call.decay);
    job.share = call.steps ? (float)(1 - __builtin_pow(call.decay, (double)++*call.steps)) : 1;
    double total = 0;
    for (int64_t k = 0; k < call.K; ++k) {
        if (finite_row(call.sums + k * call.D, call.D))
            call.cluster_size[k] = towards(call.cluster_size[k], (float)call.counts[k], job.weight);
        total += call.cluster_size[k] / job.share;
    }
    job.total = (float)total;
    job.codes_at_once = BLOCK_ELEMENTS / call.D + 1;
    run_together(call.K > job.codes_at_once ? call.threads : 1, move_codes, &job);
}

}  // namespace fastvid::FASTVID_LEVEL
