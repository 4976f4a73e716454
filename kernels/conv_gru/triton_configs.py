"""Tiles of the Triton kernels, who gets which, and into how many shares a sum is cut.

tuned.json beside this file: {device name: {"half-N64-C1024": config}}, written by `python bench/run.py --tune`. A size
belongs to the bucket of its positions B H W and its channels, each rounded up to a power of two, and of its dtype: 16
bits ("half") or float32 ("full"). A config is a Config as a dict. Sizes without an entry take the first that fits.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch
import triton

TUNED = Path(__file__).with_name("tuned.json")
PROGRAMS = 264  # two for each multiprocessor of a large chip: where there are fewer tiles, sums are cut
LEAST_TERMS = 8  # tiles of a sum that are worth a program


class Config(NamedTuple):
    """A tile and how it is run. columns: of the result's channels, the rows of a product; positions; input channels."""

    columns: int
    positions: int
    depth: int
    warps: int
    stages: int


LARGE, NVIDIA, AMD, ALL = ("sm_90", "sm_100"), ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120"), ("gfx942",), ()
# config, positions of a frame and channels from which on it serves, KiB of shared memory from and below, the chips that
# are so. Where two fit, the earlier is the default.
FITS = {
    "half": [
        (Config(128, 128, 64, 8, 3), 1024, 128, (200, 999), LARGE),
        (Config(64, 128, 32, 4, 4), 1024, 1, (90, 999), NVIDIA),
        (Config(64, 64, 64, 4, 4), 33, 1, (90, 999), NVIDIA),
        (Config(64, 32, 64, 4, 4), 17, 1, (90, 999), NVIDIA),
        (Config(64, 16, 64, 4, 4), 1, 1, (90, 999), NVIDIA),
        (Config(64, 64, 32, 4, 3), 33, 1, (0, 90), AMD),
        (Config(64, 16, 64, 4, 3), 1, 1, (0, 90), AMD),
    ],
    "full": [
        (Config(64, 64, 16, 4, 3), 33, 1, (0, 999), ALL),
        (Config(64, 16, 32, 4, 3), 1, 1, (0, 999), ALL),
    ],
}


def width(dtype: torch.dtype) -> str:
    return "full" if dtype == torch.float32 else "half"


def bucket(dtype: torch.dtype, positions: int, channels: int) -> str:
    """The key of a size in tuned.json. positions: B H W of a frame."""
    return f"{width(dtype)}-N{_power(positions)}-C{_power(channels)}"


def _power(size: int) -> int:
    return triton.next_power_of_2(max(size, 16))


def fitting(dtype: torch.dtype, positions: int, channels: int, shared: int) -> list[Config]:
    """The configs worth timing, the default first."""
    fits = FITS[width(dtype)]
    return [config for config, least, deep, (first, below), _ in fits
            if positions >= least and channels >= deep and first <= shared < below]  # fmt: skip


def narrowed(config: Config, dtype: torch.dtype) -> Config:
    """For the reverse scan, which has more to form behind its sums: with 128 positions registers do not suffice."""
    if config.positions <= 64:
        return config
    return next(fit for fit, _, _, _, targets in FITS[width(dtype)] if fit.positions == 64 and targets != AMD)


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
def choose(index: int | None, dtype: torch.dtype, positions: int, channels: int) -> Config:
    name, shared = device(index)
    found = tuned().get(name, {}).get(bucket(dtype, positions, channels))
    return Config(**found) if found else fitting(dtype, positions, channels, shared)[0]


class Cut(NamedTuple):
    """How one convolution is launched: tiles of the result, shares of their sums, and the constants of the kernel."""

    tiles: int
    splits: int
    constants: dict[str, int]


@functools.lru_cache(4096)
def cut(config: Config, positions: int, channels: int, parts: int, inputs: int, K: int, zero: bool) -> Cut:
    """channels, parts: the result has so many channels, so many times; inputs: channels; zero: there is no input."""
    depth = max(16, min(config.depth, inputs & -inputs))  # whole tiles, where the channels can be cut into such
    steps = triton.cdiv(inputs, depth)
    tiles = parts * triton.cdiv(channels, config.columns) * triton.cdiv(positions, config.positions)
    terms = 1 if zero else K * K * steps
    splits = max(1, min(triton.cdiv(PROGRAMS, tiles), terms // LEAST_TERMS))
    splits = triton.cdiv(terms, triton.cdiv(terms, splits))  # none without terms
    constants = {"K": K, "STEPS": steps, "EVEN": inputs % depth == 0, "SPLIT": splits > 1, "BLOCK_O": config.columns,
                 "BLOCK_N": config.positions, "BLOCK_I": depth, "num_warps": config.warps,
                 "num_stages": config.stages}  # fmt: skip
    return Cut(tiles, splits, constants)
