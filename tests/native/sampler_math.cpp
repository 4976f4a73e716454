// The arithmetic of the native sampler at one instruction set level, against plain loops: built and run by
// test_sampler_math.py. Prints what it measured; the exit status tells whether everything held.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "pixelcnn_sampler/cpu_draw.h"
#include "pixelcnn_sampler/cpu_product.h"

namespace {

using namespace fastvid::FASTVID_LEVEL;

int failures = 0;
std::mt19937_64 random_bits(1);

#define EXPECT(held, ...)                                                   \
    do {                                                                    \
        if (!(held) && ++failures <= 20) {                                  \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #held);          \
            std::printf(__VA_ARGS__);                                       \
            std::printf("\n");                                              \
        }                                                                   \
    } while (false)

int64_t between(int64_t least, int64_t most) { return least + (int64_t)(random_bits() % (uint64_t)(most - least + 1)); }

float normal() { return std::normal_distribution<float>()(random_bits); }

bool same(float a, float b) { return (a != a && b != b) || std::memcmp(&a, &b, sizeof a) == 0; }

float from_bits(uint32_t bits) { return float_of(bits); }

// Distance in units of the last place of the true value's binade; 1e9 where one is NaN or infinite and the other not.
double away(float got, double truth) {
    if (std::isnan(truth)) return std::isnan(got) ? 0 : 1e9;
    if (std::isinf((float)truth) || !std::isfinite(got)) return got == (float)truth ? 0 : 1e9;
    int exponent = -125;
    if (truth != 0) std::frexp(truth, &exponent);
    return std::fabs(got - truth) / std::ldexp(1.0, (exponent < -125 ? -125 : exponent) - 24);
}

// --- functions

template <class Function, class Truth>
void sweep(const char* name, double allowed, Function function, Truth truth) {
    double worst = 0;
    float at = 0;
    const uint64_t step = 4099;  // prime: all exponents, both signs, NaN and all kinds of fractions
    for (uint64_t bits = 0; bits < 1ull << 32; bits += step * LANES) {
        Floats x = {};
        for (int lane = 0; lane < LANES; ++lane) x[lane] = from_bits((uint32_t)(bits + (uint64_t)lane * step));
        const Floats y = function(x);
        for (int lane = 0; lane < LANES; ++lane) {
            const double error = away(y[lane], truth((double)x[lane]));
            if (error > worst) worst = error, at = x[lane];
        }
    }
    for (float x : {0.0f, -0.0f, 1e-45f, -1e-45f, 1e-20f, 88.8f, -88.8f, 104.5f, -104.5f, 3e38f, -3e38f, INFINITY,
                    -INFINITY})
        EXPECT(away(function(repeat(x))[LANES - 1], truth((double)x)) <= allowed, "%s of %g", name, x);
    std::printf("%s: %.2f units in the last place, at %a\n", name, worst, at);
    EXPECT(worst <= allowed, "%s is off by %g at %a", name, worst, at);
}

void check_functions() {
    sweep("exp", 1.1, [](Floats x) { return exp(x); }, [](double x) { return std::exp(x); });
    sweep("tanh", 2.6, [](Floats x) { return tanh(x); }, [](double x) { return std::tanh(x); });
    sweep("sigmoid", 2.4, [](Floats x) { return sigmoid(x); }, [](double x) { return 1 / (1 + std::exp(-x)); });
    sweep("elu", 1.1, [](Floats x) { return elu(x); }, [](double x) { return x > 0 ? x : std::expm1(x); });
    double worst = 0;
    const float scales[] = {1e-3f, 0.3f, 3, 30, 300};
    for (int i = 0; i < 400000; ++i) {
        Floats a, b;
        for (int lane = 0; lane < LANES; ++lane) a[lane] = normal() * scales[i % 5], b[lane] = normal() * scales[i % 4];
        const Floats got = gate(a, b);
        for (int lane = 0; lane < LANES; ++lane) {
            const double error = away(got[lane], std::tanh((double)a[lane]) / (1 + std::exp(-(double)b[lane])));
            worst = error > worst ? error : worst;
        }
    }
    std::printf("gate: %.2f units in the last place\n", worst);
    EXPECT(worst <= 5, "gate is off by %g", worst);
    for (float a : {0.0f, -0.0f, 1e-45f, 2e-30f, 9.5f, -3e38f, INFINITY, -INFINITY, NAN})
        for (float b : {0.0f, -0.0f, 1e-45f, -100.0f, 3e38f, INFINITY, -INFINITY, NAN}) {
            const float got = gate(repeat(a), repeat(b))[0];
            const double truth = std::tanh((double)a) / (1 + std::exp(-(double)b));
            const bool signs = truth != truth || std::signbit(got) == std::signbit(truth);
            EXPECT(away(got, truth) <= 5 && signs, "%g %g", a, b);
        }
}

// --- noise

void philox_once(uint32_t (&c)[4], uint64_t key) {
    uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; ++round, low += 0x9E3779B9, high += 0xBB67AE85) {
        const uint64_t p0 = (uint64_t)c[0] * 0xD2511F53, p1 = (uint64_t)c[2] * 0xCD9E8D57;
        const uint32_t next[] = {(uint32_t)(p1 >> 32) ^ c[1] ^ low, (uint32_t)p1, (uint32_t)(p0 >> 32) ^ c[3] ^ high,
                                 (uint32_t)p0};
        std::memcpy(c, next, sizeof c);
    }
}

void check_philox() {
    // the known answers of Random123
    const struct {
        uint32_t counter[4];
        uint64_t key;
        uint32_t answer[4];
    } known[] = {
        {{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{~0u, ~0u, ~0u, ~0u}, ~0ull, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822,
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (const auto& answer : known) {
        Words words;
        for (int i = 0; i < 4; ++i) words.word[i] = repeat((uint64_t)answer.counter[i] | 0xabcdef0100000000);
        words = philox(words, answer.key);
        uint32_t plain[4];
        std::memcpy(plain, answer.counter, sizeof plain);
        philox_once(plain, answer.key);
        for (int i = 0; i < 4; ++i)
            for (int lane = 0; lane < DOUBLES; ++lane)
                EXPECT((uint32_t)words.word[i][lane] == answer.answer[i] && plain[i] == answer.answer[i], "word %d", i);
    }
}

float exact(uint32_t bits) { return (float)-std::log(-std::log((bits + 0.5) * 0x1p-24)); }

void check_noise() {
    constexpr int COUNT = 4096;
    std::vector<uint32_t> bits(COUNT);
    std::vector<float> noise(COUNT);
    double widest = 0;
    int64_t wrong = 0, under = 0;
    for (uint32_t start = 0; start < 1 << 24; start += COUNT) {
        for (uint32_t i = 0; i < COUNT; ++i) bits[i] = start + i;
        exact_noise(bits.data(), COUNT, noise.data());
        for (int i = 0; i < COUNT; i += LANES) {
            const Floats bound = noise_bound(load<Ints>(&bits[i]));
            for (int lane = 0; lane < LANES; ++lane) {
                const float truth = exact(bits[i + lane]);
                wrong += !same(truth, noise[i + lane]);
                under += bound[lane] < truth;
                if (bits[i + lane] >= 1 << 23) widest = std::fmax(widest, (double)bound[lane] - truth);
            }
        }
    }
    std::printf("noise: %lld of 2^24 differ from libm, %lld exceed the bound; at u >= 1/2 it is within %.2g\n",
                (long long)wrong, (long long)under, widest);
    EXPECT(wrong == 0 && under == 0, "%lld differ, %lld exceed", (long long)wrong, (long long)under);
    EXPECT(widest < LIKELY, "%g", widest);
}

std::vector<float> plain_noise(const Place& place, int64_t K) {
    std::vector<float> noise;
    for (int64_t k = 0; k < K; ++k) {
        uint32_t counter[] = {(uint32_t)(k / 4) + (place.stream << 16), place.x + (place.y << 16), place.t,
                              place.sample};
        philox_once(counter, place.seed);
        noise.push_back(exact(counter[k % 4] >> 8));
    }
    return noise;
}

// --- draws

Drawn plain_draw(const std::vector<float>& logits, const std::vector<float>& noise, float temperature) {
    const int64_t K = (int64_t)logits.size();
    std::vector<float> score;
    for (int64_t k = 0; k < K; ++k) score.push_back(logits[k] / temperature + noise[k]);
    int64_t best = 0;
    for (int64_t k = 1; k < K; ++k)
        if (!std::isnan(score[best]) && (std::isnan(score[k]) || score[k] > score[best])) best = k;
    float second = -INFINITY;
    for (int64_t k = 0; k < K; ++k)
        if (k != best && score[k] > second) second = score[k];
    return {best, score[best] - second, 0};
}

std::vector<float> drawn_logits(int64_t K, int64_t kind) {
    static const float strange[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f};
    const float scales[] = {1, 1, 0, 3, 1e5f, 1e30f, 1e-6f, 8, 1, 1};
    std::vector<float> logits;
    for (int64_t k = 0; k < K; ++k) logits.push_back(normal() * scales[kind]);
    if (kind == 1) for (float& logit : logits) logit = std::round(logit);  // ties of logits
    if (kind == 7) logits[between(0, K - 1)] += 40;
    if (kind == 8) for (int i = 0; i < 3; ++i) logits[between(0, K - 1)] = strange[between(0, 4)];
    if (kind == 9) for (float& logit : logits) logit = between(0, 3) ? -INFINITY : logit;
    return logits;
}

void check_logprob(const std::vector<float>& logits, int64_t code, float got) {
    double largest = -INFINITY, sum = 0;
    for (float logit : logits) largest = logit > largest ? logit : largest;
    for (float logit : logits) sum += std::exp(logit - largest);
    const double truth = logits[code] - largest - std::log(sum);
    // of each partial sum, of exp, of the logarithm, and of the difference
    const double allowed = ((double)logits.size() / (4 * LANES) + 8 + 2 * std::fabs(truth)) * 0x1p-24;
    const bool near = got == truth || std::fabs(got - truth) <= allowed;
    EXPECT(std::isnan(truth) ? std::isnan(got) : near, "%g %g", got, truth);
}

void check_draws() {
    for (int64_t K : {1, 2, 7, 16, 37, 100, 512, 513, 4096})
        for (int64_t round = 0; round < (K > 600 ? 60 : 300); ++round) {
            const float temperatures[] = {1, 0.7f, 1e-4f, 100};
            const float temperature = temperatures[between(0, 3)];
            const Place place = {random_bits(), (uint32_t)random_bits(), (uint32_t)between(0, 32767),
                                 (uint32_t)random_bits(), (uint32_t)between(0, 32767), (uint32_t)between(0, 32767)};
            const std::vector<float> logits = drawn_logits(K, round % 10), noise = plain_noise(place, K);
            std::unique_ptr<float[]> row(new float[K]), made(new float[K]);  // of just these sizes
            std::memcpy(row.get(), logits.data(), (size_t)K * sizeof(float));
            gumbel(place, K, made.get());
            const bool exact_row = std::memcmp(made.get(), noise.data(), (size_t)K * sizeof(float)) == 0;
            EXPECT(exact_row, "noise of %lld", (long long)K);
            void* scratch = std::aligned_alloc(64, (size_t)draw_bytes(K));
            std::memset(scratch, 0xff, (size_t)draw_bytes(K));
            const Drawn wanted = plain_draw(logits, noise, temperature);
            const Drawn screened = draw(row.get(), K, temperature, place, scratch);
            const Drawn with = draw_with(row.get(), made.get(), K, temperature);
            for (const Drawn& got : {screened, with})
                EXPECT(got.code == wanted.code && same(got.margin, wanted.margin),
                       "K %lld kind %lld temperature %g: code %lld margin %g, wanted %lld %g", (long long)K,
                       (long long)(round % 10), temperature, (long long)got.code, got.margin, (long long)wanted.code,
                       wanted.margin);
            check_logprob(logits, screened.code, screened.logprob);
            EXPECT(same(screened.logprob, logprob_of(row.get(), K, screened.code)), "K %lld", (long long)K);
            std::free(scratch);
        }
}

// --- products

struct Weights {
    std::vector<float> plain;  // [Kin, N]
    std::vector<float> scale;  // [N]
    void* packed;

    Weights(int64_t type, int64_t Kin, int64_t N) {
        const int64_t bytes = type == WEIGHTS_FLOAT32 ? 4 : type == WEIGHTS_BFLOAT16 ? 2 : 1;
        packed = std::aligned_alloc(64, (size_t)(Kin * N * bytes + 64) / 64 * 64);
        for (int64_t n = 0; n < N; ++n) scale.push_back(std::exp(normal()));
        for (int64_t k = 0; k < Kin; ++k)
            for (int64_t n = 0; n < N; ++n) {
                const int64_t row = n / PANEL * Kin + k, lane = n % PANEL;
                const float value = normal();
                if (type == WEIGHTS_FLOAT32) {
                    ((float*)packed)[row * PANEL + lane] = value;
                    plain.push_back(value);
                } else if (type == WEIGHTS_BFLOAT16) {
                    const uint16_t half = (uint16_t)(bits_of(value) >> 16);
                    ((uint16_t*)packed)[row * PANEL + lane % 8 * 2 + lane / 8] = half;  // little endian pairs
                    plain.push_back(from_bits((uint32_t)half << 16));
                } else {
                    const int8_t byte = (int8_t)between(-127, 127);
                    ((int8_t*)packed)[row * PANEL + lane] = byte;
                    plain.push_back(byte);
                }
            }
    }
    ~Weights() { std::free(packed); }
};

// Rows of a size of their own with something before and after each, and pointers to them.
struct Rows {
    int64_t stride;
    std::vector<float> values;
    std::vector<float*> at;

    Rows(int64_t rows, int64_t columns) : stride(columns + 5), values((size_t)(rows * stride)) {
        for (float& value : values) value = normal();
        for (int64_t m = 0; m < rows; ++m) at.push_back(&values[m * stride + 3]);
    }
};

float fused(float a, float b, float c) { return multiply_add(repeat(a), repeat(b), repeat(c))[0]; }

void check_product(int64_t M, int64_t type, int64_t taps, int64_t width, int64_t panels, int64_t finish) {
    const int64_t N = panels * PANEL, Kin = taps * width;
    const Weights weights(type, Kin, N);
    Rows inputs(taps * M, width), lines(M, taps * width), addends(M, N), outputs(M, N), gated(M, N / 2), residuals(M, N), bias(1, N);
    const bool side_by_side = between(0, 1);
    for (int64_t i = 0; i < taps * M && side_by_side; ++i) inputs.at[i] = lines.at[i % M] + i / M * width;
    std::vector<bool> live;
    for (int64_t s = 0; s < taps; ++s) {
        live.push_back(between(0, 3) > 0);
        for (int64_t m = 0; m < M && !live[s]; ++m) inputs.at[s * M + m] = nullptr;
    }
    Product product = {};
    const bool scaled = type == WEIGHTS_INT8 && taps > 0 && between(0, 3);
    product.matrix = {taps ? weights.packed : nullptr, scaled ? weights.scale.data() : nullptr, taps, width,
                      (int32_t)type};
    product.M = M;
    product.inputs = inputs.at.data();
    product.bias = between(0, 2) ? bias.at[0] : nullptr;
    product.addends = between(0, 2) ? addends.at.data() : nullptr;
    product.outputs = finish == 3 || finish == 4 ? nullptr : outputs.at.data();
    product.elu = finish == 2;
    product.gated = finish >= 3 ? gated.at.data() : nullptr;
    product.gated_residuals = finish == 4 ? residuals.at.data() : finish == 6 ? gated.at.data() : nullptr;
    product.residuals = finish == 1 ? residuals.at.data() : finish == 7 ? outputs.at.data() : nullptr;
    const int64_t first = between(0, panels - 1), last = between(first, panels);
    // what every element should become, by the definition and in its order; the rest stays as it is
    std::vector<float> want = outputs.values, want_gated = gated.values;
    for (int64_t m = 0; m < M; ++m) {
        std::vector<float> sums((size_t)N);
        for (int64_t n = first * PANEL; n < last * PANEL; ++n) {
            float start = product.bias ? product.bias[n] : 0, sum = 0;
            if (product.addends) start = start + addends.at[m][n];
            double truth = start, size = std::fabs(start);
            if (!scaled) sum = start;
            for (int64_t s = 0; s < taps; ++s)
                for (int64_t k = 0; k < width && live[s]; ++k) {
                    const float weight = weights.plain[(s * width + k) * N + n], x = inputs.at[s * M + m][k];
                    sum = fused(weight, x, sum);
                    const double term = (double)weight * x * (scaled ? weights.scale[n] : 1);
                    truth += term, size += std::fabs(term);
                }
            if (scaled) sum = fused(sum, weights.scale[n], start);
            EXPECT(std::fabs(sum - truth) <= size * (double)(Kin + 4) * 0x1p-24, "definition: %g %g", sum, truth);
            sums[n] = sum;
            float& to = want[outputs.at[m] + n - outputs.values.data()];
            if (finish == 1) sum = residuals.at[m][n] + sum;
            if (finish == 7) sum = to + sum;
            if (product.outputs) to = product.elu ? elu(repeat(sum))[0] : sum;
        }
        for (int64_t c = first * 8; c < last * 8 && product.gated; ++c) {
            const int64_t n = c / 8 * PANEL + c % 8;
            float& to = want_gated[gated.at[m] + c - gated.values.data()];
            const float value = gate(repeat(sums[n]), repeat(sums[n + 8]))[0];
            to = finish == 4 ? residuals.at[m][c] + value : finish == 6 ? to + value : value;
        }
    }
    multiply(product, first, last);
    EXPECT(std::memcmp(want.data(), outputs.values.data(), want.size() * sizeof(float)) == 0 &&
               std::memcmp(want_gated.data(), gated.values.data(), want_gated.size() * sizeof(float)) == 0,
           "M %lld type %lld taps %lld width %lld panels %lld..%lld of %lld finish %lld", (long long)M, (long long)type,
           (long long)taps, (long long)width, (long long)first, (long long)last, (long long)panels, (long long)finish);
}

void check_products() {
    for (int64_t type = WEIGHTS_FLOAT32; type <= WEIGHTS_INT8; ++type)
        for (int64_t M : {1, 2, 3, 4, 5, 6, 7, 11, 13, 32})
            for (int64_t round = 0; round < 48; ++round)
                check_product(M, type, between(0, 3), between(1, 5) * 8, between(1, 14), round % 8);
}

}  // namespace

int main() {
    check_philox();
    check_functions();
    check_noise();
    check_draws();
    check_products();
    if (failures) std::printf("%d checks failed\n", failures);
    return failures != 0;
}
