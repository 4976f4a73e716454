// The network at a list of cells. Three passes whose sum is the training forward:
//     past     what earlier frames and the condition decide about a row
//     row      the vertical stream, which never looks at the row's own codes, and what it hands to the horizontal one
//     pixels   the horizontal stream, attention and head: logits
// Each is a chain of products with packed matrices. A crew shares a product by its panels; without one (null) the
// caller does everything. Whoever computes what, every number is the same.
#pragma once

#include "pixelcnn_sampler/cpu_attention.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// work(i) for i = 0 .. pieces - 1, by the crew where there is one.
template <class Work>
void share(Crew* crew, int64_t pieces, const Work& work) {
    if (!crew) {
        for (int64_t i = 0; i < pieces; ++i) work(i);
        return;
    }
    crew->each(pieces, [](void* context, int64_t i) { (*(const Work*)context)(i); }, (void*)&work);
}

// Cuts `panels` into one part per piece of work and runs part(first, last) of each.
template <class Part>
void share_panels(Crew* crew, int64_t panels, const Part& part) {
    const int64_t wanted = crew ? 2 * crew->threads() : 1;  // two each, so that a late helper delays half as much
    const int64_t pieces = panels < wanted ? panels : wanted;
    share(crew, pieces, [&](int64_t i) { part(i * panels / pieces, (i + 1) * panels / pieces); });
}

// Up to MOST_CELLS cells of frame t.
struct Cells {
    int64_t t, count;
    Cell at[MOST_CELLS];
};

struct Rows {
    const float* at[MOST_CELLS];
};

struct Outputs {
    float* at[MOST_CELLS];
};

template <class Place>
Outputs rows_of(const Cells& cells, const Place& place) {
    Outputs rows;
    for (int64_t m = 0; m < cells.count; ++m) rows.at[m] = place(m, cells.at[m]);
    return rows;
}

Outputs rows_of(const Cells& cells, float* first, int64_t stride) {
    return rows_of(cells, [=](int64_t m, const Cell&) { return first + m * stride; });
}

// Sums of the past, in the slot of the cell's row.
Outputs sums_of(const State& state, const Cells& cells, float* sums, int64_t l) {
    return rows_of(cells, [&](int64_t, const Cell& cell) {
        return sums + state.sum_place(state.slot_of(cells.t, cell.y), cell.b, l, cell.x);
    });
}

// Rows of a plane of activations.
Outputs plane_rows(const State& state, const Cells& cells, float* plane, int64_t l) {
    return rows_of(cells, [&](int64_t, const Cell& cell) {
        return plane + state.place(cell.b, l, cells.t * state.job.H + cell.y, cell.x);
    });
}

// What `taps` of the cells see in a plane: pointers [taps, cells]. A tap outside the grid for all of them is null, and
// skipped; for some, zeros. Returns whether any tap is live.
bool gather(const State& state, const Cells& cells, const float* plane, int64_t l, const Tap* taps, int64_t count,
            const float** to) {
    bool any = false;
    for (int64_t s = 0; s < count; ++s) {
        const Tap tap = taps[s];
        const float** row = to + s * cells.count;
        bool live = false;
        for (int64_t m = 0; m < cells.count; ++m) {
            const Cell& cell = cells.at[m];
            const int64_t t = cells.t + tap.dt, y = cell.y + tap.dy;
            const bool inside = t >= 0 && y >= 0 && y < state.job.H;
            row[m] = inside ? plane + state.place(cell.b, l, t * state.job.H + y, cell.x + tap.dx) : nullptr;
            live |= inside;
        }
        for (int64_t m = 0; m < cells.count && live; ++m)
            if (!row[m]) row[m] = state.zeros;
        any |= live;
    }
    return any;
}

// A product of the cells with a tap matrix; `product` lacks only its inputs.
void multiply_taps(const State& state, const Cells& cells, Product product, const float* plane, int64_t l,
                   const Tap* taps, int64_t first, int64_t last) {
    const float* inputs[MOST_TAPS * MOST_CELLS];
    if (!gather(state, cells, plane, l, taps, product.matrix.taps, inputs)) product.matrix.taps = 0;
    product.inputs = inputs;
    multiply(product, first, last);
}

// bias + table rows of the codes that the taps of a cell see; `before` continues an earlier sum.
void look_up(const State& state, int64_t t, const Cell& cell, const float* table, const Tap* taps, int64_t count,
             const float* before, float* to) {
    const SamplerJob& job = state.job;
    const int64_t S = state.model.S, K = state.model.K;
    if (before != to) __builtin_memcpy(to, before, (size_t)S * sizeof(float));
    for (int64_t s = 0; s < count; ++s) {
        const int64_t then = t + taps[s].dt, y = cell.y + taps[s].dy, x = cell.x + taps[s].dx;
        if (then < 0 || y < 0 || y >= job.H || x < 0 || x >= job.W) continue;
        const int64_t* codes = then < t ? job.codes + (cell.b * job.T + then) * job.H * job.W
                                        : state.line + cell.b * job.H * job.W;
        const float* row = table + (s * K + codes[y * job.W + x]) * S;
        for (int64_t c = 0; c < S; c += LANES) store(to + c, load<Floats>(to + c) + load<Floats>(row + c));
    }
}

// Panels [first, last) of what is known of layer l before the rows of the cells are begun.
void past_layer(const State& state, const Cells& cells, int64_t l, int64_t first, int64_t last) {
    const SamplerJob& job = state.job;
    const Model& model = state.model;
    const Layer& layer = model.layers[l];
    Rows conditions;
    for (int64_t m = 0; m < cells.count; ++m) {
        const Cell& cell = cells.at[m];
        conditions.at[m] =
            job.condition + (((cell.b * job.T + cells.t) * job.H + cell.y) * job.W + cell.x) * model.Cc;
    }
    const Outputs v = sums_of(state, cells, state.past_v, l), h = sums_of(state, cells, state.past_h, l);
    Product product = {};
    product.matrix = layer.cond;
    product.M = cells.count;
    product.inputs = conditions.at;
    product.outputs = h.at;
    multiply(product, first, last);
    Matrix nothing = layer.cond;  // stands in for the past of a one-frame model
    nothing.taps = 0;
    product.addends = h.at;
    product.matrix = model.vertical.past ? layer.v_past : nothing;
    product.bias = layer.v_bias;
    product.outputs = v.at;
    multiply_taps(state, cells, product, state.v, l, model.vertical.all, first, last);
    product.matrix = model.horizontal.past ? layer.h_past : nothing;
    product.bias = layer.h_bias;
    product.outputs = h.at;
    multiply_taps(state, cells, product, state.h, l, model.horizontal.all, first, last);
}

void past_input(const State& state, const Cells& cells) {
    const Model& model = state.model;
    for (int64_t m = 0; m < cells.count; ++m) {
        const Cell& cell = cells.at[m];
        const int64_t at = state.input_place(state.slot_of(cells.t, cell.y), cell.b, cell.x);
        look_up(state, cells.t, cell, model.table_v, model.input_v.all, model.input_v.past, model.bias_v,
                state.past_input_v + at);
        look_up(state, cells.t, cell, model.table_h, model.input_h.all, model.input_h.past, model.bias_h,
                state.past_input_h + at);
    }
}

void row_input(const State& state, const Cells& cells) {
    const Model& model = state.model;
    const Outputs v = model.L ? plane_rows(state, cells, state.v, 0) : Outputs{};
    for (int64_t m = 0; m < cells.count && model.L; ++m) {
        const Cell& cell = cells.at[m];
        const int64_t at = state.input_place(state.slot_of(cells.t, cell.y), cell.b, cell.x);
        look_up(state, cells.t, cell, model.table_v + model.input_v.past * model.K * model.S, model.input_v.present(),
                model.input_v.now, state.past_input_v + at, v.at[m]);
    }
}

// Panels [first, last) of layer l of the vertical stream. The sums of the past become pre-gate features.
void row_layer(const State& state, const Cells& cells, int64_t l, int64_t first, int64_t last) {
    const Model& model = state.model;
    const Outputs sums = sums_of(state, cells, state.past_v, l), now = plane_rows(state, cells, state.v, l);
    const Outputs next = l + 1 < model.L ? plane_rows(state, cells, state.v, l + 1) : Outputs{};
    Product product = {};
    product.matrix = model.layers[l].v_now;
    product.M = cells.count;
    product.addends = sums.at;
    product.outputs = sums.at;
    if (l + 1 < model.L) {  // nothing reads what the last layer would hand on
        product.gated = next.at;
        product.gated_residuals = now.at;
    }
    multiply_taps(state, cells, product, state.v, l, model.vertical.present(), first, last);
}

// Panels [first, last) of what layer l's vertical stream hands to the horizontal one.
void row_link(const State& state, const Cells& cells, int64_t l, int64_t first, int64_t last) {
    const Outputs from = sums_of(state, cells, state.past_v, l), to = sums_of(state, cells, state.past_h, l);
    Product product = {};
    product.matrix = state.model.layers[l].link;
    product.M = cells.count;
    product.inputs = from.at;
    product.addends = to.at;
    product.outputs = to.at;
    multiply(product, first, last);
}

template <class T>
void attend_cells(const State& state, Crew* crew, Scratch& scratch, const Cells& cells, int64_t attention) {
    const Model& model = state.model;
    const int64_t H = state.job.H, W = state.job.W, stride = rounded(3 * model.D, PANEL);
    for (int64_t m = 0; m < cells.count; ++m) {
        const Cell& cell = cells.at[m];
        remember<T>(state, attention, cell.b, (cells.t * H + cell.y) * W + cell.x, scratch.qkv + m * stride);
    }
    share(crew, model.A, [&](int64_t head) {
        for (int64_t m = 0; m < cells.count; ++m) {
            const Cell& cell = cells.at[m];
            attend_head<T>(state, attention, cell.b, head, seen_from(state, cells.t, cell),
                           scratch.qkv + m * stride + head * model.E, scratch.scores + head * state.positions,
                           scratch.attended + m * model.D + head * model.E);
        }
    });
}

// Biases of queries, keys and values, and where the cell is.
void place_bias(const State& state, int64_t t, const Cell& cell, const Layer& layer, float* to) {
    const SamplerJob& job = state.job;
    const int64_t columns = 3 * state.model.D;
    const float tf = (float)t / (float)job.T - 0.5f, yf = (float)cell.y / (float)job.H - 0.5f,
                xf = (float)cell.x / (float)job.W - 0.5f;
    const float *pt = layer.qkv_position, *py = pt + columns, *px = py + columns;
    for (int64_t n = 0; n < columns; ++n) to[n] = layer.qkv_bias[n] + (tf * pt[n] + yf * py[n] + xf * px[n]);
    for (int64_t n = columns; n < rounded(columns, PANEL); ++n) to[n] = 0;
}

// Adds what attention says about h to h.
void attend(const State& state, Crew* crew, Scratch& scratch, const Cells& cells, const Layer& layer,
            const Outputs& h) {
    const Model& model = state.model;
    const int64_t stride = rounded(3 * model.D, PANEL);
    const Outputs qkv = rows_of(cells, scratch.qkv, stride), attended = rows_of(cells, scratch.attended, model.D);
    for (int64_t m = 0; m < cells.count; ++m) place_bias(state, cells.t, cells.at[m], layer, qkv.at[m]);
    Product product = {};
    product.M = cells.count;
    product.matrix = layer.qkv;
    product.inputs = h.at;
    product.addends = qkv.at;
    product.outputs = qkv.at;
    share_panels(crew, stride / PANEL, [&](int64_t first, int64_t last) { multiply(product, first, last); });
    if (model.short_cache)
        attend_cells<BFloat16>(state, crew, scratch, cells, layer.attention);
    else
        attend_cells<float>(state, crew, scratch, cells, layer.attention);
    product.addends = nullptr;
    product.matrix = layer.att_out;
    product.inputs = attended.at;
    product.bias = layer.att_bias;
    product.outputs = h.at;
    product.residuals = h.at;
    share_panels(crew, model.S / PANEL, [&](int64_t first, int64_t last) { multiply(product, first, last); });
}

// Logits of the cells from h, their last features, which are lost.
void read_out(const State& state, Crew* crew, Scratch& scratch, const Cells& cells, const Outputs& h) {
    const Model& model = state.model;
    for (int64_t m = 0; m < cells.count; ++m)
        for (int64_t c = 0; c < model.S; c += LANES) store(h.at[m] + c, elu(load<Floats>(h.at[m] + c)));
    const int64_t stride = rounded(model.K, PANEL);
    const Outputs read = rows_of(cells, scratch.read, model.S), logits = rows_of(cells, scratch.logits, stride);
    Product product = {};
    product.M = cells.count;
    product.matrix = model.head1;
    product.bias = model.head1_bias;
    product.inputs = h.at;
    product.outputs = read.at;
    product.elu = true;
    share_panels(crew, model.S / PANEL, [&](int64_t first, int64_t last) { multiply(product, first, last); });
    product.elu = false;
    product.matrix = model.head2;
    product.bias = model.head2_bias;
    product.inputs = read.at;
    product.outputs = logits.at;
    share_panels(crew, stride / PANEL, [&](int64_t first, int64_t last) { multiply(product, first, last); });
}

// The horizontal stream at the cells, from the codes in `line`; logits of cell m at row m of scratch.logits.
void pixels(const State& state, Crew* crew, Scratch& scratch, const Cells& cells) {
    const Model& model = state.model;
    const int64_t L = model.L;
    const Outputs last_h = rows_of(cells, scratch.hidden, model.S), gated = rows_of(cells, scratch.gated, model.S);
    Outputs h = L ? plane_rows(state, cells, state.h, 0) : last_h;
    for (int64_t m = 0; m < cells.count; ++m) {
        const Cell& cell = cells.at[m];
        const int64_t at = state.input_place(state.slot_of(cells.t, cell.y), cell.b, cell.x);
        look_up(state, cells.t, cell, model.table_h + model.input_h.past * model.K * model.S, model.input_h.present(),
                model.input_h.now, state.past_input_h + at, h.at[m]);
    }
    for (int64_t l = 0; l < L; ++l) {
        const Layer& layer = model.layers[l];
        const Outputs sums = sums_of(state, cells, state.past_h, l);
        const Outputs next = l + 1 < L ? plane_rows(state, cells, state.h, l + 1) : last_h;
        Product product = {};
        product.M = cells.count;
        product.matrix = layer.h_now;
        product.addends = sums.at;
        product.gated = gated.at;
        share_panels(crew, 2 * model.C / PANEL, [&](int64_t first, int64_t last) {
            multiply_taps(state, cells, product, state.h, l, model.horizontal.present(), first, last);
        });
        product = {};
        product.M = cells.count;
        product.matrix = layer.out;
        product.bias = layer.out_bias;
        product.inputs = gated.at;
        product.outputs = next.at;
        product.residuals = h.at;
        share_panels(crew, model.S / PANEL, [&](int64_t first, int64_t last) { multiply(product, first, last); });
        if (layer.attention >= 0) attend(state, crew, scratch, cells, layer, next);
        h = next;
    }
    read_out(state, crew, scratch, cells, h);
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
