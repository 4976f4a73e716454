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

class Pool {
  public:
    void run(int threads, void (*work)(void*), void* context) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        // two callers on one machine gain nothing from helpers: the second works alone rather than wait
        if (threads <= 1 || !turn.owns_lock()) return work(context);
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
        pthread_atfork(nullptr, nullptr, [] { new (storage) Pool; });
        return new (storage) Pool;
    }();
    return *made;
}

}  // namespace

void run_together(int threads, void (*work)(void*), void* context) { pool().run(threads, work, context); }

}  // namespace fastvid
