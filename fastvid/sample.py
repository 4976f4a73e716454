"""Clips made from nothing: a video each, one contact sheet and a report."""

import json
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastvid import __version__, ops
from fastvid.checkpoint import manifest_hash
from fastvid.data.sheet import COLUMNS, ROWS, contact_sheet, write_png
from fastvid.data.video import frame_hash, write_video
from fastvid.errors import UsageError, VideoError
from fastvid.models import about, load
from fastvid.models.predictor import model_folder

STEPS = 8  # clips of an interpolation, both ends among them
KINDS = ("scaled", "truncated")
REPORT, SHEET = "samples.json", "samples_contact.png"
MOST_NAMED = 40  # classes in a message


class Clip(NamedTuple):
    """One clip to make: its file, the number of its noise, and its class, where there are classes."""

    file: str
    number: int
    label: int | None


@dataclass(frozen=True)
class _Request:
    model: str
    classes: tuple[str, ...]
    clips: int
    seed: int
    truncation: float
    kind: str
    interpolate: str | None
    fps: float
    device: str

    def __post_init__(self):
        if self.clips < 1:
            raise UsageError(f"-n must be at least 1, got {self.clips}.")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"--seed must lie in [0, 2^63), got {self.seed}.")
        if not (self.truncation > 0 and math.isfinite(self.truncation)):
            raise UsageError(f"--truncation must be a finite number above 0, got {self.truncation}.")
        if self.kind not in KINDS:
            raise UsageError(f"the kind of truncation must be {' or '.join(KINDS)}, got {self.kind!r}.")
        if not 0.01 <= self.fps <= 1000:
            raise UsageError(f"--fps must be from 0.01 to 1000, got {self.fps}.")
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"--device must be cpu or cuda, got {self.device!r}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: torch finds no GPU here; use --device cpu.")


def sample_clips(
    model: str | Path, classes: tuple[str | int, ...] = (), clips: int = 16, seed: int = 0, truncation: float = 1.0,
    kind: str = "scaled", interpolate: str | None = None, out: str | Path = "samples", fps: float = 12.0, *,
    device: str = "cpu",
) -> dict[str, Any]:
    """Generate clips and write them to a folder; prints a line.

    model:    a model folder or a run folder of a DVDGANGenerator.
    classes:  names, or numbers from 0; a name goes before a number. `clips` are made of each, and the k-th of every
              class has the same noise. None given: `clips` in all, the classes in turn.
    seed:     with a clip's number and class it decides the clip, alone or in company.
    truncation, kind: "scaled" multiplies the noise by it, "truncated" draws from a normal without the tails beyond it.
    interpolate: "A:B" makes `clips` lines of 8 clips between two classes, the noise of each line fixed; "z" between
              two noises, k and k + 1, in every class.
    out:      gets a video per clip at `fps` frames a second, samples_contact.png (a row a clip) and samples.json, all
              at once when they are whole.
    Returns:  the report as in samples.json.
    Raises:   UsageError or CheckpointError before anything is made; VideoError later where the disk refuses.
    """
    names = tuple(str(name) for name in classes)
    request = _Request(str(model), names, clips, seed, truncation, kind, interpolate, fps, device)
    if about(model).given:
        raise UsageError(f"{model}: continues clips and makes none from nothing; use fastvid predict.")
    generator, identity = load(model).to(device), manifest_hash(model_folder(model))
    lines = _lines(generator, request)
    out = _prepare(Path(out), lines)
    try:
        with tempfile.TemporaryDirectory(prefix=".sample-", dir=out) as work, ops.served() as backends:
            made = _make(generator, lines, request, Path(work))
            report = _report(generator, made, request, identity, backends)
            Path(work, REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            # an old report must not stand beside new videos
            (out / REPORT).unlink(missing_ok=True)
            for file in [*(clip.file for clip in made.clips), SHEET, REPORT]:
                os.replace(Path(work, file), out / file)
    except OSError as error:
        raise VideoError(f"{out}: the clips cannot be written: {error.strerror}; make room there.") from error
    print(_summary(report, out))
    return report


class _Line(NamedTuple):
    """Clips made together. ends: of an interpolation, (class, class) or (number, number)."""

    clips: list[Clip]
    between: str | None = None
    ends: tuple[int, int] | None = None


class _Made(NamedTuple):
    lines: list[_Line]
    hashes: list[str]
    frames: int
    seconds: float

    @property
    def clips(self) -> list[Clip]:
        return [clip for line in self.lines for clip in line.clips]


def find_classes(wanted: tuple[str, ...], classes: int, names: tuple[str, ...]) -> list[int]:
    """The numbers of classes given by name or number; a name goes before a number.

    wanted:  at least nothing. classes: how many the model has. names: of them, or none.
    Returns: numbers from 0, in the order given.
    Raises:  UsageError that lists the classes, for one that there is not or that comes twice.
    """
    if wanted and not classes:
        raise UsageError(f"the model has no classes, got {', '.join(wanted)}; leave them out.")
    found = []
    for word in wanted:
        number = names.index(word) if word in names else int(word) if word.isdecimal() else classes
        if number >= classes:
            raise UsageError(f"there is no class {word!r}; there are {_listed(classes, names)}.")
        if number in found:
            raise UsageError(f"class {word!r} is given twice; give each once.")
        found.append(number)
    return found


def _listed(classes: int, names: tuple[str, ...]) -> str:
    if not names:
        return f"0 to {classes - 1}"
    shown = [name if name == str(i) else f"{i} {name}" for i, name in enumerate(names[:MOST_NAMED])]
    return ", ".join(shown) + (f" and {classes - MOST_NAMED} more" if classes > MOST_NAMED else "")


def _lines(generator: nn.Module, request: _Request) -> list[_Line]:
    """What to make, in the order of the contact sheet's rows."""
    config = generator.config
    labels: list[int | None] = [*find_classes(request.classes, config.classes, config.class_names)]
    if request.interpolate is not None:
        return _interpolations(config, labels, request)
    if labels or not config.classes:
        clips = [_clip(config, label, k) for label in labels or [None] for k in range(request.clips)]
    else:
        clips = [_clip(config, k % config.classes, k) for k in range(request.clips)]
    # one by one: rounding may depend on the company, which must not change a clip
    return [_Line([clip]) for clip in clips]


def _interpolations(config: Any, labels: list[int | None], request: _Request) -> list[_Line]:
    if request.interpolate == "z":
        if not labels and config.classes:
            known = _listed(config.classes, config.class_names)
            raise UsageError(f"--interpolate z: name a class with --classes; there are {known}.")
        stems = {(label, k): f"{_stem(config, label)}z{k}to{k + 1}_step" for label in labels or [None]
                 for k in range(request.clips)}  # fmt: skip
        return [_Line([Clip(f"{stem}{i}.mp4", k, label) for i in range(STEPS)], "z", (k, k + 1))
                for (label, k), stem in stems.items()]  # fmt: skip
    ends = _ends(config, request)
    if labels:
        raise UsageError(f"--interpolate {request.interpolate} says the classes itself; leave --classes out.")
    stem = f"class{ends[0]}to{ends[1]}"
    return [_Line([Clip(f"{stem}_sample{k}_step{i}.mp4", k, None) for i in range(STEPS)], "classes", ends)
            for k in range(request.clips)]  # fmt: skip


def _ends(config: Any, request: _Request) -> tuple[int, int]:
    word, names = request.interpolate, config.class_names
    # names of classes may hold a colon themselves
    for place in (i for i, letter in enumerate(word) if letter == ":"):
        pair = (word[:place], word[place + 1 :])
        if all(end in names or end.isdecimal() for end in pair):
            first, second = (find_classes((end,), config.classes, names)[0] for end in pair)
            return first, second
    listed = f"classes are {_listed(config.classes, names)}" if config.classes else "the model has no classes"
    raise UsageError(f"--interpolate must be A:B, two classes, or z, got {word!r}; {listed}.")


def _clip(config: Any, label: int | None, number: int) -> Clip:
    return Clip(f"{_stem(config, label)}sample{number}.mp4", number, label)


def _stem(config: Any, label: int | None) -> str:
    """The start of a file's name; the class's own name only as far as every file system takes it."""
    if label is None:
        return ""
    name = config.class_names[label] if config.class_names else str(label)
    plain = re.sub(r"[^A-Za-z0-9-]+", "_", name)[:60].strip("_")
    return f"class{label}_" if plain in ("", str(label)) else f"class{label}_{plain}_"


def _prepare(out: Path, lines: list[_Line]) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UsageError(f"-o {out}: cannot be written to: {error.strerror}; choose another folder.") from error
    for file in [*(clip.file for line in lines for clip in line.clips), SHEET, REPORT]:
        if (out / file).is_dir():
            raise UsageError(f"-o {out}: {file} there is a folder; choose another folder.")
    return out


def _make(generator: nn.Module, lines: list[_Line], request: _Request, work: Path) -> _Made:
    """Write every clip and the contact sheet into `work`."""
    shown, hashes, rows, seconds = _shown(lines), [], [], 0.0
    total, quiet = sum(len(line.clips) for line in lines), not sys.stderr.isatty()
    with tqdm(total=total, unit="clip", leave=False, disable=quiet) as bar:
        for line in lines:
            start = time.perf_counter()
            pixels = _generate(generator, line, request).mul(255).round().to(torch.uint8).movedim(2, -1).cpu()
            seconds += time.perf_counter() - start
            for clip, video in zip(line.clips, pixels, strict=True):  # video [T, H, W, 3]
                write_video(work / clip.file, video, request.fps)
                if len(hashes) in shown:
                    rows.append(video[:COLUMNS])
                hashes.append(frame_hash(video))
                bar.update()
    write_png(work / SHEET, contact_sheet(rows))
    return _Made(lines, hashes, len(video), seconds)


def _shown(lines: list[_Line]) -> set[int]:
    """Places of the clips on the sheet: as many as it has room for, of every class or of the first lines."""
    if lines[0].between:
        return set(range(ROWS))
    turns: Counter[int | None] = Counter()
    ranked = []
    for place, clip in enumerate(clip for line in lines for clip in line.clips):
        turns[clip.label] += 1
        ranked.append((turns[clip.label], place))
    return {place for _, place in sorted(ranked)[:ROWS]}


@torch.no_grad()
def _generate(generator: nn.Module, line: _Line, request: _Request) -> Tensor:
    """[n, T, 3, H, W] in [0, 1]."""
    how = (request.seed, request.truncation, request.kind)
    first = line.clips[0]
    if line.between == "z":
        return generator.between_noises(*generator.noise(list(line.ends), *how), label=first.label, steps=STEPS)
    if line.between == "classes":
        return generator.between_classes(generator.noise([first.number], *how)[0], *line.ends, steps=STEPS)
    return generator.sample(1, None if first.label is None else [first.label], *how, numbers=[first.number])


def _report(
    generator: nn.Module, made: _Made, request: _Request, identity: str, backends: dict[str, str]
) -> dict[str, Any]:
    config = generator.config
    options = ("clips", "seed", "truncation", "kind", "interpolate", "fps")
    ends = [end for line in made.lines if line.between == "classes" for end in line.ends]
    labels = sorted({*ends, *(clip.label for clip in made.clips if clip.label is not None)})
    named = dict(enumerate(config.class_names))
    return {
        "model": {"name": request.model, "sha256": identity},
        "options": {"classes": list(request.classes)} | {name: getattr(request, name) for name in options},
        "classes": [{"number": label, "name": named.get(label)} for label in labels],
        "frames": made.frames,
        "size": [config.size, config.size],
        "samples": [
            {"file": clip.file, "class": clip.label, "number": clip.number, "frame_hash": digest}
            for clip, digest in zip(made.clips, made.hashes, strict=True)
        ],
        "contact_sheet": SHEET,
        "seconds": round(made.seconds, 6),
        "frames_per_second": round(made.frames * len(made.clips) / made.seconds, 1),
        "backends": dict(backends),
        "versions": {"fastvid": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": request.device,
        "threads": torch.get_num_threads(),
    }


def _summary(report: dict[str, Any], out: Path) -> str:
    count = len(report["samples"])
    return (
        f"{report['model']['name']}: {count} clip{'s' * (count != 1)} of {report['frames']} frames in "
        f"{report['seconds']:.2f} s, {report['frames_per_second']:.1f} frames/s -> {out / SHEET}"
    )


