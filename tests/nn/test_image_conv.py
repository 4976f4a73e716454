"""The image convolution's layer against torch's own: words, values, gradients, parametrizations."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fastvid import ops
from fastvid.nn import Conv2d
from fastvid.ops._op import SERVES
from fastvid.testing import assert_within_yardstick

WORDS = [
    {"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding": "same", "bias": False},
    {"kernel_size": 3, "padding": 1, "stride": 2}, {"kernel_size": 1}, {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, {"kernel_size": 3, "padding": 2, "dilation": 2},
]  # fmt: skip


def twins(channels=(24, 32), **words) -> tuple[nn.Conv2d, Conv2d, nn.Conv2d]:
    """torch's layer, ours, and torch's in float64, all with the same weights."""
    theirs, ours = nn.Conv2d(*channels, **words), Conv2d(*channels, **words)
    exact = nn.Conv2d(*channels, **words, dtype=torch.float64)
    assert not ours.load_state_dict(theirs.state_dict()).missing_keys
    exact.load_state_dict(theirs.state_dict())
    return theirs, ours, exact


def outcome(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().to(next(layer.parameters()).dtype).requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    return [y, *torch.autograd.grad((y.double() * weights).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("words", WORDS, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
def test_values_and_gradients_are_torchs(words, layout):
    x = torch.randn(2, 24, 16, 17).contiguous(memory_format=layout)
    theirs, ours, exact = twins(**words)
    for mine, true, peer in zip(outcome(ours, x), outcome(exact, x), outcome(theirs, x), strict=True):
        assert_within_yardstick(mine, true, peer)


def test_the_native_backend_serves_where_it_can():
    theirs, ours, _ = twins((64, 64), kernel_size=3, padding=1)
    x = torch.randn(4, 64, 16, 16)
    native = ops.image_conv.reasons(x.movedim(1, -1), ours.weight, ours.bias).get("cpu") == SERVES
    with ops.served() as record:
        y = ours(x)
    assert record == ({"image_conv": "cpu"} if native else {})
    assert y.is_contiguous(memory_format=torch.channels_last) or not native
    with ops.served() as record, ops.backend("reference"):
        assert torch.equal(ours(x), theirs(x))
    assert not record


def test_the_rest_is_torchs():
    theirs, ours, _ = twins((64, 64), kernel_size=3, padding=1)
    one, x = torch.randn(64, 16, 16), torch.randn(2, 64, 16, 16)
    assert torch.equal(ours(one), theirs(one))
    assert torch.equal(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), theirs(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))
    with pytest.raises(RuntimeError, match="64 channels"):
        ours(x[:, :5])


class Halved(nn.Module):
    """A parametrization that counts how often it is computed."""

    def __init__(self):
        super().__init__()
        self.times = 0

    def forward(self, weight):
        self.times += 1
        return weight / 2


def test_a_parametrized_weight_is_computed_once_a_forward():
    theirs, ours, _ = twins((64, 64), kernel_size=3, padding=1, bias=False)
    halved = Halved()
    parametrize.register_parametrization(ours, "weight", halved, unsafe=True)
    x, before = torch.randn(2, 64, 16, 16), halved.times
    y = ours(x)
    assert halved.times == before + 1
    torch.testing.assert_close(y, theirs(x) / 2, rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert ours.parametrizations.weight.original.grad is not None
