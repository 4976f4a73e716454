// Attention inside boxes on the CPU. README.md beside this file has the design; compiled once per instruction set level
// (see common/simd.h).
#include "axial_attention/cpu.h"

#include "axial_attention/cpu_boxes.h"
#include "axial_attention/cpu_line.h"
#include "common/pages.h"
#include "common/pool.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t THREAD_WORK = 1 << 19;  // multiply-adds, about 10 microseconds: less is not worth another thread
constexpr int64_t PIECE_WORK = 1 << 20;
constexpr int64_t MOST_PLACES = 48;  // units that are found at once
constexpr int64_t MOST_GATHERED = 192 << 10;  // bytes of rows that are gathered at once: a part of the second cache

// A unit is a head of a box; a piece is some units of neighbouring boxes, or some queries of one unit.
struct Plan {
    AttentionCall call;
    Boxes boxes;
    Task task;
    int64_t units, units_of_piece, blocks, queries_of_block, pieces;
    int threads;
    int64_t next_piece;  // taken by whoever is free

    void cut(Cutter& cutter) {
        task.q.at = boxes.cut(cutter, call.q, call.box);
        task.out.at = boxes.cut(cutter, call.out, call.box);
        task.lse_at = boxes.cut(cutter, boxes.lse, call.box);
        task.k.at = boxes.cut(cutter, call.k, call.key_box);
        const bool alike = boxes.alike(call.k, call.v);
        task.v.at = alike ? task.k.at : boxes.cut(cutter, call.v, call.key_box);
    }
};

Rows rows_of(const Heads& heads) { return {nullptr, heads.strides[5], heads.type}; }

void make_plan(Plan& plan) {
    const AttentionCall& call = plan.call;
    const int64_t n = volume(call.box), m = volume(call.key_box);
    plan.boxes = make_boxes(call);
    plan.task = {rows_of(call.q), rows_of(call.k), rows_of(call.v), rows_of(call.out), nullptr,
                 {call.bias.strides[1], call.bias.strides[2]}, call.bias.type,
                 n, m, call.E, call.D, call.scale, call.mask, 1};
    plan.units = call.B * volume(call.cells) * call.A;
    const int64_t work_of_unit = (n * m + n + m) * (call.E + call.D) + 1, work = plan.units * work_of_unit;
    plan.threads = (int)at_most(call.threads, 1 + work / THREAD_WORK);
    const int64_t share = plan.threads > 1 ? plan.units / (4 * plan.threads) : plan.units;
    const int64_t wanted = at_least(at_most(PIECE_WORK / work_of_unit, share), 1);
    // whole boxes where they are small: what lies side by side is best read at once
    plan.units_of_piece = wanted >= call.A ? wanted / call.A * call.A : wanted;
    const bool few = plan.units < 4 * plan.threads;
    plan.queries_of_block = few ? MOST_QUERIES : at_least(n, 1);
    const int64_t bytes_of_unit = 4 * (n * call.E + m * (call.E + call.D)) + 1;
    // rows of a head in a line along H or T may be so far apart that the caches hold few of them, and no stream forms
    if (!few && n > FEW && n <= MOST_QUERIES && m <= MOST_KEYS && 2 * m > LANES)
        plan.task.together = at_least(at_most(MOST_GATHERED / bytes_of_unit, at_most(call.A, plan.units_of_piece)), 1);
    plan.blocks = at_least((n + plan.queries_of_block - 1) / plan.queries_of_block, 1);
    plan.pieces = (plan.units + plan.units_of_piece - 1) / plan.units_of_piece * plan.blocks;
}

Place place_of(const Plan& plan, int64_t box, int64_t a) {
    const AttentionCall& call = plan.call;
    const Corner corner = plan.boxes.corner(box);
    const int64_t bias_bytes = call.bias.type == FLOAT32 ? 4 : 2;
    return {plan.boxes.begin(call.q, corner, call.box, a), plan.boxes.begin(call.k, corner, call.key_box, a),
            plan.boxes.begin(call.v, corner, call.key_box, a),
            call.bias.data ? (const char*)call.bias.data + a * call.bias.strides[0] * bias_bytes : nullptr,
            plan.boxes.begin(call.out, corner, call.box, a),
            (float*)plan.boxes.begin(plan.boxes.lse, corner, call.box, a)};
}

// Heads [first, last) of all boxes, counted through.
void find_places(const Plan& plan, int64_t first, int64_t last, Place* places) {
    const AttentionCall& call = plan.call;
    const auto next_head = [](const Heads& heads) { return heads.strides[4] * (heads.type == FLOAT32 ? 4 : 2); };
    const int64_t q = next_head(call.q), k = next_head(call.k), v = next_head(call.v), out = next_head(call.out);
    const int64_t bias = call.bias.strides[0] * (call.bias.type == FLOAT32 ? 4 : 2);
    for (int64_t box = first / call.A, a = first % call.A; first < last; ++box, a = 0) {
        Place place = place_of(plan, box, a);
        for (; a < call.A && first < last; ++a, ++first) {
            *places++ = place;
            place = {(const char*)place.q + q, (const char*)place.k + k, (const char*)place.v + v,
                     place.bias ? (const char*)place.bias + bias : nullptr, (char*)place.out + out,
                     place.lse ? place.lse + 1 : nullptr};
        }
    }
}

void attend_piece(const Plan& plan, int64_t piece, const LineScratch& scratch) {
    const int64_t first = piece / plan.blocks * plan.units_of_piece;
    const int64_t last = at_most(first + plan.units_of_piece, plan.units);
    const int64_t block = plan.blocks - 1 - piece % plan.blocks;  // later queries may see more: the short ones come last
    Place places[MOST_PLACES];
    for (int64_t unit = first; unit < last; unit += MOST_PLACES) {
        const int64_t count = at_most(last - unit, MOST_PLACES);
        find_places(plan, unit, unit + count, places);
        if (plan.blocks == 1) {
            attend(plan.task, places, count, scratch);
            continue;
        }
        const int64_t from = block * plan.queries_of_block;
        for (int64_t i = 0; i < count; ++i)
            attend_block(plan.task, places[i], from, at_most(from + plan.queries_of_block, plan.task.n), scratch);
    }
}

void attend_pieces(void* context) {
    Plan& plan = *(Plan*)context;
    LineScratch scratch;
    Cutter sizes;
    scratch.cut(sizes, plan.task);
    Memory memory;
    if (!memory.take(sizes.used)) return;  // the others do its share
    Cutter cutter{(char*)memory.block};
    scratch.cut(cutter, plan.task);
    for (;;) {
        const int64_t piece = __atomic_fetch_add(&plan.next_piece, 1, __ATOMIC_RELAXED);
        if (piece >= plan.pieces) return;
        attend_piece(plan, piece, scratch);
    }
}

}  // namespace

Outcome axial_attention(const AttentionCall& call) {
    Plan plan = {};
    plan.call = call;
    make_plan(plan);
    if (plan.units == 0 || plan.task.n == 0) return DONE;
    Cutter sizes;
    plan.cut(sizes);
    Memory memory;
    if (!memory.take(sizes.used)) return NO_MEMORY;
    Cutter cutter{(char*)memory.block};
    plan.cut(cutter);
    if (plan.task.out.step == 1)
        expect_to_fill(call.out.data, (size_t)(plan.units * plan.task.n * call.D * plan.task.out.bytes()));
    run_together((int)at_most(plan.pieces, plan.threads), attend_pieces, &plan);
    // no piece is left unless every thread went without memory
    return plan.next_piece < plan.pieces ? NO_MEMORY : DONE;
}

}  // namespace fastvid::FASTVID_LEVEL
