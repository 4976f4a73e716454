// The C interface: what fastvid/_native.py sees of the library. Plain C: no torch, no Python, no exceptions.
#include <atomic>
#include <cstring>

#include "axial_attention/cpu.h"
#include "common/pool.h"
#include "conditional_batch_norm/cpu.h"
#include "conv_gru/cpu.h"
#include "gated_causal_conv/cpu.h"
#include "image_conv/cpu.h"
#include "nearest_codebook/cpu.h"
#include "pixelcnn_sampler/cpu.h"
#include "spectral_norm/cpu.h"

#define FASTVID_API extern "C" __attribute__((visibility("default")))

namespace {

struct Level {
    const char* name;
    fastvid::Outcome (*nearest_codebook)(const fastvid::NearestCall&);
    void (*update_codebook)(const fastvid::UpdateCall&);
    int64_t (*sampler_bytes)(const fastvid::SamplerJob&);
    fastvid::Outcome (*sampler_start)(const fastvid::SamplerJob&);
    fastvid::Outcome (*sampler_row)(const fastvid::SamplerJob&, int64_t, int64_t);
    fastvid::Outcome (*sampler_frame)(const fastvid::SamplerJob&, int64_t);
    void (*gumbel_row)(const fastvid::NoiseCall&);
    fastvid::Outcome (*gated_causal_conv)(const fastvid::ConvCall&);
    fastvid::Outcome (*gate_backward)(const fastvid::GateCall&);
    fastvid::Outcome (*weight_gradient)(const fastvid::WeightGradCall&);
    fastvid::Outcome (*axial_attention)(const fastvid::AttentionCall&);
    fastvid::Outcome (*axial_attention_backward)(const fastvid::AttentionGradCall&);
    fastvid::Outcome (*axial_self_attention)(const fastvid::SelfAttentionCall&);
    fastvid::Outcome (*image_conv)(const fastvid::ImageCall&);
    fastvid::Outcome (*spectral_norm)(const fastvid::NormCall&);
    fastvid::Outcome (*spectral_norm_backward)(const fastvid::NormGradCall&);
    fastvid::Outcome (*conv_gru)(const fastvid::GruCall&);
    fastvid::Outcome (*conv_gru_backward)(const fastvid::GruGradCall&);
    fastvid::Outcome (*conditional_norm)(const fastvid::FrameNormCall&);
    fastvid::Outcome (*conditional_norm_backward)(const fastvid::FrameNormGradCall&);
};

#define FASTVID_LEVEL_ENTRIES(level)                                                                             \
    {#level, fastvid::level::nearest_codebook, fastvid::level::update_codebook, fastvid::level::sampler_bytes,   \
     fastvid::level::sampler_start, fastvid::level::sampler_row, fastvid::level::sampler_frame,                  \
     fastvid::level::gumbel_row, fastvid::level::gated_causal_conv, fastvid::level::gate_backward,               \
     fastvid::level::weight_gradient, fastvid::level::axial_attention, fastvid::level::axial_attention_backward,  \
     fastvid::level::axial_self_attention, fastvid::level::image_conv, fastvid::level::spectral_norm,             \
     fastvid::level::spectral_norm_backward, fastvid::level::conv_gru, fastvid::level::conv_gru_backward,         \
     fastvid::level::conditional_norm, fastvid::level::conditional_norm_backward}

// In rising order: levels[i] needs a processor of rank i or more. FASTVID_HAS_* come from CMakeLists.txt.
const Level levels[] = {
    FASTVID_LEVEL_ENTRIES(generic),
#if defined(FASTVID_HAS_X86_LEVELS)
    FASTVID_LEVEL_ENTRIES(v2), FASTVID_LEVEL_ENTRIES(v3), FASTVID_LEVEL_ENTRIES(v4),
#endif
};

int processor_rank() {
#if defined(FASTVID_HAS_X86_LEVELS)
    __builtin_cpu_init();
    // spelled out by feature because clang before 16 and gcc before 12 know no level names here
    const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v4 ? 3 : v3 ? 2 : v2 ? 1 : 0;
#else
    return 0;
#endif
}

std::atomic<const Level*> chosen{&levels[processor_rank()]};

}  // namespace

// Raised together with ABI_VERSION in fastvid/_native.py whenever a signature changes.
FASTVID_API int fastvid_abi_version(void) { return 7; }

// The instruction set level in use: "generic", "v2", "v3" or "v4".
FASTVID_API const char* fastvid_cpu_isa(void) { return chosen.load()->name; }

// The best level that this processor and operating system can run.
FASTVID_API const char* fastvid_cpu_best_isa(void) { return levels[processor_rank()].name; }

// Uses another level from now on. 0: done; 1: no such level in this library; 2: the processor cannot run it.
FASTVID_API int fastvid_cpu_use_isa(const char* name) {
    int rank = 0;
    for (const Level& level : levels) {
        if (!std::strcmp(level.name, name)) {
            if (rank > processor_rank()) return 2;
            chosen.store(&level);
            return 0;
        }
        ++rank;
    }
    return 1;
}

// Helpers are from now on those of the OpenMP runtime that has these two functions, or our own for null; see common/pool.h.
FASTVID_API void fastvid_cpu_use_threads_of(fastvid::Parallel gomp_parallel, fastvid::MostThreads omp_get_max_threads) {
    fastvid::use_threads_of(gomp_parallel, omp_get_max_threads);
}

// See nearest_codebook/cpu.h for the arguments and the outcome.
FASTVID_API int fastvid_nearest_codebook(const void* x, int x_type, int64_t stride_xn, const float* codebook, int64_t N,
                                         int64_t K, int64_t D, int64_t* indices, void* quantized,
                                         float* squared_distance, int64_t* counts, float* sums, int64_t* nonfinite,
                                         int threads, int screen, int64_t* rescored) {
    if (N < 0 || K < 1 || D < 1 || threads < 1 || screen < 0 || screen > fastvid::SCREEN_NONE || !counts != !sums)
        return fastvid::BAD_ARGUMENT;
    return chosen.load()->nearest_codebook({x, x_type, stride_xn, codebook, N, K, D, indices, quantized,
                                            squared_distance, counts, sums, nonfinite, threads, screen, rescored});
}

// See nearest_codebook/cpu.h for the arguments.
FASTVID_API int fastvid_update_codebook(float* codebook, float* cluster_size, float* cluster_sum, const int64_t* counts,
                                        const float* sums, int64_t K, int64_t D, double decay, float eps,
                                        int64_t* steps, float dead_below, const float* restart, float restart_size,
                                        int threads) {
    if (K < 1 || D < 1 || threads < 1) return fastvid::BAD_ARGUMENT;
    chosen.load()->update_codebook({codebook, cluster_size, cluster_sum, counts, sums, K, D, decay, eps, steps,
                                    dead_below, restart, restart_size, threads});
    return fastvid::DONE;
}

// See pixelcnn_sampler/cpu.h for a job and for what these do. Bytes of state, or -1 for a job that makes no sense.
FASTVID_API int64_t fastvid_sampler_bytes(const fastvid::SamplerJob* job) { return chosen.load()->sampler_bytes(*job); }

FASTVID_API int fastvid_sampler_start(const fastvid::SamplerJob* job) { return chosen.load()->sampler_start(*job); }

FASTVID_API int fastvid_sampler_row(const fastvid::SamplerJob* job, int64_t t, int64_t y) {
    return chosen.load()->sampler_row(*job, t, y);
}

FASTVID_API int fastvid_sampler_frame(const fastvid::SamplerJob* job, int64_t t) {
    return chosen.load()->sampler_frame(*job, t);
}

// Gumbel noise of one row of codes; see pixelcnn_sampler/cpu.h.
FASTVID_API int fastvid_gumbel_row(const int64_t* samples, int64_t B, int64_t W, int64_t K, int64_t seed,
                                   int64_t stream, int64_t t, int64_t y, float* noise) {
    if (B < 0 || W < 1 || K < 1) return fastvid::BAD_ARGUMENT;
    chosen.load()->gumbel_row({samples, noise, B, W, K, seed, stream, t, y});
    return fastvid::DONE;
}

// See gated_causal_conv/cpu.h for the three calls.
FASTVID_API int fastvid_gated_causal_conv(const fastvid::ConvCall* call) {
    return chosen.load()->gated_causal_conv(*call);
}

FASTVID_API int fastvid_gate_backward(const fastvid::GateCall* call) { return chosen.load()->gate_backward(*call); }

FASTVID_API int fastvid_weight_gradient(const fastvid::WeightGradCall* call) {
    return chosen.load()->weight_gradient(*call);
}

// See axial_attention/cpu.h for the three calls.
FASTVID_API int fastvid_axial_attention(const fastvid::AttentionCall* call) {
    return chosen.load()->axial_attention(*call);
}

FASTVID_API int fastvid_axial_attention_backward(const fastvid::AttentionGradCall* call) {
    return chosen.load()->axial_attention_backward(*call);
}

FASTVID_API int fastvid_axial_self_attention(const fastvid::SelfAttentionCall* call) {
    return chosen.load()->axial_self_attention(*call);
}

// See image_conv/cpu.h for the call.
FASTVID_API int fastvid_image_conv(const fastvid::ImageCall* call) { return chosen.load()->image_conv(*call); }

// See spectral_norm/cpu.h for the two calls.
FASTVID_API int fastvid_spectral_norm(const fastvid::NormCall* call) { return chosen.load()->spectral_norm(*call); }

FASTVID_API int fastvid_spectral_norm_backward(const fastvid::NormGradCall* call) {
    return chosen.load()->spectral_norm_backward(*call);
}

// See conv_gru/cpu.h for the two calls.
FASTVID_API int fastvid_conv_gru(const fastvid::GruCall* call) { return chosen.load()->conv_gru(*call); }

FASTVID_API int fastvid_conv_gru_backward(const fastvid::GruGradCall* call) {
    return chosen.load()->conv_gru_backward(*call);
}

// See conditional_batch_norm/cpu.h for the two calls.
FASTVID_API int fastvid_conditional_norm(const fastvid::FrameNormCall* call) {
    return chosen.load()->conditional_norm(*call);
}

FASTVID_API int fastvid_conditional_norm_backward(const fastvid::FrameNormGradCall* call) {
    return chosen.load()->conditional_norm_backward(*call);
}
