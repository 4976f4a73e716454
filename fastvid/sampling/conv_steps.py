"""Masked convolutions a position at a time, and models made of them without a line changed.

A convolution keeps the plane of its inputs. When a row starts, the taps in earlier rows and frames are summed for the
whole row in one product, as all of them are known; what is left per position are the live taps of the row itself.
No product's rounding depends on the other samples, so that a sample's codes do not depend on its neighbours.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastvid import ops
from fastvid.sampling.steps import Position, before, refuse_training

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
NORMS = {nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}  # axes of the grid


class ConvCache:
    """A masked convolution at one position after another, in raster order, over live taps only.

    conv:    nn.Conv1d, nn.Conv2d or nn.Conv3d of stride 1; its weights are read once, here.
    batch:   B. shape: T, H, W; the axes of a 1-D or 2-D convolution are the last ones.
    mask:    broadcasts to the weight, 0 where a tap is dead; by default the module's own `mask`, or else none.
    padding: zeros before the first position along each axis of the convolution; by default the module's own.
    Raises:  ValueError for a tap that raster order has not reached, or an option that has no cached form.
    Source:  van den Oord et al. 2016, arXiv:1601.06759, for masks A and B; Ramachandran et al. 2017, arXiv:1704.06001,
             for the caches.
    """

    def __init__(
        self,
        conv: Conv,
        batch: int,
        shape: Position,
        *,
        mask: Tensor | None = None,
        padding: tuple[int, ...] | None = None,
    ):
        _refuse_options(conv)
        self.batch, self.shape = batch, shape
        weight, taps = _taps(conv, mask, padding)
        self.sees_itself, self.pointwise = (0, 0, 0) in taps, set(taps) == {(0, 0, 0)}
        here = sorted(tap for tap in taps if tap[:2] == (0, 0))
        above = sorted(set(taps) - set(here))
        self.above = above
        self.above_weight = torch.stack([weight[(..., *taps[tap])].t() for tap in above]) if above else None
        # between its outermost live taps the row is read as one run of columns, dead ones with zero weight
        self.dilation = conv.dilation[-1]
        self.columns = range(here[0][2], here[-1][2] + 1, self.dilation) if here else range(0)
        self.weight = self._stacked(weight, [taps.get((0, 0, dx)) for dx in self.columns])
        self.bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        reach = list(zip(*taps, strict=True)) if taps else [(0,)] * 3
        self.first = tuple(max(0, -min(axis)) for axis in reach)  # the border in front of each axis
        sizes = [n + front + max(0, max(axis)) for n, front, axis in zip(shape, self.first, reach, strict=True)]
        self.plane = weight.new_zeros(batch, *sizes, conv.in_channels)
        self.row: tuple[int, int] | None = None

    def step(self, x: Tensor, position: Position) -> Tensor:
        """Input in, output out. [B, Cin] -> [B, Cout] at (t, y, x).

        `x` is the input at this position. A convolution that does not see its own position (mask A, on the codes) gets
        the input at the one before: the last that is known. What it is given at (0, 0, 0) is not looked at.
        """
        if self.pointwise:
            return torch.baddbmm(self.bias, x.unsqueeze(1), self.weight).squeeze(1)
        where = position if self.sees_itself else before(position, self.shape)
        if where is not None:
            self.put(x, where)
        return self.at(position)

    def put(self, x: Tensor, position: Position) -> None:
        """Record the input [B, Cin] at a position."""
        t, y, column = position
        if self.row == (t, y):
            self.inputs[column].copy_(x)
        else:
            self.plane[:, t + self.first[0], y + self.first[1], column + self.first[2]] = x

    def at(self, position: Position) -> Tensor:
        """Output [B, Cout] at a position, all inputs that it sees having been put."""
        t, y, x = position
        if self.row != (t, y):
            self._start_row(t, y)
        base = self.base[x]  # [B, 1, Cout]
        if self.columns:
            base = torch.baddbmm(base, self.runs[x].flatten(2), self.weight)
        return base.squeeze(1)

    def _start_row(self, t: int, y: int) -> None:
        """The bias and all that earlier rows and frames add, for every position of a row; a view per position."""
        self.row, W = (t, y), self.shape[2]
        t, y, x = t + self.first[0], y + self.first[1], self.first[2]
        base = self.bias.expand(self.batch, W, -1)
        if self.above:
            base = ops.causal_conv(
                self.plane, self.above_weight, self.bias, self.above, origin=(t, y, x), size=(1, 1, W)
            )[:, 0, 0]  # [B, W, Cout]
        # views made once a row are cheaper than slices made once a position
        self.base, self.inputs = base.unsqueeze(2).unbind(1), self.plane[:, t, y, x : x + W].unbind(1)
        if self.columns:
            line = self.plane[:, t, y, x + self.columns[0] :]  # [B, columns, Cin]
            taps, C = len(self.columns), line.shape[2]
            runs = line.as_strided((self.batch, W, 1, taps, C), (line.stride(0), C, C, self.dilation * C, 1))
            # adjacent columns lie in one run, which needs no copy
            self.runs = (runs.flatten(3) if self.dilation == 1 else runs).unbind(1)

    def _stacked(self, weight: Tensor, taps: list[tuple | None]) -> Tensor:
        """The weights of some taps, one below the other. -> [B, taps * Cin, Cout], one copy in memory."""
        dead = weight.new_zeros(weight.shape[:2])
        parts = [(dead if tap is None else weight[(..., *tap)]).t() for tap in taps]
        return torch.cat(parts).expand(self.batch, -1, -1) if parts else dead


class ConvSteps:
    """A StepwiseModel out of a module in which only convolutions look sideways, as it is: no line of it changes.

    A step runs the module's own forward on a grid of one position, while each of its convolutions answers from a
    ConvCache. Those that do not see their own position (mask A) are taken for the ones that read the codes. Attention,
    pooling, norms over positions and padding outside of a convolution ask for a `step` by hand; `check_steps` tells.

    module:  in eval mode; every cache has a copy of it that shares its weights.
    logits:  (module, codes [B, T, H, W] int64, **conditioning) -> logits [B, T, H, W, K]; T = H = W = 1 in a step.
    Raises:  ValueError for a convolution that ConvCache refuses, with its name.
    """

    def __init__(self, module: nn.Module, logits: Callable[..., Tensor]):
        self.module, self.logits = module, logits

    def forward(self, codes: Tensor, **conditioning: Any) -> Tensor:
        """The module's logits of a whole grid, for `check_steps` and ForwardSteps. [B, T, H, W] -> [B, T, H, W, K]."""
        return self.logits(self.module, codes, **conditioning)

    def new_cache(self, batch: int, shape: Position, **conditioning: Any) -> "_Steps":
        """Caches of all convolutions for one batch."""
        refuse_training("ConvSteps", self.module)
        return _Steps(self.module, batch, shape, partial(self.logits, **conditioning))

    def step(self, cache: "_Steps", codes: Tensor | None, position: Position) -> Tensor:
        """Logits [B, K] at a position."""
        return cache.step(codes, position)


class _Steps:
    """A copy of a module that shares its weights; its convolutions take one position at a time."""

    def __init__(self, module: nn.Module, batch: int, shape: Position, logits: Callable[..., Tensor]):
        tensors = [*module.parameters(), *module.buffers()]
        self.nothing = torch.zeros(batch, dtype=torch.int64, device=tensors[0].device)
        logits(module, self.nothing.view(-1, 1, 1, 1))  # some modules mask their weights in their first forward
        self.module = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
        self.logits, self.position, self.unasked = logits, (0, 0, 0), set()
        for name, part in self.module.named_modules():
            if isinstance(part, Conv):
                self._take(name, part, batch, shape)
            elif type(part) in NORMS and part.track_running_stats:
                part.forward = _frozen(part, NORMS[type(part)])

    def step(self, codes: Tensor | None, position: Position) -> Tensor:
        self.position = position
        codes = self.nothing if codes is None else codes
        logits = self.logits(self.module, codes.view(-1, 1, 1, 1)).flatten(0, 3)
        if self.unasked:
            raise ValueError(f"ConvSteps: {sorted(self.unasked)} convolve in their own way; write a `step` by hand.")
        return logits

    def _take(self, name: str, conv: Conv, batch: int, shape: Position) -> None:
        try:
            cache = ConvCache(conv, batch, shape)
        except ValueError as error:
            raise ValueError(f"ConvSteps: `{name}`: {error}") from None
        if _only_convolves(conv):
            conv.forward = partial(self._convolve, name, cache)
        else:  # what its own forward does besides is kept
            conv._conv_forward = lambda x, weight, bias: self._convolve(name, cache, x)
            self.unasked.add(name)

    def _convolve(self, name: str, cache: ConvCache, x: Tensor) -> Tensor:
        self.unasked.discard(name)
        if x.shape[2:].numel() != 1:
            raise ValueError(
                f"ConvSteps: `{name}` must be given the one position of a step, got {list(x.shape)}; write a `step` "
                "by hand."
            )
        return cache.step(x.flatten(1), self.position).view(x.shape[0], -1, *x.shape[2:])


def _only_convolves(conv: Conv) -> bool:
    """Whether a convolution's own forward, which a subclass may have written, is that of its masked weight."""
    sizes = [d * (k - 1) + 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    x = torch.arange(conv.in_channels * math.prod(sizes)).sin().view(1, -1, *sizes).to(conv.weight)
    try:
        return torch.allclose(conv(x), conv._conv_forward(x, _masked(conv)[0], conv.bias), rtol=1e-4, atol=1e-5)
    except TypeError:  # it wants more than one argument
        return False


def _frozen(norm: nn.BatchNorm2d | nn.BatchNorm3d, axes: int) -> Callable[[Tensor], Tensor]:
    """A batch norm in eval mode as one multiply-add: for one position the op itself takes longer than a convolution."""
    scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    shift = (0 if norm.bias is None else norm.bias) - norm.running_mean * scale
    scale, shift = (values.detach().view(-1, *[1] * axes) for values in (scale, shift))
    return lambda x: torch.addcmul(shift, x, scale)


def _refuse_options(conv: Conv) -> None:
    if any(n != 1 for n in conv.stride) or conv.groups != 1 or conv.padding_mode != "zeros":
        raise ValueError(
            "ConvCache: `conv` must have stride 1, one group and zero padding, got "
            f"stride {conv.stride}, groups {conv.groups}, padding_mode {conv.padding_mode!r}."
        )


def _masked(conv: Conv, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The weight as the forward uses it, and where it may be other than zero."""
    mask = getattr(conv, "mask", None) if mask is None else mask
    weight = conv.weight.detach()
    # a live tap is one that the mask lets through, even where training left it at zero
    return (weight, weight != 0) if mask is None else (weight * mask, (mask != 0).expand_as(weight))


def _taps(conv: Conv, mask: Tensor | None, padding: tuple[int, ...] | None) -> tuple[Tensor, dict[Position, Position]]:
    """The masked weight [Cout, Cin, kt, kh, kw], and where in it each live tap (dt, dy, dx) is."""
    weight, alive = _masked(conv, mask)
    padding = _padding(conv) if padding is None else padding
    missing = 5 - weight.ndim
    weight = weight.reshape(*weight.shape[:2], *[1] * missing, *weight.shape[2:])
    dilation, padding = (*[1] * missing, *conv.dilation), (*[0] * missing, *padding)
    taps = {}
    for index in alive.reshape(weight.shape).any(dim=1).any(dim=0).nonzero().tolist():
        taps[tuple(i * d - p for i, d, p in zip(index, dilation, padding, strict=True))] = tuple(index)
    ahead = [tap for tap in taps if tap > (0, 0, 0)]
    if ahead:
        raise ValueError(
            f"ConvCache: `conv` must not see later positions, but has a tap at (dt, dy, dx) = {min(ahead)}; mask it, "
            "or run the module once before if that masks it."
        )
    return weight, taps


def _padding(conv: Conv) -> tuple[int, ...]:
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return (0,) * len(conv.kernel_size) if conv.padding == "valid" else conv.padding
