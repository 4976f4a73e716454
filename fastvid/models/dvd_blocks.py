"""What DVD-GAN's generator and discriminators are built of."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.models.dvd_config import DVDGANConfig
from fastvid.nn import ConditionalBatchNorm, Conv2d, ConvGRU


class Group(nn.Module):
    """One resolution: a recurrent unit over the frames where there is one, then two blocks, of which one enlarges."""

    def __init__(self, cin: int, cout: int, config: DVDGANConfig, recurrent: bool):
        super().__init__()
        self.frames, self.channels = config.frames, cin
        self.recurrent = ConvGRU(cin, cout) if recurrent else None
        width = cout if recurrent else cin
        self.first = GeneratorBlock(width, width, config, upsample=False)
        self.second = GeneratorBlock(width, cout, config, upsample=True)

    def forward(self, x: Tensor, condition: Tensor, hidden: Tensor | None, attend: nn.Module | None) -> Tensor:
        """[B, Cin, T or 1, H, W] -> [B, Cout, T, 2H, 2W]. attend: what is done before the last block, if anything."""
        if self.recurrent is not None:
            x = self.recurrent(x, hidden, self.frames if x.shape[2] == 1 else None)
        x = self.first(x, condition)
        return self.second(x if attend is None else attend(x), condition)


class GeneratorBlock(nn.Module):
    """Norm, ReLU, bilinear x2 where asked, convolution; norm, ReLU, convolution; and a way past them."""

    def __init__(self, cin: int, cout: int, config: DVDGANConfig, upsample: bool):
        super().__init__()
        self.upsample = upsample
        norm = lambda channels, larger: ConditionalBatchNorm(  # noqa: E731
            channels, config.condition, config.frames, relu=True, upsample=larger
        )
        self.norm_in, self.conv_in = norm(cin, upsample), Conv2d(cin, cout, 3, padding=1)
        self.norm_out, self.conv_out = norm(cout, False), Conv2d(cout, cout, 3, padding=1)
        self.past = nn.Conv2d(cin, cout, 1) if upsample or cin != cout else None

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[B, Cin, T, H, W] -> [B, Cout, T, H, W] or twice that a side."""
        past = x if self.past is None else each_frame(self._past, x)
        made = each_frame(self.conv_in, self.norm_in(x, condition))
        return each_frame(self.conv_out, self.norm_out(made, condition), past)

    def _past(self, x: Tensor) -> Tensor:
        # a 1x1 convolution and the enlargement may change places, and before it there is a quarter of the pixels
        x = self.past(x)
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False) if self.upsample else x


class SelfAttention(nn.Module):
    """x + gamma * o(attention) between all positions of all frames, one head, as SAGAN has it without a scale."""

    def __init__(self, channels: int):
        super().__init__()
        linear = lambda cin, cout: nn.Linear(cin, cout, bias=False)  # noqa: E731
        self.theta, self.phi = linear(channels, channels // 8), linear(channels, channels // 8)
        self.g, self.o = linear(channels, channels // 2), linear(channels // 2, channels)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> the same."""
        rows = x.flatten(2).transpose(1, 2)  # [B, T * H * W, C]
        seen = F.scaled_dot_product_attention(self.theta(rows), self.phi(rows), self.g(rows), scale=1.0)
        return (rows + self.gamma * self.o(seen)).transpose(1, 2).unflatten(2, x.shape[2:])


class Encoder(nn.Module):
    """The frames before, each by itself through a discriminator's blocks, as the recurrent units' first states.

    With v2 every resolution has its state, by a 3x3 convolution of the frames' features side by side; with v1 the
    coarsest alone has one, by a 1x1 convolution.
    """

    def __init__(self, config: DVDGANConfig):
        super().__init__()
        widths = [3, *(config.discriminator_width * units for units in config.discriminator)]
        self.blocks = nn.ModuleList(Block(2, *pair, first=i == 0) for i, pair in enumerate(pairwise(widths)))
        kernel, out = (3, config.groups) if config.variant == "v2" else (1, config.groups[:1])
        self.states = nn.ModuleList(
            nn.Conv2d(config.given * width, config.width * units, kernel, padding=kernel // 2)
            for width, units in zip(reversed(widths), out, strict=False)
        )

    def forward(self, given: Tensor) -> list[Tensor]:
        """[B, 3, given, H, W] -> a state [B, C, h, w] of each resolution from 4x4 up."""
        x = given.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x.unflatten(0, (len(given), -1)).flatten(1, 2))  # [B, given * C, h, w]
        return [F.relu(state(seen)) for state, seen in zip(self.states, reversed(features), strict=False)]


class Block(nn.Module):
    """A discriminator's block: ReLU, convolution, ReLU, convolution, average pool; and a way past them.

    axes: 2 for frames, 3 for volumes, whose time is halved too. first: on pixels, which no ReLU should cut.
    """

    def __init__(self, axes: int, cin: int, cout: int, first: bool):
        super().__init__()
        conv = Conv2d if axes == 2 else nn.Conv3d
        self.pool = F.avg_pool2d if axes == 2 else F.avg_pool3d
        self.first = first
        self.conv_in, self.conv_out = conv(cin, cout, 3, padding=1), conv(cout, cout, 3, padding=1)
        self.past = conv(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, Cin, (T,) H, W] -> [n, Cout, (T / 2,) H / 2, W / 2]."""
        made = self.conv_out(F.relu(self.conv_in(x if self.first else F.relu(x))))
        # a 1x1 convolution and the pool may change places, and after it there are fewer pixels
        return self.pool(made, 2) + self.past(self.pool(x, 2))


class Head(nn.Module):
    """ReLU, sum over the pixels, then a linear score plus the projection on the class's embedding.

    Source: Miyato and Koyama 2018, arXiv:1802.05637, for the projection.
    """

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.linear = nn.Linear(channels, 1)
        self.classes = nn.Embedding(classes, channels) if classes else None

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        """[B, n, C, H, W] -> [B], summed over n. Raises ValueError for classes that do not fit."""
        if (label is None) != (self.classes is None):
            raise ValueError("the discriminator's classes and its labels must both be there or both be absent.")
        features = F.relu(x).sum((3, 4))  # [B, n, C]
        score = self.linear(features).sum((1, 2))
        if label is None:
            return score
        check_label("discriminator", label, self.classes.num_embeddings)
        return score + (self.classes(label) * features.sum(1)).sum(1)


def each_frame(layer, *videos: Tensor) -> Tensor:
    """A layer of images on every frame of videos [B, C, T, H, W]; channels last in memory stays so, without a copy."""
    made = layer(*(video.transpose(1, 2).flatten(0, 1) for video in videos))
    return made.unflatten(0, (videos[0].shape[0], videos[0].shape[2])).transpose(1, 2)


def check_label(who: str, label: Tensor, classes: int) -> None:
    """Refuse labels that are not [B] int64 in [0, classes): ValueError."""
    if label.dtype != torch.int64 or label.ndim != 1:
        raise ValueError(f"{who}: `label` must be [B] int64, got {list(label.shape)} {label.dtype}.")
    # on a GPU the look-up itself says so, without a wait for it here
    if not label.is_cuda and len(label) and not 0 <= int(label.min()) <= int(label.max()) < classes:
        raise ValueError(f"{who}: classes must lie in 0..{classes - 1}, got {label.unique().tolist()}.")
