"""nearest_codebook and its moving average by Triton: launchers, configurations, and what is compiled ahead of time.

tuned.json beside this file: {device name: {"exact-D64-K512": config}}, written by `python bench/run.py --tune`. A size
belongs to the bucket of its padded width and of its codes rounded up to a power of two, in one of two kinds of lookup:
"exact", and "half" for both precisions below it, which are served by the same single pass. A config is a Config as a
dict. Sizes without an entry take the first config that fits, in the order of FITS.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

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
CENTRE_CODES = 256  # so many codes, evenly spread, stand for the mean code: any centre is right, a good one is enough
SECOND_LOOKS = 1024  # programs that share the doubtful rows: enough for every chip, few enough to start for nothing
TUNED = Path(__file__).with_name("tuned.json")


class Config(NamedTuple):
    """A tile of the screening pass, rows x codes, and how it is run."""

    rows: int
    codes: int
    warps: int
    stages: int


LARGE, MIDDLE, ALL = ("sm_90", "sm_100"), ("sm_80", "sm_90", "sm_100"), ()
# config, the padded width up to which registers and shared memory suffice, KiB of shared memory of a block, the chips.
# Where two fit, the earlier is the default: two blocks per multiprocessor before large tiles, except where the codes
# are so wide that reading them from L2 for 64 rows at a time would be the limit.
FITS = [
    (Config(128, 64, 8, 3), 64, 200, LARGE),
    (Config(64, 64, 4, 2), 128, 0, ALL),
    (Config(128, 64, 8, 2), 256, 200, LARGE),
    (Config(64, 64, 8, 2), 256, 0, ALL),
    (Config(64, 64, 8, 2), 512, 160, MIDDLE),
    (Config(64, 32, 8, 2), 512, 0, ALL),
]  # fmt: skip


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


def bucket(D: int, K: int, precision: str) -> str:
    """The key of a size in tuned.json."""
    kind = "exact" if precision == "exact" else "half"
    return f"{kind}-D{padded_width(D)}-K{triton.next_power_of_2(max(K, 64))}"


def tunable(x: Tensor, codebook: Tensor, precision: str = "exact") -> list[dict[str, int]]:
    """The configs worth timing for such arguments, as dicts for `nearest_codebook(config=...)`; the default first."""
    return [config._asdict() for config in _fitting(padded_width(x.shape[1]), _device(_index(x))[1])]


def _index(x: Tensor) -> int | None:
    return x.device.index if x.is_cuda else None


@functools.cache
def _device(index: int | None) -> tuple[str, int]:
    """Name, and KiB of shared memory that a block may have."""
    if index is None:
        return "interpreter", 227
    told = torch.cuda.get_device_properties(index)
    return told.name, getattr(told, "shared_memory_per_block_optin", 64 * 1024) // 1024


@functools.cache
def _tuned() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(TUNED.read_text(encoding="utf-8")) if TUNED.exists() else {}


def _fitting(DP: int, shared: int) -> list[Config]:
    found = [config for config, width, least, _ in FITS if DP <= width and shared >= least]
    return list(dict.fromkeys(found))


@functools.cache
def _choose(index: int | None, D: int, K: int, precision: str) -> Config:
    name, shared = _device(index)
    tuned = _tuned().get(name, {}).get(bucket(D, K, precision))
    return Config(**tuned) if tuned else _fitting(padded_width(D), shared)[0]


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
    padded, (block, step) = triton.cdiv(K, CODE_PAD) * CODE_PAD, _code_block(K)
    P, step = padded // block, min(DP, step)
    high, low = codebook.new_empty(2, padded, DP, dtype=torch.float16)
    sizes = [DP, padded, P, P, P]
    centre, half_norm, reach, slack, peak = codebook.new_empty(sum(sizes), dtype=torch.float32).split(sizes)
    exponent = codebook.new_empty(1, dtype=torch.int32)
    counters = codebook.new_empty(2, dtype=torch.int64)
    lookup._centre_kernel[P,](
        codebook, centre, peak, counters, K, D, min(K, CENTRE_CODES), *codebook.stride(),
        DP=DP, BLOCK_K=block, BLOCK_D=step, num_warps=4, num_stages=1,
    )  # fmt: skip
    lookup._encode_kernel[P,](
        codebook, centre, peak, high, low, half_norm, reach, slack, exponent, K, D, P, *codebook.stride(),
        DP=DP, BLOCK_K=block, BLOCK_D=step, num_warps=4, num_stages=1,
    )  # fmt: skip
    return Codes(centre, high, low, half_norm, reach, slack, exponent, counters)


def _code_block(K: int) -> tuple[int, int]:
    """Codes per program, so that at most 512 programs (triton_lookup.PARTS) leave a part of a result each; columns."""
    return (32, 64) if K <= 8192 else (128, 16)


def nearest_codebook(
    x: Tensor, codebook: Tensor, statistics: bool = True, precision: str = "exact", config: dict[str, int] | None = None
) -> tuple[Tensor, ...]:
    """The launcher: arguments as checked by fastvid.ops.nearest_codebook, outputs in the order of reference.Nearest.

    x, codebook: [N, D] and [K, D]; float32, bfloat16 or float16; any strides. config: a Config as a dict.
    Raises:      NotImplementedError with the reason of `why_not`.
    """
    if reason := why_not(x, codebook, statistics, precision):
        raise NotImplementedError(f"nearest_codebook: triton {reason}.")
    (N, D), K = x.shape, codebook.shape[0]
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
    x: Tensor, codebook: Tensor, codes: Codes, outputs: tuple[Tensor, ...], statistics: bool, precision: str,
    config: dict[str, int] | None,
) -> None:
    (N, D), K, DP, exact = x.shape, codebook.shape[0], padded_width(x.shape[1]), precision == "exact"
    tile = Config(**config) if config else _choose(_index(x), D, K, precision)
    doubtful = x.new_empty(N if exact else 0, dtype=torch.int32)
    strides = (*x.stride(), *codebook.stride())
    lookup._screen_kernel[triton.cdiv(N, tile.rows),](
        x, codebook, codes.centre, codes.high, codes.half_norm, codes.reach, codes.slack, codes.exponent,
        *outputs, doubtful, codes.counters, N, K, D, codes.reach.shape[0], *strides,
        DP=DP, BLOCK_N=tile.rows, BLOCK_K=tile.codes, CERTIFY=exact, STATISTICS=statistics,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if exact:
        lookup._second_look_kernel[min(triton.cdiv(N, 64), SECOND_LOOKS),](
            x, codebook, codes.centre, codes.high, codes.low, codes.half_norm, codes.exponent,
            *outputs, doubtful, codes.counters, K, D, *strides,
            DP=DP, CHUNK=min(DP, 32), BLOCK_N=64, BLOCK_K=64, STATISTICS=statistics, num_warps=8, num_stages=2,
        )  # fmt: skip


def _add_up(x: Tensor, keys: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Rows per code and their sums, always in the same order: rows sorted by code, blocks of them, blocks of a code."""
    (N, D), DP = x.shape, padded_width(x.shape[1])
    ordered, order = keys.sort(stable=True)
    starts = keys.new_empty(K + 1, dtype=torch.int32)
    counts = keys.new_empty(K, dtype=torch.int64)
    sums = keys.new_empty(K, D, dtype=torch.float32)
    blocks = N // update.BLOCK_ROWS.value + K
    several = N > update.BLOCK_ROWS.value
    partial = sums.new_empty(blocks if several else 0, D)
    rows = _rows_at_once(DP)
    update._starts_kernel[triton.cdiv(K + 1, 128),](ordered, starts, N, K, N.bit_length(), BLOCK=128, num_warps=4)
    update._block_sums_kernel[blocks,](
        x, order, starts, partial, sums, counts, K, D, *x.stride(), DP=DP, BLOCK_N=rows, num_warps=4, num_stages=1
    )
    if several:
        update._code_sums_kernel[K,](starts, partial, sums, D, DP=DP, BLOCK_N=rows, num_warps=4, num_stages=1)
    return counts, sums


def _rows_at_once(DP: int) -> int:
    """So many that each of 128 threads has eight loads of 16 bytes under way."""
    return max(8, min(4096 // DP, 256))


def nearest_codebook_ema_(
    codebook: Tensor, cluster_size: Tensor, cluster_sum: Tensor, counts: Tensor, sums: Tensor, decay: float, eps: float,
    steps: Tensor | None = None, dead_below: float = 0.0, restart: Tensor | None = None, restart_size: float = 1.0,
) -> None:
    """The launcher of fastvid.ops.nearest_codebook_ema_, for a state in float32: two launches, nobody waits."""
    (K, D), (block, step) = codebook.shape, _code_block(codebook.shape[0])
    P, step = triton.cdiv(K, block), min(step, triton.next_power_of_2(D))
    kept, partial = codebook.new_empty(K, dtype=torch.int8), codebook.new_empty(P)
    high = torch.tensor(decay, dtype=torch.float32).item()
    state = cluster_size.stride(0), *cluster_sum.stride()
    update._average_kernel[P,](
        cluster_size, cluster_sum, counts, sums, kept, partial, steps, high, decay - high, K, D,
        *state, counts.stride(0), *sums.stride(),
        STEPS=steps is not None, BLOCK_K=block, BLOCK_D=step, num_warps=8, num_stages=1,
    )  # fmt: skip
    update._codes_kernel[P,](
        codebook, cluster_size, cluster_sum, kept, partial, steps, restart,
        high, decay - high, float(eps), float(dead_below), float(restart_size), K, D, P,
        *codebook.stride(), *state, *(restart.stride() if restart is not None else (0, 0)),
        STEPS=steps is not None, RESTART=restart is not None, BLOCK_K=block, BLOCK_D=step, num_warps=4, num_stages=1,
    )  # fmt: skip


# ---- ahead of time

_TYPES = {
    "x_ptr": "*fp32:16", "codebook_ptr": "*fp32:16", "quantized_ptr": "*fp32:16", "high_ptr": "*fp16:16",
    "low_ptr": "*fp16:16", "exponent_ptr": "*i32:16", "indices_ptr": "*i64:16", "keys_ptr": "*i16:16",
    "doubtful_ptr": "*i32:16", "counters_ptr": "*i64:16", "starts_ptr": "*i32:16", "order_ptr": "*i64:16",
    "counts_ptr": "*i64:16", "kept_ptr": "*i8:16", "steps_ptr": "*i64:16",
    **dict.fromkeys(("N", "K", "P", "S", "steps"), "i32"),  # as the kernels' do_not_specialize has it
    **dict.fromkeys(("decay", "decay_rest", "eps", "dead_below", "restart_size"), "fp32"),
    **dict.fromkeys(("D", "stride_xn", "stride_ck", "stride_mk", "stride_sk", "stride_rk"), "i32:16"),
}  # fmt: skip


def _variant(
    kernel, name: str, constants: dict, warps: int, stages: int = 1, matrix: bool = False,
    targets: tuple[str, ...] = (), **types: str,
) -> Variant:  # fmt: skip
    """Of packed tensors with widths and sizes that 16 divides; pointers not in _TYPES point to float32."""
    unit = {argument: 1 for argument in kernel.arg_names if argument.startswith("stride_") and argument not in _TYPES}
    constants = unit | constants
    kinds = _TYPES | types | dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds.get(argument, "*fp32:16") for argument in kernel.arg_names}
    return Variant(kernel, name, signature, constants, warps, stages, matrix, "fp16" if matrix else None, targets)


def variants() -> list[Variant]:
    """Every kernel; the screening pass in every config at its greatest width, the uncertified one in two."""
    made = []
    for (rows, codes, warps, stages), width, _, targets in FITS:
        tile = {"BLOCK_N": rows, "BLOCK_K": codes, "DP": width, "STATISTICS": True}
        name = f"{rows}x{codes}x{width}_w{warps}_s{stages}"
        made.append(_variant(lookup._screen_kernel, f"screen_exact_fp16_{name}", tile | {"CERTIFY": True},
                             warps, stages, True, targets))  # fmt: skip
        if width <= 128:
            made.append(_variant(lookup._screen_kernel, f"screen_half_fp16_{name}_bf16", tile | {"CERTIFY": False},
                                 warps, stages, True, targets, x_ptr="*bf16:16", quantized_ptr="*bf16:16"))  # fmt: skip
    for DP in (64, 512):
        tile = {"BLOCK_N": 64, "BLOCK_K": 64, "DP": DP, "CHUNK": 32, "STATISTICS": True}
        made.append(_variant(lookup._second_look_kernel, f"second_look_fp16_64x64x{DP}_w8_s2", tile, 8, 2, True))
    for block, step in (_code_block(1), _code_block(MAX_K)):
        codes, name = {"BLOCK_K": block, "BLOCK_D": step}, f"{block}x{step}"
        made += [
            _variant(lookup._centre_kernel, f"centre_{name}_w4", codes | {"DP": 64}, 4),
            _variant(lookup._encode_kernel, f"encode_{name}_w4", codes | {"DP": 64}, 4),
            _variant(update._average_kernel, f"average_{name}_w8", codes | {"STEPS": True}, 8),
            _variant(update._codes_kernel, f"codes_{name}_w4", codes | {"STEPS": True, "RESTART": True}, 4),
        ]
    for DP in (64, 512):
        rows = {"DP": DP, "BLOCK_N": _rows_at_once(DP)}
        made.append(_variant(update._block_sums_kernel, f"block_sums_{rows['BLOCK_N']}x{DP}_w4", rows, 4))
    return made + [
        _variant(update._code_sums_kernel, "code_sums_8x512_w4", rows, 4),
        _variant(update._starts_kernel, "starts_128_w4", {"BLOCK": 128}, 4, keys_ptr="*i16:16"),
    ]
