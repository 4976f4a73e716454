"""Drop-in torch modules."""

from fastvid.nn.attention import CausalAttention
from fastvid.nn.codebook import perplexity
from fastvid.nn.conv import ResidualBlock3d
from fastvid.nn.gated import CausalConv, GatedPixelLayer, GatedPixelStack, GatedStackConfig, code_loss
from fastvid.nn.quantize import VectorQuantize

__all__ = [
    "CausalAttention", "CausalConv", "GatedPixelLayer", "GatedPixelStack", "GatedStackConfig", "ResidualBlock3d",
    "VectorQuantize", "code_loss", "perplexity",
]
