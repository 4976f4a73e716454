"""Commands that use a model: predict, sample and evaluate."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Predict:
    """Predict the next frames of clips: a video per sample, a contact sheet and a report."""

    clips: Annotated[Positional[tuple[Path, ...]], arg(metavar="CLIP...")]
    """Video files, or folders of them."""
    model: str = "dino64"
    """A model of `fastvid models`, or a model folder."""
    frames: int = 12
    """Frames to predict; beyond what it predicts at once the model goes on over its own output, in memory that does
    not grow."""
    samples: int = 1
    """Different futures per clip."""
    seed: int = 0
    """The same seed gives the same frames."""
    temperature: float = 1.0
    """1 draws what the model believes, less is tamer; where no codes are drawn, it scales the noise."""
    start: int | None = None
    """The first of the given frames (four, unless the model takes others), counted from 0; the clip's own next frames
    then stand beside the predicted ones. By default the last frames are given."""
    out: Annotated[Path, arg(aliases=["-o"])] = Path("predictions")
    """Folder for CLIP_sample0.mp4, CLIP_contact.png, CLIP.json."""
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """How the priors' weights are stored while they draw: bfloat16 and int8 are smaller and draw from a slightly
    different model; how different is printed. auto is float32 for small models, bfloat16 for large ones."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to predict; drawing codes on a GPU has not been verified yet."""

    def run(self) -> None:
        """Predict and write. Raises FastvidError."""
        from fastvid.predict import predict_clips

        predict_clips(
            self.clips, self.model, self.frames, self.samples, self.seed, self.temperature, self.out, self.start,
            weights=self.weights, device=self.device,
        )  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """Make clips from nothing with a generator: a video each, a contact sheet and a report."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A generator of `fastvid models`, a model folder, or the run folder of a training."""
    classes: tuple[str, ...] = ()
    """Classes to make, by name or number from 0; by default all in turn."""
    clips: Annotated[int | None, arg(aliases=["-n"])] = None
    """Clips of each class, or in all where no class is named; by default 16. With --interpolate: lines of 8 clips, by
    default 1."""
    truncation: float = 1.0
    """How far from the middle noise may lie: below 1 clips are surer and less varied. It scales the noise."""
    truncated_normal: bool = False
    """Draw from a normal distribution without its tails beyond the truncation, in place of scaling."""
    interpolate: Annotated[str | None, arg(metavar="A:B|z")] = None
    """8 clips on a line between two classes A and B, or, z, between two noises."""
    seed: int = 0
    """The same seed gives the same clips."""
    fps: float = 12.0
    """Frames a second of the videos."""
    out: Annotated[Path, arg(aliases=["-o"])] = Path("samples")
    """Folder for the videos, samples_contact.png and samples.json."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to generate."""

    def run(self) -> None:
        """Generate and write. Raises FastvidError."""
        from fastvid.sample import sample_clips

        clips = (16 if self.interpolate is None else 1) if self.clips is None else self.clips
        kind = "truncated" if self.truncated_normal else "scaled"
        sample_clips(
            self.model, self.classes, clips, self.seed, self.truncation, kind, self.interpolate, self.out, self.fps,
            device=self.device,
        )  # fmt: skip


@dataclass(frozen=True)
class Evaluate:
    """Measure a model on held-out clips, with baselines beside it: PSNR, SSIM, LPIPS, FVD and FVD*, bits per code; of
    a generator FVD, FID and IS of as many generated clips."""

    data: str
    """Clips: a folder (its test/ where it has one), a published data set (path?key=value), or a generator: digits,
    push, dino."""
    model: str = "dino64"
    """A model of `fastvid models`, or a model folder."""
    clips: int = 256
    """Windows to measure, one per clip where there are enough clips."""
    samples: int = 10
    """Predictions per window; the best one counts."""
    seed: int = 0
    """Decides windows, predictions and intervals."""
    metrics: str | None = None
    """Which to measure of psnr,ssim,lpips,fvd,bits; bits alone needs no sampling. By default all whose weights are
    there (fastvid weights list). Of a generator: fvd, with fid_i3d400 and is_i3d400."""
    json: Path | None = None
    """File for the figures."""
    sheet: Path | None = None
    """PNG file with some predictions: truth, sample 1, sample 2; of a generator: real, generated."""
    extractor: Literal["i3d", "i3d_other"] = "i3d"
    """Weights of the network behind distances; with any but i3d the distance is not called FVD."""
    resize: Literal["tf1", "torch"] = "tf1"
    """How clips become 224x224: as the reference implementation of FVD, or as later ports."""
    cache: Path | None = None
    """Folder for the clips' features, which a second run then need not compute; by default in the user's cache."""

    frame_step: int = 1
    """Keep every n-th frame of the clips, as the model was trained."""
    truncation: float = 1.0
    """Of a generator's noise, which it scales."""

    def run(self) -> None:
        """Measure, print a table, write what was asked for. Raises FastvidError."""
        from fastvid.evaluate import evaluate, table

        result = evaluate(
            self.model, self.data, self.clips, self.samples, self.seed,
            None if self.metrics is None else tuple(self.metrics.split(",")), self.json, self.sheet,
            self.extractor, self.resize, self.cache or "default", self.frame_step,
            self.truncation,
        )  # fmt: skip
        if int(os.environ.get("RANK", "0")) == 0:
            print(table(result))
