"""A list of clips with one function that loads them, and those that a generator makes."""

import re
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fastvid.data.video import fit_frames

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


def generator_options(kind: str) -> dict[str, str]:
    """What may follow a generator's name as ?key=value, each key with its meaning."""
    return getattr(import_module(f"fastvid.data.{kind}"), "OPTIONS", {})


def from_generator(kind: str, split: str, frames: int, size: Size, options: dict[str, str]) -> Layout:
    """Clips made on demand, one a seed of the split; `frames` and `size` (H, W) of each, `options` as text."""
    module = import_module(f"fastvid.data.{kind}")
    chosen = module.check_options(options) if options else {}
    seeds = module.SPLITS[split][: NOMINAL_CLIPS[split]]
    stack = ExitStack()

    @cache
    def maker() -> Callable[[int, int], Tensor]:
        """Start the generator at the first clip and keep it: a simulator or browser is dear to start."""
        if GENERATORS[kind] is None:
            return partial(module.make_clip, size=size, **chosen)
        return stack.enter_context(getattr(module, GENERATORS[kind])(size=size)).clip

    def load(i: int, start: int, count: int, fit: Size | None) -> Tensor:
        clip = maker()(seeds[i], frames)[start : start + count]
        return fit_frames(clip, *fit)[0] if fit else clip

    found = f"generator {kind}, split {split}, made on demand"
    weakref.finalize(load, stack.close)
    labels = module.labels(seeds, **chosen) if chosen else None
    return Layout([f"{seed:07d}" for seed in seeds], [frames] * len(seeds), load, found, [], labels)
