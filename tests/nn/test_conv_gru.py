"""The convolutional GRU as a module: against its equations, causal, and with weights that others make."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fastvid import ops
from fastvid.nn import ConvGRU

ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


def textbook(layer, x, h):
    """Every product on [x; h], frame after frame. -> [B, C, T, H, W]"""
    states = []
    for frame in x.unbind(2):
        both = torch.cat([frame, h], dim=1)
        r, u = layer.reset(both).sigmoid(), layer.update(both).sigmoid()
        c = ACTIVATIONS[layer.activation](layer.candidate(torch.cat([frame, r * h], dim=1)))
        h = u * h + (1 - u) * c
        states.append(h)
    return torch.stack(states, dim=2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel, bias", [(3, True), (5, False), (1, True)])
def test_equals_the_textbook(activation, kernel, bias):
    layer = ConvGRU(3, 4, kernel, activation, bias, dtype=torch.float64)
    x, h = torch.randn(2, 3, 4, 5, 6).double(), torch.randn(2, 4, 5, 6).double()
    torch.testing.assert_close(layer(x, h), textbook(layer, x, h))
    torch.testing.assert_close(layer(x), textbook(layer, x, torch.zeros_like(h)))
    first = x[:, :, :1]
    torch.testing.assert_close(layer(first, h, steps=3), textbook(layer, first.expand(-1, -1, 3, -1, -1), h))


def test_trains_as_the_textbook():
    layer = ConvGRU(3, 4).double()
    other, x = copy.deepcopy(layer), torch.randn(2, 3, 4, 5, 6).double()
    layer(x).square().sum().backward()
    textbook(other, x, torch.zeros(2, 4, 5, 6).double()).square().sum().backward()
    for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_stacked_steps_are_the_forward():
    layer, x = ConvGRU(3, 8), torch.randn(2, 3, 5, 6, 7)
    whole, h = layer(x), None
    for t, frame in enumerate(x.unbind(2)):
        h = layer.step(frame, h)
        torch.testing.assert_close(h, whole[:, :, t])


def test_a_changed_frame_leaves_every_earlier_state():
    layer, x = ConvGRU(3, 8), torch.randn(2, 3, 5, 6, 7)
    before = layer(x)
    x[:, :, 3] += 1
    after = layer(x)
    assert torch.equal(before[:, :, :3], after[:, :, :3]) and before[:, :, 3].ne(after[:, :, 3]).any()


def test_states_are_channels_last_and_shaped():
    layer = ConvGRU(3, 8)
    states = layer(torch.randn(2, 3, 5, 6, 7))
    assert states.shape == (2, 8, 5, 6, 7) and states.is_contiguous(memory_format=torch.channels_last_3d)
    assert layer(torch.randn(2, 3, 1, 6, 7), steps=4).shape == (2, 8, 4, 6, 7)
    assert layer(torch.randn(0, 3, 2, 6, 7)).shape == (0, 8, 2, 6, 7)
    assert layer.step(torch.randn(2, 3, 6, 7)).shape == (2, 8, 6, 7)


def test_parametrized_weights_are_read_at_each_forward():
    layer, x = ConvGRU(2, 3), torch.randn(1, 2, 3, 4, 4)
    for conv in (layer.reset, layer.update, layer.candidate):
        parametrizations.spectral_norm(conv)
    before = layer.eval()(x)
    torch.testing.assert_close(before, textbook(layer, x, torch.zeros(1, 3, 4, 4)))
    with torch.no_grad():
        layer.update.parametrizations.weight.original[0] *= 2
    assert layer(x).ne(before).any()
    layer(x).sum().backward()
    assert layer.update.parametrizations.weight.original.grad.ne(0).any()


def test_autocast_and_compile():
    layer, x, h = ConvGRU(3, 4), torch.randn(1, 3, 2, 4, 4), torch.randn(1, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x, h)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), layer(x, h), rtol=0.05, atol=0.05)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, h), layer(x, h))


def test_names_and_words():
    layer = ConvGRU(3, 4, 5, "tanh", bias=False, dtype=torch.bfloat16)
    assert [*layer.state_dict()] == ["reset.weight", "update.weight", "candidate.weight"]
    assert layer.update.weight.shape == (4, 7, 5, 5) and layer.update.weight.dtype == torch.bfloat16
    assert all(isinstance(conv, nn.Conv2d) and conv.padding == (2, 2) for conv in layer.children())
    assert repr(layer).startswith("ConvGRU(\n  3, 4, activation='tanh'")


@pytest.mark.parametrize(
    "made, told",
    [
        (lambda: ConvGRU(3, 4, 2), "must be odd, so that the size stays; got 2"),
        (lambda: ConvGRU(3, 4, activation="elu"), "'relu' or 'tanh', got 'elu'"),
        (lambda: ConvGRU(3, 4)(torch.zeros(1, 2, 3, 4, 4)), r"`x` must be \[B, 3, T, H, W\], got \[1, 2, 3, 4, 4\]"),
        (lambda: ConvGRU(3, 4)(torch.zeros(1, 3, 2, 4, 4), steps=3), "got 3 steps and 2 frames"),
        (lambda: ConvGRU(3, 4)(torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 4, 3)), r"`hidden` must be \[1, 4, 4, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused(made, told):
    with pytest.raises(ValueError, match=told):
        made()


def test_the_input_is_convolved_for_all_frames_at_once(monkeypatch):
    seen = []
    honest = ops.conv_gru
    monkeypatch.setattr(ops, "conv_gru", lambda gates, *rest: seen.append(gates.shape) or honest(gates, *rest))
    ConvGRU(3, 4)(torch.randn(2, 3, 5, 6, 7))
    ConvGRU(3, 4)(torch.randn(2, 3, 1, 6, 7), steps=5)
    assert seen == [(2, 5, 6, 7, 12), (2, 1, 6, 7, 12)]
