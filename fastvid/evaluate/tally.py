"""What each window contributes: the model's futures and the baselines' beside them, under every metric."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastvid.errors import UsageError, WeightsError
from fastvid.evaluate.extract import Extractor
from fastvid.evaluate.generator import futures_beside
from fastvid.evaluate.windows import ENCODED_AT_ONCE, Held, encode, joined, marginal_codes, window_of
from fastvid.metrics import LPIPS, best_of, bits_per_code, psnr, ssim
from fastvid.models import VideoPredictor
from fastvid.models.predictor import ROWS_AT_ONCE
from fastvid.train.latents import Latents, as_model_input
from fastvid.train.ranks import Ranks
from fastvid.train.tasks import as_frames, bottom_inputs
from fastvid.weights import Weights, load_weights

METRICS = ("psnr", "ssim", "lpips", "fvd", "bits")
NEEDS = {"lpips": "lpips_alex", "fvd": "i3d"}  # weights that a metric cannot do without
HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "lpips": False}
BASELINES = ("repeat", "marginal", "reconstruction")
EQUAL = 100.0  # dB that equal frames count as, since infinity has no mean
SHOWN = 4  # windows on the sheet
NUMBERS = 1 << 16  # of samples that each window has to itself
LEAST_FRAMES, LEAST_SIDE = {"fvd": 9}, {"ssim": 11, "lpips": 31}  # what a metric can do with


@dataclass
class Judges:
    """The metrics that are measured, with what they need. missing: by metric, why it is not measured."""

    metrics: tuple[str, ...]
    frames: dict[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)
    extractor: Extractor | None = None
    weights: dict[str, Weights] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def samples(self) -> bool:
        """Whether anything needs predictions."""
        return bool(self.frames or self.extractor)


@dataclass
class Tally:
    """Of all windows: numbers by name, [n, ...] float64; codes, where the model has any; rows for the sheet."""

    values: dict[str, Tensor]
    codes: Latents | None
    rows: list[Tensor]


@dataclass
class _Part:
    """The same of a few windows."""

    values: dict[str, Tensor] = field(default_factory=dict)
    codes: Latents | None = None
    rows: list[Tensor] = field(default_factory=list)


def judges(metrics: tuple[str, ...] | None, extractor: str, resize: str, cache: Path | None) -> Judges:
    """The metrics asked for; None takes all whose weights are there and notes the others.

    extractor: kind of I3D weights. resize: "tf1" or "torch". cache: of features, or None.
    Raises:    UsageError for an unknown metric, WeightsError for weights that were asked for and are not there.
    """
    check_metrics(metrics)
    found = Judges(tuple(metrics or METRICS))
    for name, kind in (NEEDS | {"fvd": extractor}).items():
        if name in found.metrics:
            try:
                found.weights[name] = load_weights(kind)
            except WeightsError as error:
                if metrics:
                    raise
                found.missing[name] = str(error)
    found.metrics = tuple(name for name in found.metrics if name not in found.missing)
    perceptual = LPIPS.from_tensors("alex", found.weights["lpips"].tensors) if "lpips" in found.weights else None
    known = {"psnr": lambda a, b: psnr(a, b).clamp(max=EQUAL), "ssim": ssim, "lpips": perceptual}
    found.frames = {name: known[name] for name in HIGHER_IS_BETTER if name in found.metrics}
    if "fvd" in found.metrics:
        found.extractor = Extractor(found.weights["fvd"], resize, cache)
    return found


def check_metrics(metrics: tuple[str, ...] | None) -> None:
    """Raises UsageError for an unknown metric, or none."""
    if metrics == () or any(name not in METRICS for name in metrics or ()):
        raise UsageError(f"--metrics must name some of {','.join(METRICS)}, got {','.join(metrics) or 'none'}.")


def leave_out(
    judged: Judges, asked: bool, windows: int, frames: int, size: tuple[int, int], codes: bool = True
) -> None:
    """Take away the metrics that cannot judge such windows, and note why.

    asked:  whether they were asked for by name. codes: whether the model draws any.
    Raises: UsageError if one was.
    """
    reasons = {} if codes or "bits" not in judged.metrics else {"bits": "the model draws no codes"}
    for name in judged.metrics:
        if frames < LEAST_FRAMES.get(name, 0):
            reasons[name] = f"it needs windows of {LEAST_FRAMES[name]} frames, the model's have {frames}"
        if min(size) < LEAST_SIDE.get(name, 0):
            reasons[name] = f"it needs frames of {LEAST_SIDE[name]} pixels a side, the model's are {size[1]}x{size[0]}"
        if name == "fvd" and windows < 2:
            reasons[name] = "a distance between sets needs two windows"
    for name, why in reasons.items():
        if asked:
            raise UsageError(f"--metrics {name}: {why}; leave it out.")
        judged.missing[name] = why
        judged.frames.pop(name, None)
    judged.metrics = tuple(name for name in judged.metrics if name not in reasons)
    judged.extractor = judged.extractor if "fvd" in judged.metrics else None


@torch.no_grad()
def measure(
    predictor: nn.Module, held: Held, fit: Latents | None, judged: Judges, samples: int, seed: int, ranks: Ranks
) -> Tally:
    """Measure all windows; the processes of `ranks` share them, and every one returns the whole.

    predictor: a VideoPredictor with the codes `fit` for its baselines, or a DVDGANPredictor with None.
    """
    at_once = max(1, ROWS_AT_ONCE // samples) if judged.samples else ENCODED_AT_ONCE
    count = len(held.places)
    shown = {round(i * (count - 1) / (SHOWN - 1)) for i in range(SHOWN)}
    mine: dict[int, _Part] = {}
    quiet = not (ranks.leads and sys.stderr.isatty())
    with tqdm(total=count, unit="window", desc="measuring", disable=quiet) as bar:
        for number, first in enumerate(range(0, count, at_once)):
            last = min(count, first + at_once)
            if number % ranks.world == ranks.rank:
                here = sorted(i - first for i in shown if first <= i < last)
                mine[number] = _part(predictor, held.clips(first, last), first, fit, judged, samples, seed, here)
            bar.update(last - first)
    everyone = {number: part for share in ranks.gather(mine) for number, part in share.items()}
    parts = [everyone[number] for number in range(-(-count // at_once))]
    values = {name: torch.cat([part.values[name] for part in parts]).double() for name in parts[0].values}
    codes = None if fit is None else joined([part.codes for part in parts])
    return Tally(values, codes, [row for part in parts for row in part.rows])


def _part(
    predictor: nn.Module, clips: Tensor, first: int, fit: Latents | None, judged: Judges, samples: int, seed: int,
    shown: list[int],
) -> _Part:
    """clips uint8 [B, T, H, W, 3], windows number `first` and following."""
    video, given = as_model_input(clips), window_of(predictor).given  # [B, 3, T, H, W]
    part, others = _Part(), {"repeat": video[:, :, given - 1 : given].expand_as(video)}
    if fit is not None:
        part.codes = encode(predictor, video)
        rebuilt = predictor.vqvae.decode(part.codes.top, part.codes.bottom)
        part.values["error"] = (rebuilt - video).double().square().mean(dim=(1, 2, 3, 4))
    if "bits" in judged.metrics:
        part.values |= _bits(predictor, part.codes)
    if not judged.samples:
        return part
    if fit is not None:
        marginal = predictor.vqvae.decode(*marginal_codes(fit, part.codes, first, seed))
        others |= {"marginal": marginal, "reconstruction": rebuilt}
    else:
        others |= futures_beside(predictor, video, first, seed)
    # noise of its own for every window: clips that shared it would be alike, which distances of sets would see
    numbers = [range(window * NUMBERS, window * NUMBERS + samples) for window in range(first, first + len(clips))]
    start, n = video[:, :, :given].transpose(1, 2), video.shape[2] - given
    exact = {} if fit is None else {"weights": "float32"}
    futures = {"model": predictor.predict(start, n, numbers, seed, **exact)}  # each [B, S, n, 3, H, W]
    futures |= {who: _future(other, given) for who, other in others.items()}
    part.values |= _likeness(_future(video, given), futures, judged)
    if judged.extractor:
        part.values |= _features(clips, futures, judged.extractor)
    for i in shown:  # rows truth, sample 1, sample 2
        made = as_frames(futures["model"][i, :2].transpose(1, 2))
        part.rows += [clips[i], *(torch.cat([clips[i, :given], sample]) for sample in made)]
    return part


def _future(video: Tensor, given: int) -> Tensor:
    """[B, 3, T, H, W] -> [B, 1, n, 3, H, W]."""
    return video[:, :, given:].transpose(1, 2).unsqueeze(1)


def _likeness(truth: Tensor, futures: dict[str, Tensor], judged: Judges) -> dict[str, Tensor]:
    """Frame by frame. truth [B, 1, n, 3, H, W]; each figure [B], the best sample's curves [B, n]."""
    values = {}
    for name, measured in judged.frames.items():
        of = {who: measured(future, truth.expand_as(future)) for who, future in futures.items()}  # each [B, S, n]
        best = best_of(of["model"], higher_is_better=HIGHER_IS_BETTER[name])
        values |= {f"{name}_{who}": of[who].mean(dim=(1, 2)) for who in of if who != "model"}
        values |= {f"{name}_best": best.value, f"{name}_mean": best.mean, f"{name}_curve": best.curve}
        ahead = best.value - values[f"{name}_repeat"]
        values[f"{name}_wins"] = 100.0 * (ahead > 0 if HIGHER_IS_BETTER[name] else ahead < 0)
    return values


def _features(clips: Tensor, futures: dict[str, Tensor], extractor: Extractor) -> dict[str, Tensor]:
    """Of the real windows, and of the given frames followed by each contestant's first future."""
    made = {who: as_frames(future[:, 0].transpose(1, 2)) for who, future in futures.items()}
    given = clips.shape[1] - made["model"].shape[1]
    shown = {"real": clips} | {who: torch.cat([clips[:, :given], future], dim=1) for who, future in made.items()}
    found = {who: extractor(clip) for who, clip in shown.items()}
    values = {f"pooled_{who}": features.pooled for who, features in found.items()}
    return values | {f"logits_{who}": features.logits for who, features in found.items()}


def _bits(predictor: VideoPredictor, codes: Latents) -> dict[str, Tensor]:
    """Bits per code of both levels, [B]."""
    target = codes.top[:, codes.given_top.shape[1] :]
    top = bits_per_code(predictor.top(target, codes.given_top, codes.given_bottom), target)
    per_slice = []
    for n in range(codes.given_bottom.shape[1], codes.bottom.shape[1]):
        index = torch.full((len(codes.bottom),), n)
        target, above, window = bottom_inputs(codes, index, predictor.bottom.config.window)
        per_slice.append(bits_per_code(predictor.bottom(target, index, above, window), target))
    return {"bits_top": top, "bits_bottom": torch.stack(per_slice).mean(dim=0)}
