"""torch's convolution of images, on the CPU by fewer multiplications where its words allow it."""

import torch
from torch import Tensor, nn

from fastvid import ops
from fastvid.ops._op import SERVES

SERVED = {"kernel_size": (3, 3), "stride": (1, 1), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}


class Conv2d(nn.Conv2d):
    """nn.Conv2d: the same words, parameters and state dict, and on the CPU a faster 3 x 3 convolution.

    With kernel 3, stride 1 and padding 1 the native backend of fastvid.ops.image_conv computes it, forward and
    gradients, where it serves; its output is channels last in memory. Everything else is torch's own.
    weight and bias are read once a forward, so that parametrizations of them hold.
    Source: Lavin and Gray 2015, arXiv:1509.09308.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, Cin, H, W] -> [N, Cout, H, W], or both without N; plus a residual of that shape, in the same pass."""
        weight, bias = self.weight, self.bias
        if not self._serves(input, weight, bias):
            out = self._conv_forward(input, weight, bias)
            return out if residual is None else out + residual
        residual = None if residual is None else residual.movedim(1, -1)
        return ops.image_conv(input.movedim(1, -1), weight, bias, residual).movedim(-1, 1)

    def _serves(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the native backend would be the one to serve; compiled code is left to its compiler."""
        same = self.padding in ((1, 1), "same") and all(getattr(self, name) == word for name, word in SERVED.items())
        if not same or input.ndim != 4 or input.shape[1] != self.in_channels or 0 in input.shape[2:]:
            return False
        if input.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        if any(tensor is not None and tensor.dtype != torch.float32 for tensor in (input, weight, bias)):
            return False
        return ops.image_conv.reasons(input.movedim(1, -1), weight, bias).get("cpu") == SERVES
