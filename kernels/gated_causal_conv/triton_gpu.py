"""gated_causal_conv and its gradients by Triton: launchers, and what is compiled ahead of time.

None of this has run on a GPU yet; the kernels have run in Triton's interpreter and through the compilers of six chips.
"""

import contextlib

import torch
import triton
from fastvid.kernels.common.variant import Variant
from fastvid.kernels.gated_causal_conv import triton_backward as backward
from fastvid.kernels.gated_causal_conv import triton_configs as configs
from fastvid.kernels.gated_causal_conv import triton_forward as forward
from fastvid.kernels.gated_causal_conv.triton_configs import TUNED, Config, bucket
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
ACTIVATIONS = {"none": 0, "gate": 1, "glu": 2}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_N, MAX_CHANNELS, MAX_TAPS = 2**31 - 2**10, 2**16, 2**15
SUM_PARTS, SUM_BLOCK = 16, 128
MOST_CHUNKS = 1024  # of positions whose gradients are added up apart for the bias

__all__ = [
    "TUNED", "bucket", "gated_causal_conv", "gated_causal_conv_backward", "tunable", "variants", "weight_gradient",
    "why_not", "why_not_backward",
]  # fmt: skip


def why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, taps: list[int], addend: Tensor | None, residual: Tensor | None,
    activation: str, origin: list[int], size: list[int], keep: bool,
) -> str | None:  # fmt: skip
    """What these kernels cannot do about such arguments, in a few words; None where they serve."""
    return _refused(x, weight, taps, size, [bias, addend], [residual])


def why_not_backward(
    x: Tensor, weight: Tensor, pre: Tensor | None, grad_out: Tensor | None, grad_pre: Tensor | None, taps: list[int],
    activation: str, origin: list[int], wanted: list[bool],
) -> str | None:  # fmt: skip
    """What the kernels of the gradient cannot do about such arguments; None where they serve."""
    given = [t for t in (pre, grad_out, grad_pre) if t is not None]
    if not given:
        return "needs a gradient of an output"
    return _refused(x, weight, taps, list(given[0].shape[1:4]), [], given)


def _refused(
    x: Tensor, weight: Tensor, taps: list[int], size: list[int], same: list[Tensor | None], others: list[Tensor | None]
) -> str | None:
    given = [t for t in others if t is not None]
    if x.dtype not in DTYPES or any(t.dtype not in DTYPES for t in given):
        return f"takes float32, bfloat16 and float16, got {', '.join(str(t.dtype) for t in (x, *given))}"
    if mixed := [t.dtype for t in (weight, *same) if t is not None and t.dtype != x.dtype]:
        return f"takes a weight, a bias and an addend of x's dtype, got {mixed[0]} beside {x.dtype}"
    N = max(x.shape[0] * x.shape[1:4].numel(), x.shape[0] * size[0] * size[1] * size[2])
    if N > MAX_N or max(weight.shape[1:]) > MAX_CHANNELS or len(taps) > 3 * MAX_TAPS:
        return (f"takes up to {MAX_N} positions, {MAX_CHANNELS} channels and {MAX_TAPS} taps, "
                f"got {N}, {max(weight.shape[1:])} and {len(taps) // 3}")  # fmt: skip
    if not (x.is_cuda or INTERPRETED):
        return f"needs a CUDA tensor, got {x.device.type}"
    return None


def tunable(kind: str, x: Tensor, outputs: int) -> list[dict[str, int]]:
    """The configs worth timing as dicts, the default first. kind: as of `bucket`; outputs: channels of the weight."""
    shared = configs.device(_index(x))[1]
    return [config._asdict() for config in configs.fitting(kind, x.dtype, outputs, shared)]


def _index(x: Tensor) -> int | None:
    return x.device.index if x.is_cuda else None


def _on(x: Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _config(given: dict[str, int] | None, kind: str, x: Tensor, inputs: int, outputs: int) -> Config:
    return Config(**given) if given else configs.choose(_index(x), kind, x.dtype, inputs, outputs)


def gated_causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, taps: list[int], addend: Tensor | None, residual: Tensor | None,
    activation: str, origin: list[int], size: list[int], keep: bool, config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The launcher: arguments as checked by fastvid.ops.gated_causal_conv, (out, pre) as its reference returns them.

    config: a Config as a dict. Raises: NotImplementedError with the reason of `why_not`.
    """
    if reason := why_not(x, weight, bias, taps, addend, residual, activation, origin, size, keep):
        raise NotImplementedError(f"gated_causal_conv: triton {reason}.")
    B, Cin, Cout = x.shape[0], weight.shape[1], weight.shape[2]
    gated = activation != "none"
    columns = Cout // 2 if gated else Cout
    out = x.new_empty(B, *size, columns, dtype=(x if residual is None else residual).dtype)
    pre = x.new_empty((B, *size, Cout) if keep and gated else 0)
    if not out.numel():
        return out, pre
    tile = _config(config, "gate" if gated else "plain", x, Cin, Cout)
    depth, block = configs.depth_of(tile, Cin), _block(tile, columns, gated)
    taps_table, frames = configs.tables(tuple(taps), tuple(origin), tuple(size), tuple(x.shape[1:4]), x.device)
    positions = B * size[1] * size[2]
    with _on(x):
        forward._conv_kernel[size[0] * triton.cdiv(positions, tile.positions) * triton.cdiv(columns, block),](
            x, weight, None if bias is None else bias.contiguous(), addend, residual, out, pre if pre.numel() else None,
            taps_table, frames, positions, *size, *x.shape[2:4], *origin, Cin, columns, *x.stride(), *weight.stride(),
            *_strides(addend), *_strides(residual), ACTIVATION=ACTIVATIONS[activation], STEPS=triton.cdiv(Cin, depth),
            EVEN=Cin % depth == 0, BLOCK_N=tile.positions, BLOCK_O=block, BLOCK_I=depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, pre


def _block(tile: Config, columns: int, gated: bool) -> int:
    """Columns of one sum: no more than there are."""
    return max(16, min(tile.columns // (2 if gated else 1), triton.next_power_of_2(columns)))


def _strides(t: Tensor | None) -> tuple[int, ...]:
    return (0,) * 5 if t is None else t.stride()


# ---- gradients


def gated_causal_conv_backward(
    x: Tensor, weight: Tensor, pre: Tensor | None, grad_out: Tensor | None, grad_pre: Tensor | None, taps: list[int],
    activation: str, origin: list[int], wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The launcher of the gradients of x, weight, bias and addend; [0] for what is not wanted.

    Raises: NotImplementedError with the reason of `why_not_backward`.
    """
    if reason := why_not_backward(x, weight, pre, grad_out, grad_pre, taps, activation, origin, wanted):
        raise NotImplementedError(f"gated_causal_conv_backward: triton {reason}.")
    none, to_x, to_weight, to_bias, to_addend = x.new_empty(0), *wanted
    grad, grad_bias = none, none
    if any(wanted):
        use = "own" if to_addend else "read" if to_x or to_weight else None
        grad, grad_bias = _activation_gradient(x, weight, pre, grad_out, grad_pre, activation, use, to_bias)
    grad_x = none
    if to_x:
        back, start = [-d for d in taps], [-o for o in origin]
        size = list(x.shape[1:4])
        grad_x, _ = gated_causal_conv(grad, weight.transpose(1, 2), None, back, None, None, "none", start, size, False)
    grad_weight = weight_gradient(x, grad, weight.shape[0], taps, origin) if to_weight else none
    return grad_x, grad_weight, grad_bias, grad if to_addend else none


def _activation_gradient(
    x: Tensor, weight: Tensor, pre: Tensor | None, grad_out: Tensor | None, grad_pre: Tensor | None, activation: str,
    use: str | None, to_bias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """At the pre-activation sum, [B, *size, Cout] in x's dtype and packed (or [0]); and summed up, [Cout] (or [0]).

    use: of the first; "own" if it must not share memory with grad_out, which is what it is without an activation.
    """
    plain, Cout = activation == "none", weight.shape[2]
    grid, columns = (grad_pre if grad_out is None else grad_out).shape[:4], Cout if plain else Cout // 2
    N, shape = grid.numel(), (*grid, Cout)
    as_it_is = (
        use == "read" and plain and grad_pre is None and grad_out.dtype == x.dtype and grad_out.is_contiguous()
    )
    grad = x.new_empty(shape if use and not as_it_is else 0)
    if N and (grad.numel() or to_bias):
        block_n, block_o = _gate_tile(columns)
        rows = max(64, triton.cdiv(triton.cdiv(N, MOST_CHUNKS), block_n) * block_n)
        chunks = triton.cdiv(N, rows)
        part = x.new_empty(chunks if to_bias else 0, Cout, dtype=torch.float32)
        with _on(x):
            backward._gate_kernel[chunks * triton.cdiv(columns, block_o),](
                None if pre is None else pre.contiguous(), grad_out, grad_pre, grad if grad.numel() else None,
                part if to_bias else None, N, *shape[1:4], rows, columns, *_strides(grad_out), *_strides(grad_pre),
                ACTIVATION=ACTIVATIONS[activation], BLOCK_N=block_n, BLOCK_O=block_o, num_warps=4, num_stages=1,
            )  # fmt: skip
        bias = _sum(part, x.new_empty(Cout)) if to_bias else x.new_empty(0)
    else:
        bias = x.new_zeros(Cout if to_bias else 0)
    return grad_out if as_it_is else grad, bias


def _gate_tile(columns: int) -> tuple[int, int]:
    """Positions and columns at once: 8 elements for each of 128 threads."""
    block = min(128, max(16, triton.next_power_of_2(columns)))
    return 1024 // block, block


def weight_gradient(
    x: Tensor, grad: Tensor, slices: int, taps: list[int], origin: list[int], config: dict[str, int] | None = None
) -> Tensor:
    """[taps, Cin, Cout] in x's dtype: every tap's neighbours times the gradient at the sum, which must be packed.

    slices: of the weight, len(taps) / 3. config: a Config as a dict.
    """
    (B, *grid, Cin), (_, *size, Cout) = x.shape, grad.shape
    out = x.new_empty(slices, Cin, Cout)
    if not (x.numel() and grad.numel() and slices):
        return out.zero_()
    tile = _config(config, "weight", x, Cin, Cout)
    block_i, block_o = _weight_tile(tile, Cin, Cout)
    places = triton.cdiv(size[1] * size[2], tile.positions)
    splits = configs.splits_of(tile._replace(depth=block_i, columns=block_o), slices, Cin, Cout, places * B * size[0])
    part = out if splits == 1 else x.new_empty(splits, *out.shape, dtype=torch.float32)
    with _on(x):
        backward._weight_kernel[splits * slices * triton.cdiv(Cin, block_i) * triton.cdiv(Cout, block_o),](
            x, grad, part, configs.offsets(tuple(taps), x.device), B, grid[0], *size, *grid[1:], *origin, slices,
            splits, Cin, Cout, *x.stride(), BLOCK_N=tile.positions, BLOCK_O=block_o, BLOCK_I=block_i,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out if splits == 1 else _sum(part, out)


def _weight_tile(tile: Config, inputs: int, outputs: int) -> tuple[int, int]:
    """Rows and columns of a tile: no more than there are."""
    sizes = (tile.depth, inputs), (tile.columns, outputs)
    return tuple(max(16, min(most, triton.next_power_of_2(size))) for most, size in sizes)


def _sum(part: Tensor, out: Tensor) -> Tensor:
    """out: the parts [parts, ...] added up."""
    with _on(out):
        backward._sum_kernel[triton.cdiv(out.numel(), SUM_BLOCK),](
            part, out, part.shape[0], out.numel(), BLOCK_S=SUM_PARTS, BLOCK=SUM_BLOCK, num_warps=4, num_stages=1
        )
    return out


# ---- ahead of time

_INTS = ("taps_ptr", "frames_ptr")
_ELEMENTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_SUMS = ("part_ptr",)  # float32 whatever the dtype


def _variant(kernel, name: str, dtype: torch.dtype, constants: dict, warps: int, stages: int = 1, matrix: bool = False,
             targets: tuple[str, ...] = ()) -> Variant:  # fmt: skip
    """Of packed tensors of one dtype, with channels that 16 divides."""
    element = _ELEMENTS[dtype]
    unit = {argument: 1 for argument in kernel.arg_names if argument in ("stride_xc", "stride_ac", "stride_rc",
                                                                         "stride_gc", "stride_pc")}  # fmt: skip
    constants = unit | constants

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument.endswith("_ptr"):
            return "*i32:16" if argument in _INTS else "*fp32:16" if argument in _SUMS else f"*{element}:16"
        wide = argument.startswith("stride_") or argument in ("CIN", "COUT", "COLUMNS", "length")
        return "i32:16" if wide else "i32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    precision = None if "BLOCK_I" not in constants else "ieee" if dtype == torch.float32 else element
    return Variant(kernel, name, signature, constants, warps, stages, matrix and dtype != torch.float32, precision,
                   targets)  # fmt: skip


def _conv_variant(
    kind: str, dtype: torch.dtype, channels: tuple[int, int], config: Config, targets: tuple[str, ...] = (),
    absent: tuple[str, ...] = (),
) -> Variant:  # fmt: skip
    """channels: of the weight, in and out; absent: pointers that are None. A plain one is a gradient of x."""
    (Cin, Cout), gated = channels, kind == "gate"
    columns = Cout // 2 if gated else Cout
    depth, block = configs.depth_of(config, Cin), _block(config, columns, gated)
    constants = {"ACTIVATION": int(gated), "STEPS": triton.cdiv(Cin, depth), "EVEN": Cin % depth == 0,
                 "BLOCK_N": config.positions, "BLOCK_O": block, "BLOCK_I": depth}  # fmt: skip
    constants |= {"stride_wo" if gated else "stride_wi": 1} | dict.fromkeys(absent)
    form = kind + ("_bare" if absent and gated else "")
    name = f"{form}_{_ELEMENTS[dtype]}_C{Cin}_{config.positions}x{block}x{depth}_w{config.warps}_s{config.stages}"
    return _variant(forward._conv_kernel, name, dtype, constants, config.warps, config.stages, True, targets)


def _weight_variant(
    dtype: torch.dtype, channels: tuple[int, int], config: Config, targets: tuple[str, ...] = ()
) -> Variant:
    block_i, block_o = _weight_tile(config, *channels)
    tile = {"BLOCK_N": config.positions, "BLOCK_O": block_o, "BLOCK_I": block_i}
    name = f"weight_{_ELEMENTS[dtype]}_{config.positions}x{block_o}x{block_i}_w{config.warps}_s{config.stages}"
    return _variant(backward._weight_kernel, name, dtype, tile, config.warps, config.stages, True, targets)


def variants() -> list[Variant]:
    """Every config at the least channels that fill it, as layers C -> 2 C launch it, and what is beside them."""
    made, bare = [], ("bias_ptr", "addend_ptr", "residual_ptr", "pre_ptr")
    for dtype in (torch.bfloat16, torch.float32):
        for (kind, bits), fits in configs.FITS.items():
            for config, _, _, targets in fits if bits == configs.width(dtype) else []:
                C = config.columns // 2 if config.columns > 64 else 48
                if kind == "gate":
                    made.append(_conv_variant(kind, dtype, (C, 2 * C), config, targets))
                elif kind == "plain":
                    made.append(_conv_variant(kind, dtype, (4 * C, 2 * C), config, targets, bare))
                else:
                    made.append(_weight_variant(dtype, (C, 2 * C), config, targets))
    config, _, _, targets = configs.FITS["gate", "half"][0]
    made.append(_conv_variant("gate", torch.bfloat16, (512, 1024), config, targets, bare[1:]))
    block_n, block_o = _gate_tile(128)
    tile, parts = {"BLOCK_N": block_n, "BLOCK_O": block_o}, {"BLOCK_S": SUM_PARTS, "BLOCK": SUM_BLOCK}
    name = f"gradient_bf16_{block_n}x{block_o}_w4"
    return [
        *made, _variant(backward._gate_kernel, name, torch.bfloat16, tile | {"ACTIVATION": 1}, 4),
        _variant(backward._sum_kernel, f"sum_{SUM_PARTS}x{SUM_BLOCK}_w4", torch.bfloat16, parts, 4),
    ]  # fmt: skip
