// What the entries of every room share: element types and outcomes.
#pragma once

#include <cstdint>

namespace fastvid {

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// 0, or what went wrong.
enum Outcome : int32_t { DONE = 0, NO_MEMORY = 1, BAD_ARGUMENT = 2 };

}  // namespace fastvid
