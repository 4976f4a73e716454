"""Training: `train_vqvae`, then `train_top` and `train_bottom` on its codes; each leaves a run folder with a model.

`train_decoder` goes on with a VQ-VAE's decoder alone, which neither codes nor priors notice. `train_dvdgan` trains the
other kind of model, which has no codes.
"""

import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from fastvid import models
from fastvid.checkpoint import has_folder, manifest_hash, read_config
from fastvid.data.clips import ClipWindows, open_clips
from fastvid.errors import UsageError
from fastvid.metrics import LPIPS
from fastvid.train.dvdgan import train_dvdgan
from fastvid.train.gan import DVDGANTask
from fastvid.train.latents import Latents, encode_windows, load_latents
from fastvid.train.loop import TrainResult, train
from fastvid.train.options import GANOptions, TrainOptions
from fastvid.train.ranks import Ranks, process_group
from fastvid.train.run import Task, check_run
from fastvid.train.setup import clips_hash, device_of
from fastvid.train.tasks import BottomTask, DecoderTask, TopTask, VQVAETask
from fastvid.weights import load_weights

FRAMES = 16
# pixels, of each preset's square frames
SIZES = {"paper": 256, "dino64": 64, "dino64-wavefront": 64, "push64": 64, "tiny": 32}

__all__ = [
    "BottomTask", "DVDGANTask", "DecoderTask", "GANOptions", "Latents", "Task", "TopTask", "TrainOptions",
    "TrainResult", "VQVAETask", "encode_windows", "load_latents", "train", "train_bottom", "train_decoder",
    "train_dvdgan", "train_top", "train_vqvae",
]


def train_vqvae(data: str, preset: str, out: str | Path, *, resume: bool = False, size: int | None = None,
                device: str | None = None, **options) -> TrainResult:
    """Train a hierarchical VQ-VAE on 16-frame windows; alone or in every process of a torchrun.

    data:    what `open_clips` takes. preset: a name of models.PRESETS["vqvae"]. out: the run folder.
    size:    height and width of the frames in pixels, divisible by 8; None takes the preset's.
    device:  None takes the GPU where there is one.
    options: fields of TrainOptions.
    Returns: TrainResult; its `model` is a model folder.
    Raises:  UsageError, DataError, CheckpointError; SystemExit(130) after Ctrl-C, with a checkpoint.
    """
    chosen = TrainOptions(**options)
    check_run(Path(out), resume)
    config = models.preset("vqvae", preset)
    with process_group() as ranks:
        windows, about = _windows(data, _size(preset, size), chosen.seed, ranks)
        # a quarter less time per step on a CPU: the convolutions then need no reordering of their inputs
        model = _fresh("vqvae", config, chosen.seed, device).to(memory_format=torch.channels_last_3d)
        return train(VQVAETask(model, windows, chosen.batch_size, about), chosen, out, resume)


def train_decoder(data: str, vqvae: str | Path, out: str | Path, *, scene: bool = False, perceptual: float = 0.0,
                  resume: bool = False, size: int | None = None, device: str | None = None, **options) -> TrainResult:
    """Train the decoder of a trained VQ-VAE on; its encoder and codebooks, and so its codes and priors, stay.

    vqvae:   the run folder (or its model folder) of `train_vqvae`. The size is that of its run unless given.
    scene:   let the decoder learn what stands still before a fixed camera: it starts as the median of training frames.
    perceptual: how much LPIPS (alex, from the weights folder) counts beside the mean absolute error. It makes frames
             sharper, and flatters the model where it is judged by LPIPS, so a report should say so.
    rest:    as in `train_vqvae`.
    Returns: TrainResult; its `model` is a model folder of a VQ-VAE, and raises, as `train_vqvae`; WeightsError too.
    """
    chosen = TrainOptions(**options)
    check_run(Path(out), resume)
    if not (perceptual >= 0 and math.isfinite(perceptual)):
        raise UsageError(f"--perceptual must be at least 0, got {perceptual}.")
    lpips = LPIPS.from_tensors("alex", load_weights("lpips_alex").tensors).to(device_of(device)) if perceptual else None
    with process_group() as ranks:
        old, identity = _load_vqvae(Path(vqvae), device)
        windows, about = _windows(data, _size(str(vqvae), size or _trained_size(Path(vqvae))), chosen.seed, ranks)
        model = with_scene(old, windows) if scene else old
        task = DecoderTask(model, windows, chosen.batch_size, identity | about, perceptual, lpips)
        return train(task, chosen, out, resume)


def with_scene(vqvae: nn.Module, windows: ClipWindows, frames: int = 256) -> nn.Module:
    """The same VQ-VAE with a decoder that has a scene: the median of one frame each of some windows.

    vqvae:   without a scene. windows: of training clips. frames: how many to take.
    Returns: a new module on the same device; it decodes to the old frames mixed with the scene, half and half.
    Raises:  UsageError if it has a scene already.
    """
    if vqvae.config.scene:
        raise UsageError("the autoencoder has a scene already; train its decoder without --scene.")
    seen = torch.cat([windows.batch(step, 1)[:, 0] for step in range(frames)])  # [frames, H, W, 3]
    config = asdict(vqvae.config) | {"scene": tuple(seen.shape[1:3])}
    model = models.build("vqvae", config)
    last, old = model.decode_both[-1], vqvae.decode_both[-1]
    whole, fresh = vqvae.state_dict(), model.state_dict()
    model.load_state_dict(fresh | {name: t for name, t in whole.items() if t.shape == fresh[name].shape})
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
        last.weight[:, :3], last.bias[:3] = old.weight, old.bias
        model.scene.copy_(seen.float().div(255).median(dim=0).values.movedim(-1, 0))
    return model.to(old.weight.device, memory_format=torch.channels_last_3d)


def train_top(data: str, vqvae: str | Path, preset: str, out: str | Path, **rest) -> TrainResult:
    """Train the top prior on the codes that a trained VQ-VAE gives the clips; they are kept in `out`/latents.

    vqvae:   the run folder (or its model folder) of `train_vqvae`.
    rest:    resume, size, device, options as in `train_vqvae`; every=4: frames between two windows of a clip. The size
             is that of the autoencoder's run unless given.
    Returns: TrainResult, and raises, as `train_vqvae`.
    """
    return _train_prior("top", TopTask, data, vqvae, preset, out, **rest)


def train_bottom(data: str, vqvae: str | Path, preset: str, out: str | Path, **rest) -> TrainResult:
    """Train the bottom prior; everything as in `train_top`."""
    return _train_prior("bottom", BottomTask, data, vqvae, preset, out, **rest)


def _train_prior(kind: str, task: type, data: str, vqvae: str | Path, preset: str, out: str | Path, *,
                 resume: bool = False, size: int | None = None, device: str | None = None, every: int = 4,
                 **options) -> TrainResult:
    chosen = TrainOptions(**options)
    check_run(Path(out), resume)
    config = models.preset(kind, preset)
    chosen.set_threads()  # encoding comes before the loop
    with process_group() as ranks:
        autoencoder, identity = _load_vqvae(Path(vqvae), device)
        if autoencoder.config.codes != config.stack.codes:
            raise UsageError(
                f"{vqvae} has {autoencoder.config.codes} codes per level, the {kind} preset {preset} is for "
                f"{config.stack.codes}; choose the preset that the autoencoder was trained with."
            )
        windows, about = _windows(data, _size(preset, size or _trained_size(Path(vqvae))), chosen.seed, ranks)
        latents = _shared_latents(ranks, Path(out) / "latents", autoencoder, windows, identity | about, every)
        model = _fresh(kind, config, chosen.seed, device)
        return train(task(model, latents, chosen.batch_size, chosen.seed, autoencoder), chosen, out, resume)


def _shared_latents(ranks: Ranks, folder: Path, vqvae: nn.Module, windows, identity: dict, every: int) -> Latents:
    """The first process makes the codes, the others then read them."""
    if ranks.leads:
        latents = load_latents(folder, vqvae, windows, identity, every)
    ranks.wait()
    return latents if ranks.leads else load_latents(folder, vqvae, windows, identity, every)


def _windows(data: str, size: int, seed: int, ranks: Ranks) -> tuple[ClipWindows, dict]:
    clips = open_clips(data, split="train", size=(size, size))
    windows = ClipWindows(clips, frames=FRAMES, size=(size, size), seed=seed)
    if ranks.leads:
        print(windows.describe(), file=sys.stderr)
    return windows, {"clips": clips_hash(clips), "frames": FRAMES, "size": size}


def _size(preset: str, size: int | None) -> int:
    size = SIZES.get(preset) if size is None else size
    if size is None:
        raise UsageError(f"preset {preset} names no frame size; give --size.")
    if size < 8 or size % 8:
        raise UsageError(f"--size must be a positive multiple of 8 pixels, got {size}.")
    return size


def _trained_size(vqvae: Path) -> int | None:
    """The frame size that the autoencoder's run was trained with, where the run is there to tell."""
    for run in (vqvae, vqvae.parent):
        if has_folder(run / "checkpoint"):
            return read_config(run / "checkpoint").get("task", {}).get("data", {}).get("size")
    return None


def _load_vqvae(path: Path, device: str | None) -> tuple[nn.Module, dict]:
    model, folder = models.load_part("vqvae", path)
    model = model.to(device_of(device), memory_format=torch.channels_last_3d)
    return model.requires_grad_(False), {"vqvae": manifest_hash(folder)}


def _fresh(kind: str, config, seed: int, device: str | None) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.build(kind, asdict(config)).to(device_of(device))
