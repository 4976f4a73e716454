"""The published priors at full size: one row of a grid, timed by every contestant and scaled up to the grid.

Everything before the row is given and every contestant's caches hold it before anything is timed. A row in the middle
of a frame stands for the frame, one in the middle of the middle frame for the grid: of the earlier frames' taps as many
look at something, and attention sees as many positions, as on average.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from cached_pixelcnn import CachedPixelCNN
from fastvid.kernels.pixelcnn_sampler.session import OPEN, Job
from floors import cached_values, pass_weights, row_weights
from peak import cpu_rate, read_rate
from sampling_cases import why_not
from timing import Contestant, GateError, Race
from torch import Tensor

import fastvid
from fastvid import ops
from fastvid.models import preset
from fastvid.models.registry import _Unfilled
from fastvid.nn import GatedPixelStack, GatedStackConfig
from fastvid.sampling import Noise, pack_stack

SESSIONS = {
    "cpu": "fastvid.ops._cpu_sampler", "cuda": "fastvid.ops._cuda_sampler",
    "triton": "fastvid.kernels.pixelcnn_sampler.triton_gpu", "reference": "fastvid.kernels.pixelcnn_sampler.reference",
}  # fmt: skip
TOP_GRID, BOTTOM_GRID = (3, 32, 32), (1, 64, 64)
SLICES = 6  # of the bottom prior in a clip of 12 frames
NAIVE_CODES = 4  # a naive run on a GPU draws this many of each prior's
LOGIT_SPREAD = 3.0  # the head is scaled by it: fresh weights alone would leave all codes about equally likely
# how far logits may be from those of the float32 network, by the weights that they were computed with
LOGIT_ERROR = {"float32": 1e-4, "bfloat16": 0.25, "int8": 0.5}
HALF_PEERS = 0.5  # the same for peers that compute in bfloat16 throughout
MEAN_ERROR = 0.2  # of the above, for the average over all codes
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Tier:
    """A contestant of ours: a backend of the sampler, what it keeps weights as, and the window (0: its own choice)."""

    backend: str
    weights: str = "bfloat16"
    window: int = 0


@dataclass
class Row:
    """Row y of frame t of a grid, everything before it given, and the caches of whoever draws it."""

    stack: GatedPixelStack
    grid: tuple[int, int, int]
    at: tuple[int, int]
    batch: int = 1
    device: str = "cpu"
    peer_dtype: torch.dtype = torch.float32
    jobs: dict[Tier, tuple[Any, Job]] = field(default_factory=dict)

    def __post_init__(self):
        generator, c = torch.Generator().manual_seed(7), self.stack.config
        shape = (self.batch, *self.grid)
        self.condition = torch.randn(*shape, c.condition_channels, generator=generator).to(self.device)
        self.codes = torch.randint(c.codes, shape, generator=generator).to(self.device)
        self.peer = self.stack
        if self.peer_dtype != torch.float32:
            self.peer = _empty_stack(c, self.device).to(self.peer_dtype)
            self.peer.load_state_dict(self.stack.state_dict())
        self.peer_condition = self.condition.to(self.peer_dtype)

    def noise(self, number: int) -> Noise:
        """Of a round: each has samples of its own."""
        return Noise(0, tuple(range(number * self.batch, (number + 1) * self.batch)))

    @torch.no_grad()
    def fill(self, tiers: list[Tier]) -> Tensor:
        """Fill everybody's caches. -> the peers' logits of all given codes, [B, T, H, W, K] float32."""
        self.cached = CachedPixelCNN(self.peer, self.peer_condition)
        logits = self.cached.fill(self.codes).float()
        self.jobs = {tier: self._filled(tier) for tier in tiers}
        return logits

    def _filled(self, tier: Tier) -> tuple[Any, Job]:
        given, (_, H, _) = self.codes.clone(), self.grid
        given[:, self.at[0], self.at[1]] = OPEN
        samples = torch.arange(self.batch, device=self.device)
        packed = pack_stack(self.stack, tier.weights)
        job = Job(packed, self.condition, samples, 0, 0, 0, 1.0, tier.window, "raster", given, None)
        session = importlib.import_module(SESSIONS[tier.backend]).Session(job)
        for n in range(self.at[0] * H + self.at[1]):
            session.row(n // H, n % H)
        return session, job

    def drawn(self, tier: Tier, number: int) -> tuple[Tensor, float]:
        """The row as a backend draws it in a round. -> codes [B, W], evaluations of the pixel networks."""
        session, job = self.jobs[tier]
        job.samples.copy_(torch.tensor(self.noise(number).samples))  # in place: sessions know where it is
        session.row(*self.at)
        t, y = self.at
        return job.codes[:, t, y], float(job.passes[:, t, y].max())

    @torch.no_grad()
    def cached_row(self, number: int, codes: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """The row as the cached peer draws it, or with codes [B, W] in place of draws. -> codes, logits per column."""
        (t, y), W = self.at, self.grid[2]
        gumbel = self.noise(number).row(t, y, W, self.stack.config.codes, self.codes.device)
        self.cached.row(t, y)
        logits = []
        for x in range(W):
            logits.append(self.cached.pixel(x))
            self.cached.put(x, ops.draw(logits[-1], gumbel[:, x]) if codes is None else codes[:, x])
        return self.cached.codes[:, t, y], logits

    @torch.no_grad()
    def naive_codes(self, number: int, count: int) -> Tensor:
        """Some codes of the row, each by the whole network in plain torch. -> [B, count]."""
        (t, y), W = self.at, self.grid[2]
        gumbel = self.noise(number).row(t, y, W, self.stack.config.codes, self.codes.device)
        codes = self.codes.clone()
        for x in range(number % W, number % W + count):
            with fastvid.backend("reference"):
                logits = self.peer(codes, self.peer_condition)[:, t, y, x % W]
            codes[:, t, y, x % W] = ops.draw(logits, gumbel[:, x % W])
        return codes[:, t, y]


def large_stack(config: GatedStackConfig, device: str = "cpu") -> GatedPixelStack:
    """A stack with the same fresh weights in every run, made without torch's slow initialisation of each layer."""
    stack, generator = _empty_stack(config, device), torch.Generator(device).manual_seed(0)
    for name, p in stack.named_parameters():
        inputs = p.shape[:-1].numel() if p.ndim == 3 else p.shape[-1]
        # variance 1 / inputs for convolutions and head; a third of it for the layers' 1x1s and attention, as torch has
        # it: with more, 40 layers are chaotic, and the last bit of a weight decides every logit
        variance = 1 / 3 if p.ndim == 2 and name.startswith("layers.") else 1.0 if p.ndim > 1 else 0.0
        bound = (3.0 * variance / inputs) ** 0.5
        bound *= LOGIT_SPREAD if name == "head.3.weight" else inputs**0.5 if name == "embed.weight" else 1.0
        p.uniform_(-bound, bound, generator=generator)
    return stack


def _empty_stack(config: GatedStackConfig, device: str) -> GatedPixelStack:
    with _Unfilled(), torch.device(device):
        return GatedPixelStack(config).eval().requires_grad_(False)


# ---- one slice of the top prior on a processor


def slice_race(
    weights: tuple[str, ...] = ("bfloat16", "float32", "int8"), config: GatedStackConfig | None = None,
    grid: tuple[int, int, int] = TOP_GRID,
) -> Race:
    """The last frame of a grid, the frames before it given, batch 1.

    weights: what ours may keep them as; the first is `native`, which is also drawn one by one as `sequential`.
    """
    row = Row(large_stack(config or preset("top", "paper").stack), grid, (grid[0] - 1, grid[1] // 2))
    tiers = {"native": Tier("cpu", weights[0]), "sequential": Tier("cpu", weights[0], window=1)}
    tiers |= {name: Tier("cpu", name) for name in weights[1:]}
    why = why_not(row.stack, row.condition, "cpu", weights[0])
    _, H, W = grid

    def scaled(name: str, run: Callable, count: int, sampled: str, **more) -> Contestant:
        return Contestant(name, run, scaled_from=count, whole=H * W, sampled=sampled, **more)

    def ours(name: str, tier: Tier) -> Contestant:
        if why:
            return Contestant(name, missing=why)
        run = lambda number: row.drawn(tier, number)  # noqa: E731
        return scaled(name, run, W, "the row in the middle", passes=lambda told: told[1])

    able = {} if why else tiers
    return Race(
        gate=lambda: _gate(row, able),
        inputs=lambda number: number,  # of the round: it decides the noise
        contestants=[
            scaled("naive", lambda number: row.naive_codes(number, 1), 1, "another one in every round"),
            scaled("cached", lambda number: row.cached_row(number)[0], W, "the row in the middle"),
            *(ours(*one) for one in tiers.items()),
        ],
        floor=lambda: _slice_floor(row, tiers["native"]) if able else (None, None),
        codes=H * W,
    )


def _slice_floor(row: Row, tier: Tier) -> tuple[float, str]:
    """Seconds for a slice that even the best program needs for its rows and for the evaluations that ours took."""
    (_, H, W), (t, y), threads = row.grid, row.at, torch.get_num_threads()
    (rate, _), (bandwidth, how) = cpu_rate(threads), read_rate(threads)
    passes = sum(row.drawn(tier, number)[1] for number in range(1, 8)) / 7  # of a row
    once, each = row_weights(row.stack, t), pass_weights(row.stack)
    kept = cached_values(row.stack, row.grid, (t * H + y) * W + W // 2) * (4 if tier.weights == "float32" else 2)
    size = each * BYTES[tier.weights] + kept
    rows = max(2.0 * once * W / rate, once * BYTES[tier.weights] / bandwidth)
    drawn = max(2.0 * each * W / rate, passes * size / bandwidth)
    told = f"{H} rows of {rows * 1e3:.3g} ms, {H * passes:.0f} evaluations that each read {size / 1e6:.3g} MB at "
    told += f"{bandwidth / 1e9:.3g} GB/s of {how}; one by one {H * (rows + W * size / bandwidth):.3g} s"
    return H * (rows + drawn), told


# ---- whole clips on a GPU


def clip_race(
    batch: int, device: str = "cuda", configs: tuple[GatedStackConfig, GatedStackConfig] | None = None,
    grids: tuple[tuple[int, int, int], tuple[int, int, int]] = (TOP_GRID, BOTTOM_GRID), tiers=("triton", "cuda"),
    peer_dtype: torch.dtype = torch.bfloat16,
) -> Race:
    """Both priors' codes of 12 frames, the conditioning stacks apart: a row of each, scaled. Tests give other sizes."""
    configs = configs or tuple(preset(kind, "paper").stack for kind in ("top", "bottom"))
    top, bottom = (
        Row(large_stack(config, device), grid, (grid[0] // 2, grid[1] // 2), batch, device, peer_dtype)
        for config, grid in zip(configs, grids, strict=True)
    )
    rows = ((top, 1), (bottom, SLICES))
    why = {name: next(filter(None, (why_not(row.stack, row.condition, name, "bfloat16") for row, _ in rows)), None)
           for name in tiers}  # fmt: skip
    able = {name: Tier(name) for name in tiers if why[name] is None}

    def scaled(name: str, work: Callable[[Row, int], Any], count: int | None, **more) -> Contestant:
        """The same work on both rows; count codes of each, or all of them for None."""
        wholes = [row.grid[0] * row.grid[1] * row.grid[2] * times for row, times in rows]
        counts = [count or row.grid[2] for row, _ in rows]
        runs = [lambda number, row=row: work(row, number) for row, _ in rows]
        return Contestant(
            name, runs[0], scaled_from=counts[0], whole=wholes[0], others=((runs[1], wholes[1] / counts[1]),),
            sampled="in the middle of the top grid, and a row of the bottom's" if count is None else
            "in the middle of either grid", **more,
        )  # fmt: skip

    def ours(name: str) -> Contestant:
        if why[name]:
            return Contestant(name, missing=why[name])
        return scaled(name, lambda row, number: row.drawn(able[name], number), None, passes=lambda told: told[1])

    return Race(
        gate=lambda: f"top: {_gate(top, able)}; bottom: {_gate(bottom, able)}",
        inputs=lambda number: number,  # of the round: it decides the noise
        contestants=[
            scaled("naive", lambda row, number: row.naive_codes(number, NAIVE_CODES), NAIVE_CODES),
            scaled("cached", lambda row, number: row.cached_row(number)[0], None),
            *map(ours, tiers),
            *([Contestant("playback", given=12 / 25)] if batch == 1 else []),
        ],
        floor=None,
        device=device,
        codes=batch * sum(row.grid[0] * row.grid[1] * row.grid[2] * times for row, times in rows),
    )


# ---- the gate


@torch.no_grad()
def _gate(row: Row, tiers: dict[str, Tier]) -> str:
    """Fill the caches; everybody's log-probabilities of the given codes and draws of the row hold up to the network."""
    peers = row.fill(list(tiers.values()))
    logits = peers if row.peer_dtype == torch.float32 else row.stack(row.codes, row.condition)
    (t, y), (_, H, _) = row.at, row.grid
    limit = LOGIT_ERROR["float32"] if row.peer_dtype == torch.float32 else HALF_PEERS
    stepped = torch.stack(row.cached_row(0, row.codes[:, t, y])[1], dim=1).float()  # [B, W, K]
    error = (stepped - logits[:, t, y]).abs().max().item()
    if not error <= limit:
        raise GateError(f"cached has logits {error:.1e} away from the network's, more than {limit:.0e}")
    told = [f"cached's logits within {error:.1e} of the network's"]
    wanted = torch.log_softmax(logits, dim=-1).gather(-1, row.codes.unsqueeze(-1)).squeeze(-1)
    before = t * H + y
    for name, tier in tiers.items():
        apart = (row.jobs[tier][1].logprob - wanted).flatten(1, 2)[:, :before]  # [B, rows, W]
        worst, mean, limit = apart.abs().max().item(), apart.abs().mean().item(), LOGIT_ERROR[tier.weights]
        if not (worst <= 2 * limit and mean <= MEAN_ERROR * limit):
            how = f"log-probabilities are off by {mean:.1e} nats a code, by {worst:.1e} at worst"
            raise GateError(f"{name} ({tier.weights}): {how}")
        told.append(f"{name} ({tier.weights}) off by {mean:.1e} nats a code, {apart.mean():+.1e} in all")
    for name in {(one.backend, one.weights): name for name, one in reversed(tiers.items())}.values():
        _judge_draws(row, name, tiers[name], 1)  # a round that the sessions were not opened with
    _same_codes(row, tiers)
    likely = torch.log_softmax(logits[:, t, y], dim=-1)
    return "; ".join([*told, f"entropy {-(likely.exp() * likely).sum(-1).mean().item():.2g} nats a code"])


def _same_codes(row: Row, tiers: dict[str, Tier]) -> None:
    """Tiers that differ in their window alone draw the same, and a window of one evaluates every code by itself."""
    for name, tier in tiers.items():
        codes, passes = row.drawn(tier, 0)
        codes = codes.clone()
        if tier.window == 1 and passes != row.grid[2]:
            raise GateError(f"{name} took {passes:.0f} evaluations for {row.grid[2]} codes")
        for other, their in tiers.items():
            alike = (tier.backend, tier.weights) == (their.backend, their.weights)
            if alike and not torch.equal(row.drawn(their, 0)[0], codes):
                raise GateError(f"{name} and {other} draw different codes")


def _judge_draws(row: Row, name: str, tier: Tier, number: int) -> None:
    """Each code that was drawn is about the best under the cached peer's logits for the codes before it."""
    (t, y), W = row.at, row.grid[2]
    codes = row.drawn(tier, number)[0].clone()
    logits = torch.stack(row.cached_row(number, codes)[1], dim=1).float()  # [B, W, K]
    scores = logits + row.noise(number).row(t, y, W, row.stack.config.codes, codes.device)
    regret = (scores.amax(-1) - scores.gather(-1, codes.unsqueeze(-1)).squeeze(-1)).max().item()
    limit = 2 * LOGIT_ERROR[tier.weights]
    if not regret <= limit:
        raise GateError(f"{name} draws a code that scores {regret:.1e} below the best, more than {limit:.0e}")
