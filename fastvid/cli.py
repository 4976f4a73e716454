"""The command line. It is parsed before torch is imported, so that help and typing errors answer at once."""

import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, subcommand

from fastvid import __version__
from fastvid.errors import FastvidError

USAGE, INTERRUPTED = 2, 130  # exit codes


@dataclass(frozen=True)
class Predict:
    """Predict the next frames of clips: a video per sample, a contact sheet and a report."""

    clips: Annotated[Positional[tuple[Path, ...]], arg(metavar="CLIP...")]
    """Video files, or folders of them."""
    model: str = "dino64"
    """A model of `fastvid models`, or a model folder."""
    frames: int = 12
    """Frames to predict; beyond 12 the model goes on over its own output, in memory that does not grow."""
    samples: int = 1
    """Different futures per clip."""
    seed: int = 0
    """The same seed gives the same frames."""
    temperature: float = 1.0
    """1 draws what the model believes, less is tamer."""
    start: int | None = None
    """The first of the four given frames, counted from 0; the clip's own next frames then stand beside the predicted
    ones. By default the last four frames are given."""
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
class Evaluate:
    """Measure a model on held-out clips: reconstruction, bits per code, likeness of predictions."""

    data: str
    """A folder of clips (its test/ where it has one), or a generator: digits, push, dino."""
    model: str = "dino64"
    """A model of `fastvid models`, or a model folder."""
    clips: int = 256
    """Windows to measure, one per clip where there are enough clips."""
    samples: int = 10
    """Predictions per window; the best one counts."""
    seed: int = 0
    """Decides windows, predictions and intervals."""
    metrics: str = "psnr,ssim,bits"
    """Which to measure, joined by commas; bits alone needs no sampling."""
    json: Path | None = None
    """File for the figures."""
    sheet: Path | None = None
    """PNG file with some predictions: truth, sample 1, sample 2."""

    def run(self) -> None:
        """Measure, print a table, write what was asked for. Raises FastvidError."""
        from fastvid.evaluate import evaluate, table

        metrics = tuple(self.metrics.split(","))
        result = evaluate(
            self.model, self.data, self.clips, self.samples, self.seed, metrics, self.json, self.sheet
        )
        print(table(result))


# the names and defaults of fastvid.train.TrainOptions, which cannot be imported without torch
@dataclass(frozen=True)
class TrainSettings:
    """How long to train, and how."""

    steps: int = 100_000
    """Optimizer steps in all."""
    batch_size: int = 16
    """Clips per step, over all processes."""
    learning_rate: float = 3e-4
    warmup: int = 500
    """Steps over which the learning rate rises."""
    decay: Literal["cosine", "none"] = "cosine"
    """What the learning rate does after that."""
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Largest norm of the whole gradient."""
    ema_decay: float = 0.999
    """Averaging of the weights."""
    seed: int = 0
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    sample_every: int = 1000
    """Steps between sample sheets, 0 for none."""
    log_every: int = 50
    """Steps between rows of log.csv."""
    minutes: float | None = None
    """Stop, with a checkpoint, after this much time."""
    threads: int | None = None
    """CPU threads."""


@dataclass(frozen=True)
class TrainVQVAE:
    """The autoencoder, on 16-frame windows of clips."""

    data: str
    """A folder of clips (its train/ where it has one), or a generator: digits, push, dino."""
    out: Path
    """The run folder: log.csv, samples/, checkpoint/, model/."""
    preset: str = "dino64"
    """Sizes of the model: paper, dino64, push64, tiny; for priors also dino64-wavefront."""
    resume: bool = False
    """Go on from the run's checkpoint."""
    size: int | None = None
    """Height and width of the frames in pixels; by default the preset's."""
    device: str | None = None
    """By default the GPU, where there is one."""
    settings: OmitArgPrefixes[TrainSettings] = field(default_factory=TrainSettings)

    def run(self) -> None:
        """Train. Raises FastvidError."""
        from fastvid.train import train_vqvae

        _say_trained(train_vqvae(self.data, self.preset, self.out, **self._rest()))

    def _rest(self) -> dict:
        return {"resume": self.resume, "size": self.size, "device": self.device, **asdict(self.settings)}


@dataclass(frozen=True)
class _TrainPrior(TrainVQVAE):
    vqvae: Path = field(kw_only=True)
    """The run folder of the trained autoencoder."""
    every: int = 4
    """Frames between two windows of a clip."""

    def _rest(self) -> dict:
        return {**super()._rest(), "every": self.every}


@dataclass(frozen=True)
class TrainTop(_TrainPrior):
    """The prior over the coarse codes of a trained autoencoder."""

    def run(self) -> None:
        """Train. Raises FastvidError."""
        from fastvid.train import train_top

        _say_trained(train_top(self.data, self.vqvae, self.preset, self.out, **self._rest()))


@dataclass(frozen=True)
class TrainBottom(_TrainPrior):
    """The prior over the fine codes of a trained autoencoder."""

    def run(self) -> None:
        """Train. Raises FastvidError."""
        from fastvid.train import train_bottom

        _say_trained(train_bottom(self.data, self.vqvae, self.preset, self.out, **self._rest()))


@dataclass(frozen=True)
class Train:
    """Train the autoencoder, then the two priors on its codes."""

    model: Annotated[TrainVQVAE, subcommand("vqvae")] | Annotated[TrainTop, subcommand("top")] | Annotated[
        TrainBottom, subcommand("bottom")
    ]

    def run(self) -> None:
        """Train. Raises FastvidError."""
        self.model.run()


@dataclass(frozen=True)
class Assemble:
    """Put a trained autoencoder and its two priors together into one model folder, for predict and evaluate."""

    vqvae: Path
    """The run folder of `fastvid train vqvae`."""
    top: Path
    """The run folder of `fastvid train top`."""
    bottom: Path
    """The run folder of `fastvid train bottom`."""
    out: Annotated[Path, arg(aliases=["-o"])]
    """The model folder to write."""
    size: int = 64
    """Height and width, in pixels, of the frames that they were trained on."""
    half: bool = False
    """Store the weights in half precision, in half the space; they are rounded once."""

    def run(self) -> None:
        """Load the parts and write the folder. Raises FastvidError."""
        import torch

        from fastvid.models import assemble

        model = assemble(self.vqvae, self.top, self.bottom, (self.size, self.size))
        model.save(self.out, torch.float16 if self.half else torch.float32)
        print(f"assembled: {self.out}")


@dataclass(frozen=True)
class DataMake:
    """Write clips of a generator to OUT/SPLIT, without loss; whole files that are there already are kept."""

    kind: Positional[Literal["digits", "push", "dino"]]
    """The generator."""
    out: Path
    """Folder for the clips and dataset.json."""
    clips: int
    """How many."""
    frames: int = 30
    """Length of each."""
    split: Literal["train", "test"] = "train"
    """Which range of seeds; the splits share no clip."""
    first: int = 0
    """The first clip's place in the split."""
    workers: int = 1
    """Processes."""

    def run(self) -> None:
        """Make the clips. Raises FastvidError."""
        from fastvid.data.make import make_clips

        make_clips(self.kind, self.out, self.clips, self.frames, self.split, self.first, self.workers)


@dataclass(frozen=True)
class DataLook:
    """Say what is in a data set and draw a few of its clips."""

    path: Annotated[Positional[str], arg(metavar="PATH")]
    """A folder or file of clips, or a generator: digits, push, dino."""
    out: Annotated[Path, arg(aliases=["-o"])] = Path("look.png")
    """The picture."""

    def run(self) -> None:
        """Look. Raises FastvidError."""
        from fastvid.data.make import look

        look(self.path, self.out)


@dataclass(frozen=True)
class Data:
    """Make clips, or look at some."""

    action: Annotated[DataMake, subcommand("make")] | Annotated[DataLook, subcommand("look")]

    def run(self) -> None:
        """Make or look. Raises FastvidError."""
        self.action.run()


@dataclass(frozen=True)
class Models:
    """List the models that come with fastvid."""

    def run(self) -> None:
        """Print a name a line. Raises nothing."""
        from fastvid.models import list_models

        print("\n".join(list_models()) or "none")


@dataclass(frozen=True)
class Doctor:
    """Say what was found: versions, libraries, GPUs, and for every op which backend serves and why others do not."""

    def run(self) -> None:
        """Print the findings. Raises nothing."""
        from fastvid.doctor import findings

        print("\n".join(findings()))


@dataclass(frozen=True)
class Selftest:
    """Check on this machine that every backend of every op does its job; takes less than a minute."""

    def run(self) -> int:
        """Print a line per op and backend. Returns 1 if one fails. Raises nothing."""
        from fastvid.selftest import selftest

        return selftest()


Command = (
    Annotated[Predict, subcommand("predict")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Assemble, subcommand("assemble")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Models, subcommand("models")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Selftest, subcommand("selftest")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    arguments: what follows `fastvid`; None takes the process's own.
    Returns:   0, 1 if a self-test fails, 2 for an error that the user can mend (one line on stderr), 130 after Ctrl-C.
    Raises:    SystemExit for help and for arguments that do not parse (code 2); with FASTVID_TRACEBACK=1 the error
               itself.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"fastvid {__version__}")
        return 0
    try:
        command = tyro.cli(
            Command, prog="fastvid", args=arguments, description="Fast latent video models.",
            config=(OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        return command.run() or 0
    except FastvidError as error:
        if os.environ.get("FASTVID_TRACEBACK") == "1":
            raise
        print(f"fastvid: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        if os.environ.get("FASTVID_TRACEBACK") == "1":
            raise
        print("fastvid: interrupted.", file=sys.stderr)
        return INTERRUPTED


def _say_trained(result) -> None:
    state = "finished" if result.finished else "stopped in time; repeat the command with --resume to go on"
    print(f"{state} at step {result.step}: {result.model}")
