// A few threads that help the caller with one job at a time.
#pragma once

namespace fastvid {

// Runs work(context) on the calling thread and on up to `threads` - 1 others at once, and returns when all have
// finished. How many others come is not promised (none when the pool serves another caller, or when the system has
// no thread to spare), so `work` takes pieces from a counter in its context until none is left, and never throws.
void run_together(int threads, void (*work)(void* context), void* context);

// The OpenMP runtime of the process, whose threads are then the ones that help: GOMP_parallel and omp_get_max_threads.
using Parallel = void (*)(void (*work)(void*), void* context, unsigned threads, unsigned flags);
using MostThreads = int (*)();

// From now on helpers are those of this runtime; null: those of a pool of our own. Threads of one runtime look out for
// the next job for milliseconds on processors that helpers of another would have to share with them.
void use_threads_of(Parallel parallel, MostThreads most_threads);

}  // namespace fastvid
