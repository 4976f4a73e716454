"""Videos and folders of frames of no known format, whole or in folders of splits."""

import os
from collections import Counter
from pathlib import Path

from fastvid.data._layouts import Layout, Skipped, natural_key
from fastvid.data.formats._films import Film, film_layout
from fastvid.data.formats._shared import OTHER_NAMES, choose_split
from fastvid.data.formats._stills import Stills, still_layout
from fastvid.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from fastvid.errors import DataError

FOLDER = "folder"  # ?format=folder: these rules, whatever the names look like
DIVIDING = {"train", "training", "test", "testing"}  # a folder val/ alone does not make the others no clips


def open_plain(root: Path, split: str | None) -> Layout:
    """The clips of a video file or a folder, by their suffixes alone.

    root:    an existing file or folder. split: asked for, or None.
    Returns: Layout of the videos at any depth, or else of the folders that hold images; either of one split where
             there are folders train/ or test/, or one that is called as the split.
    Raises:  DataError for a missing split, or where there are neither.
    """
    if root.is_file():
        return film_layout(root.parent, [Film(root)], f"video file {root}", [])
    if not root.is_dir():
        raise DataError(f"{root}: is neither a file nor a folder.")
    found = f"{FOLDER} {root}"
    known = [name for names in OTHER_NAMES.values() for name in names]
    splits = [name for name in dict.fromkeys((*known, split)) if name and (root / name).is_dir()]
    named = split not in (None, "train", "test")
    if named and not splits:
        raise DataError(f"{root}: no folder {split}/ below it for split={split}.")
    if named or DIVIDING & set(splits):
        own, words = choose_split(root, split, splits)
        return _from_folder(root / own, f"{found}, {words}")
    if split:
        found += f" (no train/ and test/ below, so all clips count as {split})"
    return _from_folder(root, found)


def _from_folder(root: Path, found: str) -> Layout:
    films: list[Path] = []
    images: dict[Path, list[str]] = {}
    others: Counter[str] = Counter()
    skipped: Skipped = []
    for at, below, files in os.walk(root, onerror=lambda e: skipped.append((str(e.filename), str(e.strerror)))):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in sorted((name for name in files if not name.startswith(".")), key=natural_key):
            suffix = Path(name).suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                images.setdefault(Path(at), []).append(name)
            elif suffix in VIDEO_SUFFIXES:
                films.append(Path(at, name))
            else:
                others[suffix or "no suffix"] += 1
    if films:
        others += Counter({"images": sum(map(len, images.values()))})
    if others:
        found += f" ({sum(others.values())} files of other kinds left aside: {', '.join(sorted(others))})"
    if films:
        return film_layout(root, [Film(path) for path in sorted(films, key=natural_key)], found, skipped)
    if not images:
        raise DataError(f"{root}: no clips: neither videos ({' '.join(VIDEO_SUFFIXES)}) nor folders of frames in it.")
    clips = [Stills(_name(folder, root), folder, images[folder]) for folder in sorted(images, key=natural_key)]
    return still_layout(root, clips, found, skipped)


def _name(folder: Path, root: Path) -> str:
    return folder.relative_to(root).as_posix() if folder != root else root.name
