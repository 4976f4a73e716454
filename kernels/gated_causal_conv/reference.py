"""Masked causal convolution over live taps, its gate and its gradients: the definition, in plain torch. See README.md.

Taps are a flat list of offsets, (dt, dy, dx) after (dt, dy, dx), as torch's schemas have no lists of lists.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Tap = tuple[int, int, int]  # (dt, dy, dx): which neighbour is read, relative to the output position
ACTIVATIONS = ("gate", "glu", "none")


def gated_causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, taps: Sequence[int], addend: Tensor | None,
    residual: Tensor | None, activation: str, origin: Sequence[int], size: Sequence[int], keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, *size, C] and pre [B, *size, Cout], [0] unless kept; see fastvid.ops.gated_causal_conv."""
    pre = causal_conv(x, weight, bias, taps, origin, size)
    if addend is not None:
        pre = pre + addend
    out = gate(pre, activation)
    if residual is not None:
        out = residual + out
    return out, pre if keep and activation != "none" else x.new_empty(0)


def gated_causal_conv_backward(
    x: Tensor, weight: Tensor, pre: Tensor | None, grad_out: Tensor | None, grad_pre: Tensor | None,
    taps: Sequence[int], activation: str, origin: Sequence[int], wanted: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, weight, bias and addend, [0] where not wanted; see fastvid.ops.gated_causal_conv_backward."""
    grad = gate_backward(pre, grad_out, grad_pre, activation).to(x.dtype)  # [B, *size, Cout]
    found = [x.new_empty(0) for _ in wanted]
    if wanted[0]:
        back = [-offset for offset in taps]
        found[0] = causal_conv(grad, weight.mT, None, back, [-start for start in origin], x.shape[1:4])
    if wanted[1]:
        seen = neighbours(x, taps, origin, grad.shape[1:4])
        found[1] = (seen.flatten(0, 3).mT @ grad.flatten(0, 3)).unflatten(0, (-1, x.shape[-1]))
    if wanted[2]:
        found[2] = grad.sum(dim=(0, 1, 2, 3))
    if wanted[3]:
        found[3] = grad.clone() if grad is grad_out or grad is grad_pre else grad  # an op returns no argument
    return tuple(found)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, taps: Sequence[int], origin: Sequence[int], size: Sequence[int]
) -> Tensor:
    """y[p] = bias + sum over i of x[origin + p + tap i] @ weight[i]; zero outside x. -> [B, *size, Cout]."""
    seen, weight = neighbours(x, taps, origin, size), weight.flatten(0, 1)  # [B, *size, taps * Cin], [taps * Cin, Cout]
    # a product for each sample, so that its rounding does not depend on the others
    y = torch.bmm(seen.flatten(1, 3), weight.expand(len(x), -1, -1)).unflatten(1, tuple(size))
    return y if bias is None else y + bias


def neighbours(x: Tensor, taps: Sequence[int], origin: Sequence[int], size: Sequence[int]) -> Tensor:
    """What the taps read at each position, side by side. [B, T, H, W, C] -> [B, *size, taps * C], zero outside x."""
    corners = [tuple(map(sum, zip(origin, tap, strict=True))) for tap in triples(taps)]  # where each tap's view starts
    first, last = ([pick(axis) for axis in zip(*corners, strict=True)] for pick in (min, max))
    before = [max(0, -start) for start in first]
    after = [max(0, start + n - N) for start, n, N in zip(last, size, x.shape[1:4], strict=True)]
    padded = F.pad(x, (0, 0, before[2], after[2], before[1], after[1], before[0], after[0]))
    views = []
    for corner in corners:
        t, h, w = (slice(b + c, b + c + n) for b, c, n in zip(before, corner, size, strict=True))
        views.append(padded[:, t, h, w])
    return torch.cat(views, dim=-1)


def triples(taps: Sequence[int]) -> list[Tap]:
    """A flat list of offsets as one (dt, dy, dx) for each tap."""
    return list(zip(taps[::3], taps[1::3], taps[2::3], strict=True))


def gate(pre: Tensor, activation: str = "gate") -> Tensor:
    """tanh(a) * sigmoid(b), a * sigmoid(b) or pre as it is; a, b: halves of the last axis. [..., 2C] -> [..., C]."""
    if activation == "none":
        return pre
    a, b = pre.chunk(2, dim=-1)
    return (torch.tanh(a) if activation == "gate" else a) * torch.sigmoid(b)


def gate_backward(pre: Tensor | None, grad_out: Tensor | None, grad_pre: Tensor | None, activation: str) -> Tensor:
    """The gradient at the sum before the activation, from those of both outputs. -> [..., Cout]."""
    through = grad_out
    if grad_out is not None and activation != "none":
        a, b = pre.chunk(2, dim=-1)
        s = torch.sigmoid(b)
        if activation == "gate":
            t = torch.tanh(a)
            through = torch.cat([grad_out * s * (1 - t * t), grad_out * t * s * (1 - s)], dim=-1)
        else:
            through = torch.cat([grad_out * s, grad_out * a * s * (1 - s)], dim=-1)
    if through is None or grad_pre is None:
        return grad_pre if through is None else through
    return through + grad_pre
