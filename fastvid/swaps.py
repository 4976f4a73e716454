"""Swaps the layers of popular packages inside a live model for fastvid's, and says what it did.

    report = fastvid.accelerate(model)
    print(report)

No package is imported: a quantiser or axial attention is known by the name of its class. A masked convolution is known
by what it holds, as most are written by hand, and by what it computes: old and new run once on random numbers.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvid.nn import DenseMasked, DenseMaskedConv2d, DenseMaskedConv3d, VectorQuantize
from fastvid.nn.axial import AxialAttention, AxisAttention, PreNorm, SelfAttention


@dataclass
class Report:
    """What `accelerate` did; printed, it is a line for each layer."""

    module: nn.Module  # the model: the one that was given, unless that was itself a layer to swap
    given: nn.Module
    swapped: dict[str, str] = field(default_factory=dict)  # name in the model -> what for what
    left: dict[str, str] = field(default_factory=dict)  # name in the model -> what, and why

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)}, left {len(self.left)}"]
        lines += [f"  swapped {name or '(the model itself)'}: {what}" for name, what in self.swapped.items()]
        lines += [f"  left    {name or '(the model itself)'}: {why}" for name, why in self.left.items()]
        if self.module is not self.given:
            lines.append("the model itself was swapped, which cannot be done in place: go on with report.module")
        return "\n".join(lines)


def accelerate(module: nn.Module) -> Report:
    """Swap every layer that fastvid replaces, in place; the others stay as they are.

    module:  any model, on any device, in training or not. Parameters and buffers remain the same tensors under the same
             names, so optimizers and state dicts stay valid (only a codebook in half precision becomes float32); hooks
             and training flags are kept. What holds a layer in ways that modules do not know of, such as a plain list
             or a captured graph, still holds the old one. Weights that a convolution's mask hides are no longer
             computed with, nor overwritten by zeros, and their gradient is zero.
    Returns: Report, with the model as `module`: where `module` itself is such a layer, the caller must use that one.
             A layer with an option that ours does not take stays, with the reason.
    Raises:  TypeError for what is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"accelerate: wanted a torch.nn.Module, got {type(module).__name__}; pass the model.")
    report = Report(module, module)
    made: dict[int, nn.Module] = {}  # what stands for an old module, by the old one's id: shared layers stay shared
    for name, layer in [*module.named_modules(remove_duplicate=False)]:
        swap = next((s for s in SWAPS if s.finds(layer)), None)
        if swap is None or any(name.startswith(f"{whole}." if whole else "") for whole in report.swapped):
            continue  # not for us, or a part of what was swapped
        old = f"{swap.package(layer)} {type(layer).__name__}"
        if id(layer) not in made and (reason := swap.why_not(layer)):
            report.left[name] = f"{old}: {reason}"
            continue
        new = made.get(id(layer)) or made.setdefault(id(layer), _in_place_of(layer, swap.make(layer, made)))
        report.swapped[name] = f"{old} -> {type(new).__module__.split('.')[0]}.nn.{type(new).__name__}"
        if name:
            parent, _, leaf = name.rpartition(".")
            module.get_submodule(parent)._modules[leaf] = new
        else:
            report.module = new
    return report


class Swap(NamedTuple):
    """One kind of layer that ours can stand for."""

    finds: Callable[[nn.Module], bool]
    package: Callable[[nn.Module], str]  # where a layer that was found comes from
    why_not: Callable[[nn.Module], str | None]  # why this very layer stays; None if ours can stand for it
    make: Callable[[nn.Module, dict], nn.Module]  # ours, holding its tensors and modules


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _in_place_of(old: nn.Module, new: nn.Module) -> nn.Module:
    """`new` with the hooks and the training flag of `old`."""
    new.training = old.training
    for name, value in vars(old).items():
        # the same dictionaries, so that handles which were given out still remove their hooks
        if "_hook" in name and name in vars(new):
            new.__dict__[name] = value
    return new


# ---- vector-quantize-pytorch

_VECTOR_QUANTIZE = "vector_quantize_pytorch.vector_quantize_pytorch.VectorQuantize"


def _is_vector_quantize(layer: nn.Module) -> bool:
    return any(_name(base) == _VECTOR_QUANTIZE for base in type(layer).__mro__)


def _vector_quantize_why_not(layer: nn.Module) -> str | None:
    if _name(type(layer)) != _VECTOR_QUANTIZE:
        return "it is a subclass, which may do otherwise"
    try:
        used = [option for option, asks in _asked_of(layer).items() if asks]
    except AttributeError as error:
        return f"it is not of a version that is known here ({error}); 1.32 is"
    return f"uses {', '.join(used)}, which fastvid.nn.VectorQuantize does not take" if used else None


def _asked_of(layer: nn.Module) -> dict[str, bool]:
    """Which of the options that ours does not take a layer was made with."""
    book = layer._codebook
    sampling = book.gumbel_sample.keywords if isinstance(book.gumbel_sample, partial) else {"straight_through": True}
    return {
        "commitment_use_cross_entropy_loss": layer.commitment_use_cross_entropy_loss,
        "orthogonal_reg_weight": layer.has_codebook_orthogonal_loss,
        "codebook_diversity_loss_weight": layer.has_codebook_diversity_loss,
        "stochastic_sample_codes": sampling.get("stochastic", False),
        "straight_through": sampling.get("straight_through", False),
        "directional_reparam": layer.directional_reparam,
        "sync_update_v": layer.sync_update_v > 0,
        "learnable_codebook": layer.learnable_codebook or book.learnable_codebook,
        "in_place_codebook_optimizer": layer.in_place_codebook_optimizer is not None,
        "ema_update": not book.ema_update,
        "manual_ema_update": book.manual_ema_update,
        "affine_param": book.affine_param,
        "vq_bridge": book.vq_bridge is not None,
        "sync_kmeans": book.use_ddp and book.kmeans_all_reduce_fn is not torch.distributed.all_reduce,
    }


def _vector_quantize(layer: nn.Module, made: dict[int, nn.Module]) -> VectorQuantize:
    book = layer._codebook
    # on the meta device nothing is drawn, so the model's random numbers stay where they were
    with torch.device("meta"):
        ours = VectorQuantize(
            layer.dim, layer.codebook_size, book.embed.shape[-1], layer.heads, layer.separate_codebook_per_head,
            decay=book.decay, eps=book.eps, freeze_codebook=layer.freeze_codebook,
            kmeans_init=not bool(book.initted), kmeans_iters=book.kmeans_iters,
            use_cosine_sim=book.use_cosine_sim, threshold_ema_dead_code=book.threshold_ema_dead_code,
            channel_last=layer.channel_last, accept_image_fmap=layer.accept_image_fmap,
            accept_3d_fmap=layer.accept_3d_fmap, commitment_weight=layer.commitment_weight,
            rotation_trick=layer.rotation_trick, sync_codebook=book.use_ddp,
            return_zeros_for_masked_padding=layer.return_zeros_for_masked_padding,
            route_gradients_to_input=layer.route_gradients_to_input,
        )  # fmt: skip
    ours.project_in, ours.project_out = layer.project_in, layer.project_out
    if id(book) not in made:
        made[id(book)] = _in_place_of(book, ours._codebook)
        ours._codebook.adopt(dict(book.named_buffers()), book.reset_cluster_size)
    ours._codebook = made[id(book)]
    return ours


# ---- axial-attention: whole layers, and those along one axis that stand by themselves

_AXIAL_PACKAGE = "axial_attention.axial_attention"
_AXIAL, _ALONG, _NORMED, _SELF = (
    f"{_AXIAL_PACKAGE}.{name}" for name in ("AxialAttention", "PermuteToFrom", "PreNorm", "SelfAttention")
)


def _is_axial(layer: nn.Module) -> bool:
    return any(_name(base) in (_AXIAL, _ALONG) for base in type(layer).__mro__)


def _axial_why_not(layer: nn.Module) -> str | None:
    if _name(type(layer)) not in (_AXIAL, _ALONG):
        return "it is a subclass, which may do otherwise"
    try:
        return _along_why_not(layer) if _name(type(layer)) == _ALONG else _axes_why_not(layer)
    except AttributeError as error:
        return f"it is not of a version that is known here ({error}); 0.6.1 is"


def _axes_why_not(layer: nn.Module) -> str | None:
    """Why a whole layer stays."""
    for part in layer.axial_attentions:
        reason = "it holds other layers than its own" if _name(type(part)) != _ALONG else _along_why_not(part)
        if reason or (reason := _hooked(part)):
            return reason
    axes = [axis for axis in range(1, layer.total_dimensions) if axis != layer.dim_index]
    inside = [part.fn for part in layer.axial_attentions]
    found = [(*part.permutation[-2:],) for part in layer.axial_attentions]
    as_made = found == [(axis, layer.dim_index) for axis in axes]
    if not as_made or any(_name(type(fn)) != _SELF or fn.heads != inside[0].heads for fn in inside):
        return "it does not hold one attention for each axis, all with as many heads"
    return None


def _along_why_not(layer: nn.Module) -> str | None:
    """Why a layer along one axis stays; whether it has hooks itself is the caller's affair."""
    normed = _name(type(layer.fn)) == _NORMED
    inner = layer.fn.fn if normed else layer.fn
    if _name(type(inner)) != _SELF:
        return f"what it attends with is a {type(inner).__name__}, which may do otherwise"
    if min(layer.permutation[-2:]) < 1:
        return "it attends from sample to sample"
    linear = (inner.to_q, inner.to_kv, inner.to_out)
    plain = all(type(one) is nn.Linear for one in linear) and (not normed or type(layer.fn.norm) is nn.LayerNorm)
    hidden = inner.heads * inner.dim_heads
    sizes = [one.out_features for one in linear[:2]] == [hidden, 2 * hidden] if plain else None
    if not sizes or inner.to_q.bias is not None or inner.to_kv.bias is not None or inner.to_out.bias is None:
        return "its projections or its norm are not those that it was made with"
    reasons = [_hooked(one) for one in (layer.fn, inner, *linear)]
    return next(filter(None, reasons), None)


def _hooked(layer: nn.Module) -> str | None:
    """What a layer that is no longer called would miss."""
    if "forward" in vars(layer):
        return "a forward inside was replaced on the layer itself"
    hooked = any(vars(layer)[name] for name in vars(layer) if name.endswith("_hooks"))
    return f"the {type(layer).__name__} inside has hooks, which would not be called" if hooked else None


def _axial(layer: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if _name(type(layer)) == _ALONG:
        return AxisAttention(*layer.permutation[-2:], _holding(layer.fn))
    first = layer.axial_attentions[0].fn
    with torch.device("meta"):
        ours = AxialAttention(
            layer.dim, layer.total_dimensions - 2, first.heads, first.dim_heads, layer.dim_index, layer.sum_axial_out
        )
    for i, part in enumerate(layer.axial_attentions):
        if id(part) not in made:
            made[id(part)] = _in_place_of(part, _axial(part, made))
        ours.axial_attentions[i] = made[id(part)]
    return ours


def _holding(theirs: nn.Module) -> SelfAttention | PreNorm:
    """Ours with the modules of theirs."""
    normed = _name(type(theirs)) == _NORMED
    inner = theirs.fn if normed else theirs
    with torch.device("meta"):
        ours = SelfAttention(inner.to_out.out_features, inner.heads, inner.dim_heads)
        around = PreNorm(inner.to_out.out_features, ours) if normed else ours
    ours.to_q, ours.to_kv, ours.to_out = inner.to_q, inner.to_kv, inner.to_out
    if normed:
        around.norm = theirs.norm
    ours.training, around.training = inner.training, theirs.training
    return around


# ---- masked convolutions, whoever wrote them


def _is_masked_conv(layer: nn.Module) -> bool:
    mask, conv = layer._buffers.get("mask"), _convolution_of(layer)
    if isinstance(layer, _STAND_INS) or not isinstance(mask, Tensor) or conv is None:
        return False
    # a mask beside a convolution may be for something else
    return conv is layer or mask.shape[-len(conv.kernel_size) :] == conv.kernel_size


_STAND_INS = (DenseMaskedConv2d, DenseMaskedConv3d, DenseMasked)


def _convolution_of(layer: nn.Module) -> nn.Module | None:
    """The layer, if it is a convolution, or the one that is all it has inside."""
    if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
        return layer
    children = [*layer.children()]
    return children[0] if len(children) == 1 and type(children[0]) in (nn.Conv2d, nn.Conv3d) else None


def _masked_conv_why_not(layer: nn.Module) -> str | None:
    return _more_than_a_masked_conv(layer) or _other_than_ours(layer)


def _more_than_a_masked_conv(layer: nn.Module) -> str | None:
    """What it holds or takes that ours does not."""
    conv = _convolution_of(layer)
    weight, bias = conv._parameters.get("weight"), conv._parameters.get("bias")
    held = [*layer.named_parameters(), *layer.named_buffers(), *layer.named_children()]
    if more := [name for name, thing in held if not any(thing is known for known in (weight, bias, layer.mask, conv))]:
        return f"it holds more than weight, bias and mask: {', '.join(more)}"
    if type(weight) is not nn.Parameter or layer.mask.is_meta:
        return f"its weight is a {type(weight).__name__} on {layer.mask.device}, not a plain parameter"
    if conv is not layer and any(vars(conv)[name] for name in vars(conv) if name.endswith("_hooks")):
        return "the convolution inside has hooks, which would not be called"
    if "forward" in vars(layer):
        return "its forward was replaced on the layer itself"
    takes = [*inspect.signature(layer.forward).parameters.values()]
    if len(takes) != 1 or takes[0].kind not in (takes[0].POSITIONAL_ONLY, takes[0].POSITIONAL_OR_KEYWORD):
        return f"its forward takes ({', '.join(map(str, takes))}), not one tensor"
    return "its mask hides nothing" if bool((layer.mask == 1).all()) else None


def _other_than_ours(layer: nn.Module) -> str | None:
    """What differs when both run on random numbers. It is a copy that runs, so the layer stays as it is."""
    draw = torch.Generator().manual_seed(0)  # its own, so that torch's stays where it is
    twin = _twin(layer, draw)
    conv = _convolution_of(twin)
    try:
        kernel = _masked_conv(twin, {}).live_kernel
    except (ValueError, NotImplementedError) as error:
        return str(error).partition(": ")[2]
    reaches = [k // 2 * step for k, step in zip(conv.kernel_size, conv.dilation, strict=True)]
    x = _random(draw, 1, conv.in_channels, *(2 * reach + 2 + axis for axis, reach in enumerate(reaches)))
    # ours first, as the other may write into its weights
    found = kernel.convolve("", x, kernel.live(conv.weight.detach()), conv.bias, backend="reference").detach()
    for twin.training in (False, True):
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
                wanted = twin.forward(x.clone())
        except Exception as error:  # it is somebody's code, which may raise anything
            return f"its forward does not take {list(x.shape)}: {type(error).__name__}: {error}".partition("\n")[0]
        same = isinstance(wanted, Tensor) and wanted.shape == found.shape and wanted.dtype == found.dtype
        if not (same and torch.allclose(wanted, found, rtol=1e-9, atol=1e-9)):
            return "its forward does more than, or other than, a convolution with the masked weight"
    return None


def _twin(layer: nn.Module, draw: torch.Generator) -> nn.Module:
    """A layer like it on the CPU whose parameters are float64 and random.

    Random, for where a mask hides weights that are zero now nobody could tell whether `forward` hides them.
    """
    twin = object.__new__(type(layer))
    twin.__dict__.update(vars(layer))
    parameters = {n: p if p is None else nn.Parameter(_random(draw, *p.shape)) for n, p in layer._parameters.items()}
    buffers = {name: buffer.detach().to("cpu", copy=True) for name, buffer in layer.named_buffers(recurse=False)}
    buffers = {name: own.double() if own.is_floating_point() else own for name, own in buffers.items()}
    modules = {name: _twin(child, draw) for name, child in layer.named_children()}
    twin.__dict__.update(_parameters=parameters, _buffers=buffers, _modules=modules)
    return twin


def _random(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float64, device="cpu")


def _masked_conv(layer: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    kinds = {nn.Conv2d: DenseMaskedConv2d, nn.Conv3d: DenseMaskedConv3d, nn.Module: DenseMasked}
    return next(ours for theirs, ours in kinds.items() if isinstance(layer, theirs)).in_place_of(layer)


SWAPS = (
    Swap(_is_vector_quantize, lambda _: "vector-quantize-pytorch", _vector_quantize_why_not, _vector_quantize),
    Swap(_is_axial, lambda _: "axial-attention", _axial_why_not, _axial),
    Swap(_is_masked_conv, lambda layer: type(layer).__module__.split(".")[0], _masked_conv_why_not, _masked_conv),
)
