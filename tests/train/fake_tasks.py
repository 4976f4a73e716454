"""Small stand-ins for the tests of training: clips without files, and a task that is quick to step."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.nn import ConditionalBatchNorm, spectral_norm_all
from fastvid.train import DVDGANTask, GANOptions
from fastvid.train.gan import Networks


class Windows:
    """ClipWindows' interface over seeded noise that drifts, so that there is something to learn."""

    def __init__(self, clips: int = 5, frames: int = 16, size: int = 32, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        still = torch.randint(0, 256, (clips, 1, size // 8, size // 8, 3), generator=generator, dtype=torch.uint8)
        still = still.repeat_interleave(8, 2).repeat_interleave(8, 3)
        self.clips = torch.cat([still.roll(t, 3) for t in range(frames)], dim=1)  # [N, T, H, W, 3]

    @property
    def frames(self) -> int:
        return self.clips.shape[1]

    @property
    def usable(self) -> list[int]:
        return list(range(len(self.clips)))

    def batch(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Tensor:
        return self.batch_of(step, batch_size, rank, world)[1]

    def batch_of(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> tuple[list[int], Tensor]:
        generator = torch.Generator().manual_seed(step)
        picked = torch.randint(len(self.clips), (batch_size * world,), generator=generator).chunk(world)[rank]
        return picked.tolist(), self.clips[picked]

    def windows(self, every: int = 4) -> list[tuple[int, int]]:
        return [(clip, 0) for clip in range(len(self.clips))]

    def at(self, clip: int, start: int) -> Tensor:
        return self.clips[clip]


class Net(nn.Module):
    """Dropout, weights and a buffer that moves in the forward pass, as a codebook does; none of the two if lean."""

    def __init__(self, lean: bool = False):
        super().__init__()
        self.lean = lean
        self.first, self.drop, self.last = nn.Linear(6, 16), nn.Dropout(0.0 if lean else 0.3), nn.Linear(16, 3)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.lean:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.1)
        return self.last(self.drop(torch.tanh(self.first(x - self.mean))))


class NetTask:
    """Regression on draws of (step, rank). `poison` maps a step to what is made NaN in it."""

    def __init__(self, seed: int = 0, batch_size: int = 8, poison: dict[int, str] | None = None, lean: bool = False):
        torch.manual_seed(seed)
        self.model, self.batch_size, self.poison, self.config = Net(lean), batch_size, poison or {}, {"kind": "net"}
        self.fingerprint = {"data": "noise"}
        self.sheets = 0

    def loss(self, step: int, rank: int, world: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.randn(self.batch_size, 6, generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
        how = self.poison.get(step)
        if how == "input":
            x = x * float("nan")
        loss = F.mse_loss(self.model(x), x[:, :3].sin())
        if how == "loss":
            loss = loss * float("inf")
        if how == "gradient":
            # the loss stays finite, the gradient of sqrt at zero does not
            loss = loss + torch.sqrt(self.model.last.weight[0, 0] * 0)
        if how == "buffer":
            self.model.mean[2] = float("nan")
        return loss, {"twice": 2 * loss.detach()}

    def sheet(self, model: nn.Module) -> Tensor:
        assert not model.training
        self.sheets += 1
        return torch.full((8, 8, 3), 7, dtype=torch.uint8)


@dataclass(frozen=True)
class ToyConfig:
    """What DVDGANTask asks of a config."""

    frames: int = 4
    size: int = 8
    classes: int = 0
    latent: int = 5
    given: int = 0
    spatial_frames: int = 2


class ToyGenerator(nn.Module):
    """DVDGANGenerator's interface: one linear layer, one conditional norm, one convolution."""

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.classes = nn.Embedding(config.classes, 3) if config.classes else None
        condition = config.latent + 3 * bool(config.classes)
        self.start = nn.Linear(condition, 2 * config.frames * config.size**2)
        self.norm = ConditionalBatchNorm(2, condition, config.frames, relu=True)
        self.last = nn.Conv3d(2, 3, 1)
        spectral_norm_all(self)

    def forward(self, z: Tensor, label: Tensor | None = None, given: Tensor | None = None) -> Tensor:
        config = self.config
        assert (label is None) == (self.classes is None) and (given is None) == (config.given == 0)
        u = z if label is None else torch.cat([z, self.classes(label)], 1)
        x = self.norm(self.start(u).view(-1, 2, config.frames, config.size, config.size), u)
        return torch.tanh(self.last(x) + (0 if given is None else given[:, :, -1:].mean((3, 4), keepdim=True)))


class ToyJudge(nn.Module):
    """Either discriminator's interface."""

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.body, self.head = nn.Conv3d(3, 4, 1), nn.Linear(4, 1)
        self.classes = nn.Embedding(config.classes, 4) if config.classes else None
        spectral_norm_all(self)

    def forward(self, video: Tensor, label: Tensor | None = None, frames: Tensor | None = None) -> Tensor:
        assert (label is None) == (self.classes is None)
        if frames is not None:
            video = video.movedim(2, 1)[torch.arange(len(video))[:, None], frames].movedim(1, 2)
        x = F.relu(self.body(video)).mean((2, 3, 4))
        return self.head(x)[:, 0] + (0 if label is None else (self.classes(label) * x).sum(1))


def toy_gan(options: GANOptions, sync: bool = False, **config) -> DVDGANTask:
    """DVDGANTask of toy networks on drifting noise, of as many classes as clips where there are any."""
    torch.manual_seed(0)
    config = ToyConfig(**config)
    networks = Networks(ToyGenerator(config), ToyJudge(config), ToyJudge(config))
    networks.generator.norm.sync = sync
    classes = torch.arange(5) % config.classes if config.classes else None
    windows = Windows(5, config.given + config.frames, config.size)
    return DVDGANTask(networks, windows, options, {"clips": "noise"}, classes)
