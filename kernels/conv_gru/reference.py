"""A convolutional GRU over the frames of a video, and its gradients: the definition, in plain torch. See README.md."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

ACTIVATIONS = ("relu", "tanh")


def conv_gru(
    gates: Tensor, hidden: Tensor | None, weight_gates: Tensor, weight_candidate: Tensor, steps: int, activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """states [B, steps, H, W, C] and kept [B, steps, H, W, 3C], [0] unless kept; see fastvid.ops.conv_gru."""
    B, _, H, W, _ = gates.shape
    start = gates.new_zeros(B, H, W, len(weight_candidate)) if hidden is None else hidden
    h = start.movedim(-1, 1)  # [B, C, H, W]
    states, kept = [], []
    for t in range(steps):
        from_r, from_u, from_c = gates[:, min(t, gates.shape[1] - 1)].movedim(-1, 1).chunk(3, dim=1)
        of_r, of_u = same_conv(h, weight_gates).chunk(2, dim=1)
        r, u = torch.sigmoid(from_r + of_r), torch.sigmoid(from_u + of_u)
        pre = from_c + same_conv(r * h, weight_candidate)
        c = torch.relu(pre) if activation == "relu" else torch.tanh(pre)
        h = u * h + (1 - u) * c
        states.append(h)
        kept.append(torch.cat([r, u, c], dim=1))
    return over_time(states), over_time(kept) if keep else gates.new_empty(0)


def conv_gru_backward(
    grad_states: Tensor | None, grad_kept: Tensor | None, hidden: Tensor | None, weight_gates: Tensor,
    weight_candidate: Tensor, states: Tensor, kept: Tensor, frames: int, activation: str, wanted: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of gates, hidden and both weights, [0] where not wanted; see fastvid.ops.conv_gru_backward."""
    start = torch.zeros_like(states[:, 0]) if hidden is None else hidden
    earlier = torch.cat([start[:, None], states[:, :-1]], dim=1)  # [B, T, H, W, C]
    r, u, c = kept.chunk(3, dim=-1)
    grad_states = torch.zeros_like(states) if grad_states is None else grad_states
    to_r, to_u, to_c = (torch.zeros_like(kept) if grad_kept is None else grad_kept).chunk(3, dim=-1)
    slope = (c > 0).to(c.dtype) if activation == "relu" else 1 - c * c
    carry, grads = torch.zeros_like(states[:, 0]).movedim(-1, 1), []  # carry: of the state before, [B, C, H, W]
    for t in reversed(range(states.shape[1])):
        whole = (grad_states, earlier, r, u, c, slope, to_r, to_u, to_c)
        grad, h, r_t, u_t, c_t, slope_t, *to = (tensor[:, t].movedim(-1, 1) for tensor in whole)
        grad = grad + carry
        at_c = (grad * (1 - u_t) + to[2]) * slope_t
        at_product = F.conv_transpose2d(at_c, weight_candidate, padding=weight_candidate.shape[-1] // 2)
        at_r = (at_product * h + to[0]) * r_t * (1 - r_t)
        at_u = (grad * (h - c_t) + to[1]) * u_t * (1 - u_t)
        at_gates = torch.cat([at_r, at_u], dim=1)
        back = F.conv_transpose2d(at_gates, weight_gates, padding=weight_gates.shape[-1] // 2)
        carry = grad * u_t + at_product * r_t + back
        grads.append(torch.cat([at_gates, at_c], dim=1))
    grad = over_time(grads[::-1])  # [B, T, H, W, 3C]
    found = [states.new_empty(0) for _ in wanted]
    if wanted[0]:
        found[0] = grad if frames == grad.shape[1] else grad.sum(dim=1, keepdim=True)
    if wanted[1]:
        found[1] = carry.movedim(1, -1).contiguous()
    C = states.shape[-1]
    if wanted[2]:
        found[2] = weight_gradient(earlier, grad[..., : 2 * C], weight_gates)
    if wanted[3]:
        found[3] = weight_gradient(r * earlier, grad[..., 2 * C :], weight_candidate)
    return tuple(found)


def same_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Zero-padded so that the size stays. [B, C, H, W] -> [B, Cout, H, W]."""
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def weight_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of same_conv's weight over all frames at once. x: [B, T, H, W, C]; grad: [B, T, H, W, Cout]."""
    images, grads = (tensor.flatten(0, 1).movedim(-1, 1) for tensor in (x, grad))
    return conv2d_weight(images, weight.shape, grads, padding=weight.shape[-1] // 2).contiguous()


def over_time(frames: list[Tensor]) -> Tensor:
    """T times [B, C, H, W] -> [B, T, H, W, C]."""
    return torch.stack([frame.movedim(1, -1) for frame in frames], dim=1)
