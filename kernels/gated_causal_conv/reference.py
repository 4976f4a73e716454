"""Masked causal convolution over live taps, and the gate: the definition, in plain torch. See README.md."""

import torch
import torch.nn.functional as F
from torch import Tensor

Tap = tuple[int, int, int]  # (dt, dy, dx): which neighbour is read, relative to the output position; dt <= 0


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, taps: tuple[Tap, ...]) -> Tensor:
    """y[p] = bias + sum over i of x[p + taps[i]] @ weight[i]; zero outside. [B, T, H, W, Cin] -> [B, T, H, W, Cout]."""
    return F.linear(neighbours(x, taps), weight.flatten(0, 1).t(), bias)


def neighbours(x: Tensor, taps: tuple[Tap, ...]) -> Tensor:
    """What the taps read at each position, side by side. [B, T, H, W, C] -> [B, T, H, W, taps * C], zero outside."""
    T, H, W = x.shape[1:4]
    before = [max(0, -min(tap[axis] for tap in taps)) for axis in range(3)]
    after = [max(0, max(tap[axis] for tap in taps)) for axis in range(3)]
    padded = F.pad(x, (0, 0, before[2], after[2], before[1], after[1], before[0], after[0]))
    views = []
    for tap in taps:
        t, y, x0 = (margin + offset for margin, offset in zip(before, tap, strict=True))
        views.append(padded[:, t : t + T, y : y + H, x0 : x0 + W])
    return torch.cat(views, dim=-1)


def gate(pre: Tensor) -> Tensor:
    """tanh(a) * sigmoid(b) with a and b the halves of the last axis. [..., 2C] -> [..., C]."""
    a, b = pre.chunk(2, dim=-1)
    return torch.tanh(a) * torch.sigmoid(b)
