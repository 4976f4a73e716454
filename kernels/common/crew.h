// A leader and its helpers inside one native call: thousands of small jobs without a trip to the pool for each.
#pragma once

#include <atomic>
#include <cstdint>

namespace fastvid {

// One job at a time is cut into pieces, and whoever is free takes the next piece. Nobody waits for a helper that did
// not come: the leader takes what is left. A piece never throws; what it writes is there for the leader after finish(),
// and for whoever takes a piece of a later job.
class Crew {
  public:
    static constexpr int64_t MOST_PIECES = (1 << 20) - 1;

    // Runs lead(crew, context) on the calling thread while up to `threads` - 1 others wait for jobs. Returns when all
    // have gone home.
    static void run(int threads, void (*lead)(Crew& crew, void* context), void* context);

    // piece(context, i) for i = 0 .. pieces - 1, on everybody.
    void each(int64_t pieces, void (*piece)(void* context, int64_t i), void* context);

    // The same by the helpers alone, while the leader does something else until it calls finish(). In between, each()
    // runs on the leader alone.
    void post(int64_t pieces, void (*piece)(void* context, int64_t i), void* context);

    // Takes what is left of the posted job and waits for the pieces that others have begun.
    void finish();

    int threads() const { return threads_; }  // at most so many take part
    bool busy() const { return posted_; }

  private:
    struct Run;
    static void enter(void* run);
    void help();
    bool take(uint64_t seen);

    // phase << 40 | pieces << 20 | next piece: one word, so that a piece can only be taken of the job it belongs to
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> done_{0};  // pieces of the present job
    alignas(64) void (*piece_)(void*, int64_t) = nullptr;
    void* context_ = nullptr;
    uint64_t phase_ = 0;
    int64_t pieces_ = 0;
    int threads_ = 1;
    bool posted_ = false;
};

}  // namespace fastvid
