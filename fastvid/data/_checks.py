"""What a container itself offers to tell a whole file from a damaged one, where FFmpeg does not look."""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_SEGMENT, _CRC = 0x18538067, 0xBF
# what frames depend on: a wrong index or tag changes no picture
_CHECKED = {0x1549A966: "header", 0x1654AE6B: "header", 0x1F43B675: "cluster"}
_PIECE = 1 << 20


def gif_images(data: bytes) -> int | None:
    """Images in a GIF, by walking its blocks to the end mark; None if they are garbled or it is not at the end.

    data:   the whole file.
    Raises: nothing.
    Source: the GIF89a specification, sections 18 to 27.
    """
    data = data.rstrip(b"\0\r\n ")  # padding that some programs leave
    images, at = 0, 13
    try:
        at += 3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0  # global palette
        while data[at] != 0x3B:
            if data[at] == 0x2C:
                images += 1
                at += 9 + (3 << (data[at + 9] & 7) + 1 if data[at + 9] & 0x80 else 0)  # local palette
            elif data[at] != 0x21:
                return None
            at += 2
            while data[at]:  # sub-blocks, each with its length in front
                at += 1 + data[at]
            at += 1
    except IndexError:
        return None
    return images if at == len(data) - 1 else None


def avi_frames(path: str | Path, stream) -> int:
    """Frames that an AVI must hold: those of its index that are not empty, or where bytes are missing, of its header.

    A header alone is not believed, since it also counts frames that were dropped while recording.

    path, stream: the file and PyAV's video stream of it, whose packets have all been read.
    Raises:       OSError.
    Source:       the AVI RIFF file reference: RIFF's size, dwLength of strh, idx1.
    """
    with open(path, "rb") as file:
        said = int.from_bytes(file.read(8)[4:], "little") + 8
    if said > os.path.getsize(path):
        return stream.frames
    return sum(entry.size > 0 for entry in stream.index_entries)


def matroska_damage(path: str | Path) -> str | None:
    """What the checksums of a Matroska file say against it, in words; None where they agree or there are none.

    path:   the file; read piece by piece.
    Raises: OSError.
    Source: RFC 8794 (EBML), section 11.3.1: the CRC-32 element covers what follows it in its parent.
    """
    with open(path, "rb") as file:
        for identity, start, end in _elements(file, os.path.getsize(path)):
            if identity not in _CHECKED:
                continue
            file.seek(start)
            first = _number(file, keep_mark=True), _number(file, keep_mark=False)
            if first != (_CRC, 4):
                continue
            said = int.from_bytes(file.read(4), "little")
            if _crc(file, end - file.tell()) != said:
                return f"the checksum of the {_CHECKED[identity]} at byte {start} is wrong"
    return None


def _elements(file: BinaryIO, size: int) -> Iterator[tuple[int, int, int]]:
    """(identity, first byte, end) of the elements below the segment, as far as they can be followed."""
    at = 0
    while at < size:
        file.seek(at)
        identity, length = _number(file, keep_mark=True), _number(file, keep_mark=False)
        start = file.tell()
        if identity == _SEGMENT:
            at = start
            continue
        if identity is None or length is None:  # garbled, or of unknown length: a stream that was stored
            return
        at = start + length
        yield identity, start, min(at, size)


def _number(file: BinaryIO, keep_mark: bool) -> int | None:
    """An EBML number of variable length; None at the end of the file or for the one that means unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    data = first + file.read(length - 1)
    if len(data) < length:
        return None
    value, largest = int.from_bytes(data, "big"), (1 << 7 * length) - 1
    if keep_mark:
        return value
    return None if value & largest == largest else value & largest


def _crc(file: BinaryIO, length: int) -> int:
    value = 0
    while length > 0 and (piece := file.read(min(length, _PIECE))):
        value = zlib.crc32(piece, value)
        length -= len(piece)
    return value
