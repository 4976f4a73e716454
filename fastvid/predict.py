"""Clips in; out come the predicted videos, a contact sheet and a report for each."""

import contextlib
import hashlib
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastvid import __version__, ops
from fastvid.checkpoint import manifest_hash
from fastvid.data.sheet import COLUMNS, ROWS, contact_sheet, write_png
from fastvid.data.source import SourceClip, find_clips, read_clip
from fastvid.data.video import FrameHash, VideoWriter
from fastvid.errors import UsageError, VideoError
from fastvid.models import About, Stage, Stages, Stretch, VideoPredictor, about, load
from fastvid.models.predictor import ROWS_AT_ONCE, WEIGHTS, model_folder
from fastvid.models.stages import Ledger


@dataclass(frozen=True)
class _Request:
    model: str
    frames: int
    samples: int
    seed: int
    temperature: float
    start: int | None
    weights: str
    device: str

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
        if self.weights not in WEIGHTS:
            raise UsageError(f"--weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}.")
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"--device must be cpu or cuda, got {self.device!r}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: torch finds no GPU here; use --device cpu.")

    @property
    def judged(self) -> bool:
        """Whether the codes of smaller weights are to be judged by float32 ones."""
        return self.weights in ("bfloat16", "int8")

    def check_model(self, known: About) -> None:
        """Refuse a model that cannot do what is asked."""
        if not known.given:
            raise UsageError(f"{self.model}: makes clips from nothing and continues none; use fastvid sample.")
        if self.judged and known.kind != "predictor":
            raise UsageError(f"--weights {self.weights}: {self.model} draws no codes; leave the option out.")


def predict_clips(
    paths: list[str | Path], model: str | Path = "dino64", frames: int = 12, samples: int = 1, seed: int = 0,
    temperature: float = 1.0, out: str | Path = "predictions", start: int | None = None, *, weights: str = "auto",
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Predict the next frames of clips and write them to a folder; prints a line or two per clip.

    paths:   video files, or folders of them. model: a shipped name or a model folder, of a VideoPredictor or a
             DVDGANPredictor, which draws no codes: its report and hashes are of frames alone.
    frames:  to predict, in memory that does not grow with them. samples: futures per clip.
    seed, temperature, weights: as in VideoPredictor.predict. Weights asked for as bfloat16 or int8 are compared with
             float32: the mean drift of the drawn codes' log-probabilities is printed and reported. Where no codes are
             drawn, the temperature scales the noise and weights are float32.
    out:     gets <clip>_sample<k>.mp4 (the given, 4 mostly, and `frames` predicted frames at the clip's own rate),
             <clip>_contact.png and <clip>.json for each clip; a clip's files appear once all of them are whole.
    start:   number of the first given frame; None gives the clip's last ones. With it, the true next frames stand in
             the contact sheet's first row as far as the clip holds them.
    device:  "cpu", or "cuda", on which drawing codes has not been verified yet.
    Returns: the reports, one per clip, as in the JSON files. On one kind of machine the same seed gives the same
             frames, alone or in company.
    Raises:  UsageError, VideoError or CheckpointError, before anything is predicted; VideoError later where the disk
             refuses.
    """
    request = _Request(str(model), frames, samples, seed, temperature, start, weights, device)
    found = _named(find_clips(paths))
    known = about(model)  # a bad clip is refused before the weights are loaded
    request.check_model(known)
    clips = [read_clip(path, name, known.size, frames, start, known.given) for path, name in found.items()]
    predictor, identity = load(model).to(device), manifest_hash(model_folder(model))
    out = _prepare(Path(out), clips, samples)
    for clip in clips:
        for note in clip.notes:
            print(f"{clip.path}: {note}")
    together = max(1, ROWS_AT_ONCE // samples)
    groups = [clips[i : i + together] for i in range(0, len(clips), together)]
    return [report for group in groups for report in _predict_group(predictor, group, request, identity, out)]


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
    predictor: nn.Module, clips: list[SourceClip], request: _Request, identity: str, out: Path
) -> list[dict[str, Any]]:
    given = torch.stack([clip.given for clip in clips]).to(request.device)  # [B, G, H, W, 3]
    frames, stages = given.movedim(-1, 2).float().div(255), Stages()
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(_ClipFiles(clip, request, out)) for clip in clips]
            backends = stack.enter_context(ops.served())
            # each sample's file is open while it grows
            for numbers in _spans(request.samples, ROWS_AT_ONCE):
                with _Bars(clips, "code" if isinstance(predictor, VideoPredictor) else "frame") as bars:
                    _write_stream(files, numbers, _stream(predictor, frames, request, numbers, bars), stages)
            reports = [_report(one, len(clips), request, identity, stages, backends) for one in files]
            for one, report in zip(files, reports, strict=True):
                one.finish(report)
                print(_summary(one.clip, report, out))
    except OSError as error:
        raise VideoError(f"{out}: the predictions cannot be written: {error.strerror}; make room there.") from error
    return reports


def _stream(
    predictor: nn.Module, frames: Tensor, request: _Request, numbers: range, bars: "_Bars"
) -> Iterator[Stretch]:
    if isinstance(predictor, VideoPredictor):
        return predictor.predict_stream(
            frames, request.frames, numbers, request.seed, request.temperature, bars, request.weights, request.judged
        )
    return _without_codes(predictor, frames, request, numbers, bars)


def _without_codes(
    predictor: nn.Module, frames: Tensor, request: _Request, numbers: range, bars: "_Bars"
) -> Iterator[Stretch]:
    """The stretches of a predictor that generates frames at once."""
    rows = len(frames) * len(numbers)
    ledger = Ledger(rows * request.frames, bars)
    tell = ledger.teller("generate", rows)
    stream = predictor.predict_stream(frames, request.frames, numbers, request.seed, request.temperature)
    while True:
        with ledger.timed("generate"):
            made = next(stream, None)
        if made is None:
            return
        tell(made.shape[2])
        yield Stretch(made, None, None, ledger.turn())
        del made


def _write_stream(files: list["_ClipFiles"], numbers: range, stream: Iterator[Stretch], stages: Stages) -> None:
    with contextlib.ExitStack() as stack:
        for one in files:
            one.begin(numbers, stack)
        for stretch in stream:
            pixels = stretch.frames.mul(255).round().clamp(0, 255).to(torch.uint8).movedim(3, -1)  # [B, S, m, H, W, 3]
            levels = [codes for codes in (stretch.top, stretch.bottom) if codes is not None]
            for i, one in enumerate(files):
                one.add(pixels[i].cpu(), *(codes[i].cpu() for codes in levels))
            stages.add(stretch.stages)
        for one in files:
            one.end()


def _spans(count: int, length: int) -> list[range]:
    return [range(first, min(first + length, count)) for first in range(0, count, length)]


class _ClipFiles:
    """The files of one clip: they grow in a folder of their own and are renamed when all are whole, the report last."""

    def __init__(self, clip: SourceClip, request: _Request, out: Path):
        self.clip, self.request, self.out = clip, request, out
        *self.videos, self.sheet, self.text = _files(clip, request.samples)
        self.samples: list[dict[str, str]] = []
        self.shown: list[Tensor] = []  # rows of the contact sheet, [<= COLUMNS, H, W, 3]

    def __enter__(self) -> "_ClipFiles":
        self.folder = tempfile.TemporaryDirectory(prefix=".predict-", dir=self.out)
        return self

    def __exit__(self, *_) -> None:
        self.folder.cleanup()

    def begin(self, numbers: range, stack: contextlib.ExitStack) -> None:
        """Open the videos of the samples of these numbers; `stack` closes them."""
        H, W = self.clip.given.shape[1:3]
        self.numbers = numbers
        self.writers = [
            stack.enter_context(VideoWriter(Path(self.folder.name, self.videos[k]), (H, W), self.clip.fps))
            for k in numbers
        ]
        self.frame_hashes = [FrameHash((self.request.frames, H, W, 3)) for _ in numbers]
        self.code_hashes, self.coded = [hashlib.sha256() for _ in numbers], False
        for k, writer in zip(numbers, self.writers, strict=True):
            writer.add(self.clip.given)
            if k < ROWS:
                self.shown.append(self.clip.given)

    def add(self, frames: Tensor, *levels: Tensor) -> None:
        """The next frames [S, m, H, W, 3] of the samples begun, and the codes of each level they were drawn as."""
        self.coded |= bool(levels)
        for i, k in enumerate(self.numbers):
            self.writers[i].add(frames[i])
            self.frame_hashes[i].add(frames[i])
            for codes in (level[i] for level in levels):
                self.code_hashes[i].update(repr(tuple(codes.shape)).encode() + codes.numpy().astype("<i8").tobytes())
            if k < ROWS and len(self.shown[k]) < COLUMNS:
                self.shown[k] = torch.cat([self.shown[k], frames[i]])[:COLUMNS]

    def end(self) -> None:
        """The samples begun have all their frames."""
        for k, frames, codes in zip(self.numbers, self.frame_hashes, self.code_hashes, strict=True):
            hashes = {"frame_hash": frames.hexdigest()} | ({"codes_sha256": codes.hexdigest()} if self.coded else {})
            self.samples.append({"file": self.videos[k], **hashes})

    def finish(self, report: dict[str, Any]) -> None:
        """Write sheet and report, and let everything appear."""
        rows = self.shown
        if len(self.clip.truth):
            rows = [torch.cat([self.clip.given, self.clip.truth]), *rows]
        work = Path(self.folder.name)
        write_png(work / self.sheet, contact_sheet(rows, given=len(self.clip.given)))
        (work / self.text).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        # an old report must not stand beside new videos
        (self.out / self.text).unlink(missing_ok=True)
        for file in (*self.videos, self.sheet, self.text):
            os.replace(work / file, self.out / file)


def _report(
    files: _ClipFiles, together: int, request: _Request, identity: str, stages: Stages, backends: dict[str, str]
) -> dict[str, Any]:
    clip, drawn = files.clip, {name: stage for name, stage in stages.items() if stage.codes}
    options = ("frames", "samples", "seed", "temperature", "start", "weights")
    report = {
        "clip": str(clip.path),
        "given_frames": [clip.first, clip.first + len(clip.given) - 1],
        "true_frames_known": clip.known,
        "fps": clip.fps,
        "size": list(clip.given.shape[1:3]),
        "notes": list(clip.notes),
        "model": {"name": request.model, "sha256": identity},
        "options": {name: getattr(request, name) for name in options},
        "samples": files.samples,
        "contact_sheet": files.sheet,
        # stages are timed and counted for all clips that were predicted together
        "timed": {"clips": together, "samples": request.samples},
        "seconds": {name: round(stage.seconds, 6) for name, stage in stages.items()},
        **(_codes(drawn) if drawn else {}),
        "backends": dict(backends),
        "versions": {"fastvid": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": request.device,
        "threads": torch.get_num_threads(),
    }
    if request.judged:
        report["drift"] = {
            name: {"nats_per_code": stage.drift / stage.codes, "nats_per_code_size": stage.drift_size / stage.codes}
            for name, stage in drawn.items()
        }
    return report


def _codes(drawn: dict[str, Stage]) -> dict[str, Any]:
    return {
        "codes": {name: stage.codes for name, stage in drawn.items()},
        "codes_per_second": {name: round(stage.codes / stage.seconds, 1) for name, stage in drawn.items()},
        "passes_per_code": {name: round(stage.passes / stage.codes, 4) for name, stage in drawn.items()},
        "near_ties": {name: stage.near_ties for name, stage in drawn.items()},
    }


def _summary(clip: SourceClip, report: dict[str, Any], out: Path) -> str:
    seconds, count = sum(report["seconds"].values()), report["options"]["samples"]
    # what was made of all clips together, as the seconds are
    frames = report["timed"]["clips"] * count * report["options"]["frames"]
    rate = f"{sum(report['codes'].values()) / seconds:.0f} codes/s" if "codes" in report else (
        f"{frames / seconds:.1f} frames/s"
    )
    company = f" ({report['timed']['clips']} clips together)" if report["timed"]["clips"] > 1 else ""
    line = (
        f"{clip.path}: {report['options']['frames']} frames x {count} sample{'s' * (count != 1)} in {seconds:.2f} s, "
        f"{rate}{company} -> {out / report['contact_sheet']}"
    )
    if "drift" not in report:
        return line
    drift = ", ".join(
        f"{name} {values['nats_per_code']:+.4f} (mean size {values['nats_per_code_size']:.4f})"
        for name, values in report["drift"].items()
    )
    return f"{line}\n{clip.path}: {report['options']['weights']} weights against float32, nats per code: {drift}"


class _Bars:
    """A progress bar over all codes or frames of a run, named after the stage that makes them; only on a terminal."""

    def __init__(self, clips: list[SourceClip], unit: str):
        self.unit = unit
        self.title = clips[0].path.name if len(clips) == 1 else f"{len(clips)} clips"
        self.bar, self.stage = None, None

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        label = f"{self.title}: {stage}"
        if self.bar is None:
            self.bar = tqdm(desc=label, total=total, unit=self.unit, leave=False, disable=not sys.stderr.isatty())
        elif stage != self.stage:
            self.bar.set_description(label)
        self.stage = stage
        self.bar.update(done - self.bar.n)
