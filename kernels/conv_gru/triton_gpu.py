"""conv_gru and its gradients by Triton: launchers, and what is compiled ahead of time.

None of this has run on a GPU yet; the kernels have run in Triton's interpreter and through the compilers of six chips.
"""

import contextlib
from typing import Any

import torch
import triton
from fastvid.kernels.common.variant import Variant
from fastvid.kernels.conv_gru import reference
from fastvid.kernels.conv_gru import triton_backward as backward
from fastvid.kernels.conv_gru import triton_configs as configs
from fastvid.kernels.conv_gru import triton_forward as forward
from fastvid.kernels.conv_gru.triton_configs import TUNED, Config, Cut, bucket
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_N, MAX_CHANNELS = 2**31 - 2**10, 2**13

__all__ = [
    "TUNED", "bucket", "conv_gru", "conv_gru_backward", "tunable", "variants", "why_not", "why_not_backward",
]  # fmt: skip


def why_not(
    gates: Tensor, hidden: Tensor | None, weight_gates: Tensor, weight_candidate: Tensor, steps: int, activation: str,
    keep: bool,
) -> str | None:  # fmt: skip
    """What these kernels cannot do about such arguments, in a few words; None where they serve."""
    return _refused(gates, weight_candidate, [])


def why_not_backward(
    grad_states: Tensor | None, grad_kept: Tensor | None, hidden: Tensor | None, weight_gates: Tensor,
    weight_candidate: Tensor, states: Tensor, kept: Tensor, frames: int, activation: str, wanted: list[bool],
) -> str | None:  # fmt: skip
    """What the kernels of the gradient cannot do about such arguments; None where they serve."""
    return _refused(states, weight_candidate, [kept, grad_states, grad_kept, hidden, weight_gates])


def _refused(x: Tensor, weight: Tensor, others: list[Tensor | None]) -> str | None:
    if x.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {x.dtype}"
    if mixed := [t.dtype for t in (weight, *others) if t is not None and t.dtype != x.dtype]:
        return f"takes tensors of one dtype, got {mixed[0]} beside {x.dtype}"
    C, N = weight.shape[0], x.shape[:1].numel() * x.shape[2:4].numel()
    if N * 3 * C > MAX_N or C > MAX_CHANNELS:
        return f"takes up to {MAX_N} values of a frame's gates and {MAX_CHANNELS} channels, got {N * 3 * C} and {C}"
    if not (x.is_cuda or INTERPRETED):
        return f"needs a CUDA tensor, got {x.device.type}"
    return None


def tunable(x: Tensor) -> list[dict[str, int]]:
    """The configs worth timing as dicts, the default first. x: states, or of their shape."""
    positions = x.shape[0] * x.shape[2] * x.shape[3]
    fits = configs.fitting(x.dtype, positions, x.shape[4], configs.device(_index(x))[1])
    return [config._asdict() for config in fits]


def _index(x: Tensor) -> int | None:
    return x.device.index if x.is_cuda else None


def _on(x: Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


class Scan:
    """A frame's sizes, its tiles, and the room in which cut sums meet: what all launches of one call share."""

    def __init__(self, states: Tensor, kernel: int, config: dict[str, int] | None, reverse: bool = False):
        B, _, self.H, self.W, self.C = states.shape
        self.N, self.K = B * self.H * self.W, kernel
        self.config = (
            Config(**config) if config else configs.choose(_index(states), states.dtype, self.N, self.C)
        )
        if reverse:
            self.config = configs.narrowed(self.config, states.dtype)
        cuts = [self.cut(*form) for form in ((2, 1, False), (1, 1, False), (1, 2, False))]
        room = max((cut.tiles * cut.splits for cut in cuts if cut.splits > 1), default=0)
        tile = self.config.columns * self.config.positions
        self.part = states.new_empty(room * tile, dtype=torch.float32) if room else None
        self.count = states.new_zeros(max(cut.tiles for cut in cuts), dtype=torch.int32) if room else None

    def cut(self, parts: int, deep: int, zero: bool) -> Cut:
        """Of a convolution from deep C channels, or of zeros, to parts C."""
        return configs.cut(self.config, self.N, self.C, parts, deep * self.C, self.K, zero)

    def run(self, kernel: Any, parts: int, deep: int, zero: bool, given: tuple, strides: tuple, **constants) -> None:
        """Launch a kernel. given, strides: its pointers up to `part` and its strides."""
        cut = self.cut(parts, deep, zero)
        room = (self.part, self.count) if cut.splits > 1 else (None, None)
        kernel[cut.tiles * cut.splits,](
            *given, *room, self.N, self.H, self.W, self.C, cut.splits, *strides, **constants, **cut.constants
        )


def _frame(x: Tensor | None, t: int) -> Tensor | None:
    return None if x is None else x[:, min(t, x.shape[1] - 1)]


def _strides(x: Tensor | None) -> tuple[int, ...]:
    """Of sample, row and column of a frame [B, H, W, C]."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def _rows(x: Tensor | None) -> Tensor | None:
    """With its channels side by side."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def conv_gru(
    gates: Tensor, hidden: Tensor | None, weight_gates: Tensor, weight_candidate: Tensor, steps: int, activation: str,
    keep: bool, config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The launcher: arguments as checked by fastvid.ops.conv_gru, (states, kept) as its reference returns them.

    Two launches a frame. config: a Config as a dict. Raises: NotImplementedError with the reason of `why_not`.
    """
    if reason := why_not(gates, hidden, weight_gates, weight_candidate, steps, activation, keep):
        raise NotImplementedError(f"conv_gru: triton {reason}.")
    B, _, H, W, three = gates.shape
    C = three // 3
    states = gates.new_empty(B, steps, H, W, C)
    kept = gates.new_empty(B, steps if keep else 1, H, W, three)  # one frame's, at least: its u goes through memory
    if states.numel():
        gates, h = _rows(gates), _rows(hidden)
        weights = [weight.permute(0, 2, 3, 1).contiguous() for weight in (weight_gates, weight_candidate)]
        product = gates.new_empty(B, H, W, C)
        with _on(gates):
            scan = Scan(states, weight_gates.shape[-1], config)
            for t in range(steps):
                _step(scan, h, weights, _frame(gates, t), _frame(kept, t), product, states[:, t], activation)
                h = states[:, t]
    return states, kept if keep else gates.new_empty(0)


def _step(
    scan: Scan, h: Tensor | None, weights: list[Tensor], gates: Tensor, kept: Tensor, product: Tensor, state: Tensor,
    activation: str,
) -> None:  # fmt: skip
    strides, zero = (*_strides(h), *_strides(gates), *_strides(kept)), h is None
    scan.run(forward._gates_kernel, 2, 1, zero, (h, weights[0], gates, kept, product), strides)
    given = (None if zero else product, weights[1], gates, kept, h, state)
    scan.run(
        forward._candidate_kernel, 1, 1, zero, given, (*strides, *_strides(state)), RELU=activation == "relu"
    )


def conv_gru_backward(
    grad_states: Tensor | None, grad_kept: Tensor | None, hidden: Tensor | None, weight_gates: Tensor,
    weight_candidate: Tensor, states: Tensor, kept: Tensor, frames: int, activation: str, wanted: list[bool],
    config: dict[str, int] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The launcher of the gradients of gates, hidden and both weights; [0] for what is not wanted.

    Two launches a frame; the weights' gradients are torch's, over all frames at once.
    Raises: NotImplementedError with the reason of `why_not_backward`.
    """
    args = (grad_states, grad_kept, hidden, weight_gates, weight_candidate, states, kept, frames, activation, wanted)
    if reason := why_not_backward(*args):
        raise NotImplementedError(f"conv_gru_backward: triton {reason}.")
    none, C = states.new_empty(0), states.shape[-1]
    first = None if hidden is None else states.new_zeros(hidden.shape)
    grad = states.new_empty(kept.shape)  # before all three activations
    if states.numel() and any(wanted):
        with _on(states):
            _reverse(grad, first if wanted[1] else None, [_rows(arg) for arg in args[:7]], activation, config)
    to_gates = (grad if frames == grad.shape[1] else grad.sum(dim=1, keepdim=True)) if wanted[0] else none
    found = [to_gates, first if wanted[1] and first is not None else none]
    if not (wanted[2] or wanted[3]):
        return *found, none, none
    start = torch.zeros_like(states[:, 0]) if hidden is None else hidden
    earlier = torch.cat([start[:, None], states[:, :-1]], dim=1)  # [B, T, H, W, C]
    seen = (earlier, kept[..., :C] * earlier if wanted[3] else none)
    parts = (grad[..., : 2 * C], grad[..., 2 * C :])
    for x, part, weight, asked in zip(seen, parts, (weight_gates, weight_candidate), wanted[2:], strict=True):
        found.append(reference.weight_gradient(x, part, weight) if asked else none)
    return tuple(found)


def _reverse(
    grad: Tensor, first: Tensor | None, given: list[Tensor | None], activation: str, config: dict[str, int] | None
) -> None:
    """Fills grad, of the gates of every frame, and first, of the state before them, where it is wanted."""
    grad_states, grad_kept, hidden, weight_gates, weight_candidate, states, kept = given
    turned = [w.flip(2, 3).permute(1, 2, 3, 0).contiguous() for w in (weight_gates, weight_candidate)]
    carry = torch.empty(states[:, 0].shape, dtype=torch.float32, device=states.device)
    scan, relu = Scan(states, weight_gates.shape[-1], config, reverse=True), activation == "relu"
    later = None
    for t in reversed(range(-1, states.shape[1])):
        if t < 0 and first is None:
            return
        here = max(t, 0)
        h = states[:, t - 1] if t > 0 else hidden
        frame, to_state, to_kept = grad[:, here], _frame(grad_states, here), _frame(grad_kept, here)
        strides = (*_strides(frame), *_strides(kept[:, here]), *_strides(h))
        pointers = (later, turned[0], carry, first if t < 0 else None, frame, kept[:, here], h, to_state, to_kept)
        scan.run(backward._back_gates_kernel, 1, 2, later is None, pointers,
                 (*strides, *_strides(to_state), *_strides(to_kept)), RELU=relu)  # fmt: skip
        if t >= 0:
            pointers = (frame, turned[1], kept[:, t], h, to_kept, carry)
            scan.run(backward._back_candidate_kernel, 1, 1, h is None, pointers, (*strides, *_strides(to_kept)))
        later = frame


# ---- ahead of time

_ELEMENTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_SUMS = ("part_ptr", "carry_ptr")  # float32 whatever the dtype


def _variant(
    kernel: Any, name: str, dtype: torch.dtype, config: Config, channels: int, targets: tuple[str, ...],
    **constants: Any,
) -> Variant:  # fmt: skip
    """As a frame of few positions (with cut sums) or many launches it, of packed tensors."""
    few, element = config.positions < 128, _ELEMENTS[dtype]
    deep = 2 if kernel is backward._back_gates_kernel else 1
    parts = 2 if kernel is forward._gates_kernel else 1
    cut = configs.cut(config, config.positions if few else 2**16, channels, parts, deep * channels, 3, False)
    form = {key: value for key, value in cut.constants.items() if not key.startswith("num_")}
    constants = form | constants | ({} if few else {"part_ptr": None, "count_ptr": None})

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument.endswith("_ptr"):
            word = "i32" if argument == "count_ptr" else "fp32" if argument in _SUMS else element
            return f"*{word}:16"
        return "i32:16" if argument.startswith("stride_") or argument == "C" else "i32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    size = f"{config.columns}x{config.positions}x{form['BLOCK_I']}_w{config.warps}_s{config.stages}"
    matrix, precision = dtype != torch.float32, "ieee" if dtype == torch.float32 else element
    return Variant(kernel, f"{name}_{element}_{size}", signature, constants, config.warps, config.stages, matrix,
                   precision, targets)  # fmt: skip


def variants() -> list[Variant]:
    """Every config with the gates; the other kernels where registers are scarcest, and for the fewest positions."""
    made, back = [], {"first_ptr": None, "to_kept_ptr": None, "RELU": True}
    for dtype in (torch.bfloat16, torch.float32):
        for config, _, _, _, targets in configs.FITS[configs.width(dtype)]:
            sizes = dtype, config, 256, targets
            made.append(_variant(forward._gates_kernel, "gates", *sizes))
            if config.positions in (16, 64):
                made.append(_variant(backward._back_gates_kernel, "back_gates", *sizes, **back))
            if config.positions == 16 or config.columns == 128:
                made.append(_variant(forward._candidate_kernel, "candidate", *sizes, RELU=False))
            if config.positions == 16:
                made.append(_variant(backward._back_candidate_kernel, "back_candidate", *sizes, to_kept_ptr=None))
    return made
