"""Toy kernels for test_static.py: one honest product, and kernels that a guard must catch."""

import triton
import triton.language as tl
from fastvid.kernels.common.variant import Variant


@triton.jit
def _nearest_kernel(
    x_ptr, codebook_ptr, indices_ptr, N, K, stride_xn, stride_ck,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    o_d = tl.arange(0, D)
    b_x = tl.load(x_ptr + o_n[:, None] * stride_xn + o_d[None, :], mask=(o_n < N)[:, None], other=0.0)
    acc_best = tl.full((BLOCK_N,), float("inf"), tl.float32)
    acc_index = tl.zeros((BLOCK_N,), tl.int32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        p_c = codebook_ptr + o_k[:, None].to(tl.int64) * stride_ck + o_d[None, :]
        b_c = tl.load(p_c, mask=(o_k < K)[:, None], other=0.0)  # [BLOCK_K, D]
        b_score = tl.where((o_k < K)[None, :], -tl.dot(b_x, tl.trans(b_c), input_precision=PRECISION), float("inf"))
        b_least, b_where = tl.min(b_score, axis=1, return_indices=True)
        acc_index = tl.where(b_least < acc_best, i_k + b_where, acc_index)
        acc_best = tl.minimum(b_least, acc_best)
    tl.store(indices_ptr + o_n, acc_index, mask=o_n < N)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, BLOCK_N: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(y_ptr + o_n, tl.load(x_ptr + o_n, mask=o_n < N, other=0.0), mask=o_n < N)


def nearest(name, kind, rows, codes, warps, stages, matrix, precision, targets=(), asked=None) -> Variant:
    """`asked`: the precision that the kernel is really given, where the variant lies about it."""
    signature = {"x_ptr": f"*{kind}:16", "codebook_ptr": f"*{kind}:16", "indices_ptr": "*i32:16", "N": "i32",
                 "K": "i32", "stride_xn": "i32:16", "stride_ck": "i32:16"}  # fmt: skip
    constants = {"D": 64, "BLOCK_N": rows, "BLOCK_K": codes, "PRECISION": asked or precision}
    signature |= dict.fromkeys(constants, "constexpr")
    return Variant(_nearest_kernel, name, signature, constants, warps, stages, matrix, precision, targets)


def copy(name, end, targets) -> Variant:
    signature = {"x_ptr": f"*fp32{end}", "y_ptr": f"*fp32{end}", "N": f"i32{end}", "BLOCK_N": "constexpr"}
    return Variant(_copy_kernel, name, signature, {"BLOCK_N": 1024}, 4, 1, False, None, targets)


GOOD = [
    nearest("half", "fp16", 128, 64, 4, 2, True, "fp16", asked="ieee"),
    nearest("tf32", "fp32", 64, 64, 4, 2, True, "tf32"),
    nearest("ieee", "fp32", 32, 32, 4, 1, False, "ieee", ("sm_80", "gfx942")),
    copy("copy", ":16", ("sm_80", "gfx942")),
]
BAD = [
    nearest("spills", "fp32", 128, 64, 4, 1, False, "ieee", ("sm_80",)),
    nearest("greedy", "fp32", 128, 128, 8, 4, True, "tf32", ("sm_80", "sm_86", "sm_120")),
    nearest("forced-ieee", "fp32", 64, 32, 4, 1, True, "tf32", ("sm_90",), asked="ieee"),
    nearest("secret-tf32", "fp32", 64, 64, 4, 1, False, "ieee", ("sm_80", "sm_90", "sm_100", "gfx942"), asked="tf32"),
    nearest("too-small", "fp16", 32, 32, 4, 1, True, "fp16", ("sm_90",), asked="ieee"),
    nearest("untrue", "bf16", 64, 64, 4, 1, True, "fp16", ("sm_80",), asked="ieee"),
    copy("narrow", "", ("sm_80", "gfx942")),
    copy("broken", "", ("sm_80",))._replace(constants={"BLOCK_N": 1000}),
]


def variants() -> list[Variant]:
    return GOOD
