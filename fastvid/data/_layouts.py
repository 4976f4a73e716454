"""What lies on disk or comes from a generator, as a list of clips with one function that loads them."""

import os
import re
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastvid.data.video import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    count_frames,
    fit_frames,
    probe_video,
    read_image,
    read_video,
)
from fastvid.errors import DataError, VideoError

GENERATORS = {"digits": None, "push": "PushSimulator", "dino": "DinoRecorder"}  # None: plain make_clip, no start-up
NOMINAL_CLIPS = {"train": 10_000, "test": 1_000}

Size = tuple[int, int]
Skipped = list[tuple[str, str]]


class Layout(NamedTuple):
    """Names and frames of clips, `load(clip, start, frames, size)`, what was found in words, and what was skipped.

    labels: the class of each clip, where the data set says it.
    """

    names: list[str]
    lengths: list[int]
    load: Callable[[int, int, int, Size | None], Tensor]
    found: str
    skipped: Skipped
    labels: list[str] | None = None


def natural_key(path: str | Path) -> list:
    """Sort key under which frame2 comes before frame10.

    path:    any text or path.
    Returns: text and whole numbers in turn, comparable with the key of any other path.
    """
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", str(path)))]


def from_folder(root: Path, found: str) -> Layout:
    """Videos at any depth, or else folders of frames; DataError if there are neither."""
    films: list[Path] = []
    frame_folders: dict[Path, list[Path]] = {}
    others: Counter[str] = Counter()
    skipped: Skipped = []
    for folder, below, files in os.walk(root, onerror=lambda e: skipped.append((str(e.filename), str(e.strerror)))):
        below[:] = [name for name in below if not name.startswith(".")]
        for path in sorted((Path(folder) / name for name in files if not name.startswith(".")), key=natural_key):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                frame_folders.setdefault(path.parent, []).append(path)
            elif path.suffix.lower() in VIDEO_SUFFIXES:
                films.append(path)
            else:
                others[path.suffix.lower() or "no suffix"] += 1
    if films:
        others += Counter({"images": sum(map(len, frame_folders.values()))})
    if others:
        found += f" ({sum(others.values())} files of other kinds left aside: {', '.join(sorted(others))})"
    if films:
        return from_videos(root, sorted(films, key=natural_key), found, skipped)
    if frame_folders:
        return _frame_folders(root, frame_folders, found, skipped)
    raise DataError(f"{root}: no clips: neither videos ({' '.join(VIDEO_SUFFIXES)}) nor folders of frames in it.")


def from_videos(root: Path, paths: Sequence[Path], found: str, skipped: Skipped) -> Layout:
    """The video files among `paths` that open; DataError if none does."""
    usable, lengths = [], []
    for path in paths:
        try:
            lengths.append(probe_video(path).frames or count_frames(path))
            usable.append(path)
        except VideoError as error:
            skipped.append((_name(path, root), _without_path(error, path)))
    _check_any(root, usable, skipped)

    def load(i: int, start: int, frames: int, size: Size | None) -> Tensor:
        return read_video(usable[i], start, frames, size)[0]

    return Layout([_name(path, root) for path in usable], lengths, load, found, skipped)


def _frame_folders(root: Path, folders: dict[Path, list[Path]], found: str, skipped: Skipped) -> Layout:
    usable = []
    for folder in sorted(folders, key=natural_key):
        try:
            read_image(folders[folder][0])
            usable.append(folder)
        except VideoError as error:
            skipped.append((_name(folder, root), str(error)))
    _check_any(root, usable, skipped)

    def load(i: int, start: int, frames: int, size: Size | None) -> Tensor:
        images = [read_image(path) for path in folders[usable[i]][start : start + frames]]
        if size:
            images = [fit_frames(image[None], *size)[0][0] for image in images]
        if any(image.shape != images[0].shape for image in images):
            raise VideoError(f"{usable[i]}: the frames differ in size; give one size to resize all.")
        return torch.stack(images)

    lengths = [len(folders[folder]) for folder in usable]
    return Layout([_name(folder, root) for folder in usable], lengths, load, found, skipped)


def from_generator(kind: str, split: str, frames: int, size: Size) -> Layout:
    """Clips made on demand, one a seed of the split; `frames` and `size` (H, W) of each."""
    module = import_module(f"fastvid.data.{kind}")
    seeds = module.SPLITS[split][: NOMINAL_CLIPS[split]]
    stack = ExitStack()

    @cache
    def maker() -> Callable[[int, int], Tensor]:
        """Start the generator at the first clip and keep it: a simulator or browser is dear to start."""
        if GENERATORS[kind] is None:
            return partial(module.make_clip, size=size)
        return stack.enter_context(getattr(module, GENERATORS[kind])(size=size)).clip

    def load(i: int, start: int, count: int, fit: Size | None) -> Tensor:
        clip = maker()(seeds[i], frames)[start : start + count]
        return fit_frames(clip, *fit)[0] if fit else clip

    found = f"generator {kind}, split {split}, made on demand"
    weakref.finalize(load, stack.close)
    return Layout([f"{seed:07d}" for seed in seeds], [frames] * len(seeds), load, found, [])


def _check_any(root: Path, usable: list, skipped: Skipped) -> None:
    if not usable:
        name, reason = skipped[0]
        raise DataError(f"{root}: no usable clip, {len(skipped)} unreadable; the first: {name}: {reason}")


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else root.name


def _without_path(error: VideoError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
