"""Small stand-ins for the tests of training: clips without files, and a task that is quick to step."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Windows:
    """ClipWindows' interface over seeded noise that drifts, so that there is something to learn."""

    def __init__(self, clips: int = 5, frames: int = 16, size: int = 32, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        still = torch.randint(0, 256, (clips, 1, size // 8, size // 8, 3), generator=generator, dtype=torch.uint8)
        still = still.repeat_interleave(8, 2).repeat_interleave(8, 3)
        self.clips = torch.cat([still.roll(t, 3) for t in range(frames)], dim=1)  # [N, T, H, W, 3]

    def batch(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        picked = torch.randint(len(self.clips), (batch_size * world,), generator=generator)
        return self.clips[picked.chunk(world)[rank]]

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
