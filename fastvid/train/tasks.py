"""What can be trained: the autoencoder on clips, the two priors on its codes."""

import hashlib
import math
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.data.sheet import contact_sheet
from fastvid.metrics import LPIPS
from fastvid.models import BottomPrior, HierarchicalVQVAE, TopPrior
from fastvid.models.bottom_prior import ABSENT
from fastvid.nn import code_loss
from fastvid.sampling import Noise, sample
from fastvid.train.latents import GIVEN, Latents, as_model_input


class VQVAETask:
    """Reconstruct random windows of clips.

    model:      the autoencoder. windows: a ClipWindows (anything with its `batch`).
    batch_size: clips per step over all processes. data: what identifies the clips, for continued runs.
    """

    def __init__(self, model: HierarchicalVQVAE, windows, batch_size: int, data: dict):
        self.model, self.windows, self.batch_size = model, windows, batch_size
        self.config = {"kind": "vqvae", **asdict(model.config)}
        self.fingerprint = {"model": self.config, "data": data}

    def loss(self, step: int, rank: int, world: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of this process's share; metrics psnr (dB), perplexity of both levels, the two loss terms."""
        clips = self.windows.batch(step, self.batch_size // world, rank=rank, world=world)
        video = as_model_input(clips, next(self.model.parameters()).device)
        out = self.model(video)
        error = F.mse_loss(out.reconstruction.detach().clamp(0, 1), video)
        return out.loss, {
            "psnr": -10 * torch.log10(error.clamp_min(1e-10)), "perplexity_top": out.perplexity_top,
            "perplexity_bottom": out.perplexity_bottom, "commitment": out.commitment_loss,
        }

    def sheet(self, model: HierarchicalVQVAE) -> Tensor:
        """Rows in pairs: a real window, then its reconstruction. uint8 [H, W, 3]."""
        clips = self.windows.batch(0, min(4, self.batch_size), rank=0, world=1)  # [B, T, H, W, 3]
        made = as_frames(model.decode(*model.encode(as_model_input(clips, next(model.parameters()).device))))
        return contact_sheet([row for pair in zip(clips, made, strict=True) for row in pair])


class DecoderTask(VQVAETask):
    """Give a trained autoencoder a better decoder: encoder and codebooks stay, so its codes and priors stay good.

    The first arguments are VQVAETask's. The loss is the mean absolute error, under which an uncertain edge stays an
    edge; no bottom code is hidden, since none ever is when frames are predicted.
    perceptual: how much LPIPS counts beside it, 0 for not at all. lpips: the metric, needed where it counts.
    """

    PARTS = ("upsample_top.", "decode_both.", "scene")

    def __init__(self, model: HierarchicalVQVAE, windows, batch_size: int, data: dict, perceptual: float = 0.0,
                 lpips: LPIPS | None = None):
        super().__init__(model, windows, batch_size, data | ({"perceptual": perceptual} if perceptual else {}))
        self.perceptual, self.lpips = perceptual, lpips
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(self.PARTS))

    def loss(self, step: int, rank: int, world: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of this process's share; metrics psnr (dB) and, where it counts, lpips."""
        self.model.eval()  # or looking codes up would move the codebooks
        clips = self.windows.batch(step, self.batch_size // world, rank=rank, world=world)
        video = as_model_input(clips, next(self.model.parameters()).device)
        with torch.no_grad():
            codes = self.model.encode(video)
        made = self.model.decode(*codes, clamp=False)
        error = F.mse_loss(made.detach().clamp(0, 1), video)
        loss, metrics = F.l1_loss(made, video), {"psnr": -10 * torch.log10(error.clamp_min(1e-10))}
        if self.perceptual:
            distance = self.lpips(made.movedim(2, 1), video.movedim(2, 1)).mean()
            loss, metrics["lpips"] = loss + self.perceptual * distance, distance.detach()
        return loss, metrics


class TopTask:
    """Predict the top codes of the future from both levels' codes of the given frames.

    model: the prior. latents: codes of the training windows. batch_size: windows per step over all processes.
    seed:  with the step it decides the batch. vqvae: the autoencoder behind the codes; with it sheets are drawn.
    """

    def __init__(self, model: TopPrior, latents: Latents, batch_size: int, seed: int = 0,
                 vqvae: HierarchicalVQVAE | None = None):
        self.model, self.latents, self.batch_size, self.seed, self.vqvae = model, latents, batch_size, seed, vqvae
        self.config = {"kind": "top", **asdict(model.config)}
        self.fingerprint = {"model": self.config, "data": latents.key}

    def loss(self, step: int, rank: int, world: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross entropy in nats; metric bits per code."""
        codes = self.latents.take(*_draw(self.latents, self.seed, step, self.batch_size, rank, world)[:1])
        codes = codes.to(next(self.model.parameters()).device)
        target = codes.top[:, codes.given_top.shape[1]:]  # [B, 3, h, w]
        return _cross_entropy(self.model(target, codes.given_top, codes.given_bottom), target)

    def sheet(self, model: TopPrior) -> Tensor | None:
        """Rows in pairs: what the true top codes show, then sampled ones, both without bottom codes."""
        if self.vqvae is None:
            return None
        codes = _some(self.latents, next(model.parameters()).device)
        known = codes.given_top.shape[1]
        condition = model.condition(codes.given_top, codes.given_bottom)
        made = sample(model.stack, condition, Noise(0, tuple(range(len(codes.top)))))
        real = torch.cat([codes.given_top, codes.top[:, known:]], dim=1)
        made = torch.cat([codes.given_top, made], dim=1)
        return _pairs(self.vqvae.decode(real, None), self.vqvae.decode(made, None))


class BottomTask:
    """Predict one slice of bottom codes, drawn at random from the future, from all top codes and the slices before it.

    Arguments as for TopTask.
    """

    def __init__(self, model: BottomPrior, latents: Latents, batch_size: int, seed: int = 0,
                 vqvae: HierarchicalVQVAE | None = None):
        self.model, self.latents, self.batch_size, self.seed, self.vqvae = model, latents, batch_size, seed, vqvae
        self.config = {"kind": "bottom", **asdict(model.config)}
        self.fingerprint = {"model": self.config, "data": latents.key}

    def loss(self, step: int, rank: int, world: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross entropy in nats; metric bits per code."""
        rows, slices = _draw(self.latents, self.seed, step, self.batch_size, rank, world)
        codes = self.latents.take(rows).to(next(self.model.parameters()).device)
        target, top, window = bottom_inputs(codes, slices.to(codes.top.device), self.model.config.window)
        return _cross_entropy(self.model(target, slices.to(target.device), top, window), target)

    def sheet(self, model: BottomPrior) -> Tensor | None:
        """Rows in pairs: the reconstruction from true codes, then with sampled bottom codes under the true top ones."""
        if self.vqvae is None:
            return None
        codes = _some(self.latents, next(model.parameters()).device)
        real = made = torch.cat([codes.given_bottom, codes.bottom[:, codes.given_bottom.shape[1]:]], dim=1)
        for n in range(codes.given_bottom.shape[1], codes.bottom.shape[1]):
            slices = torch.full((len(made),), n, device=made.device)
            _, top, window = bottom_inputs(codes._replace(bottom=made), slices, model.config.window)
            noise = Noise(0, tuple(range(len(made))), stream=1, first_step=n)
            drawn = sample(model.stack, model.condition(slices, top, window), noise)
            made = torch.cat([made[:, :n], drawn, made[:, n + 1:]], dim=1)
        return _pairs(self.vqvae.decode(top, real), self.vqvae.decode(top, made))


def bottom_inputs(codes: Latents, slices: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the bottom prior is shown when it must predict slice n: just what exists at that moment of sampling.

    codes:   Latents of B windows. slices: [B] int64, the n of each. window: earlier slices seen.
    Returns: target [B, 2h, 2w], top [B, 4, h, w] with the given frames encoded alone in front, window
             [B, window, 2h, 2w] = slices n - window .. n - 1, those of the given frames encoded alone, -1 if absent.
    Raises:  nothing for slices in [0, 8).
    """
    known = codes.given_bottom.shape[1]
    bottom = torch.cat([codes.given_bottom, codes.bottom[:, known:]], dim=1)  # [B, 8, 2h, 2w]
    top = torch.cat([codes.given_top, codes.top[:, codes.given_top.shape[1]:]], dim=1)
    padded = F.pad(bottom, (0, 0, 0, 0, window, 0), value=ABSENT)
    row = torch.arange(len(slices), device=slices.device)
    earlier = slices[:, None] + torch.arange(window, device=slices.device)  # padded index of n - window is n
    return bottom[row, slices], top, padded[row[:, None], earlier]


def as_frames(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] in [0, 1] -> uint8 [B, T, H, W, 3] on the CPU. Raises nothing."""
    return video.mul(255).round().clamp(0, 255).to("cpu", torch.uint8).movedim(1, -1)


def _draw(latents: Latents, seed: int, step: int, batch: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Rows [B] and slices [B] of one process's share of a step; the shares together do not depend on `world`."""
    generator = torch.Generator().manual_seed(_mix(seed, step))
    rows = torch.randint(len(latents.top), (batch,), generator=generator)
    slices = torch.randint(latents.given_bottom.shape[1], latents.bottom.shape[1], (batch,), generator=generator)
    return rows.chunk(world)[rank], slices.chunk(world)[rank]


def _mix(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"batch {seed} {step}".encode()).digest()[:7], "little")


def _cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = code_loss(logits, target)
    return loss, {"bits_per_code": loss.detach() / math.log(2)}


def _some(latents: Latents, device: torch.device) -> Latents:
    """Three windows from all over the data."""
    return latents.take(torch.linspace(0, len(latents.top) - 1, 3).long()).to(device)


def _pairs(real: Tensor, made: Tensor) -> Tensor:
    rows = zip(as_frames(real), as_frames(made), strict=True)
    return contact_sheet([row for pair in rows for row in pair], given=GIVEN)
