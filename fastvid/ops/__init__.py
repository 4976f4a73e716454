"""Functional ops. Each is documented and checked here and defined by its room in kernels/."""

from fastvid.ops._op import OPS, Op, backend, served
from fastvid.ops.conv import causal_conv, gate
from fastvid.ops.sample import Packed, Sampled, draw, gumbel_row, pack_pixelcnn, pixelcnn_sample
from fastvid.ops.vq import Nearest, nearest_codebook, nearest_codebook_ema_

REFERENCE_ONLY = ("causal_conv", "draw", "gate", "gumbel_row")  # ops that have no other backend yet

__all__ = [
    "OPS", "REFERENCE_ONLY", "Nearest", "Op", "Packed", "Sampled", "backend", "causal_conv", "draw", "gate",
    "gumbel_row", "nearest_codebook", "nearest_codebook_ema_", "pack_pixelcnn", "pixelcnn_sample", "served",
]  # fmt: skip
