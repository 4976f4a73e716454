"""Tiles of the Triton kernels and who gets which; the tables that tell a kernel its taps.

tuned.json beside this file: {device name: {"gate-half-I64-O128": config}}, written by `python bench/run.py --tune`. A
size belongs to the bucket of its channels, each rounded up to a power of two, in one of three kinds of kernel: "gate"
(two sums of one tile of x; glu too), "plain" (no activation, and the gradient of x) and "weight" (the gradient of the
weight), for 16 bits ("half") and float32 ("full"). A config is a Config as a dict. Sizes without an entry take the
first config that fits. What a config depends on is never the batch or the grid: a position's bits do not either.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

TUNED = Path(__file__).with_name("tuned.json")
PROGRAMS = 264  # of a weight gradient: two for each multiprocessor of a large chip
LEAST_BLOCKS = 4  # of positions that a program of a weight gradient adds up
WORKSPACE = 2**24  # float32 of the parts of a weight gradient


class Config(NamedTuple):
    """A tile and how it is run.

    positions, columns: of the result, where those of a gate are its tanh and its sigmoid columns together; of a weight
                        gradient the positions added up at once, and the columns of its tile.
    depth:              input channels at once; of a weight gradient the rows of its tile.
    """

    positions: int
    columns: int
    depth: int
    warps: int
    stages: int


LARGE, NVIDIA, AMD, ALL = ("sm_90", "sm_100"), ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120"), ("gfx942",), ()
# config, least output channels of the weight, KiB of shared memory of a block from and below, the chips that are so:
# where registers suffice and nothing spills. Where two fit, the earlier is the default.
FITS = {
    ("gate", "half"): [
        (Config(128, 256, 64, 8, 3), 256, (200, 999), LARGE),
        (Config(128, 128, 64, 8, 3), 128, (200, 999), LARGE),
        (Config(64, 128, 32, 4, 4), 0, (90, 999), NVIDIA),
        (Config(64, 128, 32, 4, 3), 0, (0, 90), AMD),
        (Config(64, 64, 32, 4, 3), 0, (0, 999), ALL),
    ],
    ("plain", "half"): [
        (Config(128, 256, 64, 8, 3), 256, (200, 999), LARGE),
        (Config(128, 128, 64, 8, 3), 128, (200, 999), LARGE),
        (Config(64, 128, 32, 4, 4), 0, (90, 999), NVIDIA),
        (Config(64, 128, 32, 4, 3), 0, (0, 90), AMD),
    ],
    ("weight", "half"): [
        (Config(64, 256, 128, 8, 3), 256, (200, 999), LARGE),
        (Config(32, 128, 64, 4, 3), 0, (0, 999), ALL),
    ],
    ("gate", "full"): [
        (Config(64, 128, 16, 4, 3), 0, (0, 999), ALL),
        (Config(64, 64, 16, 4, 2), 0, (0, 999), ALL),
    ],
    ("plain", "full"): [
        (Config(64, 128, 16, 4, 3), 128, (0, 999), ALL),
        (Config(64, 64, 16, 4, 2), 0, (0, 999), ALL),
    ],
    ("weight", "full"): [(Config(16, 128, 64, 4, 3), 0, (0, 999), ALL)],
}


def width(dtype: torch.dtype) -> str:
    return "full" if dtype == torch.float32 else "half"


def bucket(kind: str, dtype: torch.dtype, inputs: int, outputs: int) -> str:
    """The key of a size in tuned.json. kind: "gate", "plain" or "weight"; inputs, outputs: channels of the weight."""
    return f"{kind}-{width(dtype)}-I{_power(inputs)}-O{_power(outputs)}"


def _power(channels: int) -> int:
    return triton.next_power_of_2(max(channels, 16))


def fitting(kind: str, dtype: torch.dtype, outputs: int, shared: int) -> list[Config]:
    """The configs worth timing, the default first."""
    fits = FITS[kind, width(dtype)]
    return [config for config, least, (first, below), _ in fits if outputs >= least and first <= shared < below]


@functools.cache
def device(index: int | None) -> tuple[str, int]:
    """Name, and KiB of shared memory that a block may have."""
    if index is None:
        return "interpreter", 227
    told = torch.cuda.get_device_properties(index)
    return told.name, getattr(told, "shared_memory_per_block_optin", 64 * 1024) // 1024


@functools.cache
def tuned() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(TUNED.read_text(encoding="utf-8")) if TUNED.exists() else {}


@functools.cache
def choose(index: int | None, kind: str, dtype: torch.dtype, inputs: int, outputs: int) -> Config:
    name, shared = device(index)
    found = tuned().get(name, {}).get(bucket(kind, dtype, inputs, outputs))
    return Config(**found) if found else fitting(kind, dtype, outputs, shared)[0]


def depth_of(config: Config, inputs: int) -> int:
    """Input channels at once: as many as the config has, where whole tiles of them make up the channels."""
    return max(16, min(config.depth, inputs & -inputs))


def splits_of(config: Config, taps: int, inputs: int, outputs: int, blocks: int) -> int:
    """Shares of the positions in a weight gradient. blocks: of positions, through all frames."""
    tiles = taps * triton.cdiv(inputs, config.depth) * triton.cdiv(outputs, config.columns)
    most = min(triton.cdiv(blocks, LEAST_BLOCKS), WORKSPACE // max(1, taps * inputs * outputs))
    return max(1, min(triton.cdiv(PROGRAMS, tiles), most))


# ---- taps


@functools.lru_cache(4096)
def tables(
    taps: tuple[int, ...], origin: tuple[int, ...], size: tuple[int, ...], grid: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The taps that lie inside for some position of the result, [live, 4] int32 (offset, slice), latest frames first;
    and for each frame of the result the first and the last but one of those that lie inside for it, [frames, 2].

    taps: flat; origin: the position of x under the result's first; size, grid: of the result and of x. Kept, because
    the copy to the device waits.
    """
    live = []
    for i in range(0, len(taps), 3):
        begins = [o + d for o, d in zip(origin, taps[i : i + 3], strict=True)]
        if all(b < g and b + s > 0 for b, s, g in zip(begins, size, grid, strict=True)):
            live.append((*taps[i : i + 3], i // 3))
    live.sort(key=lambda tap: -tap[0])  # stable: the order of summation is the same in every call
    frames = []
    for t in range(origin[0], origin[0] + size[0]):
        inside = [i for i, (dt, *_) in enumerate(live) if 0 <= t + dt < grid[0]]
        frames += [inside[0], inside[-1] + 1] if inside else [0, 0]
    words = [word for tap in [*live, (0, 0, 0, 0)] for word in tap]  # one more, which is read but not taken
    table = torch.tensor(words + frames, dtype=torch.int32, device=device)  # one copy
    return table[: len(words)], table[len(words) :]


@functools.lru_cache(4096)
def offsets(taps: tuple[int, ...], device: torch.device) -> Tensor:
    """[taps * 3] int32, on the device; kept."""
    return torch.tensor(taps, dtype=torch.int32, device=device)
