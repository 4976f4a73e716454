"""The gated causal convolution as a module, and the taps of a PixelCNN."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvid import ops
from fastvid.nn import GatedCausalConv3d, MaskedConv3d, raster_taps

TAPS = raster_taps((2, 3, 3))
ACTIVATIONS = {
    "gate": lambda pre: torch.tanh(pre.chunk(2, -1)[0]) * torch.sigmoid(pre.chunk(2, -1)[1]),
    "glu": lambda pre: F.glu(pre, -1),
    "none": lambda pre: pre,
}


def test_raster_taps():
    assert raster_taps((1, 3, 3)) == ((0, -1, -1), (0, -1, 0), (0, -1, 1), (0, 0, -1), (0, 0, 0))
    assert raster_taps((1, 3, 3), "A") == raster_taps((1, 3, 3))[:-1]
    assert raster_taps((2, 1, 2), dilation=(3, 1, 2)) == ((-3, 0, -2), (-3, 0, 0), (0, 0, -2), (0, 0, 0))
    assert len(raster_taps((3, 3, 3), "A")) == 13 and len(raster_taps((7, 7, 7))) == 172
    assert raster_taps((1, 1, 1)) == ((0, 0, 0),) and raster_taps((1, 1, 1), "A") == ()
    with pytest.raises(ValueError, match="'A' or 'B', got 'a'"):
        raster_taps((3, 3, 3), "a")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_gated_convolution_is_the_masked_one_and_its_gate(activation, bias):
    width = 5 if activation == "none" else 10
    layer = GatedCausalConv3d(3, 5, TAPS, activation, bias).double()
    masked = MaskedConv3d("B", 3, width, (2, 3, 3), padding=1, bias=bias).double()
    assert layer.weight.shape == (14, 3, width) == masked.weight.shape
    if bias:
        nn.init.normal_(layer.bias)
    masked.load_state_dict(layer.state_dict(), strict=True)
    x, residual = torch.randn(2, 3, 4, 5, 3).double(), torch.randn(2, 3, 4, 5, 5).double()
    addend = torch.randn(width).double().expand(2, 3, 4, 5, width)
    pre = masked(x.movedim(-1, 1))[:, :, :3].movedim(1, -1) + addend  # its padding gives one frame more
    out = layer(x, addend, residual)
    torch.testing.assert_close(out, ACTIVATIONS[activation](pre) + residual)
    both = layer(x, addend=addend, return_pre=True)
    assert isinstance(both, ops.Gated) and both.pre.numel() == (0 if activation == "none" else pre.numel())
    torch.testing.assert_close(both.out, out - residual)
    torch.testing.assert_close(both.pre, pre if both.pre.numel() else both.pre)


def test_the_gated_convolution_learns_and_compiles():
    layer = GatedCausalConv3d(3, 5, TAPS)
    x, residual = torch.randn(1, 2, 3, 4, 3), torch.randn(1, 2, 3, 4, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, residual=residual), layer(x, residual=residual))
    layer(x).square().sum().backward()
    assert all(parameter.grad.ne(0).any() for parameter in layer.parameters())


def test_a_fresh_gated_convolution():
    layer = GatedCausalConv3d(64, 32, TAPS)
    assert layer.weight.var().item() == pytest.approx(1 / (len(TAPS) * 64), rel=0.02) and not layer.bias.any()
    assert [*layer.state_dict()] == ["weight", "bias"]
    assert GatedCausalConv3d(3, 4, TAPS, bias=False).bias is None
    assert repr(layer) == "GatedCausalConv3d(64, 64, taps=14, activation='gate', bias=True)"
    with pytest.raises(ValueError, match="'gate', 'glu' or 'none', got 'relu'"):
        GatedCausalConv3d(3, 4, TAPS, "relu")
    with pytest.raises(ValueError, match="`taps` is empty"):
        GatedCausalConv3d(3, 4, ())
