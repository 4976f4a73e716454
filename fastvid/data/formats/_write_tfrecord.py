"""TFRecord files written: the counterpart of `_tfrecord`."""

import os
import secrets
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from fastvid.data.formats._tfrecord import masked_crc

Value = bytes | np.ndarray


def serialize_example(features: Mapping[str, Value]) -> bytes:
    """A tf.train.Example message.

    features: bytes, or an array [n] of floats (stored as float32) or of integers, by name.
    Returns:  the message.
    Raises:   TypeError for values of another type.
    Source:   as in `_tfrecord.parse_example`; lists of numbers are packed.
    """
    entries = [_field(1, key.encode()) + _field(2, _feature(value)) for key, value in features.items()]
    return _field(1, b"".join(_field(1, entry) for entry in entries))


def write_records(path: Path, payloads: Iterable[bytes]) -> None:
    """Write a TFRecord file that appears whole or not at all.

    path:     target; an existing one is replaced. payloads: of the records, in order.
    Raises:   OSError where the disk refuses; whatever making the payloads raises.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with temporary.open("wb") as file:
            for payload in payloads:
                length = struct.pack("<Q", len(payload))
                file.write(length + struct.pack("<I", masked_crc(length)))
                file.write(payload + struct.pack("<I", masked_crc(payload)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _feature(value: Value) -> bytes:
    if isinstance(value, bytes):
        return _field(1, _field(1, value))
    if np.issubdtype(value.dtype, np.floating):
        return _field(2, _field(1, value.astype("<f4").tobytes()))
    if np.issubdtype(value.dtype, np.integer):
        return _field(3, _field(1, b"".join(_varint(int(number)) for number in value)))
    raise TypeError(f"an Example holds bytes, floats or integers, got {value.dtype}.")


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    number &= 0xFFFFFFFFFFFFFFFF
    parts = bytearray()
    while number >= 128:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])
