#include "common/crew.h"

#include <pthread.h>
#include <sched.h>

#include "common/pool.h"

namespace fastvid {
namespace {

constexpr uint64_t HOME = ~0ull;          // the ticket that sends helpers home
constexpr int PATIENCE = 4096;            // looks before a waiting thread lets others have its processor
constexpr uint64_t COUNT = (1 << 20) - 1;  // mask of a ticket's counts

uint64_t next_of(uint64_t ticket) { return ticket & COUNT; }
uint64_t pieces_of(uint64_t ticket) { return ticket >> 20 & COUNT; }

void wait_a_little(int& looks) {
    if (++looks > PATIENCE) {
        sched_yield();
        return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

}  // namespace

struct Crew::Run {
    Crew crew;
    void (*lead)(Crew&, void*);
    void* context;
    pthread_t leader;
};

void Crew::run(int threads, void (*lead)(Crew&, void*), void* context) {
    Run all{{}, lead, context, pthread_self()};
    all.crew.threads_ = threads < 1 ? 1 : threads;
    run_together(all.crew.threads_, enter, &all);
}

void Crew::enter(void* run) {
    Run& all = *(Run*)run;
    if (!pthread_equal(all.leader, pthread_self())) return all.crew.help();
    all.lead(all.crew, all.context);
    all.crew.finish();
    all.crew.ticket_.store(HOME, std::memory_order_release);
}

bool Crew::take(uint64_t seen) {
    // a ticket that is still the one seen belongs to a job that this piece keeps from ending
    if (!ticket_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_relaxed))
        return false;
    piece_(context_, (int64_t)next_of(seen));
    done_.fetch_add(1, std::memory_order_release);
    return true;
}

void Crew::help() {
    for (int looks = 0;;) {
        const uint64_t seen = ticket_.load(std::memory_order_acquire);
        if (seen == HOME) return;
        if (next_of(seen) >= pieces_of(seen))
            wait_a_little(looks);
        else if (take(seen))
            looks = 0;
    }
}

void Crew::post(int64_t pieces, void (*piece)(void*, int64_t), void* context) {
    finish();
    piece_ = piece;
    context_ = context;
    pieces_ = pieces;
    posted_ = true;
    done_.store(0, std::memory_order_relaxed);
    phase_ = (phase_ + 1) & ((1 << 23) - 1);
    ticket_.store(phase_ << 40 | (uint64_t)pieces << 20, std::memory_order_release);
}

void Crew::finish() {
    if (!posted_) return;
    for (;;) {
        const uint64_t seen = ticket_.load(std::memory_order_acquire);
        if (next_of(seen) >= pieces_of(seen)) break;
        take(seen);
    }
    for (int looks = 0; done_.load(std::memory_order_acquire) < pieces_;) wait_a_little(looks);
    posted_ = false;
}

void Crew::each(int64_t pieces, void (*piece)(void*, int64_t), void* context) {
    if (threads_ == 1 || posted_ || pieces < 2) {
        for (int64_t i = 0; i < pieces; ++i) piece(context, i);
        return;
    }
    post(pieces, piece, context);
    finish();
}

}  // namespace fastvid
