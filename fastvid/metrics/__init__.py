"""How close frames are to the truth, how far a set of clips is from another, what a code costs, how sure a figure is.

Networks that a metric needs come from `fastvid.weights`; nothing is loaded on import.
"""

from fastvid.metrics.best_of import BestOf, best_of
from fastvid.metrics.codes import (
    ContextFreeBits,
    CopyBits,
    bits_per_code,
    bits_per_dim,
    code_perplexity,
    context_free_bits,
    copy_bits,
    unigram,
)
from fastvid.metrics.frechet import Moments, bootstrap_frechet, frechet_distance, frechet_from_features
from fastvid.metrics.i3d import I3D, I3DOutput, features, preprocess
from fastvid.metrics.inception import inception_score
from fastvid.metrics.interval import bootstrap_interval
from fastvid.metrics.lpips import LPIPS
from fastvid.metrics.pixel import psnr, ssim

__all__ = [
    "I3D", "LPIPS", "BestOf", "ContextFreeBits", "CopyBits", "I3DOutput", "Moments", "best_of", "bits_per_code",
    "bits_per_dim", "bootstrap_frechet", "bootstrap_interval", "code_perplexity", "context_free_bits", "copy_bits",
    "features", "frechet_distance", "frechet_from_features", "inception_score", "preprocess", "psnr", "ssim", "unigram",
]
