"""The sampling race: every code of a small gated prior by the naive sampler, by caches alone, and by fastvid's plan."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cached_pixelcnn import CachedPixelCNN, sample_cached
from peak import floor
from timing import Contestant, GateError, Race, threads
from torch import Tensor

from fastvid import ops
from fastvid.nn import GatedPixelStack, GatedStackConfig
from fastvid.sampling import NARROW, Noise, SamplingPlan, sample, sample_naive

SMALL = GatedStackConfig(
    codes=512, channels=64, layers=8, kernel=3, time_kernel=3, condition_channels=64, attention_every=0
)
GRID = (3, 32, 32)
GATE_GRID = (3, 4, 5)  # the naive sampler itself is asked for these many codes only
NAIVE_CODES = 8  # a naive run draws this many of the grid's codes; every code costs it the same
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Inputs:
    """One round's: a condition, the noise that decides the draws, and the rows of it that a naive run will use."""

    condition: Tensor
    noise: Noise
    codes: Tensor
    gumbel: list[Tensor]


def small_stack(device: str) -> GatedPixelStack:
    """The case's prior with the same fresh weights in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stack = GatedPixelStack(SMALL)
    return stack.eval().requires_grad_(False).to(device)


def sampling_race(
    device: str = "cpu", stack: GatedPixelStack | None = None, grid: tuple[int, int, int] = GRID
) -> Race:
    """Batch 1, float32. Tests give a smaller stack and grid."""
    stack = stack or small_stack(device)
    total = grid[0] * grid[1] * grid[2]
    positions = _spread(grid, min(NAIVE_CODES, total))
    return Race(
        gate=lambda: _gate(stack, grid, device),
        inputs=lambda number: _inputs(stack, grid, positions, number, device),
        contestants=[
            Contestant(
                "naive", lambda given: _naive_codes(stack, given, positions), scaled_from=len(positions), whole=total
            ),
            Contestant("cached", lambda given: _cached_codes(stack, given)),
            Contestant("plan", lambda given: sample(stack, given.condition, given.noise)),
        ],
        floor=lambda: floor(2.0 * _weights(stack) * total, 0.0, device, torch.get_num_threads()),
        device=device,
    )


def _spread(grid: tuple[int, int, int], count: int) -> list[tuple[int, int, int]]:
    """`count` positions, evenly over the grid in raster order."""
    T, H, W = grid
    numbers = [(2 * i + 1) * T * H * W // (2 * count) for i in range(count)]
    return [(n // (H * W), n // W % H, n % W) for n in numbers]


def _inputs(stack: GatedPixelStack, grid, positions, number: int, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(1000 + number)
    condition = torch.randn(1, *grid, stack.config.condition_channels, generator=generator).to(device)
    noise = Noise(seed=number, samples=(number,))
    codes = torch.randint(stack.config.codes, (1, *grid), generator=generator).to(device)
    gumbel = [noise.row(t, y, grid[2], stack.config.codes, condition.device)[:, x] for t, y, x in positions]
    return Inputs(condition, noise, codes, gumbel)


@torch.no_grad()
def _naive_codes(stack: GatedPixelStack, given: Inputs, positions) -> Tensor:
    """What sample_naive does for each code, at some positions. The noise comes ready: that much it is favoured."""
    codes = given.codes.clone()
    for (t, y, x), gumbel in zip(positions, given.gumbel, strict=True):
        codes[:, t, y, x] = ops.draw(stack(codes, given.condition)[:, t, y, x], gumbel)
    return codes


def _cached_codes(stack: GatedPixelStack, given: Inputs) -> Tensor:
    # fastvid samples narrow stacks on one thread: a peer that had to share its small products would lose by that alone
    with threads(1 if stack.config.channels < NARROW else None):
        return sample_cached(stack, given.condition, given.noise)


def _weights(stack: GatedPixelStack) -> int:
    """Multiplications that every code needs: each weight matrix once, the embedding's rows being copied."""
    matrices = (p for name, p in stack.named_parameters() if p.ndim > 1 and not name.startswith("embed."))
    return sum(p.numel() for p in matrices)


@torch.no_grad()
def _gate(stack: GatedPixelStack, grid: tuple[int, int, int], device: str) -> str:
    """The naive sampler's codes on a small grid; on the whole grid its decisions and its logits."""
    classes = stack.config.codes
    small = _inputs(stack, GATE_GRID, [], 0, device)
    naive = sample_naive(stack, small.condition, small.noise)
    samplers: dict[str, Callable] = {"cached": sample_cached, "plan": sample}
    whole = _inputs(stack, grid, [], 0, device)
    forward = stack(whole.codes, whole.condition)
    worst = 0.0
    for name, sampler in samplers.items():
        if not torch.equal(sampler(stack, small.condition, small.noise), naive):
            raise GateError(f"{name} does not draw the naive codes on a grid of {GATE_GRID}")
        error = (_stepped(name, stack, whole) - forward).abs().max().item()
        if not error <= TOLERANCE:
            raise GateError(f"{name} has logits {error:.1e} away from the network's, more than {TOLERANCE:.0e}")
        worst = max(worst, error)
        # each code of a naive run is the best under logits that see only the codes before it: one forward tells all
        codes = sampler(stack, whole.condition, whole.noise)
        rows = [whole.noise.row(t, y, grid[2], classes, codes.device) for t in range(grid[0]) for y in range(grid[1])]
        scores = stack(codes, whole.condition) + torch.stack(rows, dim=1).unflatten(1, grid[:2])
        regret = (scores.amax(-1) - scores.gather(-1, codes.unsqueeze(-1)).squeeze(-1)).max().item()
        if not regret <= 2 * TOLERANCE:
            raise GateError(f"{name} draws a code that scores {regret:.1e} below the naive sampler's choice")
    return f"codes as naive's, logits within {worst:.1e} of the network's"


@torch.no_grad()
def _stepped(name: str, stack: GatedPixelStack, given: Inputs) -> Tensor:
    """Teacher-forced logits by the steps of a sampler. -> [1, T, H, W, K]."""
    walker = (CachedPixelCNN if name == "cached" else SamplingPlan)(stack, given.condition)
    _, T, H, W = given.codes.shape
    logits = []
    for t in range(T):
        if name == "plan":
            walker.frame(t)
        for y in range(H):
            walker.row(*((t, y) if name == "cached" else (y,)))
            for x in range(W):
                logits.append(walker.pixel(x))
                walker.put(x, given.codes[:, t, y, x])
    return torch.stack(logits, dim=1).unflatten(1, (T, H, W))
