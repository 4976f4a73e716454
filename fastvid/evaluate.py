"""The figures of one model on one data set, each with the number of windows and a 95% interval behind it."""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastvid.data.clips import GENERATORS, ClipWindows, open_clips
from fastvid.data.sheet import contact_sheet, write_png
from fastvid.errors import DataError, UsageError
from fastvid.metrics import bits_per_code, bootstrap_interval, code_perplexity, context_free_bits, copy_bits, psnr, ssim
from fastvid.models import VideoPredictor, load
from fastvid.models.predictor import FRAMES_PER_STEP, GIVEN, ROWS_AT_ONCE
from fastvid.train.latents import Latents, as_model_input
from fastvid.train.tasks import as_frames, bottom_inputs

METRICS = ("psnr", "ssim", "bits")
EQUAL = 100.0  # dB that equal frames count as, since infinity has no mean
FIT_WINDOWS = 512  # training windows that the baselines are fitted to
SHOWN = 4  # windows on the sheet
ENCODED_AT_ONCE = 16


@dataclass
class Figure:
    """A value in `unit` over n windows, with its 95% interval where it has one."""

    label: str
    value: float
    unit: str
    n: int
    low: float | None = None
    high: float | None = None


@dataclass
class _Tally:
    """What each window contributed, by name, and some predictions to show."""

    values: dict[str, list[Tensor]] = field(default_factory=dict)
    codes: list[Latents] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    def add(self, name: str, values: Tensor) -> None:
        self.values.setdefault(name, []).append(values.double())


def evaluate(
    model: str | Path, data: str, clips: int = 256, samples: int = 10, seed: int = 0,
    metrics: tuple[str, ...] = METRICS, json_file: str | Path | None = None, sheet: str | Path | None = None,
) -> dict:
    """Measure a model on held-out windows: reconstruction, bits per code, likeness of its predictions to the truth.

    model:     a shipped name or a model folder. data: what `open_clips` takes; its test split is measured.
    clips:     windows to measure, one per clip where there are enough. samples: predictions per window.
    seed:      decides windows, predictions and intervals.
    metrics:   of "psnr" (dB), "ssim", "bits" (per code); bits alone samples nothing.
    json_file: gets the result. sheet: PNG with some predictions as rows: truth, sample 1, sample 2.
    Returns:   {"model", "data", "protocol", "seed", "figures": {name: fields of Figure}}.
    Raises:    UsageError, DataError, VideoError, CheckpointError.
    """
    _check(clips, samples, seed, metrics, json_file, sheet)
    predictor = load(model)
    frames = FRAMES_PER_STEP * (predictor.top.config.steps + 1)
    held_out = ClipWindows(open_clips(data, "test", size=predictor.size), frames, predictor.size)
    places, how = choose_windows(held_out.clips.lengths, frames, clips, seed)
    tally = _measure(predictor, held_out, places, samples, seed, metrics)
    fit, fitted_on = _fit_codes(predictor, data, frames, seed, tally)
    groups = torch.tensor([clip for clip, _ in places])
    figures = _figures(tally, fit, predictor, groups, samples, seed, metrics)
    drawn = len(groups.unique())
    spread = f"Intervals: 95%, bootstrap over {drawn} clips." if drawn > 1 else "No intervals: there is one clip."
    protocol = (
        f"{len(places)} windows of {frames} frames at {predictor.size[1]}x{predictor.size[0]}, {how}; "
        f"{held_out.clips.describe().splitlines()[0]}. The first {GIVEN} frames are given, {frames - GIVEN} predicted; "
        f"of {samples} predictions (seed {seed}, temperature 1) the best counts, by its mean over frames. "
        f"Baselines of bits are fitted on {fitted_on}. Equal frames count as {EQUAL:g} dB. {spread}"
    )
    result = {"model": str(model), "data": str(data), "seed": seed, "protocol": protocol,
              "figures": {name: asdict(figure) for name, figure in figures.items()}}
    if sheet is not None:
        write_png(sheet, contact_sheet(tally.rows, given=GIVEN))
    if json_file is not None:
        _write_json(Path(json_file), result)
    return result


def choose_windows(lengths: list[int], span: int, count: int, seed: int) -> tuple[list[tuple[int, int]], str]:
    """Which windows to measure: one per clip, or, of too few clips, several that start at different frames.

    lengths: frames of each clip. span: of a window. count: windows wanted. seed: of the choice among too many.
    Returns: at most `count` (clip, start) pairs in order, all different, and how they were chosen in words.
    Raises:  DataError if no clip is long enough.
    """
    usable = [i for i, length in enumerate(lengths) if length >= span]
    if not usable:
        raise DataError(f"evaluate: wanted clips of {span} frames, the longest has {max(lengths)}; give longer ones.")
    if len(usable) >= count:
        return [(i, 0) for i in usable[:count]], "one per clip from its first frame on"
    for every in (span, span // 2, span // 4, 1):
        places = [(i, start) for i in usable for start in range(0, lengths[i] - span + 1, every)]
        if len(places) >= count:
            break
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(len(places), generator=generator)[:count].sort().values.tolist()
    overlap = "" if every >= span else " and overlap"
    return [places[i] for i in kept], f"from {len(usable)} of the clips; starts are multiples of {every}{overlap}"


def table(result: dict) -> str:
    """The figures as lines of text, the protocol last.

    result:  what `evaluate` returns.
    Returns: text without a final line break.
    Raises:  nothing.
    """
    rows = [(f["label"], f"{f['value']:.4g} {f['unit']}".strip(), _interval(f), f"n={f['n']}")
            for f in result["figures"].values()]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{result['model']} on {result['data']}"]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", f"Protocol: {result['protocol']}"])


# ---- measuring


@torch.no_grad()
def _measure(
    predictor: VideoPredictor, windows: ClipWindows, places: list[tuple[int, int]], samples: int, seed: int,
    metrics: tuple[str, ...],
) -> _Tally:
    tally = _Tally()
    sampled = bool({"psnr", "ssim"} & set(metrics))
    at_once = max(1, ROWS_AT_ONCE // samples) if sampled else ENCODED_AT_ONCE
    shown = {round(i * (len(places) - 1) / (SHOWN - 1)) for i in range(SHOWN)}
    with tqdm(total=len(places), unit="window", disable=not sys.stderr.isatty()) as bar:
        for first in range(0, len(places), at_once):
            clips = torch.stack([windows.at(*place) for place in places[first : first + at_once]])  # [B, T, H, W, 3]
            video = as_model_input(clips)  # [B, 3, T, H, W]
            codes = _encode(predictor, video)
            tally.codes.append(codes)
            error = (predictor.vqvae.decode(codes.top, codes.bottom) - video).double().square().mean(dim=(1, 2, 3, 4))
            tally.add("error", error)
            if "bits" in metrics:
                _measure_bits(predictor, codes, tally)
            if sampled:
                future = predictor.predict(video[:, :, :GIVEN].transpose(1, 2), video.shape[2] - GIVEN, samples, seed)
                _measure_likeness(video, future, metrics, tally)
                for i in sorted(shown & set(range(first, first + len(clips)))):
                    _show(clips[i - first], future[i - first], tally)
            bar.update(len(clips))
    return tally


def _encode(predictor: VideoPredictor, video: Tensor) -> Latents:
    return Latents(*predictor.vqvae.encode(video[:, :, :GIVEN]), *predictor.vqvae.encode(video), "")


def _measure_bits(predictor: VideoPredictor, codes: Latents, tally: _Tally) -> None:
    target = codes.top[:, codes.given_top.shape[1] :]
    tally.add("bits_top", bits_per_code(predictor.top(target, codes.given_top, codes.given_bottom), target))
    per_slice = []
    for n in range(codes.given_bottom.shape[1], codes.bottom.shape[1]):
        index = torch.full((len(codes.bottom),), n)
        target, top, window = bottom_inputs(codes, index, predictor.bottom.config.window)
        per_slice.append(bits_per_code(predictor.bottom(target, index, top, window), target))
    tally.add("bits_bottom", torch.stack(per_slice).mean(dim=0))


def _measure_likeness(video: Tensor, future: Tensor, metrics: tuple[str, ...], tally: _Tally) -> None:
    """video [B, 3, T, H, W], future [B, S, n, 3, H, W]."""
    truth = video[:, :, GIVEN:].transpose(1, 2).unsqueeze(1)  # [B, 1, n, 3, H, W]
    last = video[:, :, GIVEN - 1 : GIVEN].transpose(1, 2).unsqueeze(1)
    measures: dict[str, Callable] = {"psnr": lambda a, b: psnr(a, b).clamp(max=EQUAL), "ssim": ssim}
    for name in {"psnr", "ssim"} & set(metrics):
        per_sample = measures[name](future, truth.expand_as(future)).mean(dim=2)  # [B, S]
        repeated = measures[name](last.expand_as(truth), truth).mean(dim=2).squeeze(1)  # [B]
        best = per_sample.amax(dim=1)
        tally.add(f"{name}_best", best)
        tally.add(f"{name}_mean", per_sample.mean(dim=1))
        tally.add(f"{name}_repeat", repeated)
        tally.add(f"{name}_wins", 100.0 * (best > repeated))


def _show(clip: Tensor, future: Tensor, tally: _Tally) -> None:
    """Rows truth, sample 1, sample 2. clip [T, H, W, 3] uint8, future [S, n, 3, H, W]."""
    tally.rows.append(clip)
    tally.rows += [torch.cat([clip[:GIVEN], sample]) for sample in as_frames(future[:2].transpose(1, 2))]


# ---- baselines of bits


@torch.no_grad()
def _fit_codes(
    predictor: VideoPredictor, data: str, frames: int, seed: int, tally: _Tally
) -> tuple[Latents, str]:
    """Codes of the training split, to which the baselines are fitted, and their description."""
    if str(data) not in GENERATORS and not Path(data, "train").is_dir():
        return _joined(tally.codes), "the measured windows themselves, for want of a train split"
    windows = ClipWindows(open_clips(data, "train", size=predictor.size), frames, predictor.size)
    places, _ = choose_windows(windows.clips.lengths, frames, FIT_WINDOWS, seed)
    parts = []
    with tqdm(total=len(places), unit="window", desc="baselines", disable=not sys.stderr.isatty()) as bar:
        for first in range(0, len(places), ENCODED_AT_ONCE):
            clips = torch.stack([windows.at(*place) for place in places[first : first + ENCODED_AT_ONCE]])
            parts.append(_encode(predictor, as_model_input(clips)))
            bar.update(len(clips))
    return _joined(parts), f"{len(places)} windows of the train split"


def _joined(parts: list[Latents]) -> Latents:
    return Latents(*(torch.cat(codes) for codes in list(zip(*parts, strict=True))[:4]), "")


def _levels(codes: Latents) -> dict[str, tuple[Tensor, Tensor]]:
    """Per level the codes of the future, and those one latent step earlier as a predictor has them."""
    levels = {}
    for name, given, whole in (("top", codes.given_top, codes.top), ("bottom", codes.given_bottom, codes.bottom)):
        known = given.shape[1]
        seen = torch.cat([given, whole[:, known:]], dim=1)
        levels[name] = (seen[:, known:], seen[:, known - 1 : -1])
    return levels


# ---- figures


def _figures(
    tally: _Tally, fit: Latents, predictor: VideoPredictor, groups: Tensor, samples: int, seed: int,
    metrics: tuple[str, ...],
) -> dict[str, Figure]:
    values = {name: torch.cat(parts) for name, parts in tally.values.items()}

    def figure(label: str, unit: str, of: Tensor, statistic: Callable[[Tensor], Tensor] | None = None) -> Figure:
        mean = of.double().reshape(len(of), -1).mean(dim=0, keepdim=True)
        value = float(mean if statistic is None else statistic(mean))
        # clips are what is drawn again: one alone says nothing of how much they differ
        interval = bootstrap_interval(of, groups, statistic, seed) if len(groups.unique()) > 1 else ()
        return Figure(label, value, unit, len(of), *interval)

    figures: dict[str, Figure] = {}
    if "psnr" in metrics:
        per_clip = _decibel(values["error"])
        figures["reconstruction_psnr"] = figure(
            "reconstruction, PSNR of all pixels", "dB", values["error"], lambda mean: _decibel(mean.squeeze(1))
        )
        figures["reconstruction_psnr_per_clip"] = figure("reconstruction, mean PSNR of a clip", "dB", per_clip)
    if "bits" in metrics:
        figures |= _bits_figures(figure, values, _joined(tally.codes), fit, predictor.vqvae.config.codes)
    for name, unit in (("ssim", ""), ("psnr", "dB")):
        if name in metrics:
            label = f"prediction, {name.upper()}"
            figures[f"{name}_best"] = figure(f"{label}, best of {samples}", unit, values[f"{name}_best"])
            figures[f"{name}_mean"] = figure(f"{label}, mean of {samples}", unit, values[f"{name}_mean"])
            figures[f"{name}_repeat"] = figure(f"{label} of repeating frame 4", unit, values[f"{name}_repeat"])
            figures[f"{name}_wins"] = figure(f"{label}, best above repeating", "% of windows", values[f"{name}_wins"])
    return figures


def _bits_figures(figure: Callable, values: dict, codes: Latents, fit: Latents, K: int) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    fitted = _levels(fit)
    for level, (future, previous) in _levels(codes).items():
        n, (train, train_previous) = len(future), fitted[level]
        perplexity, used = code_perplexity(future, K)
        figures[f"{level}_perplexity"] = Figure(f"{level} codes, perplexity", perplexity, f"of {K}", n)
        figures[f"{level}_used"] = Figure(f"{level} codes, used", used, f"of {K}", n)
        figures[f"{level}_bits"] = figure(f"{level} prior", "bits per code", values[f"bits_{level}"])
        copied = [copy_bits(train, train_previous, future[i], previous[i], K) for i in range(n)]
        figures[f"{level}_copy_bits"] = figure(
            f"{level}, same code as a step ago (e={copied[0].error_rate:.3f})", "bits per code",
            torch.tensor([c.bits for c in copied], dtype=torch.float64),
        )
        free = [context_free_bits(train, future[i], K).fitted for i in range(n)]
        figures[f"{level}_context_free_fitted_bits"] = figure(
            f"{level}, context-free, fitted", "bits per code", torch.tensor(free, dtype=torch.float64)
        )
        shares = torch.stack([torch.bincount(window.flatten(), minlength=K) for window in future]).double()
        figures[f"{level}_context_free_oracle_bits"] = figure(
            f"{level}, context-free, oracle", "bits per code", shares / future[0].numel(), _entropy
        )
    return figures


def _entropy(shares: Tensor) -> Tensor:
    """[R, K] -> [R] bits."""
    return torch.special.entr(shares).sum(dim=1) / math.log(2)


def _decibel(error: Tensor) -> Tensor:
    return (-10 * torch.log10(error)).clamp(max=EQUAL)


def _interval(figure: dict) -> str:
    return "" if figure["low"] is None else f"[{figure['low']:.4g}, {figure['high']:.4g}]"


# ---- checks and files


def _check(clips: int, samples: int, seed: int, metrics: tuple[str, ...], *files: str | Path | None) -> None:
    for name, value in (("clips", clips), ("samples", samples)):
        if value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}.")
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"--seed must lie in [0, 2^63), got {seed}.")
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise UsageError(f"--metrics must name some of {','.join(METRICS)}, got {','.join(metrics) or 'none'}.")
    if files[1] is not None and set(metrics) == {"bits"}:
        raise UsageError("--sheet shows predictions, which --metrics bits makes none of; add psnr or ssim.")
    # found out now rather than after the work
    for path in (Path(file) for file in files if file is not None):
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise UsageError(f"{path}: cannot be written; its folder must exist and be writable.")


def _write_json(path: Path, result: dict) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}; choose another place.") from error
    finally:
        partial.unlink(missing_ok=True)
