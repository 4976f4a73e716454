"""What the formats share: names of splits, and still images that lie inside other files."""

from collections.abc import Sequence
from pathlib import Path

import av
import torch
from torch import Tensor

from fastvid.data._decode import BROKEN, FRAME_PIXELS, picture, reason_of
from fastvid.data.formats._peek import peek
from fastvid.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, fit_frames, image_from_bytes
from fastvid.errors import DataError, VideoError

# what a split is called elsewhere, the best first: a set without a public test is measured on its validation clips
OTHER_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "validation", "validate", "valid"),
    "val": ("val", "validation", "validate", "valid"),
    "validation": ("validation", "val", "validate", "valid"),
}
DEEP = 5  # levels searched for clips before an array beside them is taken for the data set
_MAGIC = {b"\xff\xd8\xff": "mjpeg", b"\x89PNG\r\n\x1a\n": "png"}
_ENDS = {"mjpeg": b"\xff\xd9", "png": b"IEND\xaeB`\x82"}  # FFmpeg does not miss them


def choose_split(root: Path, asked: str | None, available: Sequence[str]) -> tuple[str | None, str]:
    """Turn the split that was asked for into the set's own name of it.

    root:      of the data set, for the message. asked: "train", "test", the set's own name, or None for train where
               there is one, else for the first.
    available: the set's own names, in the set's order; empty where it is not divided: then all clips count as asked.
    Returns:   the own name (None where there are no splits), and words for `found`, such as "split val (as test)".
    Raises:    DataError if no split answers to the name.
    """
    if not available:
        return None, f"not divided, so all clips count as {asked}" if asked else "not divided"
    wanted = asked or "train"
    name = next((name for name in (wanted, *OTHER_NAMES.get(wanted, ())) if name in available), None)
    if name is None and asked is None:
        name = available[0]
    if name is None:
        raise DataError(f"{root}: no split '{asked}' in it; there are: {', '.join(available)}.")
    return name, f"split {name}" + (f" (as {asked})" if asked not in (None, name) else "")


def image_codec(data: bytes) -> str | None:
    """Which decoder an image's first bytes ask for.

    data:    at least the first 8 bytes of a file.
    Returns: "mjpeg" or "png", or None for anything else.
    Raises:  nothing.
    """
    return next((codec for magic, codec in _MAGIC.items() if data.startswith(magic)), None)


def decode_image(data: bytes, where: str) -> Tensor:
    """Decode an image file that lies in memory; JPEG and PNG without FFmpeg's search for what it may be.

    data:    the whole image file. where: what to call it in a message.
    Returns: uint8 [H, W, 3] in 0..255, RGB.
    Raises:  VideoError if it is no image, is damaged, or is larger than the limit of pixels a frame.
    """
    codec = image_codec(data)
    if codec is None:
        return image_from_bytes(data, where)
    if _ENDS[codec] not in data:
        raise VideoError(f"{where}: the image is cut short.")
    try:
        decoder = av.CodecContext.create(codec, "r")
        decoder.options = {"max_pixels": str(FRAME_PIXELS), "err_detect": "crccheck+bitstream+buffer+explode"}
        decoder.thread_count = 1
        frames = [*decoder.decode(av.Packet(data)), *decoder.decode(None)]
    except BROKEN as error:
        raise VideoError(f"{where}: cannot be read as an image: {reason_of(error)}.") from error
    if len(frames) != 1 or frames[0].is_corrupt:
        raise VideoError(f"{where}: the image is damaged.")
    return picture(frames[0])


def stack_images(images: list[Tensor], size: tuple[int, int] | None, where: str) -> Tensor:
    """One clip of still images.

    images:  uint8 [H, W, 3] each. size: (H, W) to which `fit_frames` brings each; None keeps their own, equal for all.
    where:   what to call the clip in a message.
    Returns: uint8 [T, H, W, 3].
    Raises:  VideoError if they differ in size and no size was given.
    """
    if size:
        images = [fit_frames(image[None], *size)[0][0] for image in images]
    if any(image.shape != images[0].shape for image in images):
        raise VideoError(f"{where}: the frames differ in size; give one size to resize all.")
    return torch.stack(images)


def lone_files(root: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files that hold a whole data set each: one that was named, or those in a folder without videos and images.

    root:     a file or folder. suffixes: in lower case.
    Returns:  regular files with one of the suffixes; none where a folder holds clips besides, since one is as likely
              meant as the other.
    Raises:   nothing.
    """
    if root.is_file():
        return [root] if root.suffix.lower() in suffixes else []
    if any(name.lower().endswith((*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)) for name in peek(root, DEEP)):
        return []
    files = [root / name for name in peek(root, 1) if name.lower().endswith(tuple(suffixes))]
    return [path for path in files if path.is_file()]


def is_video(name: str) -> bool:
    """Whether a file is a video by its name, and not hidden."""
    return name.lower().endswith(VIDEO_SUFFIXES) and not name.startswith(".")


def others_note(count: int) -> str:
    """Words for `found` on videos that are not called as the format calls them; empty for none."""
    return f" ({count} other video{'s' * (count != 1)} left aside; ?format=folder takes all)" if count else ""


def check_any(root: Path, usable: Sequence, skipped: list[tuple[str, str]]) -> None:
    """Refuse a data set without a usable clip, naming the first reason. Raises DataError."""
    if not usable:
        first = f"; the first: {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise DataError(f"{root}: no usable clip, {len(skipped)} unusable{first}")

