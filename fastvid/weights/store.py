"""The weights folder: reading a network back, checked, and writing one whole or not at all."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvid.checkpoint import sync
from fastvid.errors import WeightsError
from fastvid.weights.kinds import HALVES, KINDS, SUFFIX, fingerprint, weights_folder

STRAY_AGE = 3600  # seconds


class Weights(NamedTuple):
    """A network's tensors. metric: what they may be used for, in words."""

    kind: str
    tensors: dict[str, Tensor]
    fingerprint: str
    metric: str


def load_weights(kind: str) -> Weights:
    """A network from the weights folder, checked against its fingerprint.

    kind:    of `KINDS`.
    Returns: Weights, tensors float32 on the CPU under their canonical names.
    Raises:  WeightsError if it is unknown, missing (with the commands that get it), unreadable, damaged or another one.
    """
    if kind not in KINDS:
        raise WeightsError(f"weights: wanted one of {', '.join(KINDS)}, got {kind!r}.")
    path = weights_folder() / KINDS[kind].file
    if not path.is_file():
        raise WeightsError(
            f"{KINDS[kind].metric} needs {path}, which is missing; get it once: {' && '.join(KINDS[kind].commands)}"
        )
    tensors, noted = read_safetensors(path)
    found, wanted = fingerprint(tensors), KINDS[kind].fingerprint or noted.get("fingerprint")
    if found != wanted:
        raise WeightsError(
            f"{path} is damaged or holds other tensors: wanted fingerprint {(wanted or 'none noted')[:12]}, got "
            f"{found[:12]}; delete it and get it again: {' && '.join(KINDS[kind].commands)}"
        )
    return Weights(kind, tensors, found, KINDS[kind].metric)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and notes of a safetensors file.

    path:    a regular file.
    Returns: (tensors by name, metadata).
    Raises:  WeightsError if it cannot be read as that.
    """
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{path} cannot be read as safetensors ({reason}); get it again.") from error
    return tensors, notes


def save_weights(kind: str, tensors: dict[str, Tensor], told: str, source: str, half: str = "") -> Path:
    """Keep a network in the weights folder; a kill at any moment leaves the old file or the new one.

    kind:    of `KINDS`. tensors: float32 by canonical name. told: their fingerprint.
    source:  the file that they came from, noted in it beside the fingerprint.
    half:    "trunk" or "heads" of one that waits for the other half, else empty.
    Returns: the file.
    Raises:  WeightsError if the disk refuses.
    """
    path = weights_folder() / _file(kind, half)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    notes = {"kind": kind, "fingerprint": told, "source": Path(source).name}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path)
        save_file({name: values.contiguous() for name, values in tensors.items()}, partial, notes)
        partial.chmod(0o644)  # a folder may serve a whole group
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"{path} cannot be written ({error}); make room, or name another folder by FASTVID_WEIGHTS."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def load_half(kind: str, half: str) -> dict[str, Tensor] | None:
    """A half that waits for its other half.

    kind:    of `HALVES`. half: "trunk" or "heads".
    Returns: its tensors; None if it is not there, or damaged.
    Raises:  nothing.
    """
    path = weights_folder() / _file(kind, half)
    try:
        tensors = read_safetensors(path)[0] if path.is_file() else {}
    except WeightsError:
        return None
    return tensors if fingerprint(tensors) == HALVES[kind][half] else None


def drop_half(kind: str) -> None:
    """Remove the halves of a network that is whole.

    kind:   of `HALVES`.
    Raises: nothing; what cannot be removed does no harm.
    """
    for half in HALVES[kind]:
        with suppress(OSError):
            (weights_folder() / _file(kind, half)).unlink(missing_ok=True)


def _file(kind: str, half: str) -> str:
    return KINDS[kind].file.replace(SUFFIX, f".{half}{SUFFIX}" if half else SUFFIX)


def _clear(path: Path) -> None:
    """Remove what killed writers left of this file; a younger one may still be at work."""
    for stray in path.parent.glob(f".{path.name}.*.partial"):
        with suppress(OSError):
            if time.time() - stray.stat().st_mtime > STRAY_AGE:
                stray.unlink()
