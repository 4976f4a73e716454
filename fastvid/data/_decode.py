"""Decoding with PyAV: safe opening, whole and upright frames in order of presentation, one VideoError for the rest."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from fastvid.data._checks import avi_frames, gif_images, matroska_damage
from fastvid.errors import VideoError

FRAME_PIXELS = 1 << 25  # 8K UHD passes; a header that claims 30,000 x 30,000 must not reach the allocator

# Only plain containers and local files: a playlist renamed to .mp4 must not open other files or the network
_SAFE = {
    "max_pixels": str(FRAME_PIXELS),
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,mpegvideo,ogg,flv,asf,h264,hevc,"
    "m4v,ivf,yuv4mpegpipe,png_pipe,jpeg_pipe,bmp_pipe,webp_pipe,wav,mp3,aac,flac",
}
# FFmpeg's own VP8 and VP9 decoders make pictures of damaged data without a word; libvpx notices nearly all of it and
# gives the same bits for whole files
_LIBVPX = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# other decoders' checks find nothing more, or refuse streams that players show
_CHECKED = dict.fromkeys(("mjpeg", "png", "apng"), {"err_detect": "crccheck+bitstream+buffer+explode"})
# what PyAV raises for a bad file; a bug of ours (TypeError, KeyError, ...) stays visible
BROKEN = (av.error.FFmpegError, OSError, ValueError, RuntimeError, OverflowError, MemoryError)


@contextmanager
def opened(path: str | Path) -> Iterator[tuple]:
    """The container and its first real video stream; whatever goes wrong inside becomes one VideoError."""
    path = Path(path)
    try:
        check_file(path)
        # an absolute path, since FFmpeg takes "12:30.mp4" for a protocol
        with av.open(os.path.abspath(path), options=_SAFE, metadata_errors="replace") as container:
            yield container, _first_stream(path, container)
    except VideoError:
        raise
    except BROKEN as error:
        raise VideoError(f"{path}: cannot be read as video: {reason_of(error)}.") from error


def check_file(path: Path) -> None:
    """Refuse what is not there, no regular file, or empty, with a VideoError."""
    if not path.exists():
        raise VideoError(f"{path}: no such file.")
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(f"{path}: is a folder, not a video file.")
    if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever, a device never end
        raise VideoError(f"{path}: is not a regular file.")
    if status.st_size == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes).")


def _first_stream(path: str | Path, container):
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise VideoError(f"{path}: no video stream in this file.")
    return streams[0]


def frames_of(path: str | Path, container, stream, threads: int = 0) -> Iterator[av.VideoFrame]:
    """At least one whole frame, in order of presentation, not of storage; 0 threads means one a core."""
    if stream.codec_context is None:
        raise VideoError(f"{path}: no decoder for this video's codec.")
    _check_pixels(path, stream.codec_context.height, stream.codec_context.width)
    count, begin, end = 0, None, None
    for frame in _decoded(path, container, stream, threads):
        _check_pixels(path, frame.height, frame.width)
        if frame.is_corrupt:
            raise VideoError(f"{path}: frame {count} is damaged.")
        begin = frame.time if begin is None else begin
        count, end = count + 1, _end(frame) or end
        yield frame
    if count == 0:
        raise VideoError(f"{path}: no frame can be decoded.")
    _check_whole(path, container, stream, count, (begin, end))


def _decoded(path: str | Path, container, stream, threads: int) -> Iterator[av.VideoFrame]:
    """What the decoder gives, by the decoder that notices most."""
    decoder, strict = stream.codec_context, _LIBVPX.get(stream.codec_context.name)
    decoder.options = _CHECKED.get(decoder.name, {})
    # one thread where only the first frame is wanted from it: more would hold that frame back
    decoder.thread_type, decoder.thread_count = "AUTO", 1 if strict else threads
    pending, packets = [], 0
    for packet in container.demux(stream):
        packets += packet.size > 0
        if packet.is_corrupt:
            raise VideoError(f"{path}: the container says that data is missing or damaged.")
        frames = decoder.decode(packet)
        if strict:
            pending.append(packet)
            # only the container's own decoder is told of a display matrix
            if frames and _matrix_of(frames[0]) is None:
                decoder = av.CodecContext.create(strict, "r")
                decoder.thread_count = threads
                frames = [frame for packet in pending for frame in decoder.decode(packet)]
            if frames:
                strict, pending = None, []
        yield from frames
    listed = avi_frames(path, stream) if container.format.name == "avi" else 0
    if packets < listed:
        raise VideoError(f"{path}: {listed} frames are listed, only {packets} can be found (damaged or cut short).")


def first_picture(path: str | Path, container, stream) -> Tensor:
    """The first frame as `picture` gives it; one thread, since each more would decode a frame for nothing."""
    return picture(next(frames_of(path, container, stream, threads=1)))


def picture(frame: av.VideoFrame) -> Tensor:
    """RGB with the display matrix applied, rounded to quarter turns and mirrors."""
    image = frame.to_ndarray(format="rgb24")  # [H, W, 3]
    side = _matrix_of(frame)
    if side is None:
        turns = round(frame.rotation / 90) % 4  # counterclockwise
        return torch.from_numpy(np.ascontiguousarray(np.rot90(image, turns)) if turns else image)
    matrix = np.frombuffer(bytes(side), np.int32).reshape(3, 3)
    (a, b), (c, d) = matrix[0, :2].tolist(), matrix[1, :2].tolist()  # x' = a x + c y, y' = b x + d y
    if abs(a) + abs(d) < abs(b) + abs(c):
        image, a, d = image.swapaxes(0, 1), c, b
    return torch.from_numpy(np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]))


def promised_frames(container, stream) -> int | None:
    """Frames that an mp4 shows, None for other containers: their counts include what no player shows."""
    if not stream.frames or "mp4" not in container.format.name:
        return None
    # the index respects the edit list, the header's count does not
    return sum(not entry.is_discard for entry in stream.index_entries) or None


def rate_of(stream) -> float:
    """Average frames a second; 25 for a stream that says nothing, such as a still image."""
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    return float(rate) if rate else 25.0


def reason_of(error: BaseException) -> str:
    """What an exception says, in one line without a full stop."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).rstrip(".")


def _matrix_of(frame: av.VideoFrame):
    try:
        return frame.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    except ValueError:  # PyAV 18.1 gives none of them where it does not know a kind, such as EXIF; `rotation` is there
        return None


def _end(frame: av.VideoFrame) -> float | None:
    """When the frame leaves the screen, in seconds; None without a timestamp."""
    return None if frame.pts is None else float((frame.pts + (frame.duration or 0)) * frame.time_base)


def _check_whole(path: str | Path, container, stream, count: int, shown: tuple) -> None:
    """FFmpeg ends a file that was cut short as if it were whole; what the header promises gives it away."""
    remedy = f"(damaged or cut short; frames={count} reads what there is)"
    gif = container.format.name == "gif"
    promised = gif_images(Path(path).read_bytes()) if gif else promised_frames(container, stream)
    if promised and count < promised:
        raise VideoError(f"{path}: the file promises {promised} frames, only {count} decode {remedy}.")
    if gif and promised is None:
        raise VideoError(f"{path}: the GIF breaks off or is garbled after {count} frames {remedy}.")
    if "matroska" in container.format.name and (damage := matroska_damage(path)):
        raise VideoError(f"{path}: {damage} {remedy}.")
    begin, end = shown
    if gif or end is None or len(container.streams) > 1 or not container.duration:
        return
    # elsewhere no count can be trusted (AVI's has frames that are never shown): the running time, less a rounded frame
    seconds = container.duration / av.time_base
    # the start that FFmpeg names passes over frames without a time, such as those before zero
    end -= min(begin, (container.start_time or 0) / av.time_base)
    if seconds - end > min(1.5 * seconds / count, seconds / 4):
        raise VideoError(f"{path}: lasts {seconds:.2f} s, only {end:.2f} s decode {remedy}.")


def _check_pixels(path: str | Path, height: int, width: int) -> None:
    if height * width > FRAME_PIXELS:
        raise VideoError(f"{path}: frames of {width}x{height} exceed the limit of {FRAME_PIXELS} pixels.")
