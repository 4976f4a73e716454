"""Clips in; out come the predicted videos, a contact sheet and a report for each."""

import hashlib
import json
import math
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastvid import __version__, ops
from fastvid.checkpoint import manifest_hash
from fastvid.data.clips import natural_key
from fastvid.data.sheet import contact_sheet, write_png
from fastvid.data.video import (
    VIDEO_SUFFIXES,
    count_frames,
    fit_frames,
    frame_hash,
    probe_video,
    read_video,
    write_video,
)
from fastvid.errors import UsageError, VideoError
from fastvid.models import Prediction, VideoPredictor, load
from fastvid.models.predictor import GIVEN, ROWS_AT_ONCE, model_folder

SHEET_ROWS, SHEET_COLUMNS = 32, 64  # a sheet stays a picture that viewers can open
SLOWEST, FASTEST, USUAL_FPS = 0.01, 1000.0, 25.0  # frames a second that a video can be written with


@dataclass(frozen=True)
class SourceClip:
    """One clip, fitted to the model: given [4, H, W, 3] and, where known, what came next [<= n, H, W, 3], uint8."""

    path: Path
    name: str  # of its files in the output folder
    given: Tensor
    truth: Tensor
    first: int  # number of the first given frame
    fps: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Request:
    model: str
    frames: int
    samples: int
    seed: int
    temperature: float
    start: int | None

    def __post_init__(self):
        for name in ("frames", "samples"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UsageError(f"--temperature must be a finite number above 0, got {self.temperature}.")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"--seed must lie in [0, 2^63), got {self.seed}.")
        if self.start is not None and self.start < 0:
            raise UsageError(f"--start must be at least 0, got {self.start}.")


def predict_clips(
    paths: list[str | Path], model: str | Path = "dino64", frames: int = 12, samples: int = 1, seed: int = 0,
    temperature: float = 1.0, out: str | Path = "predictions", start: int | None = None,
) -> list[dict[str, Any]]:
    """Predict the next frames of clips and write them to a folder; prints a line or two per clip.

    paths:   video files, or folders of them. model: a shipped name or a model folder.
    frames:  to predict. samples: futures per clip. seed, temperature: as in VideoPredictor.predict.
    out:     gets <clip>_sample<k>.mp4 (4 given and `frames` predicted frames at the clip's own rate),
             <clip>_contact.png and <clip>.json for each clip; a clip's files appear once all of them are whole.
    start:   number of the first given frame; None gives the clip's last 4. With it, the true next frames stand in the
             contact sheet's first row as far as the clip holds them.
    Returns: the reports, one per clip, as in the JSON files. The same seed gives the same frames, alone or in company.
    Raises:  UsageError, VideoError or CheckpointError, before anything is predicted; VideoError later where the disk
             refuses.
    """
    request = _Request(str(model), frames, samples, seed, temperature, start)
    found = find_clips(paths)
    for path in found:
        probe_video(path)  # refuse a bad clip before the weights are loaded
    predictor = load(model)
    clips = [read_clip(path, name, predictor.size, frames, start) for path, name in _named(found).items()]
    out = _prepare(Path(out), clips, samples)
    for clip in clips:
        for note in clip.notes:
            print(f"{clip.path}: {note}")
    together = max(1, ROWS_AT_ONCE // samples)
    groups = [clips[i : i + together] for i in range(0, len(clips), together)]
    return [report for group in groups for report in _predict_group(predictor, group, request, out)]


def find_clips(paths: list[str | Path]) -> list[Path]:
    """The video files that paths name; a folder stands for those in it, in natural order, a file is listed once.

    paths:   files or folders.
    Returns: at least one path; that a file holds video has not been looked at.
    Raises:  UsageError for no paths, VideoError for a missing one or a folder without clips.
    """
    if not paths:
        raise UsageError("predict: name at least one clip: fastvid predict CLIP...")
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise VideoError(f"{path}: no such file or folder.")
        inside = [path]
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir(), key=natural_key) if p.is_file() and _is_clip(p)]
        if not inside:
            raise VideoError(f"{path}: no clips in this folder ({' '.join(VIDEO_SUFFIXES)}).")
        for file in inside:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def read_clip(path: Path, name: str, size: tuple[int, int], frames: int, start: int | None = None) -> SourceClip:
    """The four given frames of a video file, and up to `frames` true ones after them.

    path:    a video file. name: for its outputs. size: (H, W) to fit every frame to.
    start:   number of the first given frame, from 0; None takes the last four.
    Returns: SourceClip.
    Raises:  VideoError for a file that cannot be read or has too few frames.
    """
    info = probe_video(path)
    known = info.frames or count_frames(path)
    first = max(0, known - GIVEN) if start is None else start
    if known - first < GIVEN:
        wanted = "at least 4 frames" if start is None else f"4 frames from frame {start} on"
        raise VideoError(f"{path}: wanted {wanted}, the file has {known}; give a longer clip.")
    video, fps = read_video(path, first, min(known - first, GIVEN + frames), size)
    notes = [fit_frames(torch.zeros(1, info.height, info.width, 3, dtype=torch.uint8), *size)[1]]
    if not SLOWEST <= fps <= FASTEST:
        notes.append(f"{fps:g} frames a second cannot be written, {USUAL_FPS:g} taken instead")
        fps = USUAL_FPS
    return SourceClip(path, name, video[:GIVEN], video[GIVEN:], first, fps, tuple(filter(None, notes)))


def _is_clip(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")


def _named(paths: list[Path]) -> dict[Path, str]:
    """A name for each clip's files: its stem, numbered where another clip has it already."""
    names: dict[Path, str] = {}
    for path in paths:
        name, number = path.stem, 2
        # file systems that ignore case would let A_contact.png replace a_contact.png
        while name.lower() in {taken.lower() for taken in names.values()}:
            name, number = f"{path.stem}_{number}", number + 1
        names[path] = name
    return names


def _files(clip: SourceClip, samples: int) -> list[str]:
    """The names of a clip's outputs; the report comes last and so stands for a whole set."""
    return [*(f"{clip.name}_sample{k}.mp4" for k in range(samples)), f"{clip.name}_contact.png", f"{clip.name}.json"]


def _prepare(out: Path, clips: list[SourceClip], samples: int) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UsageError(f"-o {out}: cannot be written to: {error.strerror}; choose another folder.") from error
    inputs = {clip.path.resolve() for clip in clips}
    for target in (out / file for clip in clips for file in _files(clip, samples)):
        if target.is_dir() or target.resolve() in inputs:
            what = "is a folder" if target.is_dir() else "is one of the clips to predict"
            raise UsageError(f"-o {out}: {target.name} there {what}; choose another folder.")
    return out


def _predict_group(
    predictor: VideoPredictor, clips: list[SourceClip], request: _Request, out: Path
) -> list[dict[str, Any]]:
    given = torch.stack([clip.given for clip in clips])  # [B, 4, H, W, 3]
    with _Bars(clips) as bars, ops.served() as backends:
        prediction = predictor.predict_codes(
            given.movedim(-1, 2).float().div(255), request.frames, request.samples, request.seed, request.temperature,
            progress=bars,
        )
    reports = []
    for i, clip in enumerate(clips):
        future = prediction.frames[i].mul(255).round().clamp(0, 255).to(torch.uint8).movedim(2, -1)  # [S, n, H, W, 3]
        report = _report(clip, i, future, prediction, request, backends)
        _write(clip, future, report, out)
        print(_summary(clip, report, out))
        reports.append(report)
    return reports


def _write(clip: SourceClip, future: Tensor, report: dict[str, Any], out: Path) -> None:
    """All files of a clip, first in a folder of their own, then renamed, the report last."""
    *videos, sheet, text = _files(clip, len(future))
    try:
        with tempfile.TemporaryDirectory(prefix=".predict-", dir=out) as work:
            for file, sample in zip(videos, future, strict=True):
                write_video(Path(work, file), torch.cat([clip.given, sample]), clip.fps)
            write_png(Path(work, sheet), _sheet(clip, future))
            Path(work, text).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            # an old report must not stand beside new videos
            (out / text).unlink(missing_ok=True)
            for file in (*videos, sheet, text):
                os.replace(Path(work, file), out / file)
    except OSError as error:
        raise VideoError(f"{out}: the predictions cannot be written: {error.strerror}; make room there.") from error


def _sheet(clip: SourceClip, future: Tensor) -> Tensor:
    """One row per sample, under the truth where it is known."""
    rows = [torch.cat([clip.given, sample]) for sample in future[:SHEET_ROWS]]
    if len(clip.truth):
        rows.insert(0, torch.cat([clip.given, clip.truth]))
    return contact_sheet([row[:SHEET_COLUMNS] for row in rows], given=GIVEN)


def _report(
    clip: SourceClip, index: int, future: Tensor, prediction: Prediction, request: _Request, backends: dict[str, str]
) -> dict[str, Any]:
    *videos, sheet, _ = _files(clip, request.samples)
    drawn = {stage: codes for stage, codes in prediction.codes.items() if codes}
    return {
        "clip": str(clip.path),
        "given_frames": [clip.first, clip.first + GIVEN - 1],
        "true_frames_known": len(clip.truth),
        "fps": clip.fps,
        "size": list(clip.given.shape[1:3]),
        "notes": list(clip.notes),
        "model": {"name": request.model, "sha256": manifest_hash(model_folder(request.model))},
        "options": {name: getattr(request, name) for name in ("frames", "samples", "seed", "temperature", "start")},
        "samples": [
            {"file": file, "frame_hash": frame_hash(sample), "codes_sha256": _codes_hash(prediction, index, k)}
            for k, (file, sample) in enumerate(zip(videos, future, strict=True))
        ],
        "contact_sheet": sheet,
        # stages are timed for all clips that were predicted together
        "timed": {"clips": prediction.frames.shape[0], "samples": request.samples},
        "seconds": {stage: round(seconds, 6) for stage, seconds in prediction.seconds.items()},
        "codes": drawn,
        "codes_per_second": {stage: round(codes / prediction.seconds[stage], 1) for stage, codes in drawn.items()},
        "backends": dict.fromkeys(ops.REFERENCE_ONLY, "reference") | backends,
        "versions": {"fastvid": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }


def _codes_hash(prediction: Prediction, index: int, sample: int) -> str:
    """sha256 of one sample's codes: for every stretch of frames the top ones, then the bottom ones, as int64."""
    digest = hashlib.sha256()
    for codes in (level for pair in zip(prediction.top, prediction.bottom, strict=True) for level in pair):
        one = codes[index, sample].contiguous().cpu()
        digest.update(repr(tuple(one.shape)).encode() + one.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _summary(clip: SourceClip, report: dict[str, Any], out: Path) -> str:
    seconds, codes = sum(report["seconds"].values()), sum(report["codes"].values())
    count = report["options"]["samples"]
    company = f" ({report['timed']['clips']} clips together)" if report["timed"]["clips"] > 1 else ""
    return (
        f"{clip.path}: {report['options']['frames']} frames x {count} sample{'s' * (count != 1)} in {seconds:.1f} s, "
        f"{codes / seconds:.0f} codes/s{company} -> {out / report['contact_sheet']}"
    )


class _Bars:
    """A progress bar for each stage that draws codes; only on a terminal."""

    def __init__(self, clips: list[SourceClip]):
        self.title = clips[0].path.name if len(clips) == 1 else f"{len(clips)} clips"
        self.bar, self.stage = None, None

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self.bar is None or stage != self.stage or done < self.bar.n:
            self.__exit__()
            quiet = not sys.stderr.isatty()
            self.bar = tqdm(total=total, desc=f"{self.title}: {stage}", unit="code", leave=False, disable=quiet)
            self.stage = stage
        self.bar.update(done - self.bar.n)
