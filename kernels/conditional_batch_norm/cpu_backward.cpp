// The gradients of the conditional batch normalisation on the CPU, frame by frame: one pass over x and the gradient
// that comes in, and, through the moments, a second one over what the caches still hold.
#include "common/pool.h"
#include "common/scratch.h"
#include "conditional_batch_norm/cpu_rows.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

struct Scratch {
    Affine affine;
    float *plain, *weighted;               // [width]: sums of a strip
    double *plain_total, *weighted_total;  // [width]: of a sample's frame
    double *to_mean, *to_var;              // [width]: of the frame, with the gains
    float *constant, *slope;               // [width]: what the moments add to the gradient at x
    float *tall, *row;                     // [2W, width] and [W, width], of the gradient that comes in

    void cut(Cutter& cutter, int64_t width, int64_t W) {
        affine.cut(cutter, width);
        plain = cutter.cut<float>(width);
        weighted = cutter.cut<float>(width);
        plain_total = cutter.cut<double>(width);
        weighted_total = cutter.cut<double>(width);
        to_mean = cutter.cut<double>(width);
        to_var = cutter.cut<double>(width);
        constant = cutter.cut<float>(width);
        slope = cutter.cut<float>(width);
        tall = cutter.cut<float>(2 * W * width);
        row = cutter.cut<float>(W * width);
    }
};

struct Job {
    FrameNormGradCall call;
    Cut cut;
    int64_t next;  // piece
};

// Row y of the gradient before it was enlarged: [W, n].
template <class T>
void gather_row(const Job& job, const Slice& slice, int64_t b, int64_t y, const Scratch& scratch) {
    const FrameNormGradCall& call = job.call;
    const int64_t n = slice.n, last = 2 * call.H - 1, end = 2 * call.W - 1;
    const Run<const T> above = row_of<const T>(call.grad_out, slice, b, greater(2 * y - 1, 0));
    const Run<const T> upper = row_of<const T>(call.grad_out, slice, b, 2 * y);
    const Run<const T> lower = row_of<const T>(call.grad_out, slice, b, 2 * y + 1);
    const Run<const T> below = row_of<const T>(call.grad_out, slice, b, lesser(2 * y + 2, last));
    for (int64_t x = 0; x <= end; ++x)
        over_channels(n, [&](int64_t c, auto kind) {
            using L = Lane<decltype(kind)>;
            const auto inner = L::take(upper[x] + c) + L::take(lower[x] + c);
            const auto outer = L::take(above[x] + c) + L::take(below[x] + c);
            L::put(scratch.tall + x * n + c, L::fused(L::of(0.75f), inner, L::of(0.25f) * outer));
        });
    for (int64_t x = 0; x < call.W; ++x) {
        const float *first = scratch.tall + 2 * x * n, *second = first + n;
        const float *left = scratch.tall + greater(2 * x - 1, 0) * n;
        const float *right = scratch.tall + lesser(2 * x + 2, end) * n;
        over_channels(n, [&](int64_t c, auto kind) {
            using L = Lane<decltype(kind)>;
            const auto inner = L::take(first + c) + L::take(second + c), outer = L::take(left + c) + L::take(right + c);
            L::put(scratch.row + x * n + c, L::fused(L::of(0.75f), inner, L::of(0.25f) * outer));
        });
    }
}

template <int COUNT, bool RELU, bool WRITTEN, class T, class From>
void differentiate_some(const Run<const T>& x, const Run<const From>& grad, const Run<T>& to, int64_t n,
                        const Scratch& scratch) {
    const Affine& affine = scratch.affine;
    over_channels(n, [&](int64_t c, auto kind) {
        using L = Lane<decltype(kind)>;
        const auto mean = L::take(affine.mean + c), factor = L::take(affine.factor + c), bias = L::take(affine.bias + c);
        auto plain = L::take(scratch.plain + c), weighted = L::take(scratch.weighted + c);
        for (int p = 0; p < COUNT; ++p) {
            const auto centred = L::take(x[p] + c) - mean;
            auto passed = L::take(grad[p] + c);
            if (RELU) passed = L::where_above_zero(L::fused(centred, factor, bias), passed);
            plain += passed;
            weighted = L::fused(passed, centred, weighted);
            if (WRITTEN) L::put(to[p] + c, passed * factor);
        }
        L::put(scratch.plain + c, plain);
        L::put(scratch.weighted + c, weighted);
    });
}

template <bool RELU, bool WRITTEN, class T, class From>
void differentiate(const Run<const T>& x, const Run<const From>& grad, const Run<T>& to, int64_t count, int64_t n,
                   const Scratch& scratch) {
    for (int64_t begin = 0; begin < count; begin += STRIP) {
        const int64_t end = lesser(begin + STRIP, count);
        for (int64_t c = 0; c < n; ++c) scratch.plain[c] = scratch.weighted[c] = 0;
        int64_t p = begin;
        for (; p + 4 <= end; p += 4)
            differentiate_some<4, RELU, WRITTEN>(x.from(p), grad.from(p), to.from(p), n, scratch);
        for (; p < end; ++p)
            differentiate_some<1, RELU, WRITTEN>(x.from(p), grad.from(p), to.from(p), n, scratch);
        for (int64_t c = 0; c < n; ++c) {
            scratch.plain_total[c] += scratch.plain[c];
            scratch.weighted_total[c] += scratch.weighted[c];
        }
    }
}

template <bool RELU, bool WRITTEN, class T>
void first_pass(const Job& job, const Slice& slice, int64_t b, const Scratch& scratch) {
    const FrameNormGradCall& call = job.call;
    for (int64_t y = 0; y < job.cut.rows; ++y) {
        const Run<const T> x = row_of<const T>(call.x, slice, b, y);
        const Run<T> to = WRITTEN ? row_of<T>(call.grad_x, slice, b, y) : Run<T>{nullptr, 0};
        if (call.upsample) {
            gather_row<T>(job, slice, b, y, scratch);
            const Run<const float> gathered{scratch.row, slice.n};
            differentiate<RELU, WRITTEN>(x, gathered, to, job.cut.columns, slice.n, scratch);
        } else {
            const Run<const T> grad = row_of<const T>(call.grad_out, slice, b, y);
            differentiate<RELU, WRITTEN>(x, grad, to, job.cut.columns, slice.n, scratch);
        }
    }
}

// Adds constant + slope * (x - mean): the way through the moments.
template <class T>
void second_pass(const Job& job, const Slice& slice, int64_t b, const Scratch& scratch) {
    const FrameNormGradCall& call = job.call;
    for (int64_t y = 0; y < job.cut.rows; ++y) {
        const Run<const T> x = row_of<const T>(call.x, slice, b, y);
        const Run<T> to = row_of<T>(call.grad_x, slice, b, y);
        for (int64_t p = 0; p < job.cut.columns; ++p)
            over_channels(slice.n, [&](int64_t c, auto kind) {
                using L = Lane<decltype(kind)>;
                const auto centred = L::take(x[p] + c) - L::take(scratch.affine.mean + c);
                const auto so_far = L::take(to[p] + c) + L::take(scratch.constant + c);
                L::put(to[p] + c, L::fused(centred, L::take(scratch.slope + c), so_far));
            });
    }
}

// The sums of a sample's frame leave, and join those of the frame.
void leave_sums(const Job& job, const Slice& slice, int64_t b, const Scratch& scratch) {
    const FrameNormGradCall& call = job.call;
    const int64_t at = (b * call.T + slice.t) * call.C + slice.first, all = call.B * call.T * call.C;
    const float* gain = call.gain + b * call.C + slice.first;
    for (int64_t c = 0; c < slice.n; ++c) {
        call.sums[at + c] = (float)scratch.plain_total[c];
        call.sums[all + at + c] = (float)scratch.weighted_total[c];
        scratch.to_mean[c] += gain[c] * scratch.plain_total[c];
        scratch.to_var[c] += gain[c] * scratch.weighted_total[c];
        scratch.plain_total[c] = scratch.weighted_total[c] = 0;
    }
}

void set_moments_share(const Job& job, const Slice& slice, const Scratch& scratch) {
    const double count = (double)(job.call.B * job.call.H * job.call.W);
    for (int64_t c = 0; c < slice.n; ++c) {
        const double scale = scratch.affine.scale[c];
        scratch.constant[c] = (float)(-scale * scratch.to_mean[c] / count);
        scratch.slope[c] = (float)(-scale * scale * scale * scratch.to_var[c] / count);
    }
}

template <bool RELU, bool WRITTEN, class T>
void serve(const Job& job, const Slice& slice, const Scratch& scratch) {
    const FrameNormGradCall& call = job.call;
    const int64_t at = slice.t * call.C + slice.first;
    scratch.affine.set_frame(call.mean + at, call.var + at, call.eps, slice.n);
    for (int64_t c = 0; c < slice.n; ++c)
        scratch.plain_total[c] = scratch.weighted_total[c] = scratch.to_mean[c] = scratch.to_var[c] = 0;
    for (int64_t b = 0; b < call.B; ++b) {
        const int64_t sample = b * call.C + slice.first;
        scratch.affine.set_sample(call.gain + sample, call.bias + sample, slice.n);
        first_pass<RELU, WRITTEN, T>(job, slice, b, scratch);
        leave_sums(job, slice, b, scratch);
    }
    if (!WRITTEN || !call.own) return;
    set_moments_share(job, slice, scratch);
    for (int64_t b = 0; b < call.B; ++b) second_pass<T>(job, slice, b, scratch);
}

template <class T>
void serve_as_asked(const Job& job, const Slice& slice, const Scratch& scratch) {
    if (job.call.grad_x.data)
        job.call.relu ? serve<true, true, T>(job, slice, scratch) : serve<false, true, T>(job, slice, scratch);
    else
        job.call.relu ? serve<true, false, T>(job, slice, scratch) : serve<false, false, T>(job, slice, scratch);
}

void serve_pieces(void* context) {
    Job& job = *(Job*)context;
    const int64_t W = job.call.upsample ? job.call.W : 0;
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
        job.call.type == FLOAT32 ? serve_as_asked<float>(job, slice, scratch)
                                 : serve_as_asked<BFloat16>(job, slice, scratch);
    }
}

}  // namespace

Outcome conditional_norm_backward(const FrameNormGradCall& call) {
    const int64_t bytes = call.type == FLOAT32 ? 8 : 4, values = call.B * call.T * call.H * call.W * call.C;
    const bool joined = !call.upsample && side_by_side(call.x, call.W) && side_by_side(call.grad_out, call.W) &&
                        side_by_side(call.grad_x, call.W);
    const int threads = useful_threads(call.threads, values * (call.upsample ? 4 : 1), call.T * call.C / 16 + 1);
    Job job{call, Cut(call.B, call.T, call.H, call.W, call.C, bytes, threads, joined), 0};
    run_together(threads, serve_pieces, &job);
    return job.next < job.cut.pieces ? NO_MEMORY : DONE;  // every thread went without
}

}  // namespace fastvid::FASTVID_LEVEL
