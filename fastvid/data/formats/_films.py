"""Data sets of video files: how many frames each file shows, told without decoding, and a Layout of them."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

from fastvid.data._decode import opened, promised_frames
from fastvid.data._layouts import Layout, Size, Skipped
from fastvid.data.formats._shared import check_any
from fastvid.data.video import count_frames, read_video
from fastvid.errors import VideoError

WORKERS = 8  # opening waits for the disk more than for the processor
AT_ONCE = 4096
QUIET = 1000  # sets up to this size open without a progress bar

# a packet of these is a picture, or says that it is none; elsewhere fields, or pictures without the one they build on
_CONTAINERS = ("matroska", "avi", "gif", "mp4")
_CODECS = {"mpeg4", "vp8", "libvpx", "vp9", "libvpx-vp9", "av1", "libdav1d", "h264", "hevc", "gif", "mjpeg", "png"}
_VOL = re.compile(rb"\x00\x00\x01[\x20-\x2f]")  # MPEG-4 video object layer
_VOP = re.compile(rb"\x00\x00\x01\xb6")  # MPEG-4 video object plane: a picture


class Film(NamedTuple):
    """A video file, and its class where the data set says one."""

    path: Path
    label: str | None = None


def film_layout(root: Path, films: Sequence[Film], found: str, skipped: Skipped) -> Layout:
    """A Layout of the files that open; what cannot be opened is added to `skipped`.

    root:    what the names are relative to. films: in order. found, skipped: as in Layout.
    Returns: Layout with the frames of each file as `shown_frames` counts them; labels where any film has one.
    Raises:  DataError if no file is usable.
    """
    usable: list[Film] = []
    lengths: list[int] = []
    with ThreadPoolExecutor(WORKERS) as pool:
        quiet = True if len(films) <= QUIET else None  # None: a bar on a terminal only
        for first in tqdm(range(0, len(films), AT_ONCE), "opening clips", unit_scale=AT_ONCE, disable=quiet):
            part = films[first : first + AT_ONCE]
            for film, told in zip(part, pool.map(_told, part), strict=True):
                if isinstance(told, VideoError):
                    skipped.append((_name(film, root), str(told).removeprefix(f"{film.path}: ")))
                else:
                    usable.append(film)
                    lengths.append(told)
    check_any(root, usable, skipped)

    def load(i: int, start: int, count: int, size: Size | None) -> Tensor:
        return read_video(usable[i].path, start, count, size)[0]

    labels = [film.label or "" for film in usable] if any(film.label for film in usable) else None
    return Layout([_name(film, root) for film in usable], lengths, load, found, skipped, labels)


def shown_frames(path: Path) -> int:
    """Frames that a video file will show: the index of an mp4, elsewhere the packets that carry a picture.

    Where packets do not tell (MPEG streams, rare codecs) the whole file is decoded.

    AVI's own count is no help: UCF-101's files, written by XviD, hold two pictures in some packets and none in others.

    path:    a file that FFmpeg can open.
    Returns: a count of at least 1. Damage inside a picture is seen only when it is decoded.
    Raises:  VideoError if the file is missing, no video, or holds no picture.
    Source:  MPEG-4 Visual (ISO/IEC 14496-2, 6.2.3 and 6.2.5); VP8, RFC 6386, 9.1.
    """
    with opened(path) as (container, stream):
        if stream.codec_context is None:
            raise VideoError(f"{path}: no decoder for this video's codec.")
        count = promised_frames(container, stream)
        codec = stream.codec_context.name
        if count is None and (codec not in _CODECS or not any(name in container.format.name for name in _CONTAINERS)):
            return count_frames(path)
        if count is not None:
            _check_extent(path, stream)
        else:
            packets = (bytes(packet) for packet in container.demux(stream) if packet.size)
            if codec == "mpeg4":
                count = _mpeg4_pictures(stream.codec_context.extradata or b"", packets)
            else:
                count = sum(codec not in ("vp8", "libvpx") or data[0] >> 4 & 1 for data in packets)
    if not count:
        raise VideoError(f"{path}: holds no picture.")
    return count


def _check_extent(path: Path, stream) -> None:
    """Downloads that broke off often keep the whole index; where it points past the end, pictures are missing."""
    end = max(entry.pos + entry.size for entry in stream.index_entries)
    if end > path.stat().st_size:
        raise VideoError(f"{path}: cut short, {path.stat().st_size} of at least {end} bytes are there.")


def _told(film: Film) -> int | VideoError:
    try:
        return shown_frames(film.path)
    except VideoError as error:
        return error


def _name(film: Film, root: Path) -> str:
    return film.path.relative_to(root).as_posix()


def _mpeg4_pictures(header: bytes, packets) -> int:
    """Coded pictures; those marked as not coded stand for nothing shown, or for the second one of a packed packet."""
    bits, count = _time_bits(header), 0
    for data in packets:
        bits = bits or _time_bits(data)
        count += sum(_coded(data[mark.end() : mark.end() + 40], bits) for mark in _VOP.finditer(data))
    return count


def _coded(picture: bytes, time_bits: int | None) -> bool:
    """The bit vop_coded; a stream that never said how long its time stamps are has nothing to skip."""
    if time_bits is None:
        return True
    at = 2  # vop_coding_type
    while _bit(picture, at):  # modulo_time_base
        at += 1
    return bool(_bit(picture, at + 2 + time_bits + 1))  # a marker on either side of vop_time_increment


def _time_bits(data: bytes) -> int | None:
    """Length of vop_time_increment, from the object layer's header; None where there is none in `data`."""
    layer = _VOL.search(data)
    if layer is None:
        return None
    field = data[layer.end() : layer.end() + 40]
    at = 9
    at += 8 if _bit(field, at) else 1  # is_object_layer_identifier
    at += 20 if _bits(field, at, 4) == 15 else 4  # aspect_ratio_info
    if _bit(field, at):  # vol_control_parameters
        at += 84 if _bit(field, at + 4) else 5  # vbv_parameters
    else:
        at += 1
    resolution = _bits(field, at + 3, 16)  # shape and a marker before it
    return max(1, (resolution - 1).bit_length())


def _bit(data: bytes, at: int) -> int:
    return _bits(data, at, 1)


def _bits(data: bytes, at: int, count: int) -> int:
    """`count` bits from bit `at` on as a number; bits past the end are 0."""
    return int.from_bytes(data.ljust(64, b"\0"), "big") >> 512 - at - count & (1 << count) - 1
