"""Spectral normalisation of many weights at once, and its gradient: the definition, in plain torch. See README.md."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def spectral_norm(
    weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], iterations: int, eps: float,
    dims: Sequence[int],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """Every W / sigma, the new u and v ([] without iterations) and sigma [L]; see fastvid.ops.spectral_norm."""
    out, left, right, sigmas = [], [], [], []
    for weight, a, b, dim in zip(weights, u, v, dims, strict=True):
        matrix = as_matrix(weight, dim).to(b.dtype)  # [rows, cols]
        for _ in range(iterations):
            a = F.normalize(matrix @ b, dim=0, eps=eps)
            b = F.normalize(matrix.T @ a, dim=0, eps=eps)
        sigmas.append(a @ (matrix @ b))
        out.append((weight.to(b.dtype) / sigmas[-1]).to(weight.dtype))
        left.append(a)
        right.append(b)
    sigma = torch.stack(sigmas) if sigmas else torch.empty(0)
    return out, left if iterations else [], right if iterations else [], sigma


def spectral_norm_backward(
    grads: Sequence[Tensor], weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], sigma: Tensor,
    dims: Sequence[int],
) -> tuple[list[Tensor]]:  # fmt: skip
    """The gradient of every weight: G / sigma - <G, W> / sigma^2 u v^T; see fastvid.ops.spectral_norm_backward."""
    found = []
    for grad, weight, a, b, s, dim in zip(grads, weights, u, v, sigma, dims, strict=True):
        matrix, given = (as_matrix(tensor, dim).to(b.dtype) for tensor in (weight, grad))  # [rows, cols]
        share = (given * matrix).sum() / s  # how far sigma moves W / sigma along itself
        moved = (given - share * torch.outer(a, b)) / s
        found.append(from_matrix(moved, weight, dim).to(weight.dtype))
    return (found,)


def sigmas(weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], dims: Sequence[int]) -> Tensor:
    """u^T W v of every weight, [L]: differentiable in the weights."""
    pairs = zip(weights, u, v, dims, strict=True)
    return torch.stack([a @ (as_matrix(weight, dim).to(b.dtype) @ b) for weight, a, b, dim in pairs])


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """[rows, cols]: axis `dim` first, the others behind it as they come."""
    return weight.movedim(dim, 0).flatten(1)


def from_matrix(matrix: Tensor, like: Tensor, dim: int) -> Tensor:
    """What as_matrix made a matrix of, in the shape of `like`."""
    return matrix.reshape(like.movedim(dim, 0).shape).movedim(0, dim)
