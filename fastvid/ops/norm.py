"""Normalisation per frame with gains and biases per sample, then ReLU and twice the size, in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvid.kernels.conditional_batch_norm import reference
from fastvid.kernels.conditional_batch_norm.reference import FrameMoments, Normed, NormGradients
from fastvid.ops import _cpu_norm
from fastvid.ops._op import Backend, lazy, never, op, triton

TRITON = "conditional_batch_norm.triton_gpu"


def _fake_moments(x) -> tuple[Tensor, Tensor]:
    shape, wide = (x.shape[1], x.shape[4]), reference.wide_dtype(x)
    return x.new_empty(shape, dtype=wide), x.new_empty(shape, dtype=wide)


def _fake_out(x: Tensor, upsample: bool) -> Tensor:
    B, T, H, W, C = x.shape
    return x.new_empty((B, T, 2 * H, 2 * W, C) if upsample else (B, T, H, W, C))


def _fake_backward(x, mean, var, gain, bias, grad_out, eps, relu, upsample, own, wanted) -> tuple[Tensor, ...]:
    given = (x, mean, var, gain, bias)
    return tuple(part.new_empty(part.shape if asked else (0,)) for part, asked in zip(given, wanted, strict=True))


def _keep_x_and_mean(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[0])


def _moments_backward(ctx, grad_mean: Tensor, grad_var: Tensor):
    x, mean = ctx.saved_tensors
    # a gradient of the gradient sees that the mean is x's own
    mean = reference.frame_moments(x).mean if torch.is_grad_enabled() else mean
    return reference.moments_backward(x, mean, grad_mean, grad_var)


@op(
    "(Tensor x) -> (Tensor mean, Tensor var)",
    backends=[
        triton(lazy(TRITON, "frame_moments"), lazy(TRITON, "why_not")),
        Backend("cpu", _cpu_norm.frame_moments, _cpu_norm.why_not),
        Backend("reference", reference.frame_moments, never),
    ],
    fake=_fake_moments,
    result=FrameMoments,
    backward=_moments_backward,
    setup_context=_keep_x_and_mean,
)
def frame_moments(x: Tensor) -> FrameMoments:
    """Mean and variance of every frame's channels over samples and pixels.

    x:       [B, T, H, W, C], floating, any strides.
    Returns: FrameMoments(mean [T, C], var [T, C]), float32 (float64 for float64), without cancellation however far x is
             from zero; var is biased, divided by B * H * W. Of an empty batch both are 0. Differentiable.
    Raises:  ValueError for another shape or dtype, or an axis without elements other than B.
    Source:  Clark et al. 2019, arXiv:1907.06571: batch normalisation "without reduction over the time axis".
    """
    _check_x("frame_moments", x)
    return (x,)


@op(
    "(Tensor x, Tensor mean, Tensor var, Tensor gain, Tensor bias, Tensor grad_out, float eps, bool relu,"
    " bool upsample, bool own, bool[] wanted)"
    " -> (Tensor grad_x, Tensor grad_mean, Tensor grad_var, Tensor grad_gain, Tensor grad_bias)",
    backends=[
        triton(lazy(TRITON, "conditional_norm_backward"), lazy(TRITON, "why_not")),
        Backend("cpu", _cpu_norm.conditional_norm_backward, _cpu_norm.why_not_backward),
        Backend("reference", reference.conditional_norm_backward, never),
    ],
    fake=_fake_backward,
    result=NormGradients,
)
def conditional_norm_backward(
    x: Tensor, mean: Tensor, var: Tensor, gain: Tensor, bias: Tensor, grad_out: Tensor, eps: float, relu: bool,
    upsample: bool, own: bool, wanted: Sequence[bool],
) -> NormGradients:  # fmt: skip
    """The gradients of conditional_norm: what autograd calls.

    x .. bias, eps, relu, upsample: as they were given to conditional_norm.
    grad_out: the gradient of its output.
    own:      mean and var are x's own moments, and the gradient of x is to go through them as well.
    wanted:   which of the five gradients to compute: of x, mean, var, gain and bias.
    Returns:  NormGradients(grad_x like x, grad_mean and grad_var [T, C], grad_gain and grad_bias [B, C]); sums in
              float32, float64 for float64. Where the ReLU's argument is not above 0 nothing passes.
    Raises:   ValueError as conditional_norm, or if `grad_out` is not the shape of its output.
    Source:   Ioffe & Szegedy 2015, arXiv:1502.03167, section 3, differentiated per frame.
    """
    mean, var, gain, bias = _settled("conditional_norm_backward", x, mean, var, gain, bias)
    B, T, H, W, C = x.shape
    shape = [B, T, 2 * H, 2 * W, C] if upsample else [*x.shape]
    if list(grad_out.shape) != shape:
        raise ValueError(f"conditional_norm_backward: `grad_out` must be {shape}, got {list(grad_out.shape)}.")
    return x, mean, var, gain, bias, grad_out, eps, relu, upsample, own, [*wanted]


def _gradients(ctx, given: tuple, grad_out: Tensor, own: bool, wanted: list[bool]) -> list[Tensor | None]:
    if not any(wanted):
        return [None] * 5
    # a gradient of the gradient is had from the definition, which torch can differentiate
    found = (
        reference.conditional_norm_backward(*given, grad_out, *ctx.options, own, wanted) if torch.is_grad_enabled()
        else conditional_norm_backward(*given, grad_out, *ctx.options, own, wanted, backend=ctx.backend)
    )  # fmt: skip
    return [grad if asked else None for grad, asked in zip(found, wanted, strict=True)]


def _keep_all(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _backward(ctx, grad_out: Tensor):
    return *_gradients(ctx, ctx.saved_tensors, grad_out, False, [*ctx.needs_input_grad[:5]]), None, None, None


@op(
    "(Tensor x, Tensor mean, Tensor var, Tensor gain, Tensor bias, float eps=1e-5, bool relu=True,"
    " bool upsample=False) -> Tensor",
    backends=[
        triton(lazy(TRITON, "conditional_norm"), lazy(TRITON, "why_not")),
        Backend("cpu", _cpu_norm.conditional_norm, _cpu_norm.why_not),
        Backend("reference", reference.conditional_norm, never),
    ],
    fake=lambda x, mean, var, gain, bias, eps, relu, upsample: (_fake_out(x, upsample),),
    result=Tensor,
    backward=_backward,
    setup_context=_keep_all,
)
def conditional_norm(
    x: Tensor, mean: Tensor, var: Tensor, gain: Tensor, bias: Tensor, eps: float = 1e-5, relu: bool = True,
    upsample: bool = False,
) -> Tensor:  # fmt: skip
    """Normalise every frame with given moments, scale and shift every sample, then ReLU and twice the size: one pass.

    x:          [B, T, H, W, C], floating, any strides (movedim makes this view of torch's layout).
    mean, var:  [T, C], floating: of the batch (see frame_moments) or running ones.
    gain, bias: [B, C], floating; out = (x - mean) / sqrt(var + eps) * gain + bias.
    relu:       negative values become 0. upsample: then twice as high and wide, bilinear between the centres of pixels,
                the edge's value beyond the edge: F.interpolate(scale_factor=2, mode="bilinear").
    Returns:    [B, T, H, W, C], or [B, T, 2H, 2W, C], in x's dtype; formed in float32 (float64 for float64) and rounded
                once. Differentiable in x, mean, var, gain and bias.
    Raises:     ValueError if shapes or devices disagree, or an axis other than B has no elements.
    Source:     Clark et al. 2019, arXiv:1907.06571 (class-conditional, per frame); Brock et al. 2018, arXiv:1809.11096.
    """
    return x, *_settled("conditional_norm", x, mean, var, gain, bias), eps, relu, upsample


def _keep_with_moments(ctx, inputs, output) -> None:
    (x, gain, bias, *options), (_, mean, var) = inputs, output
    ctx.save_for_backward(x, mean, var, gain, bias)
    ctx.options = options
    ctx.mark_non_differentiable(mean, var)


def _batch_backward(ctx, grad_out: Tensor, _mean, _var):
    x, mean, var, gain, bias = ctx.saved_tensors
    if torch.is_grad_enabled():
        mean, var = reference.frame_moments(x)
    of_x, of_gain, of_bias, *_ = ctx.needs_input_grad
    wanted = [of_x, False, False, of_gain, of_bias]
    to_x, _, _, to_gain, to_bias = _gradients(ctx, (x, mean, var, gain, bias), grad_out, True, wanted)
    return to_x, to_gain, to_bias, None, None, None


@op(
    "(Tensor x, Tensor gain, Tensor bias, float eps=1e-5, bool relu=True, bool upsample=False)"
    " -> (Tensor out, Tensor mean, Tensor var)",
    backends=[
        triton(lazy(TRITON, "conditional_batch_norm"), lazy(TRITON, "why_not")),
        Backend("cpu", _cpu_norm.conditional_batch_norm, _cpu_norm.why_not),
        Backend("reference", reference.conditional_batch_norm, never),
    ],
    fake=lambda x, gain, bias, eps, relu, upsample: (_fake_out(x, upsample), *_fake_moments(x)),
    result=Normed,
    backward=_batch_backward,
    setup_context=_keep_with_moments,
)
def conditional_batch_norm(
    x: Tensor, gain: Tensor, bias: Tensor, eps: float = 1e-5, relu: bool = True, upsample: bool = False
) -> Normed:
    """conditional_norm of x by its own frame_moments, in one call: a frame is normalised while it is in the caches.

    x, gain, bias, eps, relu, upsample: as there.
    Returns: Normed(out as there, mean [T, C], var [T, C] as frame_moments'). out is differentiable in x, through its
             moments too, gain and bias; mean and var are given for running statistics and have no gradient.
    Raises:  ValueError as there.
    Source:  Clark et al. 2019, arXiv:1907.06571.
    """
    _check_x("conditional_batch_norm", x)
    gain, bias = _per_sample("conditional_batch_norm", x, gain, bias)
    return x, gain, bias, eps, relu, upsample


def _settled(name: str, x: Tensor, mean: Tensor, var: Tensor, gain: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """The four small ones in the dtype of sums."""
    _check_x(name, x)
    moments = _small(name, x, (x.shape[1], x.shape[4]), mean=mean, var=var)
    return *moments, *_per_sample(name, x, gain, bias)


def _per_sample(name: str, x: Tensor, gain: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return _small(name, x, (x.shape[0], x.shape[4]), gain=gain, bias=bias)


def _small(name: str, x: Tensor, shape: tuple[int, int], **given: Tensor) -> tuple[Tensor, ...]:
    for word, tensor in given.items():
        if tensor.shape != shape or not tensor.is_floating_point() or tensor.device != x.device:
            raise ValueError(
                f"{name}: `{word}` must be floating {list(shape)} on {x.device} like `x`, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}."
            )
    return tuple(tensor.to(reference.wide_dtype(x)) for tensor in given.values())


def _check_x(name: str, x: Tensor) -> None:
    if x.ndim != 5 or not x.is_floating_point() or 0 in x.shape[1:]:
        raise ValueError(
            f"{name}: `x` must be floating [B, T, H, W, C] with T, H, W, C > 0, got {x.dtype} {list(x.shape)}; "
            "movedim(1, -1) makes it of torch's layout."
        )
