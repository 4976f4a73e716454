"""What is compiled ahead of time: every kernel in its configurations, where they take most registers."""

from typing import Any

import torch
from fastvid.kernels.axial_attention import triton_backward as backward
from fastvid.kernels.axial_attention import triton_bias as bias
from fastvid.kernels.axial_attention import triton_configs as configs
from fastvid.kernels.axial_attention import triton_forward as forward
from fastvid.kernels.axial_attention import triton_launch as launch
from fastvid.kernels.axial_attention.triton_configs import Fit
from fastvid.kernels.common.variant import Variant

ELEMENTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KERNELS = {
    "tile": forward._tile_kernel, "long": forward._long_kernel, "split": forward._long_kernel,
    "box": backward._box_kernel, "queries": backward._queries_kernel, "keys": backward._keys_kernel,
    "bias": bias._bias_kernel,
}  # fmt: skip
NVIDIA, AMD = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120"), ("gfx942",)
_SUMS = ("lse_ptr", "grad_lse_ptr", "delta_ptr", "part_ptr")  # float32 whatever the dtype
_UNITS = ("stride_qe", "stride_ke", "stride_vd", "stride_gd", "stride_bj")
_WIDE = ("row_q", "row_k", "row_v", "length")


def variant(
    kernel: Any, name: str, dtype: torch.dtype, constants: dict[str, Any], warps: int, stages: int = 1,
    matrix: bool = True, targets: tuple[str, ...] = (),
) -> Variant:  # fmt: skip
    """Of tensors that are one after the other along their last axis, with strides that 16 divides."""
    element = ELEMENTS[dtype]
    constants = {name: 1 for name in kernel.arg_names if name in _UNITS} | constants

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument.endswith("_ptr"):
            return "*fp32:16" if argument in _SUMS or argument == "bias_ptr" else f"*{element}:16"
        if argument == "scale":
            return "fp32"
        # those of out, lse and the gradients' positions count positions
        wide = argument in _WIDE or (argument.startswith("stride_") and argument[7] not in "op")
        return "i32:16" if wide else "i32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    products = "STEP" in constants
    precision = None if not products else "ieee" if dtype == torch.float32 else element
    return Variant(kernel, name, signature, constants, warps, stages,
                   matrix and products and dtype != torch.float32, precision, targets)  # fmt: skip


def _fitted(
    kind: str, dtype: torch.dtype, fit: Fit, width: int | None = None, box: tuple[int, int] = (0, 0),
    plain: bool | None = None,
) -> Variant:  # fmt: skip
    """A config as it is launched for causal boxes of n queries and m keys, by default those that fill its tile.

    width: of a head, by default the widest that it is for. plain: lines without a bias; else 3-D boxes with one.
    """
    tile, width = fit.config, width or fit.width
    plain = fit.plain if plain is None else plain
    constants = launch.constants_of(kind, width, width, plain, "causal", tile) | {"WHOLE": not plain}
    absent = ["bias_ptr"] if plain else []
    if kind in ("tile", "box", "bias"):
        constants |= configs.slots(tile, *(own or whole for own, whole in zip(box, tile[:2], strict=True)))
    else:
        constants |= {"BLOCK_N": tile.rows, "BLOCK_M": tile.keys}
    if kind in ("long", "split"):
        constants["CHUNK"] = 0 if kind == "long" else configs.CHUNK
        absent += ["part_ptr"] if kind == "long" else ["out_ptr", "lse_ptr"]
    if kind == "box":
        absent += ["grad_lse_ptr"] + ["out_ptr", "delta_ptr"] * plain
    form = f"{'plain' if plain else 'any'}_{ELEMENTS[dtype]}_E{width}"
    size = f"{tile.rows}x{tile.keys}" + (f"x{constants['PACK']}" if "PACK" in constants else "")
    # of less than 64 rows Hopper's matrix instructions cannot be had
    matrix = fit.amd or (tile.keys if kind == "keys" else tile.rows) >= 64
    name, constants = f"{kind}_{form}_{size}_w{tile.warps}_s{tile.stages}", constants | dict.fromkeys(absent)
    targets = AMD if fit.amd else NVIDIA
    return variant(KERNELS[kind], name, dtype, constants, tile.warps, tile.stages, matrix, targets)


def variants() -> list[Variant]:
    """Every config at its widest head in the form that takes most registers; common lines; what is beside them."""
    made = []
    for (kind, width), fits in configs.FITS.items():
        dtype = torch.bfloat16 if width == "half" else torch.float32
        made += [_fitted(kind, dtype, fit) for fit in fits]
    for kind in ("tile", "box"):
        fit = configs.FITS[kind, "half"][0]
        made += [_fitted(kind, torch.bfloat16, fit, 64, box, plain=True) for box in ((4, 4), (64, 64))]
    form = {"D": 64, "LINE": True, "BLOCK": launch.MERGE_ROWS, "BLOCK_D": 64}
    parts = {"BLOCK_S": launch.SUM_PARTS, "BLOCK": launch.SUM_BLOCK}
    made += [variant(forward._merge_kernel, "merge_bf16_D64_w4", torch.bfloat16, form, 4),
             variant(bias._sum_kernel, "sum_bf16_w4", torch.bfloat16, parts, 4)]  # fmt: skip
    named: dict[str, Variant] = {}
    for one in made:  # a config may be NVIDIA's and AMD's
        same = named.get(one.name, one)
        named[one.name] = one._replace(targets=tuple(dict.fromkeys(same.targets + one.targets)))
    return list(named.values())
