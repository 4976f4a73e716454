"""Functional ops. Each is documented and checked here and defined by its room in kernels/."""

from fastvid.kernels.pixelcnn_sampler.packed import Packed
from fastvid.kernels.pixelcnn_sampler.session import Progress, Sampled
from fastvid.ops._op import OPS, Op, backend, served
from fastvid.ops.attention import (
    Attended,
    AttentionGradients,
    axial_attention,
    axial_attention_backward,
    axial_self_attention,
    relative_bias,
)  # fmt: skip
from fastvid.ops.conv import ConvGradients, Gated, causal_conv, gate, gated_causal_conv, gated_causal_conv_backward
from fastvid.ops.gru import ConvGRUGradients, ConvGRUStates, conv_gru, conv_gru_backward
from fastvid.ops.image import ImageConvGradients, image_conv, image_conv_backward
from fastvid.ops.norm import (
    FrameMoments,
    Normed,
    NormGradients,
    conditional_batch_norm,
    conditional_norm,
    conditional_norm_backward,
    frame_moments,
)  # fmt: skip
from fastvid.ops.sample import draw, gumbel_row, pack_pixelcnn, pixelcnn_sample, pixelcnn_session
from fastvid.ops.spectral import SpectralNormed, spectral_norm, spectral_norm_backward
from fastvid.ops.vq import Nearest, nearest_codebook, nearest_codebook_ema_

REFERENCE_ONLY = ("draw", "gate")  # ops that have no other backend yet

__all__ = [
    "OPS", "REFERENCE_ONLY", "Attended", "AttentionGradients", "ConvGRUGradients", "ConvGRUStates", "ConvGradients",
    "Gated", "Nearest", "Op", "Packed", "Progress", "Sampled", "SpectralNormed", "axial_attention",
    "axial_attention_backward", "axial_self_attention", "backend", "causal_conv", "conv_gru", "conv_gru_backward",
    "draw", "gate", "gated_causal_conv", "gated_causal_conv_backward", "gumbel_row", "nearest_codebook",
    "nearest_codebook_ema_", "pack_pixelcnn", "pixelcnn_sample", "pixelcnn_session", "relative_bias", "served",
    "spectral_norm", "spectral_norm_backward",
    "FrameMoments", "NormGradients", "Normed", "conditional_batch_norm", "conditional_norm",
    "conditional_norm_backward", "frame_moments",
    "ImageConvGradients", "image_conv", "image_conv_backward",
]  # fmt: skip
