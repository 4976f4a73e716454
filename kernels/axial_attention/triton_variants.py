"""What is compiled ahead of time: every kernel in its configurations, at the head widths that decide whether it fits."""

from typing import Any

import torch
from fastvid.kernels.axial_attention import triton_backward as backward
from fastvid.kernels.axial_attention import triton_bias as bias
from fastvid.kernels.axial_attention import triton_forward as forward
from fastvid.kernels.common.variant import Variant

ELEMENTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
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
    products = "BLOCK_E" in constants
    precision = None if not products else "ieee" if dtype == torch.float32 else element
    return Variant(kernel, name, signature, constants, warps, stages,
                   matrix and products and dtype != torch.float32, precision, targets)  # fmt: skip


def variants() -> list[Variant]:
    return []
