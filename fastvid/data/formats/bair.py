"""BAIR robot pushing as published: TFRecord files of trajectories, 64x64 RGB from two cameras, with actions."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvid.data._images import decode_image, image_codec
from fastvid.data._layouts import Layout, Size, Skipped, natural_key
from fastvid.data.formats._peek import first_match
from fastvid.data.formats._shared import check_any, choose_split, stack_images
from fastvid.data.formats._tfrecord import Feature, index_records, parse_example, read_record
from fastvid.data.video import fit_frames
from fastvid.errors import DataError, VideoError

NAME = "BAIR robot pushing (TFRecords)"
OPTIONS = {"camera": "aux1, as all papers take (the default), main, or another that the records have"}

FILE = re.compile(r"traj_(\d+)_to_(\d+)\.tfrecords?")
INNER = "softmotion30_44k"  # the folder in the published archive
SPLITS = ("train", "val", "test")
WORKERS = 8  # reading lengths waits for the disk, not for the processor
ABSENT = (ValueError, OSError)


class Record(NamedTuple):
    """Where one trajectory lies."""

    path: Path
    number: int
    offset: int
    length: int

    def read(self) -> dict[str, Feature]:
        """Its features, the checksum verified. Raises VideoError if it is damaged."""
        try:
            return parse_example(read_record(self.path, self.offset, self.length))
        except ABSENT as error:
            raise VideoError(f"{self}: {error}; download the file anew.") from error

    def __str__(self) -> str:
        return f"{self.path}, record {self.number}"


def recognise(root: Path) -> str | None:
    """Why `root` holds BAIR's TFRecords, in words, or None.

    root:    a file or folder. Returns: words that name the file seen. Raises: nothing.
    """
    if root.is_file():
        return f"named {root.name}" if FILE.fullmatch(root.name) else None
    for place in ("", *SPLITS, INNER, *(f"{INNER}/{split}" for split in SPLITS)):
        if seen := first_match(root / place, 1, FILE):
            return f"it holds {Path(place, seen).as_posix()}"
    return None


def open_layout(root: Path, split: str | None, options: dict[str, str]) -> Layout:
    """The trajectories of a split, one clip each.

    root:    a .tfrecords file, a folder of them, or one with train/ and test/ below. split: asked for, or None.
    options: camera.
    Returns: Layout; frames are those of the first record, as everywhere in BAIR (30). No image is decoded yet.
    Raises:  DataError for no usable record, a missing split or a camera that the records do not have.
    Source:  Ebert et al. 2017, arXiv:1710.05268; keys "{t}/image_aux1/encoded" hold raw RGB despite their name.
    """
    folder, words = _folder(root, split)
    records, skipped = _index(folder)
    check_any(root, records, skipped)
    first = _first_readable(records)
    camera = _camera(root, first, options.get("camera"))
    stored = [_encoded(first, t, camera, records[0]) for t in range(_count(first, camera))]
    side = _raw_side(stored)

    def load(i: int, start: int, count: int, size: Size | None) -> Tensor:
        record = records[i]
        features = record.read()
        images = [_encoded(features, t, camera, record) for t in range(start, start + count)]
        if side is None:
            return stack_images((decode_image(image, str(record)) for image in images), count, size, str(record))
        return _raw_clip(images, side, size, record)

    names = [f"{_relative(record.path, root)}/{record.number}" for record in records]
    kind = "JPEG or PNG" if side is None else f"raw {side}x{side}"
    return Layout(names, [len(stored)] * len(records), load, f"{words}, camera {camera}, {kind}", skipped)


def read_actions(root: str | Path, clips: Sequence[int], split: str | None = None) -> tuple[Tensor, Tensor]:
    """What the robot was told and where its gripper was, for some clips in the order in which they are opened.

    root:    what `open_layout` takes. clips: numbers from 0. split: as there.
    Returns: actions [n, T, 4] and end-effector positions [n, T, 3], float32, in the units of the data set (metres
             and radians as its authors say).
    Raises:  DataError for a number outside the data set; VideoError for a record that is damaged or lacks them.
    Source:  keys "{t}/action" and "{t}/endeffector_pos".
    """
    records, _ = _index(_folder(Path(root), split)[0])
    outside = [i for i in clips if not 0 <= i < len(records)]
    if outside:
        raise DataError(f"{root}: clip {outside[0]} wanted, but there are {len(records)}.")
    rows = [(record, record.read()) for record in (records[i] for i in clips)]
    return _series(rows, "action", 4), _series(rows, "endeffector_pos", 3)


def _folders(root: Path) -> list[str]:
    return [name for name in (*SPLITS, INNER) if (root / name).is_dir()]


def _folder(root: Path, split: str | None) -> tuple[Path, str]:
    """The folder or file of the split that was asked for, and words for it."""
    top = root / INNER if (root / INNER).is_dir() else root
    available = [name for name in SPLITS if (top / name).is_dir()]
    own, words = choose_split(root, split, available)
    return (top / own if own else top), words


def _index(folder: Path) -> tuple[list[Record], Skipped]:
    """All records of a folder or file, by reading their lengths, and what is missing from what file names promise."""
    inside = [folder] if folder.is_file() else list(folder.iterdir())
    files = sorted((path for path in inside if FILE.fullmatch(path.name) and path.is_file()), key=natural_key)
    with ThreadPoolExecutor(WORKERS) as pool:
        parts = list(pool.map(_index_file, files))
    return [record for records, _ in parts for record in records], [entry for _, bad in parts for entry in bad]


def _index_file(path: Path) -> tuple[list[Record], Skipped]:
    first, last = map(int, FILE.fullmatch(path.name).groups())
    promised = last - first + 1
    try:
        places, problem = index_records(path, max(0, promised) + 1)
    except OSError as error:
        return [], [(path.name, f"cannot be read: {error.strerror}")]
    if len(places) > promised:
        problem = f"holds more records than the {promised} of its name; the rest is left aside"
    elif len(places) < promised:
        problem = f"its name promises {promised} records, {len(places)} are there" + (f"; {problem}" if problem else "")
    records = [Record(path, number, *place) for number, place in enumerate(places[: max(0, promised)])]
    return records, [(path.name, problem)] if problem else []


def _first_readable(records: list[Record]) -> dict[str, Feature]:
    """The features of the first record that can be read; a few bad ones before it are for `load` to name."""
    reason = None
    for record in records[:16]:
        try:
            return record.read()
        except VideoError as error:
            reason = reason or error
    raise DataError(f"no record can be read; the first: {reason}")


def _key(t: int, camera: str) -> str:
    return f"{t}/image_{camera}/encoded"


def _camera(root: Path, first: dict[str, Feature], asked: str | None) -> str:
    cameras = sorted(match[1] for key in first if (match := re.fullmatch(r"0/image_(\w+)/encoded", key)))
    if not cameras:
        raise DataError(f"{root}: the records hold no key like {_key(0, 'aux1')}, but {', '.join(sorted(first)[:4])}.")
    if asked and asked not in cameras:
        raise DataError(f"{root}: no camera '{asked}' in the records; there are: {', '.join(cameras)}.")
    return asked or ("aux1" if "aux1" in cameras else cameras[0])


def _count(first: dict[str, Feature], camera: str) -> int:
    return next(t for t in range(len(first) + 1) if _key(t, camera) not in first)


def _encoded(features: dict[str, Feature], t: int, camera: str, record: Record) -> bytes:
    value = features.get(_key(t, camera))
    if not isinstance(value, list) or len(value) != 1:
        raise VideoError(f"{record}: {_key(t, camera)} is not there; the record is shorter than the others.")
    return value[0]


def _raw_side(stored: list[bytes]) -> int | None:
    """Height and width of raw square RGB; None for JPEG or PNG."""
    side = isqrt(len(stored[0]) // 3)
    # by length first, since a raw image may begin with any bytes; of one image alone the beginning decides
    raw = {len(image) for image in stored} == {3 * side * side}
    return side if raw and (len(stored) > 1 or image_codec(stored[0]) is None) else None


def _raw_clip(images: list[bytes], side: int, size: Size | None, record: Record) -> Tensor:
    wrong = [len(image) for image in images if len(image) != 3 * side * side]
    if wrong:
        raise VideoError(f"{record}: an image of {wrong[0]} bytes, raw {side}x{side} has {3 * side * side}.")
    pixels = np.frombuffer(b"".join(images), np.uint8).copy()
    clip = torch.from_numpy(pixels).view(-1, side, side, 3)  # [T, H, W, 3]
    return fit_frames(clip, *size)[0] if size else clip


def _series(rows: list[tuple[Record, dict[str, Feature]]], name: str, width: int) -> Tensor:
    series = []
    for record, features in rows:
        steps = next(t for t in range(len(features) + 1) if f"{t}/{name}" not in features)
        values = [features[f"{t}/{name}"] for t in range(steps)]
        if not values or any(not isinstance(v, np.ndarray) or v.shape != (width,) for v in values):
            raise VideoError(f"{record}: wanted {width} numbers under 0/{name} and so on, they are not there.")
        series.append(np.stack(values).astype(np.float32))
    if any(len(values) != len(series[0]) for values in series):
        raise VideoError(f"{rows[0][0].path.parent}: the records differ in steps of {name}; ask for fewer clips.")
    return torch.from_numpy(np.stack(series)) if series else torch.empty(0, 0, width)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else path.name
