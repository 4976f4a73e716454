// Hints about memory. They change no value, only what the system does when a page is first touched.
#pragma once

#include <cstddef>

namespace fastvid {

// All of these bytes are about to be written: large ones are best backed by huge pages, which cost one fault
// instead of 512.
void expect_to_fill(void* memory, size_t bytes);

}  // namespace fastvid
