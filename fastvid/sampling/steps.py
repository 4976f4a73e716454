"""One loop that samples any causal model step by step: what it asks of a model, and how to check a model for it.

A model that can name the logits of the next code from a cache and the code before it takes part, whatever is inside:
convolutions, attention, recurrence. Grids are [T, H, W]; an image is (1, H, W), a sequence (1, 1, N). The noise is that
of every other sampler here, so a model's codes do not depend on how they were computed.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastvid import ops
from fastvid.nn import GatedPixelStack
from fastvid.ops import Progress
from fastvid.sampling.gated import pack_stack
from fastvid.sampling.noise import Noise

Position = tuple[int, int, int]  # t, y, x

Forward = Callable[..., Tensor]  # codes [B, T, H, W], **conditioning -> logits [B, T, H, W, K] of all positions


class StepwiseModel(Protocol):
    """What `sample_steps` asks of a model: caches are its own affair, any object will do.

    new_cache: (batch, (T, H, W), **conditioning) -> cache of a fresh batch; whatever the steps need travels in it.
    step:      (cache, codes, position) -> logits [B, K] of the codes at position (t, y, x). Positions come in raster
               order, x fastest; codes [B] int64 are those of the position before, None at (0, 0, 0).
    """

    def new_cache(self, batch: int, shape: Position, **conditioning: Any) -> Any: ...

    def step(self, cache: Any, codes: Tensor | None, position: Position) -> Tensor: ...


@torch.no_grad()
def sample_steps(
    model: StepwiseModel,
    shape: Position,
    noise: Noise,
    temperature: float = 1.0,
    *,
    given: Tensor | None = None,
    progress: Progress | None = None,
    **conditioning: Any,
) -> Tensor:
    """Codes of a grid, drawn one after another from a model's steps.

    shape:        T, H, W. Noise is made a row at a time, [B, W, K]: (1, N, 1) asks less memory of a long sequence.
    noise:        Noise; one batch row per sample. temperature: > 0; 1 samples the model's own distribution.
    given:        [B, T, H, W] int64: codes >= 0 stand, -1 is drawn. progress: told 1 after every position.
    conditioning: handed to `model.new_cache`.
    Returns:      [B, T, H, W] int64 in [0, K), on the device of the logits.
    Raises:       ValueError for a shape, a temperature, given codes or logits that do not fit, or a model whose dropout
                  or batch norm is in training mode.
    """
    B, W = len(noise.samples), _sizes("sample_steps", shape)[2]
    refuse_training("sample_steps", model)
    if given is not None and (given.shape != (B, *shape) or given.dtype != torch.int64):
        raise ValueError(
            f"sample_steps: `given` must be {[B, *shape]} int64 with -1 where a code is to be drawn, "
            f"got {list(given.shape)} {given.dtype}."
        )
    cache, codes, drawn = model.new_cache(B, shape, **conditioning), None, []
    for t, y, x in raster(shape):
        logits = model.step(cache, codes, (t, y, x))
        if x == 0:
            _fits("sample_steps", logits, B, (t, y, x))
            K, device = logits.shape[1], logits.device
            gumbel = noise.row(t, y, W, K, device)  # [B, W, K]
            told = None if given is None else _row_of(given, t, y, K, device)  # [B, W]
        codes = ops.draw(logits, gumbel[:, x], temperature)  # [B]
        if told is not None:
            codes = torch.where(told[:, x] >= 0, told[:, x], codes)
        drawn.append(codes)
        if progress:
            progress(1)
    return torch.stack(drawn, dim=1).view(B, *shape)


class ForwardSteps:
    """A causal forward as a StepwiseModel, the whole of it run again for every code: the definition of sampling, slow.

    forward: codes [B, T, H, W] int64, **conditioning -> logits [B, T, H, W, K]. device: where it wants its codes.
    """

    def __init__(self, forward: Forward, device: torch.device | str = "cpu"):
        self.forward, self.device = forward, device

    def new_cache(self, batch: int, shape: Position, **conditioning: Any) -> tuple[Tensor, dict]:
        """Codes so far, zeros where there are none yet, and the conditioning."""
        return torch.zeros(batch, *shape, dtype=torch.int64, device=self.device), conditioning

    def step(self, cache: tuple[Tensor, dict], codes: Tensor | None, position: Position) -> Tensor:
        """Logits [B, K] at a position, from a whole forward."""
        grid, conditioning = cache
        if codes is not None:
            grid[(slice(None), *before(position, grid.shape[1:]))] = codes
        return self.forward(grid, **conditioning)[(slice(None), *position)]


class StackSteps:
    """A GatedPixelStack as a StepwiseModel, over the caches of the torch sampler; `sample` is its fast way.

    new_cache: takes `condition`, [B, T, H, W, condition_channels].
    """

    def __init__(self, stack: GatedPixelStack):
        self.stack = stack

    def new_cache(self, batch: int, shape: Position, condition: Tensor) -> Any:
        """Caches of one batch, on the device of the condition."""
        return ops.pixelcnn_session(*pack_stack(self.stack, "float32"), condition.float().contiguous())

    def step(self, cache: Any, codes: Tensor | None, position: Position) -> Tensor:
        """Logits [B, K] at a position."""
        if codes is not None:
            cache.job.codes[(slice(None), *before(position, cache.job.grid[1:]))] = codes
        return cache.logits(*position)


@torch.no_grad()
def check_steps(
    model: StepwiseModel,
    forward: Forward,
    shape: Position,
    *,
    batch: int = 2,
    tolerance: float = 1e-4,
    probes: int = 16,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **conditioning: Any,
) -> None:
    """Hold a model to the two laws of sampling: stacked steps equal the forward, and the future never touches the past.

    model:     what `sample_steps` would be given. forward: the whole of it, as in ForwardSteps.
    shape:     T, H, W; a few positions more along every axis than the model looks back find the most.
    tolerance: largest error, as a part of the largest logit; 1e-4 suits float32. probes: how many positions are asked
               whether their future matters. device: where the codes are to be.
    conditioning: for `batch` samples, handed to `new_cache` and `forward`.
    Raises:    AssertionError whose one line says what broke at which position; ValueError for sizes that do not fit.
    """
    _sizes("check_steps", shape)
    refuse_training("check_steps", model)
    blank = torch.zeros(batch, *shape, dtype=torch.int64, device=device)
    logits = forward(blank, **conditioning)
    if logits.ndim != 5 or logits.shape[:4] != blank.shape:
        raise ValueError(f"check_steps: `forward` must give {[*blank.shape, 'K']}, got {list(logits.shape)}.")
    chance = torch.Generator().manual_seed(seed)

    def random_codes() -> Tensor:
        return torch.randint(logits.shape[-1], blank.shape, generator=chance).to(device)

    codes, others = random_codes(), random_codes()
    wanted = [forward(codes, **conditioning), forward(others, **conditioning)]
    sizes = torch.stack(wanted).abs()
    allowed = tolerance * float(sizes[sizes.isfinite()].max()) if sizes.isfinite().any() else 0.0
    _past_is_safe(lambda grid: forward(grid, **conditioning), codes, others, allowed, probes)
    for (stepped,), position in _stepped(model, [codes], conditioning):
        error = _apart(stepped, wanted[0], position, batch)
        if not error <= allowed:  # written so that NaN fails
            raise AssertionError(
                f"check_steps: the steps leave the forward at (t, y, x) = {position}, by {error:.3g} where "
                f"{allowed:.3g} is allowed; all earlier positions agree."
            )
    for pair, position in _stepped(model, [codes, others], conditioning):
        if not max(_apart(a, b, position, batch) for a, b in zip(pair, wanted, strict=True)) <= allowed:
            raise AssertionError(
                f"check_steps: two batches stepped in turns disturb each other at (t, y, x) = {position}: the model "
                "keeps something outside its cache."
            )


def raster(shape: Position) -> Iterator[Position]:
    """Every position of a grid in the order of drawing: t slowest, x fastest."""
    T, H, W = shape
    return ((t, y, x) for t in range(T) for y in range(H) for x in range(W))


def before(position: Position, shape: Position) -> Position | None:
    """The position drawn just before this one, None for the first."""
    (t, y, x), (_, H, W) = position, shape
    n = (t * H + y) * W + x - 1
    return None if n < 0 else (n // (H * W), n // W % H, n % W)


def refuse_training(caller: str, model: Any) -> None:
    """ValueError for a module whose forward would not be the same function every time."""
    fickle = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if module.training and isinstance(module, fickle) and getattr(module, "p", 1) > 0:
            what = f"{type(module).__name__} `{name}`"
            raise ValueError(f"{caller}: {what} is in training mode, where logits vary by call; call .eval().")


def _past_is_safe(forward: Forward, codes: Tensor, others: Tensor, allowed: float, probes: int) -> None:
    """Replaces everything from a position on, and looks whether logits up to it notice."""
    N = codes[0].numel()
    base = forward(codes).flatten(1, 3)  # [B, N, K]

    def change(first: int) -> Tensor:
        """How far the logits of every position move when the codes from `first` on do. -> [N]"""
        mixed = torch.cat([codes.flatten(1)[:, :first], others.flatten(1)[:, first:]], dim=1).view_as(codes)
        return _difference(forward(mixed).flatten(1, 3), base).amax(dim=(0, 2))

    for first in sorted({round(i * (N - 1) / max(1, probes - 1)) for i in range(probes)}):
        moved = change(first)[: first + 1]
        if not moved.max() <= allowed:
            _name_the_leak(change, int(moved.argmax()), first, N, allowed, codes.shape[1:])


def _name_the_leak(change: Callable, at: int, first: int, N: int, allowed: float, shape: Position) -> None:
    """Halves the span of codes until the last one that the logits at `at` notice is left."""
    end = N  # change(first) moves the logits, change(end) cannot
    error = float(change(first)[at])
    while end - first > 1:
        middle = (first + end) // 2
        first, end = (first, middle) if change(middle)[at] <= allowed else (middle, end)
    there, culprit = (next(p for i, p in enumerate(raster(shape)) if i == n) for n in (at, first))
    raise AssertionError(
        f"check_steps: the forward sees the future: logits at (t, y, x) = {there} move by {error:.3g} with the code at "
        f"{culprit}, which is not known there."
    )


def _stepped(model: StepwiseModel, grids: list[Tensor], conditioning: dict) -> Iterator[tuple[list[Tensor], Position]]:
    """Logits of every position in raster order, the grids stepped in turns, each with a cache of its own."""
    B, *shape = grids[0].shape
    caches = [model.new_cache(B, tuple(shape), **conditioning) for _ in grids]
    for position in raster(shape):
        previous = before(position, shape)
        told = [None if previous is None else grid[(slice(None), *previous)] for grid in grids]
        yield [model.step(cache, codes, position) for cache, codes in zip(caches, told, strict=True)], position


def _apart(stepped: Tensor, wanted: Tensor, position: Position, batch: int) -> float:
    _fits("check_steps", stepped, batch, position)
    wanted = wanted[(slice(None), *position)]
    if stepped.shape != wanted.shape:
        raise ValueError(f"check_steps: `model.step` must give {list(wanted.shape)}, got {list(stepped.shape)}.")
    return float(_difference(stepped, wanted).max())


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|, with the infinities that rule a code out equal to themselves."""
    return torch.where(a == b, 0.0, (a - b).abs())


def _sizes(caller: str, shape: Position) -> Position:
    if len(shape) != 3 or not all(n > 0 for n in shape):
        raise ValueError(f"{caller}: `shape` must be three positive sizes (T, H, W), got {tuple(shape)}.")
    return shape


def _fits(caller: str, logits: Tensor, batch: int, position: Position) -> None:
    if logits.ndim != 2 or logits.shape[0] != batch or not logits.is_floating_point():
        raise ValueError(
            f"{caller}: `model.step` must give floating logits [{batch}, K], got {list(logits.shape)} {logits.dtype} "
            f"at (t, y, x) = {position}."
        )


def _row_of(given: Tensor, t: int, y: int, classes: int, device: torch.device) -> Tensor:
    row = given[:, t, y]
    if row.min() < -1 or row.max() >= classes:
        raise ValueError(
            f"sample_steps: `given` must hold codes in [0, {classes}) or -1, got {int(row.min())} to {int(row.max())} "
            f"in row (t, y) = {t, y}."
        )
    return row.to(device)
