"""Fewer sequential steps, the same codes: windows on the shipped model, anti-diagonals on a wavefront model."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from floors import operations
from peak import floor
from predict_cases import CLIP, MODEL, predict_missing
from sampling_cases import fresh_stack, native_missing
from timing import Contestant, GateError, Race
from torch import Tensor

from fastvid.nn import GatedPixelStack, GatedStackConfig
from fastvid.sampling import Noise, sample_grid

STARTS = (0, 12, 24, 36)  # the first of the four given frames of each future
WINDOWS = (1, 2, 4, 8, 16)
AXIAL = GatedStackConfig(
    codes=512, channels=64, layers=8, kernel=3, time_kernel=1, condition_channels=64, attention_every=4, heads=4,
    wavefront=True,
)  # fmt: skip
AXIAL_GRID = (1, 64, 64)


@dataclass(frozen=True)
class Grid:
    """One grid of codes that a prediction draws, with all that it is drawn from."""

    level: str  # top or bottom
    stack: GatedPixelStack
    condition: Tensor
    noise: Noise
    draft: Tensor | None

    def sample(self, window: int = 0, order: str = "auto", backend: str = "cpu"):
        """-> Sampled."""
        return sample_grid(
            self.stack, self.condition, self.noise, weights="float32", window=window, order=order, draft=self.draft,
            backend=backend,
        )  # fmt: skip


# ---- windows


def fixed_point_missing(model: str = MODEL, clip: Path = CLIP) -> str | None:
    """Why the case cannot run here, in a few words; None where it can."""
    return predict_missing(model, clip) or native_missing()


def fixed_point_race(model: str = MODEL, clip: Path = CLIP, starts: tuple[int, ...] = STARTS) -> Race:
    """Every code of a few futures of a clip, one sample each, with windows of several widths.

    What a grid is conditioned on is computed beforehand, as every width draws the same codes.
    """
    import fastvid
    from fastvid.data.video import read_video

    predictor = fastvid.load(model)
    given = [read_video(clip, start, 4, predictor.size)[0] for start in starts]  # [4, H, W, 3] uint8 each
    given = torch.stack(given).float().div(255).permute(0, 4, 1, 2, 3)  # [clips, 3, 4, H, W]
    made = _grids(predictor, given, 0)
    windows = {"native": 0, "sequential": 1} | {f"window {w}": w for w in WINDOWS[1:]}

    def contestant(name: str, window: int) -> Contestant:
        run = lambda grids: [grid.sample(window) for grid in grids]  # noqa: E731
        return Contestant(name, run, passes=lambda found: float(sum(sampled.passes.sum() for sampled in found)))

    return Race(
        gate=lambda: _windows_agree(made),
        inputs=lambda number: _grids(predictor, given, number),
        contestants=[contestant(*one) for one in windows.items()],
        codes=sum(grid.condition.shape[1:4].numel() for grid in made),
    )


@torch.no_grad()
def _grids(predictor, given: Tensor, seed: int) -> list[Grid]:
    """The grids of one prediction for each clip, in the order in which they are drawn."""
    from fastvid.models.predictor import BOTTOM_STREAM, SLICES_PER_STEP, TOP_STREAM, bottom_window

    grids = []
    for clip in given.split(1):
        given_top, given_bottom = predictor.vqvae.encode(clip)
        condition = predictor.top.condition(given_top, given_bottom)
        # the first step starts as a copy of the given one, as in a prediction
        draft = F.pad(given_top, (0, 0, 0, 0, 0, condition.shape[1] - 1), value=-1)
        grids.append(Grid("top", predictor.top.stack, condition, Noise(seed, (0,), TOP_STREAM), draft))
        top = torch.cat([given_top, grids[-1].sample().codes], dim=1)
        above, bottom = predictor.bottom.conditioning.above(top), given_bottom
        for i in range(SLICES_PER_STEP, SLICES_PER_STEP * top.shape[1]):
            window = bottom_window(bottom, i, predictor.bottom.config.window)
            condition = predictor.bottom.conditioning(torch.tensor([i]), above, window)
            noise = Noise(seed, (0,), BOTTOM_STREAM, i)
            grids.append(Grid("bottom", predictor.bottom.stack, condition, noise, bottom[:, -1:].clone()))
            bottom = torch.cat([bottom, grids[-1].sample().codes], dim=1)
    return grids


@torch.no_grad()
def _windows_agree(grids: list[Grid]) -> str:
    """The same codes bit by bit at every width. Tells how many a pass settles at each."""
    told = {grid.level: [] for grid in grids}
    drawn = [grid.sample(1).codes for grid in grids]
    for window in (*WINDOWS, 0):
        counts = {level: [0, 0] for level in told}
        for grid, codes in zip(grids, drawn, strict=True):
            sampled = grid.sample(window)
            if not torch.equal(sampled.codes, codes):
                raise GateError(f"a window of {window or 'default'} draws other codes than one by one ({grid.level})")
            counts[grid.level][0] += codes.numel()
            counts[grid.level][1] += int(sampled.passes.sum())
        for level, (codes, passes) in counts.items():
            told[level].append(f"{window or 'default'}: {codes / passes:.3g}")
    return "the same codes at every width; codes a pass by width, " + "; ".join(
        f"{level} {', '.join(found)}" for level, found in told.items()
    )


# ---- anti-diagonals


def wavefront_race(config: GatedStackConfig = AXIAL, grid: tuple[int, int, int] = AXIAL_GRID) -> Race:
    """One grid of a wavefront model along its anti-diagonals, and in raster order. Tests give smaller sizes."""
    stack = fresh_stack(config)

    def inputs(number: int) -> Grid:
        generator = torch.Generator().manual_seed(2000 + number)
        condition = torch.randn(1, *grid, config.condition_channels, generator=generator)
        return Grid("wavefront", stack, condition, Noise(number, (number,)), None)

    ways = {"native": (0, "wavefront"), "sequential": (1, "raster"), "windows": (0, "raster")}

    def contestant(name: str, way: tuple[int, str]) -> Contestant:
        run = lambda given: given.sample(*way)  # noqa: E731
        return Contestant(name, run, passes=lambda sampled: float(sampled.passes.sum()))

    return Race(
        gate=lambda: _orders_agree(inputs(0), ways),
        inputs=inputs,
        contestants=[contestant(*one) for one in ways.items()],
        floor=lambda: floor(operations(stack, grid), 0.0, "cpu", torch.get_num_threads()),
        codes=grid[0] * grid[1] * grid[2],
    )


@torch.no_grad()
def _orders_agree(given: Grid, ways: dict[str, tuple[int, str]]) -> str:
    """The same codes bit by bit, those that the torch backend draws, in the number of steps that the model allows."""
    found = {name: given.sample(*way) for name, way in ways.items()}
    plain = given.sample(1, "raster", "reference")
    for name, sampled in found.items():
        if not torch.equal(sampled.codes, found["sequential"].codes):
            raise GateError(f"{name} draws other codes than one by one")
        if not plain.near_ties() and not torch.equal(sampled.codes, plain.codes):
            raise GateError(f"{name} draws other codes than the torch backend, which had no near tie")
    _, T, H, W = plain.codes.shape
    steps, least = int(found["native"].passes.sum()), T * (W + (1 + given.stack.config.kernel // 2) * (H - 1))
    if steps != least:
        raise GateError(f"a wavefront took {steps} steps, not {least}")
    return f"the same codes in every order, also in torch; {steps} steps for {T * H * W} codes"
