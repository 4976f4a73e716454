"""DVD-GAN: videos from noise and a class, or from the frames before them; the generator and its two discriminators.

The generator makes every frame from the same noise: recurrent units carry what moves from frame to frame, residual
blocks enlarge each frame by itself. One discriminator judges a few whole frames, the other all frames at half size.

Source: Clark, Donahue, Simonyan 2019, arXiv:1907.06571; its first version is variant "v1", its second "v2".
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvid.checkpoint import save_folder
from fastvid.errors import UsageError
from fastvid.models.dvd_blocks import Block, Encoder, Group, Head, SelfAttention, check_label, each_frame
from fastvid.models.dvd_config import START, DVDGANConfig
from fastvid.nn import (
    ConditionalBatchNorm,
    Conv2d,
    ConvGRU,
    SeparableAttention,
    frozen_statistics,
    orthogonal_init_,
    spectral_norm_all,
    standing_statistics,
)

ROWS_AT_ONCE = 8  # videos that are generated together
Numbers = int | range | Sequence[int]
Samples = int | range | list[range]


class DVDGANGenerator(nn.Module):
    """Noise and a class in, a video out.

    checkpointing: set it to recompute each resolution in the backward pass in place of keeping its activations.
    Where the paper is silent, every resolution's units and blocks have the width that it ends with; v1 takes v2's
    blocks, and its given frames set a state as wide as the recurrent unit.
    """

    def __init__(self, config: DVDGANConfig):
        super().__init__()
        self.config, self.checkpointing = config, False
        widths = [config.width * units for units in config.groups]
        self.classes = nn.Embedding(config.classes, config.embedding) if config.classes else None
        self.start = nn.Linear(config.condition, widths[0] * START**2)
        recurrent = config.variant == "v2"
        if not recurrent:
            self.recurrent = ConvGRU(widths[0], widths[0])
            self.attention = SelfAttention(widths[0])
            self.separable = SeparableAttention(([widths[0], *widths])[-2])
        self.groups = nn.ModuleList(
            Group(cin, cout, config, recurrent) for cin, cout in pairwise([widths[0], *widths])
        )
        self.before = Encoder(config) if config.given else None
        self.norm = ConditionalBatchNorm(widths[-1], config.condition, config.frames, relu=True)
        self.last = Conv2d(widths[-1], 3, 3, padding=1)
        orthogonal_init_(self)
        spectral_norm_all(self)

    def forward(
        self, z: Tensor, label: Tensor | None = None, embedding: Tensor | None = None, given: Tensor | None = None
    ) -> Tensor:
        """Videos.

        z:         [B, latent], from a standard normal. label: [B] int64 in [0, classes), where there are classes.
        embedding: [B, embedding] in place of the label's, which lies between classes for instance.
        given:     [B, 3, given, H, W] in [-1, 1], the frames before, where the model goes on from frames.
        Returns:   [B, 3, frames, size, size] in [-1, 1], channels last in memory.
        Raises:    ValueError for shapes or classes that do not fit.
        """
        condition = self._condition(z, label, embedding)
        hidden = self._hidden(len(z), given)
        x = self.start(condition).view(-1, START, START, self.groups[0].channels).movedim(-1, 1)  # [B, C, 4, 4]
        x = x[:, :, None]  # one frame, the same at every step
        if self.config.variant == "v1":
            x = self.attention(self.recurrent(x, hidden[0], self.config.frames))
            hidden = [None] * len(self.groups)
        for level, group in enumerate(self.groups):
            attend = self.separable if self.config.variant == "v1" and level == len(self.groups) - 1 else None
            x = self._run(group, x, condition, hidden[level], attend)
        return torch.tanh(each_frame(self.last, self.norm(x, condition)))

    def embed(self, label: Tensor) -> Tensor:
        """The embedding [B, embedding] of classes [B] int64. Raises ValueError for none or one out of range."""
        if self.classes is None:
            raise ValueError("DVDGANGenerator: the model has no classes; leave `label` out.")
        check_label("DVDGANGenerator", label, self.config.classes)
        return self.classes(label)

    def noise(self, numbers: Numbers, seed: int = 0, truncation: float = 1.0, kind: str = "scaled") -> Tensor:
        """The noise z [n, latent] of samples by their numbers; it depends on number and seed alone.

        numbers:    which samples; an int n for 0 .. n - 1.
        truncation: "scaled" multiplies z by it (DVD-GAN); "truncated" draws from a normal without its tails beyond
                    it (BigGAN). 1 with "scaled" changes nothing.
        Raises:     UsageError for a truncation that is not positive, or another kind.
        Source:     Brock et al. 2018, arXiv:1809.11096, section 3.1, for the tails.
        """
        if not (truncation > 0 and math.isfinite(truncation)):
            raise UsageError(f"truncation must be a finite number above 0, got {truncation}.")
        if kind not in ("scaled", "truncated"):
            raise UsageError(f"the kind of truncation must be scaled or truncated, got {kind!r}.")
        rows = [_uniform(seed, number, self.config.latent) for number in _listed(numbers)]
        uniform = torch.stack(rows) if rows else torch.zeros(0, self.config.latent, dtype=torch.float64)
        device = next(self.parameters()).device
        if kind == "scaled":
            return (truncation * torch.special.ndtri(uniform)).float().to(device)
        tail = torch.special.ndtr(torch.tensor(-truncation, dtype=torch.float64))
        return torch.special.ndtri(tail + uniform * (1 - 2 * tail)).float().to(device)

    @torch.no_grad()
    def sample(
        self, n: int, labels: Sequence[int] | None = None, seed: int = 0, truncation: float = 1.0,
        kind: str = "scaled", numbers: Sequence[int] | None = None,
    ) -> Tensor:
        """Draw videos; the module should be in eval mode.

        n:       how many. labels: a class for each, where the model has classes. numbers: of the samples, by default
                 0 .. n - 1. seed, truncation, kind: as in `noise`.
        Returns: [n, frames, 3, size, size] in [0, 1].
        Raises:  UsageError for labels that are missing, too few, or out of range.
        """
        if numbers is not None and len(numbers) != n:
            raise UsageError(f"sample: wanted {n} numbers, one a video, got {len(numbers)}.")
        if self.config.given:
            raise UsageError("sample: the model goes on from frames and makes none from nothing; use predict.")
        z = self.noise(range(n) if numbers is None else numbers, seed, truncation, kind)
        classes = self._labels(labels, n).to(z.device) if self.config.classes or labels is not None else None
        rows = [
            self(z[rows], None if classes is None else classes[rows]) for rows in torch.arange(n).split(ROWS_AT_ONCE)
        ]
        return _as_frames(torch.cat(rows) if rows else z.new_zeros(0, 3, self.config.frames, *[self.config.size] * 2))

    @torch.no_grad()
    def between_classes(self, z: Tensor, first: int, second: int, steps: int = 8) -> Tensor:
        """One z [latent] under two classes and the straight line between their embeddings.

        Returns: [steps, frames, 3, size, size] in [0, 1]. Raises: ValueError for a class out of range.
        """
        ends = self.embed(torch.tensor([first, second], device=z.device))
        line = torch.lerp(*ends[:, None], torch.linspace(0, 1, steps, device=z.device)[:, None])
        return _as_frames(self(z.expand(steps, -1), embedding=line))

    @torch.no_grad()
    def between_noises(self, first: Tensor, second: Tensor, label: int | None = None, steps: int = 8) -> Tensor:
        """One class, or none, and the straight line between two z [latent].

        Returns: [steps, frames, 3, size, size] in [0, 1]. Raises: ValueError for a class out of range.
        """
        line = torch.lerp(first[None], second[None], torch.linspace(0, 1, steps, device=first.device)[:, None])
        return _as_frames(self(line, None if label is None else torch.full((steps,), label, device=first.device)))

    @torch.no_grad()
    def standing_statistics(
        self, batches: int = 16, batch: int = 16, seed: int = 0, given: Tensor | None = None
    ) -> None:
        """Replace the running statistics by those of `batches` batches of fresh noise and random classes.

        given:  [n, 3, given, H, W] in [-1, 1], clips to go on from, for a model that does; batches draw from them.
        Raises: ValueError where such frames are missing, or given to a model that takes none.
        Source: Brock et al. 2018, arXiv:1809.11096, section 4.
        """
        if (given is None) != (self.config.given == 0):
            raise ValueError("standing_statistics: models that go on from frames need `given`, others take none.")
        draw = torch.Generator().manual_seed(seed)
        device = next(self.parameters()).device
        with standing_statistics(self):
            for _ in range(batches):
                z = torch.randn(batch, self.config.latent, generator=draw).to(device)
                label = torch.randint(max(1, self.config.classes), (batch,), generator=draw).to(device)
                clips = None if given is None else given[torch.randint(len(given), (batch,), generator=draw)].to(device)
                self(z, label if self.config.classes else None, given=clips)

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a model folder. `dtype` float16 halves it: parameters are rounded, statistics are not."""
        buffers = dict(self.named_buffers())
        tensors = {name: t if name in buffers else t.to(dtype) for name, t in self.state_dict().items()}
        save_folder(Path(path), tensors, {"kind": "dvdgan", **asdict(self.config)})

    def _condition(self, z: Tensor, label: Tensor | None, embedding: Tensor | None) -> Tensor:
        """u = [z; e(y)], [B, condition]."""
        config = self.config
        if z.ndim != 2 or z.shape[1] != config.latent:
            raise ValueError(f"DVDGANGenerator: `z` must be [B, {config.latent}], got {list(z.shape)}.")
        if not config.classes:
            if label is not None or embedding is not None:
                raise ValueError("DVDGANGenerator: the model has no classes; leave `label` and `embedding` out.")
            return z
        if (label is None) == (embedding is None):
            raise ValueError(f"DVDGANGenerator: the model has {config.classes} classes; pass `label` or `embedding`.")
        embedding = self.embed(label) if embedding is None else embedding
        if embedding.shape != (len(z), config.embedding):
            wanted, got = [len(z), config.embedding], list(embedding.shape)
            raise ValueError(f"DVDGANGenerator: the classes' embedding must be {wanted} beside this z, got {got}.")
        return torch.cat([z, embedding.to(z.dtype)], dim=1)

    def _hidden(self, batch: int, given: Tensor | None) -> list[Tensor | None]:
        """The first state of each recurrent unit."""
        if self.before is None:
            if given is not None:
                raise ValueError("DVDGANGenerator: the model was made with given=0; leave `given` out.")
            return [None] * len(self.groups)
        wanted = [batch, 3, self.config.given, self.config.size, self.config.size]
        if given is None or list(given.shape) != wanted:
            got = None if given is None else list(given.shape)
            raise ValueError(f"DVDGANGenerator: `given` must be {wanted}, in [-1, 1], got {got}.")
        return self.before(given)

    def _run(self, group: nn.Module, *inputs) -> Tensor:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return group(*inputs)
        # recomputation must not move the running statistics a second time
        again = lambda: (contextlib.nullcontext(), frozen_statistics())  # noqa: E731
        return checkpoint(group, *inputs, use_reentrant=False, context_fn=again)

    def _labels(self, labels: Sequence[int] | None, n: int) -> Tensor:
        classes = self.config.classes
        if not classes:
            raise UsageError("the model has no classes; leave them out.")
        if labels is None or len(labels) != n or not all(0 <= label < classes for label in labels):
            raise UsageError(f"wanted {n} classes in 0..{classes - 1}, one a video, got {labels}.")
        return torch.as_tensor(list(labels), dtype=torch.int64)


class DVDGANPredictor(DVDGANGenerator):
    """The variant that goes on from frames (-FP): they set the first state of the recurrent units."""

    def __init__(self, config: DVDGANConfig):
        if not config.given:
            raise UsageError("dvdgan: a predictor needs given > 0 frames to go on from.")
        if config.classes:
            raise UsageError(f"dvdgan: a model that goes on from frames has no classes, got {config.classes}.")
        super().__init__(config)

    def predict(
        self, frames: Tensor, n: int = 12, samples: Samples = 1, seed: int = 0, temperature: float = 1.0
    ) -> Tensor:
        """The next frames of each clip, drawn `samples` times; no classes.

        frames:  [B, given, 3, H, W] in [0, 1] of the model's size. n: frames to predict; beyond what one pass yields
                 the model goes on from its own last frames.
        samples: as VideoPredictor.predict: how many, or the numbers, in every clip alike or each its own.
        seed, temperature: of the noise; the temperature scales it, as `truncation` in `noise`.
        Returns: [B, S, n, 3, H, W] in [0, 1].
        Raises:  UsageError for another shape, or n or samples below 1.
        """
        return torch.cat(list(self.predict_stream(frames, n, samples, seed, temperature)), dim=2)

    @torch.no_grad()
    def predict_stream(
        self, frames: Tensor, n: int = 12, samples: Samples = 1, seed: int = 0, temperature: float = 1.0
    ) -> Iterator[Tensor]:
        """As `predict`, pass after pass: each [B, S, m, 3, H, W] is yielded before the next is begun, none is kept."""
        numbers = self._numbers(frames, n, samples)
        rows = (len(frames), len(numbers) // len(frames))
        given = list(frames.transpose(1, 2).mul(2).sub(1).repeat_interleave(rows[1], dim=0).split(1))
        for stretch in range(-(-n // self.config.frames)):
            made = []
            for row, number in enumerate(numbers):
                # by itself, since rounding may depend on the batch; every stretch has noise of its own
                z = self.noise([number], seed + (stretch << 32), temperature)
                made.append(self(z, given=given[row]))
                given[row] = torch.cat([given[row], made[-1]], dim=2)[:, :, -self.config.given :]
            yield _as_frames(torch.cat(made))[:, : n - stretch * self.config.frames].unflatten(0, rows)

    def _numbers(self, frames: Tensor, n: int, samples: Samples) -> list[int]:
        """The numbers of all samples, clip after clip."""
        wanted = [self.config.given, 3, self.config.size, self.config.size]
        if frames.ndim != 5 or list(frames.shape[1:]) != wanted or len(frames) < 1:
            raise UsageError(f"predict: `frames` must be [B, {', '.join(map(str, wanted))}], got {list(frames.shape)}.")
        B = len(frames)
        ranges = samples if isinstance(samples, list) else [range(samples) if isinstance(samples, int) else samples] * B
        S = len(ranges[0]) if ranges else 0
        if n < 1 or S < 1 or len(ranges) != B or any(len(one) != S for one in ranges):
            raise UsageError(f"predict: wanted n and samples from 1 on, alike in all {B} clips, got {n} and {samples}.")
        return [number for one in ranges for number in one]


class SpatialDiscriminator(nn.Module):
    """Judges a few frames of a video, each by itself at full size; the score is the sum of theirs."""

    def __init__(self, config: DVDGANConfig):
        super().__init__()
        self.config = config
        widths = [3, *(config.discriminator_width * units for units in config.discriminator)]
        self.blocks = nn.Sequential(*(Block(2, *pair, first=i == 0) for i, pair in enumerate(pairwise(widths))))
        self.head = Head(widths[-1], config.classes)
        orthogonal_init_(self)
        spectral_norm_all(self)

    def forward(self, video: Tensor, label: Tensor | None = None, frames: Tensor | None = None) -> Tensor:
        """Scores, large for what seems real.

        video:   [B, 3, given + frames, size, size] in [-1, 1]. label: [B] int64, where there are classes.
        frames:  [B, k] int64, which frames to look at; None draws spatial_frames of each video, none twice.
        Returns: [B].
        Raises:  ValueError for shapes or classes that do not fit.
        """
        _check_video("SpatialDiscriminator", video, self.config)
        if frames is None:
            order = torch.rand(video.shape[0], video.shape[2], device=video.device)
            frames = order.topk(self.config.spatial_frames).indices.sort().values
        row = torch.arange(len(video), device=video.device)[:, None]
        looked_at = video.transpose(1, 2)[row, frames].flatten(0, 1)  # [B * k, 3, H, W]
        x = self.blocks(looked_at.contiguous(memory_format=torch.channels_last))
        return self.head(x.unflatten(0, frames.shape), label)


class TemporalDiscriminator(nn.Module):
    """Judges all frames of a video together, at half the size."""

    def __init__(self, config: DVDGANConfig):
        super().__init__()
        self.config = config
        widths = [3, *(config.discriminator_width * units for units in config.discriminator)]
        blocks = [Block(3 if i < 2 else 2, *pair, first=i == 0) for i, pair in enumerate(pairwise(widths))]
        self.volumes, self.frames = nn.Sequential(*blocks[:2]), nn.Sequential(*blocks[2:])
        self.head = Head(widths[-1], config.classes)
        orthogonal_init_(self)
        spectral_norm_all(self)

    def forward(self, video: Tensor, label: Tensor | None = None) -> Tensor:
        """Scores [B]; arguments and errors as of SpatialDiscriminator, which looks at fewer frames."""
        _check_video("TemporalDiscriminator", video, self.config)
        small = F.avg_pool3d(video, (1, 2, 2)).contiguous(memory_format=torch.channels_last_3d)
        x = self.volumes(small).transpose(1, 2)  # [B, T / 4, C, H, W]
        return self.head(self.frames(x.flatten(0, 1)).unflatten(0, x.shape[:2]), label)


def generator_of(config: DVDGANConfig) -> DVDGANGenerator:
    """The generator of a config: one that goes on from frames where it says so. Raises UsageError as they do."""
    return (DVDGANPredictor if config.given else DVDGANGenerator)(config)


def _as_frames(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] in [-1, 1] -> [B, T, 3, H, W] in [0, 1]."""
    return video.float().transpose(1, 2).add(1).div(2).clamp(0, 1)


def _check_video(who: str, video: Tensor, config: DVDGANConfig) -> None:
    wanted = [3, config.shown, config.size, config.size]
    if video.ndim != 5 or list(video.shape[1:]) != wanted:
        raise ValueError(f"{who}: `video` must be [B, {', '.join(map(str, wanted))}], got {list(video.shape)}.")


def _listed(numbers: Numbers) -> list[int]:
    return list(range(numbers) if isinstance(numbers, int) else numbers)


def _uniform(seed: int, number: int, count: int) -> Tensor:
    """`count` numbers strictly between 0 and 1, float64, of one sample."""
    key = hashlib.sha256(f"dvdgan {seed} {number}".encode()).digest()[:7]
    draw = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    return (torch.randint(1 << 52, (count,), generator=draw).double() + 0.5) / (1 << 52)
