"""nearest_codebook and its moving average by Triton: launchers, configurations, and what is compiled ahead of time.

tuned.json beside this file: {device name: {"exact-D64-K512": config}}, written by `python bench/run.py --tune`. A size
belongs to the bucket of its padded width and of its codes rounded up to a power of two, in one of two kinds of lookup:
"exact", and "half" for both precisions below it. A config is one of CONFIGS as a dict. Sizes without an entry take the
first config that fits the device.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from fastvid.kernels.common.variant import Variant
from fastvid.kernels.nearest_codebook import triton_lookup as lookup
from fastvid.kernels.nearest_codebook import triton_update as update
from torch import Tensor

MAX_D, MAX_K, MAX_N = 512, 65536, 2**27
INTERPRETED = triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODE_PAD = 256  # the codes are padded to whole tiles of every config
SECOND_LOOKS = 1024  # programs that share the doubtful rows: enough for every chip, few enough to start for nothing
TUNED = Path(__file__).with_name("tuned.json")


class Config(NamedTuple):
    """A tile of the screening pass: rows x codes, in steps of `chunk` of the width."""

    rows: int
    codes: int
    chunk: int
    warps: int
    stages: int


CONFIGS = [
    Config(128, 128, 64, 8, 3),
    Config(128, 64, 64, 4, 3),
    Config(128, 64, 256, 8, 2),
    Config(64, 64, 64, 4, 2),
]


def why_not(x: Tensor, codebook: Tensor, statistics: bool = True, precision: str = "exact") -> str | None:
    """What these kernels cannot do about such arguments, in a few words; None where they serve."""
    (N, D), K = x.shape, codebook.shape[0]
    if x.dtype not in DTYPES or codebook.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {x.dtype} and {codebook.dtype}"
    if D > MAX_D or K > MAX_K or N > MAX_N:
        return f"takes D up to {MAX_D}, K up to {MAX_K} and N up to {MAX_N}, got {D}, {K} and {N}"
    if not (x.is_cuda or INTERPRETED):
        return f"needs a CUDA tensor, got {x.device.type}"
    return None


def padded_width(D: int) -> int:
    """A power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(D))


@functools.cache
def _tuned() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(TUNED.read_text(encoding="utf-8")) if TUNED.exists() else {}


@functools.cache
def _device(index: int | None) -> tuple[str, int, bool]:
    """Name, shared memory of a block in bytes, and whether it is AMD's."""
    if index is None:
        return "interpreter", 227 * 1024, False
    told = torch.cuda.get_device_properties(index)
    shared = getattr(told, "shared_memory_per_block_optin", 0) or 64 * 1024
    return told.name, shared, torch.version.hip is not None


def bucket(D: int, K: int, precision: str) -> str:
    """The key of a size in tuned.json."""
    kind = "exact" if precision == "exact" else "half"
    return f"{kind}-D{padded_width(D)}-K{triton.next_power_of_2(max(K, 64))}"


def tunable(x: Tensor, codebook: Tensor, precision: str = "exact") -> list[dict[str, int]]:
    """The configs worth timing for such arguments, as dicts for `nearest_codebook(config=...)`; the default first."""
    DP = padded_width(x.shape[1])
    return [config._asdict() for config in _fitting(DP, x.device.index if x.is_cuda else None)]


def _fitting(DP: int, device: int | None) -> list[Config]:
    _, shared, _ = _device(device)
    return [config for config in CONFIGS if config.chunk >= min(DP, 64)]


def _choose(x: Tensor, codebook: Tensor, precision: str) -> Config:
    D, K, device = x.shape[1], codebook.shape[0], x.device.index if x.is_cuda else None
    tuned = _tuned().get(_device(device)[0], {}).get(bucket(D, K, precision))
    return Config(**tuned) if tuned else _fitting(padded_width(D), device)[0]


class Codes(NamedTuple):
    """What the kernels read in place of the codebook; see triton_lookup._encode_kernel."""

    centre: Tensor  # [DP]
    high: Tensor  # [K padded, DP] float16
    low: Tensor  # [K padded, DP] float16
    half_norm: Tensor  # [K padded]
    reach: Tensor  # [P]
    slack: Tensor  # [P]
    exponent: Tensor  # [1] int32
    counters: Tensor  # [2] int64, rows that are not finite and rows in doubt: both start at 0


def _prepare(codebook: Tensor) -> Codes:
    (K, D), DP = codebook.shape, padded_width(codebook.shape[1])
    padded, block = triton.cdiv(K, CODE_PAD) * CODE_PAD, 32 if K <= 8192 else 128
    P = padded // block
    high, low = codebook.new_empty(2, padded, DP, dtype=torch.float16)
    sizes = [DP, padded, P, P, P]
    centre, half_norm, reach, slack, peak = codebook.new_empty(sum(sizes), dtype=torch.float32).split(sizes)
    exponent = codebook.new_empty(1, dtype=torch.int32)
    counters = codebook.new_empty(2, dtype=torch.int64)
    lookup._centre_kernel[P,](
        codebook, centre, peak, counters, K, D, min(K, 256), *codebook.stride(),
        DP=DP, BLOCK_K=block, BLOCK_D=min(DP, 64), num_warps=4, num_stages=1,
    )  # fmt: skip
    lookup._encode_kernel[P,](
        codebook, centre, peak, high, low, half_norm, reach, slack, exponent, K, D, P, *codebook.stride(),
        DP=DP, BLOCK_K=block, BLOCK_D=min(DP, 64), num_warps=4, num_stages=1,
    )  # fmt: skip
    return Codes(centre, high, low, half_norm, reach, slack, exponent, counters)


def nearest_codebook(
    x: Tensor, codebook: Tensor, statistics: bool = True, precision: str = "exact", config: dict[str, int] | None = None
) -> tuple[Tensor, ...]:
    """The launcher: arguments as checked by fastvid.ops.nearest_codebook, outputs in the order of reference.Nearest.

    x, codebook: [N, D] and [K, D]; float32, bfloat16 or float16; any strides. config: one of CONFIGS as a dict.
    Raises:      NotImplementedError with the reason of `why_not`.
    """
    if reason := why_not(x, codebook, statistics, precision):
        raise NotImplementedError(f"nearest_codebook: triton {reason}.")
    (N, D), K, DP = x.shape, codebook.shape[0], padded_width(x.shape[1])
    codes = _prepare(codebook)
    indices = x.new_empty(N, dtype=torch.int64)
    quantized = x.new_empty(N, D)
    distance = x.new_empty(N, dtype=torch.float32)
    keys = x.new_empty(N if statistics else 0, dtype=torch.int16 if K < 2**15 else torch.int32)
    if N:
        _look_up(x, codebook, codes, (indices, quantized, distance, keys), statistics, precision, config)
    counts, sums = _add_up(x, keys, K) if statistics else (indices.new_empty(0), distance.new_empty(0, D))
    return indices, quantized, distance, counts, sums, codes.counters[0]


def _look_up(
    x: Tensor, codebook: Tensor, codes: Codes, outputs: tuple[Tensor, ...], statistics: bool, precision: str, config
) -> None:
    (N, D), K, DP, exact = x.shape, codebook.shape[0], padded_width(x.shape[1]), precision == "exact"
    tile = Config(**config) if config else _choose(x, codebook, precision)
    doubtful = x.new_empty(N if exact else 0, dtype=torch.int32)
    strides = (*x.stride(), *codebook.stride())
    lookup._screen_kernel[triton.cdiv(N, tile.rows),](
        x, codebook, codes.centre, codes.high, codes.half_norm, codes.reach, codes.slack, codes.exponent,
        *outputs, doubtful, codes.counters, N, K, D, codes.reach.shape[0], *strides,
        DP=DP, CHUNK=min(tile.chunk, DP), BLOCK_N=tile.rows, BLOCK_K=tile.codes, CERTIFY=exact, STATISTICS=statistics,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if exact:
        lookup._second_look_kernel[min(triton.cdiv(N, 64), SECOND_LOOKS),](
            x, codebook, codes.centre, codes.high, codes.low, codes.half_norm, codes.exponent,
            *outputs, doubtful, codes.counters, K, D, *strides,
            DP=DP, CHUNK=min(64, DP), BLOCK_N=64, BLOCK_K=64, STATISTICS=statistics,
            num_warps=4, num_stages=2,
        )  # fmt: skip


def _add_up(x: Tensor, keys: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Rows per code and their sums, always in the same order: rows sorted by code, blocks of them, blocks of a code."""
    (N, D), DP = x.shape, padded_width(x.shape[1])
    ordered, order = keys.sort(stable=True)
    starts = keys.new_empty(K + 1, dtype=torch.int32)
    counts = keys.new_empty(K, dtype=torch.int64)
    sums = keys.new_empty(K, D, dtype=torch.float32)
    blocks = N // update.BLOCK_ROWS.value + K
    partial = sums.new_empty(blocks if N > update.BLOCK_ROWS.value else 0, D)
    rows = max(8, 4096 // DP)
    update._starts_kernel[triton.cdiv(K + 1, 128),](ordered, starts, N, K, N.bit_length(), BLOCK=128, num_warps=4)
    update._block_sums_kernel[blocks,](
        x, order, starts, partial, sums, counts, K, D, *x.stride(), DP=DP, BLOCK_N=rows, num_warps=4
    )
    if N > update.BLOCK_ROWS.value:
        update._code_sums_kernel[K,](starts, partial, sums, D, DP=DP, BLOCK_N=rows, num_warps=4)
    return counts, sums


def nearest_codebook_ema_(
    codebook: Tensor, cluster_size: Tensor, cluster_sum: Tensor, counts: Tensor, sums: Tensor, decay: float, eps: float,
    steps: Tensor | None = None, dead_below: float = 0.0, restart: Tensor | None = None, restart_size: float = 1.0,
) -> None:
    """The launcher of fastvid.ops.nearest_codebook_ema_, for a state in float32: two launches, nobody waits."""
    K, D = codebook.shape
    block = 32 if K <= 8192 else 128
    P, BLOCK_D = triton.cdiv(K, block), min(64, triton.next_power_of_2(D))
    kept, partial = codebook.new_empty(K, dtype=torch.int8), codebook.new_empty(P)
    near = torch.tensor(decay, dtype=torch.float32).item()
    update._average_kernel[P,](
        cluster_size, cluster_sum, counts, sums, kept, partial, steps, near, decay - near, K, D,
        cluster_size.stride(0), *cluster_sum.stride(), counts.stride(0), *sums.stride(),
        STEPS=steps is not None, BLOCK_K=block, BLOCK_D=BLOCK_D, num_warps=4, num_stages=1,
    )  # fmt: skip
    update._codes_kernel[P,](
        codebook, cluster_size, cluster_sum, kept, partial, steps, restart,
        near, decay - near, eps, dead_below, restart_size, K, D, P,
        *codebook.stride(), cluster_size.stride(0), *cluster_sum.stride(), *(restart.stride() if restart is not None else (0, 0)),
        STEPS=steps is not None, RESTART=restart is not None, BLOCK_K=block, BLOCK_D=BLOCK_D, BLOCK_P=512,
        num_warps=4, num_stages=1,
    )  # fmt: skip
