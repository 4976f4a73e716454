"""What the formats share: names of splits, what lies in a folder, and clips of still images."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastvid.data.formats._peek import peek
from fastvid.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, check_budget, fit_frames
from fastvid.errors import DataError, VideoError

# what a split is called elsewhere, the best first: a set without a public test is measured on its validation clips
OTHER_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "validation", "validate", "valid"),
    "val": ("val", "validation", "validate", "valid"),
    "validation": ("validation", "val", "validate", "valid"),
}
DEEP = 5  # levels searched for clips before an array beside them is taken for the data set


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


def stack_images(images: Iterable[Tensor], count: int, size: tuple[int, int] | None, where: str) -> Tensor:
    """One clip of still images, each fitted as it comes, so that one at a time is there in its full size.

    images:  uint8 [H, W, 3] each. count: how many will come.
    size:    (H, W) to which `fit_frames` brings each; None keeps their own, equal for all.
    where:   what to call the clip in a message.
    Returns: uint8 [T, H, W, 3].
    Raises:  VideoError if they differ in size and no size was given, or together exceed the limit of one read.
    """
    kept: list[Tensor] = []
    for image in images:
        kept.append(fit_frames(image[None], *size)[0][0] if size else image)
        if len(kept) == 1:
            check_budget(where, count, kept[0])
        if kept[-1].shape != kept[0].shape:
            raise VideoError(f"{where}: the frames differ in size; give one size to resize all.")
    return torch.stack(kept)


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
