"""Drawing grids of codes, one after the other: from a gated PixelCNN at full speed, or from any causal module."""

from fastvid.sampling.gated import code_loglikelihood, pack_stack, sample, sample_grid, sample_naive
from fastvid.sampling.noise import Noise

__all__ = ["Noise", "code_loglikelihood", "pack_stack", "sample", "sample_grid", "sample_naive"]
