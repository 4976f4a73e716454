"""Stochastic moving digits: real handwritten digits, two or one, drift over black and bounce off the walls.

A stand-in for stochastic Moving MNIST that needs no download: the 1,797 digits of 8x8 pixels that come with
scikit-learn, enlarged to 7/16 of the frame. After every bounce the digit gets a new random velocity, so the future is
known between bounces and not across them. Clips of the train split show the first 1,437 digits, clips of the test
split the other 360, so a test clip holds no handwriting seen in training. The value of a
lone digit is its clip's class.
"""

from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastvid.data.seeds import SPLITS, check_request, split_of
from fastvid.errors import DataError

__all__ = ["OPTIONS", "SPLITS", "VERSION", "check_options", "labels", "make_clip"]

VERSION = 1
FPS = 25.0
OPTIONS = {"count": "digits in a clip: 2, or 1, whose value is then the clip's class"}
_COUNTS = {"1": 1, "2": 2}
_TRAIN_IMAGES = 1437
_DRAWS = 4  # a frame needs at most four numbers a digit: a new velocity at a wall in y and one at a wall in x


def make_clip(seed: int, frames: int = 30, size: tuple[int, int] = (64, 64), count: int = 2) -> Tensor:
    """Draw one clip; the same seed gives the same bytes everywhere, and a shorter clip is the start of a longer one.

    seed:    in one of SPLITS. frames: T, at least 1. size: (H, W), at least 16 pixels a side.
    count:   digits in the clip, 1 or 2.
    Returns: uint8 [T, H, W, 3], grey as RGB, 0..255; speeds reach min(H, W) / 16 pixels a frame along each axis.
    Raises:  DataError for a seed outside the splits, no frames, too small a size, another count, scikit-learn missing.
    Source:  bounce rules of stochastic Moving MNIST, Denton and Fergus 2018, arXiv:1802.07687; digits: UCI optical
             recognition of handwritten digits, Alpaydin and Kaynak 1998.
    """
    check_request("digits", frames, size)
    if count not in _COUNTS.values():
        raise DataError(f"digits: `count` must be 1 or 2 digits in a clip, got {count}.")
    split = split_of("digits", seed)
    side = min(size) * 7 // 16
    bits = _bits(seed, (1 + frames) * count * _DRAWS).reshape(1 + frames, count, _DRAWS)
    images = _images(split)
    canvas = np.zeros((frames, *size), dtype=np.uint16)
    for digit in range(count):
        image = _enlarge(images[bits[0, digit, 0] % len(images)], side)
        path = _path(bits[:, digit].tolist(), size[0] - side, size[1] - side, max(1, min(size) // 16))
        for frame, (y, x) in zip(canvas, path, strict=True):
            frame[y : y + side, x : x + side] += image
    video = torch.from_numpy(np.minimum(canvas, 255).astype(np.uint8))  # [T, H, W]
    return video[..., None].expand(*video.shape, 3).contiguous()


def check_options(options: dict[str, str]) -> dict[str, int]:
    """What `digits?count=1` says, as arguments of `make_clip`.

    options: as text, keys of OPTIONS alone.
    Returns: {} or {"count": 1 or 2}.
    Raises:  DataError for another count.
    Source:  own notation.
    """
    if options.get("count", "2") not in _COUNTS:
        raise DataError(f"digits: count must be 1 or 2, got '{options['count']}'.")
    return {key: _COUNTS[value] for key, value in options.items()}


def labels(seeds: Iterable[int], count: int = 2) -> list[str] | None:
    """The class of each clip: the value of its only digit.

    seeds:   of one or more splits. count: digits in a clip.
    Returns: "0" to "9" for each seed; None for clips of two digits, which have no class.
    Raises:  DataError for a seed outside the splits, or scikit-learn missing.
    Source:  targets of the UCI digits, as for `make_clip`.
    """
    if count != 1:
        return None
    known = {split: _values(split) for split in SPLITS}
    values = (known[split_of("digits", seed)] for seed in seeds)
    return [str(of[_bits(seed, 1)[0] % len(of)]) for seed, of in zip(seeds, values, strict=True)]


def _bits(seed: int, numbers: int) -> np.ndarray:
    """The first int64 numbers of a clip, each of 31 random bits."""
    # raw counter-based bits: numpy promises their stream for ever, unlike that of its drawing functions
    return (np.random.Philox(key=[seed, VERSION]).random_raw(numbers) >> np.uint64(33)).astype(np.int64)


def _path(bits: list[list[int]], height: int, width: int, fastest: int) -> list[tuple[int, int]]:
    """Top left corners, one a frame; `height` and `width` are the room that the corner has."""
    _, start_y, start_x, velocity = bits[0]
    y, x = start_y % height, start_x % width
    dy, dx = _any(velocity, fastest), _any(velocity // 1000, fastest)
    corners = []
    for a, b, c, d in bits[1:]:
        if not 0 <= y < height:
            dy, dx = _away(a, fastest, y), _any(b, fastest)
            y = min(max(y, 0), height - 1)
        if not 0 <= x < width:
            dx, dy = _away(c, fastest, x), _any(d, fastest)
            x = min(max(x, 0), width - 1)
        corners.append((y, x))
        y, x = y + dy, x + dx
    return corners


def _any(bits: int, fastest: int) -> int:
    return bits % (2 * fastest + 1) - fastest


def _away(bits: int, fastest: int, position: int) -> int:
    speed = 1 + bits % fastest
    return speed if position < 0 else -speed


def _enlarge(image: np.ndarray, side: int) -> np.ndarray:
    """Bilinear enlargement [8, 8] in 0..16 -> uint16 [side, side] in 0..255, in integers: exact on every machine."""
    weights = _weights(side)
    grey = weights @ image @ weights.T * 255
    whole = 16 * (2 * side) ** 2
    return ((2 * grey + whole) // (2 * whole)).astype(np.uint16)


@cache
def _weights(side: int) -> np.ndarray:
    """Bilinear weights [side, 8] in units of 1 / (2 side), edges repeated."""
    weights = np.zeros((side, 8), dtype=np.int64)
    for i in range(side):
        place = min(max((2 * i + 1) * 8 - side, 0), 7 * 2 * side)  # centre of pixel i, in the same units
        low, rest = divmod(place, 2 * side)
        weights[i, low] += 2 * side - rest
        weights[i, min(low + 1, 7)] += rest
    return weights


def _images(split: str) -> np.ndarray:
    return _handwriting(split)[0]


def _values(split: str) -> np.ndarray:
    return _handwriting(split)[1]


@cache
def _handwriting(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images int64 [N, 8, 8] in 0..16 and their values [N] of one split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits: wanted scikit-learn for its handwritten digits; pip install scikit-learn") from error
    digits = load_digits()
    own = slice(_TRAIN_IMAGES) if split == "train" else slice(_TRAIN_IMAGES, None)
    return digits.images.astype(np.int64)[own], digits.target[own]
