// Random calls of the gated convolution and its gradients on heap buffers of exactly the promised size, checked against
// plain loops in double, and for the same bits with other threads. Built with sanitizers: see kernels/README.md.
// Usage: fuzz_conv [calls] [seed]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "common/numbers.h"
#include "gated_causal_conv/cpu.h"

extern "C" {
const char* fastvid_cpu_best_isa(void);
int fastvid_cpu_use_isa(const char* name);
int fastvid_gated_causal_conv(const fastvid::ConvCall*);
int fastvid_gate_backward(const fastvid::GateCall*);
int fastvid_weight_gradient(const fastvid::WeightGradCall*);
}

namespace {

using namespace fastvid;
using namespace fastvid::FASTVID_LEVEL;

std::mt19937_64 random_bits;

int64_t between(int64_t least, int64_t most) { return least + (int64_t)(random_bits() % (uint64_t)(most - least + 1)); }

double normal() { return std::normal_distribution<double>()(random_bits); }

int failures = 0;

void expect(bool held, const char* what, int64_t call) {
    if (held) return;
    if (++failures < 20) std::fprintf(stderr, "call %lld: %s\n", (long long)call, what);
}

// A tensor of up to five axes in memory that ends where it says, in any order and with gaps, which stay as they are.
struct Tensor {
    std::vector<int64_t> shape, strides;
    int32_t type = (int32_t)between(0, 1);
    int64_t extent = 1;  // elements from the first to the last
    std::unique_ptr<char[]> memory;

    Tensor(std::vector<int64_t> sizes, bool dense = false, bool may_repeat = false) : shape(sizes), strides(sizes) {
        std::vector<size_t> order;  // innermost axis first
        for (size_t axis = shape.size(); axis-- > 0;) order.push_back(axis);
        if (!dense && between(0, 1)) std::swap(order[0], order[(size_t)between(0, (int64_t)order.size() - 1)]);
        int64_t step = dense || between(0, 3) ? 1 : between(2, 3);
        for (size_t axis : order) {
            strides[axis] = step;
            step = step * shape[axis] + (dense || between(0, 3) ? 0 : between(1, 5));
            if (may_repeat && !between(0, 5)) strides[axis] = 0;
        }
        for (size_t axis = 0; axis < shape.size(); ++axis) extent += (shape[axis] - 1) * strides[axis];
        if (!count()) extent = 0;
    }

    int64_t bytes() const { return extent * (type == FLOAT32 ? 4 : 2); }
    int64_t count() const {
        int64_t product = 1;
        for (int64_t size : shape) product *= size;
        return product;
    }
    int64_t place(int64_t i) const {
        int64_t at = 0;
        for (size_t axis = shape.size(); axis-- > 0; i /= shape[axis]) at += i % shape[axis] * strides[axis];
        return at;
    }

    Tensor& poison() {
        memory.reset(new char[(size_t)bytes()]);
        std::memset(memory.get(), 0xff, (size_t)bytes());
        return *this;
    }
    Tensor& fill(double hostile = 0) {
        poison();
        for (int64_t i = 0; i < count(); ++i) set(place(i), (double)between(0, 9999) < hostile * 1e4 ? NAN : normal());
        return *this;
    }

    void set(int64_t at, double value) {
        if (type == FLOAT32)
            narrow((float)value, ((float*)memory.get())[at]);
        else
            narrow((float)value, ((BFloat16*)memory.get())[at]);
    }
    double get(int64_t at) const {
        return type == FLOAT32 ? ((float*)memory.get())[at] : widen(((BFloat16*)memory.get())[at]);
    }
    double operator[](int64_t i) const { return memory ? get(place(i)) : 0; }

    View view() const {
        View made = {};
        made.data = memory.get();
        made.type = type;
        for (size_t axis = 0; axis < 5; ++axis) made.strides[axis] = strides[axis];
        return made;
    }
    std::vector<char> copy() const { return {memory.get(), memory.get() + bytes()}; }

    // What lies between the elements, after a call that wrote them.
    bool gaps_left_alone() const {
        std::vector<bool> written((size_t)extent);
        for (int64_t i = 0; i < count(); ++i) written[(size_t)place(i)] = true;
        const int64_t size = type == FLOAT32 ? 4 : 2;
        for (int64_t at = 0; at < bytes(); ++at)
            if (!written[(size_t)(at / size)] && (unsigned char)memory[(size_t)at] != 0xff) return false;
        return true;
    }
};

// got is as good as `truth`, whose sum had terms of this total size; `type`: what it was rounded to.
bool near(double got, double truth, double size, int64_t terms, int32_t type) {
    if (std::isnan(truth)) return std::isnan(got);
    const double rounding = type == FLOAT32 ? 0x1p-24 : 0x1p-8;
    return std::fabs(got - truth) <= size * ((double)terms + 8) * 0x1p-24 + std::fabs(truth) * rounding * 1.01;
}

struct Sizes {
    int64_t B = between(0, 9) ? between(1, 3) : 0, in[3], size[3], origin[3];
    int64_t Cin = between(1, 40), Cout = 2 * between(1, 40), taps = between(1, 7);
    std::vector<int32_t> offsets;

    Sizes() {
        const bool large = between(0, 39) == 0;  // more than one slab, block or group
        const int64_t most[] = {4, 5, large ? 250 : 12}, reach[] = {2, 3, 4};
        if (large) Cin = between(30, 150), Cout = 2 * between(20, 60), taps = between(1, 2);
        for (int axis = 0; axis < 3; ++axis) {
            in[axis] = between(1, most[axis]);
            const bool whole = between(0, 1);
            size[axis] = whole ? in[axis] : between(1, most[axis]);
            origin[axis] = whole ? 0 : between(-2, 2);
        }
        for (int64_t i = 0; i < 3 * taps; ++i) offsets.push_back((int32_t)between(-reach[i % 3], reach[i % 3]));
        if (between(0, 19) == 0) offsets[(size_t)between(0, 3 * taps - 1)] = (int32_t)between(-2000, 2000);
    }

    int64_t positions() const { return B * size[0] * size[1] * size[2]; }
    std::vector<int64_t> grid(int64_t channels) const { return {B, size[0], size[1], size[2], channels}; }

    // Number of the position of x that a tap reads at position p of the output, or -1 outside the grid.
    int64_t read(int64_t p, int64_t tap) const {
        int64_t at[3], found = p / (size[0] * size[1] * size[2]);
        for (int axis = 2; axis >= 0; p /= size[axis--])
            at[axis] = p % size[axis] + origin[axis] + offsets[(size_t)(tap * 3 + axis)];
        for (int axis = 0; axis < 3; ++axis) {
            if (at[axis] < 0 || at[axis] >= in[axis]) return -1;
            found = found * in[axis] + at[axis];
        }
        return found;
    }

    template <class Call>
    void describe(Call& call) const {
        call.B = B, call.Cin = Cin, call.Cout = Cout, call.taps = taps, call.offsets = offsets.data();
        for (int axis = 0; axis < 3; ++axis)
            call.in[axis] = in[axis], call.size[axis] = size[axis], call.origin[axis] = origin[axis];
    }
};

int32_t some_threads() { return (int32_t)between(1, 5); }

double sigmoid_of(double b) { return 1 / (1 + std::exp(-b)); }

void forward(int64_t number) {
    Sizes s;
    const int32_t activation = (int32_t)between(0, 2);
    if (activation == PLAIN) s.Cout -= between(0, 1);
    const int64_t C = activation == PLAIN ? s.Cout : s.Cout / 2, terms = s.taps * s.Cin;
    Tensor x({s.B, s.in[0], s.in[1], s.in[2], s.Cin}), weight({s.taps, s.Cin, s.Cout}), bias({s.Cout}, true);
    Tensor addend(s.grid(s.Cout), false, true), residual(s.grid(C), false, true), pre(s.grid(s.Cout)), out(s.grid(C));
    x.fill(between(0, 3) ? 0 : 0.01), weight.fill();
    if (between(0, 1)) bias.fill();
    if (between(0, 1)) addend.fill();
    if (between(0, 1)) residual.fill();
    if (between(0, 1)) pre.poison();
    out.poison();
    ConvCall call = {};
    s.describe(call);
    call.x = x.view(), call.out = out.view(), call.pre = pre.view();
    call.addend = addend.view(), call.residual = residual.view();
    call.weight = {weight.memory.get(), {weight.strides[0], weight.strides[1], weight.strides[2]}, weight.type};
    call.bias = bias.memory.get(), call.bias_type = bias.type;
    call.activation = activation, call.threads = some_threads();
    expect(fastvid_gated_causal_conv(&call) == 0, "forward refused", number);
    std::vector<double> sums((size_t)s.Cout), sizes((size_t)s.Cout);
    for (int64_t p = 0; p < s.positions(); ++p) {
        for (int64_t n = 0; n < s.Cout; ++n) {
            double sum = bias[n] + addend[p * s.Cout + n], size = std::fabs(bias[n]) + std::fabs(sum);
            for (int64_t tap = 0; tap < s.taps; ++tap) {
                const int64_t q = s.read(p, tap);
                for (int64_t k = 0; k < s.Cin && q >= 0; ++k) {
                    const double term = x[q * s.Cin + k] * weight[(tap * s.Cin + k) * s.Cout + n];
                    sum += term, size += std::fabs(term);
                }
            }
            sums[(size_t)n] = sum, sizes[(size_t)n] = size;
            if (pre.memory) expect(near(pre[p * s.Cout + n], sum, size, terms, pre.type), "pre", number);
        }
        for (int64_t c = 0; c < C; ++c) {
            const double a = sums[(size_t)c], size_a = sizes[(size_t)c], r = residual[p * C + c];
            double truth = a, size = size_a + std::fabs(r);
            if (activation != PLAIN) {
                const double b = sums[(size_t)(c + C)], size_b = sizes[(size_t)(c + C)];
                truth = (activation == GATE ? std::tanh(a) : a) * sigmoid_of(b);
                size += 1 + size_b * (activation == GATE ? 1 : 1 + std::fabs(a));
            }
            expect(near(out[p * C + c], truth + r, size, terms, out.type), "out", number);
        }
    }
    expect(out.gaps_left_alone() && (!pre.memory || pre.gaps_left_alone()), "gaps", number);
    const std::vector<char> first = out.copy();
    call.threads = some_threads();
    fastvid_gated_causal_conv(&call);
    expect(first == out.copy(), "threads change bits of the convolution", number);
}

void gate(int64_t number) {
    Sizes s;
    const int32_t activation = (int32_t)between(0, 2);
    const int64_t N = s.positions(), Cout = s.Cout, C = activation == PLAIN ? Cout : Cout / 2, which = between(1, 3);
    Tensor pre(s.grid(Cout), false, true), grad_out(s.grid(C), false, true), grad_pre(s.grid(Cout), false, true);
    Tensor grad(s.grid(Cout)), sums({Cout}, true);
    sums.type = FLOAT32;
    if (activation != PLAIN) pre.fill();
    if (which & 1) grad_out.fill();
    if (which & 2) grad_pre.fill();
    if (between(0, 3)) grad.poison();
    if (between(0, 3) || !grad.memory) sums.poison();
    GateCall call = {};
    call.pre = pre.view(), call.grad_out = grad_out.view(), call.grad_pre = grad_pre.view(), call.grad = grad.view();
    call.grad_bias = (float*)sums.memory.get();
    call.B = s.B, call.Cout = Cout, call.activation = activation, call.threads = some_threads();
    for (int axis = 0; axis < 3; ++axis) call.size[axis] = s.size[axis];
    expect(fastvid_gate_backward(&call) == 0, "gate_backward refused", number);
    std::vector<double> totals((size_t)Cout), sizes((size_t)Cout);
    for (int64_t p = 0; p < N; ++p)
        for (int64_t n = 0; n < Cout; ++n) {
            const double g = grad_out[p * C + n % C], a = pre[p * Cout + n % C], b = pre[p * Cout + n % C + Cout - C];
            const double t = std::tanh(a), v = sigmoid_of(b);
            double slope = 1;
            if (activation == GATE) slope = n < C ? v * (1 - t * t) : t * v * (1 - v);
            if (activation == GLU) slope = n < C ? v : a * v * (1 - v);
            const double truth = g * slope + grad_pre[p * Cout + n];
            const double size = std::fabs(g) * (1 + std::fabs(a)) + std::fabs(truth);
            if (grad.memory) expect(near(grad[p * Cout + n], truth, size, 4, grad.type), "grad", number);
            totals[(size_t)n] += truth, sizes[(size_t)n] += size;
        }
    for (int64_t n = 0; n < Cout && sums.memory; ++n)
        expect(near(sums[n], totals[(size_t)n], sizes[(size_t)n], 32, FLOAT32), "grad_bias", number);
    expect(!grad.memory || grad.gaps_left_alone(), "gaps of grad", number);
    const std::vector<char> first = sums.memory ? sums.copy() : std::vector<char>();
    call.threads = some_threads();
    fastvid_gate_backward(&call);
    expect(!sums.memory || first == sums.copy(), "threads change bits of grad_bias", number);
}

void weights(int64_t number) {
    Sizes s;
    s.Cout -= between(0, 1);
    Tensor x({s.B, s.in[0], s.in[1], s.in[2], s.Cin}), grad(s.grid(s.Cout), false, true);
    Tensor found({s.taps, s.Cin, s.Cout}, true);
    x.fill(between(0, 3) ? 0 : 0.001), grad.fill(between(0, 3) ? 0 : 0.001), found.poison();
    WeightGradCall call = {};
    s.describe(call);
    call.x = x.view(), call.grad = grad.view();
    call.grad_weight = found.memory.get(), call.type = found.type, call.threads = some_threads();
    expect(fastvid_weight_gradient(&call) == 0, "weight_gradient refused", number);
    for (int64_t tap = 0; tap < s.taps; ++tap) {
        std::vector<double> sums((size_t)(s.Cin * s.Cout)), sizes(sums);
        for (int64_t p = 0; p < s.positions(); ++p) {
            const int64_t q = s.read(p, tap);
            for (int64_t k = 0; k < s.Cin && q >= 0; ++k)
                for (int64_t n = 0; n < s.Cout; ++n) {
                    const double term = x[q * s.Cin + k] * grad[p * s.Cout + n];
                    sums[(size_t)(k * s.Cout + n)] += term, sizes[(size_t)(k * s.Cout + n)] += std::fabs(term);
                }
        }
        for (int64_t i = 0; i < s.Cin * s.Cout; ++i)
            expect(near(found[tap * s.Cin * s.Cout + i], sums[(size_t)i], sizes[(size_t)i], 128, found.type),
                   "grad_weight", number);
    }
    const std::vector<char> first = found.copy();
    call.threads = some_threads();
    fastvid_weight_gradient(&call);
    expect(first == found.copy(), "threads change bits of grad_weight", number);
}

}  // namespace

int main(int argc, char** argv) {
    const int64_t calls = argc > 1 ? std::atoll(argv[1]) : 3000;
    random_bits.seed(argc > 2 ? (uint64_t)std::atoll(argv[2]) : 1);
    const char* levels[] = {"generic", "v2", "v3", "v4"};
    void (*const kinds[])(int64_t) = {forward, gate, weights};
    for (int64_t call = 0; call < calls; ++call) {
        fastvid_cpu_use_isa(levels[between(0, 3)]);  // a level that this processor lacks leaves the last one
        kinds[call % 3](call);
    }
    std::printf("%lld calls, best level %s, %d failures\n", (long long)calls, fastvid_cpu_best_isa(), failures);
    return failures != 0;
}
