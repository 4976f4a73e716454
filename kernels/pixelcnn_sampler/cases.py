"""Named sizes of noise rows and of whole grids, and how a sampled grid is judged: tested and timed from one list."""

from dataclasses import dataclass
from random import Random

import torch
from fastvid.kernels.pixelcnn_sampler import reference, session
from fastvid.kernels.pixelcnn_sampler.packed import Packed, Taps, pack
from torch import Tensor

from fastvid.testing import Subject, assert_within_yardstick


@dataclass(frozen=True)
class Case:
    """One row of W codes of V classes for B samples."""

    name: str
    B: int
    W: int
    V: int

    def __str__(self) -> str:
        return self.name

    @property
    def work(self) -> int:
        """Random numbers that are made."""
        return self.B * self.W * self.V

    def make(self, device: torch.device | str = "cpu") -> Tensor:
        """Identities of B samples, [B] int64, far apart."""
        return torch.arange(self.B, device=device) * 1_000_003 % (1 << 32)

    def arguments(self, device: torch.device | str, dtype: torch.dtype) -> tuple:
        """Fresh random arguments of gumbel_row."""
        seed, t = (int(torch.randint(1 << bits, ())) for bits in (62, 32))
        stream, y = torch.randint(1 << 15, (2,)).tolist()
        return seed - (1 << 61), self.make(device), stream, t, y, self.W, self.V


ALL = [
    Case("one-code", 1, 1, 1),
    Case("odd", 3, 5, 37),
    Case("dino64-bottom", 10, 16, 512),
    Case("paper-top", 1, 32, 512),
]


@dataclass(frozen=True)
class GridCase:
    """A gated PixelCNN with random weights and the grid that is drawn from it.

    grid: B, T, H, W. attended: which layers attend. frames: seen by a layer, the present one included. given: rows of
    the first frame that are given. scale: of the weights, so that logits are far from uniform.
    """

    name: str
    grid: tuple[int, int, int, int]
    K: int = 37
    C: int = 16
    L: int = 3
    kernel: int = 3
    frames: int = 3
    attended: tuple[int, ...] = ()
    heads: int = 2
    wavefront: bool = False
    weights: str = "float32"
    window: int = 0
    order: str = "auto"
    given: int = 0
    temperature: float = 1.0
    condition: int = 6

    def __str__(self) -> str:
        return self.name

    @property
    def work(self) -> int:
        """Hundredths of a layer at a position: what counts is steps, each is small."""
        B, T, H, W = self.grid
        return 100 * B * T * H * W * self.L

    def make(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
        """Fresh random arguments of pixelcnn_sample, all of them."""
        packed = self.pack(device)
        B, T, H, W = self.grid
        condition = torch.randn(*self.grid, self.condition, dtype=dtype).to(device)
        given = None
        if self.given:
            given = torch.full(self.grid, session.OPEN)
            given[:, 0, : self.given] = torch.randint(self.K, (B, min(H, self.given), W))
            given = given.to(device)
        samples = (torch.randperm(1 << 16)[:B] * 65_537).to(device)
        seed = int(torch.randint(1 << 62, ()))
        options = (self.temperature, self.window, self.order, given, None)
        return (*packed, condition, samples, seed, 1, 5, *options)

    def pack(self, device: torch.device | str) -> Packed:
        """Random weights, packed."""
        taps = live_taps(self.kernel, self.frames, self.wavefront)
        state = {name: tensor.to(device) for name, tensor in self._state(taps).items()}
        return pack(state, taps, self.heads, self.wavefront, self.weights)

    def _state(self, taps: Taps) -> dict[str, Tensor]:
        K, C = self.K, self.C
        state = {"embed.weight": torch.randn(K, C)} | _linear("head.1", C, C) | _linear("head.3", C, K)
        state |= _conv("input_vertical", len(taps.input_vertical), C, C)
        state |= _conv("input_horizontal", len(taps.input_horizontal), C, C)
        for i in range(self.L):
            at = f"layers.{i}"
            state |= _conv(f"{at}.vertical", len(taps.vertical), C, 2 * C)
            state |= _conv(f"{at}.horizontal", len(taps.horizontal), C, 2 * C)
            state |= _linear(f"{at}.link", 2 * C, 2 * C, bias=False) | _linear(f"{at}.out", C, C)
            state |= _linear(f"{at}.condition", self.condition, 2 * C, bias=False)
            if i in self.attended:
                state |= _linear(f"{at}.attention.qkv", C, 3 * C) | _linear(f"{at}.attention.out", C, C)
                state |= _linear(f"{at}.attention.qkv_position", 3, 3 * C, bias=False)
        return state


def live_taps(kernel: int, frames: int, wavefront: bool) -> Taps:
    """Taps of a gated PixelCNN: of earlier frames everything, of the present one what raster order has drawn."""
    r = kernel // 2
    span, past = range(-r, r + 1), range(1 - frames, 0)
    cube = tuple((dt, dy, dx) for dt in past for dy in span for dx in span)
    columns = span if frames == 1 and not wavefront else (0,)
    return Taps(
        cube + tuple((0, dy, dx) for dy in range(-r, 0) for dx in span),
        cube + tuple((0, 0, dx) for dx in range(-r, 0)),
        tuple((dt, dy, 0) for dt in past for dy in span) + tuple((0, dy, dx) for dy in range(-r, 1) for dx in columns),
        tuple((dt, 0, dx) for dt in past for dx in span) + tuple((0, 0, dx) for dx in range(-r, 1)),
    )


def _linear(name: str, rows: int, columns: int, bias: bool = True) -> dict[str, Tensor]:
    weight = {f"{name}.weight": torch.randn(columns, rows) * 1.2 / rows**0.5}
    return weight | ({f"{name}.bias": torch.randn(columns) * 0.1} if bias else {})


def _conv(name: str, taps: int, rows: int, columns: int) -> dict[str, Tensor]:
    weight = torch.randn(taps, rows, columns) * 1.2 / (taps * rows) ** 0.5
    return {f"{name}.weight": weight, f"{name}.bias": torch.randn(columns) * 0.1}


GRIDS = [
    # several samples: the worst error of a single number says nothing beside another's
    GridCase("one-position", (7, 1, 1, 1), attended=(1,)),
    GridCase("3d", (2, 3, 4, 5)),
    GridCase("3d-attention", (2, 3, 4, 4), attended=(0, 2), window=3),
    GridCase("3d-kernel-5", (3, 2, 5, 4), kernel=5, L=2, given=2),
    GridCase("3d-wavefront", (2, 3, 4, 5), attended=(1,), wavefront=True, frames=2),
    GridCase("odd-widths", (1, 2, 3, 4), C=20, heads=4, attended=(2,), K=41, window=2),
    GridCase("bfloat16", (1, 2, 4, 4), C=24, weights="bfloat16"),
    GridCase("int8", (2, 1, 4, 5), frames=1, weights="int8", window=4),
    GridCase("2d-attention", (2, 1, 7, 5), frames=1, attended=(0, 1, 2), temperature=0.7, given=1),
    # the last one is repeated to compare bits: its passes do not depend on measured times
    GridCase("2d-wavefront", (2, 1, 6, 6), frames=1, kernel=5, attended=(1,), wavefront=True, order="wavefront"),
]
EMPTY = GridCase("empty", (0, 2, 3, 3))


def drawn(random: Random) -> GridCase:
    """A model and a grid that nobody chose."""
    heads, L, wavefront = random.choice([1, 2, 3]), random.randint(1, 3), random.random() < 0.3
    grid = tuple(random.randint(1, most) for most in (3, 3, 5, 6))
    C = heads * random.randint(2, 30 // heads)
    attended = tuple(i for i in range(L) if random.random() < 0.4)
    order = random.choice(["auto", "raster", *(["wavefront"] if wavefront else [])])
    return GridCase(
        f"{'x'.join(map(str, grid))}-C{C}-L{L}", grid, random.randint(2, 70), C, L, random.choice([3, 3, 5]),
        random.choice([1, 2, 3]), attended, heads, wavefront, "float32", random.choice([0, 1, 2, 3, 7]), order,
        random.choice([0, 0, 1, 9]), random.choice([1.0, 0.5, 2.0]),
    )  # fmt: skip


def judge(args: tuple, result: session.Sampled) -> None:
    """Raise AssertionError unless a grid is right: draws up to a near tie, log-probabilities within rounding."""
    job = session.Job(Packed(*args[:2]), *args[2:])
    given, temperature = job.given, job.temperature
    truth = session.Sampled(*session.run(_exact, *args))
    for codes, others, margin in zip(result.codes, truth.codes, truth.margin, strict=True):
        apart = (codes != others).flatten().nonzero()
        if len(apart):  # from the first near tie on the two samplers are on different ways
            gap = margin.flatten()[: int(apart[0]) + 1].min() * min(1.0, temperature)
            assert gap < session.NEAR_TIE, f"code {int(apart[0])} differs, and no draw before it was nearer than {gap}"
    if given is not None:
        assert torch.equal(result.codes[given >= 0], given[given >= 0]), "a given code does not stand"
        assert result.margin[given >= 0].isposinf().all(), "the margin of a given code is infinite"
    agreeing = (result.codes == truth.codes).flatten(1).long().cumprod(1).bool().view_as(result.codes)
    gaps = (result.margin - truth.margin)[agreeing & truth.margin.isfinite()].abs() * min(1.0, temperature)
    assert not len(gaps) or gaps.max() < session.NEAR_TIE, f"a margin is off by {gaps.max():.3g}"
    forced = (*args[:10], result.codes, None)
    exact = session.run(_exact_wide, *forced)[0].double()
    assert_within_yardstick(result.logprob, exact, session.run(reference.Session, *forced)[0])


def _exact(job: session.Job) -> reference.Session:
    return reference.Session(job, torch.float64)


def _exact_wide(job: session.Job) -> reference.Session:
    job.logprob = job.logprob.double()  # where the truth is written must hold it
    return reference.Session(job, torch.float64)


def drawn_row(random: Random) -> Case:
    """A row of noise that nobody chose."""
    B, W, V = random.randint(0, 4), random.randint(1, 9), random.randint(1, 700)
    return Case(f"{B}x{W}x{V}", B, W, V)


def judge_row(args: tuple, noise: Tensor) -> None:
    """Raise AssertionError unless noise is that of the reference, to the last bit."""
    truth = reference.gumbel_row(*args)
    assert noise.shape == truth.shape and torch.equal(noise, truth), "the noise differs from the reference's"


SUBJECTS = [
    Subject(
        "gumbel_row", ALL, Case("no-samples", 0, 3, 5), drawn_row, Case.arguments, judge_row, dtypes=(torch.int64,),
        call=lambda op, args: op(*args),
    ),
    Subject(
        "pixelcnn_sample", GRIDS, EMPTY, drawn, GridCase.make, judge, dtypes=(torch.float32,),
        call=lambda op, args: op(*args),
    ),
]  # fmt: skip
