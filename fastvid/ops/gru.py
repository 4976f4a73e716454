"""A convolutional GRU over the frames of a video: what its input adds is given, what its state adds is computed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvid.kernels.conv_gru import reference
from fastvid.kernels.conv_gru.reference import ACTIVATIONS
from fastvid.ops import _cpu_gru
from fastvid.ops._autocast import autocast
from fastvid.ops._op import Backend, lazy, never, op, triton

TRITON = "conv_gru.triton_gpu"


class ConvGRUStates(NamedTuple):
    """What conv_gru returns."""

    states: Tensor  # [B, T, H, W, C]
    kept: Tensor  # [B, T, H, W, 3C], or [0]


class ConvGRUGradients(NamedTuple):
    """What conv_gru_backward returns; [0] for what was not wanted."""

    grad_gates: Tensor
    grad_hidden: Tensor
    grad_weight_gates: Tensor
    grad_weight_candidate: Tensor


def _fake(gates, hidden, weight_gates, weight_candidate, steps, activation, keep) -> tuple[Tensor, Tensor]:
    B, _, H, W, three = gates.shape
    states = gates.new_empty(B, steps, H, W, weight_candidate.shape[0])
    return states, gates.new_empty(B, steps, H, W, three) if keep else gates.new_empty(0)


def _fake_backward(
    grad_states, grad_kept, hidden, weight_gates, weight_candidate, states, kept, frames, activation, wanted
) -> tuple[Tensor, ...]:
    B, _, H, W, C = states.shape
    shapes = ((B, frames, H, W, 3 * C), (B, H, W, C), weight_gates.shape, weight_candidate.shape)
    return tuple(states.new_empty(shape if asked else (0,)) for shape, asked in zip(shapes, wanted, strict=True))


@op(
    "(Tensor? grad_states, Tensor? grad_kept, Tensor? hidden, Tensor weight_gates, Tensor weight_candidate,"
    " Tensor states, Tensor kept, SymInt frames, str activation, bool[] wanted)"
    " -> (Tensor grad_gates, Tensor grad_hidden, Tensor grad_weight_gates, Tensor grad_weight_candidate)",
    backends=[
        triton(lazy(TRITON, "conv_gru_backward"), lazy(TRITON, "why_not_backward")),
        Backend("cpu", _cpu_gru.conv_gru_backward, _cpu_gru.why_not_backward),
        Backend("reference", reference.conv_gru_backward, never),
    ],
    fake=_fake_backward,
    result=ConvGRUGradients,
)
def conv_gru_backward(
    grad_states: Tensor | None, grad_kept: Tensor | None, hidden: Tensor | None, weight_gates: Tensor,
    weight_candidate: Tensor, states: Tensor, kept: Tensor, frames: int, activation: str, wanted: Sequence[bool],
) -> ConvGRUGradients:  # fmt: skip
    """The gradients of conv_gru: what autograd calls.

    grad_states, grad_kept: gradients of `states` and `kept`; one of them may be None.
    hidden, weight_gates, weight_candidate, activation: as they were given.
    states, kept: what conv_gru returned with keep=True.
    frames:    of the gates that were given: T, or 1 where they stood for every frame; their gradient is summed then.
    wanted:    which of the four gradients to compute: of gates, hidden, weight_gates and weight_candidate.
    Returns:   ConvGRUGradients(grad_gates [B, frames, H, W, 3C], grad_hidden [B, H, W, C], grad_weight_gates
               [2C, C, k, k], grad_weight_candidate [C, C, k, k]).
    Raises:    ValueError if there is no gradient to start from, or nothing was kept.
    Source:    Ballas et al. 2016, arXiv:1511.06432, eq. 6 to 9, differentiated.
    """
    if grad_states is None and grad_kept is None:
        raise ValueError("conv_gru_backward: both `grad_states` and `grad_kept` are None; pass at least one.")
    if list(kept.shape) != [*states.shape[:-1], 3 * states.shape[-1]]:
        raise ValueError(
            f"conv_gru_backward: `kept` must be {[*states.shape[:-1], 3 * states.shape[-1]]} as conv_gru returns it "
            f"with keep=True, got {list(kept.shape)}."
        )


def _keep_for_backward(ctx, inputs, output) -> None:
    gates, hidden, weight_gates, weight_candidate, _steps, activation, _keep = inputs
    ctx.save_for_backward(hidden, weight_gates, weight_candidate, *output)
    ctx.frames, ctx.activation = gates.shape[1], activation
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_states: Tensor | None, grad_kept: Tensor | None):
    wanted, grads = [*ctx.needs_input_grad[:4]], [None] * 4
    if any(wanted) and not (grad_states is None and grad_kept is None):
        args = (grad_states, grad_kept, *ctx.saved_tensors, ctx.frames, ctx.activation, wanted)
        # a gradient of the gradient is had from the definition, which torch can differentiate
        found = (
            reference.conv_gru_backward(*args) if torch.is_grad_enabled()
            else conv_gru_backward(*args, backend=ctx.backend)
        )  # fmt: skip
        grads = [grad if asked else None for grad, asked in zip(found, wanted, strict=True)]
    return *grads, None, None, None


@op(
    "(Tensor gates, Tensor? hidden, Tensor weight_gates, Tensor weight_candidate, SymInt steps, str activation,"
    " bool keep) -> (Tensor states, Tensor kept)",
    backends=[
        triton(lazy(TRITON, "conv_gru"), lazy(TRITON, "why_not")),
        Backend("cpu", _cpu_gru.conv_gru, _cpu_gru.why_not),
        Backend("reference", reference.conv_gru, never),
    ],
    fake=_fake,
    result=ConvGRUStates,
    backward=_backward,
    setup_context=_keep_for_backward,
)
def conv_gru(
    gates: Tensor, hidden: Tensor | None, weight_gates: Tensor, weight_candidate: Tensor, steps: int,
    activation: str = "relu", keep: bool = False,
) -> ConvGRUStates:  # fmt: skip
    """The states of a convolutional GRU at every frame, given what its input adds to the gates.

    r = sigmoid(gates_r + Wr * h), u = sigmoid(gates_u + Wu * h), c = activation(gates_c + Wc * (r . h)), and the next
    state is u . h + (1 - u) . c; '*' is a convolution zero-padded to keep the size, h the state before.

    gates:      [B, T, H, W, 3C], floating, any strides: the input's share of r, u and c, in this order, bias included.
                [B, 1, H, W, 3C] where it is the same at every frame.
    hidden:     [B, H, W, C], the state before the first frame, or None for zeros.
    weight_gates, weight_candidate: [2C, C, k, k] (r, then u) and [C, C, k, k], k odd, as nn.Conv2d has them.
    steps:      T, how many frames to go.
    activation: of the candidate c, "relu" or "tanh".
    keep:       whether r, u and c are wanted; they are also kept where a gradient will need them.
    Returns:    ConvGRUStates(states [B, T, H, W, C], kept [B, T, H, W, 3C]: r, u and c, or [0]). The kernels' sums are
                float32; a state is rounded to its dtype before the next frame reads it, so frames one by one equal all
                at once. Under autocast everything goes to the lower precision, as in torch's convolutions.
    Raises:     ValueError if shapes, dtypes or devices disagree.
    Source:     Ballas et al. 2016, arXiv:1511.06432, eq. 6 to 9; u keeps the old state, as in DVD-GAN (Clark et al.
                2019, arXiv:1907.06571).
    """
    if activation not in ACTIVATIONS:
        known = " or ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"conv_gru: `activation` must be {known}, got {activation!r}.")
    gates, hidden, weight_gates, weight_candidate = autocast(gates, hidden, weight_gates, weight_candidate)
    _check_shapes(gates, hidden, weight_gates, weight_candidate, steps)
    given = [tensor for tensor in (gates, hidden, weight_gates, weight_candidate) if tensor is not None]
    if len({tensor.device for tensor in given}) > 1 or len({tensor.dtype for tensor in given}) > 1:
        told = ", ".join(f"{str(tensor.dtype)[6:]} on {tensor.device}" for tensor in given)
        raise ValueError(f"conv_gru: one dtype and one device are wanted, got {told}; convert with .to().")
    keep = keep or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
    return gates, hidden, weight_gates, weight_candidate, steps, activation, keep


def _check_shapes(gates, hidden, weight_gates, weight_candidate, steps: int) -> None:
    C, k = weight_candidate.shape[0], weight_candidate.shape[-1]
    if weight_candidate.ndim != 4 or [*weight_candidate.shape] != [C, C, k, k] or not C or k % 2 == 0:
        raise ValueError(
            f"conv_gru: `weight_candidate` must be [C, C, k, k] with k odd, got {list(weight_candidate.shape)}."
        )
    if [*weight_gates.shape] != [2 * C, C, k, k]:
        raise ValueError(f"conv_gru: `weight_gates` must be {[2 * C, C, k, k]}, got {list(weight_gates.shape)}.")
    if gates.ndim != 5 or not gates.is_floating_point() or gates.shape[-1] != 3 * C:
        raise ValueError(
            f"conv_gru: `gates` must be floating [B, T or 1, H, W, {3 * C}], got {list(gates.shape)} {gates.dtype}."
        )
    if steps < 1 or gates.shape[1] not in (1, steps):
        raise ValueError(
            f"conv_gru: `steps` must be 1 or more and `gates` have as many frames, or one; got {steps} steps and "
            f"{gates.shape[1]} frames."
        )
    if hidden is not None and [*hidden.shape] != [gates.shape[0], *gates.shape[2:4], C]:
        wanted = [gates.shape[0], *gates.shape[2:4], C]
        raise ValueError(f"conv_gru: `hidden` must be {wanted}, got {list(hidden.shape)}.")
