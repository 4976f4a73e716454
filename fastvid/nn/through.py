"""Gradients past a quantiser: what reaches its input, as if quantising had been differentiable."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # shortest length that is divided by


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """`quantized`, whose gradient reaches x unchanged.

    x, quantized: [..., D], floating, of one shape.
    Returns:      [..., D] in quantized's dtype, exactly its values.
    Source:       Bengio et al. 2013, arXiv:1308.3432; van den Oord et al. 2017, arXiv:1711.00937.
    """
    return _Straight.apply(x, quantized)


def rotated_through(x: Tensor, quantized: Tensor) -> Tensor:
    """`quantized`, whose gradient reaches x turned and scaled as x itself would be to become its code.

    x, quantized: [..., D], floating, of one shape.
    Returns:      [..., D] in quantized's dtype, exactly its values (a product with the rotation would round them, and
                  turn a row of zeros, which has no direction, into zeros instead of its code).
    Source:       Fifty et al. 2024, arXiv:2410.06424, section 4.2.
    """
    return _Rotated.apply(x, quantized)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        x, quantized = (tensor.float() for tensor in ctx.saved_tensors)
        g = grad.float()
        length, code_length = x.norm(dim=-1, keepdim=True).clamp(min=EPS), quantized.norm(dim=-1, keepdim=True)
        u, v = x / length, quantized / code_length.clamp(min=EPS)
        w = F.normalize(u + v, dim=-1, eps=EPS)
        # the transpose of  scale (I - 2 w w' + 2 v u'),  the reflections that take u to v
        turned = g - 2 * _dot(w, g) * w + 2 * _dot(v, g) * u
        return (turned * (code_length / length)).to(ctx.saved_tensors[0].dtype), None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=-1, keepdim=True)
