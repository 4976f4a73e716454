"""The dense convolution that the native kernel computes, against torch's own."""

import pytest
import torch
from torch import nn

import fastvid
from fastvid import ops
from fastvid.nn import Conv3d, ResidualBlock3d
from fastvid.testing import assert_within_yardstick

WORDS = [
    {"kernel_size": 3, "padding": 1}, {"kernel_size": (1, 3, 3), "padding": (0, 1, 1), "bias": False},
    {"kernel_size": 1}, {"kernel_size": (3, 2, 4), "padding": "same"}, {"kernel_size": 3, "padding": 2, "dilation": 2},
]  # fmt: skip


def twins(dtype=torch.float32, **words) -> tuple[nn.Conv3d, Conv3d]:
    theirs = nn.Conv3d(6, 10, **words)
    ours = Conv3d(6, 10, **words)
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype), ours.to(dtype)


def outcome(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().to(next(layer.parameters()).dtype).requires_grad_()
    y = layer(x)
    inputs = [x, *layer.parameters()]
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    return [y, *torch.autograd.grad((y.double() * weights).sum(), inputs)]


@pytest.mark.parametrize("words", WORDS, ids=lambda words: str(words["kernel_size"]))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["ncdhw", "channels-last"])
def test_values_and_gradients_are_torchs(words, layout):
    x = torch.randn(2, 6, 3, 5, 7).contiguous(memory_format=layout)
    theirs, ours = twins(**words)
    exact = nn.Conv3d(6, 10, **words, dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    for mine, true, peer in zip(outcome(ours, x), outcome(exact, x), outcome(theirs, x), strict=True):
        assert_within_yardstick(mine, true, peer)


def test_the_native_backend_serves_where_it_can():
    if reason := fastvid._native.why_not("cpu"):
        pytest.skip(reason)
    theirs, ours = twins(kernel_size=3, padding=1)
    x = torch.randn(2, 6, 3, 5, 7)
    with ops.served() as record:
        assert ours(x).is_contiguous(memory_format=torch.channels_last_3d)
    assert record == {"gated_causal_conv": "cpu"}
    with ops.served() as record, fastvid.backend("reference"):
        assert torch.equal(ours(x), theirs(x))
    assert not record


def test_what_the_kernel_does_not_take_is_torchs():
    theirs, ours = twins(kernel_size=3, padding=1)
    assert torch.equal(ours(torch.ones(6, 3, 4, 5)), theirs(torch.ones(6, 3, 4, 5)))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 6, 2, 3, 4)
    assert torch.equal(compiled(x), theirs(x))
    with pytest.raises(NotImplementedError, match="stride"):
        Conv3d(6, 10, 3, stride=2)


def test_a_residual_block_has_torchs_names():
    assert {*ResidualBlock3d(6, 4).state_dict()} == {f"body.{i}.{name}" for i in (1, 3) for name in ("weight", "bias")}
