"""Masked causal convolution as a list of live taps, and the gated activation."""

from torch import Tensor

from fastvid.kernels.gated_causal_conv import reference
from fastvid.kernels.gated_causal_conv.reference import Tap


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, taps: tuple[Tap, ...]) -> Tensor:
    """Convolution that reads only the listed neighbours: no masked weights, no multiplications by zero.

    x:       [B, T, H, W, Cin], floating, zero outside the grid.
    weight:  [taps, Cin, Cout]; bias: [Cout] or None.
    taps:    (dt, dy, dx) per weight slice, the neighbour's offset; dt <= 0. The caller's list decides causality.
    Returns: [B, T, H, W, Cout].
    Raises:  ValueError if shapes disagree or a tap looks into a later frame.
    Source:  van den Oord et al. 2016, arXiv:1606.05328, without the mask's zeros.
    """
    if x.ndim != 5 or weight.shape[:2] != (len(taps), x.shape[-1]):
        raise ValueError(
            f"causal_conv: `x` must be [B, T, H, W, Cin] and `weight` [{len(taps)} taps, Cin, Cout], "
            f"got {list(x.shape)} and {list(weight.shape)}."
        )
    if any(dt > 0 for dt, _, _ in taps):
        raise ValueError(f"causal_conv: `taps` must have dt <= 0, got {taps}; a later frame is not known yet.")
    return reference.causal_conv(x, weight, bias, taps)


def gate(pre: Tensor) -> Tensor:
    """tanh(a) * sigmoid(b), a and b the first and second half of the channels.

    pre:     [..., 2C], floating.
    Returns: [..., C].
    Raises:  ValueError for an odd number of channels.
    Source:  van den Oord et al. 2016, arXiv:1606.05328, eq. 2.
    """
    if pre.shape[-1] % 2:
        raise ValueError(f"gate: the last axis must be even (two halves), got {list(pre.shape)}.")
    return reference.gate(pre)
