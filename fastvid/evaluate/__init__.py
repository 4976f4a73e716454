"""The figures of one model on one data set, with baselines beside them, intervals, and the protocol behind them."""

import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from fastvid.checkpoint import manifest_hash
from fastvid.data.sheet import contact_sheet, write_png
from fastvid.errors import UsageError
from fastvid.evaluate.extract import default_cache
from fastvid.evaluate.figure import curves, figures, generated_figures
from fastvid.evaluate.generator import choose_sets, compare
from fastvid.evaluate.report import generator_protocol, protocol, protocol_line, table
from fastvid.evaluate.tally import LEAST_FRAMES, METRICS, NUMBERS, Judges, check_metrics, judges, leave_out, measure
from fastvid.evaluate.windows import choose_windows, fitted_codes, held_out, window_of
from fastvid.models import VideoPredictor, about, load
from fastvid.models.predictor import model_folder
from fastvid.train.ranks import Ranks, process_group

EXTRACTORS, RESIZES = ("i3d", "i3d_other"), ("tf1", "torch")

__all__ = ["METRICS", "choose_windows", "evaluate", "protocol_line", "table"]


def evaluate(
    model: str | Path, data: str, clips: int = 256, samples: int = 10, seed: int = 0,
    metrics: tuple[str, ...] | None = None, json_file: str | Path | None = None, sheet: str | Path | None = None,
    extractor: str = "i3d", resize: str = "tf1", cache: str | Path | None = "default", frame_step: int = 1,
    truncation: float = 1.0,
) -> dict:
    """Measure a model on held-out windows; under torchrun the processes share them and find the same figures.

    Beside a VideoPredictor stand repeating the last given frame, futures of codes drawn by themselves, each from the
    training windows' codes at its place, and the autoencoder's reconstruction: what the codes themselves lose. Beside a
    DVDGANPredictor, which has no codes, stand the repeated frame, an untrained model and random pixels. As many clips
    of a generator, of the same classes as the windows, stand beside those of one that is untrained, random pixels, and
    windows of the train split: the floor.

    model:     a shipped name, a model or run folder. data: what `open_clips` takes; its test split is measured.
    clips:     windows to measure, one per clip where there are enough. samples: predictions per window.
    seed:      decides windows, predictions and intervals.
    metrics:   of "psnr" (dB), "ssim", "lpips", "fvd" (with FVD*, fid_i3d400, is_i3d400), "bits" (per code; alone it
               samples nothing). None takes all whose weights are there, and names the others under "missing". Of a
               generator only "fvd" can be measured.
    json_file: gets the result. sheet: PNG with some predictions as rows: truth, sample 1, sample 2; of a generator a
               real and a generated clip of one class in turn.
    extractor: kind of I3D weights; with any but "i3d" the distance is not called FVD. resize: "tf1", as the reference
               implementation of FVD, or "torch", as later ports.
    cache:     folder for features of clips; "default" is in the user's cache folder, None keeps none.
    frame_step: keep every n-th frame of the data. truncation: of a generator's noise, which it scales.
    Returns:   {"model", "data", "protocol", "figures": {name: fields of Figure}, "curves", "missing"}, and "kind" for
               what has no codes: "frame predictor" or "generator".
    Raises:    UsageError, DataError, VideoError, CheckpointError, WeightsError.
    """
    _check(clips, samples, seed, metrics, extractor, resize, json_file, sheet)
    if frame_step < 1:
        raise UsageError(f"--frame-step must be at least 1, got {frame_step}.")
    check_metrics(metrics)
    generates = not about(model).given
    wanted = _of_generator(metrics, truncation) if generates else metrics
    judged = judges(wanted, extractor, resize, default_cache() if cache == "default" else cache and Path(cache))
    loaded, request = load(model), _Request(str(data), clips, samples, seed, metrics is not None, frame_step)
    with process_group("gloo") as ranks:
        if generates:
            result, rows = _generated(loaded, request, judged, truncation, manifest_hash(model_folder(model)), ranks)
        elif truncation != 1:
            raise UsageError("--truncation is for generators; the model goes on from frames.")
        else:
            result, rows = _predicted(loaded, request, judged, manifest_hash(model_folder(model)), ranks)
    result = {"model": str(model), "data": str(data), **result}
    if ranks.leads:
        _write(result, rows, json_file, sheet, window_of(loaded).given)
    return result


class _Request(NamedTuple):
    data: str
    clips: int
    samples: int
    seed: int
    asked: bool  # for its metrics by name
    frame_step: int


def _predicted(
    model: nn.Module, request: _Request, judged: Judges, identity: str, ranks: Ranks
) -> tuple[dict, list[Tensor]]:
    data, clips, samples, seed, asked, frame_step = request
    coded, window = isinstance(model, VideoPredictor), window_of(model)
    held = held_out(model, data, "test", clips, seed, frame_step)
    leave_out(judged, asked, len(held.places), window.frames, window.size, coded)
    fit, fitted_on = fitted_codes(model, data, held, seed, ranks) if coded else (None, None)
    tally = measure(model, held, fit, judged, samples, seed, ranks)
    pixels = (window.frames - window.given) * 3 * window.size[0] * window.size[1]
    found = figures(tally, fit, held.groups(), model.vqvae.config.codes if coded else 0, pixels, judged, seed)
    result = {
        "protocol": protocol(held, judged, samples, seed, fitted_on, window, identity),
        "figures": {name: asdict(figure) for name, figure in found.items()},
        "curves": curves(tally, judged), "missing": judged.missing,
    }
    return result if coded else {"kind": "frame predictor", **result}, tally.rows


def _of_generator(metrics: tuple[str, ...] | None, truncation: float) -> tuple[str, ...]:
    others = [name for name in metrics or () if name != "fvd"]
    if others:
        raise UsageError(f"--metrics {','.join(others)}: a generated clip has no truth beside it; take fvd.")
    if not (truncation > 0 and math.isfinite(truncation)):
        raise UsageError(f"--truncation must be a finite number above 0, got {truncation}.")
    return ("fvd",)


def _generated(
    model: nn.Module, request: _Request, judged: Judges, truncation: float, identity: str, ranks: Ranks
) -> tuple[dict, list[Tensor]]:
    data, clips, _, seed, _, frame_step = request
    window, least = window_of(model), LEAST_FRAMES["fvd"]
    if window.frames < least:
        made = f"this generator makes {window.frames}, and nothing else judges it"
        raise UsageError(f"evaluate: FVD needs {least} frames; {made}.")
    if clips < 2:
        raise UsageError(f"--clips must be at least 2 for a distance between sets, got {clips}.")
    sets = choose_sets(model, data, clips, seed, frame_step)
    leave_out(judged, True, len(sets.held.places), window.frames, window.size)
    values, groups, rows = compare(model, sets, judged.extractor, seed, truncation, ranks)
    found = generated_figures(values, groups, judged, seed)
    beside = {
        "untrained": f"same config, weights of seed {seed}, statistics as at the start",
        "noise_pixels": "uniform, independent, 0 to 255",
    }
    if sets.trained:
        beside["train"] = f"{len(sets.trained.places)} windows of the train split, of the same classes"
    classes = "none" if sets.labels is None else f"{len(set(sets.labels))}, each as often as in the windows"
    about_it = generator_protocol(sets.held, judged, seed, truncation, beside, classes, window, identity)
    return {
        "kind": "generator", "protocol": about_it,
        "figures": {name: asdict(figure) for name, figure in found.items()},
        "curves": {}, "missing": judged.missing | ({"train": sets.why} if sets.trained is None else {}),
    }, rows


def _write(result: dict, rows: list, json_file: str | Path | None, sheet: str | Path | None, given: int) -> None:
    if warning := result["protocol"].get("warning"):
        print(f"fastvid: {warning}.", file=sys.stderr)
    if sheet is not None and rows:
        write_png(sheet, contact_sheet(rows, given=given))
    if json_file is not None:
        _write_json(Path(json_file), result)


def _check(
    clips: int, samples: int, seed: int, metrics: tuple[str, ...] | None, extractor: str, resize: str,
    *files: str | Path | None,
) -> None:
    for name, value in (("clips", clips), ("samples", samples)):
        if not 1 <= value <= NUMBERS:
            raise UsageError(f"--{name} must be from 1 to {NUMBERS}, got {value}.")
    if extractor not in EXTRACTORS:
        raise UsageError(f"--extractor must be {' or '.join(EXTRACTORS)}, got {extractor}.")
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"--seed must lie in [0, 2^63), got {seed}.")
    if resize not in RESIZES:
        raise UsageError(f"--resize must be {' or '.join(RESIZES)}, got {resize}.")
    if files[1] is not None and set(metrics or METRICS) == {"bits"}:
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
