// Attention inside boxes on the CPU. README.md beside this file has the design; compiled once per instruction set level
// (see common/simd.h).
#include "axial_attention/cpu.h"

namespace fastvid::FASTVID_LEVEL {

Outcome axial_attention(const AttentionCall&) { return BAD_ARGUMENT; }

}  // namespace fastvid::FASTVID_LEVEL
