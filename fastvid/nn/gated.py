"""The gated PixelCNN: two streams of masked convolutions over a grid of codes, with causal attention.

Position (t, y, x) is predicted from everything before it in raster order, t slowest. The vertical stream at row y sees
earlier frames and the rows above; the horizontal stream adds the codes to the left. Only the horizontal stream is
attended and read out, so that the vertical stream of a row needs none of the row's own codes.

With `wavefront=True` a position sees less of its own frame: the codes to the left, and of the rows above those at most
r = kernel // 2 columns to the right. Only the input layer reaches sideways, the layers' vertical taps stay in their
column and attention in its row, its column and its place in earlier frames. All positions with the same x + (1 + r) y
can then be drawn at once: W + (1 + r)(H - 1) sequential steps a frame instead of H W. The price is likelihood: what
stands further right in the rows above is not known, and a one-frame model's vertical stream sees a strip, not a cone.

Source: van den Oord et al. 2016, arXiv:1606.05328 (layer and streams); Walker et al. 2021, arXiv:2103.01950, section
3.2 (a time axis on each stream's convolution); Razavi et al. 2019, arXiv:1906.00446 (attention).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.nn.attention import CausalAttention3d
from fastvid.nn.conv import GatedCausalConv3d, Tap


@dataclass(frozen=True)
class GatedStackConfig:
    """Sizes of a gated stack, and how much of its own frame a position sees.

    `time_kernel` frames are seen by each layer, the present one included; 1 makes it 2-D. `wavefront` narrows the view
    (see the head of this file) so that anti-diagonals of a frame can be drawn at once: fewer sequential steps, at some
    bits per code. It changes no parameter's name.
    """

    codes: int = 512
    channels: int = 512  # C, the width of both streams
    layers: int = 40
    kernel: int = 3  # spatial extent, odd
    time_kernel: int = 3
    condition_channels: int = 512
    attention_every: int = 5  # 0: none
    heads: int = 8
    dropout: float = 0.0
    wavefront: bool = False


class GatedPixelBlock(nn.Module):
    """One gated layer of both streams; `attention` follows it on the horizontal stream where given.

    v, h and the result of either stream have `config.channels` channels; the vertical stream tells the horizontal one
    the sum before its gate.
    """

    def __init__(self, config: GatedStackConfig, attention: bool):
        super().__init__()
        c = config.channels
        self.vertical = GatedCausalConv3d(c, c, vertical_taps(config.kernel, config.time_kernel, config.wavefront))
        self.horizontal = GatedCausalConv3d(c, c, horizontal_taps(config.kernel, config.time_kernel))
        self.link = nn.Linear(2 * c, 2 * c, bias=False)
        self.condition = nn.Linear(config.condition_channels, 2 * c, bias=False)
        self.out = nn.Linear(c, c)
        self.dropout = nn.Dropout(config.dropout)
        self.attention = CausalAttention3d(c, config.heads, axial=config.wavefront) if attention else None

    def forward(self, v: Tensor, h: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """v, h: [B, T, H, W, C]; condition: [B, T, H, W, condition_channels] -> v, h of the same shapes."""
        conditioned = self.condition(condition)  # [B, T, H, W, 2C]
        # dropout stands between the gate and the residual, so that one pass cannot do both
        drops = self.training and self.dropout.p > 0
        above = self.vertical(v, conditioned, residual=None if drops else v, return_pre=True)
        v = v + self.dropout(above.out) if drops else above.out
        beside = self.horizontal(h, conditioned + self.link(above.pre))
        h = h + self.out(self.dropout(beside))
        return v, h if self.attention is None else h + self.attention(h)


class GatedPixelStack(nn.Module):
    """Codes and a condition in, logits of every code given the ones before it out.

    Source: see the head of this file.
    """

    def __init__(self, config: GatedStackConfig):
        super().__init__()
        self.config = config
        c = config.channels
        self.embed = nn.Embedding(config.codes, c)
        reach = config.kernel, config.time_kernel
        self.input_vertical = GatedCausalConv3d(c, c, input_vertical_taps(*reach), activation="none")
        self.input_horizontal = GatedCausalConv3d(c, c, input_horizontal_taps(*reach), activation="none")
        every = config.attention_every
        self.layers = nn.ModuleList(
            GatedPixelBlock(config, attention=bool(every) and (i + 1) % every == 0) for i in range(config.layers)
        )
        self.head = nn.Sequential(nn.ELU(), nn.Linear(c, c), nn.ELU(), nn.Linear(c, config.codes))

    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Teacher-forced logits.

        codes:     [B, T, H, W] int64 in [0, K). condition: [B, T, H, W, condition_channels].
        Returns:   [B, T, H, W, K]; those at a position do not depend on its own or any later code.
        Raises:    ValueError if the two grids differ.
        """
        if codes.shape != condition.shape[:-1] or condition.shape[-1] != self.config.condition_channels:
            raise ValueError(
                f"GatedPixelStack: `condition` must be {[*codes.shape, self.config.condition_channels]} like `codes`, "
                f"got {list(condition.shape)}."
            )
        embedded = self.embed(codes)
        v, h = self.input_vertical(embedded), self.input_horizontal(embedded)
        for layer in self.layers:
            v, h = layer(v, h, condition)
        return self.head(h)

    def core_parameters(self) -> Iterator[nn.Parameter]:
        """The layers' and the head's parameters: what the published sizes count, input tables apart."""
        for part in (self.layers, self.head):
            yield from part.parameters()


def vertical_taps(kernel: int, time_kernel: int, wavefront: bool = False) -> tuple[Tap, ...]:
    """Taps of a layer's vertical convolution: in the (y, t) plane; for one frame in the (y, x) plane, or in the column
    alone for a wavefront model."""
    r = kernel // 2
    if time_kernel == 1 and not wavefront:
        return tuple((0, dy, dx) for dy in range(-r, 1) for dx in range(-r, r + 1))
    past = tuple((dt, dy, 0) for dt in range(1 - time_kernel, 0) for dy in range(-r, r + 1))
    return past + tuple((0, dy, 0) for dy in range(-r, 1))


def horizontal_taps(kernel: int, time_kernel: int) -> tuple[Tap, ...]:
    """Taps of a layer's horizontal convolution: in the (x, t) plane; the present frame's end at the position itself."""
    r = kernel // 2
    past = tuple((dt, 0, dx) for dt in range(1 - time_kernel, 0) for dx in range(-r, r + 1))
    return past + tuple((0, 0, dx) for dx in range(-r, 1))


def input_vertical_taps(kernel: int, time_kernel: int) -> tuple[Tap, ...]:
    """Taps of the vertical input layer: whole earlier frames, strictly earlier rows of the present one."""
    r = kernel // 2
    return _past_cube(r, time_kernel) + tuple((0, dy, dx) for dy in range(-r, 0) for dx in range(-r, r + 1))


def input_horizontal_taps(kernel: int, time_kernel: int) -> tuple[Tap, ...]:
    """Taps of the horizontal input layer: whole earlier frames, strictly earlier columns of the present row."""
    r = kernel // 2
    return _past_cube(r, time_kernel) + tuple((0, 0, dx) for dx in range(-r, 0))


def _past_cube(r: int, time_kernel: int) -> tuple[Tap, ...]:
    return tuple(
        (dt, dy, dx) for dt in range(1 - time_kernel, 0) for dy in range(-r, r + 1) for dx in range(-r, r + 1)
    )


def code_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Mean cross entropy in nats per code. [..., K], [...] -> scalar."""
    return F.cross_entropy(logits.flatten(0, -2).float(), codes.flatten())
