"""Masked causal convolution as a list of live taps, with the gated activation in the same pass."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvid.kernels.gated_causal_conv import reference
from fastvid.kernels.gated_causal_conv.reference import ACTIVATIONS, Tap
from fastvid.ops import _cpu_conv
from fastvid.ops._autocast import autocast
from fastvid.ops._op import Backend, lazy, never, op, triton

TRITON = "gated_causal_conv.triton_gpu"
Grid = tuple[int, int, int]  # T, H, W


class Gated(NamedTuple):
    """What gated_causal_conv returns."""

    out: Tensor  # [B, T, H, W, C]
    pre: Tensor  # [B, T, H, W, Cout], or [0]


class ConvGradients(NamedTuple):
    """What gated_causal_conv_backward returns; [0] for what was not wanted."""

    grad_x: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    grad_addend: Tensor


def _fake(x, weight, bias, taps, addend, residual, activation, origin, size, keep) -> tuple[Tensor, Tensor]:
    grid, Cout = (x.shape[0], *size), weight.shape[2]
    dtype = x.dtype if residual is None else residual.dtype
    out = x.new_empty(*grid, Cout if activation == "none" else Cout // 2, dtype=dtype)
    return out, x.new_empty(*grid, Cout) if keep and activation != "none" else x.new_empty(0)


def _fake_backward(x, weight, pre, grad_out, grad_pre, taps, activation, origin, wanted) -> tuple[Tensor, ...]:
    given = grad_pre if grad_out is None else grad_out
    grid, Cout = given.shape[:4], weight.shape[2]
    shapes = (x.shape, weight.shape, (Cout,), (*grid, Cout))
    return tuple(x.new_empty(shape if asked else (0,)) for shape, asked in zip(shapes, wanted, strict=True))


@op(
    "(Tensor x, Tensor weight, Tensor? pre, Tensor? grad_out, Tensor? grad_pre, int[] taps, str activation,"
    " SymInt[] origin, bool[] wanted) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_addend)",
    backends=[
        triton(lazy(TRITON, "gated_causal_conv_backward"), lazy(TRITON, "why_not_backward")),
        Backend("cpu", _cpu_conv.gated_causal_conv_backward, _cpu_conv.why_not_backward),
        Backend("reference", reference.gated_causal_conv_backward, never),
    ],
    fake=_fake_backward,
    result=ConvGradients,
)
def gated_causal_conv_backward(
    x: Tensor, weight: Tensor, pre: Tensor | None, grad_out: Tensor | None, grad_pre: Tensor | None,
    taps: Sequence[int], activation: str, origin: Sequence[int], wanted: Sequence[bool],
) -> ConvGradients:  # fmt: skip
    """The gradients of gated_causal_conv: what autograd calls.

    x, weight, activation, origin: as they were given. taps: the offsets one after the other, in one flat list.
    pre:       what gated_causal_conv kept; None for activation "none".
    grad_out:  gradient of `out`; grad_pre: of `pre`; one of them may be None.
    wanted:    which of the four gradients to compute: of x, weight, bias and addend.
    Returns:   ConvGradients(grad_x [B, T, H, W, Cin], grad_weight [taps, Cin, Cout], grad_bias [Cout], grad_addend
               [B, *size, Cout]); sums in float32, float64 for float64.
    Raises:    ValueError if there is no gradient to start from, or no `pre` where the activation asks for it.
    Source:    van den Oord et al. 2016, arXiv:1606.05328, eq. 2, differentiated.
    """
    if grad_out is None and grad_pre is None:
        raise ValueError("gated_causal_conv_backward: both `grad_out` and `grad_pre` are None; pass at least one.")
    if grad_out is not None and activation != "none" and pre is None:
        raise ValueError(f"gated_causal_conv_backward: activation {activation!r} needs `pre`; keep it with keep=True.")


def _keep_for_backward(ctx, inputs, output) -> None:
    x, weight, _bias, taps, _addend, _residual, activation, origin, _size, _keep = inputs
    _, pre = output
    ctx.save_for_backward(x, weight, None if activation == "none" else pre)
    ctx.taps, ctx.activation, ctx.origin = taps, activation, origin
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, grad_pre: Tensor | None):
    x, weight, pre = ctx.saved_tensors
    grad_pre = None if pre is None else grad_pre  # nobody computes anything of the empty one
    x_wanted, weight_wanted, bias_wanted, _, addend_wanted, residual_wanted, *_ = ctx.needs_input_grad
    wanted, grads = [x_wanted, weight_wanted, bias_wanted, addend_wanted], [None] * 4
    if any(wanted) and not (grad_out is None and grad_pre is None):
        args = (x, weight, pre, grad_out, grad_pre, ctx.taps, ctx.activation, ctx.origin, wanted)
        # a gradient of the gradient is had from the definition, which torch can differentiate
        found = (
            reference.gated_causal_conv_backward(*args) if torch.is_grad_enabled()
            else gated_causal_conv_backward(*args, backend=ctx.backend)
        )  # fmt: skip
        grads = [grad if asked else None for grad, asked in zip(found, wanted, strict=True)]
    to_x, to_weight, to_bias, to_addend = grads
    return to_x, to_weight, to_bias, None, to_addend, grad_out if residual_wanted else None, None, None, None, None


@op(
    "(Tensor x, Tensor weight, Tensor? bias, int[] taps, Tensor? addend, Tensor? residual, str activation,"
    " SymInt[] origin, SymInt[] size, bool keep) -> (Tensor out, Tensor pre)",
    backends=[
        triton(lazy(TRITON, "gated_causal_conv"), lazy(TRITON, "why_not")),
        Backend("cpu", _cpu_conv.gated_causal_conv, _cpu_conv.why_not),
        Backend("reference", reference.gated_causal_conv, never),
    ],
    fake=_fake,
    result=Gated,
    backward=_backward,
    setup_context=_keep_for_backward,
)
def gated_causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, taps: Sequence[Tap], addend: Tensor | None = None,
    residual: Tensor | None = None, activation: str = "gate", origin: Grid = (0, 0, 0), size: Grid | None = None,
    keep: bool = False,
) -> Gated:  # fmt: skip
    """Convolution that reads only the listed neighbours, and its gate: no masked weights, no padding, no other pass.

    x:          [B, T, H, W, Cin], floating, any strides (movedim makes this view of torch's layout); zero outside.
    weight:     [taps, Cin, Cout], any strides. bias: [Cout] or None.
    taps:       (dt, dy, dx) per weight slice, the neighbour's offset; dt <= 0. The caller's list decides causality.
    addend:     [B, *size, Cout] or None, joins the sum before the activation: a conditioning, or what one stream tells
                another. Any strides, so `expand` makes one that is the same everywhere for nothing.
    residual:   [B, *size, C] or None, joins the output. Its dtype is the output's.
    activation: "gate", tanh(a) * sigmoid(b); "glu", a * sigmoid(b); a and b are the halves of Cout, so C = Cout / 2.
                "none": the sum as it is, C = Cout.
    origin, size: output p reads x at origin + p + tap, for p over a grid of this size; by default x's own grid. With
                them a row of a frame, or what is new behind a cache, is computed alone.
    keep:       whether `pre` is wanted; it is also kept where a gradient will need it.
    Returns:    Gated(out [B, *size, C], pre [B, *size, Cout]: the sum before the activation, or [0]). Sums are float32
                (float64 for float64); a position's value depends on nothing but what its taps read. Under autocast all
                but the residual go to the lower precision, as in torch's convolutions.
    Raises:     ValueError if shapes, dtypes or devices disagree, or a tap looks into a later frame.
    Source:     van den Oord et al. 2016, arXiv:1606.05328, eq. 2, without the mask's zeros.
    """
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"gated_causal_conv: `activation` must be one of {known}, got {activation!r}.")
    if any(dt > 0 for dt, _, _ in taps):
        raise ValueError(f"gated_causal_conv: `taps` must have dt <= 0, later frames are unknown; got {tuple(taps)}.")
    x, weight, bias, addend = autocast(x, weight, bias, addend)
    size = [*x.shape[1:4]] if size is None else [*size]
    _check_shapes(x, weight, bias, len(taps), addend, residual, activation, size)
    given = [tensor for tensor in (x, weight, bias, addend, residual) if tensor is not None]
    if len({tensor.device for tensor in given}) > 1 or len({t.dtype for t in given if t is not residual}) > 1:
        told = ", ".join(f"{str(tensor.dtype)[6:]} on {tensor.device}" for tensor in given)
        raise ValueError(f"gated_causal_conv: one dtype and one device are wanted, got {told}; convert with .to().")
    keep = keep or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
    flat = [offset for tap in taps for offset in tap]
    return x, weight, bias, flat, addend, residual, activation, [*origin], size, keep


def _check_shapes(x, weight, bias, taps: int, addend, residual, activation: str, size: list[int]) -> None:
    if x.ndim != 5 or not x.is_floating_point() or weight.ndim != 3 or weight.shape[:2] != (taps, x.shape[-1]):
        raise ValueError(
            f"gated_causal_conv: `x` must be floating [B, T, H, W, Cin] and `weight` [{taps} taps, Cin, Cout], "
            f"got {list(x.shape)} {x.dtype} and {list(weight.shape)}."
        )
    Cout, grid = weight.shape[2], [x.shape[0], *size]
    if activation != "none" and Cout % 2:
        raise ValueError(f"gated_causal_conv: {activation!r} takes an even Cout (two halves), got {Cout}.")
    C = Cout if activation == "none" else Cout // 2
    wanted = {"bias": (bias, [Cout]), "addend": (addend, [*grid, Cout]), "residual": (residual, [*grid, C])}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"gated_causal_conv: `{name}` must be {shape}, got {list(tensor.shape)}.")


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, taps: Sequence[Tap], *, addend: Tensor | None = None,
    residual: Tensor | None = None, origin: Grid = (0, 0, 0), size: Grid | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """gated_causal_conv without an activation: the masked convolution alone. -> [B, *size, Cout].

    Arguments, errors and source as there.
    """
    done = gated_causal_conv(
        x, weight, bias, taps, addend, residual, activation="none", origin=origin, size=size, backend=backend
    )
    return done.out


def gate(pre: Tensor, activation: str = "gate") -> Tensor:
    """tanh(a) * sigmoid(b), or a * sigmoid(b) for "glu", a and b the first and second half of the channels.

    pre:     [..., 2C], floating.
    Returns: [..., C].
    Raises:  ValueError for an odd number of channels.
    Source:  van den Oord et al. 2016, arXiv:1606.05328, eq. 2.
    """
    if pre.shape[-1] % 2:
        raise ValueError(f"gate: the last axis must be even (two halves), got {list(pre.shape)}.")
    return reference.gate(pre, activation)
