"""The race of one masked gated convolution, forward alone and with its gradients, against torch's dense convolutions.

Everybody gets x and weights in the layout that suits them, made before the clock runs. In the forward race the peers'
weights are masked beforehand too, as nobody has to do that twice; where weights are learned it belongs to every step.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from conv_peers import FORMATS, Kernel, Tap, chunk_gate
from fastvid.kernels.gated_causal_conv import reference
from fastvid.kernels.gated_causal_conv.cases import PLANE_XT, ROWS_5
from floors import live
from peak import floor
from timing import Contestant, GateError, Race
from torch import Tensor

from fastvid import ops
from fastvid.ops._op import SERVES
from fastvid.testing import assert_within_yardstick

OURS, PEERS = 2.0, 16.0  # how many times plain torch's error is allowed: ours, and a peer that does the same job
PARTS = ("out", "grad_x", "grad_weight", "grad_bias")


@dataclass(frozen=True)
class Size:
    """C channels to 2 C and their gate over a grid [B, T, H, W]. train: with the gradients of x, weight and bias."""

    grid: tuple[int, int, int, int]
    C: int
    taps: tuple[Tap, ...]
    train: bool = False
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        done = "forward + backward" if self.train else "forward"
        grid = "x".join(map(str, self.grid))
        return f"{grid}, C={self.C} -> 2x{self.C} + gate, {len(self.taps)} taps, {dtype}, {done}"

    @property
    def multiply_adds(self) -> float:
        """Those whose tap is inside the grid."""
        B, *grid = self.grid
        positions = B * grid[0] * grid[1] * grid[2]
        return (3.0 if self.train else 1.0) * positions * live(self.taps, tuple(grid)) * self.C * 2 * self.C

    @property
    def bytes_moved(self) -> int:
        """Least bytes in and out: x, weight and gate's output; with gradients x and weight, the sum before the gate and
        what comes in and goes out once more."""
        positions, weights = functools.reduce(int.__mul__, self.grid), len(self.taps) * 2 * self.C**2
        values = 2 * positions * self.C + weights
        return (values + (2 * 2 + 1 + 1 + 1) * positions * self.C + 2 * weights if self.train else values) * (
            torch.finfo(self.dtype).bits // 8
        )


def cpu(C: int, train: bool = False) -> Size:
    """The (x, t) plane of the top prior's horizontal stream, on its grid."""
    return Size((1, 3, 32, 32), C, PLANE_XT, train)


def gpu_top(train: bool = False) -> Size:
    """A layer of the published top prior."""
    return Size((8, 3, 32, 32), 512, PLANE_XT, train, "cuda", torch.bfloat16)


def gpu_bottom(train: bool = False) -> Size:
    """A layer of the published bottom prior's vertical stream."""
    return Size((8, 1, 64, 64), 512, ROWS_5, train, "cuda", torch.bfloat16)


class Fresh(NamedTuple):
    """One round's values, channels last; every way makes what it needs of them."""

    x: Tensor  # [B, T, H, W, C]
    weight: Tensor  # [taps, C, 2C]
    bias: Tensor  # [2C]
    grad: Tensor  # [B, T, H, W, C], of the output


@dataclass(frozen=True)
class Way:
    """ready(fresh): arguments of `forward`, of which the first three learn, and the output's gradient as it likes it.
    read(parts): what was computed, as Fresh has it."""

    ready: Callable[[Fresh], tuple[tuple, Tensor]]
    forward: Callable[..., Tensor]
    read: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


def conv_race(size: Size) -> Race:
    """Everybody who can do the job at this size. Each has run once on the gate's values when it is handed over."""
    fresh = draw(size, number=-1)
    contestants, results, able = [], {}, {}
    for name, (way, missing) in ways(size, fresh).items():
        found, why = (None, missing) if missing else _tried(name, way, fresh, size.train)
        contestants.append(Contestant(name, functools.partial(_run, name, way, size.train) if found else None, why))
        if found:
            able[name], results[name] = way, found
    dense = tuple(one.name for one in contestants if one.name.startswith("masked conv3d "))
    contestants.append(Contestant("masked conv3d", best_of=dense))
    if len(dense) > len(FORMATS):
        tuned = tuple(name for name in dense if not name.endswith("ncdhw"))
        contestants.append(Contestant("tuned conv3d", best_of=tuned))
    return Race(
        gate=lambda: _gate(size, fresh, results),
        inputs=lambda number: _inputs(draw(size, number), able),
        contestants=contestants,
        floor=lambda: floor(2.0 * size.multiply_adds, size.bytes_moved, size.device, torch.get_num_threads()),
        device=size.device,
    )


def ways(size: Size, fresh: Fresh) -> dict[str, tuple[Way, str | None]]:
    """Contestants by name, ours first, each with why it cannot run."""
    name = "cpu" if size.device == "cpu" else "triton"
    told = ops.gated_causal_conv.reasons(fresh.x, fresh.weight, fresh.bias, size.taps, backend=name)[name]
    found = {"fastvid": (_op_way(size, name), None if told == SERVES else told)}
    found |= {f"masked conv3d {layout}": (_dense_way(size, layout), None) for layout in FORMATS}
    if size.device != "cpu":
        found["masked conv3d compiled"] = _dense_way(size, "channels_last_3d", compiled=True), None
    return found | {"gather": (_op_way(size, "reference"), None)}


def draw(size: Size, number: int) -> Fresh:
    """A round's values."""
    generator = torch.Generator(size.device).manual_seed(3000 + number)
    taps, C = len(size.taps), size.C
    shapes = ((*size.grid, C), (taps, C, 2 * C), (2 * C,), (*size.grid, C))
    x, weight, bias, grad = (torch.randn(shape, generator=generator, device=size.device) for shape in shapes)
    return Fresh(*(part.to(size.dtype) for part in (x, weight * (taps * C) ** -0.5, bias, grad)))


def _op_way(size: Size, backend: str) -> Way:
    def ready(fresh: Fresh) -> tuple[tuple, Tensor]:
        return (fresh.x, fresh.weight, fresh.bias), fresh.grad

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.gated_causal_conv(x, weight, bias, size.taps, backend=backend).out

    return Way(ready, forward, lambda parts: parts)


def _dense_way(size: Size, layout: str, compiled: bool = False) -> Way:
    kernel, held = Kernel(size.taps), FORMATS[layout]

    def ready(fresh: Fresh) -> tuple[tuple, Tensor]:
        dense = kernel.dense(fresh.weight).contiguous(memory_format=held)
        x, grad = (part.movedim(-1, 1).contiguous(memory_format=held) for part in (fresh.x, fresh.grad))
        return (x, dense, fresh.bias, kernel.mask(dense) if size.train else None), grad

    def forward(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        return chunk_gate(kernel.convolve(x, weight if mask is None else weight * mask, bias))

    def read(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found = tuple(part.movedim(1, -1) for part in parts[:2])
        return found + ((kernel.live(parts[2]), parts[3]) if len(parts) > 2 else ())

    return Way(ready, torch.compile(forward) if compiled else forward, read)


def _tried(name: str, way: Way, fresh: Fresh, train: bool) -> tuple[tuple[Tensor, ...] | None, str | None]:
    """What a way computes of these values, or None and why it cannot. What is ours may not fail."""
    try:
        return tuple(part.detach() for part in way.read(compute(way, way.ready(fresh), train))), None
    except Exception as error:
        if name == "fastvid":
            raise
        return None, f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def compute(way: Way, given: tuple[tuple, Tensor], train: bool) -> tuple[Tensor, ...]:
    """The output, with `train` also the gradients of x, weight and bias."""
    args, grad = given
    if not train:
        with torch.no_grad():
            return (way.forward(*args),)
    learned = tuple(part.detach().requires_grad_() for part in args[:3])
    out = way.forward(*learned, *args[3:])
    return (out, *torch.autograd.grad(out, learned, grad))


def _inputs(fresh: Fresh, able: dict[str, Way]) -> dict[str, tuple[tuple, Tensor]]:
    return {name: way.ready(fresh) for name, way in able.items()}


def _run(name: str, way: Way, train: bool, given: dict[str, Any]) -> tuple[Tensor, ...]:
    return compute(way, given[name], train)


def _gate(size: Size, fresh: Fresh, results: dict[str, tuple[Tensor, ...]]) -> str:
    """Every output and gradient against float64, measured by the error of plain torch in the same dtype."""
    exact, plain = (_defined(size, Fresh(*(part.to(dtype) for part in fresh))) for dtype in (torch.float64, size.dtype))
    for name, result in results.items():
        for part, ours, true, peer in zip(PARTS[: len(exact)], result, exact, plain, strict=True):
            try:
                assert_within_yardstick(ours, true, peer, OURS if name == "fastvid" else PEERS)
            except AssertionError as error:
                raise GateError(f"{name}: {part}: {error}") from None
    parts = ", ".join(PARTS[: len(exact)])
    return f"{parts} within {OURS:g} times plain torch's error against float64, peers within {PEERS:g} times"


def _defined(size: Size, fresh: Fresh) -> tuple[Tensor, ...]:
    flat, grid = [offset for tap in size.taps for offset in tap], size.grid[1:]

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        args = (x, weight, bias, flat, None, None, "gate", (0, 0, 0), grid, False)
        return reference.gated_causal_conv(*args)[0]

    way = Way(lambda fresh: (fresh[:3], fresh.grad), forward, lambda parts: parts)
    return compute(way, way.ready(fresh), size.train)
