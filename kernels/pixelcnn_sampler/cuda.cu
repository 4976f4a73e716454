// The persistent sampler on a GPU: one cooperative launch per row of codes. See README.md and cuda_cta.h.
//
// CTAs talk through packets of a value and a tag, written and read as one 64-bit word with relaxed accesses at device
// scope: a reader that sees the tag has the value, and needs nothing else that the writer wrote in this launch.
#include <cuda_runtime.h>

#include "pixelcnn_sampler/cuda_steps.h"

#define FASTVID_API extern "C" __attribute__((visibility("default")))

namespace fastvid::sampler {
namespace {

enum Outcome { BAD_ARGUMENT = -1, DOES_NOT_FIT = -2, NOT_RESIDENT = -3 };  // others: of the CUDA runtime

__device__ __forceinline__ uint64_t nanoseconds() {
    uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

template <int TILE_>
struct Gpu {
    static constexpr int TILE = TILE_;

    const int cta, threads;
    char* const shared;
    int32_t* const trouble;
    const uint64_t deadline;
    const bool at_once;  // no patience at all
    Lane<TILE> lane;
    bool failed = false;

    __device__ Gpu(const Row& row, char* memory)
        : cta((int)blockIdx.x), threads((int)blockDim.x), shared(memory), trouble(row.trouble),
          deadline(nanoseconds() + (uint64_t)row.patience), at_once(row.patience == 0) {}

    template <class F>
    __device__ __forceinline__ void each(F f) {
        f((int)threadIdx.x, lane);
    }

    __device__ __forceinline__ void sync() { __syncthreads(); }
    __device__ __forceinline__ bool agree() { return !__syncthreads_or(failed); }

    // Two neighbouring packets; each of them is whole, the pair need not be.
    __device__ __forceinline__ void peek2(const Packet* from, Packet* to) {
        asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(to[0]), "=l"(to[1]) : "l"(from) : "memory");
    }

    __device__ __forceinline__ void await2(const Packet* from, Packet* got, uint32_t tag) {
        for (uint32_t tries = 1; tag_of(got[0]) != tag || tag_of(got[1]) != tag; ++tries) {
            if (failed || lost(tries)) break;
            peek2(from, got);
        }
    }

    __device__ __forceinline__ float await(const Packet* from, uint32_t tag) {
        Packet got;
        for (uint32_t tries = 1;; ++tries) {
            asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(got) : "l"(from) : "memory");
            if (tag_of(got) == tag || failed || lost(tries)) return value_of(got);
        }
    }

    // Whether the launch has lasted too long, or another CTA found that it has.
    __device__ __forceinline__ bool lost(uint32_t tries) {
        if (tries % 256 && !at_once) return false;
        int32_t seen;
        asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(trouble) : "memory");
        failed = seen || at_once || nanoseconds() > deadline;
        if (failed) asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" : : "l"(trouble), "r"(1) : "memory");
        return failed;
    }

    __device__ __forceinline__ void publish(Packet* to, float value, uint32_t tag) {
        asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" : : "l"(to), "l"(packet_of(value, tag)) : "memory");
    }

    template <int BYTES>
    __device__ __forceinline__ void copy(char* to, const char* from) {
        const uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
        if constexpr (BYTES == 16)  // past the first-level cache: nobody here reads it twice
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(at), "l"(from) : "memory");
        else
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" : : "r"(at), "l"(from), "n"(BYTES) : "memory");
    }

    __device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }
    __device__ __forceinline__ void landed() { asm volatile("cp.async.wait_group %0;" : : "n"(DEPTH - 1) : "memory"); }
    __device__ __forceinline__ void all_landed() { asm volatile("cp.async.wait_all;" : : : "memory"); }

    // [warps, TILE, STRIP] sums over the lanes of each warp: halves of the strip move to halves of the warp.
    __device__ __forceinline__ void fold(float* partial) {
        const int id = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int column = (id >> 4 & 1) * 4 + (id >> 3 & 1) * 2 + (id >> 2 & 1);
#pragma unroll
        for (int b = 0; b < TILE; ++b) {
            float four[4], two[2], one;
#pragma unroll
            for (int i = 0; i < 4; ++i) four[i] = meet(lane.acc[b][i], lane.acc[b][i + 4], id & 16, 16);
#pragma unroll
            for (int i = 0; i < 2; ++i) two[i] = meet(four[i], four[i + 2], id & 8, 8);
            one = meet(two[0], two[1], id & 4, 4);
            one += __shfl_xor_sync(~0u, one, 2);
            one += __shfl_xor_sync(~0u, one, 1);
            if (id % 4 == 0) partial[(warp * TILE + b) * STRIP + column] = one;
        }
    }

    __device__ __forceinline__ static float meet(float low, float high, int keeps_high, int distance) {
        const float mine = keeps_high ? high : low, other = keeps_high ? low : high;
        return mine + __shfl_xor_sync(~0u, other, distance);
    }
};

template <int TILE, class Weight>
__global__ void __launch_bounds__(MAX_THREADS, 1) sample_row(const __grid_constant__ Row row) {
    extern __shared__ __align__(128) char memory[];
    Gpu<TILE> gpu(row, memory);
    Worker<Gpu<TILE>, Weight> worker(gpu, row);
    for (Step step; step.x < row.W; step.advance(row))
        if (!run_phase(worker, step)) break;
    gpu.all_landed();
}

template <class Weight>
const void* kernel_of(int tile) {
    return tile == 1 ? (const void*)sample_row<1, Weight> : (const void*)sample_row<4, Weight>;
}

const void* kernel_for(const Row& row) {
    const int tile = tile_of(row.B);
    if (row.weight_type == 0) return kernel_of<Float32>(tile);
    return row.weight_type == 1 ? kernel_of<BFloat16>(tile) : kernel_of<Int8>(tile);
}

bool sound(const Row& row) {
    return row.B > 0 && row.W > 0 && row.L > 0 && row.K > 0 && row.C > 0 && row.C % 8 == 0 && row.E % 8 == 0 &&
           row.taps > 0 && row.ctas > 0 && row.chunk > 0 && row.threads >= 32 && row.threads <= MAX_THREADS &&
           row.threads % 32 == 0 && row.E / 8 <= row.threads && row.weight_type >= 0 && row.weight_type <= 2;
}

}  // namespace
}  // namespace fastvid::sampler

using namespace fastvid::sampler;

FASTVID_API int fastvid_abi_version(void) { return FASTVID_ABI_VERSION; }

// Multiprocessors and bytes of shared memory for one CTA of the current device; 0, or an error of the CUDA runtime.
FASTVID_API int fastvid_cuda_device(int64_t* processors, int64_t* shared_bytes) {
    int device = 0, count = 0, bytes = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (!error) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    *processors = count, *shared_bytes = bytes;
    return (int)error;
}

// What an error number of this library means.
FASTVID_API const char* fastvid_cuda_error(int error) {
    switch (error) {
        case BAD_ARGUMENT: return "a size is out of range";
        case DOES_NOT_FIT: return "the weights under way do not fit the shared memory";
        case NOT_RESIDENT: return "not all CTAs fit the device at once";
        default: return cudaGetErrorString((cudaError_t)error);
    }
}

// Starts one row on `stream`, and returns before it is done; row_bytes: size of *row. 0, or see fastvid_cuda_error.
FASTVID_API int fastvid_pixelcnn_row(Row* row, int64_t row_size, void* stream) {
    if (row_size != (int64_t)sizeof(Row) || !sound(*row)) return BAD_ARGUMENT;
    int64_t processors, shared_bytes;
    if (const int error = fastvid_cuda_device(&processors, &shared_bytes)) return error;
    if (!plan(*row, shared_bytes)) return DOES_NOT_FIT;
    const void* kernel = kernel_for(*row);
    const int bytes = (int)row->shared_bytes, threads = (int)row->threads;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error) return (int)error;
    int per_processor = 0;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, (size_t)bytes);
    if (error) return (int)error;
    if (per_processor * processors < row->ctas) return NOT_RESIDENT;
    void* arguments[] = {row};
    error = cudaLaunchCooperativeKernel(kernel, dim3((unsigned)row->ctas), dim3((unsigned)threads), arguments,
                                        (size_t)bytes, (cudaStream_t)stream);
    return (int)(error ? error : cudaGetLastError());
}
