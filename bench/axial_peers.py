"""Attention inside boxes as torch has it: lines are permuted out of the grid, attended to and put back.

`explicit` is the core of the axial-attention package: every score in memory, with no more copies than its arithmetic
asks for (the package makes a few more). The others hand the same lines to a fused kernel, as views where they can be.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Box = tuple[int, int, int]
PACKAGE = "axial_attentions.{}.fn.{}"  # names of the package's parameters


class Part(NamedTuple):
    """Attention inside boxes (bt, bh, bw), mask "none" or "causal"."""

    box: Box
    mask: str = "none"

    @property
    def n(self) -> int:
        """Positions of a box."""
        return self.box[0] * self.box[1] * self.box[2]


Attend = Callable[[Tensor, Tensor, Tensor, Part, Tensor | None], Tensor]


def along(axis: int, grid: Box, mask: str = "none") -> Part:
    """The lines of axis 1 (T), 2 (H) or 3 (W) of a grid."""
    return Part(tuple(extent if i == axis else 1 for i, extent in enumerate(grid, 1)), mask)


def cut(x: Tensor, box: Box) -> Tensor:
    """[B, T, H, W, A, E] -> [boxes, n, A, E], a view where strides allow it."""
    for axis in (3, 2, 1):
        x = x.unflatten(axis, (-1, box[axis - 1]))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7, 8).flatten(4, 6).flatten(0, 3)


def joined(lines: Tensor, box: Box, shape: torch.Size) -> Tensor:
    """[boxes, n, A, D] -> [B, T, H, W, A, D], contiguous. shape: of what was cut."""
    cells = [extent // b for extent, b in zip(shape[1:4], box, strict=True)]
    x = lines.unflatten(0, (shape[0], *cells)).unflatten(4, box)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7, 8).reshape(*shape[:4], *lines.shape[2:]).contiguous()


def dense_bias(part: Part, bias: Tensor | None, like: Tensor) -> Tensor | None:
    """Bias and mask as one tensor that is added to the scores: [A, n, n], [n, n], or None where there is neither."""
    if part.mask == "none":
        return bias
    given = like.new_zeros(part.n, part.n) if bias is None else bias
    ones = torch.ones(part.n, part.n, dtype=torch.bool, device=like.device)
    return given.masked_fill(ones.triu(1), float("-inf"))


def explicit(q: Tensor, k: Tensor, v: Tensor, part: Part, dense: Tensor | None) -> Tensor:
    """All scores in memory. dense: what `dense_bias` gives."""
    A, E = q.shape[-2:]
    lines = [cut(x, part.box).transpose(1, 2).reshape(-1, part.n, E) for x in (q, k, v)]  # [boxes * A, n, E]
    scores = torch.einsum("bie,bje->bij", *lines[:2]) * E**-0.5
    if dense is not None:
        scores = (scores.unflatten(0, (-1, A)) + dense).flatten(0, 1)
    out = torch.einsum("bij,bje->bie", scores.softmax(dim=-1), lines[2])
    return joined(out.unflatten(0, (-1, A)).transpose(1, 2), part.box, q.shape)


def sdpa(q: Tensor, k: Tensor, v: Tensor, part: Part, dense: Tensor | None) -> Tensor:
    """By scaled_dot_product_attention. dense: what `sdpa_bias` gives."""
    lines = (cut(x, part.box).transpose(1, 2) for x in (q, k, v))  # [boxes, A, n, E]
    out = F.scaled_dot_product_attention(*lines, attn_mask=dense, is_causal=dense is None and part.mask == "causal")
    return joined(out.transpose(1, 2), part.box, q.shape)


def sdpa_bias(part: Part, bias: Tensor | None, like: Tensor) -> Tensor | None:
    """A causal mask alone is a flag of the kernel, and no tensor."""
    return None if bias is None else dense_bias(part, bias, like)


def flex(attend: Callable, q: Tensor, k: Tensor, v: Tensor, part: Part, block_mask: Any) -> Tensor:
    """By flex_attention. attend: it, compiled. block_mask: what `flex_mask` gives."""
    lines = (cut(x, part.box).transpose(1, 2) for x in (q, k, v))
    # the kernel that it takes for short lines has all lines times heads on one axis of its grid: too many
    out = attend(*lines, block_mask=block_mask, kernel_options={"FORCE_USE_FLEX_ATTENTION": True})
    return joined(out.transpose(1, 2), part.box, q.shape)


def flex_mask(part: Part, bias: Tensor | None, like: Tensor) -> Any:
    """A causal block mask, or None. There is no bias."""
    from torch.nn.attention.flex_attention import create_block_mask

    if part.mask == "none":
        return None
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, part.n, part.n, device=like.device)


def natten(q: Tensor, k: Tensor, v: Tensor, part: Part, dense: None) -> Tensor:
    """By NATTEN, a window as long as the line. Its windows have two positions at least along every axis that they are
    given, so a line of a grid is to it a sequence of its own."""
    na1d = importlib.import_module("natten.functional").na1d  # not on every machine

    lines = (cut(x, part.box) for x in (q, k, v))
    return joined(na1d(*lines, kernel_size=part.n, is_causal=part.mask == "causal"), part.box, q.shape)


class Peer(NamedTuple):
    """attend: does it. merge: makes what `attend` takes last, of a kind, the bias and a tensor on the device, before
    the clock runs."""

    attend: Attend
    merge: Callable[[Part, Tensor | None, Tensor], Any]
    missing: str | None = None


def peer(name: str) -> Peer:
    """A peer of the core by its name."""
    made = {
        "axial-attention": lambda: Peer(explicit, dense_bias),
        "sdpa": lambda: Peer(sdpa, sdpa_bias),
        "torch.compile": lambda: Peer(torch.compile(sdpa, dynamic=False), sdpa_bias),
        "flex_attention": lambda: Peer(functools.partial(flex, _compiled_flex()), flex_mask),
        "natten": lambda: Peer(natten, lambda *_: None, lacking("natten", "natten")),
    }
    return made[name]()


def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def lacking(package: str, name: str) -> str | None:
    """Why a peer cannot run, if its package is not there."""
    return None if importlib.util.find_spec(package) else f"{name} is not installed"


# ---- with projections


@functools.cache
def layer_weights(axes: int, C: int) -> dict[str, Tensor]:
    """Parameters of a layer by the package's names, drawn alike every time."""
    generator = torch.Generator().manual_seed(6)
    shapes = {"to_q.weight": (C, C), "to_kv.weight": (2 * C, C), "to_out.weight": (C, C), "to_out.bias": (C,)}
    return {PACKAGE.format(i, name): torch.randn(shape, generator=generator) * C**-0.5
            for i in range(axes) for name, shape in shapes.items()}  # fmt: skip


def package_layer(dim: int, heads: int, axes: int) -> nn.Module:
    """The package's own layer, channels last."""
    from axial_attention import AxialAttention

    return AxialAttention(dim, num_dimensions=axes, heads=heads, dim_index=-1)


def composed(attend: Attend, heads: int, permuted: bool, x: Tensor, *weights: Tensor) -> Tensor:
    """The sum over the axes of to_out(attend(to_q(x), to_kv(x))).

    x:        [B, T, H, W, C]. weights: to_q, to_kv, to_out and its bias of every axis in turn.
    permuted: x is permuted and then projected, as the package does it, rather than what is projected.
    """
    axes = [functools.partial(_one_axis, attend, heads, permuted, x, axis) for axis in range(1, len(weights) // 4 + 1)]
    return sum(one(*weights[4 * i : 4 * i + 4]) for i, one in enumerate(axes))


def _one_axis(
    attend: Attend, heads: int, permuted: bool, x: Tensor, axis: int,
    to_q: Tensor, to_kv: Tensor, to_out: Tensor, bias: Tensor,
) -> Tensor:  # fmt: skip
    at = 3 if permuted else axis
    x = x.movedim(axis, at).contiguous()
    parts = (F.linear(x, to_q), *F.linear(x, to_kv).chunk(2, dim=-1))
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in parts)
    out = attend(q, k, v, along(at, tuple(x.shape[1:4])), None)
    return F.linear(out.flatten(4), to_out, bias).movedim(at, axis)
