// The conditional batch normalisation on the CPU: a frame is measured, then normalised while the caches hold it.
// README.md beside this file has the design; compiled once per instruction set level (see common/simd.h).
#include "conditional_batch_norm/cpu.h"

#include "common/pool.h"
#include "common/scratch.h"
#include "conditional_batch_norm/cpu_rows.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// Mean and sum of squared differences from it, of the positions seen so far, by channel.
struct Totals {
    double *mean, *squares;
    float *near, *sum, *square;  // of a strip: where it is measured from, and its sums from there
    double count;

    void cut(Cutter& cutter, int64_t width) {
        mean = cutter.cut<double>(width);
        squares = cutter.cut<double>(width);
        near = cutter.cut<float>(width);
        sum = cutter.cut<float>(width);
        square = cutter.cut<float>(width);
    }

    void clear(int64_t n) {
        count = 0;
        for (int64_t c = 0; c < n; ++c) mean[c] = squares[c] = 0;
    }
};

struct Scratch {
    Totals totals;
    Affine affine;
    float* rows;          // [3][W, width], normalised
    float *upper, *lower;  // [W, width], between two of them

    void cut(Cutter& cutter, int64_t width, int64_t W) {
        totals.cut(cutter, width);
        affine.cut(cutter, width);
        rows = cutter.cut<float>(3 * W * width);
        upper = cutter.cut<float>(W * width);
        lower = cutter.cut<float>(W * width);
    }
};

struct Job {
    FrameNormCall call;
    Cut cut;
    int64_t next;  // piece
};

// The mean of a few positions, to measure others from.
template <class T>
void set_near(const Run<const T>& x, int64_t count, int64_t n, float* near) {
    for (int64_t c = 0; c < n; ++c) near[c] = 0;
    for (int64_t p = 0; p < count; ++p)
        over_channels(n, [&](int64_t c, auto kind) {
            using L = Lane<decltype(kind)>;
            L::put(near + c, L::take(near + c) + L::take(x[p] + c));
        });
    for (int64_t c = 0; c < n; ++c) near[c] /= (float)count;
}

template <int COUNT, class T>
void add_positions(const Run<const T>& x, int64_t n, const Totals& totals) {
    over_channels(n, [&](int64_t c, auto kind) {
        using L = Lane<decltype(kind)>;
        const auto near = L::take(totals.near + c);
        auto sum = L::take(totals.sum + c), square = L::take(totals.square + c);
        for (int p = 0; p < COUNT; ++p) {
            const auto away = L::take(x[p] + c) - near;
            sum += away;
            square = L::fused(away, away, square);
        }
        L::put(totals.sum + c, sum);
        L::put(totals.square + c, square);
    });
}

// A strip is measured from the mean so far: what cancels is then never larger than what it adds to the total.
template <class T>
void add_strip(const Run<const T>& x, int64_t count, int64_t n, Totals& totals) {
    if (totals.count == 0)
        set_near(x, count, n, totals.near);
    else
        for (int64_t c = 0; c < n; ++c) totals.near[c] = (float)totals.mean[c];
    for (int64_t c = 0; c < n; ++c) totals.sum[c] = totals.square[c] = 0;
    int64_t p = 0;
    for (; p + 4 <= count; p += 4) add_positions<4>(x.from(p), n, totals);
    for (; p < count; ++p) add_positions<1>(x.from(p), n, totals);
    const double before = totals.count, after = before + (double)count;
    const double each = 1 / (double)count, share = (double)count / after, cross = before * share;
    for (int64_t c = 0; c < n; ++c) {
        const double offset = totals.sum[c] * each, delta = totals.near[c] + offset - totals.mean[c];
        totals.mean[c] += delta * share;
        totals.squares[c] += totals.square[c] - offset * totals.sum[c] + delta * delta * cross;
    }
    totals.count = after;
}

template <class T>
void measure(const Job& job, const Slice& slice, Totals& totals) {
    const FrameNormCall& call = job.call;
    totals.clear(slice.n);
    for (int64_t b = 0; b < call.B; ++b)
        for (int64_t y = 0; y < job.cut.rows; ++y) {
            const Run<const T> row = row_of<const T>(call.x, slice, b, y);
            for (int64_t x = 0; x < job.cut.columns; x += STRIP)
                add_strip(row.from(x), lesser(STRIP, job.cut.columns - x), slice.n, totals);
        }
    const double count = totals.count > 0 ? totals.count : 1;
    float* mean = call.mean + slice.t * call.C + slice.first;
    float* var = call.var + slice.t * call.C + slice.first;
    for (int64_t c = 0; c < slice.n; ++c) {
        const double square = totals.squares[c] / count;
        mean[c] = (float)totals.mean[c];
        var[c] = (float)(square < 0 ? 0 : square);
    }
}

template <int COUNT, bool RELU, class T, class To>
void normalise_some(const Run<const T>& x, const Run<To>& to, int64_t n, const Affine& affine) {
    over_channels(n, [&](int64_t c, auto kind) {
        using L = Lane<decltype(kind)>;
        const auto mean = L::take(affine.mean + c), factor = L::take(affine.factor + c), bias = L::take(affine.bias + c);
        for (int p = 0; p < COUNT; ++p) {
            const auto value = L::fused(L::take(x[p] + c) - mean, factor, bias);
            L::put(to[p] + c, RELU ? L::not_below_zero(value) : value);
        }
    });
}

template <bool RELU, class T, class To>
void normalise(const Run<const T>& x, const Run<To>& to, int64_t count, int64_t n, const Affine& affine) {
    int64_t p = 0;
    for (; p + 4 <= count; p += 4) normalise_some<4, RELU>(x.from(p), to.from(p), n, affine);
    for (; p < count; ++p) normalise_some<1, RELU>(x.from(p), to.from(p), n, affine);
}

// Between rows: upper = 3/4 of `row` and 1/4 of the one above, lower with the one below.
void mix_rows(const float* above, const float* row, const float* below, int64_t count, float* upper, float* lower) {
    over_channels(count, [&](int64_t i, auto kind) {
        using L = Lane<decltype(kind)>;
        const auto most = L::of(0.75f) * L::take(row + i), quarter = L::of(0.25f);
        L::put(upper + i, L::fused(quarter, L::take(above + i), most));
        L::put(lower + i, L::fused(quarter, L::take(below + i), most));
    });
}

// The same along a row [W, n], which becomes twice as long.
template <class T>
void mix_columns(const float* row, int64_t W, int64_t n, const Run<T>& to) {
    for (int64_t x = 0; x < W; ++x) {
        const float* here = row + x * n;
        const float *left = here - (x > 0) * n, *right = here + (x + 1 < W) * n;
        T *first = to[2 * x], *second = to[2 * x + 1];
        over_channels(n, [&](int64_t c, auto kind) {
            using L = Lane<decltype(kind)>;
            const auto most = L::of(0.75f) * L::take(here + c), quarter = L::of(0.25f);
            L::put(first + c, L::fused(quarter, L::take(left + c), most));
            L::put(second + c, L::fused(quarter, L::take(right + c), most));
        });
    }
}

template <bool RELU, class T>
void write_enlarged(const Job& job, const Slice& slice, int64_t b, const Scratch& scratch) {
    const FrameNormCall& call = job.call;
    const int64_t size = call.W * slice.n;
    auto row = [&](int64_t y) { return scratch.rows + (y % 3) * size; };
    auto fill = [&](int64_t y) {
        normalise<RELU>(row_of<const T>(call.x, slice, b, y), Run<float>{row(y), slice.n}, call.W, slice.n,
                        scratch.affine);
    };
    fill(0);
    for (int64_t y = 0; y < call.H; ++y) {
        if (y + 1 < call.H) fill(y + 1);
        const float *above = row(greater(y - 1, 0)), *below = row(lesser(y + 1, call.H - 1));
        mix_rows(above, row(y), below, size, scratch.upper, scratch.lower);
        mix_columns(scratch.upper, call.W, slice.n, row_of<T>(call.out, slice, b, 2 * y));
        mix_columns(scratch.lower, call.W, slice.n, row_of<T>(call.out, slice, b, 2 * y + 1));
    }
}

template <bool RELU, class T>
void write(const Job& job, const Slice& slice, const Scratch& scratch) {
    const FrameNormCall& call = job.call;
    const int64_t at = slice.t * call.C + slice.first;
    scratch.affine.set_frame(call.mean + at, call.var + at, call.eps, slice.n);
    for (int64_t b = 0; b < call.B; ++b) {
        const int64_t sample = b * call.C + slice.first;
        scratch.affine.set_sample(call.gain + sample, call.bias + sample, slice.n);
        if (call.upsample) {
            write_enlarged<RELU, T>(job, slice, b, scratch);
            continue;
        }
        for (int64_t y = 0; y < job.cut.rows; ++y)
            normalise<RELU>(row_of<const T>(call.x, slice, b, y), row_of<T>(call.out, slice, b, y), job.cut.columns,
                            slice.n, scratch.affine);
    }
}

template <class T>
void serve(const Job& job, const Slice& slice, Scratch& scratch) {
    if (job.call.measure) measure<T>(job, slice, scratch.totals);
    if (!job.call.out.data) return;
    job.call.relu ? write<true, T>(job, slice, scratch) : write<false, T>(job, slice, scratch);
}

void serve_pieces(void* context) {
    Job& job = *(Job*)context;
    const int64_t W = job.call.upsample && job.call.out.data ? job.call.W : 0;
    Scratch scratch;
    Cutter sizes;
    scratch.cut(sizes, job.cut.width, W);
    Memory memory;
    if (!memory.take(sizes.used)) return;  // the others do its share
    Cutter cutter{(char*)memory.block};
    scratch.cut(cutter, job.cut.width, W);
    for (;;) {
        const int64_t piece = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
        if (piece >= job.cut.pieces) return;
        const Slice slice = job.cut.slice(piece, job.call.C);
        job.call.type == FLOAT32 ? serve<float>(job, slice, scratch) : serve<BFloat16>(job, slice, scratch);
    }
}

}  // namespace

Outcome conditional_norm(const FrameNormCall& call) {
    const int64_t bytes = call.type == FLOAT32 ? 4 : 2, values = call.B * call.T * call.H * call.W * call.C;
    const int64_t grown = call.upsample ? 4 : 1;
    const bool joined = !call.upsample && side_by_side(call.x, call.W) && side_by_side(call.out, call.W);
    const int threads = useful_threads(call.threads, values * (call.out.data ? grown : 1), call.T * call.C / 16 + 1);
    Job job{call, Cut(call.B, call.T, call.H, call.W, call.C, bytes, threads, joined), 0};
    run_together(threads, serve_pieces, &job);
    return job.next < job.cut.pieces ? NO_MEMORY : DONE;  // every thread went without
}

}  // namespace fastvid::FASTVID_LEVEL
