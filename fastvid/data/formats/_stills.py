"""Data sets of still images: folders of numbered frames as clips, with gaps in the numbers told."""

import re
import sys
from collections.abc import Iterable, Sequence
from os import scandir
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fastvid.data._images import image_file
from fastvid.data._layouts import Layout, Size, Skipped, natural_key
from fastvid.data.formats._shared import check_any, stack_images
from fastvid.data.video import IMAGE_SUFFIXES
from fastvid.errors import VideoError

GAPS_TOLD = 8


class Stills(NamedTuple):
    """A clip of images: its name, the folder, the files' names in order, and its class where there is one."""

    name: str
    folder: Path
    files: Sequence[str]
    label: str | None = None


def still_layout(
    root: Path, clips: Sequence[Stills], found: str, skipped: Skipped, crop: int | None = None
) -> Layout:
    """A Layout of clips of images. No image is opened before its clip is read.

    root:    of the data set, for messages. clips: in order; those without a file are added to `skipped`.
    found, skipped: as in Layout. crop: cut the centre square of so many pixels out of each image first.
    Returns: Layout, one frame a file; labels where any clip has one.
    Raises:  DataError if no clip has a file; `load` raises VideoError for images that cannot be read or cropped.
    """
    skipped += [(clip.name, "no image in it") for clip in clips if not clip.files]
    usable = [clip for clip in clips if clip.files]
    check_any(root, usable, skipped)

    def load(i: int, start: int, count: int, size: Size | None) -> Tensor:
        clip = usable[i]
        paths = [clip.folder / name for name in clip.files[start : start + count]]
        images = (_centre(image_file(path), crop, path) if crop else image_file(path) for path in paths)
        return stack_images(images, count, size, str(clip.folder))

    labels = [clip.label or "" for clip in usable] if any(clip.label for clip in usable) else None
    return Layout([clip.name for clip in usable], [len(clip.files) for clip in usable], load, found, skipped, labels)


def images_in(folder: Path) -> list[str]:
    """Names of the images that lie in a folder, in natural order.

    folder:  an existing folder.
    Returns: names; hidden files, other kinds, and what is no file (a pipe would be waited for) are left out.
    Raises:  OSError if the folder cannot be listed.
    """
    with scandir(folder) as entries:
        # interned: frame names such as 00001.jpg come back in every clip
        names = [sys.intern(entry.name) for entry in entries if _is_image(entry.name) and entry.is_file()]
    return sorted(names, key=natural_key)


def frame_number(name: str) -> int | None:
    """The last number in a file's name, which counts the frames: 12 for abc3_frames_00000012.jpg; None without one."""
    numbers = re.findall(r"\d+", name.rsplit(".", 1)[0])
    return int(numbers[-1]) if numbers else None


def runs(numbers: Sequence[int | None]) -> list[tuple[int, int]]:
    """Stretches in which each number follows the one before.

    numbers: of the frames in order; None for a frame without a number, which breaks nothing.
    Returns: (first, last + 1) positions, together all of `numbers`.
    Raises:  nothing.
    """
    pairs = zip(numbers, numbers[1:], strict=False)
    cuts = [i for i, (a, b) in enumerate(pairs, 1) if a is not None and b is not None and b != a + 1]
    return list(zip([0, *cuts], [*cuts, len(numbers)], strict=True))


def gap_note(clips: Iterable[Stills]) -> str:
    """Which clips lack frames in their middle, in words for `found`.

    clips:   clips whose files are numbered.
    Returns: "; 2 clips lack frames: a (after frame 3), b (after frame 17)" or an empty text.
    Raises:  nothing.
    """
    gaps = []
    for clip in clips:
        numbers = [frame_number(name) for name in clip.files]
        if breaks := runs(numbers)[:-1]:
            gaps.append(f"{clip.name} (after frame {', '.join(str(numbers[end - 1]) for _, end in breaks[:3])})")
    if not gaps:
        return ""
    more = f" and {len(gaps) - GAPS_TOLD} more" if len(gaps) > GAPS_TOLD else ""
    lacking = "1 clip lacks" if len(gaps) == 1 else f"{len(gaps)} clips lack"
    return f"; {lacking} frames: {', '.join(gaps[:GAPS_TOLD])}{more}"


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _centre(image: Tensor, crop: int, path: Path) -> Tensor:
    height, width, _ = image.shape
    if min(height, width) < crop:
        raise VideoError(f"{path}: crop={crop} wanted, but the image is {width}x{height} (width x height).")
    top, left = (height - crop) // 2, (width - crop) // 2
    return image[top : top + crop, left : left + crop].contiguous()
