"""A writer of BAIR's TFRecords for the tests, bit by bit from the format's description and apart from the reader."""

import struct

import numpy as np


def crc32c(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def framed(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + masked(length) + payload + masked(payload)


def varint(number: int) -> bytes:
    number %= 2**64
    parts = []
    while number > 127:
        parts.append(number % 128 + 128)
        number //= 128
    return bytes([*parts, number])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(value) -> bytes:
    """Bytes, floats or integers, as TensorFlow stores them: number lists are packed."""
    if isinstance(value, bytes):
        return field(1, field(1, value))
    if all(isinstance(number, int) for number in value):
        return field(3, field(1, b"".join(map(varint, value))))
    return field(2, field(1, np.asarray(value, "<f4").tobytes()))


def example(features: dict) -> bytes:
    entries = [field(1, key.encode()) + field(2, feature(value)) for key, value in features.items()]
    return field(1, b"".join(field(1, entry) for entry in entries))


def trajectory(videos: dict[str, list[bytes]], actions, positions) -> bytes:
    """One record of BAIR: images by camera, actions [T, 4], positions of the gripper [T, 3]."""
    features = {}
    for t, (action, position) in enumerate(zip(actions, positions, strict=True)):
        features |= {f"{t}/image_{camera}/encoded": images[t] for camera, images in videos.items()}
        features |= {f"{t}/action": action.tolist(), f"{t}/endeffector_pos": position.tolist()}
    return example(features)
