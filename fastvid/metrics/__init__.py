"""How close frames are to the truth, how many bits a code costs, and how sure a figure is."""

from fastvid.metrics.best_of import BestOf, best_of
from fastvid.metrics.codes import (
    CodebookUsage,
    ContextFreeBits,
    CopyBits,
    bits_per_code,
    bits_per_dim,
    code_perplexity,
    codebook_usage,
    context_free_bits,
    copy_bits,
    unigram,
)
from fastvid.metrics.interval import bootstrap_interval
from fastvid.metrics.lpips import LPIPS
from fastvid.metrics.pixel import psnr, ssim

__all__ = [
    "LPIPS", "BestOf", "CodebookUsage", "ContextFreeBits", "CopyBits", "best_of", "bits_per_code", "bits_per_dim",
    "bootstrap_interval", "code_perplexity", "codebook_usage", "context_free_bits", "copy_bits", "psnr", "ssim",
    "unigram",
]
