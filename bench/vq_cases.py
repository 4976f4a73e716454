"""The codebook race: nearest codes of fresh rows and one step of the codebook's moving average."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peak import floor
from timing import Contestant, GateError, Race
from torch import Tensor
from vq_peers import (
    Step,
    Way,
    faiss_peer,
    fastvid_way,
    fresh_state,
    kmeans_peer,
    layer_peer,
    layer_way,
    move_,
    not_installed,
    torch_peer,
)

from fastvid import ops

TRUTH_BYTES = 128 << 20  # of float64 distances at a time
# Rounding of one factor of a product: a distance may be wrong by a few of these times (|x| + |e|)^2.
ROUNDING = {"float32": 2.0**-24, "tf32": 2.0**-11, "bfloat16": 2.0**-8}
ROUNDINGS = 8.0
CODE_ERROR = 1e-5  # of a code after the step


@dataclass(frozen=True)
class Size:
    """N rows of width D against K codes. chunk: rows whose scores the torch peer keeps at a time."""

    N: int
    K: int
    D: int
    chunk: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    statistics: bool = True

    @property
    def score_bytes(self) -> int:
        """Of the N x K matrix of scores in float32, which nobody needs to keep."""
        return 4 * self.N * self.K

    def __str__(self) -> str:
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"N={self.N} K={self.K} D={self.D}, {dtype}, {'train + EMA' if self.statistics else 'lookup'}"


# the chunks are the torch peer's fastest of 64 to 16384 on a 2-core AMD EPYC, within noise, at one thread and at two
CPU_512 = Size(131072, 512, 64, chunk=1024)
CPU_8192 = Size(16384, 8192, 64, chunk=256)
# on a GPU a chunk's scores take 128 MiB and 1 GiB: many times what fills the chip
GPU_PAPER = Size(524288, 512, 64, chunk=65536, device="cuda")
GPU_PAPER_BF16 = Size(524288, 512, 64, chunk=65536, device="cuda", dtype=torch.bfloat16)
GPU_16K = Size(1 << 20, 16384, 256, chunk=16384, device="cuda", dtype=torch.bfloat16, statistics=False)


def vq_race(size: Size) -> Race:
    """Everybody who can do the job at this size. Each has run once on the gate's rows when the race is handed over."""
    x, codebook = _fresh(size, number=-1)
    contestants, decided = [], {}
    for name, make in _ways(size).items():
        way, outcome = _tried(name, make, x, codebook)
        if way is None:
            contestants.append(Contestant(name, missing=outcome))
            continue
        decided[name] = (way, outcome)
        contestants.append(Contestant(name, functools.partial(_run, way)))
    ways = [way for way, _ in decided.values()]
    moved = (2 * size.D * x.element_size() + 8) * size.N  # x in; quantized rows and indices out
    return Race(
        gate=lambda: _gate(x, codebook, decided),
        inputs=lambda number: _inputs(size, ways, number),
        contestants=contestants,
        floor=lambda: floor(2.0 * size.N * size.K * size.D, moved, size.device, torch.get_num_threads(), True),
        device=size.device,
    )


def _ways(size: Size) -> dict[str, Callable[[], Way]]:
    """Contestants by name, ours first, each to be made only if its package is there."""
    if size.device == "cpu":
        return {
            "fastvid": fastvid_way, "vector-quantize-pytorch": layer_peer, "torch": lambda: torch_peer(size.chunk),
            "faiss": faiss_peer, "fastvid layer": layer_way,
        }  # fmt: skip
    if size.statistics:
        return {
            "fastvid": fastvid_way, "vector-quantize-pytorch": layer_peer, "torch": lambda: torch_peer(size.chunk),
            "torch.compile": lambda: torch_peer(size.chunk, compiled=True),
            "flash-kmeans": lambda: kmeans_peer("flash-kmeans"), "fastvid layer": layer_way,
            "fastvid bf16": lambda: fastvid_way(precision="bf16", name="fastvid bf16"),
        }  # fmt: skip
    # the k-means kernels multiply in bfloat16 here, and so does everybody; ours in its exact mode beside that
    return {
        "fastvid": lambda: fastvid_way(False, "bf16"),
        "torch": lambda: torch_peer(size.chunk, statistics=False, half=True),
        "flash-kmeans": lambda: kmeans_peer("flash-kmeans", statistics=False),
        "flashlib": lambda: kmeans_peer("flashlib", statistics=False),
        "fastvid exact": lambda: fastvid_way(False, name="fastvid exact"),
    }


def _tried(name: str, make: Callable[[], Way], x: Tensor, codebook: Tensor) -> tuple[Way | None, Any]:
    """A way and what it decided on these rows, or None and why it cannot run. What is ours may not fail."""
    if reason := not_installed(name):
        return None, reason
    try:
        way = make()
        state = way.state(x, codebook)
        step = way.read(way.run(x, state), state)
        return way, Step(*(None if part is None else part.detach().clone() for part in step))
    except Exception as error:
        if name == "fastvid":
            raise
        told = (str(error).splitlines() or [""])[0][:100]
        return None, f"raised {type(error).__name__}: {told}"


def _fresh(size: Size, number: int) -> tuple[Tensor, Tensor]:
    """A round's rows [N, D] and codebook [K, D], float32 whatever the rows are."""
    generator = torch.Generator(size.device).manual_seed(2000 + number)
    x, codebook = (
        torch.randn(rows, size.D, generator=generator, device=size.device) for rows in (size.N, size.K)
    )
    return x.to(size.dtype), codebook


def _inputs(size: Size, ways: list[Way], number: int) -> tuple[Tensor, dict[str, Any]]:
    x, codebook = _fresh(size, number)
    return x, {way.name: way.state(x, codebook) for way in ways}


def _run(way: Way, given: tuple[Tensor, dict[str, Any]]) -> Any:
    x, states = given
    with torch.no_grad() if way.name != "vector-quantize-pytorch" else torch.enable_grad():
        return way.run(x, states[way.name])


def _gate(x: Tensor, codebook: Tensor, decided: dict[str, tuple[Way, Step]]) -> str:
    """Every choice against float64 distances; statistics and the moved codebook against float64 of the same choices."""
    regret = _regrets(x, codebook, {name: step.indices for name, (_, step) in decided.items()})
    worst = 0.0
    for name, (way, step) in decided.items():
        reach = regret[name] / ROUNDING[way.precision]
        if not reach <= ROUNDINGS:
            raise GateError(f"{name} chose a code {reach:.3g} roundings of {way.precision} beyond the nearest one")
        judge(name, step, x, codebook)
        worst = max(worst, reach) if name.startswith("fastvid") else worst
    told = [f"distance regret at most {worst:.2g} roundings of the products"]
    told += _compare_layers(decided, codebook)
    served = ops.nearest_codebook.reasons(x, codebook)
    told.append(f"fastvid ran {next(name for name, reason in served.items() if reason == 'serves')}")
    return "; ".join(told)


def _regrets(x: Tensor, codebook: Tensor, chosen: dict[str, Tensor]) -> dict[str, float]:
    """How much farther the chosen codes are than the nearest, by (|x| + |e|)^2 of each row; the worst for each name."""
    codes = codebook.double()
    norms = codes.square().sum(dim=1)  # [K]
    rows = max(1, TRUTH_BYTES // (8 * codes.shape[0]))
    worst = dict.fromkeys(chosen, 0.0)
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows].double()
        scores = torch.addmm(norms, part, codes.T, alpha=-2)  # [rows, K], squared distances less |x|^2
        least, scale = scores.amin(dim=1), (part.norm(dim=1) + norms.max().sqrt()).square()
        for name, indices in chosen.items():
            mine = scores.gather(1, indices[start : start + rows].long()[:, None])[:, 0]
            worst[name] = max(worst[name], ((mine - least) / scale).max().item())
    return worst


def judge(name: str, step: Step, x: Tensor, codebook: Tensor) -> None:
    """Raise GateError unless counts, sums and the moved codebook of one way are what its own choices ask for."""
    K = codebook.shape[0]
    rows, indices = x.double(), step.indices.long()
    counts = torch.bincount(indices, minlength=K)
    sums = torch.zeros_like(codebook, dtype=torch.float64).index_add_(0, indices, rows)
    if step.counts is not None and not torch.equal(step.counts.long(), counts):
        raise GateError(f"{name} counts rows that its choices do not give")
    if step.sums is not None:
        magnitude = torch.zeros_like(sums).index_add_(0, indices, rows.abs())
        # n rows added one after the other wander from the truth like a random walk of n roundings
        allowed = 4 * ROUNDING["float32"] * counts.double().sqrt()[:, None] * magnitude
        wrong = ((step.sums.double() - sums).abs() - allowed).max().item()
        if not wrong <= 0:
            raise GateError(f"{name} has sums {wrong:.1e} beyond what float32 rounding explains")
    if step.codebook is not None:
        state = fresh_state(codebook.double())
        move_(*state, counts, sums)
        wrong = (step.codebook.double() - state[0]).abs().max().item()
        if not wrong <= CODE_ERROR:
            raise GateError(f"{name} moves the codebook {wrong:.1e} away from the float64 moving average")


def _compare_layers(decided: dict[str, tuple[Way, Step]], codebook: Tensor) -> list[str]:
    """Ours beside the popular layer, on the codes that no row is disputed over (each choice has been judged)."""
    if "vector-quantize-pytorch" not in decided or decided["fastvid"][1].codebook is None:
        return []
    ours, theirs = (decided[name][1] for name in ("fastvid", "vector-quantize-pytorch"))
    disputed = ours.indices != theirs.indices
    settled = torch.ones(codebook.shape[0], dtype=torch.bool, device=codebook.device)
    settled[ours.indices[disputed]] = settled[theirs.indices[disputed]] = False
    if settled.sum() < 0.9 * settled.numel():
        raise GateError(f"fastvid and vector-quantize-pytorch choose differently in {int(disputed.sum())} rows")
    away = (ours.codebook - theirs.codebook)[settled].abs().max().item()
    if not away <= CODE_ERROR:
        raise GateError(f"fastvid's codebook is {away:.1e} away from vector-quantize-pytorch's after one step")
    return [f"codebook within {away:.1e} of vector-quantize-pytorch's, {int(disputed.sum())} rows disputed"]
