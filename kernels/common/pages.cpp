#include "common/pages.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastvid {

void expect_to_fill(void* memory, size_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t HUGE_PAGE = 2 << 20;
    const uintptr_t begin = ((uintptr_t)memory + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
    const uintptr_t end = ((uintptr_t)memory + bytes) & ~(HUGE_PAGE - 1);
    if (begin < end) (void)madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // a hint: failure costs nothing
#else
    (void)memory, (void)bytes;
#endif
}

}  // namespace fastvid
