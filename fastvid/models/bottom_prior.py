"""Bottom prior: a 2-D gated PixelCNN over one slice of fine codes, conditioned on all top codes and earlier slices.

Source: Walker, Razavi, van den Oord 2021, arXiv:2103.01950, section 3.2 and Tables 4, 7, 8.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastvid.nn import Conv3d, GatedPixelStack, GatedStackConfig, ResidualBlock3d

ABSENT = -1  # the code of a slice before the first


@dataclass(frozen=True)
class BottomPriorConfig:
    """Sizes of the bottom prior. The stack's `condition_channels` is the width of the conditioning stack."""

    stack: GatedStackConfig = GatedStackConfig(
        channels=512, layers=20, kernel=5, time_kernel=1, condition_channels=1024
    )
    steps: int = 4  # top steps of a clip; twice as many slices
    window: int = 4  # earlier slices seen
    embed: int = 256
    branch: int = 512  # inner width of both branches
    window_layers: int = 4  # strided convolutions that fold the window into one slice
    inner: int = 1024  # inner width of the conditioning blocks
    blocks: int = 20


class BottomPrior(nn.Module):
    """Logits of the bottom codes of slice n, given the clip's top codes and the slices before n."""

    def __init__(self, config: BottomPriorConfig = BottomPriorConfig()):
        super().__init__()
        self.config = config
        self.conditioning = BottomConditioning(config)
        self.stack = GatedPixelStack(config.stack)

    def forward(self, codes: Tensor, slice_index: Tensor, top: Tensor, window: Tensor) -> Tensor:
        """Teacher-forced logits of one slice per clip.

        codes:       [B, 2H, 2W] int64, the slice itself. slice_index: [B] int64, its n in [0, 2 steps).
        top:         [B, steps, H, W] int64.
        window:      [B, window, 2H, 2W] int64, slices n - window .. n - 1, -1 where there is none.
        Returns:     [B, 2H, 2W, K].
        Raises:      ValueError if the grids disagree.
        """
        condition = self.condition(slice_index, top, window)
        return self.stack(codes.unsqueeze(1), condition).squeeze(1)

    def condition(self, slice_index: Tensor, top: Tensor, window: Tensor) -> Tensor:
        """What every layer is told of a slice's surroundings, once per slice. -> [B, 1, 2H, 2W, condition_channels]."""
        return self.conditioning(slice_index, self.conditioning.above(top), window)


class BottomConditioning(nn.Module):
    """The slice's share of the upsampled top codes beside the folded window of earlier slices, then residual blocks."""

    def __init__(self, config: BottomPriorConfig):
        super().__init__()
        self.config = config
        e, b, width = config.embed, config.branch, config.stack.condition_channels
        self.embed_top = nn.Embedding(config.stack.codes, e)
        self.embed_bottom = nn.Embedding(config.stack.codes + 1, e)  # the last row stands for an absent slice
        self.top_branch = nn.Sequential(
            nn.ConvTranspose3d(e, b, (4, 3, 3), (2, 1, 1), padding=1), nn.ReLU(),
            nn.ConvTranspose3d(b, b, (3, 4, 4), (1, 2, 2), padding=1), nn.ReLU(),
            Conv3d(b, width, 3, padding=1),
        )
        self.window_branch = nn.Sequential(*_fold_window(config))
        self.merge = Conv3d(2 * width, width, 1)
        self.mix = nn.Sequential(*(ResidualBlock3d(width, config.inner, (1, 3, 3)) for _ in range(config.blocks)))

    def above(self, top: Tensor) -> Tensor:
        """What the top codes say to every slice, once per video. [B, steps, H, W] -> [B, C, 2 steps, 2H, 2W]."""
        if top.ndim != 4 or top.shape[1] != self.config.steps:
            raise ValueError(f"BottomPrior: `top` must be [B, {self.config.steps}, H, W], got {list(top.shape)}.")
        return self.top_branch(self.embed_top(top).movedim(-1, 1))

    def forward(self, slice_index: Tensor, above: Tensor, window: Tensor) -> Tensor:
        """[B], what `above` returned, [B, window, 2H, 2W] int64 -> [B, 1, 2H, 2W, condition_channels]."""
        B, absent = len(above), self.config.stack.codes
        if window.shape != (B, self.config.window, *above.shape[3:]):
            raise ValueError(
                f"BottomPrior: `window` must be {[B, self.config.window, *above.shape[3:]]}, twice as high and wide as "
                f"`top`, got {list(window.shape)}."
            )
        seen = self.embed_bottom(torch.where(window == ABSENT, absent, window)).movedim(-1, 1)
        own = above[torch.arange(B, device=above.device), :, slice_index].unsqueeze(2)  # [B, C, 1, 2H, 2W]
        merged = self.merge(torch.cat([own, self.window_branch(seen)], dim=1))
        return self.mix(merged).movedim(1, -1)


def _fold_window(config: BottomPriorConfig) -> list[nn.Module]:
    """Strided convolutions over time until one slice is left: 4 -> 2 -> 1 -> 1 -> 1 for a window of 4."""
    layers: list[nn.Module] = []
    channels, length = config.embed, config.window
    for i in range(config.window_layers):
        out = config.stack.condition_channels if i == config.window_layers - 1 else config.branch
        # padding for which the length becomes ceil(length / 2), as TensorFlow's SAME does
        layers += [nn.Conv3d(channels, out, (4, 3, 3), (2, 1, 1), padding=(2 if length % 2 else 1, 1, 1)), nn.ReLU()]
        channels, length = out, (length + 1) // 2
    if length != 1:
        raise ValueError(f"BottomPrior: {config.window_layers} window layers leave {length} of {config.window} slices.")
    return layers[:-1]


PRESETS = {
    "paper": BottomPriorConfig(),
    "dino64": BottomPriorConfig(
        GatedStackConfig(
            channels=48, layers=8, kernel=3, time_kernel=1, condition_channels=64, attention_every=4, heads=4
        ),
        embed=16, branch=32, window_layers=2, inner=32, blocks=4,
    ),
    "push64": BottomPriorConfig(
        GatedStackConfig(
            channels=64, layers=8, kernel=3, time_kernel=1, condition_channels=64, attention_every=4, heads=4
        ),
        embed=32, branch=32, window_layers=2, inner=32, blocks=4,
    ),
    "tiny": BottomPriorConfig(
        GatedStackConfig(
            codes=32, channels=16, layers=2, kernel=3, time_kernel=1, condition_channels=16, attention_every=2, heads=2
        ),
        embed=8, branch=8, window_layers=2, inner=8, blocks=1,
    ),
}
PRESETS["dino64-wavefront"] = replace(PRESETS["dino64"], stack=replace(PRESETS["dino64"].stack, wavefront=True))
