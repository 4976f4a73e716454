// The sampler on the CPU: rows of codes one after the other, or the anti-diagonals of a frame. README.md beside this
// file has the design; compiled once per instruction set level (see common/simd.h).
#include "pixelcnn_sampler/cpu.h"

#include <time.h>

#include "common/pages.h"
#include "pixelcnn_sampler/cpu_network.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// Above so many bytes of weights a code, products are shared between threads; below, a product is too short for that,
// and the helpers prepare the next row instead.
constexpr int64_t SHARED_BYTES = 6 << 20;

double seconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Cells `first` .. of row y of samples b0 .. b1, sample by sample, as many as go together.
Cells row_cells(const State& state, int64_t t, int64_t y, int64_t b0, int64_t b1, int64_t first) {
    const int64_t W = state.job.W;
    Cells cells;
    cells.t = t;
    cells.count = least(MOST_CELLS, (b1 - b0) * W - first);
    for (int64_t m = 0; m < cells.count; ++m) cells.at[m] = {b0 + (first + m) / W, y, (first + m) % W};
    return cells;
}

// The past of a row, in pieces that anybody may compute in any order.
struct Past {
    const State& state;
    int64_t t, y, b0, b1, parts;  // each layer in so many parts

    Past(const State& state, int64_t t, int64_t y, int64_t b0, int64_t b1, int64_t threads)
        : state(state), t(t), y(y), b0(b0), b1(b1), parts(threads > 1 ? least(2, state.model.C / 8) : 1) {}

    int64_t chunk_pieces() const { return state.model.L * parts + 1; }
    int64_t pieces() const {
        return ((b1 - b0) * state.job.W + MOST_CELLS - 1) / MOST_CELLS * chunk_pieces();
    }

    void piece(int64_t i) const {
        const Cells cells = row_cells(state, t, y, b0, b1, i / chunk_pieces() * MOST_CELLS);
        const int64_t layer_part = i % chunk_pieces(), l = layer_part / parts, part = layer_part % parts;
        if (l == state.model.L) return past_input(state, cells);
        const int64_t panels = 2 * state.model.C / PANEL;
        past_layer(state, cells, l, part * panels / parts, (part + 1) * panels / parts);
    }

    static void run(void* past, int64_t i) { ((const Past*)past)->piece(i); }
};

void past_of_row(const State& state, Crew* crew, int64_t t, int64_t y, int64_t b0, int64_t b1) {
    const Past past(state, t, y, b0, b1, crew ? crew->threads() : 1);
    share(crew, past.pieces(), [&](int64_t i) { past.piece(i); });
}

// The vertical stream of a row, layer by layer, since a one-frame model's taps reach sideways.
void vertical_row(const State& state, Crew* crew, int64_t t, int64_t y, int64_t b0, int64_t b1) {
    const Model& model = state.model;
    const int64_t total = (b1 - b0) * state.job.W, panels = 2 * model.C / PANEL;
    const int64_t chunks = (total + MOST_CELLS - 1) / MOST_CELLS;
    const int64_t parts = crew ? least(panels, 2 * crew->threads()) : 1;
    auto shared = [&](int64_t layers, auto work) {
        share(crew, layers * chunks * parts, [&](int64_t i) {
            const int64_t part = i % parts, chunk = i / parts % chunks;
            const Cells cells = row_cells(state, t, y, b0, b1, chunk * MOST_CELLS);
            work(cells, i / parts / chunks, part * panels / parts, (part + 1) * panels / parts);
        });
    };
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
        row_input(state, row_cells(state, t, y, b0, b1, chunk * MOST_CELLS));
    for (int64_t l = 0; l < model.L; ++l)
        shared(1, [&](const Cells& cells, int64_t, int64_t first, int64_t last) {
            row_layer(state, cells, l, first, last);
        });
    shared(model.L, [&](const Cells& cells, int64_t l, int64_t first, int64_t last) {
        row_link(state, cells, l, first, last);
    });
}

// What a draw at each of the cells gives, in the order of the cells; a code that is given stands.
void draw_cells(const State& state, Crew* crew, Scratch& scratch, const Cells& cells, Drawn* drawn) {
    const SamplerJob& job = state.job;
    const int64_t K = state.model.K, stride = rounded(K, PANEL), room = rounded(draw_bytes(K), 64);
    const int64_t parts = crew ? least(cells.count, least(DRAWERS, crew->threads())) : 1;
    share(crew, parts, [&](int64_t part) {
        for (int64_t m = part * cells.count / parts; m < (part + 1) * cells.count / parts; ++m) {
            const Cell& cell = cells.at[m];
            const float* logits = scratch.logits + m * stride;
            const int64_t at = ((cell.b * job.T + cells.t) * job.H + cell.y) * job.W + cell.x;
            if (job.given && job.given[at] >= 0) {
                drawn[m] = {job.given[at], __builtin_inff(), logprob_of(logits, K, job.given[at])};
                continue;
            }
            const Place place = {(uint64_t)job.seed, (uint32_t)job.samples[cell.b], (uint32_t)job.stream,
                                 (uint32_t)(job.first_step + cells.t), (uint32_t)cell.y, (uint32_t)cell.x};
            drawn[m] = draw(logits, K, (float)job.temperature, place, scratch.noise + part * room);
        }
    });
}

void write(const State& state, int64_t t, const Cell& cell, const Drawn& drawn) {
    const SamplerJob& job = state.job;
    const int64_t at = ((cell.b * job.T + t) * job.H + cell.y) * job.W + cell.x;
    job.codes[at] = drawn.code;
    job.logprob[at] = drawn.logprob;
    job.margin[at] = drawn.margin;
}

// The codes of a row as far as they are given, and a guess elsewhere: the caller's, or what stood there a frame
// before, or above. Returns whether all are given.
bool guess_row(const State& state, int64_t t, int64_t y, int64_t b) {
    const SamplerJob& job = state.job;
    int64_t* line = state.line + (b * job.H + y) * job.W;
    bool all = true;
    for (int64_t x = 0; x < job.W; ++x) {
        const int64_t at = ((b * job.T + t) * job.H + y) * job.W + x;
        const bool given = job.given && job.given[at] >= 0;
        int64_t code = given ? job.given[at] : job.draft ? job.draft[at] : OPEN_CODE;
        if (code < 0 || code >= state.model.K)
            code = t > 0 ? job.codes[at - job.H * job.W] : y > 0 ? line[x - job.W] : 0;
        line[x] = code;
        all &= given;
    }
    return all;
}

// Takes in what was drawn at `count` consecutive cells of a sample, whose inputs were the guesses in `line`. The first
// is final; each next one is as long as the guesses before it were right. Returns how many are final.
int64_t settle(const State& state, int64_t t, const Cell* cells, const Drawn* drawn, int64_t count) {
    int64_t settled = 0;
    bool sure = true;
    for (int64_t m = 0; m < count; ++m) {
        const Cell& cell = cells[m];
        int64_t& guess = state.line[(cell.b * state.job.H + cell.y) * state.job.W + cell.x];
        if (sure) {
            write(state, t, cell, drawn[m]);
            ++settled;
            sure = guess == drawn[m].code;
        }
        guess = drawn[m].code;  // the better guess, where it is not final
    }
    return settled;
}

// One pass over the open positions of samples b0 .. b1, as many samples as fit. Returns the first sample left out, and
// sets `open` where there was anything to do.
int64_t pass(const State& state, Crew* crew, Scratch& scratch, int64_t t, int64_t y, int64_t b0, int64_t b1,
             int64_t window, bool& open) {
    const SamplerJob& job = state.job;
    Cells cells;
    cells.t = t;
    cells.count = 0;
    int64_t end = b0;
    for (; end < b1; ++end) {
        const int64_t size = least(window, job.W - state.front[end]);
        if (cells.count + size > MOST_CELLS) break;
        for (int64_t j = 0; j < size; ++j) cells.at[cells.count++] = {end, y, state.front[end] + j};
    }
    if (!cells.count) return end;
    open = true;
    Drawn drawn[MOST_CELLS];
    pixels(state, crew, scratch, cells);
    draw_cells(state, crew, scratch, cells, drawn);
    for (int64_t m = 0, count; m < cells.count; m += count) {
        const int64_t b = cells.at[m].b;
        for (count = 1; m + count < cells.count && cells.at[m + count].b == b;) ++count;
        state.front[b] += settle(state, t, cells.at + m, drawn + m, count);
        ++job.passes[(b * job.T + t) * job.H + y];
    }
    return end;
}

// The row of samples whose codes are all given: every position at once.
void score_row(const State& state, Crew* crew, Scratch& scratch, int64_t t, int64_t y, int64_t b) {
    const SamplerJob& job = state.job;
    Drawn drawn[MOST_CELLS];
    for (int64_t first = 0; first < job.W; first += MOST_CELLS) {
        const Cells cells = row_cells(state, t, y, b, b + 1, first);
        pixels(state, crew, scratch, cells);
        draw_cells(state, crew, scratch, cells, drawn);
        for (int64_t m = 0; m < cells.count; ++m) write(state, t, cells.at[m], drawn[m]);
    }
    job.passes[(b * job.T + t) * job.H + y] = 1;
}

// Draws row y of samples b0 .. b1, whose past and vertical stream are there.
void draw_row(const State& state, Crew* crew, Scratch& scratch, int64_t t, int64_t y, int64_t b0, int64_t b1) {
    const SamplerJob& job = state.job;
    int64_t drawn = 0;  // codes
    for (int64_t b = b0; b < b1; ++b) {
        job.passes[(b * job.T + t) * job.H + y] = 0;
        state.front[b] = 0;
        if (!guess_row(state, t, y, b)) {
            drawn += job.W;
            continue;
        }
        score_row(state, crew, scratch, t, y, b);
        state.front[b] = job.W;
    }
    const int64_t most = least(job.W, MOST_CELLS);
    const int choice = scratch.habits->choose(most);
    const int64_t window = job.window ? least(job.window, most) : WINDOW_SIZES[choice];
    const double start = seconds();
    for (bool open = drawn > 0; open;) {
        open = false;
        for (int64_t b = b0; b < b1;) b = pass(state, crew, scratch, t, y, b, b1, window, open);
    }
    if (drawn && !job.window) scratch.habits->took(choice, (seconds() - start) / (double)drawn);
}

struct Turn {
    const State& state;
    int64_t t, y;
    bool shared;  // products are long enough to be shared
};

// Everything about a row of samples b0 .. b1, by one crew or by the caller alone.
void whole_row(const Turn& turn, Crew* crew, Scratch& scratch, int64_t b0, int64_t b1) {
    past_of_row(turn.state, crew, turn.t, turn.y, b0, b1);
    vertical_row(turn.state, crew, turn.t, turn.y, b0, b1);
    draw_row(turn.state, crew, scratch, turn.t, turn.y, b0, b1);
}

// Samples apart: each thread takes a group of them, and no one waits.
void groups_of_samples(const Turn& turn, Crew& crew) {
    const int64_t B = turn.state.job.B, groups = turn.state.groups;
    share(&crew, groups, [&](int64_t i) {
        Scratch scratch = turn.state.scratch[i];
        whole_row(turn, nullptr, scratch, i * B / groups, (i + 1) * B / groups);
    });
}

// A row's sums of the past may be formed before row y of frame t is drawn if that row is in none of them.
bool independent(const State& state, int64_t y) { return y + 1 < state.job.H || state.model.r < state.job.H - 1; }

// One narrow sample: its pixels are one chain, which the caller runs while the helpers form the next row's past.
void pixels_beside_past(const Turn& turn, Crew& crew) {
    const State& state = turn.state;
    const SamplerJob& job = state.job;
    const int64_t row = turn.t * job.H + turn.y, next = row + 1;
    Scratch scratch = state.scratch[0];
    if (state.slot_row[row % 2] != row) past_of_row(state, &crew, turn.t, turn.y, 0, job.B);
    state.slot_row[row % 2] = -1;  // the row pass adds to the sums in place
    vertical_row(state, &crew, turn.t, turn.y, 0, job.B);
    const bool ahead = next < job.T * job.H && independent(state, turn.y) && state.slot_row[next % 2] != next;
    Past past(state, next / job.H, next % job.H, 0, job.B, crew.threads());
    if (ahead) crew.post(past.pieces(), Past::run, &past);
    draw_row(state, nullptr, scratch, turn.t, turn.y, 0, job.B);
    crew.finish();
    if (ahead) state.slot_row[next % 2] = next;
}

void lead_row(Crew& crew, void* context) {
    const Turn& turn = *(const Turn*)context;
    const State& state = turn.state;
    Scratch scratch = state.scratch[0];
    if (crew.threads() == 1) return whole_row(turn, nullptr, scratch, 0, state.job.B);
    if (turn.shared) return whole_row(turn, &crew, scratch, 0, state.job.B);
    if (state.job.B > 1) return groups_of_samples(turn, crew);
    pixels_beside_past(turn, crew);
}

// One step of a wavefront: positions that depend on none of each other, of all samples.
void wave_step(const State& state, Crew* crew, Scratch& scratch, const Cells& cells) {
    const Model& model = state.model;
    const int64_t panels = 2 * model.C / PANEL;
    row_input(state, cells);
    for (int64_t l = 0; l < model.L; ++l)
        share_panels(crew, panels, [&](int64_t first, int64_t last) { row_layer(state, cells, l, first, last); });
    for (int64_t l = 0; l < model.L; ++l)
        share_panels(crew, panels, [&](int64_t first, int64_t last) { row_link(state, cells, l, first, last); });
    Drawn drawn[MOST_CELLS];
    pixels(state, crew, scratch, cells);
    draw_cells(state, crew, scratch, cells, drawn);
    for (int64_t m = 0; m < cells.count; ++m) {
        const Cell& cell = cells.at[m];
        write(state, cells.t, cell, drawn[m]);
        state.line[(cell.b * state.job.H + cell.y) * state.job.W + cell.x] = drawn[m].code;
    }
}

void lead_frame(Crew& crew, void* context) {
    const Turn& turn = *(const Turn*)context;
    const State& state = turn.state;
    const SamplerJob& job = state.job;
    Crew* team = crew.threads() > 1 ? &crew : nullptr;
    Scratch scratch = state.scratch[0];
    for (int64_t y = 0; y < job.H; ++y) past_of_row(state, team, turn.t, y, 0, job.B);
    const int64_t slope = 1 + state.model.r, steps = job.W + slope * (job.H - 1);
    for (int64_t step = 0; step < steps; ++step) {
        Cells cells;
        cells.t = turn.t;
        cells.count = 0;
        for (int64_t b = 0; b < job.B; ++b)
            for (int64_t y = 0; y < job.H && slope * y <= step; ++y) {
                if (step - slope * y >= job.W) continue;
                cells.at[cells.count++] = {b, y, step - slope * y};
                if (cells.count < MOST_CELLS) continue;
                wave_step(state, team, scratch, cells);
                cells.count = 0;
            }
        if (cells.count) wave_step(state, team, scratch, cells);
    }
    for (int64_t b = 0; b < job.B; ++b) job.passes[(b * job.T + turn.t) * job.H] = steps;
}

// The state of a job as an earlier call left it; false where the arguments make no sense.
bool open_state(const SamplerJob& job, State& state) {
    int64_t bytes;
    return job.state && (uintptr_t)job.state % 64 == 0 && lay_out(job, job.state, state, bytes) &&
           bytes <= job.state_bytes;
}

// Whether every given code of rows y0 .. y1 of frame t is one of the model's.
bool sound(const State& state, int64_t t, int64_t y0, int64_t y1) {
    const SamplerJob& job = state.job;
    for (int64_t b = 0; b < job.B && job.given; ++b)
        for (int64_t i = y0 * job.W; i < y1 * job.W; ++i)
            if (job.given[(b * job.T + t) * job.H * job.W + i] >= state.model.K) return false;
    return true;
}

}  // namespace

int64_t sampler_bytes(const SamplerJob& job) {
    State state;
    int64_t bytes;
    return lay_out(job, nullptr, state, bytes) ? bytes : -1;
}

Outcome sampler_start(const SamplerJob& job) {
    State state;
    if (!open_state(job, state)) return BAD_ARGUMENT;
    const Model& model = state.model;
    expect_to_fill(job.state, (size_t)job.state_bytes);
    // taps beside the grid read zeros; everything else is written before it is read
    const int64_t border = model.r * model.S, rows = job.B * model.L * state.ring;
    for (float* plane : {state.v, state.h})
        for (int64_t row = 0; row < rows; ++row) {
            float* first = plane + row * state.columns * model.S;
            __builtin_memset(first, 0, (size_t)border * sizeof(float));
            __builtin_memset(first + border + job.W * model.S, 0, (size_t)border * sizeof(float));
        }
    __builtin_memset(state.zeros, 0, (size_t)model.S * sizeof(float));
    for (int64_t slot = 0; slot < state.slots; ++slot) state.slot_row[slot] = -1;
    for (int64_t group = 0; group < state.groups; ++group) *state.scratch[group].habits = {};
    return DONE;
}

Outcome sampler_row(const SamplerJob& job, int64_t t, int64_t y) {
    State state;
    if (!open_state(job, state) || job.wavefront || t < 0 || t >= job.T || y < 0 || y >= job.H ||
        !sound(state, t, y, y + 1))
        return BAD_ARGUMENT;
    if (!job.B || !job.W) return DONE;
    const Model& model = state.model;
    const int64_t weights = model.L * (2 * model.horizontal.now + 1) * model.C * model.C +
                            4 * model.attentions * model.C * model.D + model.C * (model.C + model.K);
    const int64_t bytes[] = {4, 2, 1};
    Turn turn = {state, t, y, weights * bytes[model.table[WEIGHT_TYPE]] > SHARED_BYTES};
    Crew::run((int)job.threads, lead_row, &turn);
    return DONE;
}

Outcome sampler_frame(const SamplerJob& job, int64_t t) {
    State state;
    if (!open_state(job, state) || !job.wavefront || t < 0 || t >= job.T || !sound(state, t, 0, job.H))
        return BAD_ARGUMENT;
    if (!job.B || !job.H || !job.W) return DONE;
    Turn turn = {state, t, 0, true};
    Crew::run((int)job.threads, lead_frame, &turn);
    return DONE;
}

}  // namespace fastvid::FASTVID_LEVEL
