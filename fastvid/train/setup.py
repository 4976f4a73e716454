"""What every recipe needs before its first step: the identity of the data, and a device that works."""

import hashlib
import json

import torch

from fastvid.data.clips import Clips
from fastvid.errors import UsageError, VideoError


def clips_hash(clips: Clips) -> str:
    """What identifies clips, for continued runs.

    Names, lengths and three sample frames: names alone would not notice clips made again by another generator.

    clips:   opened.
    Returns: sha256 (hex). Raises: nothing for a clip that cannot be decoded.
    """
    listed = hashlib.sha256(json.dumps([clips.names, clips.lengths]).encode())
    for index in sorted({0, len(clips) // 2, len(clips) - 1}):
        try:
            listed.update(clips.read(index, 0, 1).contiguous().numpy().tobytes())
        except VideoError:
            listed.update(b"unreadable")  # training names such clips and does without them
    return listed.hexdigest()


def device_of(name: str | None) -> str:
    """A device by name; None means the GPU where there is one. Raises UsageError where torch cannot use it."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: torch cannot use it: {str(error).splitlines()[0]}") from error
    return name
