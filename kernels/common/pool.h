// A few threads that help the caller with one job at a time.
#pragma once

namespace fastvid {

// Runs work(context) on the calling thread and on up to `threads` - 1 others at once, and returns when all have
// finished. How many others come is not promised (none when the pool serves another caller, or when the system has
// no thread to spare), so `work` takes pieces from a counter in its context until none is left, and never throws.
void run_together(int threads, void (*work)(void* context), void* context);

}  // namespace fastvid
