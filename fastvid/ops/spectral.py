"""Spectral normalisation of all weights of a network in one call."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvid.kernels.spectral_norm import reference
from fastvid.ops import _cpu_spectral
from fastvid.ops._op import Backend, lazy, never, op, triton

TRITON = "spectral_norm.triton_gpu"


class SpectralNormed(NamedTuple):
    """What spectral_norm returns."""

    out: list[Tensor]  # as the weights
    u: list[Tensor]  # [rows] each; [] without iterations
    v: list[Tensor]  # [cols] each; [] without iterations
    sigma: Tensor  # [L]


def _fake(weights, u, v, iterations, eps, dims) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    new = [[torch.empty_like(old) for old in pair] if iterations else [] for pair in (u, v)]
    sigma = u[0].new_empty(len(weights)) if u else torch.empty(0)
    return [torch.empty_like(weight) for weight in weights], *new, sigma


def _fake_backward(grads, weights, u, v, sigma, dims) -> tuple[list[Tensor]]:
    return ([torch.empty_like(weight) for weight in weights],)


@op(
    "(Tensor[] grads, Tensor[] weights, Tensor[] u, Tensor[] v, Tensor sigma, int[] dims) -> Tensor[] grad_weights",
    backends=[
        triton(lazy(TRITON, "spectral_norm_backward"), lazy(TRITON, "why_not_backward")),
        Backend("cpu", _cpu_spectral.spectral_norm_backward, _cpu_spectral.why_not_backward),
        Backend("reference", reference.spectral_norm_backward, never),
    ],
    fake=_fake_backward,
    result=list,
)
def spectral_norm_backward(
    grads: Sequence[Tensor], weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], sigma: Tensor,
    dims: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """The gradients of spectral_norm's weights, u and v taken as constants: what autograd calls.

    grads:   of the normalised weights, shaped as these. weights, dims: as they were given.
    u, v:    those that sigma [L] was computed from, u^T W v.
    Returns: G / sigma - <G, W> / sigma^2 u v^T for each weight, in its dtype; sums in float32, float64 for float64.
    Raises:  ValueError for lists of different lengths.
    Source:  Miyato et al. 2018, arXiv:1802.05957, eq. 12.
    """
    if not len(grads) == len(weights) == len(u) == len(v) == len(sigma) == len(dims):
        got = ", ".join(str(len(given)) for given in (grads, weights, u, v, sigma, dims))
        raise ValueError(f"spectral_norm_backward: one of each is wanted for every weight, got {got}; pass them all.")


def _keep_for_backward(ctx, inputs, output) -> None:
    weights, u, v, iterations, _eps, dims = inputs
    _, new_u, new_v, sigma = output
    ctx.mark_non_differentiable(*new_u, *new_v, sigma)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*weights, *(new_u if iterations else u), *(new_v if iterations else v), sigma)
    ctx.dims = dims


def _backward(ctx, grads: list[Tensor | None], *_):
    *saved, sigma = ctx.saved_tensors
    L = len(sigma)
    found, wanted = [None] * L, ctx.needs_input_grad[0]
    some = [i for i in range(L) if wanted[i] and grads[i] is not None]
    if some:
        chosen = [grads, saved[:L], saved[L : 2 * L], saved[2 * L :], ctx.dims]
        given, weights, u, v, dims = ([entry[i] for i in some] for entry in chosen)
        if torch.is_grad_enabled():
            # a gradient of the gradient is had from the definition, which torch can differentiate
            sigma = reference.sigmas(weights, u, v, dims)
            (made,) = reference.spectral_norm_backward(given, weights, u, v, sigma, dims)
        else:
            sigma = sigma if len(some) == L else sigma[some]
            made = spectral_norm_backward(given, weights, u, v, sigma, dims, backend=ctx.backend)
        for i, grad in zip(some, made, strict=True):
            found[i] = grad
    return found, [None] * L, [None] * L, None, None, None


@op(
    "(Tensor[] weights, Tensor[] u, Tensor[] v, int iterations, float eps, int[] dims)"
    " -> (Tensor[] out, Tensor[] u, Tensor[] v, Tensor sigma)",
    backends=[
        triton(lazy(TRITON, "spectral_norm"), lazy(TRITON, "why_not")),
        Backend("cpu", _cpu_spectral.spectral_norm, _cpu_spectral.why_not),
        Backend("reference", reference.spectral_norm, never),
    ],
    fake=_fake,
    result=SpectralNormed,
    backward=_backward,
    setup_context=_keep_for_backward,
)
def spectral_norm(
    weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], iterations: int = 1, eps: float = 1e-12,
    dims: Sequence[int] | None = None,
) -> SpectralNormed:  # fmt: skip
    """Every weight over its largest singular value, of which power iteration has an estimate: all weights in one call.

    weights:    floating, two axes or more, any strides; W below is [rows, cols], axis `dim` first, the others flat.
    u, v:       [rows] and [cols] for each, of unit length, float32 (float64 for float64 weights).
    iterations: how often u = normalize(W v), v = normalize(W^T u) before; 0 takes u and v as they are.
    eps:        the least length that normalize divides by. dims: the axis of rows, 0 for all by default.
    Returns:    SpectralNormed(out: W / sigma in W's shape and dtype; u, v: the new ones, [] without iterations; sigma
                [L]: u^T W v). Sums are float32 (float64 for float64), under autocast too. The gradient goes through
                sigma to the weights and takes u and v as constants; sigma, u and v have none.
    Raises:     ValueError if lengths, shapes, dtypes or devices disagree.
    Source:     Miyato et al. 2018, arXiv:1802.05957, algorithm 1 and eq. 12.
    """
    dims = [0] * len(weights) if dims is None else [*dims]
    if not len(weights) == len(u) == len(v) == len(dims):
        got = f"{len(weights)} weights, {len(u)} u, {len(v)} v and {len(dims)} dims"
        raise ValueError(f"spectral_norm: every weight wants a u, a v and a dim, got {got}; pass as many of each.")
    if iterations < 0:
        raise ValueError(f"spectral_norm: `iterations` must be 0 or more, got {iterations}.")
    held = torch.float64 if weights and weights[0].dtype == torch.float64 else torch.float32
    for i, (weight, a, b, dim) in enumerate(zip(weights, u, v, dims, strict=True)):
        if weight.ndim < 2 or not 0 <= dim < weight.ndim or not weight.is_floating_point():
            raise ValueError(
                f"spectral_norm: weight {i} must be floating with two axes or more, {dim} one of them, "
                f"got {list(weight.shape)} {weight.dtype}."
            )
        rows = weight.shape[dim]
        if a.shape != (rows,) or b.shape != (weight.numel() // max(rows, 1),):
            wanted = f"u [{rows}] and v [{weight.numel() // max(rows, 1)}]"
            raise ValueError(f"spectral_norm: weight {i} wants {wanted}, got {list(a.shape)} and {list(b.shape)}.")
        if not a.dtype == b.dtype == held or (weight.dtype == torch.float64) != (held == torch.float64):
            raise ValueError(
                f"spectral_norm: u and v must be float32 (all float64 where the weights are), "
                f"got {a.dtype} and {b.dtype} with weight {i} {weight.dtype}."
            )
        if not weight.device == a.device == b.device == weights[0].device:
            raise ValueError(
                f"spectral_norm: one device is wanted, got {a.device} and {b.device} with weight {i} on "
                f"{weight.device}; convert with .to()."
            )
    return [*weights], [*u], [*v], int(iterations), eps, dims
