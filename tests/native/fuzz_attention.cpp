// Random calls of attention inside boxes, its gradients, and with its projections, on heap buffers of exactly the
// promised size, checked against plain loops in double, and for the same bits with other threads. Built with
// sanitizers: see kernels/README.md. Usage: fuzz_attention [calls] [seed]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "axial_attention/cpu.h"
#include "common/numbers.h"

extern "C" {
const char* fastvid_cpu_best_isa(void);
int fastvid_cpu_use_isa(const char* name);
int fastvid_axial_attention(const fastvid::AttentionCall*);
int fastvid_axial_attention_backward(const fastvid::AttentionGradCall*);
int fastvid_axial_self_attention(const fastvid::SelfAttentionCall*);
}

namespace {

using namespace fastvid;
using namespace fastvid::FASTVID_LEVEL;

constexpr double UNIT = 0x1p-24;  // rounding of float32
std::mt19937_64 random_bits;
int64_t between(int64_t least, int64_t most) { return least + (int64_t)(random_bits() % (uint64_t)(most - least + 1)); }
double normal() { return std::normal_distribution<double>()(random_bits); }
int32_t some_threads() { return (int32_t)between(1, 5); }
int failures = 0;

void expect(bool held, const char* what, int64_t call) {
    if (held) return;
    if (++failures < 20) std::fprintf(stderr, "call %lld: %s\n", (long long)call, what);
}

// A tensor in memory that ends where it says, in any order and with gaps, which stay as they are.
struct Tensor {
    std::vector<int64_t> shape, strides;
    int32_t type;
    int64_t extent = 1;  // elements from the first to the last
    std::unique_ptr<char[]> memory;

    Tensor(std::vector<int64_t> sizes, int32_t kind, bool dense = false, bool may_repeat = false)
        : shape(sizes), strides(sizes), type(kind) {
        std::vector<size_t> order;  // innermost axis first
        for (size_t axis = shape.size(); axis-- > 0;) order.push_back(axis);
        if (!dense && !between(0, 2)) std::swap(order[0], order[(size_t)between(0, (int64_t)order.size() - 1)]);
        int64_t step = dense || between(0, 4) ? 1 : between(2, 3);
        for (size_t axis : order) {
            strides[axis] = step;
            step = step * shape[axis] + (dense || between(0, 3) ? 0 : between(1, 5));
            if (may_repeat && !between(0, 7)) strides[axis] = 0;
        }
        for (size_t axis = 0; axis < shape.size(); ++axis) extent += (shape[axis] - 1) * strides[axis];
        if (!count()) extent = 0;
    }
    int64_t item() const { return type == FLOAT32 ? 4 : 2; }
    int64_t bytes() const { return extent * item(); }
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
    Tensor& fill(double size = 1) {
        poison();
        for (int64_t i = 0; i < count(); ++i) set(i, size * normal());
        return *this;
    }
    void set(int64_t i, double value) {
        void* at = memory.get() + place(i) * item();
        if (type == FLOAT32) narrow((float)value, *(float*)at);
        if (type == BFLOAT16) narrow((float)value, *(BFloat16*)at);
        if (type == FLOAT16) narrow((float)value, *(Float16*)at);
    }
    double operator[](int64_t i) const {
        if (!memory) return 0;
        const void* at = memory.get() + place(i) * item();
        return type == FLOAT32 ? *(float*)at : type == BFLOAT16 ? widen(*(BFloat16*)at) : widen(*(Float16*)at);
    }
    const float* floats() const { return (const float*)memory.get(); }
    std::vector<char> copy() const { return {memory.get(), memory.get() + (memory ? bytes() : 0)}; }
    // What lies between the elements, after a call that wrote them.
    bool gaps_left_alone() const {
        if (!memory) return true;
        std::vector<bool> written((size_t)extent);
        for (int64_t i = 0; i < count(); ++i) written[(size_t)place(i)] = true;
        for (int64_t at = 0; at < bytes(); ++at)
            if (!written[(size_t)(at / item())] && (unsigned char)memory[(size_t)at] != 0xff) return false;
        return true;
    }
    template <class View>
    View view() const {
        View made = {};
        made.data = memory.get();
        made.type = type;
        for (size_t axis = 0; axis < shape.size(); ++axis) made.strides[axis] = strides[axis];
        return made;
    }
};

// A number with a bound of how far float32 may be from it.
struct Value {
    double v = 0, error = 0;
    void add(double a, double b, double wrong = 0) {  // one of many products
        v += a * b, error += std::fabs(a * b) * UNIT + wrong;
    }
};

bool near(double got, Value truth, double slack, int32_t type) {
    const double rounding = type == FLOAT32 ? UNIT : type == BFLOAT16 ? 0x1p-8 : 0x1p-11;
    const double tiny = type == FLOAT16 ? 0x1p-24 : 1e-30;
    return std::fabs(got - truth.v) <= truth.error * slack + std::fabs(truth.v) * rounding * 1.01 + tiny;
}

struct Sizes {
    int64_t B = between(0, 11) ? between(1, 2) : 0, cells[3], box[3], key_box[3];
    int64_t A = between(1, 4), E = between(1, 36), D = between(0, 1) ? E : between(1, 36), n = 1, m = 1;
    int32_t mask = (int32_t)between(0, 2), type = between(0, 1) ? FLOAT32 : (int32_t)between(1, 2);
    float scale = (float)(between(0, 3) ? 1 / std::sqrt((double)E) : 0.3 * normal());
    explicit Sizes(bool self = false) {
        const int64_t kind = between(0, 19), line = between(0, 2);
        for (int axis = 0; axis < 3; ++axis) {
            cells[axis] = between(1, 3), box[axis] = key_box[axis] = between(1, 3);
            if (kind > 2) box[axis] = key_box[axis] = axis == line ? between(1, 40) : 1;  // lines
            if (kind < 2) cells[axis] = 1, box[axis] = key_box[axis] = axis == line ? between(60, 200) : 1;
        }
        if (!self && between(0, 2) == 0)
            for (int axis = 0; axis < 3; ++axis) key_box[axis] = between(0, 1) ? between(1, 5) : box[axis];
        if (!self && between(0, 19) == 0) {  // few queries, many keys
            for (int axis = 0; axis < 3; ++axis) box[axis] = cells[axis] = key_box[axis] = 1;
            key_box[line] = between(200, 800);
        }
        if (!self && between(0, 39) == 0) key_box[line] = 0;
        if (between(0, 5) == 0) E = D = between(0, 1) ? 32 : 64;
        for (int axis = 0; axis < 3; ++axis) n *= box[axis], m *= key_box[axis];
        const auto large = [&] { return B * boxes() * A * n * m * (E + D) > 1500000; };  // plain loops take their time
        while (A > 1 && large()) --A;
        while (cells[line] > 1 && large()) --cells[line];
    }
    int64_t boxes() const { return cells[0] * cells[1] * cells[2]; }
    std::vector<int64_t> grid(const int64_t (&extent)[3]) const {
        return {B, cells[0] * extent[0], cells[1] * extent[1], cells[2] * extent[2]};
    }
    std::vector<int64_t> heads(const int64_t (&extent)[3], int64_t width) const {
        std::vector<int64_t> shape = grid(extent);
        shape.push_back(A), shape.push_back(width);
        return shape;
    }
    // Number of position i of a box among all positions of the grid.
    int64_t position(const int64_t (&extent)[3], int64_t box_number, int64_t i) const {
        const int64_t cell[] = {box_number / cells[2] / cells[1] % cells[0], box_number / cells[2] % cells[1],
                                box_number % cells[2]};
        const int64_t at[] = {i / (extent[1] * extent[2]), i / extent[2] % extent[1], i % extent[2]};
        int64_t number = box_number / boxes();
        for (int axis = 0; axis < 3; ++axis)
            number = number * cells[axis] * extent[axis] + cell[axis] * extent[axis] + at[axis];
        return number;
    }
    bool sees(int64_t i, int64_t j) const {
        return mask == EVERYTHING || (mask == CAUSAL ? j <= i + m - n : j < i + m - n);
    }
    template <class Call>
    void describe(Call& call) const {
        call.B = B, call.A = A, call.E = E, call.D = D, call.scale = scale, call.mask = mask;
        call.threads = some_threads();
        for (int axis = 0; axis < 3; ++axis) call.cells[axis] = cells[axis], call.box[axis] = box[axis];
    }
};

using Numbers = std::function<Value(int64_t, int64_t)>;  // of a row and a column

// Weights exp(s - lse) of one query, by the scores of the keys that it sees; lse itself where none is given.
struct Row {
    std::vector<Value> weights;
    Value lse;
    Row(const Sizes& s, int64_t i, const Numbers& q, const Numbers& k, const Numbers& bias, const double* given)
        : weights((size_t)s.m) {
        double top = -INFINITY, sum = 0, worst = 0;
        std::vector<Value> scores((size_t)s.m);
        for (int64_t j = 0; j < s.m; ++j) {
            if (!s.sees(i, j)) continue;
            Value score;
            for (int64_t e = 0; e < s.E; ++e) {
                const Value a = q(i, e), b = k(j, e);
                score.add(a.v, b.v, std::fabs(a.v) * b.error + std::fabs(b.v) * a.error);
            }
            const double added = bias(i, j).v;
            score.v = s.scale * score.v + added;
            score.error = std::fabs(s.scale) * score.error * 4 + (std::fabs(score.v) + std::fabs(added)) * 4 * UNIT;
            if (added == -INFINITY) score = {added, 0};
            scores[(size_t)j] = score, top = std::fmax(top, score.v), worst = std::fmax(worst, score.error);
        }
        for (int64_t j = 0; j < s.m && top > -INFINITY; ++j)
            if (s.sees(i, j)) sum += std::exp(scores[(size_t)j].v - top);
        lse = {given ? *given : sum > 0 ? top + std::log(sum) : -INFINITY, 0};
        if (lse.v == -INFINITY) return;
        lse.error = worst + ((double)s.m + 8) * UNIT + std::fabs(lse.v) * UNIT;
        for (int64_t j = 0; j < s.m; ++j) {
            const double weight = s.sees(i, j) ? std::exp(scores[(size_t)j].v - lse.v) : 0;
            weights[(size_t)j] = {weight, weight * (scores[(size_t)j].error + lse.error) + (weight > 0) * 1e-37};
        }
    }
};

Value output(const Sizes& s, const Row& row, const Numbers& v, int64_t d) {
    Value out;
    for (int64_t j = 0; j < s.m; ++j) {
        const Value weight = row.weights[(size_t)j], value = v(j, d);
        if (weight.v > 0) out.add(weight.v, value.v, 2 * weight.error * std::fabs(value.v) + weight.v * value.error);
    }
    return out;
}

// q, k and v, in one tensor [B, T, H, W, 3, A, E] or in three.
struct Inputs {
    const Sizes& s;
    std::vector<Tensor> tensors;
    explicit Inputs(const Sizes& sizes) : s(sizes) {
        bool alike = s.E == s.D && between(0, 1);
        for (int axis = 0; axis < 3; ++axis) alike = alike && s.box[axis] == s.key_box[axis];
        if (alike) {
            std::vector<int64_t> shape = s.heads(s.box, s.E);
            shape.insert(shape.end() - 2, 3);
            tensors.emplace_back(shape, s.type);
        } else {
            tensors.emplace_back(s.heads(s.box, s.E), s.type, false, true);
            tensors.emplace_back(s.heads(s.key_box, s.E), s.type, false, true);
            tensors.emplace_back(s.heads(s.key_box, s.D), s.type, false, true);
        }
        for (Tensor& tensor : tensors) tensor.fill(between(0, 5) ? 1 : 4);
    }
    Heads view(int64_t which) const {
        if (tensors.size() == 3) return tensors[(size_t)which].view<Heads>();
        const Tensor& all = tensors[0];
        Heads made = {all.memory.get() + which * all.strides[4] * all.item(), {}, all.type};
        for (size_t axis = 0; axis < 6; ++axis) made.strides[axis] = all.strides[axis + (axis > 3)];
        return made;
    }
    Numbers numbers(int64_t which, int64_t box, int64_t a) const {
        return [this, which, box, a](int64_t i, int64_t e) {
            const int64_t at = s.position(which ? s.key_box : s.box, box, i), width = which == 2 ? s.D : s.E;
            if (tensors.size() == 3) return Value{tensors[(size_t)which][(at * s.A + a) * width + e], 0};
            return Value{tensors[0][((at * 3 + which) * s.A + a) * width + e], 0};
        };
    }
};

Tensor some_bias(const Sizes& s) {
    Tensor bias({s.A, s.n, s.m}, between(0, 1) ? FLOAT32 : s.type, false, true);
    if (between(0, 1)) return bias;
    bias.fill();
    for (int64_t i = 0; i < bias.count() && between(0, 1); ++i)
        if (!between(0, 9)) bias.set(i, -INFINITY);
    return bias;
}

Numbers of_bias(const Tensor& bias, const Sizes& s, int64_t a) {
    return [&bias, &s, a](int64_t i, int64_t j) { return Value{bias[(a * s.n + i) * s.m + j], 0}; };
}

void forward(int64_t number) {
    const Sizes s;
    const Inputs inputs(s);
    const Tensor bias = some_bias(s);
    Tensor out(s.heads(s.box, s.D), s.type), lse(s.heads(s.box, 1), FLOAT32, true);
    out.poison();
    if (between(0, 2)) lse.poison();
    AttentionCall call = {};
    s.describe(call);
    call.q = inputs.view(0), call.k = inputs.view(1), call.v = inputs.view(2), call.out = out.view<Heads>();
    call.bias = bias.view<Scores>(), call.lse = (float*)lse.memory.get();
    for (int axis = 0; axis < 3; ++axis) call.key_box[axis] = s.key_box[axis];
    expect(fastvid_axial_attention(&call) == 0, "forward refused", number);
    for (int64_t box = 0; box < s.B * s.boxes(); ++box)
        for (int64_t a = 0; a < s.A; ++a) {
            const Numbers q = inputs.numbers(0, box, a), k = inputs.numbers(1, box, a), v = inputs.numbers(2, box, a);
            for (int64_t i = 0; i < s.n; ++i) {
                const Row row(s, i, q, k, of_bias(bias, s, a), nullptr);
                const int64_t at = s.position(s.box, box, i) * s.A + a;
                for (int64_t d = 0; d < s.D; ++d)
                    expect(near(out[at * s.D + d], output(s, row, v, d), 8, s.type), "out", number);
                if (!lse.memory) continue;
                const bool empty = row.lse.v == -INFINITY;
                expect(empty ? lse[at] == -INFINITY : near(lse[at], row.lse, 4, FLOAT32), "lse", number);
            }
        }
    expect(out.gaps_left_alone(), "gaps of out", number);
    const auto first = out.copy(), statistics = lse.copy();
    call.threads = some_threads();
    fastvid_axial_attention(&call);
    expect(first == out.copy() && statistics == lse.copy(), "threads change bits of the forward", number);
}

// Sums of a gradient, [positions, A, width].
struct Sums {
    std::vector<Value> values;
    explicit Sums(int64_t count) : values((size_t)count) {}
    Value& operator[](int64_t i) { return values[(size_t)i]; }
    void judge(const Tensor& found, const char* what, int64_t number) {
        for (int64_t i = 0; i < found.count() && found.memory; ++i)
            expect(near(found[i], values[(size_t)i], 8, found.type), what, number);
        expect(found.gaps_left_alone(), what, number);
    }
};

struct Gradients {
    Tensor q, k, v, bias;
    Sums sums_q, sums_k, sums_v, sums_bias;
    explicit Gradients(const Sizes& s, bool biased)
        : q(s.heads(s.box, s.E), s.type), k(s.heads(s.key_box, s.E), s.type), v(s.heads(s.key_box, s.D), s.type),
          bias({s.A, s.n, s.m}, FLOAT32, true), sums_q(q.count()), sums_k(k.count()), sums_v(v.count()),
          sums_bias(bias.count()) {
        const int64_t wanted = between(1, 15);
        if (wanted & 1) q.poison();
        if (wanted & 2) k.poison();
        if (wanted & 4 || (wanted == 8 && !biased)) v.poison();
        if (wanted & 8 && biased) bias.poison();
    }
    void judge(int64_t number) {
        sums_q.judge(q, "grad_q", number), sums_k.judge(k, "grad_k", number);
        sums_v.judge(v, "grad_v", number), sums_bias.judge(bias, "grad_bias", number);
    }
    std::vector<std::vector<char>> copy() const { return {q.copy(), k.copy(), v.copy(), bias.copy()}; }
};

// What one query adds to the sums, given its weights and the gradients of its output and statistics.
void add_query(const Sizes& s, const Row& row, int64_t box, int64_t a, int64_t i, const Numbers& q, const Numbers& k,
               const Numbers& v, const Numbers& given, const Numbers& out, double grad_lse, Gradients& to) {
    Value delta;
    for (int64_t d = 0; d < s.D; ++d) delta.add(given(i, d).v, out(i, d).v);
    const int64_t query = s.position(s.box, box, i) * s.A + a;
    for (int64_t j = 0; j < s.m; ++j) {
        const Value weight = row.weights[(size_t)j];
        if (weight.v == 0) continue;
        const int64_t key = s.position(s.key_box, box, j) * s.A + a;
        Value product;
        for (int64_t d = 0; d < s.D; ++d) {
            product.add(given(i, d).v, v(j, d).v);
            to.sums_v[key * s.D + d].add(weight.v, given(i, d).v, weight.error * std::fabs(given(i, d).v));
        }
        const double rest = product.v - delta.v + grad_lse, size = std::fabs(product.v) + std::fabs(delta.v);
        const double error = weight.error * std::fabs(rest) +
                             weight.v * (product.error + delta.error + (size + std::fabs(grad_lse)) * UNIT * 4);
        const double slope = weight.v * rest;
        to.sums_bias[(a * s.n + i) * s.m + j].add(slope, 1, error);
        for (int64_t e = 0; e < s.E; ++e) {
            const double to_q = s.scale * k(j, e).v, to_k = s.scale * q(i, e).v;
            to.sums_q[query * s.E + e].add(slope, to_q, error * std::fabs(to_q));
            to.sums_k[key * s.E + e].add(slope, to_k, error * std::fabs(to_k));
        }
    }
}

void backward(int64_t number) {
    const Sizes s;
    const Inputs inputs(s);
    const Tensor bias = some_bias(s);
    const int64_t come = between(1, 3);
    Tensor out(s.heads(s.box, s.D), s.type), given(s.heads(s.box, s.D), s.type, false, true);
    Tensor lse(s.heads(s.box, 1), FLOAT32, true), grad_lse(s.heads(s.box, 1), FLOAT32, true);
    out.poison(), lse.poison();
    if (come & 1) given.fill();
    if (come & 2) grad_lse.fill();
    Gradients to(s, bias.memory != nullptr);
    for (int64_t box = 0; box < s.B * s.boxes(); ++box)
        for (int64_t a = 0; a < s.A; ++a) {
            const Numbers q = inputs.numbers(0, box, a), k = inputs.numbers(1, box, a), v = inputs.numbers(2, box, a);
            const auto of = [&](const Tensor& tensor) -> Numbers {
                return [&, box, a](int64_t i, int64_t d) {
                    return Value{tensor[(s.position(s.box, box, i) * s.A + a) * s.D + d], 0};
                };
            };
            for (int64_t i = 0; i < s.n; ++i) {
                const int64_t at = s.position(s.box, box, i) * s.A + a;
                const Row fresh(s, i, q, k, of_bias(bias, s, a), nullptr);
                for (int64_t d = 0; d < s.D; ++d) out.set(at * s.D + d, output(s, fresh, v, d).v);
                lse.set(at, fresh.lse.v);
                const double known = lse[at];
                const Row row(s, i, q, k, of_bias(bias, s, a), &known);
                add_query(s, row, box, a, i, q, k, v, of(given), of(out), grad_lse[at], to);
            }
        }
    AttentionGradCall call = {};
    s.describe(call);
    call.q = inputs.view(0), call.k = inputs.view(1), call.v = inputs.view(2), call.out = out.view<Heads>();
    call.grad_out = given.view<Heads>(), call.grad_q = to.q.view<Heads>(), call.grad_k = to.k.view<Heads>();
    call.grad_v = to.v.view<Heads>(), call.bias = bias.view<Scores>();
    call.lse = lse.floats(), call.grad_lse = grad_lse.floats(), call.grad_bias = (float*)to.bias.memory.get();
    for (int axis = 0; axis < 3; ++axis) call.key_box[axis] = s.key_box[axis];
    expect(fastvid_axial_attention_backward(&call) == 0, "backward refused", number);
    to.judge(number);
    const auto first = to.copy();
    call.threads = some_threads();
    fastvid_axial_attention_backward(&call);
    expect(first == to.copy(), "threads change bits of the gradients", number);
}

// Row `row` of a matrix times a vector.
Value product(const Tensor& matrix, int64_t row, int64_t width, const std::vector<Value>& vector, int64_t from) {
    Value sum;
    for (int64_t c = 0; c < width; ++c) {
        const Value x = vector[(size_t)(from + c)];
        sum.add(matrix[row * width + c], x.v, std::fabs(matrix[row * width + c]) * x.error);
    }
    sum.error *= 4;
    return sum;
}

void projected(int64_t number) {
    Sizes s(true);
    s.type = (int32_t)between(0, 1);
    const int64_t C = between(1, between(0, 3) ? 40 : 300), Cout = between(1, 40);
    const int64_t inner = s.A * s.E, values = s.A * s.D;
    std::vector<int64_t> shape = s.grid(s.box);
    shape.push_back(C);
    Tensor x(shape, s.type, false, true), bias({Cout}, FLOAT32, true);
    shape[4] = Cout;
    Tensor out(shape, (int32_t)between(0, 1));
    Tensor to_q({inner, C}, s.type), to_k({inner, C}, s.type), to_v({values, C}, s.type);
    Tensor to_out({Cout, values}, s.type);
    x.fill(), to_q.fill(1 / std::sqrt(C)), to_k.fill(1 / std::sqrt(C)), to_v.fill(1 / std::sqrt(C));
    to_out.fill(1 / std::sqrt(values));
    if (between(0, 1)) bias.fill();
    const bool add = between(0, 1);
    add ? out.fill() : out.poison();
    const std::vector<char> before = out.copy();
    SelfAttentionCall call = {};
    s.describe(call);
    call.x = x.view<Positions>(), call.out = out.view<Positions>();
    call.to_q = to_q.view<Matrix>(), call.to_k = to_k.view<Matrix>(), call.to_v = to_v.view<Matrix>();
    call.to_out = to_out.view<Matrix>();
    call.bias = bias.floats(), call.C = C, call.Cout = Cout, call.add = add;
    const int64_t N = s.B * s.boxes() * s.n;
    std::vector<Value> input((size_t)(N * C)), inside((size_t)(N * values));
    for (int64_t i = 0; i < N * C; ++i) input[(size_t)i].v = x[i];
    std::vector<Value> held((size_t)(N * Cout));
    for (int64_t i = 0; i < N * Cout; ++i) held[(size_t)i].v = (add ? out[i] : 0) + bias[i % Cout];
    expect(fastvid_axial_self_attention(&call) == 0, "self attention refused", number);
    for (int64_t box = 0; box < s.B * s.boxes(); ++box)
        for (int64_t a = 0; a < s.A; ++a) {
            std::vector<Value> rows[3];
            for (int64_t i = 0; i < s.n; ++i) {
                const int64_t from = s.position(s.box, box, i) * C;
                for (int64_t e = 0; e < s.E; ++e) rows[0].push_back(product(to_q, a * s.E + e, C, input, from));
                for (int64_t e = 0; e < s.E; ++e) rows[1].push_back(product(to_k, a * s.E + e, C, input, from));
                for (int64_t d = 0; d < s.D; ++d) rows[2].push_back(product(to_v, a * s.D + d, C, input, from));
            }
            const auto of = [&](int which, int64_t width) -> Numbers {
                return [&, which, width](int64_t i, int64_t e) { return rows[which][(size_t)(i * width + e)]; };
            };
            const Numbers none = [](int64_t, int64_t) { return Value{}; };
            for (int64_t i = 0; i < s.n; ++i) {
                const Row row(s, i, of(0, s.E), of(1, s.E), none, nullptr);
                const int64_t at = s.position(s.box, box, i) * values + a * s.D;
                for (int64_t d = 0; d < s.D; ++d) inside[(size_t)(at + d)] = output(s, row, of(2, s.D), d);
            }
        }
    for (int64_t i = 0; i < N * Cout; ++i) {
        Value truth = product(to_out, i % Cout, values, inside, i / Cout * values);
        truth.error += (std::fabs(truth.v) + std::fabs(held[(size_t)i].v)) * 2 * UNIT;
        truth.v += held[(size_t)i].v;
        expect(near(out[i], truth, 8, out.type), "self attention", number);
    }
    expect(out.gaps_left_alone(), "gaps of self attention", number);
    const std::vector<char> first = out.copy();
    if (!before.empty()) std::memcpy(out.memory.get(), before.data(), before.size());
    call.threads = some_threads();
    fastvid_axial_self_attention(&call);
    expect(first == out.copy(), "threads change bits of self attention", number);
}

}  // namespace

int main(int argc, char** argv) {
    const int64_t calls = argc > 1 ? std::atoll(argv[1]) : 3000;
    random_bits.seed(argc > 2 ? (uint64_t)std::atoll(argv[2]) : 1);
    const char* levels[] = {"generic", "v2", "v3", "v4"};
    void (*const kinds[])(int64_t) = {forward, backward, projected};
    for (int64_t call = 0; call < calls; ++call) {
        fastvid_cpu_use_isa(levels[between(0, 3)]);  // a level that this processor lacks leaves the last one
        kinds[call % 3](call);
    }
    std::printf("%lld calls, best level %s, %d failures\n", (long long)calls, fastvid_cpu_best_isa(), failures);
    return failures != 0;
}
