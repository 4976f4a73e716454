"""Named sizes of attention inside boxes, and how results are judged: tested, timed and tuned from this list."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from random import Random

import torch
from fastvid.kernels.axial_attention import reference
from torch import Tensor

from fastvid.testing import Subject, assert_within_yardstick

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """A grid [B, T, H, W] of A heads of width E, values of width D, cut into boxes.

    D: E by default. keys: their grid, T H W; the queries' by default. fused: q, k and v in one tensor.
    """

    name: str
    grid: tuple[int, int, int, int]
    heads: int
    E: int
    box: Grid
    mask: str = "none"
    D: int | None = None
    bias: bool = False
    keys: Grid | None = None
    fused: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def scores(self) -> tuple[int, int]:
        """Queries and keys of a box."""
        key_grid = self.keys or self.grid[1:]
        return prod(self.box), prod(key_grid) // prod(reference.cells_of(self.grid[1:], self.box))

    @property
    def work(self) -> int:
        """Multiply-adds, those behind the mask included."""
        return prod(self.grid) * self.heads * self.scores[1] * (self.E + (self.D or self.E))

    def make(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
        """Fresh random arguments of ops.axial_attention, by position."""
        fresh = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
        B, A = self.grid[0], self.heads
        bias = torch.randn(A, *self.scores, device=device) if self.bias else None
        if self.fused:
            return fresh(*self.grid, 3, A, self.E), None, None, None, self.box, self.mask, bias, None, True
        key_grid = (B, *(self.keys or self.grid[1:]))
        q, k, v = fresh(*self.grid, A, self.E), fresh(*key_grid, A, self.E), fresh(*key_grid, A, self.D or self.E)
        return q, k, v, None, self.box, self.mask, bias, None, True

    def make_backward(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
        """Fresh random arguments of ops.axial_attention_backward, by position."""
        q, k, v, _, box, mask, bias, _, _ = self.make(device, dtype)
        box, scale = [*box], q.shape[-1] ** -0.5
        out, lse = reference.axial_attention(q, k, v, bias, box, mask, scale, True)
        grad_lse = torch.randn_like(lse) if self.bias else None
        wanted = [True, not self.fused, not self.fused, self.bias]
        return q, k, v, bias, out, lse, torch.randn_like(out), grad_lse, box, mask, scale, wanted


@dataclass(frozen=True)
class Projected:
    """x [B, T, H, W, C] through attentions of one size and their projections, back to C channels."""

    name: str
    grid: tuple[int, int, int, int]
    C: int
    heads: int
    E: int
    axes: tuple[int | Grid, ...]
    mask: str = "none"
    D: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def work(self) -> int:
        """Multiply-adds of the projections."""
        return prod(self.grid) * self.C * self.heads * 2 * (self.E + (self.D or self.E)) * len(self.axes)

    def make(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
        """Fresh random arguments of ops.axial_self_attention, by position."""
        fresh = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
        C, inner, values = self.C, self.heads * self.E, self.heads * (self.D or self.E)
        shapes = ((inner, C), (inner, C), (values, C), (C, values))
        projections = [tuple(fresh(*shape) * shape[1] ** -0.5 for shape in shapes) for _ in self.axes]
        return fresh(*self.grid, C), projections, self.axes, self.heads, self.mask, fresh(C), None


ALL = [
    Case("one-position", (1, 1, 1, 1), 1, 1, (1, 1, 1), "causal"),
    Case("strict-line", (2, 1, 2, 5), 2, 4, (1, 1, 5), "strict"),
    Case("odd", (1, 3, 5, 7), 3, 5, (3, 1, 1), "causal", D=9, fused=False),
    Case("step", (2, 1, 3, 2), 2, 16, (1, 1, 1), "causal", keys=(7, 3, 2)),
    Case("pooled", (2, 4, 6, 2), 1, 3, (1, 6, 1), D=12, keys=(4, 3, 2)),
    Case("blocks", (1, 4, 4, 6), 2, 8, (2, 2, 3), "causal", bias=True),
    Case("columns", (1, 2, 16, 5), 2, 16, (1, 16, 1), fused=True),
    Case("frames", (1, 4, 3, 5), 4, 32, (4, 1, 1), "strict", fused=True),
    Case("long-line", (1, 1, 1, 150), 1, 8, (1, 1, 150), "causal"),
    Case("raster-step", (2, 1, 1, 1), 2, 16, (1, 1, 1), keys=(1, 1, 300)),
    Case("rows", (1, 2, 8, 32), 4, 32, (1, 1, 32), fused=True),
]
EMPTY = Case("empty", (0, 2, 3, 4), 2, 8, (1, 1, 4), "causal")
LARGE = [  # for a GPU: lines of video transformers, and what the priors look back on
    Case("video-rows", (2, 16, 64, 64), 8, 64, (1, 1, 64), fused=True),
    Case("video-columns", (2, 16, 64, 64), 8, 64, (1, 64, 1), fused=True),
    Case("video-frames", (2, 16, 64, 64), 8, 64, (16, 1, 1), "causal", fused=True),
    Case("latent-blocks", (4, 4, 16, 16), 8, 128, (4, 8, 8), "causal", bias=True),
    Case("long-lines", (2, 1, 4, 1024), 8, 64, (1, 1, 1024), "causal"),
    Case("prior-step", (4, 1, 1, 1), 8, 64, (1, 1, 1), keys=(1, 1, 3072)),
]
PROJECTED = [
    Projected("one-position", (1, 1, 1, 1), 2, 1, 1, (1,)),
    Projected("odd", (2, 3, 5, 7), 13, 3, 5, (1, 2, 3), "causal", D=7),
    Projected("blocks", (1, 4, 4, 6), 16, 2, 8, ((2, 2, 3), (4, 4, 6)), "strict"),
    Projected("three-axes", (1, 4, 16, 16), 64, 4, 16, (1, 2, 3)),
]
NOTHING = Projected("empty", (0, 2, 3, 4), 8, 2, 4, (3, 2))


def drawn(random: Random) -> Case:
    """A size that nobody chose."""
    cells = [random.randint(1, 3) for _ in range(3)]
    box = random.choice([(1, 1, random.randint(1, 40)), (random.randint(1, 6), 1, 1), (2, 3, random.randint(1, 4))])
    grid = (random.randint(1, 3), *(count * extent for count, extent in zip(cells, box, strict=True)))
    mask, heads, E, D = random.choice(reference.MASKS), random.randint(1, 4), random.randint(1, 40), None
    fused, bias, keys = random.random() < 0.4, random.random() < 0.3, None
    if not fused and random.random() < 0.5:
        D = random.randint(1, 40)
    if not fused and random.random() < 0.4:
        keys = tuple(count * random.randint(1, 7) for count in cells)
    named = f"{grid} boxes {box} of {heads} x {E}, {D} {mask} keys {keys} fused {fused} bias {bias}"
    return Case(named, grid, heads, E, box, mask, D, bias, keys, fused)


def drawn_projected(random: Random) -> Projected:
    """A size that nobody chose, with its projections."""
    grid = (random.randint(1, 2), random.randint(1, 4), random.randint(1, 6), random.randint(1, 20))
    axes = tuple(random.choice([1, 2, 3, grid[1:], (1, 1, 1)]) for _ in range(random.randint(1, 3)))
    C, heads, E, D = random.randint(1, 70), random.randint(1, 4), random.randint(1, 20), random.randint(1, 20)
    mask = random.choice(reference.MASKS)
    return Projected(f"{grid} {C} channels {axes} {heads} x {E}, {D} {mask}", grid, C, heads, E, axes, mask, D)


def settled(args: tuple, dtype: torch.dtype) -> tuple:
    """Arguments of axial_attention as its backends see them, in another dtype."""
    q, k, v, _, box, mask, bias, _, keep = in_dtype(args, dtype)
    return q, k, v, bias, [*box], mask, q.shape[-1] ** -0.5, keep


def in_dtype(args: tuple, dtype: torch.dtype) -> tuple:
    """The same arguments with every tensor in another dtype; lists of tensors too."""
    return tuple(
        a.to(dtype) if isinstance(a, Tensor)
        else [in_dtype(one, dtype) for one in a] if isinstance(a, list) and a and isinstance(a[0], tuple)
        else a
        for a in args
    )  # fmt: skip


def judge(args: tuple, result: tuple[Tensor, Tensor]) -> None:
    """Raise AssertionError unless both outputs are as near to the float64 answer as plain torch's of the same dtype."""
    exact = reference.axial_attention(*settled(args, torch.float64))
    # a bias may be float32 beside lower precision
    own = settled(args, args[0].dtype)
    peer = reference.axial_attention(*own[:3], args[6], *own[4:])
    hidden = exact[1] == float("-inf")  # of a query that sees nothing
    same = torch.equal(result[1] == float("-inf"), hidden)
    assert same, "lse is -inf for other queries than those that see nothing"
    shown = (part[1].masked_fill(hidden, 0.0) for part in (result, exact, peer))
    _judge_each(("out", "lse"), *((part[0], lse) for part, lse in zip((result, exact, peer), shown, strict=True)))


def judge_backward(args: tuple, result: tuple[Tensor, ...]) -> None:
    """The same of the four gradients. At the scores a difference is taken, which is zero for a single key: its rounding
    is measured by what it is taken from."""
    exact = reference.axial_attention_backward(*in_dtype(args, torch.float64))
    peer = reference.axial_attention_backward(*args)
    out = args[4]
    whole = in_dtype((*args[:4], torch.zeros_like(out), args[5], args[6], None, *args[8:]), torch.float64)
    both = zip(exact, reference.axial_attention_backward(*whole), strict=True)
    largest = [float(torch.maximum(a.abs(), b.abs()).max()) if a.numel() else None for a, b in both]
    _judge_each(("grad_q", "grad_k", "grad_v", "grad_bias"), result, exact, peer, largest)


def judge_projected(args: tuple, result: Tensor) -> None:
    """The same of the sum of projected attentions."""
    exact, peer = (_projected(in_dtype(args, dtype)) for dtype in (torch.float64, args[0].dtype))
    assert_within_yardstick(result, exact, peer)


def _projected(args: tuple) -> Tensor:
    x, projections, axes, heads, mask, bias, _ = args
    boxes = []
    for axis in axes:
        line = [x.shape[i] if i == axis else 1 for i in (1, 2, 3)]
        boxes += line if isinstance(axis, int) else axis
    weights = [weight for four in projections for weight in four]
    scales = [(four[0].shape[0] // heads) ** -0.5 for four in projections]
    return reference.axial_self_attention(x, weights, bias, boxes, heads, mask, scales)[0]


def _judge_each(
    names: tuple[str, ...], result: tuple, exact: tuple, peer: tuple, largest: Sequence[float | None] | None = None
) -> None:
    for name, ours, true, same, size in zip(
        names, result, exact, peer, largest or [None] * len(names), strict=True
    ):
        try:
            assert_within_yardstick(ours, true, same, largest=size)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUBJECTS = [
    Subject("axial_attention", ALL, EMPTY, drawn, Case.make, judge, DTYPES, call=lambda op, args: op(*args)),
    Subject(
        "axial_attention_backward", ALL, EMPTY, drawn, Case.make_backward, judge_backward, DTYPES,
        call=lambda op, args: op(*args),
    ),
    Subject(
        "axial_self_attention", PROJECTED, NOTHING, drawn_projected, Projected.make, judge_projected, DTYPES[:2],
        call=lambda op, args: op(*args),
    ),
]  # fmt: skip
