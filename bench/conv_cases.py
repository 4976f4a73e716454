"""The race of one masked gated convolution, forward alone and with its gradients, against torch's dense convolutions.

Everybody gets x and weights in the layout that suits them, made before the clock runs. In the forward race the peers'
weights are masked beforehand too, as nobody has to do that twice; where weights are learned it belongs to every step.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from conv_peers import FORMATS, Kernel, Tap, chunk_gate
from fastvid.kernels.gated_causal_conv import reference
from fastvid.kernels.gated_causal_conv.cases import PLANE_XT, ROWS_5
from floors import live
from jobs import Values, Way, told, with_gradients
from torch import Tensor

from fastvid import ops

PARTS = ("out", "grad_x", "grad_weight", "grad_bias")


class Fresh(NamedTuple):
    """One round's values, channels last; every way makes what it needs of them."""

    x: Tensor  # [B, T, H, W, C]
    weight: Tensor  # [taps, C, 2C]
    bias: Tensor  # [2C]
    grad: Tensor  # [B, T, H, W, C], of the output


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
    def parts(self) -> tuple[str, ...]:
        """What a result is made of, in words."""
        return PARTS if self.train else PARTS[:1]

    @property
    def best(self) -> dict[str, tuple[str, ...]]:
        """Dense convolutions by the fastest layout, and by the fastest but torch's own."""
        tuned = ("masked conv3d channels_last_3d", "masked conv3d compiled")
        if self.device == "cpu":
            return {"masked conv3d": ("masked conv3d ncdhw", *tuned[:1])}
        return {"masked conv3d": ("masked conv3d ncdhw", *tuned), "tuned conv3d": tuned}

    @property
    def work(self) -> tuple[float, int]:
        """Least operations and bytes."""
        return 2.0 * self.multiply_adds, self.bytes_moved

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

    def draw(self, number: int) -> Fresh:
        """A round's values."""
        generator = torch.Generator(self.device).manual_seed(3000 + number)
        taps, C = len(self.taps), self.C
        shapes = ((*self.grid, C), (taps, C, 2 * C), (2 * C,), (*self.grid, C))
        x, weight, bias, grad = (torch.randn(shape, generator=generator, device=self.device) for shape in shapes)
        return Fresh(*(part.to(self.dtype) for part in (x, weight * (taps * C) ** -0.5, bias, grad)))

    def samples(self, values: Values) -> Iterator[tuple[Any, Values]]:
        """Everything at once: the weights' gradients are of all samples."""
        yield ..., values

    def exact(self, values: Values) -> tuple[Tensor, ...]:
        """By the definition, in the dtype of the values."""
        flat, grid = [offset for tap in self.taps for offset in tap], self.grid[1:]

        def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            args = (x, weight, bias, flat, None, None, "gate", (0, 0, 0), grid, False)
            return reference.gated_causal_conv(*args)[0]

        return self._way(lambda fresh: (fresh[:3], fresh.grad), forward)(Fresh(*values))

    plain = exact

    def ways(self, fresh: Fresh) -> dict[str, Way]:
        """Contestants by name, ours first."""
        name = "cpu" if self.device == "cpu" else "triton"
        missing = told(ops.gated_causal_conv, fresh.x, fresh.weight, fresh.bias, self.taps, backend=name)
        found = {"fastvid": self._op_way(name, missing)}
        found |= {f"masked conv3d {layout}": self.dense_way(layout) for layout in FORMATS}
        if self.device != "cpu":
            found["masked conv3d compiled"] = self.dense_way("channels_last_3d", compiled=True)
        return found | {"gather": self._op_way("reference")}

    def _op_way(self, backend: str, missing: str | None = None) -> Way:
        def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return ops.gated_causal_conv(x, weight, bias, self.taps, backend=backend).out

        return self._way(lambda fresh: ((fresh.x, fresh.weight, fresh.bias), fresh.grad), forward, missing=missing)

    def dense_way(self, layout: str, compiled: bool = False) -> Way:
        """A dense convolution of a masked weight. layout: of FORMATS."""
        kernel, held = Kernel(self.taps), FORMATS[layout]

        def ready(fresh: Fresh) -> tuple[tuple, Tensor]:
            dense = kernel.dense(fresh.weight).contiguous(memory_format=held)
            x, grad = (part.movedim(-1, 1).contiguous(memory_format=held) for part in (fresh.x, fresh.grad))
            return (x, dense, fresh.bias, kernel.mask(dense) if self.train else None), grad

        def forward(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
            return chunk_gate(kernel.convolve(x, weight if mask is None else weight * mask, bias))

        def read(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            found = tuple(part.movedim(1, -1) for part in parts[:2])
            return found + ((kernel.live(parts[2]), parts[3]) if len(parts) > 2 else ())

        return self._way(ready, torch.compile(forward) if compiled else forward, read=read)

    def _way(self, ready: Callable[[Fresh], tuple[tuple, Tensor]], forward: Callable[..., Tensor], **more) -> Way:
        """ready: arguments of `forward`, of which the first three learn, and the output's gradient."""

        def run(given: tuple[tuple, Tensor]) -> tuple[Tensor, ...]:
            args, grad = given
            if self.train:
                return with_gradients(lambda *learned: (forward(*learned, *args[3:]),), args[:3], (grad,))
            with torch.no_grad():
                return (forward(*args),)

        return Way(ready, run, **more)


def cpu(C: int, train: bool = False) -> Size:
    """The (x, t) plane of the top prior's horizontal stream, on its grid."""
    return Size((1, 3, 32, 32), C, PLANE_XT, train)


def gpu_top(train: bool = False) -> Size:
    """A layer of the published top prior."""
    return Size((8, 3, 32, 32), 512, PLANE_XT, train, "cuda", torch.bfloat16)


def gpu_bottom(train: bool = False) -> Size:
    """A layer of the published bottom prior's vertical stream."""
    return Size((8, 1, 64, 64), 512, ROWS_5, train, "cuda", torch.bfloat16)
