// The gradients of the gated convolution on the CPU, apart from the input's, which is a convolution again (cpu.cpp).
// Compiled once per instruction set level (see common/simd.h).
#include "gated_causal_conv/cpu.h"

namespace fastvid::FASTVID_LEVEL {

Outcome gate_backward(const GateCall&) { return BAD_ARGUMENT; }

Outcome weight_gradient(const WeightGradCall&) { return BAD_ARGUMENT; }

}  // namespace fastvid::FASTVID_LEVEL
