// Attention inside boxes with its projections on the CPU. README.md beside this file has the design; compiled once per
// instruction set level (see common/simd.h).
#include "axial_attention/cpu.h"
#include "axial_attention/cpu_projected_pack.h"
#include "axial_attention/cpu_projected_plan.h"
#include "axial_attention/cpu_projected_tile.h"
#include "common/pages.h"
#include "common/pool.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t STRIP = 16;  // channels that are staged of all positions before the next ones

// What one thread needs.
struct Scratch {
    const float **rows, **hidden_rows;  // [block] of x, and of `hidden`
    int64_t *from, *places;             // [block] where positions begin in x and in out, in elements
    float* staging;                     // [block][C]
    float *projected, *hidden;          // [block][width] and [block][hidden], if blocks are whole
    float* sums;                        // [block][PANEL]
    Place* spots;                       // [boxes of a block][heads of a group]
    LineScratch line;

    void cut(Cutter& cutter, const Plan& plan) {
        rows = cutter.cut<const float*>(plan.block);
        hidden_rows = cutter.cut<const float*>(plan.block);
        from = cutter.cut<int64_t>(plan.block);
        places = cutter.cut<int64_t>(plan.block);
        staging = cutter.cut<float>(plan.staged ? plan.block * plan.call.C : 0);
        projected = cutter.cut<float>(plan.whole ? plan.block * plan.width : 0);
        hidden = cutter.cut<float>(plan.whole ? plan.block * plan.hidden : 0);
        sums = cutter.cut<float>(plan.block * PANEL);
        spots = cutter.cut<Place>(plan.whole ? plan.block / plan.n * plan.together : 0);
        line.cut(cutter, plan.task);
    }
};

// Neighbouring channels of all positions before the next ones: where channels are far apart, positions are neighbours.
void stage_rows(const Plan& plan, const Scratch& scratch, int64_t positions) {
    const Positions& x = plan.call.x;
    const int64_t C = plan.call.C, step = x.strides[4], bytes = bytes_of(x.type);
    for (int64_t c = 0; c < C; c += STRIP)
        for (int64_t p = 0; p < positions; ++p)
            copy_row((const char*)x.data + (scratch.from[p] + c * step) * bytes, step, x.type, at_most(C - c, STRIP),
                     scratch.staging + p * C + c);
}

// Where `positions` positions from `first` on read and write.
void find_positions(const Plan& plan, Scratch& scratch, int64_t first, int64_t positions) {
    const SelfAttentionCall& call = plan.call;
    for (int64_t p = 0, inside = first % plan.n, box = first / plan.n; p < positions; ++box, inside = 0) {
        const int64_t x_begin = begin_of(call, call.x, box), out_begin = begin_of(call, call.out, box);
        for (; inside < plan.n && p < positions; ++inside, ++p) {
            scratch.from[p] = x_begin + plan.x_at[inside];
            scratch.places[p] = out_begin + plan.out_at[inside];
        }
    }
    if (plan.staged) stage_rows(plan, scratch, positions);
    for (int64_t p = 0; p < positions; ++p)
        scratch.rows[p] = plan.staged ? scratch.staging + p * call.C : (const float*)call.x.data + scratch.from[p];
}

// projected[positions][width] of one group
void project(const Plan& plan, const Scratch& scratch, int64_t group, int64_t positions, float* projected) {
    const int64_t C = plan.call.C, first = group * plan.group_panels;
    const int64_t panels = parts_of(plan.heads_of(group) * plan.head_width, PANEL);
    for (int64_t panel = 0; panel < panels; ++panel)
        multiply_panel(scratch.rows, positions, C, plan.packed_in + (first + panel) * C * PANEL,
                       projected + panel * PANEL, plan.width);
}

// hidden[positions][hidden] times to_out, to where the positions lie
void project_out(const Plan& plan, Scratch& scratch, const float* hidden, int64_t positions) {
    for (int64_t p = 0; p < positions; ++p) scratch.hidden_rows[p] = hidden + p * plan.hidden;
    for (int64_t panel = 0; panel < plan.out_panels; ++panel) {
        fetch_places(plan, panel, scratch.places, positions);
        multiply_panel(scratch.hidden_rows, positions, plan.hidden, plan.packed_out + panel * plan.hidden * PANEL,
                       scratch.sums, PANEL);
        finish_panel(plan, panel, scratch.places, scratch.sums, positions);
    }
}

// A head in a box whose rows begin here.
Place place_of(const Plan& plan, float* projected, float* hidden, int64_t group, int64_t head) {
    const SelfAttentionCall& call = plan.call;
    const float* q = projected + head * plan.head_width;
    return {q, q + call.E, q + 2 * call.E, nullptr, hidden + (group * plan.together + head) * call.D, nullptr};
}

// Heads of neighbouring boxes are given together: short ones are then attended to together.
void attend_group(const Plan& plan, const Scratch& scratch, int64_t group, int64_t positions) {
    const int64_t heads = plan.heads_of(group);
    int64_t count = 0;
    for (int64_t p = 0; p < positions; p += plan.n)
        for (int64_t head = 0; head < heads; ++head)
            scratch.spots[count++] = place_of(plan, scratch.projected + p * plan.width,
                                              scratch.hidden + p * plan.hidden, group, head);
    attend(plan.task, scratch.spots, count, scratch.line);
}

void do_block(const Plan& plan, Scratch& scratch, int64_t first, int64_t positions) {
    find_positions(plan, scratch, first, positions);
    for (int64_t group = 0; group < plan.groups; ++group) {
        project(plan, scratch, group, positions, scratch.projected);
        attend_group(plan, scratch, group, positions);
    }
    project_out(plan, scratch, scratch.hidden, positions);
}

// The same where boxes are too few for the threads: all of each step before the next one.
void project_block(const Plan& plan, Scratch& scratch, int64_t first, int64_t positions) {
    find_positions(plan, scratch, first, positions);
    for (int64_t group = 0; group < plan.groups; ++group)
        project(plan, scratch, group, positions, plan.all_projected + (group * plan.N + first) * plan.width);
}

void attend_part(const Plan& plan, const Scratch& scratch, int64_t piece) {
    const int64_t parts = parts_of(plan.n, MOST_QUERIES), part = parts - 1 - piece % parts;  // later ones may see more
    const int64_t unit = piece / parts, a = unit % plan.call.A, box = unit / plan.call.A;
    const int64_t group = a / plan.together, first = part * MOST_QUERIES;
    const Place place = place_of(plan, plan.all_projected + (group * plan.N + box * plan.n) * plan.width,
                                 plan.all_hidden + box * plan.n * plan.hidden, group, a % plan.together);
    attend_block(plan.task, place, first, at_most(first + MOST_QUERIES, plan.n), scratch.line);
}

void finish_block(const Plan& plan, Scratch& scratch, int64_t first, int64_t positions) {
    find_positions(plan, scratch, first, positions);
    project_out(plan, scratch, plan.all_hidden + first * plan.hidden, positions);
}

// step(plan, scratch, first, positions) for every block that nobody else takes.
template <int COUNTER, class Step>
void each_block(Plan& plan, Scratch& scratch, Step step) {
    for (;;) {
        const int64_t block = __atomic_fetch_add(&plan.next[COUNTER], 1, __ATOMIC_RELAXED), first = block * plan.block;
        if (block >= plan.blocks) return;
        step(plan, scratch, first, at_most(plan.block, plan.N - first));
    }
}

// One thread's part of a job, with its scratch; without memory the others do its share.
template <void (*JOB)(Plan&, Scratch&)>
void with_scratch(void* context) {
    Plan& plan = *(Plan*)context;
    Scratch scratch;
    Cutter sizes;
    scratch.cut(sizes, plan);
    Memory memory;
    if (!memory.take(sizes.used)) return;
    Cutter cutter{(char*)memory.block};
    scratch.cut(cutter, plan);
    JOB(plan, scratch);
}

void do_blocks(Plan& plan, Scratch& scratch) { each_block<1>(plan, scratch, do_block); }

void project_blocks(Plan& plan, Scratch& scratch) { each_block<1>(plan, scratch, project_block); }

void attend_parts(Plan& plan, Scratch& scratch) {
    const int64_t pieces = plan.N / plan.n * plan.call.A * parts_of(plan.n, MOST_QUERIES);
    for (;;) {
        const int64_t piece = __atomic_fetch_add(&plan.next[2], 1, __ATOMIC_RELAXED);
        if (piece >= pieces) return;
        attend_part(plan, scratch, piece);
    }
}

void finish_blocks(Plan& plan, Scratch& scratch) { each_block<3>(plan, scratch, finish_block); }

void pack_panels(void* context) {
    Plan& plan = *(Plan*)context;
    const int64_t in = plan.groups * plan.group_panels;
    for (;;) {
        const int64_t panel = __atomic_fetch_add(&plan.next[0], 1, __ATOMIC_RELAXED);
        if (panel >= in + plan.out_panels) return;
        if (panel < in)
            pack_in(plan, panel);
        else
            pack_out(plan, panel - in);
    }
}

}  // namespace

Outcome axial_self_attention(const SelfAttentionCall& call) {
    Plan plan = {};
    plan.call = call;
    make_plan(plan);
    if (plan.N == 0 || call.Cout == 0) return DONE;
    Cutter sizes;
    plan.cut(sizes);
    Memory memory;
    if (!memory.take(sizes.used)) return NO_MEMORY;
    Cutter cutter{(char*)memory.block};
    plan.cut(cutter);
    expect_to_fill(memory.block, sizes.used);
    fill_tables(plan);
    run_together(plan.threads, pack_panels, &plan);
    if (plan.whole) {
        run_together(plan.threads, with_scratch<do_blocks>, &plan);
        // nothing is left unless every thread went without memory
        return plan.next[1] < plan.blocks ? NO_MEMORY : DONE;
    }
    run_together(plan.threads, with_scratch<project_blocks>, &plan);
    run_together(plan.threads, with_scratch<attend_parts>, &plan);
    run_together(plan.threads, with_scratch<finish_blocks>, &plan);
    const bool left = plan.next[1] < plan.blocks || !plan.next[2] || plan.next[3] < plan.blocks;
    return left ? NO_MEMORY : DONE;
}

}  // namespace fastvid::FASTVID_LEVEL
