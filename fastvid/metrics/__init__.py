"""How close frames are to the truth, how many bits a code costs, and how sure a figure is."""

from fastvid.metrics.codes import (
    ContextFreeBits,
    CopyBits,
    bits_per_code,
    code_perplexity,
    context_free_bits,
    copy_bits,
    unigram,
)
from fastvid.metrics.interval import bootstrap_interval
from fastvid.metrics.lpips import LPIPS
from fastvid.metrics.pixel import psnr, ssim

__all__ = [
    "LPIPS", "ContextFreeBits", "CopyBits", "bits_per_code", "bootstrap_interval", "code_perplexity",
    "context_free_bits", "copy_bits", "psnr", "ssim", "unigram",
]
