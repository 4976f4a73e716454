"""Commands that make a model: train and assemble."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, arg, subcommand


# the names and defaults of the options in fastvid.train, which cannot be imported without torch
@dataclass(frozen=True)
class _RunSettings:
    steps: int = 100_000
    """Optimizer steps in all."""
    batch_size: int = 16
    """Clips per step, over all processes."""
    warmup: int = 500
    """Steps over which the learning rate rises."""
    decay: Literal["cosine", "none"] = "cosine"
    """What the learning rate does after that."""
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
class TrainSettings(_RunSettings):
    """How long to train, and how."""

    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Largest norm of the whole gradient."""


@dataclass(frozen=True)
class GANSettings(_RunSettings):
    """How long to train, and how."""

    warmup: int = 0
    """Steps over which the learning rates rise."""
    decay: Literal["cosine", "none"] = "none"
    """What the learning rates do after that."""
    ema_decay: float = 0.9999
    """Averaging of the generator's weights."""
    ema_start: int = 20_000
    """The step from which they are averaged; before it they are copied."""
    generator_rate: float = 1e-4
    """The generator's learning rate."""
    discriminator_rate: float | None = None
    """The discriminators' learning rate; by default 5e-4, or 2e-4 for the first version's model (v1)."""
    discriminator_steps: int = 2
    """Turns of the discriminators before each of the generator."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in; losses and statistics stay float32."""
    checkpointing: bool = False
    """Recompute the generator's activations in place of keeping them: less memory, more time."""


@dataclass(frozen=True)
class TrainVQVAE:
    """The autoencoder, on 16-frame windows of clips."""

    data: str
    """Clips: a folder (its train/ where it has one), a published data set (path?key=value), or a generator: digits,
    push, dino."""
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
class TrainDecoder:
    """The decoder of a trained autoencoder, further; its codes and the priors on them stay."""

    data: str
    """Clips: a folder (its train/ where it has one), a published data set (path?key=value), or a generator: digits,
    push, dino."""
    vqvae: Path
    """The run folder of the trained autoencoder."""
    out: Path
    """The run folder: log.csv, samples/, checkpoint/, model/."""
    scene: bool = False
    """The camera is fixed: let the decoder learn what stands still."""
    perceptual: float = 0.0
    """How much LPIPS counts beside the absolute error: frames get sharper (and LPIPS flatters them)."""
    resume: bool = False
    """Go on from the run's checkpoint."""
    size: int | None = None
    """Height and width of the frames in pixels; by default those of the autoencoder's run."""
    device: str | None = None
    """By default the GPU, where there is one."""
    settings: OmitArgPrefixes[TrainSettings] = field(default_factory=TrainSettings)

    def run(self) -> None:
        """Train. Raises FastvidError."""
        from fastvid.train import train_decoder

        _say_trained(train_decoder(
            self.data, self.vqvae, self.out, scene=self.scene, perceptual=self.perceptual, resume=self.resume,
            size=self.size, device=self.device, **asdict(self.settings),
        ))  # fmt: skip


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
class TrainDVDGAN:
    """A generator of whole clips, against two discriminators; or, of an -fp preset, one that goes on from frames."""

    data: str
    """Clips: a folder (its train/ where it has one), a published data set (path?key=value), or a generator:
    digits?count=1, digits, push, dino. Where the data name classes, the model learns them."""
    out: Path
    """The run folder: log.csv, spectral_norms.csv, samples/, checkpoint/, model/."""
    preset: str = "digits32"
    """Sizes of the model: 64x12, 64x48, 128x12, 128x48, 256x12, 64-fp, 64-fp4 (the paper's), digits32, push32-fp, tiny,
    tiny-fp; each also with -v1 behind it, the paper's first version."""
    resume: bool = False
    """Go on from the run's checkpoint."""
    classes: tuple[str, ...] | None = None
    """Only these classes of the data, by name."""
    size: int | None = None
    """Height and width of the frames in pixels, 4 times a power of two, at most the preset's, which is the default."""
    frames: int | None = None
    """Frames that the model generates; by default the preset's."""
    frame_step: int = 1
    """Keep every n-th frame of the clips."""
    device: str | None = None
    """By default the GPU, where there is one."""
    settings: OmitArgPrefixes[GANSettings] = field(default_factory=GANSettings)

    def run(self) -> None:
        """Train. Raises FastvidError."""
        from fastvid.train import train_dvdgan

        _say_trained(train_dvdgan(
            self.data, self.preset, self.out, resume=self.resume, size=self.size, frames=self.frames,
            frame_step=self.frame_step, classes=None if self.classes is None else list(self.classes),
            device=self.device, **asdict(self.settings),
        ))  # fmt: skip


@dataclass(frozen=True)
class Train:
    """Train the autoencoder, then the two priors on its codes; or a GAN."""

    model: (
        Annotated[TrainVQVAE, subcommand("vqvae")]
        | Annotated[TrainDecoder, subcommand("decoder")]
        | Annotated[TrainTop, subcommand("top")]
        | Annotated[TrainBottom, subcommand("bottom")]
        | Annotated[TrainDVDGAN, subcommand("dvdgan")]
    )

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


def _say_trained(result) -> None:
    state = "finished" if result.finished else "stopped in time; repeat the command with --resume to go on"
    print(f"{state} at step {result.step}: {result.model}")
