"""conditional_batch_norm's ops by Triton: launchers, and what is compiled ahead of time.

None of this has run on a GPU yet; the kernels have run in Triton's interpreter and through the compilers of six chips.
"""

import contextlib

import torch
import triton
from fastvid.kernels.common.variant import Variant
from fastvid.kernels.conditional_batch_norm import triton_backward as backward
from fastvid.kernels.conditional_batch_norm import triton_forward as forward
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_N = 2**31 - 2**10
PROGRAMS = 1056  # eight for each multiprocessor of a large chip: enough loads on their way at any time
LEAST_TILES = 4  # of positions that a program of the moments takes
WARPS, MERGE_PARTS, MERGE_BLOCK, SMALL_PARTS = 4, 16, 64, 8
PLAIN, WIDE = 2048, 1024  # elements of a tile: 16 for each of 128 threads; 8, or 4 of float32, where neighbours count

__all__ = [
    "conditional_batch_norm", "conditional_norm", "conditional_norm_backward", "frame_moments", "variants", "why_not",
]  # fmt: skip


def why_not(x: Tensor, *_) -> str | None:
    """What these kernels cannot do about such arguments, in a few words; None where they serve."""
    if x.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {x.dtype}"
    if 4 * x.shape[:4].numel() * max(1, _columns(x, WIDE // 2)) > MAX_N or x.shape[1] * x.shape[4] > MAX_N:
        return f"takes up to {MAX_N // 4} positions of 64 channels, got {list(x.shape)}"
    if not (x.is_cuda or INTERPRETED):
        return f"needs a CUDA tensor, got {x.device.type}"
    return None


def _refuse(name: str, x: Tensor) -> None:
    if reason := why_not(x):
        raise NotImplementedError(f"{name}: triton {reason}.")


def _on(x: Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _tile(channels: int, elements: int) -> dict[str, int]:
    columns = min(128, elements // 8, max(16, triton.next_power_of_2(channels)))
    return {"BLOCK_N": elements // columns, "BLOCK_C": columns}


def _elements(dtype: torch.dtype, upsample: bool) -> int:
    return (WIDE if dtype.itemsize == 2 else WIDE // 2) if upsample else PLAIN


def _columns(x: Tensor, elements: int) -> int:
    return triton.cdiv(x.shape[4], _tile(x.shape[4], elements)["BLOCK_C"])


def _flat(*tensors: Tensor) -> bool:
    """Whether the positions of a frame lie evenly in memory."""
    return all(t.shape[2] == 1 or t.stride(2) == t.shape[3] * t.stride(3) for t in tensors)


def _shares(positions: int, programs: int, block: int, least: int = 1) -> tuple[int, int]:
    """Positions of a share, whole tiles of them, and how many shares there are. programs: there would be with one."""
    shares = min(triton.cdiv(PROGRAMS, programs), triton.cdiv(positions, least * block))
    rows = triton.cdiv(triton.cdiv(positions, shares), block) * block
    return rows, triton.cdiv(positions, rows)


def frame_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The launcher: x as checked by fastvid.ops.frame_moments, (mean, var) [T, C] float32 as its reference returns.

    Raises: NotImplementedError with the reason of `why_not`.
    """
    _refuse("frame_moments", x)
    B, T, H, W, C = x.shape
    mean, var = (x.new_zeros(T, C, dtype=torch.float32) for _ in range(2))
    if B:
        tile, columns = _tile(C, PLAIN), _columns(x, PLAIN)
        rows, splits = _shares(B * H * W, T * columns, tile["BLOCK_N"], LEAST_TILES)
        part = x.new_empty(splits, 3, T, C, dtype=torch.float32)
        with _on(x):
            forward._moments_kernel[splits * T * columns,](
                x, part, B * H * W, T, H * W, W, rows, C, *x.stride(), FLAT=_flat(x), **tile, num_warps=WARPS,
                num_stages=1,
            )  # fmt: skip
            forward._merge_kernel[triton.cdiv(T * C, MERGE_BLOCK),](
                part, mean, var, B * H * W, rows, splits, T * C, BLOCK_S=MERGE_PARTS, BLOCK=MERGE_BLOCK,
                num_warps=WARPS, num_stages=1,
            )  # fmt: skip
    return mean, var


def conditional_norm(
    x: Tensor, mean: Tensor, var: Tensor, gain: Tensor, bias: Tensor, eps: float, relu: bool, upsample: bool
) -> tuple[Tensor]:
    """The launcher: arguments as checked by fastvid.ops.conditional_norm, out as its reference returns it.

    Raises: NotImplementedError with the reason of `why_not`.
    """
    _refuse("conditional_norm", x)
    B, T, H, W, C = x.shape
    out = x.new_empty((B, T, 2 * H, 2 * W, C) if upsample else (B, T, H, W, C))
    if B:
        elements = _elements(x.dtype, upsample)
        tile, columns = _tile(C, elements), _columns(x, elements)
        rows, chunks = _shares(H * W, B * T * columns, tile["BLOCK_N"])
        with _on(x):
            forward._norm_kernel[B * T * chunks * columns,](
                x, *_packed(mean, var, gain, bias), out, T, H, W, rows, chunks, C, eps, *x.stride(), RELU=relu,
                UPSAMPLE=upsample, FLAT=_flat(x), **tile, num_warps=WARPS, num_stages=1,
            )  # fmt: skip
    return (out,)


def _packed(*small: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in small]


def conditional_batch_norm(
    x: Tensor, gain: Tensor, bias: Tensor, eps: float, relu: bool, upsample: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The launcher: conditional_norm by x's own moments, and these.

    Raises: NotImplementedError with the reason of `why_not`.
    """
    _refuse("conditional_batch_norm", x)
    mean, var = frame_moments(x)
    return *conditional_norm(x, mean, var, gain, bias, eps, relu, upsample), mean, var


def conditional_norm_backward(
    x: Tensor, mean: Tensor, var: Tensor, gain: Tensor, bias: Tensor, grad_out: Tensor, eps: float, relu: bool,
    upsample: bool, own: bool, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The launcher of the gradients of x, mean, var, gain and bias; [0] for what is not wanted.

    Own moments take two passes over x and grad_out: what they hand back is known only after all sums.
    Raises: NotImplementedError with the reason of `why_not`.
    """
    _refuse("conditional_norm_backward", x)
    B, T, H, W, C = x.shape
    own = own and wanted[0]
    small = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) if asked or (own and i < 2) else None
             for i, (tensor, asked) in enumerate(zip((mean, var, gain, bias), wanted[1:], strict=True))]  # fmt: skip
    grad_x = x.new_empty(x.shape) if wanted[0] else None
    summed = any(tensor is not None for tensor in small)
    if B and any(wanted):
        mean, var, gain, bias = _packed(mean, var, gain, bias)
        given, options = (x, mean, var, gain, bias, grad_out), (eps, relu, upsample)
        part = _pass(given, options, None, None if own else grad_x, summed)
        with _on(x):
            if summed:
                forms = {"BLOCK_S": SMALL_PARTS, "BLOCK_C": min(64, _tile(C, PLAIN)["BLOCK_C"])}
                backward._small_kernel[(B + T) * triton.cdiv(C, forms["BLOCK_C"]),](
                    part, var, gain, *small, B, T, part.shape[0], C, eps, **forms, num_warps=WARPS, num_stages=1,
                    enable_fp_fusion=False,
                )  # fmt: skip
        if own:
            _pass(given, options, small[:2], grad_x, False)
    found = (grad_x, *small)
    return tuple(tensor if asked else given.new_empty(0)
                 for tensor, given, asked in zip(found, (x, mean, var, gain, bias), wanted, strict=True))  # fmt: skip


def _pass(
    given: tuple[Tensor, ...], options: tuple, moments: list[Tensor] | None, grad_x: Tensor | None, summed: bool
) -> Tensor | None:
    """One pass over x and grad_out: the gradient of x where it is wanted, and the sums [chunks, B, T, 2, C]."""
    x, *small, grad_out = given
    (B, T, H, W, C), (eps, relu, upsample) = x.shape, options
    elements = _elements(x.dtype, upsample)
    tile, columns = _tile(C, elements), _columns(x, elements)
    rows, chunks = _shares(H * W, B * T * columns, tile["BLOCK_N"])
    part = x.new_empty(chunks, B, T, 2, C, dtype=torch.float32) if summed else None
    with _on(x):
        backward._norm_backward_kernel[B * T * chunks * columns,](
            x, *small, grad_out, *(moments or (None, None)), grad_x, part, B * H * W, T, H, W, rows, chunks, C, eps,
            *x.stride(), *grad_out.stride(), RELU=relu, UPSAMPLE=upsample,
            FLAT=_flat(x) if upsample else _flat(x, grad_out), **tile, num_warps=WARPS, num_stages=1,
            # where a frame has few values, what its moments hand back cancels the rest: as exactly as both are rounded
            enable_fp_fusion=False,
        )  # fmt: skip
    return part


# ---- ahead of time

_ELEMENTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_OF_X = ("x_ptr", "out_ptr", "grad_out_ptr", "grad_x_ptr")  # in x's dtype; everything else is float32


def _variant(kernel, name: str, dtype: torch.dtype, **constants) -> Variant:
    """Of packed tensors, with channels that 16 divides."""
    unit = {argument: 1 for argument in kernel.arg_names if argument in ("stride_xc", "stride_gc")}
    constants = unit | constants

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument.endswith("_ptr"):
            return f"*{_ELEMENTS[dtype]}:16" if argument in _OF_X else "*fp32:16"
        if argument == "eps":
            return "fp32"
        return "i32:16" if argument.startswith("stride_") or argument in ("C", "length") else "i32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    return Variant(kernel, name, signature, constants, WARPS, 1, False, None)


def variants() -> list[Variant]:
    """Every kernel in the forms that take most registers, for maps of 128 channels and more."""
    made = []
    for dtype in (torch.bfloat16, torch.float32):
        word, form = _ELEMENTS[dtype], {"RELU": True, "FLAT": True}
        made.append(_variant(forward._moments_kernel, f"moments_{word}", dtype, FLAT=True, **_tile(128, PLAIN)))
        for upsample in (False, True):
            grown = form | {"UPSAMPLE": upsample} | _tile(128, _elements(dtype, upsample))
            size = "_up" * upsample + f"_{word}_{grown['BLOCK_N']}x{grown['BLOCK_C']}"
            alone = {"grad_mean_ptr": None, "grad_var_ptr": None}
            made += [
                _variant(forward._norm_kernel, f"norm{size}", dtype, **grown),
                _variant(backward._norm_backward_kernel, f"gradients{size}", dtype, **grown, **alone),
                _variant(backward._norm_backward_kernel, f"own{size}", dtype, **grown, part_ptr=None),
            ]
    merge, small = {"BLOCK_S": MERGE_PARTS, "BLOCK": MERGE_BLOCK}, {"BLOCK_S": SMALL_PARTS, "BLOCK_C": 64}
    return [
        *made, _variant(forward._merge_kernel, "merge", torch.float32, **merge),
        _variant(backward._small_kernel, "small", torch.float32, **small),
    ]  # fmt: skip
