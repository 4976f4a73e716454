"""Spectral normalisation of a whole network: one batched power iteration a training step, none while it is used.

Registered as torch.nn.utils.parametrizations.spectral_norm registers it and under the same names, so that state dicts
of either load into the other. What differs is who iterates: in a group the forward of its root does, for all layers at
once, and never a layer that reads its weight, so that what gradient checkpointing recomputes is what was computed.
"""

import functools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torchs
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized, register_parametrization

from fastvid import ops

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FRESH = 15  # iterations from random u and v
_unfilled: ContextVar[bool] = ContextVar("fastvid_unfilled", default=False)


class _Kept(NamedTuple):
    """A normalised weight, and what it was made from: it is good until one of these changes."""

    weight: Tensor
    sources: tuple[Tensor, ...]
    stamps: tuple[tuple[int, int], ...]
    made: object  # the call that made it


def _stamp(tensor: Tensor) -> tuple[int, int]:
    return tensor._version, tensor.data_ptr()


class _Normed(nn.Module):
    """The parametrization of one weight. grouped: the root of a group iterates for it."""

    def __init__(self, u: Tensor, v: Tensor, dim: int, eps: float, n_power_iterations: int = 1):
        super().__init__()
        self.dim, self.eps, self.n_power_iterations = dim, eps, n_power_iterations
        self.register_buffer("_u", u)
        self.register_buffer("_v", v)
        self.grouped, self.kept = False, None

    def forward(self, weight: Tensor) -> Tensor:
        steps = 0 if self.grouped else self.steps
        if not steps and self.holds(weight):
            return self.kept.weight if torch.is_grad_enabled() else self.kept.weight.detach()
        (out,) = _normalise([(self, weight)], steps, self.eps)
        if out.requires_grad:
            self.kept = None  # a graph serves one backward
        return out

    @property
    def steps(self) -> int:
        """Iterations that are due at a forward."""
        return self.n_power_iterations if self.training else 0

    def vectors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """u and v as the op wants them, which are no copies unless a state dict brought another dtype."""
        return self._u.to(_held(weight)), self._v.to(_held(weight))

    def keep(self, out: Tensor, weight: Tensor, made: object) -> None:
        sources = (weight, self._u, self._v)
        watched = not any(tensor.is_inference() for tensor in sources)  # of those nobody counts the changes
        self.kept = _Kept(out, sources, tuple(map(_stamp, sources)), made) if watched else None

    def holds(self, weight: Tensor) -> bool:
        """Whether what is kept is W / sigma for this weight, with a graph where one is wanted."""
        kept, now = self.kept, (weight, self._u, self._v)
        if kept is None or any(a is not b for a, b in zip(kept.sources, now, strict=True)):
            return False
        if kept.stamps != tuple(map(_stamp, now)):
            return False
        if kept.weight.is_inference() and not torch.is_inference_mode_enabled():
            return False  # autograd refuses such tensors
        return not torch.is_grad_enabled() or kept.weight.requires_grad == weight.requires_grad

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        return f"dim={self.dim}, eps={self.eps}, grouped={self.grouped}"

    def __getstate__(self) -> dict:
        # a copy has no graph, and no group unless that is copied too
        return {**self.__dict__, "kept": None, "grouped": False}

    def _apply(self, fn, recurse: bool = True):
        before = [self._u, self._v]
        super()._apply(fn, recurse)
        for name, old in zip(("_u", "_v"), before, strict=True):
            if (new := getattr(self, name)).dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, old.to(new.device, torch.float32))
        self.kept = None
        return self


def _normalise(layers: list[tuple[_Normed, Tensor]], steps: int, eps: float) -> list[Tensor]:
    """W / sigma of layers of one dtype and device in one call; u and v move with `steps`, and all remember theirs."""
    weights = [weight for _, weight in layers]
    u, v = (list(ones) for ones in zip(*(normed.vectors(weight) for normed, weight in layers), strict=True))
    if not steps and torch.is_grad_enabled():
        u, v = ([one.clone() for one in ones] for ones in (u, v))  # the next iteration would change what is saved
    done = ops.spectral_norm(weights, u, v, steps, eps, [normed.dim for normed, _ in layers])
    if steps:
        with torch.no_grad():
            torch._foreach_copy_([n._u for n, _ in layers] + [n._v for n, _ in layers], [*done.u, *done.v])
    made = object()
    for (normed, weight), out in zip(layers, done.out, strict=True):
        normed.keep(out, weight, made)
    if node := done.out[0].grad_fn:
        # its graph is gone after a backward: whoever reads a weight then wants another
        node.register_hook(functools.partial(_forget, [weakref.ref(normed) for normed, _ in layers], made))
    return done.out


def _forget(layers: list[weakref.ref], made: object, *_) -> None:
    for layer in layers:
        normed = layer()
        if normed is not None and normed.kept is not None and normed.kept.made is made:
            normed.kept = None


class SpectralNorm:
    """The layers of a root whose weights are normalised together; made by spectral_norm_all.

    layers: name -> the layer's parametrization list, which holds the parameter as `original`.
    As a forward pre-hook of the root it calls `refresh`. A deepcopy of the root has a group of its own.
    """

    def __init__(self):
        self.layers: dict[str, ParametrizationList] = {}

    def refresh(self) -> None:
        """One power iteration for all layers in training mode, and W / sigma of all that do not have it yet.

        The weights of layers with gradients are made anew each time, as a graph serves one backward.
        """
        due: dict[tuple, list[tuple[_Normed, Tensor]]] = {}
        for layer in self.layers.values():
            normed, weight = layer[0], layer.original
            graph = weight.requires_grad and torch.is_grad_enabled()
            if normed.steps or graph or not normed.holds(weight):
                key = normed.steps, normed.eps, graph, weight.device, weight.dtype == torch.float64
                due.setdefault(key, []).append((normed, weight))
        for (steps, eps, *_), layers in due.items():
            _normalise(layers, steps, eps)

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.refresh()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        for layer in self.layers.values():
            layer[0].grouped = True


def spectral_norm(
    module: nn.Module, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> nn.Module:
    """Divides a weight by its spectral norm: torch.nn.utils.parametrizations.spectral_norm, word for word.

    module:  holds the parameter `name`, of two axes or more. n_power_iterations: at each reading in training mode.
    eps:     the least length to divide by. dim: the axis of outputs; by default 0, for transposed convolutions 1.
    Returns: the module. In eval mode the normalised weight is kept until a weight changes in place.
    Raises:  ValueError for no such parameter, too few axes, or less than one iteration.
    Source:  Miyato et al. 2018, arXiv:1802.05957, algorithm 1.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"spectral_norm: `{name}` must be a tensor of two axes or more, got {got}.")
    if n_power_iterations < 1:
        raise ValueError(f"spectral_norm: `n_power_iterations` must be 1 or more, got {n_power_iterations}.")
    normed = _drawn(weight, _axis(module) if dim is None else dim % weight.ndim, eps, n_power_iterations)
    _estimate([(normed, weight)])
    return register_parametrization(module, name, normed)


def spectral_norm_all(
    root: nn.Module, layers: Sequence[type[nn.Module]] = LAYERS, exclude: Sequence[str | nn.Module] = ()
) -> SpectralNorm:
    """Divides every weight of a network by its spectral norm, all in one call at each forward of the root.

    layers:  types whose `weight` is meant; those that torch's parametrization normalises already are taken over.
    exclude: names in the root or modules, left out with all that is in them.
    Returns: the group, the same one at each call for a root. In training mode the root's forward iterates once for all
             layers; layers read what it made, up to the backward, gradient checkpointing without re-entry included. In
             eval mode nothing is computed until a weight changes in place (writes through `.data` are not seen).
    Raises:  ValueError for a layer of another group's, with another parametrization or the older torch one's.
    Source:  Miyato et al. 2018, arXiv:1802.05957; on all layers of G and D: Clark et al. 2019, arXiv:1907.06571.
    """
    group = next((hook for hook in root._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)), None)
    fresh = []
    found = list(_weight_layers(root, tuple(layers), exclude))
    known = {id(entry) for entry in group.layers.values()} if group else set()
    for name, module in found:
        _check_layer(name, module, known)
    if group is None:
        group = SpectralNorm()
        root.register_forward_pre_hook(group)
    for name, module in found:
        if not is_parametrized(module, "weight"):
            normed = _drawn(module.weight, _axis(module), 1e-12)
            fresh.append((normed, module.weight))
            register_parametrization(module, "weight", normed, unsafe=True)  # safe would iterate one by one
        entry = module.parametrizations.weight
        if isinstance(theirs := entry[0], torchs._SpectralNorm):
            taken = _Normed(theirs._u, theirs._v, theirs.dim, theirs.eps, theirs.n_power_iterations)
            entry[0] = taken.train(theirs.training)
        entry[0].grouped, entry[0].kept = True, None
        group.layers[name] = entry
    _estimate(fresh)
    return group


def spectral_norms(root: nn.Module) -> dict[str, float]:
    """The largest singular value of every normalised weight, as power iteration has it by now, for logs.

    Returns: name in the root -> sigma of the weight before it is divided; torch's parametrizations count too.
    Source:  Brock et al. 2018, arXiv:1809.11096, section 4, for what to look for in it.
    """
    parts: dict[tuple, list[tuple[str, _Normed, Tensor]]] = {}
    names = []
    for name, normed, weight in _normalised(root):
        names.append(name)
        parts.setdefault((weight.device, weight.dtype == torch.float64), []).append((name, normed, weight))
    found = {}
    for part in parts.values():
        weights, dims = [weight for _, _, weight in part], [normed.dim for _, normed, _ in part]
        u, v = zip(*((n._u.to(_held(w)), n._v.to(_held(w))) for _, n, w in part), strict=True)
        with torch.no_grad():
            sigma = ops.spectral_norm(weights, u, v, 0, dims=dims).sigma.tolist()
        found.update(zip((name for name, *_ in part), sigma, strict=True))
    return {name: found[name] for name in names}


@contextmanager
def unfilled() -> Iterator[None]:
    """While inside, u, v and orthogonal weights are neither drawn nor computed, for a network that is loaded next."""
    token = _unfilled.set(True)
    try:
        yield
    finally:
        _unfilled.reset(token)


def orthogonal_init_(root: nn.Module) -> nn.Module:
    """Orthogonal weights and zero biases for every convolution, linear map and embedding, those of a ConvGRU included.

    root:    any module; weights behind spectral normalisation get their u and v anew, in place.
    Returns: the root.
    Source:  Saxe et al. 2013, arXiv:1312.6120; Clark et al. 2019, arXiv:1907.06571, for its use.
    """
    if _unfilled.get():
        return root
    with torch.no_grad():
        for module in root.modules():
            if isinstance(module, LAYERS + TRANSPOSED):
                held = module.parametrizations.weight if is_parametrized(module, "weight") else None
                nn.init.orthogonal_(module.weight if held is None else held.original)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
        _estimate([(normed, weight) for _, normed, weight in _normalised(root)])
    return root


def _drawn(weight: Tensor, dim: int, eps: float, n_power_iterations: int = 1) -> _Normed:
    """u and v from torch's generator, in the order that torch draws them in."""
    rows = weight.shape[dim]
    if _unfilled.get():
        u, v = (weight.new_zeros(n, dtype=_held(weight)) for n in (rows, weight.numel() // max(rows, 1)))
        return _Normed(u, v, dim, eps, n_power_iterations)
    u, v = (weight.new_empty(size, dtype=_held(weight)).normal_() for size in (rows, weight.numel() // max(rows, 1)))
    return _Normed(F.normalize(u, dim=0, eps=eps), F.normalize(v, dim=0, eps=eps), dim, eps, n_power_iterations)


def _held(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


@torch.no_grad()
def _estimate(layers: Sequence[tuple[nn.Module, Tensor]]) -> None:
    """Many iterations for u and v that fit the weight."""
    if _unfilled.get():
        return
    parts: dict[tuple, list[tuple[nn.Module, Tensor]]] = {}
    for normed, weight in layers:
        parts.setdefault((normed.eps, weight.device, weight.dtype == torch.float64), []).append((normed, weight))
    for (eps, *_), part in parts.items():
        u, v = ([getattr(normed, name).to(_held(weight)) for normed, weight in part] for name in ("_u", "_v"))
        done = ops.spectral_norm([weight for _, weight in part], u, v, FRESH, eps, [normed.dim for normed, _ in part])
        torch._foreach_copy_([n._u for n, _ in part] + [n._v for n, _ in part], [*done.u, *done.v])


def _axis(module: nn.Module) -> int:
    return 1 if isinstance(module, TRANSPOSED) else 0


def _weight_layers(
    root: nn.Module, layers: tuple[type[nn.Module], ...], exclude: Sequence[str | nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    named = dict(root.named_modules())
    unknown = [name for name in exclude if isinstance(name, str) and name not in named]
    if unknown:
        raise ValueError(f"spectral_norm_all: `exclude` names {unknown[0]!r}, which is not in {type(root).__name__}.")
    left_out = {id(m) for one in exclude for m in (named[one] if isinstance(one, str) else one).modules()}
    yield from ((name, m) for name, m in named.items() if isinstance(m, layers) and id(m) not in left_out)


def _check_layer(name: str, module: nn.Module, known: set[int]) -> None:
    if not is_parametrized(module, "weight"):
        if "weight" not in module._parameters:
            raise ValueError(f"spectral_norm_all: `{name}.weight` is no parameter; remove what computes it first.")
        return
    entry = module.parametrizations.weight
    if len(entry) != 1 or not isinstance(entry[0], (_Normed, torchs._SpectralNorm)):
        told = ", ".join(type(one).__name__ for one in entry)
        raise ValueError(f"spectral_norm_all: `{name}.weight` has the parametrization {told}; exclude or remove it.")
    if getattr(entry[0], "grouped", False) and id(entry) not in known:
        raise ValueError(f"spectral_norm_all: `{name}` is in the group of another root; exclude it here.")


def _normalised(root: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, parametrization and parameter of every weight that is divided by its spectral norm."""
    for path, module in root.named_modules():
        if is_parametrized(module):
            for tensor, entry in module.parametrizations.items():
                if isinstance(entry[0], (_Normed, torchs._SpectralNorm)):
                    own = [] if tensor == "weight" else [tensor]
                    yield ".".join(filter(None, [path, *own])), entry[0], entry.original
