"""The sampling race: every code of a small gated prior by the naive sampler, by caches alone, and by fastvid."""

from dataclasses import dataclass

import torch
from cached_pixelcnn import CachedPixelCNN, sample_cached
from floors import operations
from peak import floor
from timing import Contestant, GateError, Race, threads
from torch import Tensor

import fastvid
from fastvid import ops
from fastvid.nn import GatedPixelStack, GatedStackConfig
from fastvid.ops._op import SERVES
from fastvid.sampling import Noise, pack_stack, sample_grid, sample_naive

SMALL = GatedStackConfig(
    codes=512, channels=64, layers=8, kernel=3, time_kernel=3, condition_channels=64, attention_every=0
)
GRID = (3, 32, 32)
GATE_GRID = (3, 4, 5)  # the naive sampler itself is asked for these many codes only
NAIVE_CODES = 8  # a naive run draws this many of the grid's codes; every code costs it the same
NARROW = 256  # channels below which a peer's products are too small to share between threads
TOLERANCE = 1e-5
FRESH = "weights are fresh, so what a window settles says little of a trained model; sequential is the kernel alone"
CPU_TIERS = {"plan": ("reference", 0), "native": ("cpu", 0), "sequential": ("cpu", 1)}  # name -> backend, window
GPU_TIERS = {"plan": ("reference", 0), "triton": ("triton", 0), "cuda": ("cuda", 0), "sequential": ("cuda", 1)}


@dataclass(frozen=True)
class Inputs:
    """One round's: a condition, the noise that decides the draws, and the rows of it that a naive run will use."""

    condition: Tensor
    noise: Noise
    codes: Tensor
    gumbel: list[Tensor]


def fresh_stack(config: GatedStackConfig, device: str = "cpu") -> GatedPixelStack:
    """A stack with the same fresh weights in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stack = GatedPixelStack(config)
    return stack.eval().requires_grad_(False).to(device)


def sampling_race(
    device: str = "cpu", stack: GatedPixelStack | None = None, grid: tuple[int, int, int] = GRID
) -> Race:
    """Batch 1, float32. Tests give a smaller stack and grid."""
    stack = stack or fresh_stack(SMALL, device)
    total = grid[0] * grid[1] * grid[2]
    positions = _spread(grid, min(NAIVE_CODES, total))
    tiers = CPU_TIERS if device == "cpu" else GPU_TIERS
    condition = _inputs(stack, grid, [], 0, device).condition
    why = {backend: why_not(stack, condition, backend) for backend, _ in tiers.values()}
    able = {name: tier for name, tier in tiers.items() if why[tier[0]] is None}
    naive = Contestant(
        "naive", lambda given: _naive_codes(stack, given, positions), scaled_from=len(positions), whole=total
    )
    return Race(
        gate=lambda: _gate(stack, grid, device, able),
        inputs=lambda number: _inputs(stack, grid, positions, number, device),
        contestants=[
            naive,
            Contestant("cached", lambda given: _cached_codes(stack, given)),
            *(_contestant(stack, name, tier, why[tier[0]]) for name, tier in tiers.items()),
        ],
        floor=lambda: floor(operations(stack, grid), 0.0, device, torch.get_num_threads()),
        device=device,
        codes=total,
    )


def why_not(stack: GatedPixelStack, condition: Tensor, backend: str, weights: str = "float32") -> str | None:
    """Why a backend of the sampler cannot run here, in a few words; None where it can."""
    if backend not in {known.name for known in ops.pixelcnn_sample.backends}:
        return f"the sampler has no backend {backend}"
    samples = torch.arange(len(condition), device=condition.device)
    told = ops.pixelcnn_sample.reasons(*pack_stack(stack, weights), condition, samples, backend=backend)[backend]
    return None if told == SERVES else told


def native_missing() -> str | None:
    """Why the native backend cannot run on this machine's processor; None where it can."""
    config = GatedStackConfig(codes=4, channels=8, layers=1, condition_channels=1, attention_every=0)
    return why_not(fresh_stack(config), torch.zeros(1, 1, 1, 1, 1), "cpu")


def passes_of(sampled) -> float:
    """Sequential evaluations that a grid took."""
    return float(sampled.passes.sum())


def _contestant(stack: GatedPixelStack, name: str, tier: tuple[str, int], missing: str | None) -> Contestant:
    if missing:
        return Contestant(name, missing=missing)
    return Contestant(name, lambda given: _tier(stack, given, tier), passes=passes_of)


def _tier(stack: GatedPixelStack, given: Inputs, tier: tuple[str, int]):
    backend, window = tier
    return sample_grid(stack, given.condition, given.noise, weights="float32", window=window, backend=backend)


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
    """What sample_naive does for each code, at some positions, the network being plain torch's. The noise comes ready:
    that much it is favoured."""
    codes = given.codes.clone()
    for (t, y, x), gumbel in zip(positions, given.gumbel, strict=True):
        with fastvid.backend("reference"):
            logits = stack(codes, given.condition)[:, t, y, x]
        codes[:, t, y, x] = ops.draw(logits, gumbel)
    return codes


def _cached_codes(stack: GatedPixelStack, given: Inputs) -> Tensor:
    # handing out small products costs more than they do: with more threads the peer would lose by that alone
    with threads(1 if stack.config.channels < NARROW else None):
        return sample_cached(stack, given.condition, given.noise)


@torch.no_grad()
def _gate(stack: GatedPixelStack, grid: tuple[int, int, int], device: str, able: dict[str, tuple[str, int]]) -> str:
    """The naive sampler's codes on a small grid; on the whole grid its decisions and its log-probabilities."""
    small, whole = (_inputs(stack, size, [], 0, device) for size in (GATE_GRID, grid))
    naive = sample_naive(stack, small.condition, small.noise)
    if not torch.equal(sample_cached(stack, small.condition, small.noise), naive):
        raise GateError(f"cached does not draw the naive codes on a grid of {GATE_GRID}")
    _decided("cached", stack, whole, sample_cached(stack, whole.condition, whole.noise))
    errors = [_within("cached", (_stepped(stack, whole) - stack(whole.codes, whole.condition)).abs().max().item())]
    for name, tier in able.items():
        if not torch.equal(_tier(stack, small, tier).codes, naive):
            raise GateError(f"{name} does not draw the naive codes on a grid of {GATE_GRID}")
        sampled = _tier(stack, whole, tier)
        logits = _decided(name, stack, whole, sampled.codes)
        logprob = torch.log_softmax(logits, dim=-1).gather(-1, sampled.codes.unsqueeze(-1)).squeeze(-1)
        errors.append(_within(name, (sampled.logprob - logprob).abs().max().item()))
    return f"codes as naive's, logits within {max(errors):.1e} of the network's; {FRESH}"


def _decided(name: str, stack: GatedPixelStack, given: Inputs, codes: Tensor) -> Tensor:
    """The network's logits for drawn codes; each code must be the best under those of its own place."""
    # every logit sees only the codes before it, so that one forward judges all the draws of a naive run
    logits, (_, T, H, W) = stack(codes, given.condition), codes.shape
    rows = [given.noise.row(t, y, W, stack.config.codes, codes.device) for t in range(T) for y in range(H)]
    scores = logits + torch.stack(rows, dim=1).unflatten(1, (T, H))
    regret = (scores.amax(-1) - scores.gather(-1, codes.unsqueeze(-1)).squeeze(-1)).max().item()
    if not regret <= 2 * TOLERANCE:
        raise GateError(f"{name} draws a code that scores {regret:.1e} below the naive sampler's choice")
    return logits


def _within(name: str, error: float) -> float:
    if not error <= TOLERANCE:
        raise GateError(f"{name} has logits {error:.1e} away from the network's, more than {TOLERANCE:.0e}")
    return error


@torch.no_grad()
def _stepped(stack: GatedPixelStack, given: Inputs) -> Tensor:
    """Teacher-forced logits by the steps of the cached peer. -> [1, T, H, W, K]."""
    walker = CachedPixelCNN(stack, given.condition)
    _, T, H, W = given.codes.shape
    logits = []
    for t in range(T):
        for y in range(H):
            walker.row(t, y)
            for x in range(W):
                logits.append(walker.pixel(x))
                walker.put(x, given.codes[:, t, y, x])
    return torch.stack(logits, dim=1).unflatten(1, (T, H, W))
