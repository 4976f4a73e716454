"""The 3 x 3 convolution of images, channels last, and its gradients: the definition, in plain torch. See README.md."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GEOMETRY = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, not transposed, its padding, groups


def image_conv(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> tuple[Tensor]:
    """out [N, H, W, Cout]; see fastvid.ops.image_conv."""
    out = F.conv2d(x.movedim(-1, 1), weight, bias, padding=1).movedim(1, -1)
    return ((out if residual is None else out + residual).contiguous(),)


def image_conv_backward(
    x: Tensor, weight: Tensor, grad: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, [0] where not wanted; see fastvid.ops.image_conv_backward."""
    of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
        grad.movedim(-1, 1), x.movedim(-1, 1), weight, [weight.shape[0]], *GEOMETRY, [*wanted]
    )
    found = (None if of_x is None else of_x.movedim(1, -1), of_weight, of_bias)
    # for the bias's sake torch may compute the weight's as well
    return tuple(g.contiguous() if asked else x.new_empty(0) for g, asked in zip(found, wanted, strict=True))
