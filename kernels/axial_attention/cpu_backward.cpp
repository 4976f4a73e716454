// The gradients of attention inside boxes on the CPU. README.md beside this file has the design; compiled once per
// instruction set level (see common/simd.h).
#include "axial_attention/cpu.h"

#include "axial_attention/cpu_backward_tile.h"
#include "common/pool.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

constexpr int64_t THREAD_WORK = 1 << 19;  // multiply-adds: less is not worth another thread
constexpr int64_t PIECE_WORK = 1 << 19;   // nor another piece
constexpr int64_t THREAD_PIECES = 8;      // where there are so many: threads end together
constexpr int64_t BIAS_CHUNKS = 16;       // whose gradients of the bias are summed apart
constexpr int64_t BIAS_FLOATS = 4 << 20;  // of all those sums

// Chunks of boxes, each with all heads or one by one, taken by whoever is free.
struct Job {
    Task task;
    int64_t boxes, chunk, chunks, groups;  // groups: of heads
    int64_t next;
    float* sums;  // [chunks, A, n, m] of the bias's gradient, or null

    int64_t pieces() const { return chunks * groups; }
    int64_t scores() const { return task.call.A * task.n * task.m; }
};

int64_t volume(const int64_t (&extent)[3]) { return extent[0] * extent[1] * extent[2]; }

// Offsets of a box's positions; returns how far apart neighbours are, or -1 where that varies.
int64_t find_places(const int64_t (&strides)[6], const int64_t (&box)[3], int64_t* places) {
    int64_t count = 0;
    for (int64_t t = 0; t < box[0]; ++t)
        for (int64_t y = 0; y < box[1]; ++y)
            for (int64_t x = 0; x < box[2]; ++x)
                places[count++] = t * strides[1] + y * strides[2] + x * strides[3];
    const int64_t step = count > 1 ? places[1] : 0;
    for (int64_t i = 0; i < count; ++i)
        if (places[i] != i * step) return -1;
    return step;
}

Operand operand_of(const Heads& heads, const int64_t (&box)[3], int64_t width, Cutter& cutter) {
    Operand operand = {heads, {box[0], box[1], box[2]}, width, nullptr, -1};
    int64_t* places = cutter.cut<int64_t>(volume(box));
    operand.places = places;
    if (places && heads.data) operand.step = find_places(heads.strides, box, places);
    return operand;
}

// float32 [B, T, H, W, A] as heads of width 1.
Heads of_statistics(const float* data, const AttentionGradCall& call) {
    const int64_t W = call.cells[2] * call.box[2], H = call.cells[1] * call.box[1], T = call.cells[0] * call.box[0];
    return {(void*)data, {T * H * W * call.A, H * W * call.A, W * call.A, call.A, 1, 1}, FLOAT32};
}

void find_operands(Task& task, Cutter& cutter) {
    const AttentionGradCall& call = task.call;
    task.q = operand_of(call.q, call.box, call.E, cutter);
    task.out = operand_of(call.out, call.box, call.D, cutter);
    task.grad_out = operand_of(call.grad_out, call.box, call.D, cutter);
    task.grad_q = operand_of(call.grad_q, call.box, call.E, cutter);
    task.lse = operand_of(of_statistics(call.lse, call), call.box, 1, cutter);
    task.grad_lse = operand_of(of_statistics(call.grad_lse, call), call.box, 1, cutter);
    task.k = operand_of(call.k, call.key_box, call.E, cutter);
    task.v = operand_of(call.v, call.key_box, call.D, cutter);
    task.grad_k = operand_of(call.grad_k, call.key_box, call.E, cutter);
    task.grad_v = operand_of(call.grad_v, call.key_box, call.D, cutter);
}

// Tiles of equal size, as few as may be.
int64_t tile_of(int64_t count) { return count ? divide_up(count, divide_up(count, MOST_TILE)) : 1; }

// What is in a chunk depends on the sizes alone where the bias's gradient is summed, since its bits depend on it.
void plan(Job& job) {
    Task& task = job.task;
    AttentionGradCall& call = task.call;
    task.n = volume(call.box), task.m = volume(call.key_box);
    task.tile_queries = tile_of(task.n);
    task.tile_keys = least(task.m, whole_vectors(tile_of(task.m)));
    task.tile_keys = most(1, task.tile_keys);
    task.row_keys = whole_vectors(task.tile_keys);
    job.boxes = call.B * volume(call.cells);
    const int64_t box_work = most(1, job.scores() * (call.E + call.D) * 5 / 2);
    call.threads = (int32_t)least(call.threads, 1 + job.boxes * box_work / THREAD_WORK);
    const int64_t wanted = THREAD_PIECES * call.threads;
    if (call.grad_bias)
        job.chunk = divide_up(job.boxes, most(1, least(BIAS_CHUNKS, BIAS_FLOATS / most(1, job.scores()))));
    else
        job.chunk = most(divide_up(job.boxes, wanted), least(job.boxes, PIECE_WORK / box_work));
    job.chunk = most(1, job.chunk);
    job.chunks = divide_up(job.boxes, job.chunk);
    job.groups = job.chunks < wanted && call.threads > 1 ? call.A : 1;
}

Place place_of(const Job& job, int64_t box, int64_t head, float* bias_sums) {
    const Task& task = job.task;
    const int64_t* cells = task.call.cells;
    const int64_t cell[] = {box / (cells[0] * cells[1] * cells[2]), box / (cells[1] * cells[2]) % cells[0],
                            box / cells[2] % cells[1], box % cells[2]};
    const auto at = [&](const Operand& operand) -> Rows {
        return {&operand, operand.position(cell) + head * operand.heads.strides[4]};
    };
    return {at(task.q),      at(task.k),      at(task.v),   at(task.out),      at(task.grad_out), at(task.grad_q),
            at(task.grad_k), at(task.grad_v), at(task.lse), at(task.grad_lse), head,              bias_sums};
}

void move_to_next_head(Place& place) {
    Rows* const all[] = {&place.q,      &place.k,      &place.v,      &place.out, &place.grad_out,
                         &place.grad_q, &place.grad_k, &place.grad_v, &place.lse, &place.grad_lse};
    for (Rows* rows : all) rows->at += rows->operand->heads.strides[4];
    ++place.head;
}

void differentiate_piece(const Job& job, const Scratch& scratch, int64_t piece) {
    const int64_t chunk = piece / job.groups, group = piece % job.groups, A = job.task.call.A;
    const int64_t first_head = group * A / job.groups, last_head = (group + 1) * A / job.groups;
    const int64_t scores = job.task.n * job.task.m, end = least((chunk + 1) * job.chunk, job.boxes);
    float* sums = job.sums ? job.sums + chunk * A * scores : nullptr;
    if (sums)
        __builtin_memset(sums + first_head * scores, 0, (size_t)((last_head - first_head) * scores) * sizeof(float));
    int64_t box = chunk * job.chunk, head = first_head;
    for (; box < end; ++box) {
        Place place = place_of(job, box, first_head, sums);
        const Place next = place_of(job, box + 1 < end ? box + 1 : box, first_head, sums);
        for (head = first_head; head < last_head; ++head) {
            if (sums) place.bias_sums = sums + head * scores;
            Ahead ahead = box + 1 < end ? ahead_of(job.task, next, head - first_head, last_head - first_head) : Ahead();
            differentiate_box(job.task, place, scratch, ahead);
            move_to_next_head(place);
        }
    }
}

void differentiate_pieces(void* context) {
    Job& job = *(Job*)context;
    Scratch scratch;
    Cutter sizes;
    scratch.cut(sizes, job.task);
    Memory memory;
    if (!memory.take(sizes.used)) return;  // the others do its share
    __builtin_memset(memory.block, 0, sizes.used);
    Cutter cutter{(char*)memory.block};
    scratch.cut(cutter, job.task);
    for (;;) {
        const int64_t piece = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
        if (piece >= job.pieces()) return;
        differentiate_piece(job, scratch, piece);
    }
}

// The chunks' sums, in order.
void add_chunks(const Job& job) {
    const int64_t scores = job.scores();
    float* to = job.task.call.grad_bias;
    __builtin_memcpy(to, job.sums, (size_t)scores * sizeof(float));
    for (int64_t chunk = 1; chunk < job.chunks; ++chunk)
        for (int64_t i = 0; i < scores; ++i) to[i] += job.sums[chunk * scores + i];
}

}  // namespace

Outcome axial_attention_backward(const AttentionGradCall& call) {
    Job job = {};
    job.task.call = call;
    plan(job);
    const int64_t scores = job.scores();
    if (!job.boxes || !call.A) {
        if (call.grad_bias) __builtin_memset(call.grad_bias, 0, (size_t)scores * sizeof(float));
        return DONE;
    }
    Cutter sizes;
    find_operands(job.task, sizes);
    const bool apart = call.grad_bias && job.chunks > 1;
    sizes.cut<float>(apart ? job.chunks * scores : 0);
    Memory memory;
    if (!memory.take(sizes.used)) return NO_MEMORY;
    Cutter cutter{(char*)memory.block};
    find_operands(job.task, cutter);
    job.sums = apart ? cutter.cut<float>(job.chunks * scores) : call.grad_bias;
    run_together((int)least(job.task.call.threads, job.pieces()), differentiate_pieces, &job);
    if (job.next < job.pieces()) return NO_MEMORY;  // every thread went without
    if (apart) add_chunks(job);
    return DONE;
}

}  // namespace fastvid::FASTVID_LEVEL
