// Attention inside boxes with its projections on the CPU; compiled once per instruction set level (see common/simd.h).
#include "axial_attention/cpu.h"

namespace fastvid::FASTVID_LEVEL {

Outcome axial_self_attention(const SelfAttentionCall&) { return BAD_ARGUMENT; }

}  // namespace fastvid::FASTVID_LEVEL
