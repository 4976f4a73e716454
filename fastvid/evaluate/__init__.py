"""The figures of one model on one data set, with baselines beside them, intervals, and the protocol behind them."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from fastvid.checkpoint import manifest_hash
from fastvid.data.sheet import contact_sheet, write_png
from fastvid.errors import UsageError
from fastvid.evaluate.extract import default_cache
from fastvid.evaluate.figure import curves, figures
from fastvid.evaluate.report import protocol, protocol_line, table
from fastvid.evaluate.tally import METRICS, NUMBERS, judges, leave_out, measure
from fastvid.evaluate.windows import choose_windows, fitted_codes, held_out
from fastvid.models import load
from fastvid.models.predictor import GIVEN, model_folder
from fastvid.train.ranks import process_group

EXTRACTORS, RESIZES = ("i3d", "i3d_other"), ("tf1", "torch")

__all__ = ["METRICS", "choose_windows", "evaluate", "protocol_line", "table"]


def evaluate(
    model: str | Path, data: str, clips: int = 256, samples: int = 10, seed: int = 0,
    metrics: tuple[str, ...] | None = None, json_file: str | Path | None = None, sheet: str | Path | None = None,
    extractor: str = "i3d", resize: str = "tf1", cache: str | Path | None = "default",
) -> dict:
    """Measure a model on held-out windows; under torchrun the processes share them and find the same figures.

    Beside the model stand repeating the last given frame, futures of codes drawn by themselves, each from the training
    windows' codes at its place, and the autoencoder's reconstruction: what the codes themselves lose.

    model:     a shipped name or a model folder. data: what `open_clips` takes; its test split is measured.
    clips:     windows to measure, one per clip where there are enough. samples: predictions per window.
    seed:      decides windows, predictions and intervals.
    metrics:   of "psnr" (dB), "ssim", "lpips", "fvd" (with FVD*, fid_i3d400, is_i3d400), "bits" (per code; alone it
               samples nothing). None takes all whose weights are there, and names the others under "missing".
    json_file: gets the result. sheet: PNG with some predictions as rows: truth, sample 1, sample 2.
    extractor: kind of I3D weights; with any but "i3d" the distance is not called FVD. resize: "tf1", as the reference
               implementation of FVD, or "torch", as later ports.
    cache:     folder for features of clips; "default" is in the user's cache folder, None keeps none.
    Returns:   {"model", "data", "protocol", "figures": {name: fields of Figure}, "curves", "missing"}.
    Raises:    UsageError, DataError, VideoError, CheckpointError, WeightsError.
    """
    _check(clips, samples, seed, metrics, extractor, resize, json_file, sheet)
    judged = judges(metrics, extractor, resize, default_cache() if cache == "default" else cache and Path(cache))
    predictor, identity = load(model), manifest_hash(model_folder(model))
    with process_group("gloo") as ranks:
        held = held_out(predictor, data, "test", clips, seed)
        leave_out(judged, metrics is not None, len(held.places), held.windows.frames, predictor.size)
        fit, fitted_on = fitted_codes(predictor, data, held, seed, ranks)
        tally = measure(predictor, held, fit, judged, samples, seed, ranks)
    pixels = (held.windows.frames - GIVEN) * 3 * predictor.size[0] * predictor.size[1]
    found = figures(tally, fit, held.groups(), predictor.vqvae.config.codes, pixels, judged, seed)
    about = protocol(held, judged, samples, seed, fitted_on, predictor.size, identity)
    result = {
        "model": str(model), "data": str(data), "protocol": about,
        "figures": {name: asdict(figure) for name, figure in found.items()},
        "curves": curves(tally, judged), "missing": judged.missing,
    }
    if ranks.leads:
        _write(result, tally.rows, json_file, sheet)
    return result


def _write(result: dict, rows: list, json_file: str | Path | None, sheet: str | Path | None) -> None:
    if warning := result["protocol"].get("warning"):
        print(f"fastvid: {warning}.", file=sys.stderr)
    if sheet is not None and rows:
        write_png(sheet, contact_sheet(rows, given=GIVEN))
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
