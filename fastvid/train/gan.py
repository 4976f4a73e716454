"""The game of DVD-GAN: two turns of its discriminators against one of its generator, and signs of its going wrong.

Source: Clark, Donahue, Simonyan 2019, arXiv:1907.06571; the hinge loss: Lim and Ye 2017, arXiv:1705.02894.
"""

import hashlib
import json
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.data.sheet import contact_sheet
from fastvid.nn import spectral_norms
from fastvid.train.latents import as_model_input
from fastvid.train.options import GANOptions
from fastvid.train.tasks import as_frames
from fastvid.train.turns import Player, Turn

JUDGES = ("spatial", "temporal")
BETAS = (0.0, 0.999)
COMPARED = 16  # clips whose distances say how diverse a batch is
SURE, LONG = 0.99, 500  # accuracy on generated clips, and for how many steps, that leave the generator no way
COLLAPSED, EARLY = 0.1, 500  # share of the real clips' distances; before so many steps every generator is dull
ROWS = 16  # of a sample sheet


class Networks(nn.Module):
    """The three networks of a DVD-GAN as one module, for checkpoints."""

    def __init__(self, generator: nn.Module, spatial: nn.Module, temporal: nn.Module):
        super().__init__()
        self.generator, self.spatial, self.temporal = generator, spatial, temporal


class Draws(NamedTuple):
    """What chance decides of one turn: noise [B, latent], classes [B] or None, frames [2, B, k] to look at."""

    z: Tensor
    label: Tensor | None
    frames: Tensor


class DVDGANTask:
    """Generate clips that neither discriminator can tell from real ones.

    networks:   generator, spatial and temporal discriminator of one config. windows: a ClipWindows (anything with its
                `batch_of`, `frames` and `usable`), of given + generated frames.
    options:    of the training; `discriminator_rate` must be set. data: what identifies the clips.
    classes:    [clips] int64, the class of each clip by its number in `windows.clips`; None without classes.
    """

    def __init__(
        self, networks: Networks, windows, options: GANOptions, data: dict, classes: Tensor | None = None
    ):  # fmt: skip
        self.model, self.windows, self.options, self.classes = networks, windows, options, classes
        self.averaged, config = networks.generator, networks.generator.config
        self.averaged.checkpointing = options.checkpointing
        self.given, self.batch_size = config.given, options.batch_size
        # as it comes back from the disk, where tuples are lists
        self.config = json.loads(json.dumps({"kind": "dvdgan", **asdict(config)}))
        self.fingerprint = {"model": self.config, "data": data}
        self.players = _players(networks, options)
        judging = options.discriminator_steps
        self.turns = (
            *(Turn("discriminator", partial(self.judge, place), "_d") for place in range(judging)),
            Turn("generator", partial(self.generate, judging), "_g"),
        )
        self.usable = torch.tensor(windows.usable)
        self.sure_since: int | None = None

    def judge(self, place: int, step: int, rank: int, world: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Hinge losses of both discriminators on fresh real and generated clips, summed.

        place: of the turn in its step.
        Metrics: of each discriminator its loss, mean scores and accuracies on real and generated clips; diversity, if
        the process has two clips, within its share of the batch.
        """
        real, real_label = self._real(place, step, rank, world)
        draws = self._draws(place, step, rank, world)
        label = real_label if self.given else draws.label
        with self._precision():
            with torch.no_grad():
                made = self._made(draws.z, label, real)
            both = torch.cat([real, made.to(real.dtype)])
            labels = None if label is None else torch.cat([real_label, label])
            scores = self._scores(both, labels, draws.frames.flatten(0, 1))
        metrics: dict[str, Tensor] = {}
        losses = []
        for name, score in zip(JUDGES, scores, strict=True):
            on_real, on_made = score.chunk(2)
            losses.append(F.relu(1 - on_real).mean() + F.relu(1 + on_made).mean())
            metrics |= {
                f"loss_d_{name}": losses[-1].detach(), f"score_real_{name}": on_real.mean(),
                f"score_fake_{name}": on_made.mean(), f"accuracy_real_{name}": (on_real > 0).float().mean(),
                f"accuracy_fake_{name}": (on_made < 0).float().mean(),
            }  # fmt: skip
        if len(real) > 1:
            metrics["diversity"] = diversity(made[:, :, self.given :], real[:, :, self.given :])
        return sum(losses), metrics

    def generate(self, place: int, step: int, rank: int, world: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus both discriminators' mean scores on generated clips, summed; no metrics; `place` as in `judge`."""
        draws = self._draws(place, step, rank, world)
        real, label = self._real(place, step, rank, world) if self.given else (None, draws.label)
        with self._precision():
            scores = self._scores(self._made(draws.z, label, real), label, draws.frames[1])
        return -sum(score.mean() for score in scores), {}

    def sheet(self, model: nn.Module) -> Tensor:
        """Generated clips as rows, each class in turn; or pairs of a true clip and a prediction. uint8 [H, W, 3]."""
        device = next(model.parameters()).device
        given = label = None
        if self.given:
            clips = self.windows.batch_of(0, min(ROWS // 2, self.batch_size))[1]
            given, count = _as_video(clips, device)[:, :, : self.given], len(clips)
        else:
            names = self._shown_classes()
            label = None if names is None else names.to(device)
            count = ROWS // 2 if names is None else len(names)
        z = torch.randn(count, model.config.latent, generator=torch.Generator().manual_seed(0)).to(device)
        made = as_frames(_unit(torch.cat([
            model(z[i : i + 1], label=None if label is None else label[i : i + 1],
                  given=None if given is None else given[i : i + 1])
            for i in range(count)
        ])))  # fmt: skip
        if not self.given:
            return contact_sheet(list(made))
        made = torch.cat([clips[:, : self.given], made], dim=1)
        return contact_sheet([row for pair in zip(clips, made, strict=True) for row in pair], given=self.given)

    def tables(self) -> dict[str, dict[str, float]]:
        """The largest singular value of every layer, as the power iteration knows it."""
        return {"spectral_norms": spectral_norms(self.model)}

    def warn(self, step: int, row: dict[str, float]) -> str | None:
        """What the numbers of a row say against going on, if anything."""
        sure = all(row[f"accuracy_fake_{name}"] >= SURE for name in JUDGES)
        self.sure_since = (step if self.sure_since is None else self.sure_since) if sure else None
        if self.sure_since is not None and step - self.sure_since >= LONG:
            return (
                f"warning: for {LONG} steps the discriminators have known nearly every generated clip; the generator "
                "may have nothing to learn from (a lower --discriminator-rate, fewer --discriminator-steps)."
            )
        if row.get("diversity", 1.0) < COLLAPSED and step >= EARLY:
            return (
                "warning: generated clips differ from each other by less than a tenth of what real ones do; the "
                "generator may have collapsed to a few clips (see samples/)."
            )
        return None

    def _scores(self, video: Tensor, label: Tensor | None, frames: Tensor) -> tuple[Tensor, Tensor]:
        networks = self.model
        return networks.spatial(video, label, frames=frames).float(), networks.temporal(video, label).float()

    def _made(self, z: Tensor, label: Tensor | None, real: Tensor | None) -> Tensor:
        """Generated clips [B, 3, given + frames, H, W] in [-1, 1], which begin as `real` where frames are given."""
        if not self.given:
            return self.model.generator(z, label=label)
        given = real[:, :, : self.given]
        return torch.cat([given, self.model.generator(z, label=label, given=given).to(given.dtype)], dim=2)

    def _real(self, place: int, step: int, rank: int, world: int) -> tuple[Tensor, Tensor | None]:
        """Real clips [B, 3, T, H, W] in [-1, 1] of one turn, other ones in every turn, and their classes."""
        device = next(self.model.parameters()).device
        draw = step * len(self.turns) + place
        numbers, clips = self.windows.batch_of(draw, self.batch_size // world, rank=rank, world=world)
        label = None if self.classes is None else self.classes[numbers].to(device)
        return _as_video(clips, device), label

    def _draws(self, place: int, step: int, rank: int, world: int) -> Draws:
        """The same numbers over all processes together, however many there are; classes as often as in the data."""
        config, device = self.model.generator.config, next(self.model.parameters()).device
        key = hashlib.sha256(f"gan {self.options.seed} {step} {place}".encode()).digest()[:7]
        chance = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        count, length = self.batch_size, self.windows.frames
        z = torch.randn(count, config.latent, generator=chance)
        clips = self.usable[torch.randint(len(self.usable), (count,), generator=chance)]
        order = torch.rand(2, count, length, generator=chance).argsort(-1)
        frames = order[..., : config.spatial_frames].sort().values
        mine = slice(rank * count // world, (rank + 1) * count // world)
        label = None if self.classes is None else self.classes[clips[mine]].to(device)
        return Draws(z[mine].to(device), label, frames[:, mine].to(device))

    def _precision(self):
        device = next(self.model.parameters()).device
        return torch.autocast(device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16")

    def _shown_classes(self) -> Tensor | None:
        """One class a row of the sheet: each some times over, or a choice of them."""
        if self.classes is None:
            return None
        count = self.model.generator.config.classes
        if count > ROWS:
            return torch.linspace(0, count - 1, ROWS).long()
        return torch.arange(count).repeat_interleave(max(1, ROWS // 2 // count))


def diversity(made: Tensor, real: Tensor) -> Tensor:
    """How far apart generated clips lie, as a share of the distance between real ones: near 0 where all are the same.

    made, real: [B, ...] with B from 2 on; the first 16 of each count.
    Returns:    scalar float32: mean L2 distance of two generated clips over that of two real ones.
    Raises:     nothing; identical real clips give a huge number.
    """
    apart = [F.pdist(clips[:COMPARED].detach().float().flatten(1)).mean() for clips in (made, real)]
    return apart[0] / apart[1].clamp_min(1e-12)


def _players(networks: Networks, options: GANOptions) -> list[Player]:
    named = {name: p for name, p in networks.named_parameters() if p.requires_grad}
    generator = {name: p for name, p in named.items() if name.startswith("generator.")}
    rest = {name: p for name, p in named.items() if name not in generator}
    return [
        Player("discriminator", rest, options.discriminator_rate, BETAS),
        Player("generator", generator, options.generator_rate, BETAS),
    ]


def _as_video(clips: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, 3, T, H, W] in [-1, 1], channels last in memory."""
    return as_model_input(clips, device).mul_(2).sub_(1)


def _unit(video: Tensor) -> Tensor:
    return video.float().add(1).div(2)
