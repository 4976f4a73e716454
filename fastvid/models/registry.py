"""Which kinds of model there are, their presets, and how one is built from a saved config."""

from dataclasses import fields, is_dataclass
from typing import Any

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


def build(kind: str, config: dict):
    """A model of kind `vqvae`, `top` or `bottom` from its config as a (nested) dict, with fresh weights."""
    model, config_class = KINDS[kind]
    return model(_dataclass_from(config_class, config))


def _dataclass_from(cls: type, values: dict) -> Any:
    types = {f.name: f.type for f in fields(cls)}
    unknown = set(values) - set(types)
    if unknown:
        raise UsageError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}.")
    return cls(**{
        name: _dataclass_from(types[name], value) if is_dataclass(types[name]) else value
        for name, value in values.items()
    })
