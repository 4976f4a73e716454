#include "common/pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace fastvid {
namespace {

constexpr auto SPIN = std::chrono::microseconds(30);  // longer than the gap between two ops, shorter than a slice

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Looks at `done` for a while without the kernel's help.
template <class Condition>
bool spin_until(Condition done) {
    const auto end = std::chrono::steady_clock::now() + SPIN;
    do {
        for (int i = 0; i < 64; ++i) {
            if (done()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < end);
    return done();
}

std::atomic<Parallel> shared_parallel{nullptr};
std::atomic<MostThreads> shared_most{nullptr};

// One job on the threads of an OpenMP runtime. Its team keeps its size, since it would end and start threads to change
// it; who is too many goes home.
struct SharedJob {
    void (*work)(void*);
    void* context;
    pthread_t caller;
    std::atomic<int> places;

    static void enter(void* shared) {
        SharedJob& job = *(SharedJob*)shared;
        const bool called = pthread_equal(job.caller, pthread_self());
        if (called || job.places.fetch_sub(1, std::memory_order_relaxed) > 0) job.work(job.context);
    }
};

class Pool {
  public:
    void run(int threads, void (*work)(void*), void* context) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        // two callers on one machine gain nothing from helpers: the second works alone rather than wait
        if (threads <= 1 || !turn.owns_lock()) return work(context);
        if (const Parallel parallel = shared_parallel.load(std::memory_order_acquire)) {
            SharedJob job{work, context, pthread_self(), threads - 1};
            const int most = shared_most.load(std::memory_order_relaxed)();
            return parallel(SharedJob::enter, &job, (unsigned)(most > threads ? most : threads), 0);
        }
        grow(threads - 1);
        {
            std::lock_guard<std::mutex> guard(lock_);
            work_ = work;
            context_ = context;
            places_ = threads - 1;
            jobs_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        work(context);
        {
            std::lock_guard<std::mutex> guard(lock_);
            places_ = 0;  // whoever wakes up now finds nothing to do
        }
        if (spin_until([&] { return helping_.load(std::memory_order_acquire) == 0; })) return;
        std::unique_lock<std::mutex> guard(lock_);
        idle_.wait(guard, [&] { return helping_.load(std::memory_order_acquire) == 0; });
    }

  private:
    void grow(int wanted) {
        while (workers_ < wanted) {
            try {
                std::thread([this, seen = jobs_.load(std::memory_order_relaxed)] { help(seen); }).detach();
            } catch (const std::system_error&) {
                return;
            } catch (const std::bad_alloc&) {
                return;
            }
            ++workers_;
        }
    }

    void help(unsigned seen) {
        for (;;) {
            auto called = [&] { return jobs_.load(std::memory_order_acquire) != seen; };
            spin_until(called);
            std::unique_lock<std::mutex> guard(lock_);
            wake_.wait(guard, called);
            seen = jobs_.load(std::memory_order_relaxed);
            if (places_ == 0) continue;
            --places_;
            helping_.fetch_add(1, std::memory_order_relaxed);
            auto work = work_;
            auto context = context_;
            guard.unlock();
            work(context);
            guard.lock();
            if (helping_.fetch_sub(1, std::memory_order_release) == 1) idle_.notify_one();
        }
    }

    std::mutex turn_;  // held by the caller whose job this is
    std::mutex lock_;  // guards what follows
    std::condition_variable wake_, idle_;
    std::atomic<unsigned> jobs_{0};
    std::atomic<int> helping_{0};
    void (*work_)(void*) = nullptr;
    void* context_ = nullptr;
    int places_ = 0;
    int workers_ = 0;
};

// Never destroyed: its threads may outlive the last line of main.
alignas(Pool) unsigned char storage[sizeof(Pool)];

Pool& pool() {
    static Pool* made = [] {
        // a child has the memory of the threads but not the threads, nor whoever held the locks: it starts afresh
        pthread_atfork(nullptr, nullptr, [] {
            shared_parallel.store(nullptr);  // an OpenMP runtime waits in a child for threads that are not there
            new (storage) Pool;
        });
        return new (storage) Pool;
    }();
    return *made;
}

}  // namespace

void run_together(int threads, void (*work)(void*), void* context) { pool().run(threads, work, context); }

void use_threads_of(Parallel parallel, MostThreads most_threads) {
    pool();  // hears of forks from now on
    shared_most.store(most_threads);
    shared_parallel.store(most_threads ? parallel : nullptr, std::memory_order_release);
}

}  // namespace fastvid
