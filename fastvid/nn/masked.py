"""Masked convolutions as PixelCNN code has them, computed over their live taps alone.

Where the usual layer multiplies its kernel by a mask and then computes with the zeros too, these hand the live taps to
fastvid.ops.gated_causal_conv. Inputs are read where they lie; outputs are channels last in memory.
"""

import math

import torch
from torch import Tensor, nn

from fastvid.nn.live_kernel import LiveKernel, each_axis, live_places

Words = int | tuple[int, ...]


class _MaskedConv(nn.Module):
    """What the two public layers share."""

    torch_layer: type[nn.Module]  # whose place they take
    axes: int

    def __init__(
        self, mask_type: str | Tensor, in_channels: int, out_channels: int, kernel_size: Words, stride: Words = 1,
        padding: Words | str = 0, dilation: Words = 1, groups: int = 1, bias: bool = True, padding_mode: str = "zeros",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        who, axes = self._get_name(), self.axes
        self.live_kernel = LiveKernel.of(
            who, axes, mask_type, (out_channels, in_channels), kernel_size, stride, padding, dilation, groups,
            padding_mode,
        )  # fmt: skip
        self.mask_type, self.in_channels, self.out_channels = self.live_kernel.mask_type, in_channels, out_channels
        self.kernel_size, self.stride = self.live_kernel.extent, (1,) * axes
        self.padding = padding if isinstance(padding, str) else each_axis(who, "padding", padding, axes)
        self.dilation = each_axis(who, "dilation", dilation, axes)
        self.groups, self.padding_mode = 1, "zeros"
        shape = (len(self.live_kernel.taps), in_channels, out_channels)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        biases = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", biases)
        self.reset_parameters()

    @classmethod
    def from_dense(cls, layer: nn.Module, mask: Tensor | None = None) -> "_MaskedConv":
        """The layer that does what a dense one with a mask does, holding a copy of its live weights.

        layer:   torch's layer or a subclass. Its dead weights count for nothing, whatever they are.
        mask:    0 and 1, of the weight's shape or broadcasting to it; None: the layer's own `mask`.
        Raises:  TypeError for another layer, ValueError for a mask that is lacking or does not fit, NotImplementedError
                 for one that differs between channels and for words that are not taken.
        """
        where = f"{cls.__name__}.from_dense"
        if not isinstance(layer, cls.torch_layer):
            raise TypeError(f"{where}: wanted nn.{cls.torch_layer.__name__}, got {type(layer).__name__}.")
        mask = getattr(layer, "mask", None) if mask is None else mask
        if not isinstance(mask, Tensor):
            raise ValueError(f"{where}: the layer has no tensor `mask`; pass the mask as the second argument.")
        made = cls(
            mask, layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, layer.bias is not None, layer.padding_mode, device="meta",
        )  # fmt: skip
        weight = made.live_kernel.live(layer.weight.detach()).clone(memory_format=torch.contiguous_format)
        made.weight = nn.Parameter(weight, layer.weight.requires_grad)
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
        return made.train(layer.training)

    def reset_parameters(self) -> None:
        """Fresh parameters: those that torch's layer draws for the same seed, less the dead weights."""
        extent = self.live_kernel.extent
        dense = self.weight.new_empty(self.out_channels, self.in_channels, *extent)
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
        with torch.no_grad():
            self.weight.copy_(self.live_kernel.live(dense))
        if self.bias is not None:
            bound = (self.in_channels * math.prod(extent)) ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """As torch's layer: [B, Cin, H, W] or [B, Cin, T, H, W], or these without B; any memory format.

        Returns: the same axes with Cout channels, a view of memory that is channels last.
        Raises:  ValueError for a shape that does not fit or an input smaller than the kernel.
        """
        return self.live_kernel.convolve(self._get_name(), input, self.weight, self.bias)

    def dense_weight(self) -> Tensor:
        """The weight as torch's layer holds it, [Cout, Cin, *kernel], zero at the dead taps; differentiable."""
        return self.live_kernel.dense(self.weight)

    def extra_repr(self) -> str:
        """Words of the layer, for printing."""
        return (
            f"{self.mask_type!r}, {self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}"
        )

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        shape = (self.out_channels, self.in_channels, *self.live_kernel.extent)
        dense = state_dict.get(f"{prefix}weight")
        if dense is not None and dense.shape == shape:
            state_dict[f"{prefix}weight"] = self.live_kernel.live(dense).contiguous()
        errors += _other_mask(state_dict.pop(f"{prefix}mask", None), self.live_kernel, shape, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


class MaskedConv2d(_MaskedConv):
    """nn.Conv2d that sees only what comes before: the usual masked convolution of PixelCNNs, without its zeros.

    mask_type:   "A" (not the position itself) or "B" (itself included), in raster order y, x; or a tensor of 0 and 1
                 that broadcasts to [Cout, Cin, kh, kw], the same for all channels, whose causality is the caller's.
    in_channels ... dtype: as in nn.Conv2d. The middle of an even kernel is k // 2. With the paddings that causality
                 needs, dilation * (kernel_size // 2), an output lies on its own position.
    Parameters:  weight [live taps, Cin, Cout] and bias [Cout]; a fresh layer is torch's for the same seed.
    State dict:  a dense weight [Cout, Cin, kh, kw] is also loaded, with or without a `mask` beside it, which must be
                 this layer's; dead weights are dropped.
    Raises:      NotImplementedError for stride, groups, padding_mode and a mask that differs between channels;
                 ValueError for words that say nothing.
    Source:      van den Oord et al. 2016, arXiv:1601.06759, section 3.
    """

    torch_layer, axes = nn.Conv2d, 2


class MaskedConv3d(_MaskedConv):
    """nn.Conv3d that sees only what comes before; as MaskedConv2d, over [B, C, T, H, W] in raster order t, y, x.

    Arguments, parameters, state dict, errors and source: as there, with kernels [kt, kh, kw].
    """

    torch_layer, axes = nn.Conv3d, 3


class _DenseMasked:
    """What stands for somebody's masked convolution: its parameters and its mask, the very same tensors."""

    def adopt(self, layer: nn.Module, conv: nn.Module) -> "_DenseMasked":
        """Take over the `mask` of a layer and its plain attributes. conv: what it convolves with, itself or a child.

        Raises: ValueError, NotImplementedError: as MaskedConv2d for the convolution's words and the mask.
        """
        self.live_kernel = LiveKernel.of(
            self._get_name(), len(conv.kernel_size), layer.mask, (conv.out_channels, conv.in_channels),
            conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode,
        )  # fmt: skip
        self.register_buffer("mask", layer.mask, persistent="mask" not in layer._non_persistent_buffers_set)
        self.__dict__.update((name, value) for name, value in vars(layer).items() if name not in vars(self))
        return self

    def convolution(self) -> nn.Module:
        """What holds the weight and the bias."""
        return self

    def forward(self, input: Tensor) -> Tensor:
        """As the layer it stands for, memory format included: channels last where input or weight are."""
        conv = self.convolution()
        weight = self.live_kernel.live(conv.weight)  # [taps, Cin, Cout]
        out = self.live_kernel.convolve(self._get_name(), input, weight, conv.bias)
        # code around the layer may call .view(), and dropout draws in the order of memory
        return out if _channels_last(input) or _channels_last(conv.weight) else out.contiguous()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        shape = self.convolution().weight.shape
        errors += _other_mask(state_dict.get(f"{prefix}mask"), self.live_kernel, shape, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


class _DenseMaskedConv(_DenseMasked):
    @classmethod
    def in_place_of(cls, layer: nn.Module) -> "_DenseMasked":
        """A layer that holds the parameters and the mask of another; errors as in `adopt`."""
        made = cls(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            bias=False, device="meta",
        )  # fmt: skip
        made.weight = layer.weight
        made.register_parameter("bias", layer.bias)
        return made.adopt(layer, layer)


class DenseMaskedConv2d(_DenseMaskedConv, nn.Conv2d):
    """What `fastvid.accelerate` puts in place of a masked nn.Conv2d: dense `weight` and `mask`, live taps computed."""


class DenseMaskedConv3d(_DenseMaskedConv, nn.Conv3d):
    """What `fastvid.accelerate` puts in place of a masked nn.Conv3d: dense `weight` and `mask`, live taps computed."""


class DenseMasked(_DenseMasked, nn.Module):
    """What `fastvid.accelerate` puts in place of a module that masks the one convolution inside it."""

    @classmethod
    def in_place_of(cls, layer: nn.Module) -> "_DenseMasked":
        """A layer that holds the convolution, under its name, and the mask of another; errors as in `adopt`."""
        made = cls()
        ((made.convolution_name, conv),) = layer.named_children()
        made.add_module(made.convolution_name, conv)
        return made.adopt(layer, conv)

    def convolution(self) -> nn.Module:
        """What holds the weight and the bias."""
        return getattr(self, self.convolution_name)


def _channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim]) and not x.is_contiguous()


def _other_mask(mask: Tensor | None, kernel: LiveKernel, shape: tuple[int, ...], prefix: str) -> list[str]:
    """The error, if any, of a state dict's mask that is not the layer's."""
    try:
        same = mask is None or live_places("", mask, shape) == kernel.places
    except (ValueError, NotImplementedError):
        same = False
    wanted = f"mask {kernel.mask_type}" if kernel.mask_type != "own" else "its own mask"
    return [] if same else [
        f"{prefix}mask is of another layer: this one was made with {wanted}, whose taps cannot be changed; "
        "make the layer with the mask that the weights were trained with."
    ]
