"""From what every window contributed to the figures, each with the number of windows and its interval."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvid.evaluate.tally import BASELINES, EQUAL, Judges, Tally
from fastvid.evaluate.windows import levels
from fastvid.metrics import bits_per_dim, bootstrap_interval, code_perplexity, context_free_bits, copy_bits
from fastvid.metrics.frechet import bootstrap_frechet, frechet_from_features
from fastvid.metrics.inception import inception_score
from fastvid.train.latents import Latents

LEAST_CLIPS = 10  # fewer drawn again say nothing of how much clips differ
UNITS = {"psnr": "dB", "ssim": "", "lpips": ""}


@dataclass
class Figure:
    """A value in `unit` over n windows, with its 95% interval where it has one."""

    value: float
    unit: str
    n: int
    low: float | None = None
    high: float | None = None


class Figures:
    """Makes figures of values over windows; clips are what its bootstrap draws again.

    groups: [n] int64, the clip of each window. seed: of the bootstrap.
    """

    def __init__(self, groups: Tensor, seed: int):
        self.groups, self.seed = groups, seed
        self.several = len(groups.unique()) >= LEAST_CLIPS

    def mean(self, of: Tensor, unit: str, statistic: Callable[[Tensor], Tensor] | None = None) -> Figure:
        """Of the mean over windows of [n] or [n, F], or of a statistic of that mean."""
        mean = of.double().reshape(len(of), -1).mean(dim=0, keepdim=True)
        value = float(mean if statistic is None else statistic(mean))
        interval = bootstrap_interval(of, self.groups, statistic, self.seed) if self.several else ()
        return Figure(value, unit, len(of), *interval)

    def distance(self, reference: Tensor, other: Tensor, groups: Tensor | None = None) -> Figure:
        """The Fréchet distance of two sets of features [n, F] of the same windows, or of others, of clips `groups`."""
        value = frechet_from_features(reference, other)
        own, interval = self.groups if groups is None else groups, ()
        if self.several and len(own.unique()) >= LEAST_CLIPS:
            paired = groups is None
            interval = bootstrap_frechet(reference, other, self.groups, own, paired=paired, seed=self.seed)
        return Figure(value, "", len(other), *interval)

    def score(self, logits: Tensor) -> Figure:
        """The inception score of a set of logits [n, classes], without an interval."""
        value, _ = inception_score(logits.softmax(dim=1))
        return Figure(value, "", len(logits))


def figures(
    tally: Tally, fit: Latents | None, groups: Tensor, K: int, pixels: int, judged: Judges, seed: int
) -> dict[str, Figure]:
    """Every figure by name.

    fit: codes that the baselines of bits are fitted to, where the model has codes. K: codes of a level. pixels: values
    a predicted window has.
    """
    make, values = Figures(groups, seed), tally.values
    found: dict[str, Figure] = {}
    baselines = BASELINES if fit is not None else ("repeat", "untrained", "noise")
    if "psnr" in judged.metrics and fit is not None:
        error = values["error"]
        pooled = make.mean(error, "dB", lambda mean: _decibel(mean.squeeze(1)))
        found |= {"psnr_rebuilt": pooled, "psnr_rebuilt_per_clip": make.mean(_decibel(error), "dB")}
    for name in judged.frames:
        for who in ("best", "mean", *baselines):
            found[f"{name}_{who}"] = make.mean(values[f"{name}_{who}"], UNITS[name])
        found[f"{name}_wins"] = make.mean(values[f"{name}_wins"], "% of windows")
    if judged.extractor:
        found |= _distances(make, values, fvd_name(judged), ("model", *baselines))
    if "bits" in judged.metrics:
        found |= _bits(make, values, tally.codes, fit, K, pixels)
    return found


def fvd_name(judged: Judges) -> str:
    """What the distance may be called: "fvd" with the network that the literature uses, and with no other."""
    return "fvd" if judged.weights["fvd"].kind == "i3d" else "frechet_other"


def curves(tally: Tally, judged: Judges) -> dict[str, list[float]]:
    """Mean over windows of the best sample's values, frame by frame."""
    return {name: tally.values[f"{name}_curve"].mean(dim=0).tolist() for name in judged.frames}


def _distances(make: Figures, values: dict[str, Tensor], name: str, contestants: tuple[str, ...]) -> dict[str, Figure]:
    found = {}
    for who in contestants:
        found[f"{name}_{who}"] = make.distance(values["logits_real"], values[f"logits_{who}"])
    if "reconstruction" in contestants:
        for who in contestants[:-1]:
            found[f"{name}_star_{who}"] = make.distance(values["logits_reconstruction"], values[f"logits_{who}"])
    if name == "fvd":
        for who in contestants:
            found[f"fid_i3d400_{who}"] = make.distance(values["pooled_real"], values[f"pooled_{who}"])
        for who in (*contestants, "real"):
            found[f"is_i3d400_{who}"] = make.score(values[f"logits_{who}"])
    return found


def generated_figures(
    values: dict[str, Tensor], groups: dict[str, Tensor], judged: Judges, seed: int
) -> dict[str, Figure]:
    """Of a generator: distances of every set to the real one, and inception scores, by name.

    values: pooled_<set> [n, 1024] and logits_<set> [n, 400]. groups: of each set [n], the clip of each row.
    """
    make, name, found = Figures(groups["real"], seed), fvd_name(judged), {}
    kinds = {name: "logits"} | ({"fid_i3d400": "pooled"} if name == "fvd" else {})
    for metric, features in kinds.items():
        for who, clips in groups.items():
            if who != "real":
                real, other = values[f"{features}_real"], values[f"{features}_{who}"]
                found[f"{metric}_{who}"] = make.distance(real, other, clips)
    if name == "fvd":
        found |= {f"is_i3d400_{who}": make.score(values[f"logits_{who}"]) for who in groups}
    return found


def _bits(make: Figures, values: dict, codes: Latents, fit: Latents, K: int, pixels: int) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    fitted, per_dim = levels(fit), torch.zeros(len(make.groups), dtype=torch.float64)
    for level, (future, previous) in levels(codes).items():
        n, (train, train_previous), unit = len(future), fitted[level], "bits per code"
        perplexity, used = code_perplexity(future, K)
        found[f"{level}_perplexity"] = Figure(perplexity, f"of {K}", n)
        found[f"{level}_used"] = Figure(used, f"of {K}", n)
        found[f"{level}_bits"] = make.mean(values[f"bits_{level}"], unit)
        per_dim += bits_per_dim(values[f"bits_{level}"], future[0].numel(), pixels)
        copied = [copy_bits(train, train_previous, future[i], previous[i], K) for i in range(n)]
        found[f"{level}_copy_bits"] = make.mean(_column(c.bits for c in copied), unit)
        found[f"{level}_copy_error"] = Figure(copied[0].error_rate, "", n)
        free = _column(context_free_bits(train, future[i], K).fitted for i in range(n))
        found[f"{level}_context_free_fitted_bits"] = make.mean(free, unit)
        shares = torch.stack([torch.bincount(window.flatten(), minlength=K) for window in future]).double()
        # without an interval: clips drawn again hold fewer kinds of codes, so that their entropy is always lower
        oracle = _entropy(shares.sum(dim=0, keepdim=True) / future.numel())
        found[f"{level}_context_free_oracle_bits"] = Figure(float(oracle), unit, n)
    found["code_bits_per_dim"] = make.mean(per_dim, "bits per pixel value")
    return found


def _column(numbers) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.float64)


def _entropy(shares: Tensor) -> Tensor:
    """[R, K] -> [R] bits."""
    return torch.special.entr(shares).sum(dim=1) / math.log(2)


def _decibel(error: Tensor) -> Tensor:
    return (-10 * torch.log10(error)).clamp(max=EQUAL)
