// The reverse scan of the convolutional GRU on the CPU: the same two convolutions, their weights transposed. Gradients of
// the weights are one product over all frames, which gated_causal_conv's kernel has.
#include "common/pages.h"
#include "conv_gru/cpu_scan.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

template <class T>
struct ReverseScan {
    GruGradCall call;
    const Map& map;
    Turns& turns;
    int64_t width;       // C with padding
    float* grad;         // [N][width]: at the state of the frame at hand, then at the one before without the gates' share
    float* at_c;         // [N][width]: at the sum of c
    float* at_gates;     // [N][2 width]: at the sums of r and u
    int64_t t;           // the frame at hand

    ReverseScan(const GruGradCall& call, const Map& map, Turns& turns)
        : call(call), map(map), turns(turns), width(padded(call.C)) {}

    void cut(Cutter& cutter) {
        grad = cutter.cut<float>(map.N * width);
        at_c = cutter.cut<float>(map.N * width);
        at_gates = cutter.cut<float>(map.N * 2 * width);
    }

    void start() const {
        __builtin_memset(grad, 0, (size_t)(map.N * width) * sizeof(float));
        __builtin_memset(at_c, 0, (size_t)(map.N * width) * sizeof(float));
        __builtin_memset(at_gates, 0, (size_t)(map.N * width) * 2 * sizeof(float));
    }

    int64_t at(int64_t n, int64_t frame) const {
        return n + map.H * map.W * (map.sample[n] * (call.T - 1) + frame);
    }

    // The state before frame `frame`, LANES channels from c on.
    Floats before(int64_t n, int64_t frame, int64_t c) const {
        if (frame > 0) return read((const T*)call.states + at(n, frame - 1) * call.C + c, call.C - c);
        if (!call.hidden) return repeat(0.0f);
        return read((const T*)call.hidden + n * call.C + c, call.C - c);
    }

    // r, u or c of a frame, or its gradient: [.., which][C].
    Floats one_of(const void* three, int64_t n, int64_t frame, int64_t which, int64_t c) const {
        if (!three) return repeat(0.0f);
        return read((const T*)three + (at(n, frame) * 3 + which) * call.C + c, call.C - c);
    }

    void leave(int64_t n, int64_t frame, int64_t which, int64_t c, Floats value) const {
        write((T*)call.grad_gates + (at(n, frame) * 3 + which) * call.C + c, value, call.C - c);
    }
};

// The gates' share joins the gradient of the state before, and the frame before begins: its gradient at the sum of c.
template <class T>
struct AtCandidate {
    const ReverseScan<T>& scan;

    void vector(int64_t c, int64_t n, Floats sum) const {
        const GruGradCall& call = scan.call;
        const int64_t left = call.C - c, place = n * scan.width + c, frame = scan.t - 1;
        const Floats carried = load<Floats>(scan.grad + place) + sum, none = repeat(0.0f), one = repeat(1.0f);
        if (left <= 0) return;
        if (frame < 0) return write((T*)call.grad_hidden + n * call.C + c, carried, left);
        const T* grad_states = (const T*)call.grad_states;
        const Floats given = grad_states ? read(grad_states + scan.at(n, frame) * call.C + c, left) : none;
        const Floats grad = carried + given, u = scan.one_of(call.kept, n, frame, 1, c);
        const Floats candidate = scan.one_of(call.kept, n, frame, 2, c);
        const Floats slope = call.tanh ? one - candidate * candidate : candidate > 0 ? one : none;
        const Floats at_c = (grad * (one - u) + scan.one_of(call.grad_kept, n, frame, 2, c)) * slope;
        store(scan.grad + place, grad);
        store(scan.at_c + place, at_c);
        scan.leave(n, frame, 2, c, at_c);
    }

    void operator()(int64_t panel, int64_t n, Floats left, Floats right) const {
        vector(panel * PANEL, n, left);
        vector(panel * PANEL + LANES, n, right);
    }
};

// Sums at r . h -> gradients at the sums of r and u, and of the state before but for what these add.
template <class T>
struct AtGates {
    const ReverseScan<T>& scan;

    void vector(int64_t c, int64_t n, Floats product) const {
        const GruGradCall& call = scan.call;
        const int64_t left = call.C - c, place = n * scan.width + c, t = scan.t;
        if (left <= 0) return;
        const Floats h = scan.before(n, t, c), grad = load<Floats>(scan.grad + place), one = repeat(1.0f);
        const Floats r = scan.one_of(call.kept, n, t, 0, c), u = scan.one_of(call.kept, n, t, 1, c);
        const Floats candidate = scan.one_of(call.kept, n, t, 2, c);
        const Floats at_r = (product * h + scan.one_of(call.grad_kept, n, t, 0, c)) * r * (one - r);
        const Floats at_u = (grad * (h - candidate) + scan.one_of(call.grad_kept, n, t, 1, c)) * u * (one - u);
        store(scan.at_gates + 2 * n * scan.width + c, at_r);
        store(scan.at_gates + (2 * n + 1) * scan.width + c, at_u);
        store(scan.grad + place, grad * u + product * r);
        scan.leave(n, t, 0, c, at_r);
        scan.leave(n, t, 1, c, at_u);
    }

    void operator()(int64_t panel, int64_t n, Floats left, Floats right) const {
        vector(panel * PANEL, n, left);
        vector(panel * PANEL + LANES, n, right);
    }
};

template <class T>
void lead(Crew& crew, void* context) {
    ReverseScan<T>& scan = *(ReverseScan<T>*)context;
    Turns& turns = scan.turns;
    turns.pack(crew);
    turns.products[0].in = scan.at_gates;
    turns.products[1].in = scan.at_c;
    turns.products[0].nothing = true;  // there is no frame after the last
    scan.t = scan.call.T;
    for (;;) {
        convolve(crew, turns.products[0], turns.desks, AtCandidate<T>{scan});
        turns.products[0].nothing = false;
        if (--scan.t < 0) return;
        // before the first frame the state is nought, with which this product is multiplied
        turns.products[1].nothing = scan.t == 0 && !scan.call.hidden && !scan.call.grad_hidden;
        convolve(crew, turns.products[1], turns.desks, AtGates<T>{scan});
        if (scan.t == 0 && !scan.call.grad_hidden) return;
    }
}

template <class T>
Outcome scan_with(const GruGradCall& call, Map& map, Turns& turns) {
    ReverseScan<T> scan(call, map, turns);
    Cutter sizes;
    map.cut(sizes);
    turns.cut(sizes);
    scan.cut(sizes);
    Memory memory;
    if (!memory.take(sizes.used)) return NO_MEMORY;
    expect_to_fill(memory.block, sizes.used);
    Cutter cutter{(char*)memory.block};
    map.cut(cutter);
    turns.cut(cutter);
    scan.cut(cutter);
    map.fill();
    scan.start();
    Crew::run(turns.threads, lead<T>, &scan);
    return DONE;
}

}  // namespace

Outcome conv_gru_backward(const GruGradCall& call) {
    Map map(call.B, call.H, call.W, call.k);
    if (map.N == 0) return DONE;
    const int64_t taps = call.k * call.k, C = call.C, padding = padded(C) - C;
    const Weights gates = {call.weight_gates, C * taps, taps, taps, true, C, false, C, padding, 2};
    const Weights candidate = {call.weight_candidate, C * taps, taps, taps, true, C, false, C, padding, 1};
    Turns turns(map, gates, candidate, call.type, call.threads);
    return call.type == FLOAT32 ? scan_with<float>(call, map, turns) : scan_with<BFloat16>(call, map, turns);
}

}  // namespace fastvid::FASTVID_LEVEL
