"""Named sizes of nearest_codebook, and how its results are judged: tested, timed and tuned from this one list."""

from dataclasses import dataclass
from random import Random

import torch
from fastvid.kernels.nearest_codebook import reference
from torch import Tensor

from fastvid.testing import Subject, assert_within_yardstick

ROUNDING = {"exact": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8}  # unit roundoff of a product's operands


@dataclass(frozen=True)
class Case:
    """N rows of width D against K codes; both `offset` away from the origin."""

    name: str
    N: int
    K: int
    D: int
    offset: float = 0.0

    def __str__(self) -> str:
        return self.name

    @property
    def work(self) -> int:
        """Multiply-adds of a lookup."""
        return self.N * self.K * self.D

    def make(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Fresh random rows [N, D] in `dtype` and codebook [K, D] in float32 (float64 for float64 rows)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x = torch.randn(self.N, self.D, device=device, dtype=wide) + self.offset
        return x.to(dtype), torch.randn(self.K, self.D, device=device, dtype=wide) + self.offset

    def make_update(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
        """Fresh random arguments of nearest_codebook_ema_, from codebook to restart_size."""
        state = torch.randn(self.K, self.D), torch.rand(self.K) * 4, torch.randn(self.K, self.D)
        batch = torch.randint(0, 6, (self.K,)), torch.randn(self.K, self.D)
        steps, restart = torch.tensor(self.N % 5), torch.randn(self.K, self.D)
        floats = [t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in (*state, *batch, restart)]
        return (*floats[:5], 0.9, 1e-5, steps.to(device), 0.8, floats[5], 2.0)


ALL = [
    Case("one-row", 1, 3, 1),
    Case("one-code", 33, 1, 7),
    Case("odd", 77, 13, 5),
    Case("wide", 40, 65, 130),
    Case("offset", 200, 100, 24, offset=30.0),
    Case("dino64-top", 8 * 256, 512, 16),
    Case("paper-top-clip", 4096, 512, 64),
]
EMPTY = Case("empty", 0, 5, 4)
LARGE = [Case("paper-bottom-batch", 524_288, 512, 64), Case("16k-codes", 1_048_576, 16_384, 256)]  # for a GPU


def drawn(random: Random) -> Case:
    """A size that nobody chose."""
    N, K, D = random.randint(0, 300), random.randint(1, 200), random.randint(1, 90)
    return Case(f"{N}x{K}x{D}", N, K, D, offset=random.choice([0.0, 0.0, 10.0]))


def judge(args: tuple, near: reference.Nearest) -> None:
    """Raise AssertionError unless a lookup is right: the choice by its regret, the rest by the choice. Finite rows."""
    x, codebook, *options = args
    precision = options[1] if len(options) > 1 else "exact"
    rows, codes = x.double(), codebook.double()
    away, centred = rows - codes.mean(dim=0), codes - codes.mean(dim=0)
    distance = torch.cdist(away, centred, compute_mode="donot_use_mm_for_euclid_dist").square()  # [N, K]
    chosen = distance.gather(1, near.indices[:, None]).squeeze(1)
    # rounding may flip a near tie; it may not cost more than the rounding of the terms that were compared
    terms = (away.norm(dim=1) + centred.norm(dim=1).max()).square()
    regret, allowed = chosen - distance.amin(dim=1), 8 * ROUNDING[precision] * terms
    assert (regret <= allowed).all(), f"regret {regret.max():.3g} where at most {allowed.min():.3g} is rounding"

    picked = codebook[near.indices]
    assert torch.equal(near.quantized, picked.to(x.dtype)), "quantized are not the rows of the codebook"
    wide = reference.wide_dtype(x, codebook)
    peer = (x.to(wide) - picked.to(wide)).square().sum(dim=1)
    assert_within_yardstick(near.squared_distance, (rows - picked.double()).square().sum(dim=1), peer)
    assert near.nonfinite.item() == 0
    if near.counts.numel():
        _judge_statistics(x, near, codes, peer)


def _judge_statistics(x: Tensor, near: reference.Nearest, codes: Tensor, peer: Tensor) -> None:
    counts = torch.bincount(near.indices, minlength=len(codes))
    assert torch.equal(near.counts, counts), "counts are not the rows per code"
    zeros = torch.zeros_like(codes)
    exact = zeros.index_add(0, near.indices, x.double())
    summed = zeros.to(peer.dtype).index_add(0, near.indices, x.to(peer.dtype))
    assert_within_yardstick(near.sums, exact, summed)


def judge_update(args: tuple, state: tuple[Tensor, ...]) -> None:
    """Raise AssertionError unless codebook, cluster_size and cluster_sum, and the steps, are where they should be."""
    exact = updated([t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args])
    peer = updated(args)
    for ours, true, same in zip(state[:3], exact[:3], peer[:3], strict=True):
        assert_within_yardstick(ours, true, same)
    assert torch.equal(state[3], exact[3])


def updated(args: tuple, update=reference.nearest_codebook_ema_) -> tuple[Tensor, ...]:
    """Codebook, cluster_size, cluster_sum and steps after an update of copies of them."""
    own = [a.clone() if isinstance(a, Tensor) else a for a in args]
    update(*own)
    return own[0], own[1], own[2], own[7]


HALVES = (torch.bfloat16, torch.float16)
SUBJECTS = [
    Subject(
        "nearest_codebook", ALL, EMPTY, drawn, Case.make, judge, dtypes=(torch.float32, *HALVES),
        call=lambda op, args: op(*args),
    ),
    Subject(
        "nearest_codebook_ema_", ALL, None, drawn, Case.make_update, judge_update, dtypes=(torch.float32,),
        call=lambda op, args: updated(args, op),
    ),
]  # fmt: skip
