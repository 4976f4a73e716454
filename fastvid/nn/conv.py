"""The gated causal convolution as a module over channels-last grids."""

import torch
from torch import Tensor, nn

from fastvid import ops

Tap = tuple[int, int, int]  # (dt, dy, dx): which neighbour is read, relative to the output position


class GatedCausalConv3d(nn.Module):
    """A masked convolution and its gate in one pass over the grid: only live taps are stored, read and multiplied.

    in_channels, out_channels: widths of the grid that is read and of the one that comes out.
    taps:        (dt, dy, dx) of every neighbour that is read, dt <= 0; `raster_taps` lists those of a PixelCNN. The
                 list decides causality.
    activation:  "gate", tanh(a) * sigmoid(b); "glu", a * sigmoid(b); "none".
    bias:        whether one is learned; it starts at zero.
    Parameters:  weight [taps, Cin, Cout] and bias [Cout], with Cout = 2 * out_channels for a and b one after the other,
                 out_channels for "none". The weight starts uniform with variance 1 / (taps * Cin).
    Raises:      ValueError without taps or for an activation that is not known.
    Source:      van den Oord et al. 2016, arXiv:1606.05328, eq. 2.
    """

    def __init__(
        self, in_channels: int, out_channels: int, taps: tuple[Tap, ...], activation: str = "gate", bias: bool = True
    ):
        super().__init__()
        if activation not in ("gate", "glu", "none"):
            raise ValueError(f"GatedCausalConv3d: `activation` must be 'gate', 'glu' or 'none', got {activation!r}.")
        if not taps:
            raise ValueError("GatedCausalConv3d: `taps` is empty; list at least one (dt, dy, dx).")
        self.taps, self.activation = tuple(taps), activation
        width = out_channels if activation == "none" else 2 * out_channels
        self.weight = nn.Parameter(torch.empty(len(taps), in_channels, width))
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if bias else None)
        bound = (3.0 / (len(taps) * in_channels)) ** 0.5  # variance 1 / fan-in
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(
        self, x: Tensor, addend: Tensor | None = None, residual: Tensor | None = None, return_pre: bool = False
    ) -> Tensor | ops.Gated:
        """activation(convolution + addend) + residual.

        x:       [B, T, H, W, Cin], any strides. addend: [B, T, H, W, Cout], any strides. residual: [B, T, H, W, C].
        Returns: out [B, T, H, W, C]; with return_pre Gated(out, pre), pre [B, T, H, W, Cout] the sum before the
                 activation (empty for "none").
        Raises:  ValueError if shapes, dtypes or devices disagree.
        """
        done = ops.gated_causal_conv(
            x, self.weight, self.bias, self.taps, addend, residual, self.activation, keep=return_pre
        )
        return done if return_pre else done.out

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        taps, cin, cout = self.weight.shape
        return f"{cin}, {cout}, taps={taps}, activation={self.activation!r}, bias={self.bias is not None}"
