"""Which kinds of model there are, their presets, and how one is built from a saved config."""

import contextlib
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fastvid.errors import UsageError
from fastvid.models import bottom_prior, hierarchical_vqvae, top_prior
from fastvid.models.bottom_prior import BottomPrior, BottomPriorConfig
from fastvid.models.hierarchical_vqvae import HierarchicalVQVAE, VQVAEConfig
from fastvid.models.top_prior import TopPrior, TopPriorConfig

KINDS = {
    "vqvae": (HierarchicalVQVAE, VQVAEConfig),
    "top": (TopPrior, TopPriorConfig),
    "bottom": (BottomPrior, BottomPriorConfig),
}
PRESETS = {"vqvae": hierarchical_vqvae.PRESETS, "top": top_prior.PRESETS, "bottom": bottom_prior.PRESETS}


def preset(kind: str, name: str) -> Any:
    """The config dataclass of a named preset. Raises UsageError that lists the known names."""
    if kind not in PRESETS or name not in PRESETS[kind]:
        known = ", ".join(sorted(PRESETS.get(kind, {}))) or "none: kinds are " + ", ".join(PRESETS)
        raise UsageError(f"unknown preset {name!r} for {kind}; known: {known}.")
    return PRESETS[kind][name]


def build(kind: str, config: dict, fresh: bool = True) -> torch.nn.Module:
    """A model of kind `vqvae`, `top` or `bottom` from its config as a (nested) dict.

    fresh: draw starting weights; False leaves the parameters as memory happens to be, for a caller that loads them all.
    """
    model, config_class = KINDS[kind]
    with contextlib.nullcontext() if fresh else _Unfilled():
        return model(_dataclass_from(config_class, config))


class _Unfilled(TorchFunctionMode):
    """While inside, torch.nn.init does nothing: to draw millions of numbers takes longer than to read the weights."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


def _dataclass_from(cls: type, values: dict) -> Any:
    types = {f.name: f.type for f in fields(cls)}
    unknown = set(values) - set(types)
    if unknown:
        raise UsageError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}.")
    return cls(**{
        name: _dataclass_from(types[name], value) if is_dataclass(types[name]) else value
        for name, value in values.items()
    })
