"""Frame by frame likeness of two videos: PSNR and SSIM."""

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5  # the Gaussian window of SSIM, in pixels
K1, K2 = 0.01, 0.03
_PLANES_AT_ONCE = 4096  # bounds the float64 maps that SSIM keeps


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame.

    a, b:    [..., C, H, W], floating, the same shape, values in [0, 1].
    Returns: [...] float64 in dB for a peak of 1; infinite where two frames are equal.
    Raises:  ValueError for other dtypes, or shapes that differ or hold no pixel.
    """
    _check("psnr", a, b)
    error = (a.double() - b.double()).square().mean(dim=(-3, -2, -1))
    return -10.0 * torch.log10(error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each frame, the mean over channels and over every place where the window fits.

    a, b:    [..., C, H, W], floating, the same shape, values in [0, 1]; H and W at least 11.
    Returns: [...] float64 in [-1, 1], 1 for equal frames. Window 11x11, Gaussian with sigma 1.5, computed in float64.
    Raises:  ValueError for other dtypes, shapes that differ, or frames smaller than the window.
    Source:  Wang, Bovik, Sheikh, Simoncelli 2004, doi:10.1109/TIP.2003.819861, with K1 = 0.01, K2 = 0.03, peak 1.
    """
    _check("ssim", a, b)
    H, W = a.shape[-2:]
    if H < WINDOW or W < WINDOW:
        raise ValueError(f"ssim: frames must be at least {WINDOW}x{WINDOW}, got {H}x{W}; use psnr for smaller ones.")
    planes = zip(a.reshape(-1, 1, H, W).split(_PLANES_AT_ONCE), b.reshape(-1, 1, H, W).split(_PLANES_AT_ONCE),
                 strict=True)
    means = torch.cat([_ssim_map(x.double(), y.double()).mean(dim=(1, 2, 3)) for x, y in planes])
    return means.reshape(a.shape[:-2]).mean(dim=-1)


def _ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """[N, 1, H, W] float64, twice -> [N, 1, H - 10, W - 10]."""
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a = _blur(a * a) - mean_a * mean_a
    variance_b = _blur(b * b) - mean_b * mean_b
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return likeness / ((mean_a * mean_a + mean_b * mean_b + c1) * (variance_a + variance_b + c2))


def _blur(x: Tensor) -> Tensor:
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    weights = weights / weights.sum()
    return F.conv2d(F.conv2d(x, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def _check(name: str, a: Tensor, b: Tensor) -> None:
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(f"{name}: `a` and `b` must be floating, in [0, 1], got {a.dtype} and {b.dtype}.")
    if a.shape != b.shape or a.ndim < 3 or a.numel() == 0:
        raise ValueError(
            f"{name}: `a` and `b` must both be [..., C, H, W] with pixels in them, got {list(a.shape)} and "
            f"{list(b.shape)}."
        )
