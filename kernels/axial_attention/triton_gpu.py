"""axial_attention and its gradients by Triton: launchers, and what is compiled ahead of time.

None of this has run on a GPU yet; the kernels have run in Triton's interpreter and through the compilers of six chips.
"""

import torch
import triton
from fastvid.kernels.axial_attention import reference, triton_launch
from fastvid.kernels.axial_attention import triton_configs as configs
from fastvid.kernels.axial_attention.triton_configs import BLOCK_D, TUNED, Config, Cut, bucket
from fastvid.kernels.axial_attention.triton_variants import variants
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ROWS, MAX_E, MAX_D = 2**31 - 2**10, 128, 1024

__all__ = [
    "TUNED", "axial_attention", "axial_attention_backward", "bucket", "tunable", "variants", "why_not",
    "why_not_backward",
]  # fmt: skip


def why_not(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, box: list[int], mask: str, scale: float,
    keep: bool,
) -> str | None:  # fmt: skip
    """What these kernels cannot do about such arguments, in a few words; None where they serve."""
    if q.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {q.dtype}"
    queries, keys, values = reference.unpacked(q, k, v)
    if mixed := [t.dtype for t in (keys, values) if t.dtype != q.dtype]:
        return f"takes keys and values of q's dtype, got {mixed[0]} beside {q.dtype}"
    if bias is not None and bias.dtype not in DTYPES:
        return f"takes a bias in float32, bfloat16 or float16, got {bias.dtype}"
    if bias is not None and _span(bias) >= 2**31:
        return f"takes a bias that spans less than 2**31 elements, got {_span(bias)}"
    (E, D), A = (queries.shape[5], values.shape[5]), queries.shape[4]
    rows = max(t.shape[:4].numel() for t in (queries, keys)) * A * triton.cdiv(max(D, 1), BLOCK_D)
    if not 1 <= E <= MAX_E or not 1 <= D <= MAX_D or rows > MAX_ROWS:
        return (f"takes heads of up to {MAX_E} and values of up to {MAX_D}, and {MAX_ROWS} positions of a head, "
                f"got {E}, {D} and {rows}")  # fmt: skip
    if not (q.is_cuda or INTERPRETED):
        return f"needs a CUDA tensor, got {q.device.type}"
    cut = triton_launch.cut_of(queries, keys, box)
    return _untiled(queries, values, bias, cut, triton_launch.kinds(queries, values, bias, cut, False))


def _span(x: Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((extent - 1) * stride for extent, stride in zip(x.shape, x.stride(), strict=True))


def _untiled(q: Tensor, v: Tensor, bias: Tensor | None, cut: Cut, kinds: tuple[str, ...]) -> str | None:
    if all(triton_launch.choose(q, v, bias, cut, kind) for kind in kinds):
        return None
    return "takes lines without a bias alone on this chip"


def why_not_backward(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, out: Tensor, lse: Tensor,
    grad_out: Tensor | None, grad_lse: Tensor | None, box: list[int], mask: str, scale: float, wanted: list[bool],
) -> str | None:  # fmt: skip
    """What the kernels of the gradient cannot do about such arguments; None where they serve."""
    if grad_out is None and grad_lse is None:
        return "needs a gradient of an output"
    if reason := why_not(q, k, v, bias, box, mask, scale, True):
        return reason
    if grad_out is not None and grad_out.dtype not in DTYPES:
        return f"takes a gradient in float32, bfloat16 or float16, got {grad_out.dtype}"
    queries, keys, values = reference.unpacked(q, k, v)
    cut = triton_launch.cut_of(queries, keys, box)
    found = triton_launch.kinds(queries, values, bias, cut, True)
    if values.shape[5] > BLOCK_D and "box" not in found:
        told = f"{cut.n} queries, {cut.m} keys, heads of {queries.shape[5]} and values of {values.shape[5]}"
        return f"takes values wider than {BLOCK_D} in small boxes of narrow heads alone, got {told}"
    return _untiled(queries, values, bias, cut, (*found, "bias") if wanted[3] else found)


def tunable(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, box: list[int], gradient: bool
) -> list[tuple[str, str, list[dict[str, int]]]]:
    """The kinds of kernel that such a call takes, or its gradient with all of them wanted, each with its key in
    tuned.json and the configs worth timing as dicts, the default first."""
    q, k, v = reference.unpacked(q, k, v)
    cut, shared = triton_launch.cut_of(q, k, box), configs.device(triton_launch.index_of(q))[1]
    kinds, plain = triton_launch.kinds(q, v, bias, cut, gradient), cut.line and bias is None
    found = []
    for kind in (*kinds, "bias") if gradient and bias is not None else kinds:
        size = q.dtype, configs.width_of(kind, q.shape[5], v.shape[5])
        fits = configs.fitting(kind, *size, cut.n, cut.m, plain, shared)
        found.append((kind, bucket(kind, *size, cut.m, plain), [one._asdict() for one in fits]))
    return found


def axial_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, box: list[int], mask: str, scale: float,
    keep: bool, config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The launcher: arguments as checked by fastvid.ops.axial_attention, (out, lse) as its reference returns them.

    config: a Config as a dict. Raises: NotImplementedError with the reason of `why_not`.
    """
    if reason := why_not(q, k, v, bias, box, mask, scale, keep):
        raise NotImplementedError(f"axial_attention: triton {reason}.")
    q, k, v = reference.unpacked(q, k, v)
    out = q.new_empty(*q.shape[:5], v.shape[5])
    lse = q.new_empty(q.shape[:5] if keep else 0, dtype=torch.float32)
    if out.numel():
        tile = Config(**config) if config else None
        with triton_launch.on(q):
            cut = triton_launch.cut_of(q, k, box)
            triton_launch.attend(q, k, v, bias, out, lse if keep else None, cut, mask, scale, tile)
    return out, lse


def axial_attention_backward(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, out: Tensor, lse: Tensor,
    grad_out: Tensor | None, grad_lse: Tensor | None, box: list[int], mask: str, scale: float, wanted: list[bool],
    config: dict[str, dict[str, int]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The launcher of the gradients of q (of all three, where it holds them), k, v and bias; [0] if not wanted.

    config: by kind, a Config as a dict. Raises: NotImplementedError with the reason of `why_not_backward`.
    """
    if reason := why_not_backward(q, k, v, bias, out, lse, grad_out, grad_lse, box, mask, scale, wanted):
        raise NotImplementedError(f"axial_attention_backward: triton {reason}.")
    none = q.new_empty(0)
    found = [q.new_empty(x.shape) if asked and x is not None else none
             for x, asked in zip((q, k, v), wanted[:3], strict=True)]  # fmt: skip
    grad_bias = bias.new_zeros(bias.shape) if wanted[3] else none
    if out.numel() and any(wanted):
        parts = found[0].unbind(-3) if k is None and wanted[0] else found
        q, k, v = reference.unpacked(q, k, v)
        cut = triton_launch.cut_of(q, k, box)
        whole = "box" in triton_launch.kinds(q, v, bias, cut, True)
        delta = q.new_empty(q.shape[:5] if wanted[3] or not whole else 0, dtype=torch.float32)
        lse, grad_lse = lse.contiguous(), None if grad_lse is None else grad_lse.contiguous()
        tiles = {kind: Config(**one) for kind, one in (config or {}).items()}
        call = triton_launch.Gradient(
            q, k, v, bias, out.contiguous(), lse, grad_out, grad_lse, delta, cut, mask, scale, tiles
        )
        with triton_launch.on(q):
            _launch(call, whole, [part if part.numel() else None for part in parts], grad_bias)
    return (*found, grad_bias)


def _launch(call: triton_launch.Gradient, whole: bool, grads: list[Tensor | None], grad_bias: Tensor) -> None:
    if whole:
        call.box(*grads)
    else:
        call.queries(grads[0])
        if grads[1] is not None or grads[2] is not None:
            call.keys(*grads[1:])
    if grad_bias.numel():
        call.bias_sum(grad_bias)
