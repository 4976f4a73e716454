// The convolutional GRU on the CPU: weights packed once, and at each frame two convolutions whose sums become the gates
// and the state while they are near. README.md beside this file has the design; compiled once per instruction set level.
#include "conv_gru/cpu.h"

#include "common/pages.h"
#include "conv_gru/cpu_scan.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

template <class T>
struct Scan {
    GruCall call;
    const Map& map;
    Turns& turns;
    int64_t width;  // C with padding
    float *h, *rh, *u;  // [N][width]: the state, r . h, the update gate
    int64_t t;

    Scan(const GruCall& call, const Map& map, Turns& turns)
        : call(call), map(map), turns(turns), width(padded(call.C)) {}

    void cut(Cutter& cutter) {
        h = cutter.cut<float>(map.N * width);
        rh = cutter.cut<float>(map.N * width);
        u = cutter.cut<float>(map.N * width);
    }

    // Position n at the present frame of a tensor [B, frames, H, W].
    int64_t at(int64_t n, int64_t frames) const {
        const int64_t HW = map.H * map.W;
        return n + HW * (map.sample[n] * (frames - 1) + (frames > 1 ? t : 0));
    }

    const T* gates(int64_t n) const { return (const T*)call.gates + at(n, call.gate_frames) * 3 * call.C; }
    T* kept(int64_t n) const { return (T*)call.kept + at(n, call.T) * 3 * call.C; }
    T* states(int64_t n) const { return (T*)call.states + at(n, call.T) * call.C; }

    // Lanes of padding are nought from here on.
    void start() const {
        __builtin_memset(h, 0, (size_t)(map.N * width) * sizeof(float));
        __builtin_memset(rh, 0, (size_t)(map.N * width) * sizeof(float));
        for (int64_t n = 0; n < map.N && call.hidden; ++n)
            for (int64_t c = 0; c < call.C; c += LANES)
                store(h + n * width + c, read((const T*)call.hidden + n * call.C + c, call.C - c));
    }
};

// Sums of a channel's r and u -> both gates, and r . h.
template <class T>
struct Gates {
    const Scan<T>& scan;

    void operator()(int64_t panel, int64_t n, Floats of_r, Floats of_u) const {
        const int64_t c = panel * LANES, C = scan.call.C, left = C - c, place = n * scan.width + c;
        const T* gates = scan.gates(n) + c;
        const Floats r = sigmoid(of_r + read(gates, left)), u = sigmoid(of_u + read(gates + C, left));
        store(scan.rh + place, r * load<Floats>(scan.h + place));
        store(scan.u + place, u);
        if (!scan.call.kept) return;
        T* kept = scan.kept(n) + c;
        write(kept, r, left);
        write(kept + C, u, left);
    }
};

// Sums of the candidate's channels -> the candidate and the next state.
template <class T>
struct Update {
    const Scan<T>& scan;

    void vector(int64_t c, int64_t n, Floats sum) const {
        const int64_t C = scan.call.C, left = C - c, place = n * scan.width + c;
        if (left <= 0) return;
        const Floats pre = sum + read(scan.gates(n) + 2 * C + c, left), none = repeat(0.0f);
        const Floats candidate = scan.call.tanh ? tanh(pre) : pre < 0 ? none : pre;  // NaN stays
        const Floats u = load<Floats>(scan.u + place), h = load<Floats>(scan.h + place);
        const Floats next = u * h + (1.0f - u) * candidate;
        store(scan.h + place, rounded<T>(next));
        write(scan.states(n) + c, next, left);
        if (scan.call.kept) write(scan.kept(n) + 2 * C + c, candidate, left);
    }

    void operator()(int64_t panel, int64_t n, Floats left, Floats right) const {
        vector(panel * PANEL, n, left);
        vector(panel * PANEL + LANES, n, right);
    }
};

template <class T>
void lead(Crew& crew, void* context) {
    Scan<T>& scan = *(Scan<T>*)context;
    Turns& turns = scan.turns;
    turns.pack(crew);
    turns.products[0].in = scan.h;
    turns.products[1].in = scan.rh;
    for (scan.t = 0; scan.t < scan.call.T; ++scan.t) {
        const bool nothing = scan.t == 0 && !scan.call.hidden;
        turns.products[0].nothing = turns.products[1].nothing = nothing;
        convolve(crew, turns.products[0], turns.desks, Gates<T>{scan});
        convolve(crew, turns.products[1], turns.desks, Update<T>{scan});
    }
}

template <class T>
Outcome scan_with(const GruCall& call, Map& map, Turns& turns) {
    Scan<T> scan(call, map, turns);
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

Outcome conv_gru(const GruCall& call) {
    Map map(call.B, call.H, call.W, call.k);
    if (map.N == 0) return DONE;
    const int64_t taps = call.k * call.k, C = call.C, padding = padded(C) - C;
    const Weights gates = {call.weight_gates, taps, C * taps, taps, false, C, true, C, padding, 1};
    const Weights candidate = {call.weight_candidate, taps, C * taps, taps, false, C, false, C, padding, 1};
    Turns turns(map, gates, candidate, call.type, call.threads);
    return call.type == FLOAT32 ? scan_with<float>(call, map, turns) : scan_with<BFloat16>(call, map, turns);
}

}  // namespace fastvid::FASTVID_LEVEL
