// Memory that one call needs while it runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "common/simd.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// Cuts aligned arrays out of one allocation. Run once without memory to learn the size.
struct Cutter {
    char* base = nullptr;
    size_t used = 0;

    template <class T>
    T* cut(int64_t count) {
        char* at = base + used;
        used += ((size_t)count * sizeof(T) + 63) / 64 * 64;
        return base ? (T*)at : nullptr;
    }
};

struct Memory {
    void* block = nullptr;

    bool take(size_t size) { return posix_memalign(&block, 64, size ? size : 64) == 0; }
    ~Memory() { free(block); }
};

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
