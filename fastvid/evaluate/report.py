"""The figures as a person reads them, and the line without which they could not be compared with anybody else's."""

import torch

from fastvid import __version__
from fastvid.evaluate.figure import LEAST_CLIPS
from fastvid.evaluate.tally import EQUAL, Judges
from fastvid.evaluate.windows import Held, Window

LIKENESS = ("best", "mean", "repeat", "marginal", "reconstruction")
DISTANCES = ("model", "repeat", "marginal", "reconstruction", "real")
COLUMNS = {  # by what the model is, where it draws no codes: of likeness, of distances
    "frame predictor": (
        ("best", "mean", "repeat", "untrained", "noise"), ("model", "repeat", "untrained", "noise", "real"),
    ),
    "generator": ((), ("model", "untrained", "noise", "train", "real")),
}  # fmt: skip
HEADS = {
    "best": "best of {samples}", "mean": "mean of {samples}", "model": "model", "repeat": "repeat frame {given}",
    "marginal": "codes by themselves", "reconstruction": "reconstruction", "real": "real clips",
    "untrained": "untrained model", "noise": "random pixels", "train": "training clips",
}  # fmt: skip
ROWS = {
    "psnr": "PSNR (dB), higher is better", "ssim": "SSIM, higher is better", "lpips": "LPIPS (alex), lower is better",
    "fvd": "FVD, lower is better", "fvd_star": "FVD*", "frechet_other": "Fréchet distance, another network, not FVD",
    "frechet_other_star": "the same to reconstructions", "fid_i3d400": "FID (I3D-400)", "is_i3d400": "IS (I3D-400)",
}  # fmt: skip
FEATURES = {"FVD": 400, "FID (I3D-400)": 1024}
FITTED = "centre crop to the aspect, then antialiased resize"
VERSIONS = f"fastvid {__version__}, torch {torch.__version__}"
BITS = ("bits", "copy_bits", "context_free_fitted_bits", "context_free_oracle_bits")
BITS_HEADS = ("prior", "same code as before", "context-free, fitted", "context-free, oracle")


def protocol(
    held: Held, judged: Judges, samples: int, seed: int, fitted_on: str | None, window: Window, model_hash: str
) -> dict:
    """Everything that a figure depends on, by name; fitted_on: None where there are no codes. JSON values only."""
    coded, clips = fitted_on is not None, len(held.groups().unique())
    found = {
        **_windows(held, model_hash), "given": window.given,
        "predicted": window.frames - window.given, "stride": held.windows.frame_step, "size": list(window.size),
        "fitted": FITTED, "samples": samples, "seed": seed,
        "noise": "each window its own", "temperature": 1.0, **({"prior_weights": "float32"} if coded else {}),
        "best": "of the samples, by the mean over predicted frames, for each metric by itself",
        **({"baselines_fitted_on": fitted_on} if coded else {}), "equal_frames_db": EQUAL,
        "intervals": _intervals(clips), "versions": VERSIONS,
    }
    if "psnr" in judged.metrics:
        found["psnr"] = "over all channels of a frame, predictions not rounded"
    if "ssim" in judged.metrics:
        found["ssim"] = "11x11 Gaussian window, sigma 1.5, data range 1, mean over channels, predictions not rounded"
    if "lpips" in judged.metrics:
        weights = judged.weights["lpips"].fingerprint
        found["lpips"] = f"AlexNet, v0.1, plain mean over maps, predictions not rounded, weights sha256 {weights}"
    if judged.extractor:
        star = "; FVD*: their reconstructions" if coded else ""
        found |= _distances(judged, clips, {
            "real_set": f"the same windows{star}. All clips begin with the real given frames",
            "distances_of": "sample 0 of each window, all frames, 8 bits; the inception score in one split",
        })  # fmt: skip
    return found


def generator_protocol(
    held: Held, judged: Judges, seed: int, truncation: float, sets: dict[str, str], classes: str, window: Window,
    model_hash: str,
) -> dict:
    """The same of a generator. sets: what stands beside the model, in words. classes: of the clips, in words."""
    clips = len(held.groups().unique())
    found = {
        **_windows(held, model_hash), "stride": held.windows.frame_step, "size": list(window.size), "fitted": FITTED,
        "classes": classes, "seed": seed, "noise": "each clip its own", "truncation": truncation, **sets,
        "intervals": _intervals(clips), "versions": VERSIONS,
    }
    return found | _distances(judged, clips, {
        "real_set": "the windows", "distances_of": "all frames, 8 bits; the inception score in one split",
    })  # fmt: skip


def _windows(held: Held, model_hash: str) -> dict:
    clips, skipped = len(held.groups().unique()), len(held.windows.skipped)
    return {
        "model": model_hash, "data": held.windows.clips.describe().splitlines()[0], "skipped": skipped,
        "windows": len(held.places), "clips": clips, "chosen": held.how, "frames": held.windows.frames,
    }


def _intervals(clips: int) -> str:
    return f"95%, bootstrap over {clips} clips" if clips >= LEAST_CLIPS else f"none, there are {clips} clips"


def _distances(judged: Judges, clips: int, sets: dict) -> dict:
    found = {
        "extractor": f"{judged.weights['fvd'].kind}, sha256 {judged.weights['fvd'].fingerprint}",
        "resize": f"{judged.extractor.resize} bilinear to 224x224", **sets,
    }
    few = [f"{features} features of {name}" for name, features in FEATURES.items() if clips <= features]
    return found | ({"warning": f"{clips} clips for the {' and the '.join(few)}: biased upwards"} if few else {})


def table(result: dict) -> str:
    """The figures as lines of text, the protocol last.

    result:  what `evaluate` returns.
    Returns: text without a final line break.
    Raises:  nothing.
    """
    figures = result["figures"]
    likeness, distances = COLUMNS.get(result.get("kind"), (LIKENESS, DISTANCES))
    blocks = [
        _block(figures, ("psnr", "ssim", "lpips"), likeness, result),
        _block(figures, tuple(ROWS)[3:], distances, result),
        _bits(figures),
        _others(figures),
    ]
    lines = [f"{result['model']} on {result['data']}"]
    for block in filter(None, blocks):
        widths = [max(len(row[i]) for row in block) for i in range(len(block[0]))]
        lines.append("")
        lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in block]
    lines += ["", *(f"not measured: {name}: {why}" for name, why in result["missing"].items())]
    return "\n".join([*lines, f"Protocol: {protocol_line(result['protocol'])}"])


def protocol_line(found: dict) -> str:
    """The protocol as one line. Raises nothing."""
    return "; ".join(f"{name.replace('_', ' ')}: {_plain(value)}" for name, value in found.items()) + "."


def _plain(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _block(figures: dict, rows: tuple[str, ...], columns: tuple[str, ...], result: dict) -> list[tuple[str, ...]]:
    """A row per metric that was measured, a column per contestant."""
    columns = tuple(column for column in columns if column != "train" or "train" not in result["missing"])
    measured = [row for row in rows if any(f"{row}_{column}" in figures for column in columns)]
    if not measured:
        return []
    about = {name: result["protocol"].get(name) for name in ("samples", "given")}
    head = ("", *(HEADS[column].format(**about) for column in columns))
    return [head] + [(ROWS[row], *(_cell(figures.get(f"{row}_{column}")) for column in columns)) for row in measured]


def _bits(figures: dict) -> list[tuple[str, ...]]:
    if "top_bits" not in figures:
        return []
    rows = [(f"bits per {level} code", *(_cell(figures[f"{level}_{name}"]) for name in BITS))
            for level in ("top", "bottom")]
    return [("", *BITS_HEADS), *rows]


def _others(figures: dict) -> list[tuple[str, ...]]:
    """What stands alone."""
    labels = {
        "psnr_rebuilt": "reconstruction, all frames, PSNR of all pixels",
        "psnr_rebuilt_per_clip": "reconstruction, all frames, mean PSNR of a window",
        "psnr_wins": "best sample above the repeated frame, by PSNR",
        "ssim_wins": "the same by SSIM", "lpips_wins": "the same by LPIPS",
        "top_used": "top codes in use", "top_perplexity": "top codes, perplexity",
        "bottom_used": "bottom codes in use", "bottom_perplexity": "bottom codes, perplexity",
        "code_bits_per_dim": "all predicted codes, over the values of the predicted frames",
    }  # fmt: skip
    return [(label, f"{_cell(figures[name])} {figures[name]['unit']}") for name, label in labels.items()
            if name in figures]


def _cell(figure: dict | None) -> str:
    if figure is None:
        return "-"
    interval = "" if figure["low"] is None else f" [{figure['low']:.4g}, {figure['high']:.4g}]"
    return f"{figure['value']:.4g}{interval}"
