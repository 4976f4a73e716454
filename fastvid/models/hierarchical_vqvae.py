"""Hierarchical VQ-VAE for video: two levels of codes, the coarse one summarising the fine one.

Source: Walker, Razavi, van den Oord 2021, "Predicting Video with VQVAE", arXiv:2103.01950, section 2.1 and Table 3; the
decoder's details that the paper leaves open follow the image model of Razavi et al. 2019, arXiv:1906.00446.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.nn import ResidualBlock3d, VectorQuantize, perplexity


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of the autoencoder. Frames must be divisible by 4, height and width by 8."""

    hidden: int = 128
    residual: int = 32  # inner width of a residual block
    blocks: int = 2  # residual blocks per stack
    codes: int = 512  # K, per level
    code_width: int = 64  # D
    decay: float = 0.99
    commitment_weight: float = 0.25
    mask_probability: float = 0.25  # per clip: the decoder must make do with the top level
    reconstruction_variance: float = 1.0  # the squared error is divided by it
    dead_below: float = 0.05  # rows per batch under which a code is moved elsewhere
    scene: tuple[int, int] | None = None  # (H, W) of a fixed camera's frames: the decoder learns what stands still


class VQVAEOutput(NamedTuple):
    """Reconstruction [B, 3, T, H, W] and scalars; loss = reconstruction_loss + commitment_loss."""

    reconstruction: Tensor
    loss: Tensor
    reconstruction_loss: Tensor
    commitment_loss: Tensor
    perplexity_top: Tensor
    perplexity_bottom: Tensor


class HierarchicalVQVAE(nn.Module):
    """Clips to two grids of codes and back. Frames are [B, 3, T, H, W] in [0, 1].

    Bottom codes sit at T/2, H/4, W/4, top codes at T/4, H/8, W/8. The bottom code is conditioned on the decoded top.
    """

    def __init__(self, config: VQVAEConfig = VQVAEConfig()):
        super().__init__()
        self.config = config
        c, d = config.hidden, config.code_width
        self.encode_bottom = nn.Sequential(
            nn.Conv3d(3, c, (4, 8, 8), (2, 4, 4), padding=(1, 2, 2)), nn.ReLU(), nn.Conv3d(c, c, 3, padding=1),
            *_residual_stack(config),
        )
        self.encode_top = nn.Sequential(
            nn.Conv3d(c, c, 4, 2, padding=1), nn.ReLU(), nn.Conv3d(c, c, 3, padding=1), *_residual_stack(config)
        )
        self.to_top = nn.Conv3d(c, d, 1)
        self.decode_top = nn.Sequential(
            nn.Conv3d(d, c, 3, padding=1), *_residual_stack(config), nn.ConvTranspose3d(c, d, 4, 2, padding=1)
        )
        self.to_bottom = nn.Conv3d(c + d, d, 1)
        self.quantize_top = self._quantizer()
        self.quantize_bottom = self._quantizer()
        self.upsample_top = nn.ConvTranspose3d(d, d, 4, 2, padding=1)
        # over a scene there is a fourth channel: how much of the scene shows
        self.decode_both = nn.Sequential(
            nn.Conv3d(2 * d, c, 3, padding=1), *_residual_stack(config),
            nn.ConvTranspose3d(c, 4 if config.scene else 3, (4, 8, 8), (2, 4, 4), padding=(1, 2, 2)),
        )
        self.scene = nn.Parameter(torch.full((3, *config.scene), 0.5)) if config.scene else None  # [3, H, W]

    def forward(self, video: Tensor) -> VQVAEOutput:
        """Reconstruct clips and return the training loss; in training mode the codebooks move.

        video:   [B, 3, T, H, W] in [0, 1], T divisible by 4, H and W by 8.
        Returns: VQVAEOutput; the reconstruction is not clamped. In training mode the bottom level of a clip is hidden
                 from the decoder with probability `mask_probability` (drawn from torch's global generator).
        Raises:  ValueError for any other shape.
        """
        top, bottom, commitment = self._quantize(video)
        bottom_seen = bottom.quantized
        if self.training and self.config.mask_probability > 0:
            keep = torch.rand(video.shape[0], device=video.device) >= self.config.mask_probability
            bottom_seen = bottom_seen * keep.view(-1, 1, 1, 1, 1)
        coarse = self.upsample_top(top.quantized)
        reconstruction = self._paint(coarse, bottom_seen)
        error = F.mse_loss(reconstruction, video) / self.config.reconstruction_variance
        return VQVAEOutput(
            reconstruction, error + commitment, error, commitment,
            perplexity(top.indices, self.config.codes), perplexity(bottom.indices, self.config.codes),
        )

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of clips. [B, 3, T, H, W] in [0, 1] -> top [B, T/4, H/8, W/8], bottom [B, T/2, H/4, W/4], int64."""
        top, bottom, _ = self._quantize(video)
        return top.indices, bottom.indices

    def decode(self, top: Tensor, bottom: Tensor | None, clamp: bool = True) -> Tensor:
        """Clips from codes.

        top, bottom: [B, T/4, H/8, W/8] and [B, T/2, H/4, W/4] int64 in [0, K). Without bottom codes the decoder makes
                     do with the top ones, as it does for the clips whose bottom level training masks.
        clamp:       False leaves what lies outside [0, 1], as a loss wants it.
        Returns:     [B, 3, T, H, W], clamped to [0, 1].
        Raises:      ValueError for frames of another size than the scene, where the model has one.
        """
        coarse = self.upsample_top(_codes(self.quantize_top, top))  # [B, D, T/2, H/4, W/4]
        fine = torch.zeros_like(coarse) if bottom is None else _codes(self.quantize_bottom, bottom)
        video = self._paint(coarse, fine)
        return video.clamp(0, 1) if clamp else video

    def _paint(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """[B, D, T/2, H/4, W/4], twice -> [B, 3, T, H, W]."""
        made = self.decode_both(torch.cat([coarse, fine], dim=1))
        if self.scene is None:
            return made + 0.5
        if made.shape[3:] != self.scene.shape[1:]:
            raise ValueError(
                f"HierarchicalVQVAE: this model has learned a scene of {list(self.scene.shape[1:])}, got codes of "
                f"frames of {list(made.shape[3:])}; resize the clip first."
            )
        share = made[:, 3:].sigmoid()
        return torch.lerp(made[:, :3] + 0.5, self.scene.unsqueeze(1), share)

    def _quantize(self, video: Tensor) -> "tuple[_Level, _Level, Tensor]":
        _check_video(video)
        features = self.encode_bottom(video - 0.5)  # [B, C, T/2, H/4, W/4]
        top, loss_top = _quantize_level(self.quantize_top, self.to_top(self.encode_top(features)))
        context = self.decode_top(top.quantized)  # [B, D, T/2, H/4, W/4]
        bottom, loss_bottom = _quantize_level(
            self.quantize_bottom, self.to_bottom(torch.cat([context, features], dim=1))
        )
        return top, bottom, loss_top + loss_bottom

    def _quantizer(self) -> VectorQuantize:
        c = self.config
        return VectorQuantize(
            c.code_width, c.codes, decay=c.decay, commitment_weight=c.commitment_weight, accept_3d_fmap=True,
            threshold_ema_dead_code=c.dead_below, draw="distance", rotation_trick=False,
        )  # fmt: skip


class _Level(NamedTuple):
    quantized: Tensor  # [B, D, T, H, W]
    indices: Tensor  # [B, T, H, W]


def _quantize_level(quantizer: VectorQuantize, features: Tensor) -> tuple[_Level, Tensor]:
    quantized, indices, loss = quantizer(features)
    return _Level(quantized.contiguous(), indices), loss


def _codes(quantizer: VectorQuantize, indices: Tensor) -> Tensor:
    return quantizer.get_codes_from_indices(indices).contiguous()  # [B, D, T, H, W]


def _residual_stack(config: VQVAEConfig) -> list[nn.Module]:
    return [ResidualBlock3d(config.hidden, config.residual) for _ in range(config.blocks)] + [nn.ReLU()]


def _check_video(video: Tensor) -> None:
    shape = list(video.shape)
    if len(shape) != 5 or shape[1] != 3 or shape[2] % 4 or shape[3] % 8 or shape[4] % 8 or 0 in shape[2:]:
        raise ValueError(
            f"HierarchicalVQVAE: `video` must be [B, 3, T, H, W] with T divisible by 4 and H, W by 8, got {shape}; "
            "crop or resize the clip first."
        )


PRESETS = {
    "paper": VQVAEConfig(),
    "dino64": VQVAEConfig(
        hidden=64, residual=24, code_width=16, decay=0.97, dead_below=0.2, reconstruction_variance=0.02,
        mask_probability=0.1,
    ),
    "push64": VQVAEConfig(
        hidden=64, code_width=32, decay=0.97, dead_below=0.2, reconstruction_variance=0.02, mask_probability=0.1
    ),
    "tiny": VQVAEConfig(hidden=16, residual=8, blocks=1, codes=32, code_width=8, dead_below=0.01),
}
