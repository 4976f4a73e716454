"""Kinetics-400, -600 and -700: lists of YouTube clips as csv, and those of the clips that could be had."""

import csv
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fastvid.data._layouts import Layout, Skipped, natural_key
from fastvid.data.formats._films import Film, film_layout
from fastvid.data.formats._peek import first_match
from fastvid.data.formats._shared import OTHER_NAMES, choose_split, is_video, others_note
from fastvid.errors import DataError

NAME = "Kinetics"
OPTIONS = {"csv": "the list of clips to take, relative to the folder or to where you are"}
SPLITS = ("train", "val", "test")
COLUMNS = {"youtube_id", "time_start", "time_end"}

_CANONICAL = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(OTHER_NAMES["val"], "val")
_CLIP = re.compile(r"([\w-]{11})_\d{6}_\d{6}\.(mp4|mkv|webm|avi|mov|m4v)", re.IGNORECASE)
_ID = re.compile(r"[\w-]{11}")
_STEM = re.compile(r"[\w-]{11}(_\d{6}_\d{6})?")
# train_256 and videos_train are what scripts that shrink or sort the clips make of train
_FOLDER = re.compile(r"(?:videos?_|rawframes_)?(train|training|test|val|valid|validate|validation)(?:_\d+)?")


class Row(NamedTuple):
    """A line of a list: the clip's name as its file would have it, the bare id, class, split, and the list's name."""

    clip: str
    id: str
    label: str
    split: str | None
    source: str


def recognise(root: Path) -> str | None:
    """Whether a folder holds clips or lists of Kinetics.

    root:    any path.
    Returns: the reason in words, or None.
    Raises:  nothing.
    Source:  Kay et al. 2017, arXiv:1705.06950; Carreira et al. 2018, arXiv:1808.01340.
    """
    if seen := first_match(root, 3, _CLIP):
        return f"clips are called as in {seen}"
    lists = _csv_files(root) if root.is_dir() else []
    return f"{lists[0].name} lists clips by youtube_id" if lists and _header(lists[0]) else None


def open_layout(root: Path, split: str | None, options: dict[str, str]) -> Layout:
    """The clips of one split that are there, in the order of the list, with their classes as labels.

    A clip is {id}_{start}_{end}.mp4 (six digits each), or else {id}.mp4 taken whole, at any depth; it belongs to the
    split that the csv's column says, or the csv's name, or without any csv the folder train/, val/ or test/, also
    train_256/, videos_train/ and the like. Videos called otherwise are left aside, and counted in `found`.

    root:    the folder that holds the clips; lists are looked for in it and in annotations/.
    split:   train, val or test; test is val where no clip of test is there. options: see OPTIONS.
    Returns: Layout; listed clips without a file and files that do not open are in `skipped`, which is usual here.
    Raises:  DataError for a list that cannot be read, an unknown split, or no usable clip.
    Source:  Kay et al. 2017, arXiv:1705.06950; Carreira et al. 2018, arXiv:1808.01340.
    """
    skipped: Skipped = []
    files, others = _files(root, skipped)
    lists = [_chosen(root, options["csv"])] if "csv" in options else [p for p in _csv_files(root) if _header(p)]
    rows = [row for path in lists for row in _rows(path, skipped)]
    listed = [name for name in SPLITS if any(row.split == name and _file(row, files) for row in rows)]
    apart = set() if "csv" in options else {_split_of(root, path) for path in files.values()}
    folders = [name for name in SPLITS if name in apart and name not in listed]
    available = [name for name in SPLITS if name in listed or name in folders]
    if not available and any(row.split for row in rows):
        available = [name for name in SPLITS if any(row.split == name for row in rows)]  # to say what is missing
    name, found = choose_split(root, _CANONICAL.get(split, split), available)
    found += others_note(others)
    if name in folders or not rows:
        return film_layout(root, _by_folder(root, name, files), f"{found}, no csv for it", skipped)
    taken = [row for row in rows if name is None or row.split == name]
    films = _listed(taken, files, skipped)
    sources = ", ".join(dict.fromkeys(row.source for row in taken))
    return film_layout(root, films, f"{found} by {sources}, {len(films)} of {len(taken)} clips there", skipped)


def _files(root: Path, skipped: Skipped) -> tuple[dict[str, Path], int]:
    """Clips by the stem of their name, a second file of one name skipped; and how many videos are called otherwise."""
    paths = []
    for folder, below, names in os.walk(root, onerror=lambda e: skipped.append((str(e.filename), str(e.strerror)))):
        below[:] = [name for name in below if not name.startswith(".")]
        paths += [Path(folder) / name for name in names if is_video(name)]
    files: dict[str, Path] = {}
    clips = [path for path in paths if _STEM.fullmatch(path.stem)]
    for path in sorted(clips, key=natural_key):
        first = files.setdefault(path.stem, path)
        if first is not path:
            skipped.append((path.relative_to(root).as_posix(), f"the same clip as {first.relative_to(root)}"))
    return files, len(paths) - len(clips)


def _file(row: Row, files: dict[str, Path]) -> Path | None:
    return files.get(row.clip) or files.get(row.id)


def _listed(rows: Iterable[Row], files: dict[str, Path], skipped: Skipped) -> list[Film]:
    films: dict[Path, Film] = {}
    for row in rows:
        path = _file(row, files)
        if path is None:
            skipped.append((row.clip, f"no such file, {row.source} names it"))
        elif path in films:
            skipped.append((row.clip, f"{path.name} stands for an earlier line already"))
        else:
            films[path] = Film(path, row.label)
    return list(films.values())


def _split_of(root: Path, path: Path) -> str | None:
    """By the folders that a clip lies in."""
    matches = map(_FOLDER.fullmatch, path.relative_to(root).parts[:-1])
    return next((_CANONICAL[match[1]] for match in matches if match), None)


def _by_folder(root: Path, name: str | None, files: dict[str, Path]) -> list[Film]:
    """Without a list: the clips in the split's folder, or all; if they lie in several folders, those are classes."""
    paths = [path for path in files.values() if name is None or _split_of(root, path) == name]
    classes = len({path.parent.name for path in paths}) > 1
    return [Film(path, path.parent.name if classes and path.parent != root else None) for path in paths]


def _csv_files(root: Path) -> list[Path]:
    places = [folder for folder in (root, root / "annotations") if folder.is_dir()]
    return sorted((path for folder in places for path in folder.glob("*.csv")), key=natural_key)


def _chosen(root: Path, name: str) -> Path:
    path = next((path for path in (root / name, Path(name)) if path.is_file()), None)
    if path is None:
        raise DataError(f"{root}: csv={name} is not there, nor where you are.")
    if not _header(path):
        raise DataError(f"{path}: its first line must name the columns {', '.join(sorted(COLUMNS))}.")
    return path


def _header(path: Path) -> Sequence[str]:
    """The columns of a list of clips; empty for any other csv."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            first = file.readline(4096)
    except OSError:
        return ()
    columns = [column.strip().strip('"') for column in first.split(",")]
    return columns if set(columns) >= COLUMNS else ()


def _rows(path: Path, skipped: Skipped) -> Iterator[Row]:
    word = next((_CANONICAL[word] for word in re.split(r"[\W_]+", path.stem.lower()) if word in _CANONICAL), None)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            file.readline(4096)
            for number, cells in enumerate(csv.DictReader(file, _header(path), restkey="more"), 2):
                row = _row(cells, word, path.name)
                if row:
                    yield row
                else:
                    skipped.append((f"{path.name} line {number}", "no youtube_id with a start and an end in it"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a list of clips: {error}.") from error


def _row(cells: dict, word: str | None, source: str) -> Row | None:
    texts = {key: (value or "").strip() for key, value in cells.items() if key != "more"}
    try:
        start, end = (int(float(texts[key])) for key in ("time_start", "time_end"))
    except (ValueError, OverflowError):
        return None
    if not _ID.fullmatch(texts["youtube_id"]):
        return None
    split = _CANONICAL.get(texts.get("split", "").lower(), word)
    name = f"{texts['youtube_id']}_{start:06d}_{end:06d}"
    return Row(name, texts["youtube_id"], texts.get("label", ""), split, source)
