"""Options of the layers we replace that are not taken: which, and what to do instead."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Option(NamedTuple):
    """An option that is known and not taken."""

    defaults: tuple  # values that ask for nothing
    instead: str


_OWN_LOSS = Option((0.0,), "add it to your own loss, computed from `layer.codebook`")
_BY_GRADIENT = "for a codebook learned by gradient keep vector-quantize-pytorch's layer"
_SAMPLED = "codes are always the nearest; for sampled ones keep vector-quantize-pytorch's layer"
_AFFINE = "normalise the layer's input, or keep vector-quantize-pytorch's layer"
_LATER = "the codebook moves once per training step; for another schedule keep vector-quantize-pytorch's layer"
_GIVEN = "call ops.nearest_codebook on layer.codebook for another use of it, or keep vector-quantize-pytorch's layer"

VECTOR_QUANTIZE = {
    "sync_kmeans": Option((True,), "codebooks that start apart would drift apart: leave it True"),
    "commitment_use_cross_entropy_loss": Option((False,), "keep vector-quantize-pytorch's layer"),
    "orthogonal_reg_weight": _OWN_LOSS,
    "orthogonal_reg_active_codes_only": Option((False,), _OWN_LOSS.instead),
    "orthogonal_reg_max_codes": Option((None,), _OWN_LOSS.instead),
    "codebook_diversity_loss_weight": _OWN_LOSS,
    "codebook_diversity_temperature": Option((100.0,), _OWN_LOSS.instead),
    "stochastic_sample_codes": Option((False,), _SAMPLED),
    "sample_codebook_temp": Option((1.0,), _SAMPLED),
    "straight_through": Option((False,), f"{_SAMPLED} (plain straight-through is rotation_trick=False)"),
    "directional_reparam": Option((False,), _BY_GRADIENT),
    "directional_reparam_variance": Option((5e-3,), _BY_GRADIENT),
    "sync_affine_param": Option((False,), _AFFINE),
    "ema_update": Option((None, True), _BY_GRADIENT),
    "vq_bridge": Option((None,), _BY_GRADIENT),
    "manual_ema_update": Option((False,), _LATER),
    "learnable_codebook": Option((None, False), _BY_GRADIENT),
    "in_place_codebook_optimizer": Option((None,), _BY_GRADIENT),
    "manual_in_place_optimizer_update": Option((False,), _BY_GRADIENT),
    "affine_param": Option((False,), _AFFINE),
    "affine_param_batch_decay": Option((0.99,), _AFFINE),
    "affine_param_codebook_decay": Option((0.9,), _AFFINE),
    "sync_update_v": Option((0.0,), _BY_GRADIENT),
}
VECTOR_QUANTIZE_FORWARD = {
    "indices": Option((None,), _GIVEN),
    "topk": Option((None,), _GIVEN),
    "sample_codebook_temp": Option((None,), _SAMPLED),
    "codebook_transform_fn": Option((None,), _GIVEN),
    "ema_update_weight": Option((None,), _LATER),
    "accum_ema_update": Option((False,), _LATER),
    "ema_update": Option((None, True), "to keep the codebook still for a step pass freeze_codebook=True"),
}


def refuse(where: str, known: Mapping[str, Option], given: Mapping[str, Any]) -> None:
    """Refuse options that are not taken, unless they ask for nothing.

    where:  the layer or method, for the message. known: its options that are not taken. given: what came, by name.
    Raises: NotImplementedError naming the option and what to do instead; TypeError for an option nobody knows.
    """
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"{where}: unknown option {name!r}; see its documentation for those there are.")
        # tensors and modules compare by identity only: == would ask each of their elements
        if not any(value is default or (type(value) in (bool, int, float) and value == default)
                   for default in known[name].defaults):  # fmt: skip
            raise NotImplementedError(
                f"{where}: `{name}` is taken only as {known[name].defaults[0]}, got {_short(value)}; "
                f"{known[name].instead}."
            )


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, (bool, int, float, str)) else f"a {type(value).__name__}"
