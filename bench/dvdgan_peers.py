"""DVD-GAN's generator and discriminators as one writes them in plain torch, under the same names of weights.

A recurrent unit concatenates input and state and convolves once a gate and step; a norm is a scale and a shift of what
batch statistics say; blocks run as the paper draws them. Spectral norm is torch's own, or, for sampling, divided out
before the clock runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from fastvid.models.dvd_config import START, DVDGANConfig

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
VOLUMES = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last_3d}


class Generator(nn.Module):
    """Version 2 without given frames; the arguments of DVDGANGenerator's forward."""

    def __init__(self, config: DVDGANConfig, layout: str):
        super().__init__()
        self.config, self.format = config, FORMATS[layout]
        widths = [config.width * units for units in config.groups]
        self.classes = nn.Embedding(config.classes, config.embedding) if config.classes else None
        self.start = nn.Linear(config.condition, widths[0] * START**2)
        self.groups = nn.ModuleList(
            _Group(cin, cout, config) for cin, cout in zip([widths[0], *widths], widths, strict=False)
        )
        self.norm, self.last = _Norm(widths[-1], config), nn.Conv2d(widths[-1], 3, 3, padding=1)
        self.to(memory_format=self.format)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """z [B, latent], label [B] -> [B, 3, T, H, W]."""
        condition = z if label is None else torch.cat([z, self.classes(label)], dim=1)
        x = self.start(condition).view(len(z), START, START, -1).permute(0, 3, 1, 2).contiguous(
            memory_format=self.format
        )  # fmt: skip
        frames = [x] * self.config.frames
        for group in self.groups:
            frames = group(frames, condition)
        x = self.norm(_stacked(frames), condition)
        made = self.last(x.flatten(0, 1).contiguous(memory_format=self.format))
        return torch.tanh(made).unflatten(0, x.shape[:2]).transpose(1, 2)


class _Group(nn.Module):
    def __init__(self, cin: int, cout: int, config: DVDGANConfig):
        super().__init__()
        self.recurrent = _Recurrent(cin, cout)
        self.first, self.second = _Block(cout, cout, config, False), _Block(cout, cout, config, True)

    def forward(self, frames: list[Tensor], condition: Tensor) -> list[Tensor]:
        x = _stacked(self.recurrent(frames))  # [B, T, C, H, W]
        return list(self.second(self.first(x, condition), condition).unbind(1))


class _Recurrent(nn.Module):
    def __init__(self, cin: int, cout: int):
        super().__init__()
        conv = lambda: nn.Conv2d(cin + cout, cout, 3, padding=1)  # noqa: E731
        self.reset, self.update, self.candidate = conv(), conv(), conv()

    def forward(self, frames: list[Tensor]) -> list[Tensor]:
        first = frames[0]
        h = first.new_zeros(len(first), self.reset.out_channels, *first.shape[2:])
        states = []
        for x in frames:
            both = torch.cat([x, h], dim=1)
            r, u = torch.sigmoid(self.reset(both)), torch.sigmoid(self.update(both))
            c = F.relu(self.candidate(torch.cat([x, r * h], dim=1)))
            h = u * h + (1 - u) * c
            states.append(h)
        return states


class _Block(nn.Module):
    def __init__(self, cin: int, cout: int, config: DVDGANConfig, upsample: bool):
        super().__init__()
        self.upsample = upsample
        self.norm_in, self.conv_in = _Norm(cin, config), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm_out, self.conv_out = _Norm(cout, config), nn.Conv2d(cout, cout, 3, padding=1)
        self.past = nn.Conv2d(cin, cout, 1) if upsample or cin != cout else None

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        made = self.conv_in(self._larger(self.norm_in(x, condition).flatten(0, 1))).unflatten(0, x.shape[:2])
        made = self.conv_out(self.norm_out(made, condition).flatten(0, 1))
        past = x.flatten(0, 1) if self.past is None else self.past(self._larger(x.flatten(0, 1)))
        return (made + past).unflatten(0, x.shape[:2])

    def _larger(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False) if self.upsample else x


class _Norm(nn.Module):
    def __init__(self, channels: int, config: DVDGANConfig):
        super().__init__()
        self.gain = nn.Linear(config.condition, channels, bias=False)
        self.bias = nn.Linear(config.condition, channels, bias=False)
        self.register_buffer("running_mean", torch.zeros(config.frames, channels))
        self.register_buffer("running_var", torch.ones(config.frames, channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            var, mean = torch.var_mean(x, dim=(0, 3, 4), correction=0)  # [T, C]
            with torch.no_grad():
                count = x.numel() // mean.numel()
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(var * (count / max(1, count - 1)), 0.1)
                self.num_batches_tracked += 1
        scale = (1 + self.gain(condition))[:, None] * torch.rsqrt(var + 1e-5)  # [B, T, C]
        shift = self.bias(condition)[:, None] - mean * scale
        return torch.addcmul(shift[..., None, None], x, scale[..., None, None]).relu_()


class Spatial(nn.Module):
    """The discriminator of frames; `frames` [B, k] says which."""

    def __init__(self, config: DVDGANConfig, layout: str):
        super().__init__()
        widths = [3, *(config.discriminator_width * units for units in config.discriminator)]
        self.blocks = nn.Sequential(*(_Judge(2, *pair, i == 0) for i, pair in enumerate(_pairs(widths))))
        self.head, self.format = _Head(widths[-1], config.classes), FORMATS[layout]
        self.to(memory_format=self.format)

    def forward(self, video: Tensor, label: Tensor | None, frames: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> [B]."""
        row = torch.arange(len(video), device=video.device)[:, None]
        x = video.transpose(1, 2)[row, frames].flatten(0, 1).contiguous(memory_format=self.format)
        return self.head(self.blocks(x).unflatten(0, frames.shape), label)


class Temporal(nn.Module):
    """The discriminator of the whole video at half size."""

    def __init__(self, config: DVDGANConfig, layout: str):
        super().__init__()
        widths = [3, *(config.discriminator_width * units for units in config.discriminator)]
        blocks = [_Judge(3 if i < 2 else 2, *pair, i == 0) for i, pair in enumerate(_pairs(widths))]
        self.volumes, self.frames = nn.Sequential(*blocks[:2]), nn.Sequential(*blocks[2:])
        self.head, self.layout = _Head(widths[-1], config.classes), layout
        self.volumes.to(memory_format=VOLUMES[layout])
        self.frames.to(memory_format=FORMATS[layout])

    def forward(self, video: Tensor, label: Tensor | None) -> Tensor:
        """[B, 3, T, H, W] -> [B]."""
        small = F.avg_pool3d(video, (1, 2, 2)).contiguous(memory_format=VOLUMES[self.layout])
        x = self.volumes(small).transpose(1, 2)
        made = self.frames(x.flatten(0, 1).contiguous(memory_format=FORMATS[self.layout]))
        return self.head(made.unflatten(0, x.shape[:2]), label)


class _Judge(nn.Module):
    def __init__(self, axes: int, cin: int, cout: int, first: bool):
        super().__init__()
        conv = nn.Conv2d if axes == 2 else nn.Conv3d
        self.pool, self.first = F.avg_pool2d if axes == 2 else F.avg_pool3d, first
        self.conv_in, self.conv_out = conv(cin, cout, 3, padding=1), conv(cout, cout, 3, padding=1)
        self.past = conv(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        made = self.conv_out(F.relu(self.conv_in(x if self.first else F.relu(x))))
        return self.pool(made, 2) + self.pool(self.past(x), 2)


class _Head(nn.Module):
    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.linear = nn.Linear(channels, 1)
        self.classes = nn.Embedding(classes, channels) if classes else None

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        features = F.relu(x).sum((3, 4))
        score = self.linear(features).sum((1, 2))
        return score if label is None else score + (self.classes(label) * features.sum(1)).sum(1)


def _stacked(frames: list[Tensor]) -> Tensor:
    """Frames [B, C, H, W] -> [B, T, C, H, W] in the layout that they have."""
    if frames[0].is_contiguous(memory_format=torch.channels_last):
        return torch.stack([frame.permute(0, 2, 3, 1) for frame in frames], dim=1).permute(0, 1, 4, 2, 3)
    return torch.stack(frames, dim=1)


def copied(plain: nn.Module, ours: nn.Module, baked: bool) -> nn.Module:
    """`plain` with the weights of ours. baked: without spectral norm, its division done; else with torch's."""
    layers = [m for m in plain.modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.Conv2d, nn.Conv3d))]
    for layer in layers:
        spectral_norm(layer)
    plain.load_state_dict(ours.state_dict())
    plain.train(ours.training)
    if baked:
        plain.eval()
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight")
    return plain


def _pairs(widths: list[int]) -> list[tuple[int, int]]:
    return list(zip(widths, widths[1:], strict=False))
