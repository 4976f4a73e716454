"""Top prior: a 3-D gated PixelCNN over the coarse codes of the future, conditioned on the codes of four given frames.

Source: Walker, Razavi, van den Oord 2021, arXiv:2103.01950, section 3.2 and Tables 4-6.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastvid.nn import Conv3d, GatedPixelStack, GatedStackConfig, ResidualBlock3d


@dataclass(frozen=True)
class TopPriorConfig:
    """Sizes of the top prior. The stack's `condition_channels` is the width of the conditioning stack."""

    stack: GatedStackConfig = GatedStackConfig(
        channels=512, layers=40, kernel=3, time_kernel=3, condition_channels=512, dropout=0.5
    )
    steps: int = 3  # latent steps predicted; one step is four frames
    embed: int = 64  # width of the given codes' embedding
    squeeze: int = 256  # width of the given frames' summary
    inner: int = 128  # inner width of the conditioning blocks
    blocks: int = 4


class TopPrior(nn.Module):
    """Logits of the top codes of the next latent steps, given both levels' codes of the four frames before them."""

    def __init__(self, config: TopPriorConfig = TopPriorConfig()):
        super().__init__()
        self.config = config
        self.conditioning = TopConditioning(config)
        self.stack = GatedPixelStack(config.stack)

    def forward(self, codes: Tensor, given_top: Tensor, given_bottom: Tensor) -> Tensor:
        """Teacher-forced logits.

        codes:        [B, T, H, W] int64, the future top codes, T at most `steps`.
        given_top:    [B, 1, H, W] int64; given_bottom: [B, 2, 2H, 2W] int64: the four given frames, encoded alone.
        Returns:      [B, T, H, W, K].
        Raises:       ValueError if the grids disagree.
        """
        return self.stack(codes, self.condition(given_top, given_bottom)[:, : codes.shape[1]])

    def condition(self, given_top: Tensor, given_bottom: Tensor) -> Tensor:
        """What every layer is told of the given frames, once per video. -> [B, steps, H, W, condition_channels]."""
        return self.conditioning(given_top, given_bottom)


class TopConditioning(nn.Module):
    """Both levels of the given codes, merged, repeated for every future step and mixed by residual blocks."""

    def __init__(self, config: TopPriorConfig):
        super().__init__()
        e, width = config.embed, config.stack.condition_channels
        self.embed_top = nn.Embedding(config.stack.codes, e)
        self.embed_bottom = nn.Embedding(config.stack.codes, e)
        self.upsample = nn.ConvTranspose3d(e, e, 4, 2, padding=1)
        self.merge = nn.Conv3d(2 * e, config.squeeze, (2, 4, 4), 2, padding=(0, 1, 1))
        # without it the repeated summaries would differ only where the convolution meets the border
        self.step_bias = nn.Parameter(torch.zeros(1, config.squeeze, config.steps, 1, 1))
        self.mix = nn.Sequential(
            Conv3d(config.squeeze, width, 3, padding=1),
            *(ResidualBlock3d(width, config.inner) for _ in range(config.blocks)),
        )

    def forward(self, given_top: Tensor, given_bottom: Tensor) -> Tensor:
        """[B, 1, H, W], [B, 2, 2H, 2W] int64 -> [B, steps, H, W, condition_channels]."""
        B, _, H, W = given_top.shape
        if given_top.shape[1] != 1 or given_bottom.shape != (B, 2, 2 * H, 2 * W):
            raise ValueError(
                f"TopPrior: four given frames are top [B, 1, H, W] and bottom [B, 2, 2H, 2W], "
                f"got {list(given_top.shape)} and {list(given_bottom.shape)}."
            )
        top = self.upsample(self.embed_top(given_top).movedim(-1, 1))  # [B, E, 2, 2H, 2W]
        bottom = self.embed_bottom(given_bottom).movedim(-1, 1)
        summary = self.merge(torch.cat([top, bottom], dim=1))  # [B, squeeze, 1, H, W]
        return self.mix(summary + self.step_bias).movedim(1, -1)


PRESETS = {
    "paper": TopPriorConfig(),
    "dino64": TopPriorConfig(
        GatedStackConfig(channels=48, layers=6, condition_channels=64, attention_every=3, heads=4, dropout=0.1),
        embed=16, squeeze=32, inner=32, blocks=2,
    ),
    "push64": TopPriorConfig(
        GatedStackConfig(channels=64, layers=8, condition_channels=64, attention_every=4, heads=4, dropout=0.1),
        embed=32, squeeze=64, inner=32, blocks=2,
    ),
    "tiny": TopPriorConfig(
        GatedStackConfig(codes=32, channels=16, layers=2, condition_channels=16, attention_every=2, heads=2),
        embed=8, squeeze=16, inner=8, blocks=1,
    ),
}
PRESETS["dino64-wavefront"] = replace(PRESETS["dino64"], stack=replace(PRESETS["dino64"].stack, wavefront=True))
