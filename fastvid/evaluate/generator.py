"""A generator's clips against held-out ones, with an untrained generator, random pixels and training clips beside."""

import hashlib
import sys
from collections import Counter
from dataclasses import asdict
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastvid.data.clips import ClipWindows
from fastvid.errors import DataError, UsageError
from fastvid.evaluate.extract import Extractor
from fastvid.evaluate.windows import Held, choose_windows, decodable, opened, same_clips, undivided, window_of
from fastvid.models import DVDGANConfig, build
from fastvid.train.ranks import Ranks

AT_ONCE = 8  # clips of each set between two reports of progress
SHOWN = 8  # pairs of a real clip and a generated one on the sheet


class Sets(NamedTuple):
    """What is compared: held-out windows with their classes, and as many training windows of the same classes.

    labels: the class of each held-out window, or None where the model has no classes. trained: None where the data have
    no split of their own for training; `why` then says so.
    """

    held: Held
    labels: list[int] | None
    trained: Held | None
    why: str


def choose_sets(generator: nn.Module, data: str, clips: int, seed: int, frame_step: int) -> Sets:
    """The windows to compare a generator with. Raises DataError where the data have none, or no such classes."""
    config, window = generator.config, window_of(generator)
    windows = opened(window, data, "test", frame_step)
    lengths = _lengths_of(windows, config.class_names if config.classes else None)
    places, how = choose_windows(lengths, windows.span, clips, seed)
    held = Held(windows, decodable(windows, places), how)
    words = [windows.clips.labels[clip] for clip, _ in held.places] if config.classes else None
    trained, why = _trained(generator, data, held, words, seed)
    return Sets(held, words and [config.class_names.index(word) for word in words], trained, why)


def _lengths_of(windows: ClipWindows, classes: tuple[str, ...] | None) -> list[int]:
    """Lengths of the clips, 0 of those that are of no such class."""
    labels, lengths = windows.clips.labels, windows.clips.lengths
    if classes is None:
        return lengths
    if not classes:
        raise UsageError("evaluate: the model does not name its classes, so no clip of the data can be of them.")
    if labels is None:
        raise DataError("evaluate: the model draws classes, which these data do not have; give data with classes.")
    if not set(classes) & set(labels):
        raise DataError(f"evaluate: no clip is of the model's classes, {', '.join(classes)[:200]}; give its own data.")
    return [length if label in classes else 0 for label, length in zip(labels, lengths, strict=True)]


def _trained(
    generator: nn.Module, data: str, held: Held, words: list[str] | None, seed: int
) -> tuple[Held | None, str]:
    """Windows of the train split, as many of each class as were held out."""
    try:
        windows = opened(window_of(generator), undivided(data), "train", held.windows.frame_step)
    except DataError as error:
        return None, f"no train split: {error}"
    if same_clips(windows.clips, held.windows.clips):
        return None, "the data have no train split of their own"
    places = []
    try:
        for word, count in Counter(words or [None] * len(held.places)).items():
            lengths = _lengths_of(windows, None if word is None else (word,))
            places += choose_windows(lengths, windows.span, count, seed)[0]
    except DataError as error:
        return None, f"no training clips of the same classes: {error}"
    return Held(windows, decodable(windows, sorted(places)), held.how), ""


@torch.no_grad()
def compare(
    generator: nn.Module, sets: Sets, extractor: Extractor, seed: int, truncation: float, ranks: Ranks
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
    """Features of every set; the processes of `ranks` share the work, and every one returns the whole.

    Returns: pooled_<set> [n, 1024] and logits_<set> [n, 400]; of each set [n] the clip of each row; rows for the sheet.
    """
    count = max(len(sets.held.places), len(sets.trained.places) if sets.trained else 0)
    untrained = _untrained(generator.config, seed)
    mine, quiet = {}, not (ranks.leads and sys.stderr.isatty())
    with tqdm(total=count, unit="clip", desc="measuring", disable=quiet) as bar:
        for number, first in enumerate(range(0, count, AT_ONCE)):
            if number % ranks.world == ranks.rank:
                clips = _clips(generator, untrained, sets, first, seed, truncation)
                rows = [row for pair in zip(clips["real"], clips["model"], strict=True) for row in pair]
                shown = rows[: max(0, 2 * (SHOWN - first))]
                mine[number] = ({who: extractor(made) for who, made in clips.items() if len(made)}, shown)
            bar.update(min(AT_ONCE, count - first))
    everyone = {number: part for share in ranks.gather(mine) for number, part in share.items()}
    parts = [everyone[number] for number in range(-(-count // AT_ONCE))]
    values, groups = {}, {}
    for who in parts[0][0]:
        found = [features[who] for features, _ in parts if who in features]
        values[f"pooled_{who}"] = torch.cat([features.pooled for features in found]).double()
        values[f"logits_{who}"] = torch.cat([features.logits for features in found]).double()
        groups[who] = torch.arange(sum(len(features.pooled) for features in found))
    groups["real"] = sets.held.groups()
    if sets.trained:
        groups["train"] = sets.trained.groups()
    return values, groups, [row for _, shown in parts for row in shown]


def _clips(
    generator: nn.Module, untrained: nn.Module, sets: Sets, first: int, seed: int, truncation: float
) -> dict[str, Tensor]:
    """Clips number `first` and following of every set that has any, uint8 [B, T, H, W, 3]."""
    last = first + AT_ONCE
    numbers = range(first, min(last, len(sets.held.places)))
    labels = None if sets.labels is None else sets.labels[first:last]
    clips = {}
    if numbers:
        clips["real"] = sets.held.clips(first, last)
        for who, model in (("model", generator), ("untrained", untrained)):
            made = model.sample(len(numbers), labels, seed, truncation, numbers=numbers)
            clips[who] = made.mul(255).round().to(torch.uint8).movedim(2, -1).cpu()
        clips["noise"] = torch.stack([_noise(clips["real"].shape[1:], seed, number) for number in numbers])
    if sets.trained and first < len(sets.trained.places):
        clips["train"] = sets.trained.clips(first, last)
    return clips


def futures_beside(predictor: nn.Module, video: Tensor, first: int, seed: int) -> dict[str, Tensor]:
    """What stands beside a frame predictor: an untrained one's prediction of each window, and random pixels.

    video:   [B, 3, T, H, W] in [0, 1], windows number `first` and following; its first frames are given.
    Returns: "untrained" and "noise", each like `video`.
    """
    given, numbers = predictor.config.given, range(first, first + len(video))
    start, n = video[:, :, :given].transpose(1, 2), video.shape[2] - given
    made = _untrained(predictor.config, seed).predict(start, n, [range(i, i + 1) for i in numbers], seed)[:, 0]
    noise = torch.stack([_noise(video.shape[1:], seed, number) for number in numbers]).float().div(255)
    return {"untrained": torch.cat([video[:, :, :given], made.transpose(1, 2)], dim=2), "noise": noise}


@lru_cache(maxsize=1)
def _untrained(config: DVDGANConfig, seed: int) -> nn.Module:
    """A generator as it was before its first step, from weights of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_key("untrained", seed))
        return build("dvdgan", asdict(config)).eval()


def _noise(shape: torch.Size, seed: int, number: int) -> Tensor:
    draw = torch.Generator().manual_seed(_key("noise", seed, number))
    return torch.randint(256, shape, generator=draw, dtype=torch.uint8)


def _key(*of: str | int) -> int:
    return int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:7], "little")
