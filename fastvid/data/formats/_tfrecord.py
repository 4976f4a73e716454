"""TFRecord files and the tf.train.Example messages in them, without TensorFlow or protobuf.

A record is u64 length, u32 masked CRC-32C of those 8 bytes, the payload, u32 masked CRC-32C of it; little-endian.
"""

import os
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

_POLYNOMIAL = 0x82F63B78  # Castagnoli, bits reversed
_MASK_ADD = 0xA282EAD8
_SHORT = 64  # bytes up to which a plain loop beats starting NumPy
RECORD_BYTES = 1 << 30  # a longer record is taken for damage
FRAMING = 16  # bytes around each payload

Feature = list[bytes] | np.ndarray


@cache
def _shift_table(words: int) -> np.ndarray:
    """What `words` zero words do to a register, byte by byte of it: uint32 [4, 256]. `words` is a power of two."""
    if words == 1:
        one = np.arange(256, dtype=np.uint32)
        for _ in range(8):
            one = (one >> 1) ^ np.where(one & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
        table = np.zeros((4, 256), np.uint32)
        table[3] = one  # the last byte of a word has one byte of zeros left to pass
        for i in (2, 1, 0):
            table[i] = one[table[i + 1] & 255] ^ (table[i + 1] >> 8)
        return table
    half = _shift_table(words // 2)
    return _shifted(half.reshape(-1), half).reshape(4, 256)


def _shifted(registers: np.ndarray, table: np.ndarray) -> np.ndarray:
    parts = np.ascontiguousarray(registers).view(np.uint8).reshape(-1, 4)
    return table[0][parts[:, 0]] ^ table[1][parts[:, 1]] ^ table[2][parts[:, 2]] ^ table[3][parts[:, 3]]


@cache
def _byte_table() -> list[int]:
    return _shift_table(1)[3].tolist()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of some bytes.

    data:    any length.
    Returns: 0 to 2**32 - 1.
    Raises:  nothing.
    Source:  RFC 3720, appendix B.4. Long data is folded: a word moved past h words is four table look-ups, so the
             front half is moved onto the back half until one word is left.
    """
    register = 0xFFFFFFFF
    whole = len(data) // 4 if len(data) > _SHORT else 0
    if whole:
        words = np.zeros(1 << (whole - 1).bit_length(), "<u4")
        words[-whole:] = np.frombuffer(data, "<u4", whole)
        words[-whole] ^= register
        while len(words) > 1:
            half = len(words) // 2
            words = _shifted(words[:half], _shift_table(half)) ^ words[half:]
        register = int(_shifted(words, _shift_table(1))[0])
    table = _byte_table()
    for byte in bytes(data[4 * whole :]):
        register = table[(register ^ byte) & 255] ^ (register >> 8)
    return register ^ 0xFFFFFFFF


def masked_crc(data: bytes) -> int:
    """The checksum as TFRecord files store it: rotated and offset, so that a CRC of CRCs stays meaningful.

    data:    any length.
    Returns: 0 to 2**32 - 1.
    Raises:  nothing.
    Source:  TFRecord format, tensorflow.org/tutorials/load_data/tfrecord.
    """
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_ADD) & 0xFFFFFFFF


def index_records(path: Path, at_most: int) -> tuple[list[tuple[int, int]], str | None]:
    """Where the records of a file lie, by reading their lengths only.

    path:    a TFRecord file. at_most: records after which to stop looking.
    Returns: (offset of the payload, its bytes) of each whole record, and what is wrong with the next one, or None.
    Raises:  OSError if the file cannot be read.
    """
    places: list[tuple[int, int]] = []
    with path.open("rb") as file:
        size, at = os.fstat(file.fileno()).st_size, 0
        while at < size and len(places) < at_most:
            head = os.pread(file.fileno(), 12, at)
            if len(head) < 12:
                return places, f"record {len(places)} is cut short"
            length, crc = struct.unpack("<QI", head)
            if crc != masked_crc(head[:8]):
                return places, f"record {len(places)}: the checksum of its length is wrong"
            if at + FRAMING + length > size:
                return places, f"record {len(places)} is cut short"
            if length > RECORD_BYTES:
                return places, f"record {len(places)}: {length} bytes exceed the limit of {RECORD_BYTES}"
            places.append((at + 12, length))
            at += FRAMING + length
    return places, None


def read_record(path: Path, offset: int, length: int) -> bytes:
    """One payload, its checksum verified.

    path:    a TFRecord file. offset, length: as `index_records` gives them.
    Returns: the payload.
    Raises:  ValueError for a wrong checksum or a file that has become shorter, OSError if it cannot be read.
    """
    with path.open("rb") as file:
        data = os.pread(file.fileno(), length + 4, offset)
    if len(data) != length + 4:
        raise ValueError("the record is cut short")
    payload = data[:-4]
    if masked_crc(payload) != struct.unpack("<I", data[-4:])[0]:
        raise ValueError("the checksum of the record is wrong")
    return payload


def parse_example(payload: bytes) -> dict[str, Feature]:
    """The features of a tf.train.Example message.

    payload: the serialized message.
    Returns: list of bytes, float32 [n] or int64 [n] by name; of a name that comes twice the last, as protobuf has it.
    Raises:  ValueError for what is no such message.
    Source:  protobuf's wire format (protobuf.dev/programming-guides/encoding); Example.features = 1,
             Features.feature = 1 (key = 1, value = 2), Feature.bytes_list = 1, float_list = 2, int64_list = 3.
    """
    found: dict[str, Feature] = {}
    for features in _messages(memoryview(payload), 1):
        for entry in _messages(features, 1):
            key, value = "", memoryview(b"")
            for number, part in _fields(entry):
                if number == 1:
                    key = bytes(_message(part)).decode("utf-8")
                elif number == 2:
                    value = _message(part)
            found[key] = _feature(value)
    return found


def _feature(value: memoryview) -> Feature:
    for kind, part in _fields(value):
        values = [item for number, item in _fields(_message(part)) if number == 1]
        if kind == 1:
            return [bytes(_message(item)) for item in values]
        if kind == 2:
            return np.frombuffer(b"".join(_message(item) for item in values), "<f4")
        if kind == 3:
            return np.array([number for item in values for number in _integers(item)], np.int64)
    return []


def _integers(item: int | memoryview) -> list[int]:
    """Numbers of an int64 list, packed or one by one, with their sign."""
    numbers, at = ([item], 0) if isinstance(item, int) else ([], 0)
    while not isinstance(item, int) and at < len(item):
        number, at = _varint(item, at)
        numbers.append(number)
    return [number - (1 << 64) if number >> 63 else number for number in numbers]


def _messages(data: memoryview, wanted: int) -> Iterator[memoryview]:
    return (_message(part) for number, part in _fields(data) if number == wanted)


def _message(part: int | memoryview) -> memoryview:
    if isinstance(part, int):
        raise ValueError("no Example message: a number where bytes belong")
    return part


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field: an integer for a varint, bytes for the rest."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"no Example message: a field of wire type {kind}")
        length, at = _varint(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
        if at + length > len(data):
            raise ValueError("no Example message: a field reaches beyond its end")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise ValueError("no Example message: a number without an end")
