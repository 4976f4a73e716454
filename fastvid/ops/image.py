"""The 3 x 3 convolution of images, channels last."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvid.kernels.image_conv import reference
from fastvid.ops import _cpu_image
from fastvid.ops._autocast import autocast
from fastvid.ops._op import Backend, never, op


class ImageConvGradients(NamedTuple):
    """What image_conv_backward returns; [0] for what was not wanted."""

    grad_x: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


def _fake(x, weight, bias, residual) -> tuple[Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return (x.new_empty(*x.shape[:3], weight.shape[0], dtype=dtype),)


def _fake_backward(x, weight, grad, wanted) -> tuple[Tensor, ...]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if asked else (0,)) for shape, asked in zip(shapes, wanted, strict=True))


@op(
    "(Tensor x, Tensor weight, Tensor grad, bool[] wanted) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    backends=[
        Backend("cpu", _cpu_image.image_conv_backward, _cpu_image.why_not_backward, _cpu_image.unasked),
        Backend("reference", reference.image_conv_backward, never),
    ],
    fake=_fake_backward,
    result=ImageConvGradients,
)
def image_conv_backward(x: Tensor, weight: Tensor, grad: Tensor, wanted: Sequence[bool]) -> ImageConvGradients:
    """The gradients of image_conv: what autograd calls.

    x, weight: as they were given. grad: [N, H, W, Cout], of the output; the residual's own gradient is the same.
    wanted:    which of the three gradients to compute: of x, weight and bias.
    Returns:   ImageConvGradients(grad_x [N, H, W, Cin], grad_weight [Cout, Cin, 3, 3], grad_bias [Cout]).
    Raises:    ValueError if shapes disagree.
    Source:    the definition of the convolution, differentiated.
    """
    _check_shapes("image_conv_backward", x, weight)
    if grad.shape != (*x.shape[:3], weight.shape[0]):
        raise ValueError(
            f"image_conv_backward: `grad` must be {[*x.shape[:3], weight.shape[0]]}, got {list(grad.shape)}."
        )


def _keep_for_backward(ctx, inputs, output) -> None:
    x, weight, _bias, residual = inputs
    ctx.save_for_backward(x, weight)
    ctx.residual_type = None if residual is None else residual.dtype


def _backward(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    *wanted, residual_wanted = ctx.needs_input_grad
    grads, of_residual = [None] * 3, grad.to(ctx.residual_type) if residual_wanted else None
    if any(wanted):
        args = (x, weight, grad.to(x.dtype), wanted)
        # a gradient of the gradient is had from the definition, which torch can differentiate
        found = (
            reference.image_conv_backward(*args) if torch.is_grad_enabled()
            else image_conv_backward(*args, backend=ctx.backend)
        )  # fmt: skip
        grads = [gradient if asked else None for gradient, asked in zip(found, wanted, strict=True)]
    return *grads, of_residual


@op(
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor",
    backends=[
        Backend("cpu", _cpu_image.image_conv, _cpu_image.why_not, _cpu_image.unasked),
        Backend("reference", reference.image_conv, never),
    ],
    fake=_fake,
    result=Tensor,
    backward=_backward,
    setup_context=_keep_for_backward,
)
def image_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """torch's conv2d with a 3 x 3 kernel, stride 1 and padding 1, channels last, and a sum with it in the same pass.

    x:        [N, H, W, Cin], floating, any strides (movedim makes this view of torch's layout); zero outside.
    weight:   [Cout, Cin, 3, 3], torch's own. bias: [Cout] or None.
    residual: [N, H, W, Cout] or None, joins the output.
    Returns:  [N, H, W, Cout], dense; sums in float32, float64 for float64. On the CPU the products are Winograd's: as
              exact as conv2d by the largest error, but where x is not finite, all four outputs of a 2 x 2 square are
              not, and a value's rounding depends on the square it lies in. Under autocast all but the residual go to
              the lower precision, as in torch's convolutions.
    Raises:   ValueError if shapes, dtypes or devices disagree.
    Source:   Lavin and Gray 2015, arXiv:1509.09308, F(2x2, 3x3).
    """
    _check_shapes("image_conv", x, weight)
    Cout = weight.shape[0]
    for name, tensor, shape in (("bias", bias, [Cout]), ("residual", residual, [*x.shape[:3], Cout])):
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"image_conv: `{name}` must be {shape}, got {list(tensor.shape)}.")
    x, weight, bias = autocast(x, weight, bias)
    given = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
    if len({tensor.device for tensor in given}) > 1 or len({t.dtype for t in given if t is not residual}) > 1:
        told = ", ".join(f"{str(tensor.dtype)[6:]} on {tensor.device}" for tensor in given)
        raise ValueError(f"image_conv: one dtype and one device are wanted, got {told}; convert with .to().")
    return x, weight, bias, residual


def _check_shapes(who: str, x: Tensor, weight: Tensor) -> None:
    fits = x.ndim == weight.ndim == 4 and x.is_floating_point() and weight.shape[1:] == (x.shape[-1], 3, 3)
    if not fits or 0 in (*x.shape[1:], *weight.shape):
        raise ValueError(
            f"{who}: `x` must be floating [N, H, W, Cin] and `weight` [Cout, Cin, 3, 3], all but N at least 1, "
            f"got {list(x.shape)} {x.dtype} and {list(weight.shape)}."
        )
