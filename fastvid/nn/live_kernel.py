"""A masked kernel as the list of its live taps: what a convolution's words and its mask come to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvid import ops
from fastvid.nn.conv import Tap

Grid = tuple[int, int, int]  # t, y, x
Words = int | Sequence[int]
MASK_TYPES = ("A", "B")


@dataclass(frozen=True)
class LiveKernel:
    """The live taps of a kernel over two or three axes, and the grid that a padded convolution with it puts out.

    places:  of the live taps in the kernel's raster order. taps: the neighbours they read.
    origin:  where in the input the first output lies. shrinks: by how much the output is smaller, per axis.
    """

    extent: tuple[int, ...]  # (kt, kh, kw) or (kh, kw)
    places: tuple[int, ...]
    taps: tuple[Tap, ...]
    origin: Grid
    shrinks: Grid

    @classmethod
    def of(
        cls, who: str, axes: int, mask: str | Tensor, channels: tuple[int, int], kernel_size: Words, stride: Words,
        padding: Words | str, dilation: Words, groups: int, padding_mode: str,
    ) -> "LiveKernel":  # fmt: skip
        """From the words of torch's convolutions and a mask: "A", "B", or 0 and 1 for [Cout, Cin, *kernel].

        who:    the layer, for messages. channels: Cout, Cin.
        Raises: ValueError for words that say nothing; NotImplementedError for those that are not taken.
        """
        taken = {"stride": (1,) * axes, "groups": 1, "padding_mode": "zeros"}
        asked = {"stride": each_axis(who, "stride", stride, axes), "groups": groups, "padding_mode": padding_mode}
        for name, value in asked.items():
            if value != taken[name]:
                raise NotImplementedError(
                    f"{who}: `{name}` is taken only as {taken[name]}, got {value}; keep the dense masked layer."
                )
        if min(channels) < 1:
            raise ValueError(f"{who}: `in_channels` and `out_channels` must be at least 1, got {channels[::-1]}.")
        extent = each_axis(who, "kernel_size", kernel_size, axes, least=1)
        steps = each_axis(who, "dilation", dilation, axes, least=1)
        before, after = _margins(who, padding, extent, steps)
        return cls._laid_out(extent, live_places(who, mask, (*channels, *extent)), before, after, steps)

    @classmethod
    def _laid_out(
        cls, extent: Sequence[int], places: Sequence[int], before: Sequence[int], after: Sequence[int],
        steps: Sequence[int],
    ) -> "LiveKernel":  # fmt: skip
        lacking = 3 - len(extent)
        kernel, d = (1,) * lacking + tuple(extent), (1,) * lacking + tuple(steps)
        left, right = ((0,) * lacking + tuple(margin) for margin in (before, after))
        _, kh, kw = kernel
        spots = [(place // (kh * kw), place // kw % kh, place % kw) for place in places]
        # offsets count from the middle; in time from the last live frame if that is later, as the op knows no later one
        middle = (max([kernel[0] // 2, *(spot[0] for spot in spots)]), kh // 2, kw // 2)
        taps = tuple(tuple((spot[i] - middle[i]) * d[i] for i in range(3)) for spot in spots)
        origin = tuple(middle[i] * d[i] - left[i] for i in range(3))
        shrinks = tuple((kernel[i] - 1) * d[i] - left[i] - right[i] for i in range(3))
        return cls(tuple(extent), tuple(places), taps, origin, shrinks)

    @property
    def mask_type(self) -> str:
        """Mask "A", mask "B", or "own" for every other one."""
        return next((name for name in MASK_TYPES if self.places == raster_places(self.extent, name)), "own")

    def live(self, dense: Tensor) -> Tensor:
        """The weights of the live taps. [Cout, Cin, *kernel] -> [taps, Cin, Cout], a view if they follow each other."""
        flat = dense.flatten(2)
        starts = [place for place in self.places if place - 1 not in self.places]
        ends = [place + 1 for place in self.places if place + 1 not in self.places]
        runs = [flat[:, :, start:end] for start, end in zip(starts, ends, strict=True)]
        return (runs[0] if len(runs) == 1 else torch.cat(runs, dim=2)).permute(2, 1, 0)

    def dense(self, weight: Tensor) -> Tensor:
        """The way back, zero at the dead taps. [taps, Cin, Cout] -> [Cout, Cin, *kernel]."""
        alive = dict(zip(self.places, weight.unbind(), strict=True))
        zero = weight.new_zeros(weight.shape[1:])
        slices = [alive.get(place, zero) for place in range(math.prod(self.extent))]
        return torch.stack(slices, dim=2).transpose(0, 1).unflatten(2, self.extent).contiguous()

    def convolve(
        self, who: str, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None = None
    ) -> Tensor:
        """[B, Cin, *grid] or [Cin, *grid] -> the same axes, channels last in memory. weight: [taps, Cin, Cout]."""
        axes, Cin = len(self.extent), weight.shape[1]
        if x.ndim not in (axes + 1, axes + 2) or x.shape[-axes - 1] != Cin:
            grid = "[B, C, T, H, W] or [C, T, H, W]" if axes == 3 else "[B, C, H, W] or [C, H, W]"
            raise ValueError(f"{who}: the input must be {grid} with C = {Cin}, got {list(x.shape)}.")
        batch = x if x.ndim == axes + 2 else x[None]
        batch = batch.movedim(1, -1)  # [B, *grid, Cin]
        batch = batch if axes == 3 else batch[:, None]
        size = [n - shrink for n, shrink in zip(batch.shape[1:4], self.shrinks, strict=True)]
        if min(size) < 1:
            raise ValueError(
                f"{who}: the padded input is smaller than the kernel {self.extent} with its dilation: "
                f"{list(x.shape[-axes:])} gives an output of {size[-axes:]}."
            )
        out = ops.causal_conv(batch, weight, bias, self.taps, origin=self.origin, size=size, backend=backend)
        out = (out if axes == 3 else out[:, 0]).movedim(-1, 1)
        return out if x.ndim == axes + 2 else out[0]


def raster_taps(
    kernel: tuple[int, int, int], mask_type: str = "B", dilation: tuple[int, int, int] = (1, 1, 1)
) -> tuple[Tap, ...]:
    """Live taps of a PixelCNN's masked kernel: those before its middle in raster order, t slowest.

    kernel, dilation: extents and spacing over (t, y, x); the middle of an extent k is k // 2.
    mask_type:        "A" leaves out the middle itself, "B" has it.
    Returns:          (dt, dy, dx) in raster order.
    Raises:           ValueError for another mask type.
    Source:           van den Oord et al. 2016, arXiv:1601.06759, section 3.
    """
    if mask_type not in MASK_TYPES:
        raise ValueError(f"raster_taps: `mask_type` must be 'A' or 'B', got {mask_type!r}.")
    return LiveKernel._laid_out(kernel, raster_places(kernel, mask_type), (0,) * 3, (0,) * 3, dilation).taps


def raster_places(extent: Sequence[int], mask_type: str) -> tuple[int, ...]:
    """Where in a kernel, in its raster order, the live taps of mask "A" or "B" are: all before its middle."""
    middle = 0
    for k in extent:
        middle = middle * k + k // 2
    return tuple(range(middle + (mask_type == "B")))


def live_places(who: str, mask: str | Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The same for any mask. shape: of the dense weight, [Cout, Cin, *kernel], which a tensor must broadcast to.

    Raises: ValueError for what is no mask of 0 and 1 of this shape, or has no 1; NotImplementedError if it is not the
            same for all channels.
    """
    if isinstance(mask, str):
        if mask not in MASK_TYPES:
            raise ValueError(f"{who}: the mask must be 'A', 'B' or a tensor of 0 and 1, got {mask!r}.")
        places = raster_places(shape[2:], mask)
    else:
        flat = _broadcast(who, mask, shape).flatten(0, 1).flatten(1) != 0  # [Cout * Cin, K]
        if (flat != flat[:1]).any():
            raise NotImplementedError(
                f"{who}: the mask differs between channels, as for pixels whose colours follow each other; such masks "
                "are not taken, keep the dense masked layer."
            )
        places = tuple(flat[0].nonzero().flatten().tolist())
    if not places:
        raise ValueError(f"{who}: the mask leaves no tap of the kernel {tuple(shape[2:])}; take a larger one.")
    return places


def _broadcast(who: str, mask: Tensor, shape: Sequence[int]) -> Tensor:
    try:
        whole = mask.detach().broadcast_to(shape)
    except RuntimeError:
        whole = None
    if whole is None or not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"{who}: the mask must be 0 and 1 and broadcast to the weight {list(shape)}, got {list(mask.shape)} "
            f"{str(mask.dtype)[6:]}."
        )
    return whole


def each_axis(who: str, name: str, value: Words, axes: int, least: int = 0) -> tuple[int, ...]:
    """A word of torch's convolutions as one number for each axis."""
    whole = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(whole) != axes or any(not isinstance(n, int) or n < least for n in whole):
        raise ValueError(f"{who}: `{name}` must be an integer of at least {least}, or {axes} of them, got {value!r}.")
    return whole


def _margins(who: str, padding: Words | str, extent: Sequence[int], steps: Sequence[int]) -> tuple[Sequence[int], ...]:
    """Zeros before and after the input along each axis."""
    if padding == "same":
        both = [(k - 1) * d for k, d in zip(extent, steps, strict=True)]
        return [n // 2 for n in both], [n - n // 2 for n in both]
    if isinstance(padding, str) and padding != "valid":
        raise ValueError(f"{who}: `padding` must be integers, 'same' or 'valid', got {padding!r}.")
    margin = each_axis(who, "padding", 0 if padding == "valid" else padding, len(extent))
    return margin, margin
