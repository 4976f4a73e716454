"""Masked gated convolutions as torch has them: a dense convolution whose weight is multiplied by a mask, then the gate.

The dense kernel spans what the taps span, made odd and centred in space as the usual layers have it; in time it ends at
the present frame, and the input is padded in front.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid import ops
from fastvid.nn import GatedCausalConv3d

Tap = tuple[int, int, int]
FORMATS = {"ncdhw": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}


class Kernel:
    """Where the taps stand in a dense kernel [Cout, Cin, kt, kh, kw], and the padding that goes with it."""

    def __init__(self, taps: tuple[Tap, ...]):
        reach = [max(abs(tap[axis]) for tap in taps) for axis in range(3)]
        self.extent = (reach[0] + 1, 2 * reach[1] + 1, 2 * reach[2] + 1)
        self.places = tuple(torch.tensor([tap[axis] + reach[axis] for tap in taps]) for axis in range(3))
        self.before, self.padding = reach[0], (0, reach[1], reach[2])

    def dense(self, weight: Tensor) -> Tensor:
        """[taps, Cin, Cout] -> [Cout, Cin, kt, kh, kw] with zeros elsewhere."""
        dense = weight.new_zeros(*self.extent, *weight.shape[1:])
        dense[self.places] = weight
        return dense.permute(4, 3, 0, 1, 2)

    def live(self, dense: Tensor) -> Tensor:
        """[Cout, Cin, kt, kh, kw] -> [taps, Cin, Cout]: what stands at the taps."""
        return dense.permute(2, 3, 4, 1, 0)[self.places]

    def mask(self, weight: Tensor) -> Tensor:
        """1 at the taps, 0 elsewhere. -> [1, 1, kt, kh, kw] in the weight's dtype and on its device."""
        mask = weight.new_zeros(self.extent)
        mask[self.places] = 1
        return mask[None, None]

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [B, Cin, T, H, W], weight as `dense` gives it -> [B, Cout, T, H, W]."""
        padded = F.pad(x, (0, 0, 0, 0, self.before, 0)) if self.before else x
        return F.conv3d(padded, weight, bias, padding=self.padding)


def chunk_gate(pre: Tensor, axis: int = 1) -> Tensor:
    """tanh(a) * sigmoid(b), a and b the halves of an axis."""
    a, b = pre.chunk(2, dim=axis)
    return torch.tanh(a) * torch.sigmoid(b)


class DenseConv(nn.Module):
    """Takes the place of a GatedCausalConv3d inside a model: same words and values, by a masked dense convolution."""

    def __init__(self, layer: GatedCausalConv3d, layout: str):
        super().__init__()
        self.kernel, self.format, self.activation = Kernel(layer.taps), FORMATS[layout], layer.activation
        dense = self.kernel.dense(layer.weight.detach()).contiguous(memory_format=self.format)
        self.weight, self.bias = nn.Parameter(dense), nn.Parameter(layer.bias.detach().clone())
        self.register_buffer("mask", self.kernel.mask(dense))

    def forward(
        self, x: Tensor, addend: Tensor | None = None, residual: Tensor | None = None, return_pre: bool = False
    ) -> Tensor | ops.Gated:
        """As GatedCausalConv3d.forward."""
        x = x.movedim(-1, 1).contiguous(memory_format=self.format)
        pre = self.kernel.convolve(x, self.weight * self.mask, self.bias).movedim(1, -1)
        pre = pre if addend is None else pre + addend
        out = pre if self.activation == "none" else chunk_gate(pre, axis=-1)
        out = out if residual is None else residual + out
        return ops.Gated(out, pre) if return_pre else out


def densify_(model: nn.Module, layout: str) -> nn.Module:
    """Puts a DenseConv in place of every gated causal convolution of a model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, GatedCausalConv3d):
                setattr(parent, name, DenseConv(child, layout))
    return model


def live_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Parameter's name -> gradient; of a dense convolution's weight as the live taps have it."""
    kernels = {f"{name}.weight": module.kernel for name, module in model.named_modules()
               if isinstance(module, DenseConv)}  # fmt: skip
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: kernels[name].live(grad) if name in kernels else grad for name, grad in found.items()}
