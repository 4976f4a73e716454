// The gated convolution on the CPU. Compiled once per instruction set level (see common/simd.h).
#include "gated_causal_conv/cpu.h"

namespace fastvid::FASTVID_LEVEL {

Outcome gated_causal_conv(const ConvCall&) { return BAD_ARGUMENT; }

}  // namespace fastvid::FASTVID_LEVEL
