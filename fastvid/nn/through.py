"""Gradients past a quantiser: what reaches its input, as if choosing a code had been differentiable."""

import torch
from torch import Tensor

EPS = 1e-6  # shortest length that is divided by


def past_quantizer(x: Tensor, quantized: Tensor, distance: Tensor, rotate: bool) -> tuple[Tensor, Tensor]:
    """`quantized` and `distance` as they are, with gradients to x. One pass back serves both.

    x, quantized: [N, D], floating; distance: [N], their squared distance.
    rotate:       turn and scale the gradient of `quantized` as x itself would be to become its code; False hands it
                  to x as it is (straight through). That of `distance` is the true one.
    Returns:      (quantized, distance), exactly the values that came: a product with the rotation would round them, and
                  would turn a row of zeros, which has no direction, into zeros instead of its code.
    Source:       Bengio et al. 2013, arXiv:1308.3432; Fifty et al. 2024, arXiv:2410.06424, section 4.2, the rotation.
    """
    return _PastQuantizer.apply(x, quantized, distance, rotate)


class _PastQuantizer(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, quantized: Tensor, distance: Tensor, rotate: bool) -> tuple[Tensor, Tensor]:
        return quantized.view_as(quantized), distance.view_as(distance)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, quantized, _, ctx.rotate = inputs
        ctx.save_for_backward(x, quantized)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad: Tensor | None, grad_distance: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        x, code = (tensor.float() for tensor in ctx.saved_tensors)
        pull = None if grad_distance is None else 2 * grad_distance.float()[:, None]  # [N, 1]
        if grad is None:
            out = None if pull is None else (x - code) * pull
        elif not ctx.rotate:
            out = grad if pull is None else torch.addcmul(grad.float(), x - code, pull)
        else:
            g = grad.float()
            scale, of_x, of_code = _rotation(x, code, g)
            if pull is not None:
                of_x, of_code = of_x + pull, of_code - pull
            out = (g * scale).addcmul_(x, of_x).addcmul_(code, of_code)
        return None if out is None else out.to(ctx.saved_tensors[0].dtype), None, None, None


def _rotation(x: Tensor, code: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors [N, 1] of g, x and code in the gradient that the rotation hands to x.

    With u, v the directions of x and its code and w that of u + v, the rotation is s (I - 2 w w' + 2 v u'); its
    transpose takes g to s (g - 2 (w.g) w + 2 (v.g) u), and w is a sum of multiples of x and code.
    """
    length, code_length = x.norm(dim=1, keepdim=True).clamp(min=EPS), code.norm(dim=1, keepdim=True)
    scale, per_x, per_code = code_length / length, 1 / length, 1 / code_length.clamp(min=EPS)
    # not from the cosine of u and v: where they are opposite nothing would be left of it
    middle = (x * per_x).addcmul_(code, per_code).norm(dim=1, keepdim=True).clamp(min=EPS)
    g_u, g_v = (x * g).sum(dim=1, keepdim=True) * per_x, (code * g).sum(dim=1, keepdim=True) * per_code
    along = -2 * (g_u + g_v) / middle.square()
    return scale, scale * (along + 2 * g_v) * per_x, scale * along * per_code
