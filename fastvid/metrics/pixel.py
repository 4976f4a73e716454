"""Frame by frame likeness of two videos: PSNR and SSIM, each in the two readings that papers use."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA = 1.5  # of the Gaussian window of SSIM, in pixels
WINDOWS = {"gaussian11": 11, "uniform7": 7}  # sides in pixels
CHANNELS = ("joint", "mean")
K1, K2 = 0.01, 0.03
_PIXELS_AT_ONCE = 1 << 20  # of each of the two: bounds the float64 maps that are held, about a dozen by SSIM


def psnr(a: Tensor, b: Tensor, channels: str = "joint") -> Tensor:
    """Peak signal-to-noise ratio of each frame.

    a, b:     [..., C, H, W], floating, the same shape, values in [0, 1].
    channels: "joint" takes one squared error over all channels (tf.image); "mean" averages the ratios of the channels
              (SVG and its family), which is never lower.
    Returns:  [...] float64 in dB for a peak of 1; infinite where two frames (or, for "mean", channels) are equal.
    Raises:   ValueError for other dtypes or words, or shapes that differ or hold no pixel.
    """
    _check("psnr", a, b)
    if channels not in CHANNELS:
        raise ValueError(f"psnr: `channels` must be one of {', '.join(CHANNELS)}, got {channels!r}.")
    error = _of_planes(lambda x, y: (x - y).square(), a, b)  # [..., C]
    if channels == "joint":
        error = error.mean(dim=-1, keepdim=True)
    return (-10.0 * torch.log10(error)).mean(dim=-1)


def ssim(a: Tensor, b: Tensor, window: str = "gaussian11", data_range: float = 1.0) -> Tensor:
    """Structural similarity of each frame, the mean over channels and over every place where the window fits.

    a, b:       [..., C, H, W], floating, the same shape, values in [0, 1]; H and W at least the window's side.
    window:     "gaussian11": sigma 1.5, as first published and as in tf.image. "uniform7": flat, with the covariance
                of a sample (49/48), as scikit-image has it by default and SVG and its family report it.
    data_range: the peak L. That family left it out, for which scikit-image of the time took 2 for floats: their
                figures need data_range=2.0, which hides small differences and comes out higher.
    Returns:    [...] float64 in [-1, 1], 1 for equal frames, computed in float64.
    Raises:     ValueError for other dtypes or words, shapes that differ, frames smaller than the window, a range
                that is not positive.
    Source:     Wang, Bovik, Sheikh, Simoncelli 2004, doi:10.1109/TIP.2003.819861, with K1 = 0.01, K2 = 0.03.
    """
    _check("ssim", a, b)
    if window not in WINDOWS or not data_range > 0:
        raise ValueError(
            f"ssim: wanted `window` of {', '.join(WINDOWS)} and `data_range` above 0, got {window!r} and {data_range}."
        )
    H, W = a.shape[-2:]
    side = WINDOWS[window]
    if H < side or W < side:
        raise ValueError(f"ssim: frames must be at least {side}x{side}, got {H}x{W}; use psnr for smaller ones.")
    return _of_planes(lambda x, y: _ssim_map(x, y, window, data_range), a, b).mean(dim=-1)


def _of_planes(to_map: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Mean of a map [N, 1, h, w] over each plane of frames [..., C, H, W], a few planes at a time -> [..., C]."""
    H, W = a.shape[-2:]
    at_once = max(1, _PIXELS_AT_ONCE // (H * W))
    pairs = zip(*(x.reshape(-1, 1, H, W).split(at_once) for x in (a, b)), strict=True)
    return torch.cat([to_map(x.double(), y.double()).mean(dim=(1, 2, 3)) for x, y in pairs]).reshape(a.shape[:-2])


def _ssim_map(a: Tensor, b: Tensor, window: str, data_range: float) -> Tensor:
    """[N, 1, H, W] float64, twice -> [N, 1, H - side + 1, W - side + 1]."""
    weights = _weights(window, a)
    side = len(weights)
    sample = side**2 / (side**2 - 1) if window == "uniform7" else 1.0
    mean_a, mean_b = _blur(a, weights), _blur(b, weights)
    variance_a = sample * (_blur(a * a, weights) - mean_a * mean_a)
    variance_b = sample * (_blur(b * b, weights) - mean_b * mean_b)
    covariance = sample * (_blur(a * b, weights) - mean_a * mean_b)
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return likeness / ((mean_a * mean_a + mean_b * mean_b + c1) * (variance_a + variance_b + c2))


def _weights(window: str, like: Tensor) -> Tensor:
    side = WINDOWS[window]
    offsets = torch.arange(side, dtype=like.dtype, device=like.device) - side // 2
    weights = torch.exp(-0.5 * (offsets / SIGMA) ** 2) if window == "gaussian11" else torch.ones_like(offsets)
    return weights / weights.sum()


def _blur(x: Tensor, weights: Tensor) -> Tensor:
    return F.conv2d(F.conv2d(x, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def _check(name: str, a: Tensor, b: Tensor) -> None:
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(f"{name}: `a` and `b` must be floating, in [0, 1], got {a.dtype} and {b.dtype}.")
    if a.shape != b.shape or a.ndim < 3 or a.numel() == 0:
        raise ValueError(
            f"{name}: `a` and `b` must both be [..., C, H, W] with pixels in them, got {list(a.shape)} and "
            f"{list(b.shape)}."
        )
