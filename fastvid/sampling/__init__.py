"""Drawing grids of codes, one after the other: from a gated PixelCNN at full speed, or from any causal module."""

from fastvid.sampling.conv_steps import ConvCache, ConvSteps
from fastvid.sampling.gated import code_loglikelihood, pack_stack, sample, sample_grid, sample_naive
from fastvid.sampling.noise import Noise
from fastvid.sampling.steps import ForwardSteps, StackSteps, StepwiseModel, check_steps, sample_steps

__all__ = [
    "ConvCache", "ConvSteps", "ForwardSteps", "Noise", "StackSteps", "StepwiseModel", "check_steps",
    "code_loglikelihood", "pack_stack", "sample", "sample_grid", "sample_naive", "sample_steps",
]  # fmt: skip
