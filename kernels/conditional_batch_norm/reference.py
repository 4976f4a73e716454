"""Normalisation with statistics of its own for every frame, and its gradients: the definition. See README.md."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class FrameMoments(NamedTuple):
    """What ops.frame_moments returns."""

    mean: Tensor  # [T, C]
    var: Tensor  # [T, C]


class Normed(NamedTuple):
    """What ops.conditional_batch_norm returns."""

    out: Tensor  # [B, T, H, W, C], or [B, T, 2H, 2W, C]
    mean: Tensor  # [T, C]
    var: Tensor  # [T, C]


class NormGradients(NamedTuple):
    """What ops.conditional_norm_backward returns; [0] for what was not wanted."""

    grad_x: Tensor
    grad_mean: Tensor
    grad_var: Tensor
    grad_gain: Tensor
    grad_bias: Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """What statistics and sums are held in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def positions(x: Tensor) -> int:
    """How many values of [B, T, H, W, C] a frame's statistics are made of."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def frame_moments(x: Tensor) -> FrameMoments:
    """Mean and biased variance [T, C] of x [B, T, H, W, C]; zeros of nothing. See fastvid.ops.frame_moments."""
    wide, count = x.to(wide_dtype(x)), max(1, positions(x))
    mean = wide.sum(dim=(0, 2, 3)) / count
    return FrameMoments(mean, (wide - _per_frame(mean)).square().sum(dim=(0, 2, 3)) / count)


def conditional_norm(
    x: Tensor, mean: Tensor, var: Tensor, gain: Tensor, bias: Tensor, eps: float, relu: bool, upsample: bool
) -> tuple[Tensor]:
    """out [B, T, H, W, C] or [B, T, 2H, 2W, C]; see fastvid.ops.conditional_norm."""
    out = _before_relu(x, mean, var, gain, bias, eps)
    out = out.relu() if relu else out
    out = enlarged(enlarged(out, 2), 3) if upsample else out
    return (out.to(x.dtype).contiguous(),)


def conditional_batch_norm(
    x: Tensor, gain: Tensor, bias: Tensor, eps: float, relu: bool, upsample: bool
) -> Normed:  # fmt: skip
    """conditional_norm with x's own moments, and these; see fastvid.ops.conditional_batch_norm."""
    mean, var = frame_moments(x)
    return Normed(*conditional_norm(x, mean, var, gain, bias, eps, relu, upsample), mean, var)


def conditional_norm_backward(
    x: Tensor, mean: Tensor, var: Tensor, gain: Tensor, bias: Tensor, grad_out: Tensor, eps: float, relu: bool,
    upsample: bool, own: bool, wanted: Sequence[bool],
) -> NormGradients:  # fmt: skip
    """Gradients of x, mean, var, gain and bias, [0] where not wanted; see fastvid.ops.conditional_norm_backward."""
    grad = grad_out.to(wide_dtype(x))
    grad = gathered(gathered(grad, 2), 3) if upsample else grad  # [B, T, H, W, C]
    if relu:
        grad = torch.where(_before_relu(x, mean, var, gain, bias, eps) <= 0, 0, grad)
    centred, scale = x.to(wide_dtype(x)) - _per_frame(mean), torch.rsqrt(var + eps)
    plain, weighted = grad.sum(dim=(2, 3)), (grad * centred).sum(dim=(2, 3))  # [B, T, C]
    to_mean, to_var, to_gain, to_bias = small_gradients(plain, weighted, gain, scale)
    to_x = grad * _per_sample(gain) * _per_frame(scale)
    if own:
        to_x = to_x + moments_backward(x.to(wide_dtype(x)), mean, to_mean, to_var)
    found = (to_x.to(x.dtype).contiguous(), to_mean, to_var, to_gain, to_bias)
    return NormGradients(*(part if asked else part.new_empty(0) for part, asked in zip(found, wanted, strict=True)))


def small_gradients(plain: Tensor, weighted: Tensor, gain: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """Gradients of mean, var [T, C], gain and bias [B, C] from two sums over each frame of each sample.

    plain, weighted: [B, T, C], of the gradient before the ReLU, and of its product with x - mean.
    gain, scale:     [B, C], and [T, C]: 1 / sqrt(var + eps).
    """
    to_mean = -(gain[:, None] * plain).sum(dim=0) * scale
    to_var = -0.5 * (gain[:, None] * weighted).sum(dim=0) * scale**3
    return to_mean, to_var, (weighted * scale).sum(dim=1), plain.sum(dim=1)


def moments_backward(x: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
    """The gradient at x [B, T, H, W, C] of its moments, given those at mean and var [T, C]."""
    centred, count = x.to(mean.dtype) - _per_frame(mean), max(1, positions(x))
    return (centred * _per_frame(2 / count * grad_var) + _per_frame(grad_mean / count)).to(x.dtype)


def enlarged(z: Tensor, axis: int) -> Tensor:
    """Twice as long along an axis, as torch's bilinear interpolation between the centres of pixels makes it."""
    before, after = _shifted(z, z, axis)
    return torch.stack([0.75 * z + 0.25 * before, 0.75 * z + 0.25 * after], dim=axis + 1).flatten(axis, axis + 1)


def gathered(grad: Tensor, axis: int) -> Tensor:
    """The transpose of `enlarged`: half as long along an axis."""
    even, odd = grad.unflatten(axis, (-1, 2)).unbind(axis + 1)
    # beyond an edge the edge itself was read, so what came out there is told to it a second time
    before, after = _shifted(even, odd, axis)
    return 0.75 * (even + odd) + 0.25 * (before + after)


def _shifted(even: Tensor, odd: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The odd value before and the even value after each place; at the edges the edge's own."""
    inner = even.shape[axis] - 1
    before = torch.cat([even.narrow(axis, 0, 1), odd.narrow(axis, 0, inner)], axis)
    return before, torch.cat([even.narrow(axis, 1, inner), odd.narrow(axis, inner, 1)], axis)


def _before_relu(x: Tensor, mean: Tensor, var: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    out = (x.to(wide_dtype(x)) - _per_frame(mean)) * _per_frame(torch.rsqrt(var + eps))
    return out * _per_sample(gain) + _per_sample(bias)


def _per_frame(value: Tensor) -> Tensor:
    return value[:, None, None]  # [T, 1, 1, C]


def _per_sample(value: Tensor) -> Tensor:
    return value[:, None, None, None]  # [B, 1, 1, 1, C]
