// Random calls of both ops on heap buffers of exactly the promised size, checked against plain loops in double. Built with sanitizers: see kernels/README.md. Usage: fuzz [calls] [seed]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "common/numbers.h"
#include "nearest_codebook/cpu.h"

extern "C" {
const char* fastvid_cpu_best_isa(void);
int fastvid_cpu_use_isa(const char* name);
int fastvid_nearest_codebook(const void*, int, int64_t, const float*, int64_t, int64_t, int64_t, int64_t*, void*,
                             float*, int64_t*, float*, int64_t*, int, int, int64_t*);
int fastvid_update_codebook(float*, float*, float*, const int64_t*, const float*, int64_t, int64_t, double, float,
                            int64_t*, float, const float*, float, int);
}

namespace {

using namespace fastvid;
using namespace fastvid::FASTVID_LEVEL;

std::mt19937_64 random_bits;

int64_t between(int64_t least, int64_t most) { return least + (int64_t)(random_bits() % (uint64_t)(most - least + 1)); }

float normal() { return std::normal_distribution<float>()(random_bits); }

// A buffer that ends where it says: one element more is a report of the sanitizer. Poisoned with NaN and huge numbers.
template <class T>
std::unique_ptr<T[]> buffer(int64_t count) {
    std::unique_ptr<T[]> made(new T[(size_t)count]);
    std::memset(made.get(), 0xff, (size_t)count * sizeof(T));
    return made;
}

struct Values {
    float size, offset, hostile;  // spread, common offset, share of hostile elements

    float draw() const {
        static const float strange[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-45f, 1e-20f, 1e18f, 0.0f, -0.0f};
        if (std::uniform_real_distribution<float>()(random_bits) < hostile) return strange[between(0, 9)];
        return offset + size * normal();
    }
};

Values drawn_values() {
    static const float sizes[] = {1, 1, 1, 1e-20f, 1e18f, 1e-3f, 1e6f, 0};
    static const float hostile[] = {0, 0, 0, 0.002f, 0.2f};
    const float size = sizes[between(0, 7)];
    return {size, between(0, 2) ? 0 : 100 * size, hostile[between(0, 4)]};
}

int failures = 0;

void expect(bool held, const char* what, int64_t call, int64_t n) {
    if (held) return;
    if (++failures < 20) std::fprintf(stderr, "call %lld, row %lld: %s\n", (long long)call, (long long)n, what);
}

double distance(const float* row, const float* code, int64_t D) {
    double sum = 0;
    for (int64_t d = 0; d < D; ++d) sum += ((double)row[d] - code[d]) * ((double)row[d] - code[d]);
    return sum;
}

// One call: its inputs, its outputs, and the rows and codes as the loop below reads them.
template <class T>
struct Case {
    int64_t call, N, K, D, stride;
    bool statistics;
    std::unique_ptr<T[]> x, quantized;
    std::unique_ptr<float[]> codebook, squared, sums;
    std::unique_ptr<int64_t[]> indices, counts, nonfinite;
    std::vector<float> wide, expected_sums;
    std::vector<int64_t> expected_counts;
    std::vector<bool> usable;  // codes that are finite
    int64_t expected_nonfinite = 0;

    explicit Case(int64_t number) : call(number) {
        N = between(0, 5) ? between(0, 70) : between(0, 700);
        K = between(0, 3) ? between(1, 70) : between(1, 600);
        D = between(0, 3) ? between(1, 40) : between(1, 300);
        stride = D + (between(0, 1) ? 0 : between(1, 9));
        statistics = between(0, 3) != 0;
        draw_inputs();
        indices = buffer<int64_t>(N), counts = buffer<int64_t>(K), nonfinite = buffer<int64_t>(1);
        quantized = buffer<T>(N * D), squared = buffer<float>(N), sums = buffer<float>(K * D);
        expected_sums.resize((size_t)(K * D)), expected_counts.resize((size_t)K);
    }

    const float* row(int64_t n) const { return wide.data() + n * D; }
    float* code(int64_t k) const { return codebook.get() + k * D; }

    void draw_inputs() {
        const Values of_rows = drawn_values();
        const Values of_codes = between(0, 2) ? Values{of_rows.size, of_rows.offset, 0} : drawn_values();
        codebook = buffer<float>(K * D);
        for (int64_t i = 0; i < K * D; ++i) codebook[(size_t)i] = of_codes.draw();
        for (int64_t copies = between(0, 2) ? 0 : between(1, K); copies > 0; --copies)  // ties
            std::memmove(code(between(0, K - 1)), code(between(0, K - 1)), (size_t)D * sizeof(float));
        for (int64_t k = 0; k < K; ++k) usable.push_back(std::isfinite(distance(code(k), code(k), D)));
        x = buffer<T>(N ? (N - 1) * stride + D : 0);
        for (int64_t n = 0; n < N; ++n)
            for (int64_t d = 0; d < D; ++d) {
                T& to = x[(size_t)(n * stride + d)];
                narrow(of_rows.draw(), to);
                wide.push_back(widen(to));
            }
    }

    void run(int x_type) {
        const int outcome = fastvid_nearest_codebook(
            x.get(), x_type, stride, codebook.get(), N, K, D, indices.get(), quantized.get(), squared.get(),
            statistics ? counts.get() : nullptr, statistics ? sums.get() : nullptr, nonfinite.get(),
            (int)between(1, 7), (int)between(0, 3), nullptr);
        expect(outcome == 0, "refused", call, -1);
    }

    void check_row(int64_t n) {
        const int64_t chosen = indices[(size_t)n];
        if (chosen < 0 || chosen >= K) return expect(false, "index out of range", call, n);
        for (int64_t d = 0; d < D; ++d) {
            T wanted;
            narrow(code(chosen)[d], wanted);
            expect(!std::memcmp(&wanted, &quantized[(size_t)(n * D + d)], sizeof(T)), "quantized", call, n);
        }
        if (!std::isfinite(distance(row(n), row(n), D))) {
            ++expected_nonfinite;
            return expect(chosen == 0 && std::isnan(squared[(size_t)n]), "a row that is not finite", call, n);
        }
        double least = INFINITY;
        bool twin = false;  // of a lower index, which ties go to
        for (int64_t k = 0; k < K; ++k) {
            if (usable[(size_t)k]) least = std::fmin(least, distance(row(n), code(k), D));
            twin |= k < chosen && !std::memcmp(code(k), code(chosen), (size_t)D * sizeof(float));
        }
        if (least == INFINITY) return;  // no code is finite
        const double got = distance(row(n), code(chosen), D), error = std::fabs(squared[(size_t)n] - got);
        expect(got <= least * (1 + 1e-12), "a nearer code exists", call, n);
        expect(!twin, "a lower index is as near", call, n);
        expect(error <= got * 1e-5 + 1e-44 || (float)got >= 1e38f, "squared distance", call, n);
        ++expected_counts[(size_t)chosen];
        for (int64_t d = 0; d < D; ++d) expected_sums[(size_t)(chosen * D + d)] += row(n)[d];
    }

    void check() {
        for (int64_t n = 0; n < N; ++n) check_row(n);
        expect(nonfinite[0] == expected_nonfinite, "count of rows that are not finite", call, -1);
        for (bool one : usable)
            if (!one) return;  // a row without a finite code belongs to none
        if (!statistics) return;
        expect(!std::memcmp(counts.get(), expected_counts.data(), (size_t)K * sizeof(int64_t)), "counts", call, -1);
        for (size_t i = 0; i < expected_sums.size(); ++i) {
            const float sum = sums[i], wanted = expected_sums[i];
            expect(sum == wanted || (std::isnan(sum) && std::isnan(wanted)), "sums in row order", call, -1);
        }
    }
};

template <class T>
void one_call(int64_t call, int x_type) {
    Case<T> drawn(call);
    drawn.run(x_type);
    drawn.check();
}

// One update: its state before and after, and what the batch brings.
struct Update {
    int64_t call, K = between(1, 90), D = between(1, 40), steps = between(0, 5), steps_before = steps;
    double decay = (double)between(0, 99) / 100;
    float eps = 1e-5f, dead_below = between(0, 1) ? 0.5f : 0, restart_size = 2;
    bool debiased = between(0, 1), restarts = between(0, 1);
    std::unique_ptr<float[]> codes = filled(K * D), size = buffer<float>(K), sum = filled(K * D);
    std::unique_ptr<float[]> batch = filled(K * D), born = filled(K * D);
    std::unique_ptr<int64_t[]> counts = buffer<int64_t>(K);
    std::vector<float> old_codes, old_size, old_sum;

    explicit Update(int64_t number) : call(number) {
        for (int64_t k = 0; k < K; ++k) {
            size[(size_t)k] = std::fabs(normal());
            counts[(size_t)k] = between(0, 4);
        }
        for (int64_t hostile = between(0, 3); hostile > 0; --hostile)
            batch[(size_t)between(0, K * D - 1)] = between(0, 1) ? NAN : INFINITY;
        old_codes.assign(codes.get(), codes.get() + K * D);
        old_size.assign(size.get(), size.get() + K);
        old_sum.assign(sum.get(), sum.get() + K * D);
    }

    static std::unique_ptr<float[]> filled(int64_t count) {
        auto made = buffer<float>(count);
        for (int64_t i = 0; i < count; ++i) made[(size_t)i] = normal();
        return made;
    }

    void run() {
        const int outcome = fastvid_update_codebook(
            codes.get(), size.get(), sum.get(), counts.get(), batch.get(), K, D, decay, eps, debiased ? &steps : nullptr,
            dead_below, restarts ? born.get() : nullptr, restart_size, (int)between(1, 7));
        expect(outcome == 0 && steps == steps_before + debiased, "steps of an update", call, -1);
    }

    bool kept(int64_t k) const { return std::isfinite(distance(&batch[(size_t)(k * D)], old_sum.data(), D)); }

    static void near(float got, double wanted, const char* what, int64_t call, int64_t k) {
        expect(std::fabs(got - wanted) <= 2e-5 * (1 + std::fabs(wanted)), what, call, k);
    }

    void check() {
        const double share = debiased ? 1 - std::pow(decay, (double)steps) : 1;
        std::vector<double> seen;
        double total = 0;
        for (int64_t k = 0; k < K; ++k) {
            const double before = old_size[(size_t)k], rows = (double)counts[(size_t)k];
            seen.push_back((kept(k) ? decay * before + (1 - decay) * rows : before) / share);
            total += seen.back();
        }
        for (int64_t k = 0; k < K; ++k) {
            const bool dead = restarts && seen[(size_t)k] < dead_below;
            if (std::fabs(seen[(size_t)k] - dead_below) < 1e-5) continue;  // rounding decides who is dead
            const double count = dead ? restart_size : seen[(size_t)k];
            near(size[(size_t)k], count * share, "cluster size", call, k);
            const double smooth = (count + eps) / (total + eps * (double)K) * total;
            for (size_t i = (size_t)(k * D); i < (size_t)((k + 1) * D); ++i) {
                const double old = old_sum[i], moved = decay * old + (1 - decay) * (double)batch[i];
                const double m = dead ? born[i] * restart_size * share : kept(k) ? moved : old;
                near(sum[i], m, "cluster sum", call, k);
                if (dead || !kept(k)) {
                    expect(codes[i] == (dead ? born[i] : old_codes[i]), "a code that was set or left", call, k);
                } else if (smooth > 1e-3) {
                    near(codes[i], m / share / smooth, "code", call, k);
                }
            }
        }
    }
};

}  // namespace

int main(int argc, char** argv) {
    const int64_t calls = argc > 1 ? std::atoll(argv[1]) : 10000;
    random_bits.seed(argc > 2 ? (uint64_t)std::atoll(argv[2]) : 1);
    const char* levels[] = {"generic", "v2", "v3", "v4"};
    for (int64_t call = 0; call < calls; ++call) {
        fastvid_cpu_use_isa(levels[between(0, 3)]);  // a level that this processor lacks leaves the last one
        if (call % 4 == 3) {
            Update drawn(call);
            drawn.run();
            drawn.check();
            continue;
        }
        const int x_type = (int)between(0, 2);
        if (x_type == FLOAT32) one_call<float>(call, x_type);
        if (x_type == BFLOAT16) one_call<BFloat16>(call, x_type);
        if (x_type == FLOAT16) one_call<Float16>(call, x_type);
    }
    std::printf("%lld calls, best level %s, %d failures\n", (long long)calls, fastvid_cpu_best_isa(), failures);
    return failures != 0;
}
