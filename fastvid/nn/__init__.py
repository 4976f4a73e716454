"""Drop-in torch modules."""

from fastvid.nn.attention import CausalAttention
from fastvid.nn.codebook import perplexity
from fastvid.nn.conv import GatedCausalConv3d, ResidualBlock3d, raster_taps
from fastvid.nn.gated import CausalConv, GatedPixelLayer, GatedPixelStack, GatedStackConfig, code_loss
from fastvid.nn.quantize import VectorQuantize

__all__ = [
    "CausalAttention", "CausalConv", "GatedCausalConv3d", "GatedPixelLayer", "GatedPixelStack", "GatedStackConfig",
    "ResidualBlock3d", "VectorQuantize", "code_loss", "perplexity", "raster_taps",
]
