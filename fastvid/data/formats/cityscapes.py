"""Cityscapes, the sequence set: numbered png frames in folders of cities."""

import re
from itertools import groupby
from pathlib import Path

from fastvid.data._layouts import Layout, Skipped, natural_key
from fastvid.data.formats._peek import first_match
from fastvid.data.formats._shared import choose_split
from fastvid.data.formats._stills import Stills, images_in, runs, still_layout
from fastvid.errors import DataError

NAME = "Cityscapes"
OPTIONS = {"crop": "cut the centre square of so many pixels out of each frame (1024 takes 512 off left and right)"}
SPLITS = ("train", "val", "test")
TOP = "leftImg8bit_sequence"

FRAME = re.compile(r"(.+)_(\d{6})_(\d{6})_leftImg8bit\.(png|jpg)")


def recognise(root: Path) -> str | None:
    """Whether a folder is the sequence set of Cityscapes, or the one above it.

    root:    any path.
    Returns: the reason in words, or None.
    Raises:  nothing.
    Source:  Cordts et al. 2016, arXiv:1604.01685.
    """
    if (root / TOP).is_dir():
        return f"holds {TOP}/"
    seen = first_match(root, 3, FRAME)
    return f"frames are called as in {seen}" if seen else None


def open_layout(root: Path, split: str | None, options: dict[str, str]) -> Layout:
    """Stretches of consecutive frames of one sequence as clips.

    Some cities were recorded as few long sequences of which 30-frame snippets are published, so that a clip ends
    where the frame numbers jump, not only where the sequence's number changes.

    root:    leftImg8bit_sequence/, the folder above it, or one of its splits or cities.
    split:   train, val or test; test is the public images of test/, or val/ where those are not there.
    options: see OPTIONS. The recurrent models' protocol is crop=1024, then 64 or 128 pixels; a square size asks
             `fit_frames` for the same crop.
    Returns: Layout; names are city_sequence_firstframe.
    Raises:  DataError for an unknown split or option, or no usable clip.
    Source:  Cordts et al. 2016, arXiv:1604.01685; the crop is that of Castrejon et al. 2019, arXiv:1904.12165.
    """
    crop = options.get("crop")
    if crop is not None and (not crop.isdecimal() or int(crop) < 1):
        raise DataError(f"{root}: crop must be a whole number of pixels from 1 on, got '{crop}'.")
    home = root / TOP if (root / TOP).is_dir() else root
    name, found = choose_split(root, split, [name for name in SPLITS if (home / name).is_dir()])
    top = home / name if name else home
    skipped: Skipped = []
    clips = [clip for folder in _cities(top) for clip in _snippets(root, folder, skipped)]
    found += f", crop {crop}" if crop else ""
    return still_layout(root, clips, found, skipped, int(crop) if crop else None)


def _cities(top: Path) -> list[Path]:
    try:
        below = sorted((p for p in top.iterdir() if p.is_dir() and not p.name.startswith(".")), key=natural_key)
    except OSError as error:
        raise DataError(f"{top}: cannot be listed: {error.strerror}.") from error
    return [top, *below]


def _snippets(root: Path, folder: Path, skipped: Skipped) -> list[Stills]:
    names = images_in(folder)
    frames = sorted((*_place(match), match[0]) for match in map(FRAME.fullmatch, names) if match)
    if others := len(names) - len(frames):
        skipped.append((folder.relative_to(root).as_posix(), f"{others} images are not called like frames"))
    clips = []
    for (city, sequence), group in groupby(frames, key=lambda frame: frame[:2]):
        members = list(group)
        for first, end in runs([number for _, _, number, _ in members]):
            name = f"{city}_{sequence:06d}_{members[first][2]:06d}"
            clips.append(Stills(name, folder, [file for *_, file in members[first:end]]))
    return clips


def _place(match: re.Match) -> tuple[str, int, int]:
    return match[1], int(match[2]), int(match[3])
