"""torch's dense convolution of stride 1, on the CPU by the kernel that others use for their live taps."""

import torch
from torch import Tensor, nn

from fastvid import ops
from fastvid.nn.live_kernel import LiveKernel
from fastvid.ops._op import SERVES


class Conv3d(nn.Conv3d):
    """nn.Conv3d whose taps are all live: the same words, parameters and state dict, and on the CPU a faster step.

    The native backend of fastvid.ops.gated_causal_conv computes it, forward and gradients, where it serves; its output
    is channels last in memory. Everywhere else it is torch's own: with no tap to leave out, cuDNN is hard to beat.
    Raises: NotImplementedError for another stride than 1, groups and padding modes.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.live_kernel = LiveKernel.of(
            self._get_name(), 3, torch.ones(1, 1, *self.kernel_size, device="cpu"), self.weight.shape[:2],
            self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode,
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        """[B, Cin, T, H, W] -> [B, Cout, T, H, W], or both without B."""
        return self._native(input) if self._serves(input) else super().forward(input)

    def _native(self, input: Tensor) -> Tensor:
        weight = self.live_kernel.live(self.weight)  # [taps, Cin, Cout], a view
        return self.live_kernel.convolve(self._get_name(), input, weight, self.bias, backend="cpu")

    def _serves(self, input: Tensor) -> bool:
        """Whether the native backend would be the one to serve; compiled code is left to its compiler."""
        if input.ndim != 5 or input.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        weight = self.live_kernel.live(self.weight)
        told = ops.gated_causal_conv.reasons(
            input.movedim(1, -1), weight, self.bias, self.live_kernel.taps, activation="none"
        )
        return told["cpu"] == SERVES


class ResidualBlock3d(nn.Module):
    """x + Conv1(ReLU(Conv3(ReLU(x)))): the residual block of VQ-VAE-2 in three dimensions.

    channels, inner: outer and inner width; kernel: extents of the wide convolution, odd, zero-padded to keep the size.
    Source:          Razavi et al. 2019, arXiv:1906.00446.
    """

    def __init__(self, channels: int, inner: int, kernel: tuple[int, int, int] = (3, 3, 3)):
        super().__init__()
        self.body = nn.Sequential(
            # not in place: the skip must carry the un-rectified input
            nn.ReLU(), Conv3d(channels, inner, kernel, padding=tuple(k // 2 for k in kernel)),
            nn.ReLU(), Conv3d(inner, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> the same shape."""
        return x + self.body(x)
