"""Tiles of the Triton kernels and who gets which; how a grid is cut into units.

tuned.json beside this file: {device name: {"long-plain-half-E64-M1024": config}}, written by `python bench/run.py
--tune`. A size belongs to the bucket of its head's width and of a box's keys, each rounded up to a power of two, for 16
bits ("half") and float32 ("full"), for lines without a bias ("plain") or for any box, in one of seven kinds of kernel:
"tile", "long" and "split" forward; "box", "queries" and "keys" for gradients, "bias" for its own. A config is a Config
as a dict. Sizes without an entry take the first config that fits. What a config depends on is never the batch or the
number of boxes: neither do a box's bits.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton

TUNED = Path(__file__).with_name("tuned.json")
BLOCK_D = 128  # columns of values at once
CHUNK = 256  # keys of one program where they are split
PROGRAMS = 528  # of a bias gradient: four for each multiprocessor of a large chip
LEAST_STEPS = 4  # that a program of a bias gradient adds up
WORKSPACE = 2**24  # float32 of the parts of a bias gradient


class Config(NamedTuple):
    """A tile and how it is run.

    rows, keys: queries and keys of it; at most, where whole boxes are taken side by side.
    step:       columns of two factors that are multiplied at once.
    """

    rows: int
    keys: int
    step: int
    warps: int
    stages: int


class Fit(NamedTuple):
    """A config with what it is for: heads up to `width` wide (see width_of), and chips whose registers suffice.

    plain: for lines without a bias alone; 3-D boxes and a bias take more registers.
    """

    config: Config
    width: int = 128
    plain: bool = False
    amd: bool = False


# Where two fit, the earlier is the default. AMD has tiles for lines without a bias alone: with more to address, the
# compiler runs out of scalar registers.
FITS = {
    ("tile", "half"): [
        Fit(Config(64, 64, 128, 4, 1)),
        Fit(Config(64, 128, 128, 4, 1), width=64),
        Fit(Config(64, 128, 128, 4, 1), plain=True),
        Fit(Config(32, 32, 128, 4, 1), plain=True, amd=True),
    ],
    ("long", "half"): [
        Fit(Config(128, 64, 128, 8, 3), width=64, plain=True),
        Fit(Config(64, 64, 128, 4, 2), width=64, plain=True),
        Fit(Config(64, 64, 128, 8, 2)),
        Fit(Config(64, 32, 128, 4, 1), plain=True, amd=True),
    ],
    ("split", "half"): [
        Fit(Config(16, 64, 128, 4, 2), plain=True),
        Fit(Config(64, 64, 128, 8, 2)),
        Fit(Config(16, 32, 128, 4, 1), plain=True, amd=True),
    ],
    ("box", "half"): [
        Fit(Config(64, 64, 64, 4, 1), width=64, plain=True),
        Fit(Config(64, 64, 128, 8, 1)),
        Fit(Config(32, 32, 128, 4, 1), plain=True, amd=True),
    ],
    ("queries", "half"): [
        Fit(Config(64, 64, 128, 4, 2), width=64),
        Fit(Config(64, 64, 128, 8, 2)),
        Fit(Config(32, 32, 128, 4, 1), plain=True, amd=True),
    ],
    ("keys", "half"): [
        Fit(Config(64, 64, 128, 8, 2), plain=True),
        Fit(Config(32, 64, 128, 8, 2)),
        Fit(Config(32, 32, 128, 4, 1), plain=True, amd=True),
    ],
    ("bias", "half"): [Fit(Config(64, 32, 128, 8, 1))],
    ("tile", "full"): [
        Fit(Config(32, 32, 32, 4, 1)),
        Fit(Config(32, 64, 32, 8, 1), width=64),
        Fit(Config(32, 32, 32, 4, 1), plain=True, amd=True),
    ],
    ("long", "full"): [
        Fit(Config(32, 32, 16, 8, 1)),
        Fit(Config(32, 32, 32, 4, 1), plain=True, amd=True),
    ],
    ("split", "full"): [
        Fit(Config(16, 32, 32, 4, 1), plain=True),
        Fit(Config(32, 32, 16, 8, 1)),
        Fit(Config(16, 32, 32, 4, 1), plain=True, amd=True),
    ],
    ("box", "full"): [
        Fit(Config(32, 32, 32, 8, 1), width=64),
        Fit(Config(32, 32, 32, 8, 1), plain=True, amd=True),
    ],
    ("queries", "full"): [
        Fit(Config(32, 16, 32, 8, 1)),
        Fit(Config(32, 32, 32, 8, 1), plain=True, amd=True),
    ],
    ("keys", "full"): [
        Fit(Config(16, 16, 16, 8, 1)),
        Fit(Config(32, 16, 32, 4, 1), plain=True, amd=True),
    ],
    ("bias", "full"): [Fit(Config(32, 32, 32, 4, 1))],
}


def bits(dtype: torch.dtype) -> str:
    return "full" if dtype == torch.float32 else "half"


def width_of(kind: str, E: int, D: int) -> int:
    """What decides how much room a tile needs. Whole boxes have their values' columns taken a step at a time."""
    return E if kind == "box" else max(E, min(D, BLOCK_D))


def bucket(kind: str, dtype: torch.dtype, width: int, keys: int, plain: bool) -> str:
    """The key of a size in tuned.json. width: see width_of; keys: of a box; plain: of lines without a bias."""
    form = "plain" if plain else "any"
    return f"{kind}-{form}-{bits(dtype)}-E{triton.next_power_of_2(width)}-M{triton.next_power_of_2(keys)}"


def fitting(kind: str, dtype: torch.dtype, width: int, n: int, m: int, plain: bool, shared: int) -> list[Config]:
    """The configs worth timing for heads of a width and boxes of n queries and m keys, the default first.

    shared: KiB of shared memory that a block may have; AMD's chips have less than 90.
    """
    found = []
    for config, most, only_plain, amd in FITS[kind, bits(dtype)]:
        holds = {"tile": m <= config.keys, "box": n <= config.rows and m <= config.keys, "split": n <= config.rows}
        if width <= most and (plain or not only_plain) and amd == (shared < 90) and holds.get(kind, True):
            found.append(config)
    return found


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
def choose(
    index: int | None, kind: str, dtype: torch.dtype, E: int, D: int, n: int, m: int, plain: bool
) -> Config | None:
    """The config of a kind of kernel; None where no tile of it takes such boxes."""
    (name, shared), width = device(index), width_of(kind, E, D)
    fits = fitting(kind, dtype, width, n, m, plain, shared)
    found = tuned().get(name, {}).get(bucket(kind, dtype, width, m, plain))
    if found and Config(**found) in fits:  # a bucket may hold boxes of more queries than the one that was timed
        return Config(**found)
    return fits[0] if fits else None


@functools.cache
def kinds(
    index: int | None, dtype: torch.dtype, E: int, D: int, n: int, m: int, plain: bool, gradient: bool
) -> tuple[str, ...]:
    """Which kernels a box gets, that of the bias apart. Forward: all keys in a tile, few queries before many keys, or
    the loop. The gradient: whole boxes, or queries and keys apart."""
    fits = [kind for kind in ("tile", "split", "box") if choose(index, kind, dtype, E, D, n, m, plain)]
    if gradient:
        return ("box",) if "box" in fits else ("queries", "keys")
    return ("tile",) if "tile" in fits else ("split",) if "split" in fits and m > CHUNK else ("long",)


def slots(config: Config, n: int, m: int) -> dict[str, int]:
    """How many units stand side by side in a tile, and the powers of two that each is given: PACK, SLOT_N, SLOT_M."""
    n, m = (min(triton.next_power_of_2(count), most) for count, most in ((n, config.rows), (m, config.keys)))
    pack = min(config.rows // n, config.keys // m)
    return {"PACK": pack, "SLOT_N": max(n, 16 // pack), "SLOT_M": max(m, 16 // pack)}  # no tile is below 16 x 16


def chunk_of(pack: int, boxes: int, tiles: int, scores: int) -> int:
    """Boxes that a program of a bias gradient adds up. tiles: programs of one chunk; scores: A n m."""
    most = max(1, min(triton.cdiv(PROGRAMS, tiles), WORKSPACE // (scores * pack)))
    return pack * max(LEAST_STEPS, triton.cdiv(triton.cdiv(boxes, pack), most))


# ---- geometry


class Cut(NamedTuple):
    """A grid in boxes, its axes turned so that boxes that are lines lie along the last one.

    order: the grid's axes, as they are taken. line: whether they are lines. cells: boxes along each axis; box, key_box:
    their extents in queries and keys, n and m of these together.
    """

    order: tuple[int, ...]
    line: bool
    cells: tuple[int, ...]
    box: tuple[int, ...]
    key_box: tuple[int, ...]
    n: int
    m: int


@functools.lru_cache(4096)
def cut(grid: Sequence[int], key_grid: Sequence[int], box: Sequence[int]) -> Cut:
    """How grids of queries and keys are cut. All three are tuples T, H, W."""
    cells = [extent // b for extent, b in zip(grid, box, strict=True)]
    key_box = [extent // count for extent, count in zip(key_grid, cells, strict=True)]
    along = [axis for axis in range(3) if all(box[i] == key_box[i] == 1 for i in range(3) if i != axis)]
    last = along[-1] if along else 2
    order = (*(axis for axis in range(3) if axis != last), last)
    turned = (tuple(extents[axis] for axis in order) for extents in (cells, box, key_box))
    n, m = (extents[0] * extents[1] * extents[2] for extents in (box, key_box))
    return Cut(order, bool(along), *turned, n, m)


def folded(cut: Cut, samples: int, tables: list[tuple[int, ...]]) -> tuple[Cut, list[tuple[int, ...]]]:
    """Lines without their first axis, counted with the samples or with the second axis; else they are no `line`.

    tables: strides of everything that is addressed, [B, T, H, W, ...] with the axes turned.
    """
    CT, CY, CX = cut.cells
    if not cut.line or CT == 1:
        return cut, tables
    if samples == 1 or all(b == CT * t for b, t, *_ in tables):
        return cut._replace(cells=(1, CY, CX)), [(t, t, *rest) for _, t, *rest in tables]
    if CY == 1 or all(t == CY * y for _, t, y, *_ in tables):
        tables = [(b, t, t if CY == 1 else y, *rest) for b, t, y, *rest in tables]
        return cut._replace(cells=(1, CT * CY, CX)), tables
    return cut._replace(line=False), tables


def strides(given: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides [B, T, H, W, ...] with the axes of the grid turned."""
    return (given[0], *(given[1 + axis] for axis in order), *given[4:])


def position_strides(grid: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """In positions, of a contiguous [B, T, H, W]."""
    T, H, W = grid
    return strides((T * H * W, H * W, W, 1), order)
