// Random models and jobs of the sampler on heap buffers of exactly the promised size, poisoned: codes, logprob and margins
// must be the same bits for any window, threads, batch, order and draft. Built with sanitizers: see
// kernels/README.md. Usage: fuzz_sampler [jobs] [seed]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "pixelcnn_sampler/cpu.h"

extern "C" {
const char* fastvid_cpu_best_isa(void);
int fastvid_cpu_use_isa(const char* name);
int64_t fastvid_sampler_bytes(const fastvid::SamplerJob*);
int fastvid_sampler_start(const fastvid::SamplerJob*);
int fastvid_sampler_row(const fastvid::SamplerJob*, int64_t, int64_t);
int fastvid_sampler_frame(const fastvid::SamplerJob*, int64_t);
}

namespace {

using fastvid::SamplerJob;

std::mt19937_64 random_bits;

int64_t between(int64_t least, int64_t most) { return least + (int64_t)(random_bits() % (uint64_t)(most - least + 1)); }

int64_t up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

int failures = 0;

void expect(bool held, const char* what, int64_t job) {
    if (!held && ++failures < 20) std::fprintf(stderr, "job %lld: %s\n", (long long)job, what);
}

// Memory that ends where it says, on a boundary of 64 bytes, and starts as NaN.
struct Memory {
    void* at = nullptr;

    explicit Memory(int64_t bytes) {
        if (posix_memalign(&at, 64, (size_t)(bytes ? bytes : 1))) std::abort();
        std::memset(at, 0xff, (size_t)(bytes ? bytes : 1));
    }
    Memory(const Memory&) = delete;
    ~Memory() { std::free(at); }
};

struct Tap {
    int64_t dt, dy, dx;
};

// A model of random weights in the packed format, sections apart from each other by NaN.
struct Model {
    int64_t K = between(1, 70), C = 8 * between(1, 5), S = up(C, 16), L = between(0, 3), Cc = between(0, 6);
    int64_t type = between(0, 2), frames = between(1, 3), r = between(0, 2), heads = between(1, 3);
    int64_t E = between(1, 10), E8 = up(E, 8), D = heads * E8;
    bool wavefront = between(0, 2) == 0;
    std::vector<uint8_t> bytes;
    std::vector<int64_t> words;

    Model() {
        if (L && !between(0, 15)) C = 8 * between(80, 92), S = up(C, 16), L = 1;  // wide: products are shared
        std::vector<Tap> taps[4];
        for (int64_t dt = 1 - frames; dt < 0; ++dt)
            for (int64_t dy = -r; dy <= r; ++dy) {
                for (int64_t dx = -r; dx <= r; ++dx)
                    taps[0].push_back({dt, dy, dx}), taps[1].push_back({dt, dy, dx});
                taps[2].push_back({dt, dy, 0}), taps[3].push_back({dt, 0, dy});
            }
        int64_t past[4], now[4];
        for (int i = 0; i < 4; ++i) past[i] = (int64_t)taps[i].size();
        const int64_t reach = frames == 1 && !wavefront ? r : 0;
        for (int64_t d = -r; d <= 0; ++d) {
            for (int64_t dx = -r; dx <= r && d < 0; ++dx) taps[0].push_back({0, d, dx});
            if (d < 0) taps[1].push_back({0, 0, d});
            for (int64_t dx = -reach; dx <= reach; ++dx) taps[2].push_back({0, d, dx});
            taps[3].push_back({0, 0, d});
        }
        for (int i = 0; i < 4; ++i) now[i] = (int64_t)taps[i].size() - past[i];
        bool attends = false;
        std::vector<int64_t> globals, layers;
        for (int i = 0; i < 2; ++i) {
            globals.push_back(floats((past[i] + now[i]) * K, C, S));
            globals.push_back(floats(1, C, S));
        }
        matrix(globals, 1, C, C), globals.push_back(floats(1, C, S));
        matrix(globals, 1, C, K), globals.push_back(floats(1, K, up(K, 16)));
        for (int64_t l = 0; l < L; ++l) {
            const bool attention = between(0, 1);
            attends |= attention;
            for (int64_t count : {past[2], now[2], past[3], now[3]}) matrix(layers, count, C, 2 * C);
            matrix(layers, 1, Cc, 2 * C, true), matrix(layers, 1, 2 * C, 2 * C), matrix(layers, 1, C, C);
            matrix(layers, attention, C, 3 * D), matrix(layers, attention, D, C);
            layers.push_back(floats(1, 2 * C, 2 * C)), layers.push_back(floats(1, 2 * C, 2 * C));
            layers.push_back(floats(1, C, S));
            layers.push_back(attention ? floats(1, 3 * D, up(3 * D, 16)) : -1);
            layers.push_back(attention ? floats(1, 9 * D, up(9 * D, 16)) : -1);
            layers.push_back(attention ? floats(1, C, S) : -1);
        }
        if (!attends) heads = E = E8 = 0;
        words = {1, K, C, S, L, Cc, heads, E8, type, wavefront, E, frames, r, past[0], now[0], past[1], now[1],
                 past[2], now[2], past[3], now[3], 27, 0, 0, 24, C, 0};
        for (const auto& group : taps)
            for (const Tap& tap : group) words.insert(words.end(), {tap.dt, tap.dy, tap.dx});
        words[22] = (int64_t)words.size();
        words.insert(words.end(), globals.begin(), globals.end());
        words[23] = (int64_t)words.size();
        words.insert(words.end(), layers.begin(), layers.end());
        words[26] = (int64_t)words.size();
    }

    int64_t section(int64_t size) {
        const int64_t at = up((int64_t)bytes.size() + (bytes.empty() ? 0 : 64), 64);
        bytes.resize((size_t)at, 0xff);
        bytes.resize((size_t)(at + size), 0);
        return at;
    }

    // Rows of `count` random numbers, then zeros up to `stride`.
    int64_t floats(int64_t rows, int64_t count, int64_t stride) {
        const int64_t at = section(up(rows * stride * 4, 64));
        for (int64_t i = 0; i < rows * stride; ++i) {
            const float value = i % stride < count ? std::normal_distribution<float>(0, 0.3f)(random_bits) : 0;
            std::memcpy(&bytes[(size_t)(at + 4 * i)], &value, 4);
        }
        return at;
    }

    // Offsets of a matrix and its scales. What lies in a panel beyond the last column is zero, as packed.
    void matrix(std::vector<int64_t>& offsets, int64_t taps, int64_t width, int64_t columns, bool even_empty = false) {
        const int64_t rows = taps * width, panels = up(columns, 16) / 16;
        if (!rows && !even_empty) return (void)offsets.insert(offsets.end(), {-1, -1});
        const int64_t size[] = {4, 2, 1}, at = section(panels * rows * 16 * size[type]);
        for (int64_t i = 0; i < panels * rows * 16; ++i) {
            const bool beyond = i / (16 * rows) * 16 + (type == 1 ? i / 2 % 8 + i % 2 * 8 : i % 16) >= columns;
            const float spread = 1 / std::sqrt((float)rows);
            const float value = beyond ? 0 : std::normal_distribution<float>(0, spread)(random_bits);
            const int8_t small = (int8_t)(value * 30);
            const void* from[] = {&value, (const char*)&value + 2, &small};
            std::memcpy(&bytes[(size_t)(at + i * size[type])], from[type], (size_t)size[type]);
        }
        offsets.push_back(at);
        offsets.push_back(type == 2 ? floats(1, panels * 16, panels * 16) : -1);
    }
};

struct Result {
    std::vector<int64_t> codes, passes;
    std::vector<float> logprob, margin;
};

// One job of samples b0 .. b1 of the inputs.
struct Inputs {
    const Model& model;
    int64_t B = between(0, 4), T = between(1, 3), H = between(1, 4), W = between(1, 7), cells = B * T * H * W;
    std::vector<float> condition = std::vector<float>((size_t)(cells * model.Cc));
    std::vector<int64_t> samples, given, draft;
    double temperature = between(0, 1) ? 1 : 0.6;
    int64_t seed = (int64_t)random_bits();

    explicit Inputs(const Model& model) : model(model) {
        for (float& value : condition) value = std::normal_distribution<float>()(random_bits);
        for (int64_t b = 0; b < B; ++b) samples.push_back(between(0, 1ll << 31));
        const int64_t share = between(0, 4);
        for (int64_t i = 0; i < cells; ++i) {
            given.push_back(between(1, 4) <= share ? between(0, model.K - 1) : -1);
            draft.push_back(between(-1, model.K - 1));
        }
    }

    Result run(int64_t job_number, int64_t b0, int64_t b1, int64_t window, int64_t threads, bool front, bool drafted) {
        const int64_t grid = T * H * W, n = (b1 - b0) * grid;
        Result result = {std::vector<int64_t>((size_t)n, -1), std::vector<int64_t>((size_t)((b1 - b0) * T * H)),
                         std::vector<float>((size_t)n, NAN), std::vector<float>((size_t)n, NAN)};
        Memory weights((int64_t)model.bytes.size());
        std::memcpy(weights.at, model.bytes.data(), model.bytes.size());
        SamplerJob job = {(const uint8_t*)weights.at, model.words.data(), condition.data() + b0 * grid * model.Cc,
                          samples.data() + b0, given.data() + b0 * grid, drafted ? draft.data() + b0 * grid : nullptr,
                          result.codes.data(), result.logprob.data(), result.margin.data(), result.passes.data(),
                          nullptr, 0, (int64_t)model.words.size(), b1 - b0, T, H, W, seed, 1, 2, temperature, window,
                          front, threads};
        job.state_bytes = fastvid_sampler_bytes(&job);
        expect(job.state_bytes >= 0, "a sound job is refused", job_number);
        if (job.state_bytes < 0) return result;
        Memory state(job.state_bytes);
        job.state = state.at;
        int outcome = fastvid_sampler_start(&job);
        for (int64_t t = 0; t < T; ++t) {
            if (front) outcome |= fastvid_sampler_frame(&job, t);
            for (int64_t y = 0; y < H && !front; ++y) outcome |= fastvid_sampler_row(&job, t, y);
        }
        expect(outcome == 0, "a call failed", job_number);
        return result;
    }

    void check(const Result& result, int64_t job) const {
        for (size_t i = 0; i < result.codes.size(); ++i) {
            const int64_t code = result.codes[i];
            expect(code >= 0 && code < model.K && (given[i] < 0 || given[i] == code), "a code", job);
            expect(std::isfinite(result.logprob[i]) && result.logprob[i] < 1e-4f, "a log-probability", job);
            expect(given[i] >= 0 ? std::isinf(result.margin[i]) : result.margin[i] >= 0, "a margin", job);
        }
    }
};

void same(const Result& a, const Result& b, int64_t from, const char* what, int64_t job) {
    for (size_t i = 0; i < b.codes.size(); ++i) {
        const size_t at = (size_t)from + i;
        expect(a.codes[at] == b.codes[i] && a.logprob[at] == b.logprob[i] && a.margin[at] == b.margin[i], what, job);
    }
}

void one_job(int64_t number) {
    const Model model;
    Inputs inputs(model);
    const Result plain = inputs.run(number, 0, inputs.B, 1, 1, false, false);
    inputs.check(plain, number);
    for (int tries = 0; tries < 3; ++tries)
        same(plain, inputs.run(number, 0, inputs.B, between(0, 9), between(1, 4), false, between(0, 1)), 0,
             "a window, threads or a draft change bits", number);
    if (inputs.B > 1) {
        const int64_t b = between(0, inputs.B - 1);
        same(plain, inputs.run(number, b, b + 1, between(0, 9), between(1, 3), false, between(0, 1)),
             b * inputs.T * inputs.H * inputs.W, "the batch changes bits", number);
    }
    if (model.wavefront)
        same(plain, inputs.run(number, 0, inputs.B, 0, between(1, 4), true, false), 0, "the order changes bits",
             number);
}

}  // namespace

int main(int argc, char** argv) {
    const int64_t jobs = argc > 1 ? std::atoll(argv[1]) : 1000;
    random_bits.seed(argc > 2 ? (uint64_t)std::atoll(argv[2]) : 1);
    const char* levels[] = {"generic", "v2", "v3", "v4"};
    for (int64_t job = 0; job < jobs; ++job) {
        fastvid_cpu_use_isa(levels[between(0, 3)]);  // a level that this processor lacks leaves the last one
        one_job(job);
    }
    std::printf("%lld jobs, best level %s, %d failures\n", (long long)jobs, fastvid_cpu_best_isa(), failures);
    return failures != 0;
}
