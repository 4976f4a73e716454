"""The core of attention inside boxes: axes one after the other, and blocks. axial_layer_cases.py has more around it."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from axial_peers import Part, Peer, along, peer
from jobs import Values, Way, told, with_gradients
from torch import Tensor

from fastvid import ops

BACKWARD = 2  # products of the backward pass for each of the forward's; to compute weights again is nobody's duty


@dataclass(frozen=True)
class Core:
    """Attention of several kinds, one after the other, from one fused tensor [B, T, H, W, 3, A, E].

    heads: A. bias: with one per head that depends on distances in the box. train: with the fused tensor's gradient.
    peers: which of the ways beside ours.
    """

    grid: tuple[int, int, int, int]
    heads: int
    E: int
    kinds: tuple[Part, ...]
    bias: bool = False
    train: bool = False
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    peers: tuple[str, ...] = ("axial-attention", "sdpa")

    best = {}  # contestants that stand for the fastest of others

    @property
    def parts(self) -> list[str]:
        """What a result is made of, in words."""
        return [f"out {'x'.join(map(str, kind.box))}" for kind in self.kinds] + ["gradient"] * self.train

    @property
    def work(self) -> tuple[float, int]:
        """Least operations; least bytes: reads q, k, v and writes out; with gradients reads those and out's two again
        and writes three."""
        positions, width = prod(self.grid), self.heads * self.E
        keys = sum((kind.n + 1) / 2 if kind.mask == "causal" else kind.n for kind in self.kinds)
        operations = (1 + BACKWARD * self.train) * 2.0 * 2.0 * positions * width * keys
        moved = (4 + 8 * self.train) * positions * width * len(self.kinds)
        return operations, moved * (torch.finfo(self.dtype).bits // 8)

    def draw(self, number: int) -> Values:
        """A round's fused tensor, bias and gradients of the outputs."""
        generator = torch.Generator(self.device).manual_seed(5000 + number)

        def fresh(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

        grads = [fresh(*self.grid, self.heads, self.E) for _ in self.kinds] if self.train else []
        return fresh(*self.grid, 3, self.heads, self.E), self._bias(fresh) if self.bias else None, *grads

    def _bias(self, fresh: Callable[..., Tensor]) -> Tensor:
        (kind,) = self.kinds
        return ops.relative_bias([fresh(self.heads, 2 * extent - 1) for extent in kind.box], kind.box)

    def samples(self, values: Values) -> Iterator[tuple[Any, Values]]:
        """The batch one by one: where it is in a result, and its values."""
        qkv, bias, *grads = values
        for b in range(self.grid[0]):
            where = slice(b, b + 1)
            yield where, (qkv[where], bias, *(grad[where] for grad in grads))

    def exact(self, values: Values) -> tuple[Tensor, ...]:
        """By scores that are all there, in the dtype of the values."""
        return self._peer(peer("axial-attention"))(values)

    def plain(self, values: Values) -> tuple[Tensor, ...]:
        """By the op's own definition."""
        return self._ours("reference")(values)

    def ways(self, values: Values) -> dict[str, Way]:
        """Contestants by name, ours first."""
        backend = "cpu" if self.device == "cpu" else "triton"
        made = {"fastvid": self._ours(backend, self._why_not(values, backend))}
        return made | {name: self._peer(peer(name)) for name in self.peers}

    def _why_not(self, values: Values, backend: str) -> str | None:
        qkv, bias, *grads = values
        for kind, grad in zip(self.kinds, grads or self.kinds, strict=True):
            why = told(ops.axial_attention, qkv, None, None, None, kind.box, kind.mask, bias, backend=backend)
            if not why and self.train:
                lse = torch.zeros(*self.grid, self.heads, device=self.device)
                given = (qkv, None, None, bias, grad, lse, grad, None, [*kind.box], kind.mask, 1.0)
                why = told(ops.axial_attention_backward, *given, [True, False, False, False], backend=backend)
            if why:
                return why
        return None

    def _ours(self, backend: str, missing: str | None = None) -> Way:
        def forward(bias: Tensor | None, qkv: Tensor) -> tuple[Tensor, ...]:
            attend = functools.partial(ops.axial_attention, qkv, bias=bias, backend=backend)
            return tuple(attend(box=kind.box, mask=kind.mask).out for kind in self.kinds)

        def run(values: Values) -> tuple[Tensor, ...]:
            return self._done(functools.partial(forward, values[1]), values)

        return Way(lambda values: values, run, missing)

    def _peer(self, one: Peer) -> Way:
        def ready(values: Values) -> tuple:
            return *values, [one.merge(kind, values[1], values[0]) for kind in self.kinds]

        def forward(merged: list, qkv: Tensor) -> tuple[Tensor, ...]:
            q, k, v = qkv.unbind(4)
            return tuple(one.attend(q, k, v, kind, last) for kind, last in zip(self.kinds, merged, strict=True))

        def run(given: tuple) -> tuple[Tensor, ...]:
            return self._done(functools.partial(forward, given[-1]), given[:-1])

        return Way(ready, run, one.missing)

    def _done(self, forward: Callable[[Tensor], tuple[Tensor, ...]], values: Values) -> tuple[Tensor, ...]:
        if self.train:
            return with_gradients(forward, values[:1], values[2:])
        with torch.no_grad():
            return forward(values[0])


AXES = (4, 32, 32)  # of the sizes on a CPU


def cpu(train: bool = False) -> Core:
    """The three axes of a video in latent space."""
    return Core((1, *AXES), 8, 32, tuple(along(axis, AXES) for axis in (1, 2, 3)), train=train)


def cpu_blocks() -> Core:
    """A layer of the Latent Video Transformer: blocks, causal, with relative biases."""
    return Core((1, 4, 16, 16), 8, 128, (Part((4, 8, 8), "causal"),), bias=True, peers=("sdpa",))


def gpu(axes: str = "thw", train: bool = False) -> Core:
    """Axes of a large video, T causal."""
    grid = (16, 64, 64)
    kinds = tuple(along("thw".index(axis) + 1, grid, "causal" if axis == "t" else "none") for axis in axes)
    others = ("axial-attention", "sdpa", "torch.compile", "flex_attention", "natten")
    return Core((8, *grid), 8, 64, kinds, False, train, "cuda", torch.bfloat16, others)
