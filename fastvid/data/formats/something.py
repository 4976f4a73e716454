"""Something-Something: version 2 as webm files with lists in json, version 1 as folders of jpg with lists in csv."""

import json
import re
from collections.abc import Sequence
from os import scandir
from pathlib import Path
from typing import NamedTuple

from fastvid.data._layouts import Layout, Skipped, natural_key
from fastvid.data.formats._films import Film, film_layout
from fastvid.data.formats._peek import peek
from fastvid.data.formats._shared import choose_split
from fastvid.data.formats._stills import Stills, gap_note, images_in, still_layout
from fastvid.data.video import VIDEO_SUFFIXES
from fastvid.errors import DataError

NAME = "Something-Something"
OPTIONS = {
    "labels": "class (default: the template without brackets) or text (what was done, with the things named)",
    "list": "the json or csv to take, relative to the folder or to where you are",
}
SPLITS = ("train", "validation", "test")

# a folder of 220,847 clips is not listed to find these beside them
_LISTS = [f"{prefix}{split}.json" for prefix in ("something-something-v2-", "") for split in SPLITS]
_FIRST_LISTS = [f"something-something-v1-{split}.csv" for split in SPLITS]
_LIST = re.compile(r"(something-something-v[12]-)?(train|validation|test)\.(json|csv)")
_TELLING = re.compile(r"something-something-v[12]([-.].*)?|20bn-something-something-v[12]", re.IGNORECASE)


class Row(NamedTuple):
    """A clip of a list: its number, and its class or text where the list has one."""

    id: str
    label: str


def recognise(root: Path) -> str | None:
    """Whether a folder is Something-Something, version 1 or 2.

    root:    any path.
    Returns: the reason in words, or None.
    Raises:  nothing.
    Source:  Goyal et al. 2017, arXiv:1706.04261.
    """
    for name in _LISTS:
        if _lists_clips(root / name):
            return f"holds {name}"
    names = list(peek(root, 2))
    if _TELLING.fullmatch(root.absolute().name) and any(Path(name).stem.isdecimal() for name in names):
        return f"is called {root.absolute().name}"
    if telling := next((name for name in names if _TELLING.fullmatch(name.rsplit("/", 1)[-1])), None):
        return f"holds {telling}"
    plain = next((name for name in names if name.endswith(("train.json", "validation.json"))), None)
    if plain and _lists_clips(root / plain):
        return f"{plain} lists clips with templates"
    if any(Path(name).stem.isdecimal() for name in peek(root, 1)) and (lists := _lists_above(root)):
        return f"holds numbered clips, {next(iter(lists.values())).name} lies above it"
    return None


def open_layout(root: Path, split: str | None, options: dict[str, str]) -> Layout:
    """The clips of one list that are there, in its order.

    Clips are {id}.webm, or folders {id}/ of numbered images, in `root` or one folder below it. Lists are train,
    validation and test, with or without something-something-v2- before it, in `root` or one folder below; where there
    are none, in the folder above `root` or in labels/ there.

    root:    the folder above clips and lists. split: train, validation or test. options: see OPTIONS.
    Returns: Layout; labels where the list has them (that of test has none); clips that are missing or do not open are
             in `skipped`.
    Raises:  DataError for a damaged list, an unknown split or option, or no usable clip.
    Source:  Goyal et al. 2017, arXiv:1706.04261.
    """
    wish = options.get("labels", "class")
    if wish not in ("class", "text"):
        raise DataError(f"{root}: labels must be class or text, got '{wish}'.")
    lists = {} if "list" in options else _find_lists(root)
    name, found = choose_split(root, split, [split for split in SPLITS if split in lists])
    chosen = _chosen(root, options["list"]) if "list" in options else lists.get(name)
    films, folders = _clips(root)
    rows = _rows(chosen, wish) if chosen else [Row(id, "") for id in sorted({*films, *folders}, key=natural_key)]
    found += f" by {chosen.name}" if chosen else ", no list of clips there"
    skipped: Skipped = []
    missing = [row.id for row in rows if row.id not in films and row.id not in folders]
    if chosen:
        skipped += [(id, f"no such clip, {chosen.name} names it") for id in missing]
    if films:
        there = [Film(films[row.id], row.label) for row in rows if row.id in films]
        found += f" ({len(folders)} folders of images left aside)" if folders else ""
        return film_layout(root, there, found, skipped)
    stills = _stills(root, [row for row in rows if row.id in folders], folders, skipped)
    return still_layout(root, stills, found + gap_note(stills), skipped)


def _clips(root: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Video files and folders that are called by a number, in `root` and one level below; the first of a number."""
    films: dict[str, Path] = {}
    folders: dict[str, Path] = {}
    level = [root]
    for _ in range(2):
        below: list[Path] = []
        for folder in level:
            for name, is_folder in _entries(folder):
                stem, dot, suffix = name.rpartition(".")
                if name.isdecimal() and is_folder:
                    folders.setdefault(name, folder / name)
                elif stem.isdecimal() and dot + suffix.lower() in VIDEO_SUFFIXES:
                    films.setdefault(stem, folder / name)
                elif is_folder:
                    below.append(folder / name)
        level = below
    return films, folders


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """Names in a folder, sorted, and whether each is a folder; hidden ones are left out."""
    try:
        with scandir(folder) as entries:
            return sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror}.") from error


def _stills(root: Path, rows: Sequence[Row], folders: dict[str, Path], skipped: Skipped) -> list[Stills]:
    stills = []
    for row in rows:
        folder = folders[row.id]
        try:
            stills.append(Stills(folder.relative_to(root).as_posix(), folder, images_in(folder), row.label))
        except OSError as error:
            skipped.append((row.id, str(error.strerror)))
    return stills


def _find_lists(root: Path) -> dict[str, Path]:
    places = [root, *(root / name for name, is_folder in _entries(root) if is_folder and not name.isdecimal())]
    paths = [place / name for place in places for name, is_folder in _entries(place) if not is_folder]
    matches = [(match[2], path) for path in paths if (match := _LIST.fullmatch(path.name))]
    matches.sort(key=lambda found: found[1].suffix == ".json")  # of two lists the one in json counts
    return dict(matches) or _lists_above(root)


def _lists_above(root: Path) -> dict[str, Path]:
    """Lists beside the folder of clips; plain names count only together with a list that is one by its content."""
    above = root.absolute().parent
    for place in (above, above / "labels"):
        for names in (_LISTS[:3], _LISTS[3:], _FIRST_LISTS):
            lists = {split: place / name for split, name in zip(SPLITS, names, strict=True)}
            lists = {split: path for split, path in lists.items() if path.is_file()}
            if any(map(_lists_clips, lists.values())):
                return lists
    return {}


def _lists_clips(path: Path) -> bool:
    """Whether a file is a list, by a name that nothing else has or by how it begins."""
    if not path.is_file() or not (match := _LIST.fullmatch(path.name)):
        return False
    if match[1]:
        return True
    with path.open("rb") as file:
        first = file.read(2048)
    return b'"template"' in first and b'"id"' in first


def _chosen(root: Path, name: str) -> Path:
    path = next((path for path in (root / name, Path(name)) if path.is_file()), None)
    if path is None:
        raise DataError(f"{root}: list={name} is not there, nor where you are.")
    return path


def _rows(path: Path, wish: str) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = _json_rows(text, wish) if path.suffix == ".json" else _csv_rows(text)
        if wrong := next((row for row in rows if not row.id.isdecimal()), None):
            raise ValueError(f"wanted a number as id, got {wrong.id[:80]!r}")
        return rows
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        told = "nested too deeply" if isinstance(error, RecursionError) else f"{type(error).__name__} {error}"
        raise DataError(f"{path}: cannot be read as a list of clips: {told}.") from error


def _json_rows(text: str, wish: str) -> list[Row]:
    """Objects with id, and outside the test list label (a sentence) and template (things in brackets)."""
    entries = json.loads(text)
    if wish == "text":
        return [Row(str(entry["id"]), entry.get("label", "")) for entry in entries]
    brackets = str.maketrans("", "", "[]")
    return [Row(str(entry["id"]), entry.get("template", "").translate(brackets)) for entry in entries]


def _csv_rows(text: str) -> list[Row]:
    """Lines such as "100218;Holding something"; in the list of test the number stands alone."""
    return [Row(*line.partition(";")[::2]) for line in text.splitlines() if line.strip()]
