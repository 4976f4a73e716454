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

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.errors import VideoError

READ_BYTES = 2 << 30  # the largest video handed back at once
FRAME_PIXELS = 1 << 25  # 8K UHD passes; a header that claims 30,000 x 30,000 must not reach the allocator
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".gif", ".mov", ".m4v", ".mpg", ".mpeg", ".ogv")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
WRITE_SUFFIXES = (".mp4", ".webm", ".gif")

# Only plain containers and local files: a playlist renamed to .mp4 must not make FFmpeg open other files or the network
_SAFE = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,mpegvideo,ogg,flv,asf,h264,hevc,"
    "m4v,ivf,yuv4mpegpipe,png_pipe,jpeg_pipe,bmp_pipe,webp_pipe,wav,mp3,aac,flac",
}
# what PyAV raises for a bad file; a bug of ours (TypeError, KeyError, ...) stays visible
_BROKEN = (av.error.FFmpegError, OSError, ValueError, RuntimeError, OverflowError, MemoryError)


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
    with _opened(path) as (container, stream):
        height, width, _ = _picture(next(_frames(path, container, stream))).shape
        return VideoInfo(Path(path), _promised(container, stream), height, width, _rate(stream))


def count_frames(path: str | Path) -> int:
    """Frames that a video file shows, by decoding all of it: for containers that do not say.

    path:    a file that FFmpeg can decode.
    Returns: a count of at least 1.
    Raises:  VideoError if the file is missing, damaged or no video.
    """
    with _opened(path) as (container, stream):
        return sum(1 for _ in _frames(path, container, stream))


def read_video(
    path: str | Path, start: int = 0, frames: int | None = None, size: tuple[int, int] | None = None
) -> tuple[Tensor, float]:
    """Decode a video file, or `frames` frames of it from frame `start` on, in order of presentation.

    Grey, 10-bit, palette and alpha sources come out as 8-bit RGB (alpha dropped); rotation and mirror metadata are
    applied. Files with a variable frame rate give every frame once, in order.

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
    with _opened(path) as (container, stream):
        promised = _promised(container, stream)
        for frame in _frames(path, container, stream):
            seen += 1
            if seen <= start:
                continue
            image = _picture(frame)
            kept.append(fit_frames(image[None], *size)[0][0] if size else image)
            if len(kept) == 1:
                expected = frames or max(1, (promised or 1) - start)
                _check_budget(path, expected, kept[0])
            if kept[-1].shape != kept[0].shape:
                raise VideoError(f"{path}: the frame size changes at frame {seen - 1}; give one size to resize all.")
            _check_budget(path, len(kept), kept[0])
            if len(kept) == frames:
                break
        rate = _rate(stream)
    if frames is not None and len(kept) < frames:
        raise VideoError(f"{path}: wanted {frames} frames from frame {start} on, but the file has {seen}.")
    if not kept:
        raise VideoError(f"{path}: nothing from frame {start} on, the file has {seen} frames.")
    return torch.stack(kept), rate


def read_image(path: str | Path) -> Tensor:
    """Decode one still image (png, jpg, bmp, webp).

    path:    an image file.
    Returns: uint8 [H, W, 3] in 0..255, RGB; EXIF orientation applied where FFmpeg reports it.
    Raises:  VideoError if the file is missing or no image.
    """
    with _opened(path) as (container, stream):
        return _picture(next(_frames(path, container, stream)))


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
    path = Path(path)
    _check_writable(path, video, fps, lossless)
    # a random name: two processes may write the same clip at once
    temporary = path.with_name(f".{path.stem[:40]}.{secrets.token_hex(6)}{path.suffix.lower()}")
    try:
        _encode(str(temporary), path.suffix.lower(), video, Fraction(fps).limit_denominator(10_000), lossless)
        os.replace(temporary, path)
    except _BROKEN as error:
        raise VideoError(f"{path}: cannot be written: {_reason(error)}.") from error
    finally:
        temporary.unlink(missing_ok=True)


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


def frame_hash(video: Tensor) -> str:
    """sha256 of a video's shape and pixels, the same on every machine.

    video:   uint8 [T, H, W, 3], any strides.
    Returns: 64 hexadecimal digits.
    Raises:  VideoError for a wrong tensor.
    """
    _check_frames(video)
    digest = hashlib.sha256(repr(tuple(video.shape)).encode())
    digest.update(video.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple]:
    """The container and its first real video stream; whatever goes wrong inside becomes one VideoError."""
    path = Path(path)
    try:
        if path.is_dir():
            raise VideoError(f"{path}: is a folder, not a video file.")
        if not path.exists():
            raise VideoError(f"{path}: no such file.")
        if path.stat().st_size == 0:
            raise VideoError(f"{path}: the file is empty (0 bytes).")
        # an absolute path, since FFmpeg takes "12:30.mp4" for a protocol
        with av.open(os.path.abspath(path), options=_SAFE, metadata_errors="replace") as container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                raise VideoError(f"{path}: no video stream in this file.")
            yield container, streams[0]
    except VideoError:
        raise
    except _BROKEN as error:
        raise VideoError(f"{path}: cannot be read as video: {_reason(error)}.") from error


def _frames(path: str | Path, container, stream) -> Iterator[av.VideoFrame]:
    """At least one whole frame; the decoder hands them over in order of presentation, not of storage."""
    if stream.codec_context is None:
        raise VideoError(f"{path}: no decoder for this video's codec.")
    _check_pixels(path, stream.codec_context.height, stream.codec_context.width)
    stream.thread_type = "AUTO"
    count, end = 0, None
    for frame in container.decode(stream):
        _check_pixels(path, frame.height, frame.width)
        if frame.is_corrupt:
            raise VideoError(f"{path}: frame {count} is damaged.")
        count, end = count + 1, _end(frame) or end
        yield frame
    if count == 0:
        raise VideoError(f"{path}: no frame can be decoded.")
    _check_whole(path, container, stream, count, end)


def _end(frame: av.VideoFrame) -> float | None:
    """When the frame leaves the screen, in seconds; None without a timestamp."""
    return None if frame.pts is None else float((frame.pts + (frame.duration or 0)) * frame.time_base)


def _check_whole(path: str | Path, container, stream, count: int, end: float | None) -> None:
    """FFmpeg ends a file that was cut short as if it were whole; what the header promises gives it away."""
    promised = _promised(container, stream)
    if promised and count < promised:
        raise VideoError(f"{path}: the file promises {promised} frames, only {count} decode (damaged or cut short).")
    if container.format.name == "gif":
        with open(path, "rb") as file:
            if not file.read().rstrip(b"\0").endswith(b";"):
                raise VideoError(f"{path}: the GIF has no end mark after {count} frames (damaged or cut short).")
    if promised or end is None or len(container.streams) > 1 or not container.duration:
        return
    # no count to trust (AVI counts frames that are never shown), so the running time must do, less a rounded frame
    seconds = container.duration / av.time_base
    end -= (container.start_time or 0) / av.time_base
    if seconds - end > 1.5 * seconds / count:
        raise VideoError(f"{path}: lasts {seconds:.2f} s, only {end:.2f} s decode (damaged or cut short).")


def _picture(frame: av.VideoFrame) -> Tensor:
    """RGB with the display matrix applied, rounded to quarter turns and mirrors."""
    image = frame.to_ndarray(format="rgb24")                # [H, W, 3]
    side = frame.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    if side is None:
        return torch.from_numpy(image)
    matrix = np.frombuffer(bytes(side), np.int32).reshape(3, 3)
    (a, b), (c, d) = matrix[0, :2].tolist(), matrix[1, :2].tolist()  # x' = a x + c y, y' = b x + d y
    if abs(a) + abs(d) < abs(b) + abs(c):
        image, a, d = image.swapaxes(0, 1), c, b
    return torch.from_numpy(np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]))


def _promised(container, stream) -> int | None:
    """Frames that an mp4 shows, None for other containers: their counts include what no player shows."""
    if not stream.frames or "mp4" not in container.format.name:
        return None
    # the index respects the edit list, the header's count does not
    return sum(not entry.is_discard for entry in stream.index_entries) or None


def _rate(stream) -> float:
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    return float(rate) if rate else 25.0


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).rstrip(".")


def _check_pixels(path: str | Path, height: int, width: int) -> None:
    if height * width > FRAME_PIXELS:
        raise VideoError(f"{path}: frames of {width}x{height} exceed the limit of {FRAME_PIXELS} pixels.")


def _check_budget(path: str | Path, frames: int, image: Tensor) -> None:
    if frames * image.numel() > READ_BYTES:
        height, width, _ = image.shape
        raise VideoError(
            f"{path}: {frames} frames of {width}x{height} exceed the limit of {READ_BYTES} bytes; "
            f"pass frames= (at most {READ_BYTES // image.numel()}) or a smaller size=."
        )


def _check_frames(video: Tensor) -> None:
    if not isinstance(video, Tensor) or video.dtype != torch.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        what = f"{video.dtype} {list(video.shape)}" if isinstance(video, Tensor) else type(video).__name__
        raise VideoError(f"a video must be torch.uint8 [T, H, W, 3], got {what}.")
    if 0 in video.shape:
        raise VideoError(f"a video needs at least one frame and one pixel, got {list(video.shape)}.")


def _check_writable(path: Path, video: Tensor, fps: float, lossless: bool) -> None:
    suffix = path.suffix.lower()
    if suffix not in WRITE_SUFFIXES:
        raise VideoError(f"{path}: cannot write '{suffix}', use one of {', '.join(WRITE_SUFFIXES)}.")
    if lossless and suffix != ".mp4":
        raise VideoError(f"{path}: lossless video is written as .mp4 only, got '{suffix}'.")
    try:
        _check_frames(video)
    except VideoError as error:
        raise VideoError(f"{path}: {error}") from None
    fastest = 50 if suffix == ".gif" else 1000
    if not (math.isfinite(fps) and 0.01 <= fps <= fastest):
        raise VideoError(f"{path}: fps must be from 0.01 to {fastest} for '{suffix}', got {fps}.")
    if path.is_dir():
        raise VideoError(f"{path}: is a folder, not a file to write.")
    if not path.parent.is_dir():
        raise VideoError(f"{path}: the folder {path.parent} does not exist; make it first.")


def _encode(temporary: str, suffix: str, video: Tensor, rate: Fraction, lossless: bool) -> None:
    frames, height, width, _ = video.shape
    chroma = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
    codec, pixels, options = {
        ".mp4": ("libx264", chroma, {"crf": "18", "preset": "medium"}),
        ".webm": ("libvpx-vp9", chroma, {"crf": "24", "b": "0", "cpu-used": "4", "row-mt": "0"}),
        ".gif": ("gif", "pal8", {}),
    }[suffix]
    if lossless:
        codec, pixels, options = "libx264rgb", "rgb24", {"qp": "0", "preset": "veryfast"}
    muxer = {"movflags": "+faststart"} if suffix == ".mp4" else {}
    with av.open(temporary, "w", format=suffix[1:], options=muxer) as container:
        container.flags |= av.container.Flags.bitexact.value
        # one thread: x264 and libvpx split work by thread count, and so would the bytes
        stream = container.add_stream(codec, rate=rate, options={**options, "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.flags |= av.codec.context.Flags.bitexact.value
        if not lossless and suffix != ".gif":
            # swscale converts by BT.601; untagged files would be guessed as BT.709 by players
            stream.codec_context.colorspace = av.video.reformatter.Colorspace.ITU601
        for frame in _palette(video, rate) if suffix == ".gif" else _video_frames(video, rate):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _video_frames(video: Tensor, rate: Fraction) -> Iterator[av.VideoFrame]:
    for index, image in enumerate(video):
        frame = av.VideoFrame.from_ndarray(image.contiguous().cpu().numpy(), format="rgb24")
        frame.pts, frame.time_base = index, 1 / rate
        yield frame


def _palette(video: Tensor, rate: Fraction) -> Iterator[av.VideoFrame]:
    """Frames in the best 256 colours for the whole clip; FFmpeg's own conversion would use a fixed, coarse palette."""
    graph = av.filter.Graph()
    height, width = video.shape[1:3]
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / rate)
    split, colours, use, sink = (graph.add(name) for name in ("split", "palettegen", "paletteuse", "buffersink"))
    source.link_to(split)
    split.link_to(colours, 0, 0)
    split.link_to(use, 1, 0)
    colours.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for frame in _video_frames(video, rate):
        source.push(frame)
    source.push(None)
    for _ in range(len(video)):
        yield sink.pull()


def _resize(video: Tensor, height: int, width: int) -> Tensor:
    frames, rows, columns, _ = video.shape
    if rows % height == 0 and columns % width == 0:
        y, x = rows // height, columns // width
        blocks = video.reshape(frames, height, y, width, x, 3).sum(dim=(2, 4), dtype=torch.int32)
        return ((blocks + y * x // 2) // (y * x)).to(torch.uint8)
    pictures = video.permute(0, 3, 1, 2)                    # [T, 3, H, W], channels last: no copy
    resized = F.interpolate(pictures, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return resized.permute(0, 2, 3, 1)
