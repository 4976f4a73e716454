"""Still images, JPEG, PNG, BMP and WebP, from their bytes: by the decoder that their beginning names, and upright."""

from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from fastvid.data._decode import BROKEN, FRAME_PIXELS, check_file, reason_of
from fastvid.errors import VideoError

FILE_BYTES = 1 << 28  # more than the largest frame takes uncompressed

_STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}
_OPTIONS = {"mjpeg": _STRICT, "png": _STRICT}  # the other decoders' checks find nothing more
_ORIENTATION = 0x0112
# what brings an image of EXIF's orientation upright once those from 5 on are transposed: mirror rows, mirror columns
_MIRRORS = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}


def image_codec(data: bytes) -> str | None:
    """Which decoder an image's first bytes ask for.

    data:    at least the first 12 bytes of a file.
    Returns: "mjpeg", "png", "bmp" or "webp", or None for anything else.
    Raises:  nothing.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return "mjpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    return "bmp" if data.startswith(b"BM") else None


def decode_image(data: bytes, where: str) -> Tensor:
    """Decode an image file that lies in memory, without FFmpeg's search for what it may be.

    data:    the whole image file. where: what to call it in a message.
    Returns: uint8 [H, W, 3] in 0..255, RGB; alpha dropped, EXIF's orientation applied.
    Raises:  VideoError if it is no image, is damaged, or is larger than the limit of pixels a frame.
    Source:  orientation: CIPA DC-008 (EXIF 2.32), tag 0x0112.
    """
    codec = image_codec(data)
    if codec is None:
        raise VideoError(f"{where}: is no JPEG, PNG, BMP or WebP by its first bytes.")
    exif, ends = _READERS[codec](data)
    if not ends:  # FFmpeg makes an image of what there is
        raise VideoError(f"{where}: the image is cut short.")
    try:
        decoder = av.CodecContext.create(codec, "r")
        decoder.options = {"max_pixels": str(FRAME_PIXELS), **_OPTIONS.get(codec, {})}
        decoder.thread_count = 1
        frames = [*decoder.decode(av.Packet(data)), *decoder.decode(None)]
        if len(frames) != 1 or frames[0].is_corrupt:
            raise VideoError(f"{where}: the image is damaged.")
        image = frames[0].to_ndarray(format="rgb24")  # [H, W, 3]
    except VideoError:
        raise
    except BROKEN as error:
        raise VideoError(f"{where}: cannot be read as an image: {reason_of(error)}.") from error
    return _upright(image, _orientation(exif))


def image_file(path: str | Path) -> Tensor:
    """Decode an image file on disk, as `decode_image` does one in memory; of any name, and opened as nothing else.

    path:    a regular file of at most 256 MiB.
    Returns: uint8 [H, W, 3] in 0..255, RGB.
    Raises:  VideoError if it is missing, too large, or no whole image.
    """
    try:
        path = Path(path)
        check_file(path)
        if (size := path.stat().st_size) > FILE_BYTES:
            raise VideoError(f"{path}: {size} bytes are too many for an image, the limit is {FILE_BYTES}.")
        data = path.read_bytes()
    except OSError as error:
        raise VideoError(f"{path}: cannot be read: {error.strerror}.") from error
    return decode_image(data, str(path))


def _upright(image: np.ndarray, orientation: int) -> Tensor:
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    rows, columns = _MIRRORS.get(orientation, (1, 1))
    return torch.from_numpy(np.ascontiguousarray(image[::rows, ::columns]))


def _orientation(exif: bytes) -> int:
    """1 to 8 from EXIF's first directory; 1, upright, where it says nothing that makes sense."""
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(exif[:4])
    if order is None:
        return 1
    first = int.from_bytes(exif[4:8], order)
    for at in range(first + 2, min(len(exif), first + 2 + 12 * int.from_bytes(exif[first : first + 2], order)), 12):
        if int.from_bytes(exif[at : at + 2], order) == _ORIENTATION:
            value = int.from_bytes(exif[at + 8 : at + 10], order)
            return value if 1 <= value <= 8 else 1
    return 1


# Each gives the EXIF block, empty without one, and whether the file reaches its end.


def _read_jpeg(data: bytes) -> tuple[bytes, bool]:
    at, exif = 2, b""
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        if data[at + 1 : at + 2] == b"\xff":  # padding
            at += 1
            continue
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1 : at + 2] == b"\xe1" and data[at + 4 : at + 10] == b"Exif\0\0":
            exif = exif or data[at + 10 : at + 2 + size]
        at += 2 + size
    # behind the headers: a thumbnail in them has an end of its own
    return exif, data.find(b"\xff\xd9", at) >= 0


def _read_png(data: bytes) -> tuple[bytes, bool]:
    at, exif = 8, b""
    while at + 12 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"eXIf":
            exif = data[at + 8 : at + 8 + size]
        at += 12 + size
    return exif, b"IEND\xaeB`\x82" in data


def _read_webp(data: bytes) -> tuple[bytes, bool]:
    at, exif = 12, b""
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            exif = data[at + 8 : at + 8 + size].removeprefix(b"Exif\0\0")
        at += 8 + size + size % 2
    return exif, len(data) >= 8 + int.from_bytes(data[4:8], "little")


def _read_bmp(data: bytes) -> tuple[bytes, bool]:
    return b"", True  # its decoder misses the end


_READERS = {"mjpeg": _read_jpeg, "png": _read_png, "webp": _read_webp, "bmp": _read_bmp}
