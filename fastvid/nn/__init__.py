"""Drop-in torch modules."""

from fastvid.nn.attention import CausalAttention3d
from fastvid.nn.axial import AxialAttention, AxialBlock, AxisAttention, SelfAttention
from fastvid.nn.block_local import BlockLocalAttention
from fastvid.nn.codebook import perplexity
from fastvid.nn.conditional_norm import ConditionalBatchNorm, frozen_statistics, standing_statistics
from fastvid.nn.conv import GatedCausalConv3d
from fastvid.nn.conv_gru import ConvGRU
from fastvid.nn.conv_lstm import ConvLSTM
from fastvid.nn.dense import Conv3d, ResidualBlock3d
from fastvid.nn.gated import GatedPixelBlock, GatedPixelStack, GatedStackConfig, code_loss
from fastvid.nn.image_conv import Conv2d
from fastvid.nn.live_kernel import raster_taps
from fastvid.nn.masked import DenseMasked, DenseMaskedConv2d, DenseMaskedConv3d, MaskedConv2d, MaskedConv3d
from fastvid.nn.quantize import VectorQuantize
from fastvid.nn.separable import SeparableAttention
from fastvid.nn.spectral import SpectralNorm, orthogonal_init_, spectral_norm, spectral_norm_all, spectral_norms

__all__ = [
    "AxialAttention", "AxialBlock", "AxisAttention", "BlockLocalAttention", "CausalAttention3d", "Conv3d", "ConvGRU",
    "ConvLSTM", "DenseMasked", "DenseMaskedConv2d", "DenseMaskedConv3d", "GatedCausalConv3d", "GatedPixelBlock",
    "GatedPixelStack", "GatedStackConfig", "MaskedConv2d", "MaskedConv3d", "ResidualBlock3d", "SelfAttention",
    "SeparableAttention", "SpectralNorm", "VectorQuantize", "code_loss", "orthogonal_init_", "perplexity",
    "raster_taps", "spectral_norm", "spectral_norm_all", "spectral_norms",
    "ConditionalBatchNorm", "frozen_statistics", "standing_statistics",
    "Conv2d",
]
