"""The races of attention with more around it: a layer with its projections, and a prior's step over a cache.

Peers get their layouts before the clock runs; a layer's weights are the same for everybody, under the names that the
axial-attention package gives them.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import axial_peers as peers
import torch
import torch.nn.functional as F
from axial_cases import AXES, BACKWARD
from jobs import Values, Way, told, with_gradients
from torch import Tensor, nn

import fastvid
from fastvid import ops
from fastvid.nn.axial import AxialAttention


@dataclass(frozen=True)
class Layer:
    """x [B, T, H, W, C] through attention along the three axes, the sum of their projected results.

    train: with the gradients of x and all weights.
    """

    grid: tuple[int, int, int, int]
    C: int
    heads: int
    train: bool = False

    device = "cpu"
    best = {"sdpa": ("sdpa in place", "sdpa permuted")}

    @property
    def parts(self) -> list[str]:
        """What a result is made of, in words."""
        return ["out"] + (["gradient of x", *(f"gradient of {name}" for name in self.weights)] if self.train else [])

    @property
    def weights(self) -> dict[str, Tensor]:
        """Parameters by the package's names."""
        return peers.layer_weights(3, self.C)

    @property
    def work(self) -> tuple[float, int]:
        """Least operations, of four projections an axis and the core; least bytes, x in and out."""
        projected = 2.0 * prod(self.grid) * 3 * 4 * self.C**2
        core = 2.0 * 2.0 * prod(self.grid) * self.C * sum(self.grid[1:])
        return (1 + BACKWARD * self.train) * (projected + core), (2 + 2 * self.train) * prod(self.grid) * self.C * 4

    def draw(self, number: int) -> Values:
        """A round's x and gradient of the output, and the weights."""
        generator = torch.Generator().manual_seed(6000 + number)
        x, grad = (torch.randn(*self.grid, self.C, generator=generator) for _ in range(2))
        return x, grad, *self.weights.values()

    def samples(self, values: Values) -> Iterator[tuple[Any, Values]]:
        """Everything at once: the weights' gradients are of all samples."""
        yield slice(None), values

    def exact(self, values: Values) -> tuple[Tensor, ...]:
        """By scores that are all there, in the dtype of the values."""
        return self._composed(peers.explicit, permuted=False).run(values)

    plain = exact

    def ways(self, values: Values) -> dict[str, Way]:
        """Contestants by name, ours first."""
        lacking = peers.lacking("axial_attention", "axial-attention")
        package = None if lacking else peers.package_layer(self.C, self.heads, 3)
        return {
            "fastvid": self._module(AxialAttention(self.C, 3, self.heads), self._why_not(values), "cpu"),
            "axial-attention": self._module(package, lacking),
            "sdpa in place": self._composed(peers.sdpa, permuted=False),
            "sdpa permuted": self._composed(peers.sdpa, permuted=True),
        }

    def _why_not(self, values: Values) -> str | None:
        x, grad, *weights = values
        if not self.train:
            axes = (weights[i : i + 3] for i in range(0, len(weights), 4))
            fours = [(to_q, *to_kv.chunk(2), to_out) for to_q, to_kv, to_out in axes]
            return told(ops.axial_self_attention, x, fours, (1, 2, 3), self.heads, backend="cpu")
        q = x.unflatten(-1, (self.heads, -1))
        lse, box, wanted = q.new_zeros(q.shape[:-1]), [1, 1, q.shape[3]], [True, True, True, False]
        why = told(ops.axial_attention, q, q, q, 3, backend="cpu")
        return why or told(
            ops.axial_attention_backward, q, q, q, None, q, lse, q, None, box, "none", 1.0, wanted, backend="cpu"
        )

    def _module(self, module: nn.Module | None, missing: str | None, *backend: str) -> Way:
        """A layer that holds the weights itself."""
        if module is not None:
            module.load_state_dict(self.weights)

        def forward(x: Tensor) -> tuple[Tensor]:
            with fastvid.backend(*backend):
                return (module(x),)

        def run(values: Values) -> tuple[Tensor, ...]:
            if self.train:
                return with_gradients(forward, values[:1], values[1:2], [*module.parameters()])
            with torch.no_grad():
                return forward(values[0])

        return Way(lambda values: values, run, missing)

    def _composed(self, attend: peers.Attend, permuted: bool) -> Way:
        """A layer as a function of its weights."""

        def forward(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
            return (peers.composed(attend, self.heads, permuted, x, *weights),)

        def run(values: Values) -> tuple[Tensor, ...]:
            x, grad, *weights = values
            if self.train:
                return with_gradients(forward, (x, *weights), (grad,))
            with torch.no_grad():
                return forward(x, *weights)

        return Way(lambda values: values, run)


@dataclass(frozen=True)
class Step:
    """One query after the other, each over a whole cache of keys and values [1, 1, 1, keys, A, E].

    steps: how many a run does, as one alone is soon over.
    """

    keys: int
    heads: int
    E: int
    steps: int = 32

    device, parts = "cpu", ["out"]
    best = {"sdpa": ("sdpa in place", "sdpa heads first")}

    @property
    def work(self) -> tuple[float, int]:
        """Least operations; least bytes, the cache once a step."""
        values = self.steps * self.keys * self.heads * self.E
        return 2.0 * 2.0 * values, 2 * 4 * values

    def draw(self, number: int) -> Values:
        """A round's queries and cache."""
        generator = torch.Generator().manual_seed(7000 + number)
        extents = (self.steps, self.keys, self.keys)
        return tuple(torch.randn(1, 1, 1, n, self.heads, self.E, generator=generator) for n in extents)

    def samples(self, values: Values) -> Iterator[tuple[Any, Values]]:
        """Everything at once."""
        yield slice(None), values

    def exact(self, values: Values) -> tuple[Tensor, ...]:
        """Every query over all keys, by scores that are all there, in the dtype of the values."""
        q, k, v = (x[0, 0, 0].transpose(0, 1) for x in values)  # [A, N, E]
        out = (q @ k.mT * self.E**-0.5).softmax(dim=-1) @ v
        return (out.transpose(0, 1)[None, None, None],)

    def plain(self, values: Values) -> tuple[Tensor, ...]:
        """By the op's own definition, one by one: plain torch sums a step in another order than many at once."""
        return self._run(functools.partial(_our_step, backend="reference"), values)

    def ways(self, values: Values) -> dict[str, Way]:
        """Contestants by name, ours first."""
        q, k, v = values
        missing = told(ops.axial_attention, q[:, :, :, :1], k, v, 3, mask="causal", backend="cpu")
        return {
            "fastvid": Way(_as_cached, functools.partial(self._run, _our_step), missing),
            "sdpa in place": Way(_heads_first, functools.partial(self._run, _sdpa_step)),
            "sdpa heads first": Way(_heads_first_copied, functools.partial(self._run, _sdpa_step)),
        }

    def _run(self, step: Callable[[Tensor, Tensor, Tensor], Tensor], given: Values) -> tuple[Tensor, ...]:
        queries, k, v = given
        with torch.no_grad():
            return (torch.cat([step(q, k, v) for q in queries.split(1, dim=3)], dim=3),)


def _our_step(q: Tensor, k: Tensor, v: Tensor, backend: str = "cpu") -> Tensor:
    return ops.axial_attention(q, k, v, 3, mask="causal", backend=backend).out


def _sdpa_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """k and v [1, A, N, E]."""
    return F.scaled_dot_product_attention(q[0, 0].transpose(1, 2), k, v).transpose(1, 2)[None, None]


def _as_cached(values: Values) -> Values:
    """In memory as fastvid.nn.CausalAttention3d has its cache: a head's positions side by side."""
    q, *cache = values
    return q, *(x.movedim(-2, 1).contiguous().movedim(1, -2) for x in cache)


def _heads_first(values: Values) -> Values:
    q, *cache = values
    return q, *(x[0, 0].transpose(1, 2) for x in cache)


def _heads_first_copied(values: Values) -> Values:
    q, *cache = _heads_first(values)
    return q, *(x.contiguous() for x in cache)


def cpu_layer(train: bool = False) -> Layer:
    """The layer of a video in latent space."""
    return Layer((1, *AXES), 256, 8, train)


def cpu_step() -> Step:
    """A step of the published top prior: all of three slices' codes are keys."""
    return Step(3 * 32 * 32, 8, 64)
