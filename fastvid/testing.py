"""How a fast result is judged: by the error of plain torch in the same dtype, never by a tolerance of its own."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Subject:
    """An op with what its laws need; a room's cases.py lists one for each of its ops.

    cases:  named sizes, each with the `work` it asks for; empty: one without rows, None where the op knows none.
    drawn:  a size at random.
    make:   arguments of the op for (case, device, dtype), by position.
    judge:  raises AssertionError unless the result of a call is right for these arguments.
    call:   calls a function of the op's arguments, leaving them as they are, and returns what is judged.
    """

    op: str
    cases: list[Any]
    empty: Any
    drawn: Callable[[Random], Any]
    make: Callable[..., tuple]
    judge: Callable[[tuple, Any], None]
    dtypes: tuple[torch.dtype, ...]
    call: Callable[[Callable, tuple], Any]


def assert_within_yardstick(
    ours: Tensor, exact: Tensor, peer: Tensor, factor: float = 2.0, largest: float | None = None
) -> None:
    """Fail if the worst error of `ours` exceeds `factor` times the worst error of `peer`, plus a tiny floor.

    ours:   the result under test, any shape. exact: the float64 answer. peer: plain torch in ours' dtype.
    factor: 2 unless a test says why not. largest: the floor is 4 units in the last place of it; by default of the
            largest exact value. Where terms cancel, such as in a softmax's gradient, it is the size of the terms.
    Raises: AssertionError with both errors; also for NaN, infinities that `exact` lacks, or another shape or dtype.
    Source: the tolerance rule of FlashAttention's tests, Dao 2023, arXiv:2307.08691.
    """
    if ours.shape != exact.shape or ours.dtype != peer.dtype or exact.dtype != torch.float64:
        raise AssertionError(
            f"compared {list(ours.shape)} {ours.dtype} and peer {peer.dtype} with {list(exact.shape)} {exact.dtype}"
        )
    if exact.numel() == 0:
        return
    largest = float(exact.detach().abs().max()) if largest is None else largest
    floor = 4 * torch.finfo(ours.dtype).eps * largest
    error, allowed = _worst(ours, exact), factor * _worst(peer, exact) + floor
    if not error <= allowed:  # written so that NaN fails
        raise AssertionError(f"error {error:.3g} exceeds the yardstick {allowed:.3g} (floor {floor:.3g})")


def _worst(value: Tensor, exact: Tensor) -> float:
    return float((value.detach().double() - exact.detach()).abs().max())


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is poisoned while inside: an output element nobody wrote fails loudly, not by chance."""
    places = [(torch, ("empty", "empty_like", "empty_strided")), (Tensor, ("new_empty", "new_empty_strided"))]
    found = [(owner, name, getattr(owner, name)) for owner, names in places for name in names]
    try:
        for owner, name, allocate in found:
            setattr(owner, name, _poisoned(allocate))
        yield
    finally:
        for owner, name, allocate in found:
            setattr(owner, name, allocate)


def _poisoned(allocate: Callable) -> Callable:
    @functools.wraps(allocate)
    def allocate_poisoned(*args, **kwargs):
        out = kwargs.get("out")  # a caller's own tensor is not fresh memory
        return _poison(allocate(*args, **kwargs)) if out is None else allocate(*args, **kwargs)

    return allocate_poisoned


def _poison(tensor: Tensor) -> Tensor:
    """Filled with values that no computation survives unnoticed: NaN, or the largest integer."""
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype in _INTEGERS else tensor
