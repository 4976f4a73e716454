"""The convolutional LSTM: against its equations, and causal."""

import copy

import pytest
import torch
from torch.nn.utils import parametrizations

from fastvid.nn import ConvLSTM


def textbook(layer, x, state=None):
    """One product on [x; h], frame after frame. -> h [B, C, T, H, W], (h, c)"""
    B, _, _, *size = x.shape
    h, c = state or [x.new_zeros(B, layer.hidden_channels, *size)] * 2
    states = []
    for frame in x.unbind(2):
        i, f, g, o = layer.gates(torch.cat([frame, h], dim=1)).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    return torch.stack(states, dim=2), (h, c)


@pytest.mark.parametrize("kernel, bias", [(3, True), (5, False), (1, True)])
def test_equals_the_textbook_and_trains_as_it_does(kernel, bias):
    layer = ConvLSTM(3, 4, kernel, bias, dtype=torch.float64)
    other, x = copy.deepcopy(layer), torch.randn(2, 3, 4, 5, 6).double()
    state = tuple(torch.randn(2, 2, 4, 5, 6).double())
    for given in (None, state):
        ours, theirs = layer(x, given), textbook(other, x, given)
        torch.testing.assert_close(ours, theirs)
        for states, (h, c) in (ours, theirs):
            (states.square().sum() + h.sum() + c.square().sum()).backward()
    for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_stacked_steps_are_the_forward():
    layer, x = ConvLSTM(3, 8), torch.randn(2, 3, 5, 6, 7)
    (whole, last), state = layer(x), None
    for t, frame in enumerate(x.unbind(2)):
        state = layer.step(frame, state)
        torch.testing.assert_close(state[0], whole[:, :, t])
    torch.testing.assert_close(state, last)


def test_a_changed_frame_leaves_every_earlier_state():
    layer, x = ConvLSTM(3, 8), torch.randn(2, 3, 5, 6, 7)
    before = layer(x)[0]
    x[:, :, 3] += 1
    after = layer(x)[0]
    assert torch.equal(before[:, :, :3], after[:, :, :3]) and before[:, :, 3].ne(after[:, :, 3]).any()


def test_shapes_memory_names_and_compile():
    layer, x = ConvLSTM(3, 8), torch.randn(2, 3, 5, 6, 7)
    states, (h, c) = layer(x)
    assert states.shape == (2, 8, 5, 6, 7) and states.is_contiguous(memory_format=torch.channels_last_3d)
    assert h.shape == c.shape == (2, 8, 6, 7) and torch.equal(h, states[:, :, -1])
    assert layer(x[:0])[0].shape == (0, 8, 5, 6, 7)
    assert {name: [*p.shape] for name, p in layer.named_parameters()} == {
        "gates.weight": [32, 11, 3, 3], "gates.bias": [32]
    }  # fmt: skip
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], states)


def test_a_parametrized_weight_is_read_at_each_forward():
    layer, x = parametrizations.spectral_norm(ConvLSTM(2, 3).gates), torch.randn(1, 2, 3, 4, 4)
    whole = ConvLSTM(2, 3)
    whole.gates = layer.eval()
    before = whole(x)[0]
    torch.testing.assert_close(before, textbook(whole, x)[0])
    with torch.no_grad():
        layer.parametrizations.weight.original[0] *= 2
    assert whole(x)[0].ne(before).any()


def test_autocast():
    layer, x = ConvLSTM(3, 4), torch.randn(1, 3, 2, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, _ = layer(x, tuple(torch.zeros(2, 1, 4, 4, 4)))
    torch.testing.assert_close(low.float(), layer(x)[0], rtol=0.05, atol=0.05)
    low.sum().backward()
    assert layer.gates.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "made, told",
    [
        (lambda: ConvLSTM(3, 4, 2), "must be odd, so that the size stays; got 2"),
        (lambda: ConvLSTM(3, 4)(torch.zeros(1, 2, 3, 4, 4)), r"`x` must be \[B, 3, T, H, W\], got \[1, 2, 3, 4, 4\]"),
        (lambda: ConvLSTM(3, 4)(torch.zeros(1, 3, 2, 4, 4), [torch.zeros(1, 4, 4, 3)] * 2), r"each \[1, 4, 4, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused(made, told):
    with pytest.raises(ValueError, match=told):
        made()
