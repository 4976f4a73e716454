"""A short look into a folder, to recognise what it holds without listing all of it."""

import re
from collections.abc import Iterator
from itertools import islice
from os import scandir
from pathlib import Path

WIDE = 64  # entries looked at in a folder, and folders at a depth


def peek(root: Path, depth: int) -> Iterator[str]:
    """Names of some files and folders below a folder, the nearest first.

    root:    any path; a file, or a folder that cannot be listed, gives nothing.
    depth:   levels to go down; 1 is what lies in `root` itself.
    Returns: paths relative to `root` with forward slashes, at most 64 a folder; hidden ones are left out.
    Raises:  nothing.
    """
    level = [(root, "")]
    for _ in range(depth):
        below = []
        for folder, prefix in level:
            for name, is_folder in _entries(folder):
                yield prefix + name
                if is_folder and len(below) < WIDE:
                    below.append((folder / name, f"{prefix}{name}/"))
        level = below


def first_match(root: Path, depth: int, pattern: re.Pattern) -> str | None:
    """The first name that `peek` sees and whose whole last part fits a pattern.

    root, depth: as in `peek`. pattern: of a file's or folder's own name.
    Returns: the path relative to `root`, or None.
    Raises:  nothing.
    """
    return next((name for name in peek(root, depth) if pattern.fullmatch(name.rsplit("/", 1)[-1])), None)


def _entries(folder: Path) -> list[tuple[str, bool]]:
    try:
        with scandir(folder) as entries:
            return [(e.name, e.is_dir()) for e in islice(entries, WIDE) if not e.name.startswith(".")]
    except OSError:
        return []
