"""The law of the drop-in: axial-attention's layer and ours, from one seed and one state."""

import inspect

import pytest
import torch
from torch import nn

from fastvid.nn.axial import AxialAttention, AxisAttention, PreNorm, SelfAttention

peer = pytest.importorskip("axial_attention", reason="axial-attention is not installed: pip install -e '.[bench]'")
package = peer.axial_attention  # the module of this name inside, with the layers that the package does not export

GRIDS = {1: (7,), 2: (4, 5), 3: (3, 4, 5), 4: (2, 3, 2, 4)}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def pair(*args, **words) -> tuple[nn.Module, nn.Module]:
    """Their layer and ours, of one seed."""
    made = []
    for layer in (peer.AxialAttention, AxialAttention):
        torch.manual_seed(7)
        made.append(layer(*args, **words))
    return made[0], made[1]


def outcome(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    upstream = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream)]


@pytest.mark.parametrize("sum_axial_out", [True, False], ids=["sum", "sequence"])
@pytest.mark.parametrize("dim_heads", [None, 5])
@pytest.mark.parametrize("dim_index", [-1, 1, 2], ids="channels-{}".format)
@pytest.mark.parametrize("num_dimensions", GRIDS)
def test_values_and_gradients_are_the_same(num_dimensions, dim_index, dim_heads, sum_axial_out):
    theirs, ours = pair(8, num_dimensions, 2, dim_heads, dim_index, sum_axial_out)
    shape = [2, *GRIDS[num_dimensions]]
    shape.insert(ours.dim_index, 8)
    x = torch.randn(shape)
    torch.testing.assert_close(outcome(ours, x), outcome(theirs, x), **CLOSE)
    spread = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2].copy_(x)
    with torch.no_grad():
        torch.testing.assert_close(ours(spread), theirs(x), **CLOSE)
        assert ours(x).stride() == theirs(x).stride()


@pytest.mark.parametrize("num_dimensions", GRIDS)
def test_a_fresh_layer_is_theirs_for_the_same_seed_and_states_load_both_ways(num_dimensions):
    theirs, ours = pair(8, num_dimensions, 4, 3)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    for giver, taker in ((theirs, ours), (ours, theirs)):
        for parameter in giver.parameters():
            nn.init.normal_(parameter, std=0.3)
        taker.load_state_dict(giver.state_dict(), strict=True)
        x = torch.randn(1, *GRIDS[num_dimensions], 8)
        torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


def test_their_words_are_ours():
    theirs, ours = (inspect.signature(layer.__init__) for layer in (peer.AxialAttention, AxialAttention))
    assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.default, p.kind) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("dim_index", [-1, 1])
def test_the_layers_inside_are_theirs(dim_index):
    shape = (2, 8, 4, 5) if dim_index == 1 else (2, 4, 5, 8)
    for permutation in package.calculate_permutations(2, dim_index):
        *_, axis, channels = permutation
        inside = package.PreNorm(8, package.SelfAttention(8, 2))
        theirs = package.PermuteToFrom(permutation, inside)
        ours = AxisAttention(axis, channels, PreNorm(8, SelfAttention(8, 2)))
        assert [*ours.state_dict()] == [*theirs.state_dict()]
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.3)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = torch.randn(shape)
        torch.testing.assert_close(outcome(ours, x), outcome(theirs, x), **CLOSE)
        line = torch.randn(3, 6, 8)
        torch.testing.assert_close(ours.fn(line), inside(line), **CLOSE)
        torch.testing.assert_close(ours.fn.fn(line), inside.fn(line), **CLOSE)


def test_what_they_assert_is_refused():
    for layer, error in ((peer.AxialAttention, AssertionError), (AxialAttention, ValueError)):
        with pytest.raises(error):
            layer(10, 2, 4)
        with pytest.raises(error):
            layer(8, 2, 4)(torch.randn(2, 3, 8))
        with pytest.raises(error):
            layer(8, 2, 4)(torch.randn(2, 3, 4, 5))
