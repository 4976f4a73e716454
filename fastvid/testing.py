"""How a fast result is judged: by the error of plain torch in the same dtype, never by a tolerance of its own."""

import torch
from torch import Tensor


def assert_within_yardstick(ours: Tensor, exact: Tensor, peer: Tensor, factor: float = 2.0) -> None:
    """Fail if the worst error of `ours` exceeds `factor` times the worst error of `peer`, plus a tiny floor.

    ours:   the result under test, any shape. exact: the float64 answer. peer: plain torch in ours' dtype.
    factor: 2 unless a test says why not. The floor is 4 units in the last place of the largest exact value.
    Raises: AssertionError with both errors; also for NaN, infinities that `exact` lacks, or another shape or dtype.
    Source: the tolerance rule of FlashAttention's tests, Dao 2023, arXiv:2307.08691.
    """
    if ours.shape != exact.shape or ours.dtype != peer.dtype or exact.dtype != torch.float64:
        raise AssertionError(
            f"compared {list(ours.shape)} {ours.dtype} and peer {peer.dtype} with {list(exact.shape)} {exact.dtype}"
        )
    if exact.numel() == 0:
        return
    floor = 4 * torch.finfo(ours.dtype).eps * float(exact.detach().abs().max())
    error, allowed = _worst(ours, exact), factor * _worst(peer, exact) + floor
    if not error <= allowed:  # written so that NaN fails
        raise AssertionError(f"error {error:.3g} exceeds the yardstick {allowed:.3g} (floor {floor:.3g})")


def _worst(value: Tensor, exact: Tensor) -> float:
    return float((value.detach().double() - exact.detach()).abs().max())
