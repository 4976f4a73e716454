"""UCF-101: avi files, or such made of them, in folders of classes, with the official lists of training and test."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fastvid.data._layouts import Layout, Skipped, natural_key
from fastvid.data.formats._films import Film, film_layout
from fastvid.data.formats._peek import first_match
from fastvid.data.formats._shared import OTHER_NAMES, choose_split, is_video, others_note
from fastvid.errors import DataError

NAME = "UCF-101"
OPTIONS = {"list": "which of the official lists divides train and test: 1, 2 or 3 (default 1)"}
LISTS = "ucfTrainTestlist"

_CLIP = re.compile(r"v_(\w+)_g(\d\d)_c\d\d\.(?:avi|mp4|mkv|webm)", re.IGNORECASE)


class Entry(NamedTuple):
    """A clip that belongs to a split: its class and file, and where that is said."""

    label: str
    file: str
    said: str


def recognise(root: Path) -> str | None:
    """Whether a folder is UCF-101, or the folder above it.

    root:    any path.
    Returns: the reason in words, or None.
    Raises:  nothing.
    Source:  Soomro, Zamir, Shah 2012, arXiv:1212.0402.
    """
    seen = first_match(root, 3, _CLIP)
    return f"clips are called as in {seen}" if seen else None


def open_layout(root: Path, split: str | None, options: dict[str, str]) -> Layout:
    """The clips of one split; `all` is every clip. Labels are the names of the classes.

    Files converted to mp4, mkv or webm are those that the lists name as avi; videos called otherwise are left aside,
    and counted in `found`. The lists lie in ucfTrainTestlist/, in `root` or beside it. Without them, folders train/ and
    test/ divide the clips, and without those nothing does. Clips of one group (gNN of a class) show one scene: a group
    on both sides is refused, since the test clips would have been seen in training; `all` is not divided, so not
    looked at.

    root:    the folder of classes, or the one above. split: train, test or all. options: see OPTIONS.
    Returns: Layout; clips that a list names and that are not there are in `skipped`.
    Raises:  DataError for a damaged list, a group on both sides, an unknown list or split, or no usable clip.
    Source:  Soomro, Zamir, Shah 2012, arXiv:1212.0402.
    """
    number = options.get("list", "1")
    if number not in ("1", "2", "3"):
        raise DataError(f"{root}: list must be 1, 2 or 3, got '{number}'.")
    lists = _find_lists(root, number)
    if "list" in options and not lists:
        raise DataError(f"{root}: list={number} wanted, but no {LISTS}/trainlist0{number}.txt is in it or beside it.")
    files, others = _files(root)
    splits = lists or _folder_splits(root, files)
    if split != "all":
        _check_groups(root, splits)
    available = [*splits, "all"] if splits else []
    name, words = choose_split(root, split, available)
    found = f"{words} of {f'list {number}' if lists else 'its folders'}" if splits else f"no lists of splits, {words}"
    found += others_note(others)
    if name not in splits:
        return film_layout(root, [Film(path, _label(path)) for path in files.values()], found, [])
    skipped: Skipped = []
    films = _listed(splits[name], files, skipped)
    listed = {_stem(entry.file) for entries in splits.values() for entry in entries}
    if left := len(files.keys() - listed):
        found += f" ({left} clips are in none of the splits)"
    return film_layout(root, films, found, skipped)


def _files(root: Path) -> tuple[dict[str, Path], int]:
    """Every clip below `root` by its stem, and how many videos are called otherwise."""
    paths = [Path(at) / name for at, _, names in os.walk(root) for name in names if is_video(name)]
    clips = [path for path in paths if _CLIP.fullmatch(path.name)]
    files: dict[str, Path] = {}
    for path in sorted(clips, key=natural_key):
        files.setdefault(_stem(path.name), path)
    return files, len(paths) - len(clips)


def _stem(file: str) -> str:
    """In small letters and without the suffix: lists and folders differ in capitals, and in the container."""
    return file.lower().rpartition(".")[0]


def _listed(entries: Iterable[Entry], files: dict[str, Path], skipped: Skipped) -> list[Film]:
    films = []
    for entry in entries:
        path = files.get(_stem(entry.file))
        if path is None:
            skipped.append((f"{entry.label}/{entry.file}", f"no such file, {entry.said} names it"))
        else:
            films.append(Film(path, entry.label))
    return films


def _find_lists(root: Path, number: str) -> dict[str, list[Entry]]:
    """Entries of train and test by the official lists; empty where no list lies there."""
    for folder in (root / LISTS, root, root.absolute().parent / LISTS):
        paths = {split: folder / f"{split}list0{number}.txt" for split in ("train", "test")}
        missing = [path for path in paths.values() if not path.is_file()]
        if len(missing) == 1:
            raise DataError(f"{missing[0]}: is missing, its counterpart is there; without both nothing can be checked.")
        if not missing:
            return {split: _read_list(path) for split, path in paths.items()}
    return {}


def _read_list(path: Path) -> list[Entry]:
    """Lines such as "Archery/v_Archery_g08_c01.avi 3"; the lists of test clips leave the number out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of clips: {error}.") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        words = line.replace("\\", "/").split()
        label, _, file = words[0].rpartition("/")
        if not _CLIP.fullmatch(file) or len(words) > 2:
            raise DataError(f"{path}: line {number}: wanted Class/v_Class_gNN_cNN.avi, got '{line[:80]}'.")
        entries.append(Entry(label.rpartition("/")[2] or _CLIP.fullmatch(file)[1], file, path.name))
    return entries


def _folder_splits(root: Path, files: dict[str, Path]) -> dict[str, list[Entry]]:
    """Entries by the folders train/, val/ and test/ at the top; empty where there are none."""
    known = {name for names in OTHER_NAMES.values() for name in names}
    splits: dict[str, list[Entry]] = {}
    for path in files.values():
        top = path.relative_to(root).parts[0]
        if top in known:
            splits.setdefault(top, []).append(Entry(_label(path), path.name, f"{top}/"))
    return dict(sorted(splits.items(), key=lambda item: item[0] != "train"))


def _check_groups(root: Path, splits: dict[str, list[Entry]]) -> None:
    owners: dict[tuple[str, str], Entry] = {}
    for entries in splits.values():
        for entry in entries:
            owner = owners.setdefault(_group(entry), entry)
            if owner.said != entry.said:
                name, group = _group(entry)
                raise DataError(
                    f"{root}: group g{group} of {name} is on both sides: {owner.file} ({owner.said}) and "
                    f"{entry.file} ({entry.said}); a scene must not be in training and in test. To open the clips all "
                    "the same: ?split=all takes them undivided, ?format=folder goes by the folders alone."
                )


def _group(entry: Entry) -> tuple[str, str]:
    name, group = _CLIP.fullmatch(entry.file).groups()
    return name.lower(), group


def _label(path: Path) -> str:
    """The class by the folder, or by the file's name where the folder is called otherwise."""
    name = _CLIP.fullmatch(path.name)[1]
    return path.parent.name if path.parent.name.lower() == name.lower() else name
