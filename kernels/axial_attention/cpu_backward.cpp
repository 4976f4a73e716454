// The gradients of attention inside boxes on the CPU; compiled once per instruction set level (see common/simd.h).
#include "axial_attention/cpu.h"

namespace fastvid::FASTVID_LEVEL {

Outcome axial_attention_backward(const AttentionGradCall&) { return BAD_ARGUMENT; }

}  // namespace fastvid::FASTVID_LEVEL
