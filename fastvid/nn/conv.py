"""Unmasked convolutional parts of the autoencoder and the conditioning stacks."""

from torch import Tensor, nn


class ResidualBlock3d(nn.Module):
    """x + Conv1(ReLU(Conv3(ReLU(x)))): the residual block of VQ-VAE-2 in three dimensions.

    channels, inner: outer and inner width; kernel: extents of the wide convolution, odd, zero-padded to keep the size.
    Source:          Razavi et al. 2019, arXiv:1906.00446.
    """

    def __init__(self, channels: int, inner: int, kernel: tuple[int, int, int] = (3, 3, 3)):
        super().__init__()
        self.body = nn.Sequential(
            # not in place: the skip must carry the un-rectified input
            nn.ReLU(), nn.Conv3d(channels, inner, kernel, padding=tuple(k // 2 for k in kernel)),
            nn.ReLU(), nn.Conv3d(inner, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> the same shape."""
        return x + self.body(x)
