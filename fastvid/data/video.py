"""Video files in and out, through PyAV: RGB frames as torch uint8 [T, H, W, 3], one VideoError for anything wrong."""

import hashlib
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.data._decode import (
    BROKEN,
    first_picture,
    frames_of,
    opened,
    picture,
    promised_frames,
    rate_of,
    reason_of,
)
from fastvid.data._encode import Encoder
from fastvid.data._images import image_file
from fastvid.errors import VideoError

READ_BYTES = 2 << 30  # the largest video handed back at once
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".gif", ".mov", ".m4v", ".mpg", ".mpeg", ".ogv")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
WRITE_SUFFIXES = (".mp4", ".webm", ".gif")


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself, after rotation.

    frames is None where the container's word is not to be trusted (all but mp4 and mov); fps is the average rate.
    """

    path: Path
    frames: int | None
    height: int
    width: int
    fps: float


def probe_video(path: str | Path) -> VideoInfo:
    """Size, frame count and rate of a video file; only its first frame is decoded.

    path:    a file that FFmpeg can decode.
    Returns: VideoInfo; height and width in pixels after rotation metadata, fps in frames a second.
    Raises:  VideoError if the file is missing, no video, or has no frame.
    """
    with opened(path) as (container, stream):
        height, width, _ = first_picture(path, container, stream).shape
        return VideoInfo(Path(path), promised_frames(container, stream), height, width, rate_of(stream))


def count_frames(path: str | Path) -> int:
    """Frames that a video file shows, by decoding all of it: for containers that do not say.

    path:    a file that FFmpeg can decode.
    Returns: a count of at least 1.
    Raises:  VideoError if the file is missing, damaged or no video.
    """
    with opened(path) as (container, stream):
        return sum(1 for _ in frames_of(path, container, stream))


def read_video(
    path: str | Path, start: int = 0, frames: int | None = None, size: tuple[int, int] | None = None
) -> tuple[Tensor, float]:
    """Decode a video file, or `frames` frames of it from frame `start` on, in order of presentation.

    Grey, 10-bit, palette and alpha sources come out as 8-bit RGB (alpha dropped); rotation and mirror metadata are
    applied. Files with a variable frame rate give every frame once, in order. Damage is an error wherever the
    container or codec gives it away; H.264 and GIF carry no checksum, so flipped bits in them can pass as other pixels.

    path:    a file that FFmpeg can decode.
    start:   frames to skip, counted from 0.
    frames:  how many to return, exactly; None returns the rest of the file.
    size:    (height, width) of the result, each frame passed through `fit_frames`; None keeps the file's size.
    Returns: uint8 [T, H, W, 3] in 0..255, and the average rate in frames a second.
    Raises:  VideoError if the file is missing, damaged, no video, too short, or the result would exceed 2 GiB.
    """
    if start < 0 or (frames is not None and frames < 1):
        raise VideoError(f"{path}: `start` must be at least 0 and `frames` at least 1, got {start} and {frames}.")
    kept: list[Tensor] = []
    seen = 0
    with opened(path) as (container, stream):
        promised = promised_frames(container, stream)
        for frame in frames_of(path, container, stream):
            seen += 1
            if seen <= start:
                continue
            image = picture(frame)
            kept.append(fit_frames(image[None], *size)[0][0] if size else image)
            if len(kept) == 1:
                expected = frames or max(1, (promised or 1) - start)
                check_budget(path, expected, kept[0])
            if kept[-1].shape != kept[0].shape:
                raise VideoError(f"{path}: the frame size changes at frame {seen - 1}; give one size to resize all.")
            check_budget(path, len(kept), kept[0])
            if len(kept) == frames:
                break
        rate = rate_of(stream)
    if frames is not None and len(kept) < frames:
        raise VideoError(f"{path}: wanted {frames} frames from frame {start} on, but the file has {seen}.")
    if not kept:
        raise VideoError(f"{path}: nothing from frame {start} on, the file has {seen} frames.")
    return torch.stack(kept), rate


def read_image(path: str | Path) -> Tensor:
    """Decode one still image (png, jpg, bmp, webp, by its first bytes and not by its name).

    path:    an image file.
    Returns: uint8 [H, W, 3] in 0..255, RGB; EXIF orientation applied.
    Raises:  VideoError if the file is missing, damaged, above 256 MiB or no such image.
    """
    return image_file(path)


def write_video(path: str | Path, video: Tensor, fps: float = 25, lossless: bool = False) -> None:
    """Write frames as .mp4 (H.264), .webm (VP9) or .gif, by the suffix of `path`.

    The file appears whole or not at all, and equal frames give equal bytes. Odd sizes are stored without chroma
    subsampling, since 4:2:0 needs even ones. The folder must exist.

    path:     target file; an existing one is replaced.
    video:    uint8 [T, H, W, 3] in 0..255, RGB, any strides.
    fps:      frames a second, above 0 and at most 1000 (50 for .gif, whose clock ticks in hundredths).
    lossless: only .mp4: RGB H.264 without loss; reading gives the same bits back.
    Raises:   VideoError for a wrong tensor, suffix or rate, or if the file cannot be written.
    """
    try:
        _check_frames(video)
    except VideoError as error:
        raise VideoError(f"{path}: {error}") from None
    with VideoWriter(path, tuple(video.shape[1:3]), fps, lossless) as writer:
        writer.add(video)


class VideoWriter:
    """A video file that is written piece by piece and appears whole, or, after an exception, not at all.

    with VideoWriter("out.mp4", (64, 64)) as writer: writer.add(frames)

    path:     target file, .mp4 (H.264), .webm (VP9) or .gif; an existing one is replaced when the block ends.
    size:     (height, width) of every frame. fps, lossless: as in `write_video`.
    Raises:   VideoError for a wrong suffix or rate, frames of another size, no frames, or where the disk refuses.
    """

    def __init__(self, path: str | Path, size: tuple[int, int], fps: float = 25, lossless: bool = False):
        self.path, self.size = Path(path), size
        _check_writable(self.path, fps, lossless)
        # a random name: two processes may write the same clip at once
        name = f".{self.path.stem[:40]}.{secrets.token_hex(6)}{self.path.suffix.lower()}"
        self._temporary = self.path.absolute().with_name(name)
        try:
            with self._failing():
                self._encoder = Encoder(self._temporary, *size, Fraction(fps).limit_denominator(10_000), lossless)
        except BaseException:
            self._temporary.unlink(missing_ok=True)
            raise

    def add(self, video: Tensor) -> None:
        """Write the next frames, uint8 [T, H, W, 3] in 0..255, any strides. Raises VideoError as the class says."""
        _check_frames(video)
        if tuple(video.shape[1:3]) != tuple(self.size):
            raise VideoError(f"{self.path}: frames must be {list(self.size)} as said, got {list(video.shape[1:3])}.")
        with self._failing():
            self._encoder.add(video)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            if kind is None:
                with self._failing():
                    if not self._encoder.count:
                        raise VideoError(f"{self.path}: a video needs at least one frame, got none.")
                    self._encoder.finish()
                    os.replace(self._temporary, self.path)
        finally:
            self._encoder.abandon()
            self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except VideoError:
            raise
        except BROKEN as error:
            raise VideoError(f"{self.path}: cannot be written: {reason_of(error)}.") from error


def fit_frames(video: Tensor, height: int, width: int) -> tuple[Tensor, str | None]:
    """Crop the centre to the aspect of the target, then resize with antialiasing.

    Whole-number shrinking takes the mean of each block of pixels, rounded half up; any other factor uses antialiased
    bilinear interpolation. Frames are treated one by one, so a clip fits as its frames do.

    video:         uint8 [T, H, W, 3] in 0..255.
    height, width: target size in pixels, at least 1.
    Returns:       uint8 [T, height, width, 3], and a note such as "cropped 1280x720 to 720x720 (centre) and resized
                   to 64x64" (width x height), or None if nothing was done.
    Raises:        VideoError for a wrong tensor or size.
    """
    _check_frames(video)
    if height < 1 or width < 1:
        raise VideoError(f"fit_frames: the target must be at least 1x1, got {width}x{height} (width x height).")
    rows, columns = video.shape[1:3]
    # the largest box of the target's aspect, in integers so that an exact fit crops nothing
    box = min(rows, max(1, round(columns * height / width))), min(columns, max(1, round(rows * width / height)))
    notes = []
    if box != (rows, columns):
        top, left = (rows - box[0]) // 2, (columns - box[1]) // 2
        video = video[:, top : top + box[0], left : left + box[1]]
        notes.append(f"cropped {columns}x{rows} to {box[1]}x{box[0]} (centre)")
    if box != (height, width):
        video = _resize(video, height, width)
        notes.append(f"resized to {width}x{height}")
    return video.contiguous(), " and ".join(notes) or None


def check_budget(path: str | Path, frames: int, image: Tensor) -> None:
    """Refuse so many frames like `image` [H, W, 3] where they exceed the bytes read at once. Raises VideoError."""
    if frames * image.numel() > READ_BYTES:
        height, width, _ = image.shape
        raise VideoError(
            f"{path}: {frames} frames of {width}x{height} exceed the limit of {READ_BYTES} bytes; "
            f"pass frames= (at most {READ_BYTES // image.numel()}) or a smaller size=."
        )


def frame_hash(video: Tensor) -> str:
    """sha256 of a video's shape and pixels, the same on every machine.

    video:   uint8 [T, H, W, 3], any strides.
    Returns: 64 hexadecimal digits.
    Raises:  VideoError for a wrong tensor.
    """
    _check_frames(video)
    digest = FrameHash(tuple(video.shape))
    digest.add(video)
    return digest.hexdigest()


class FrameHash:
    """`frame_hash` of a video that comes piece by piece.

    shape:  (T, H, W, 3) of the whole. Raises ValueError in `hexdigest` if another number of pixels was added.
    """

    def __init__(self, shape: tuple[int, int, int, int]):
        self._digest = hashlib.sha256(repr(tuple(shape)).encode())
        self._missing = math.prod(shape)

    def add(self, video: Tensor) -> None:
        """The next frames, uint8 [t, H, W, 3], any strides."""
        self._digest.update(video.contiguous().cpu().numpy())
        self._missing -= video.numel()

    def hexdigest(self) -> str:
        """64 hexadecimal digits, once all frames were added."""
        if self._missing:
            raise ValueError(f"FrameHash: {self._missing} more bytes were promised than added.")
        return self._digest.hexdigest()


def _check_frames(video: Tensor) -> None:
    if not isinstance(video, Tensor) or video.dtype != torch.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        what = f"{video.dtype} {list(video.shape)}" if isinstance(video, Tensor) else type(video).__name__
        raise VideoError(f"a video must be torch.uint8 [T, H, W, 3], got {what}.")
    if 0 in video.shape:
        raise VideoError(f"a video needs at least one frame and one pixel, got {list(video.shape)}.")


def _check_writable(path: Path, fps: float, lossless: bool) -> None:
    suffix = path.suffix.lower()
    if suffix not in WRITE_SUFFIXES:
        raise VideoError(f"{path}: cannot write '{suffix}', use one of {', '.join(WRITE_SUFFIXES)}.")
    if lossless and suffix != ".mp4":
        raise VideoError(f"{path}: lossless video is written as .mp4 only, got '{suffix}'.")
    fastest = 50 if suffix == ".gif" else 1000
    if not (math.isfinite(fps) and 0.01 <= fps <= fastest):
        raise VideoError(f"{path}: fps must be from 0.01 to {fastest} for '{suffix}', got {fps}.")
    if path.is_dir():
        raise VideoError(f"{path}: is a folder, not a file to write.")
    if not path.parent.is_dir():
        raise VideoError(f"{path}: the folder {path.parent} does not exist; make it first.")


def _resize(video: Tensor, height: int, width: int) -> Tensor:
    frames, rows, columns, _ = video.shape
    if rows % height == 0 and columns % width == 0:
        y, x = rows // height, columns // width
        blocks = video.reshape(frames, height, y, width, x, 3).sum(dim=(2, 4), dtype=torch.int32)
        return ((blocks + y * x // 2) // (y * x)).to(torch.uint8)
    pictures = video.permute(0, 3, 1, 2)  # [T, 3, H, W], channels last: no copy
    resized = F.interpolate(pictures, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return resized.permute(0, 2, 3, 1)
