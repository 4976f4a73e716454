// The persistent sampler's CTAs on a CPU, behind the interface of libfastvid_cuda.so.
//
// By phases: every CTA does a phase, in an order that changes, before any does the next, and a packet that has not come
// is an error at once: so each dependency lies between two phases. By threads: every CTA runs on its own as on a GPU,
// and waits: so no packet is overwritten before its last reader has it.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "pixelcnn_sampler/cuda_steps.h"

#define FASTVID_API extern "C" __attribute__((visibility("default")))

using namespace fastvid::sampler;

namespace {

enum Manner : int64_t { BY_PHASES, BY_THREADS };

struct Setting {
    int64_t processors = 3, shared_bytes = 227 * 1024, manner = BY_PHASES, silent = -1;
} setting;

uint32_t random_word() {
    static thread_local uint32_t state = 2463534242u;
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return state;
}

template <int TILE_>
struct Host {
    static constexpr int TILE = TILE_;

    const int cta, threads;
    const Row& row;
    std::unique_ptr<char[]> memory;
    char* shared;
    std::vector<Lane<TILE>> lanes;
    bool failed = false;
    const std::chrono::steady_clock::time_point since = std::chrono::steady_clock::now();

    Host(const Row& r, int number)
        : cta(number), threads((int)r.threads), row(r), memory(new char[r.shared_bytes + 128]), lanes(r.threads) {
        shared = memory.get() + (128 - (uintptr_t)memory.get() % 128) % 128;
        std::memset(shared, 0xff, r.shared_bytes);  // NaN: what was never written must not matter
    }

    template <class F>
    void each(F f) {
        for (int thread = 0; thread < threads; ++thread) f(thread, lanes[thread]);
    }

    void sync() {}
    bool agree() { return !failed; }

    void peek2(const Packet* from, Packet* to) {
        for (int i = 0; i < 2; ++i) to[i] = __atomic_load_n(from + i, __ATOMIC_RELAXED);
    }

    void await2(const Packet* from, Packet* got, uint32_t tag) {
        for (int i = 0; i < 2; ++i)
            while (tag_of(got[i]) != tag && patient()) got[i] = __atomic_load_n(from + i, __ATOMIC_RELAXED);
    }

    float await(const Packet* from, uint32_t tag) {
        Packet got = __atomic_load_n(from, __ATOMIC_RELAXED);
        while (tag_of(got) != tag && patient()) got = __atomic_load_n(from, __ATOMIC_RELAXED);
        return value_of(got);
    }

    bool patient() {
        const bool late = std::chrono::steady_clock::now() - since > std::chrono::nanoseconds(row.patience);
        if (setting.manner == BY_PHASES || late || __atomic_load_n(row.trouble, __ATOMIC_RELAXED)) {
            __atomic_store_n(row.trouble, 1, __ATOMIC_RELAXED);
            failed = true;
        }
        std::this_thread::yield();
        return !failed;
    }

    void publish(Packet* to, float value, uint32_t tag) {
        if (cta != setting.silent) __atomic_store_n(to, packet_of(value, tag), __ATOMIC_RELAXED);
    }

    template <int BYTES>
    void copy(char* to, const char* from) {
        std::memcpy(to, from, BYTES);
    }
    void commit() {}
    void landed() {}
    void all_landed() {}

    // The sums of cuda.cu's fold, in its order.
    void fold(float* partial) {
        for (int warp = 0; warp < threads / 32; ++warp)
            for (int b = 0; b < TILE; ++b)
                for (int j = 0; j < STRIP; ++j) {
                    float sums[32];
                    for (int id = 0; id < 32; ++id) sums[id] = lanes[warp * 32 + id].acc[b][j];
                    for (int half = 16; half; half /= 2)
                        for (int id = 0; id < half; ++id) sums[id] += sums[id + half];
                    partial[(warp * TILE + b) * STRIP + j] = sums[0];
                }
    }
};

template <int TILE, class Weight>
struct Cta {
    Host<TILE> host;
    Worker<Host<TILE>, Weight> worker;
    Cta(const Row& row, int number) : host(row, number), worker(host, row) {}
};

template <int TILE, class Weight>
void by_phases(const Row& row, std::vector<std::unique_ptr<Cta<TILE, Weight>>>& ctas) {
    for (Step step; step.x < row.W; step.advance(row)) {
        const size_t start = random_word() % ctas.size();
        for (size_t i = 0; i < ctas.size(); ++i)
            if (!run_phase(ctas[(start + i) % ctas.size()]->worker, step)) return;
    }
}

template <int TILE, class Weight>
void by_threads(const Row& row, std::vector<std::unique_ptr<Cta<TILE, Weight>>>& ctas) {
    std::vector<std::thread> threads;
    for (auto& cta : ctas)
        threads.emplace_back([&row, &cta] {
            for (Step step; step.x < row.W; step.advance(row)) {
                if (random_word() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random_word() % 50));
                if (!run_phase(cta->worker, step)) return;
            }
        });
    for (auto& thread : threads) thread.join();
}

template <int TILE, class Weight>
void run(const Row& row) {
    std::vector<std::unique_ptr<Cta<TILE, Weight>>> ctas;
    for (int i = 0; i < row.ctas; ++i) ctas.push_back(std::make_unique<Cta<TILE, Weight>>(row, i));
    setting.manner == BY_THREADS ? by_threads(row, ctas) : by_phases(row, ctas);
}

template <class Weight>
void run_tile(const Row& row) {
    tile_of(row.B) == 1 ? run<1, Weight>(row) : run<4, Weight>(row);
}

}  // namespace

FASTVID_API int fastvid_abi_version(void) { return FASTVID_ABI_VERSION; }

// silent: a CTA that computes and says nothing, or -1.
FASTVID_API void host_setting(int64_t processors, int64_t shared_bytes, int64_t manner, int64_t silent) {
    setting = {processors, shared_bytes, manner, silent};
}

FASTVID_API int fastvid_cuda_device(int64_t* processors, int64_t* shared_bytes) {
    *processors = setting.processors, *shared_bytes = setting.shared_bytes;
    return 0;
}

FASTVID_API const char* fastvid_cuda_error(int error) { return error == -2 ? "it does not fit" : "a bad argument"; }

FASTVID_API int fastvid_pixelcnn_row(Row* row, int64_t row_size, void*) {
    if (row_size != (int64_t)sizeof(Row)) return -1;
    if (!plan(*row, setting.shared_bytes)) return -2;
    if (row->weight_type == 0) run_tile<Float32>(*row);
    if (row->weight_type == 1) run_tile<BFloat16>(*row);
    if (row->weight_type == 2) run_tile<Int8>(*row);
    return 0;
}
