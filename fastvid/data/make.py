"""Write a data set of generated clips to a folder, and look at any data set.

A folder holds <split>/<seed>.mp4, without loss, and dataset.json, which says what made them. Clips appear whole or not
at all, so an interrupted run is continued by the same call.
"""

import atexit
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor
from tqdm import tqdm

from fastvid.data._layouts import GENERATORS
from fastvid.data.clips import open_clips
from fastvid.data.seeds import check_request
from fastvid.data.sheet import contact_sheet, write_png
from fastvid.data.video import probe_video, write_video
from fastvid.errors import DataError, VideoError

_COLUMNS, _EVERY, _LONGEST_SIDE = 10, 3, 128  # of the sheet that `look` draws; pixels


def make_clips(
    kind: str,
    out: str | Path,
    clips: int,
    frames: int = 30,
    split: str = "train",
    first: int = 0,
    workers: int = 1,
    size: tuple[int, int] = (64, 64),
) -> Path:
    """Make clips with a generator and write them without loss; whole clips that are there already are kept.

    kind:    digits, push or dino. out: folder of the data set, made where missing. clips: how many, at least 1.
    frames:  T of each. split: "train" or "test". first: place of the first clip in the split's range of seeds.
    workers: processes, each with its own simulator; they change nothing but the time. size: (H, W) in pixels.
    Returns: the folder of the clips, out/split. A tqdm bar on standard error counts clips. Interrupted, it leaves whole
             clips; dataset.json names a range of clips once all of them are there.
    Raises:  DataError for an unknown kind or split, numbers out of range, an `out` that holds something else, or a
             generator that cannot start; VideoError where a clip cannot be written.
    Source:  own format: dataset.json = {kind, version, frames, size, splits: {split: [first, count]}}.
    """
    job = _plan(kind, Path(out), frames, split, size)
    seeds = _seeds(kind, split, first, clips)
    if workers < 1:
        raise DataError(f"data make: `workers` must be at least 1, got {workers}.")
    record = _open_record(Path(out), job, split, first, clips)
    todo = [seed for seed in seeds if not _whole(job, seed)]
    bar = tqdm(total=clips, initial=clips - len(todo), desc=f"{kind} {split}", unit="clip")
    with bar, closing(_run(job, todo, workers)) as written:
        for _ in written:
            bar.update()
    _write_json(Path(out) / "dataset.json", record)
    return job.folder


def look(path: str | Path, out_png: str | Path, clips: int = 8) -> None:
    """Print what a data set holds and draw a few of its clips: clips as rows, every third frame as columns.

    path:    what `open_clips` takes: a file, a folder, or a generator's name. out_png: the picture to write.
    clips:   rows at most, at least 1, spread evenly over the data set.
    Returns: nothing. Frames are fitted to the first clip's size, at most 128 pixels a side.
    Raises:  DataError for no usable clip or clips below 1; VideoError for a file that cannot be read or written.
    Source:  own layout, `contact_sheet`.
    """
    if clips < 1:
        raise DataError(f"data look: `clips` must be at least 1, got {clips}.")
    found = open_clips(path)
    H, W = found.read(0, 0, 1).shape[1:3]
    shrink = min(1.0, _LONGEST_SIDE / max(H, W))
    size = max(1, round(H * shrink)), max(1, round(W * shrink))
    count = min(clips, len(found))
    chosen = [i * len(found) // count for i in range(count)]
    rows = [found.read(i, 0, min(found.lengths[i], _COLUMNS * _EVERY), size)[::_EVERY] for i in chosen]
    write_png(out_png, contact_sheet(rows))
    print(f"{found.describe()}\n{out_png}: {count} clips, every third frame")


@dataclass(frozen=True)
class _Job:
    kind: str
    frames: int
    size: tuple[int, int]
    folder: Path


def _plan(kind: str, out: Path, frames: int, split: str, size: tuple[int, int]) -> _Job:
    if kind not in GENERATORS:
        raise DataError(f"data make: unknown kind {kind!r}; there are {', '.join(GENERATORS)}.")
    splits = import_module(f"fastvid.data.{kind}").SPLITS
    if split not in splits:
        raise DataError(f"data make: unknown split {split!r}; {kind} has {', '.join(splits)}.")
    check_request(kind, frames, size)
    return _Job(kind, frames, tuple(size), out / split)


def _seeds(kind: str, split: str, first: int, clips: int) -> range:
    seeds = import_module(f"fastvid.data.{kind}").SPLITS[split]
    if clips < 1 or first < 0:
        raise DataError(f"data make: wanted `clips` of at least 1 and `first` of at least 0, got {clips} and {first}.")
    if first + clips > len(seeds):
        raise DataError(
            f"data make: {kind} has {len(seeds)} clips in its {split} split, got first {first} and {clips} clips; "
            "ask for fewer."
        )
    return seeds[first : first + clips]


def _open_record(out: Path, job: _Job, split: str, first: int, clips: int) -> dict:
    """Check that `out` is empty or of this job's making, mark it as such; returns the record that holds when done."""
    path = out / "dataset.json"
    version = import_module(f"fastvid.data.{job.kind}").VERSION
    made = {"kind": job.kind, "version": version, "frames": job.frames, "size": list(job.size)}
    record = _read_json(path) if path.exists() else None
    if record is None:
        if job.folder.exists() and any(job.folder.iterdir()):
            raise DataError(f"{job.folder}: holds files that no dataset.json accounts for; choose an empty folder.")
        record = {**made, "splits": {}}
    for key, wanted in made.items():
        if record[key] != wanted:
            raise DataError(
                f"{out}: wanted a data set of {key} {wanted}, but it holds one of {key} {record[key]}; "
                "choose another folder."
            )
    begin, end = first, first + clips
    if split in record["splits"]:
        have, count = record["splits"][split]
        if end < have or begin > have + count:
            have_text = f"holds {split} clips {have} to {have + count - 1}"
            raise DataError(f"{out}: {have_text}, got {begin} to {end - 1}; leave no gap (`first` = {have + count}).")
        begin, end = min(begin, have), max(end, have + count)
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{job.folder}: cannot be made: {error.strerror}; choose another folder.") from error
    _write_json(path, record)
    return {**record, "splits": {**record["splits"], split: [begin, end - begin]}}


def _read_json(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if {"kind", "version", "frames", "size"} <= set(record) and all(
            isinstance(first, int) and isinstance(count, int) for first, count in record["splits"].values()
        ):
            return record
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # whatever is wrong with it, the remedy is the same
    raise DataError(f"{path}: wanted the record of a generated data set, got something else; choose another folder.")


def _write_json(path: Path, record: dict) -> None:
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial_path.open("w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial_path.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}; choose another folder.") from error
    finally:
        with suppress(OSError):
            partial_path.unlink()


def _clip_path(job: _Job, seed: int) -> Path:
    return job.folder / f"{seed:07d}.mp4"


def _whole(job: _Job, seed: int) -> bool:
    path = _clip_path(job, seed)
    if not path.exists():
        return False
    try:
        info = probe_video(path)
    except VideoError:
        return False
    return (info.frames, info.height, info.width) == (job.frames, *job.size)


def _run(job: _Job, seeds: list[int], workers: int) -> Iterator[int]:
    """Write the clips of all seeds; yields each seed when its clip is there."""
    if workers == 1:
        with ExitStack() as stack:
            clip = _start(job.kind, job.size, stack) if seeds else None
            for seed in seeds:
                _write_one(job, seed, clip)
                yield seed
        return
    # spawned, not forked: a forked child would share the parent's simulator, browser and thread pools
    context = get_context("spawn")
    pool = ProcessPoolExecutor(max(1, min(workers, len(seeds))), mp_context=context, initializer=_enter_worker)
    try:
        left = iter(seeds)
        # two waiting for each worker, not all: an interruption then has little to call off
        running = {pool.submit(_work, job, seed) for seed in islice(left, 3 * workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(_work, job, seed) for seed in islice(left, len(done))}
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise DataError("data make: a worker was killed; whole clips are kept; retry with fewer workers.") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(kind: str, size: tuple[int, int], stack: ExitStack) -> Callable[[int, int], Tensor]:
    """The generator as a function (seed, frames) -> clip; what it opens is closed with the stack."""
    module = import_module(f"fastvid.data.{kind}")
    if GENERATORS[kind] is None:
        return partial(module.make_clip, size=size)
    return stack.enter_context(getattr(module, GENERATORS[kind])(size=size)).clip


def _write_one(job: _Job, seed: int, clip: Callable[[int, int], Tensor]) -> None:
    fps = import_module(f"fastvid.data.{job.kind}").FPS
    write_video(_clip_path(job, seed), clip(seed, job.frames), fps=fps, lossless=True)


def _enter_worker() -> None:
    # Ctrl-C reaches every process of the terminal: the parent alone decides, so that started clips are finished
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A parent that was killed cannot call its workers off: they would wait for work for ever."""
    parent_process().join()
    os._exit(1)


def _work(job: _Job, seed: int) -> int:
    _write_one(job, seed, _kept(job.kind, job.size))
    return seed


@cache
def _kept(kind: str, size: tuple[int, int]) -> Callable[[int, int], Tensor]:
    """One generator a worker process, started at its first clip and closed at its end."""
    stack = ExitStack()
    atexit.register(stack.close)
    return _start(kind, size, stack)
