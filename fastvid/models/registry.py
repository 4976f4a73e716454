"""Which kinds of model there are, their presets, and how one is built from a saved config."""

import contextlib
import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fastvid.errors import CheckpointError, UsageError
from fastvid.models import bottom_prior, dvd_config, hierarchical_vqvae, top_prior
from fastvid.models.bottom_prior import BottomPrior, BottomPriorConfig
from fastvid.models.dvd_config import DVDGANConfig
from fastvid.models.dvd_gan import generator_of
from fastvid.models.hierarchical_vqvae import HierarchicalVQVAE, VQVAEConfig
from fastvid.models.top_prior import TopPrior, TopPriorConfig
from fastvid.nn.spectral import unfilled

KINDS = {
    "vqvae": (HierarchicalVQVAE, VQVAEConfig),
    "top": (TopPrior, TopPriorConfig),
    "bottom": (BottomPrior, BottomPriorConfig),
    "dvdgan": (generator_of, DVDGANConfig),
}
SLACK = 1 << 24  # numbers that a model holds beyond its weights, such as masks
PRESETS = {
    "vqvae": hierarchical_vqvae.PRESETS, "top": top_prior.PRESETS, "bottom": bottom_prior.PRESETS,
    "dvdgan": dvd_config.PRESETS,
}  # fmt: skip


def preset(kind: str, name: str) -> Any:
    """The config dataclass of a named preset. Raises UsageError that lists the known names."""
    if kind not in PRESETS or name not in PRESETS[kind]:
        known = ", ".join(sorted(PRESETS.get(kind, {}))) or "none: kinds are " + ", ".join(PRESETS)
        raise UsageError(f"unknown preset {name!r} for {kind}; known: {known}.")
    return PRESETS[kind][name]


def build(kind: str, config: dict, fresh: bool = True, most: int | None = None) -> torch.nn.Module:
    """A model of one of KINDS from its config as a (nested) dict.

    fresh: draw starting weights; False leaves the parameters as memory happens to be, for a caller that loads them all.
    most:  not fresh: how many numbers all tensors together may have; more is a ValueError, before memory is taken.
    """
    model, config_class = KINDS[kind]
    with contextlib.ExitStack() as stack:
        if not fresh:
            stack.enter_context(_Unfilled(most))
            stack.enter_context(unfilled())
        return model(_dataclass_from(config_class, config))


def rebuild(kind: str, config: dict, stored: int, folder: str | Path) -> torch.nn.Module:
    """`build` from the config of a model folder, for `stored` numbers; CheckpointError where none results."""
    try:
        return build(kind, config, fresh=False, most=2 * stored + SLACK)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder}: its config describes no {kind}: {reason}") from error


class _Unfilled(TorchFunctionMode):
    """While inside, torch.nn.init does nothing: to draw millions of numbers takes longer than to read the weights."""

    def __init__(self, most: int | None = None):
        super().__init__()
        self.left = math.inf if most is None else most

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", None) in ("empty", "zeros", "ones", "full", "randn"):
            shape = args[0] if args and isinstance(args[0], (tuple, list)) else args
            self.left -= math.prod(size for size in shape if isinstance(size, int))
            if self.left < 0:
                raise ValueError(f"a tensor of shape {list(shape)} goes beyond all the weights stored with it.")
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


def _dataclass_from(cls: type, values: dict) -> Any:
    if not isinstance(values, dict):
        raise UsageError(f"{cls.__name__}: wanted its fields by name, got a {type(values).__name__}.")
    types = {f.name: f.type for f in fields(cls)}
    unknown = set(values) - set(types)
    if unknown:
        raise UsageError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}.")
    return cls(**{
        name: _dataclass_from(types[name], value) if is_dataclass(types[name]) else value
        for name, value in values.items()
    })
