"""`train_dvdgan`: a DVD-GAN on clips, of the classes that the data name; or, of an -fp preset, on windows to go on."""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from fastvid import models
from fastvid.data.clips import Clips, ClipWindows, natural_key, open_clips
from fastvid.errors import UsageError
from fastvid.models.dvd_config import START, DVDGANConfig
from fastvid.models.dvd_gan import SpatialDiscriminator, TemporalDiscriminator
from fastvid.nn import ConditionalBatchNorm
from fastvid.train.gan import DVDGANTask, Networks
from fastvid.train.loop import TrainResult, train
from fastvid.train.options import GANOptions
from fastvid.train.ranks import process_group
from fastvid.train.run import check_run
from fastvid.train.setup import clips_hash, device_of

RATES = {"v1": 2e-4, "v2": 5e-4}  # of the discriminators, in the paper's two versions
NOMINAL_FRAMES = 30  # of a generator's clips, where no longer ones are needed


def train_dvdgan(
    data: str, preset: str, out: str | Path, *, resume: bool = False, size: int | None = None,
    frames: int | None = None, frame_step: int = 1, classes: list[str] | None = None, device: str | None = None,
    **options,
) -> TrainResult:
    """Train a DVD-GAN; alone or in every process of a torchrun.

    data:    what `open_clips` takes. preset: a name of models.PRESETS["dvdgan"]. out: the run folder.
    size, frames: of the generated video; None takes the preset's. frame_step: keep every n-th frame of the clips.
    classes: which of the data's classes to train on, by name; None takes all. A preset that goes on from given frames
             takes none. Data without classes are trained on without.
    device:  None takes the GPU where there is one.
    options: fields of GANOptions.
    Returns: TrainResult; its `model` is a model folder with the averaged generator.
    Raises:  UsageError, DataError, CheckpointError; SystemExit(130) after Ctrl-C, with a checkpoint.
    """
    chosen = GANOptions(**options)
    check_run(Path(out), resume)
    config = _resized(models.preset("dvdgan", preset), size, frames)
    if chosen.discriminator_rate is None:
        chosen = replace(chosen, discriminator_rate=RATES[config.variant])
    with process_group() as ranks:
        clips, config, numbers = _classed(_open(data, config, frame_step), config, classes)
        windows = ClipWindows(clips, config.shown, (config.size, config.size), chosen.seed, frame_step=frame_step)
        if ranks.leads:
            print(_describe(windows, config), file=sys.stderr)
        networks = _networks(config, chosen.seed, device, sync=ranks.world > 1)
        about = {"clips": clips_hash(clips), "frame_step": frame_step}
        return train(DVDGANTask(networks, windows, chosen, about, numbers), chosen, out, resume)


def _resized(config: DVDGANConfig, size: int | None, frames: int | None) -> DVDGANConfig:
    frames = config.frames if frames is None else frames
    looked_at = max(1, min(config.spatial_frames, config.given + frames))
    config, size = replace(config, frames=frames, spatial_frames=looked_at), config.size if size is None else size
    # a smaller size does without the last resolutions; for a larger one the preset has no widths, which it then says
    levels = max(1, (size // START).bit_length() - 1)
    return replace(config, size=size, groups=config.groups[:levels], discriminator=config.discriminator[:levels])


def _open(data: str, config: DVDGANConfig, frame_step: int) -> Clips:
    span = (config.shown - 1) * max(1, frame_step) + 1
    return open_clips(data, split="train", frames=max(NOMINAL_FRAMES, span), size=(config.size, config.size))


def _classed(
    clips: Clips, config: DVDGANConfig, wanted: list[str] | None
) -> tuple[Clips, DVDGANConfig, Tensor | None]:
    """The clips of the wanted classes, the config that knows these, and the class of each of the clips by number."""
    if config.given and wanted is not None:
        raise UsageError("--classes: a model that goes on from frames has no classes; leave it out.")
    if wanted is None and (clips.labels is None or config.given):
        return clips, replace(config, classes=0, class_names=()), None
    if clips.labels is None:
        raise UsageError("--classes: the data name no classes; leave it out.")
    known = sorted({label for label in clips.labels if label}, key=natural_key)
    names = known if wanted is None else sorted(set(map(str, wanted)), key=natural_key)
    strangers = [name for name in names if name not in known]
    if strangers or not names:
        lacking = f"the data have no class {', '.join(strangers)}" if strangers else "wanted at least one, got none"
        raise UsageError(f"--classes: {lacking}; there are: {', '.join(known)}.")
    number = {name: place for place, name in enumerate(names)}
    chosen = [i for i, label in enumerate(clips.labels) if label in number]
    clips = clips.only(chosen)
    config = replace(config, classes=len(names), class_names=tuple(names))
    return clips, config, torch.tensor([number[label] for label in clips.labels])


def _describe(windows: ClipWindows, config: DVDGANConfig) -> str:
    names = config.class_names
    listed = ", ".join(names[:20]) + ", ..." * (len(names) > 20)
    return f"{windows.describe()}\n{f'{len(names)} classes: {listed}' if names else 'without classes'}"


def _networks(config: DVDGANConfig, seed: int, device: str | None, sync: bool) -> Networks:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks = Networks(
            models.build("dvdgan", asdict(config)), SpatialDiscriminator(config), TemporalDiscriminator(config)
        )
    for module in networks.modules():
        if isinstance(module, ConditionalBatchNorm):
            module.sync = sync
    return networks.to(device_of(device))
