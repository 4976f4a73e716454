"""BAIR robot pushing as SVG's script unpacks it: one folder of numbered PNG a trajectory."""

import os
import re
from pathlib import Path

from fastvid.data._layouts import Layout, Skipped, natural_key
from fastvid.data.formats._peek import first_match
from fastvid.data.formats._shared import choose_split
from fastvid.data.formats._stills import Stills, images_in, still_layout

NAME = "BAIR robot pushing (PNG)"
OPTIONS: dict[str, str] = {}

GROUP = re.compile(r"traj_\d+_to_\d+")
NUMBER = re.compile(r"\d+")
FRAME = re.compile(r"(\d+)\.png")
INNER = "processed_data"
SPLITS = ("train", "val", "test")


def recognise(root: Path) -> str | None:
    """Why `root` holds the PNG tree, in words, or None.

    root:    a file or folder. Returns: words that name the folder seen. Raises: nothing.
    """
    for place in ("", *SPLITS, INNER, *(f"{INNER}/{split}" for split in SPLITS)):
        group = first_match(root / place, 1, GROUP)
        clip = group and first_match(root / place / group, 1, NUMBER)
        if clip and first_match(root / place / group / clip, 1, FRAME):
            return f"it holds {Path(place, group, clip).as_posix()}/0.png"
    return None


def open_layout(root: Path, split: str | None, options: dict[str, str]) -> Layout:
    """The trajectories of a split, one clip each; folders whose frames are not 0.png, 1.png, ... are left out.

    root:    processed_data, the folder around it, or one split of it. split: asked for, or None. options: none.
    Returns: Layout, one frame a file. No image is opened yet.
    Raises:  DataError for a missing split or no whole folder.
    Source:  the layout that edenton/svg (convert_bair.py) writes and the VRNN and LVT code read.
    """
    top = root / INNER if (root / INNER).is_dir() else root
    own, words = choose_split(root, split, [name for name in SPLITS if (top / name).is_dir()])
    top = top / own if own else top
    skipped: Skipped = []
    clips = []
    for folder in _folders(top, skipped, root):
        name = folder.relative_to(root).as_posix()
        files, reason = _frames(folder)
        if reason:
            skipped.append((name, reason))
        else:
            clips.append(Stills(name, folder, files))
    return still_layout(root, clips, words, skipped)


def _folders(top: Path, skipped: Skipped, root: Path) -> list[Path]:
    """traj_A_to_B/k, in natural order."""
    found: list[Path] = []
    for group in sorted(top.iterdir(), key=natural_key):
        if not GROUP.fullmatch(group.name):
            continue
        try:
            found += sorted((group / name for name in os.listdir(group) if NUMBER.fullmatch(name)), key=natural_key)
        except OSError as error:
            skipped.append((group.relative_to(root).as_posix(), f"cannot be listed: {error.strerror}"))
    return found


def _frames(folder: Path) -> tuple[list[str], str | None]:
    try:
        names = [name for name in images_in(folder) if FRAME.fullmatch(name)]
    except OSError as error:
        return [], f"cannot be listed: {error.strerror}"
    numbers = [int(FRAME.fullmatch(name)[1]) for name in names]
    missing = next((t for t, number in enumerate(numbers) if t != number), None)
    if missing is not None:
        return [], f"frame {missing}.png is missing"
    return names, None
