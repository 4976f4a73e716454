"""Axial attention against plain attention between all positions with a mask that leaves the lines."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvid import ops
from fastvid.nn.axial import AxialAttention, AxialBlock, AxisAttention, PreNorm, SelfAttention
from fastvid.testing import assert_within_yardstick

GRID = (3, 4, 5)


def on_a_line(grid: tuple[int, ...], axis: int) -> torch.Tensor:
    """Which positions differ in no other coordinate than this one. [N, N] bool"""
    places = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid))
    same = places[:, None] == places
    same[:, :, axis] = True
    return same.all(-1)


def plain(x, to_q, to_k, to_v, to_out, bias, heads, seen):
    """Attention of [B, N, C] where `seen` [N, N], as anybody would write it."""
    q, k, v = (F.linear(x, w).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (to_q, to_k, to_v))  # [B, A, N, E]
    scores = q @ k.mT / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return F.linear((weights @ v).transpose(1, 2).flatten(2), to_out, bias)


def plain_axial(layer: AxialAttention, x: torch.Tensor) -> torch.Tensor:
    """What AxialAttention is to give, x with its channels at `dim_index`."""
    rows = x.movedim(layer.dim_index, -1)
    grid, h, total = rows.shape[1:-1], rows.flatten(1, -2), 0
    for axis, along in enumerate(layer.axial_attentions):
        fn = along.fn
        to_k, to_v = fn.to_kv.weight.chunk(2)
        out = plain(h, fn.to_q.weight, to_k, to_v, fn.to_out.weight, fn.to_out.bias, fn.heads, on_a_line(grid, axis))
        total, h = (total + out, h) if layer.sum_axial_out else (out, out)
    return total.unflatten(1, grid).movedim(-1, layer.dim_index)


def plain_block(layer: AxialBlock, x: torch.Tensor) -> torch.Tensor:
    """What AxialBlock is to give, [B, C, T, H, W]."""
    h, total = x.flatten(2).mT, 0
    for part, axis in ((layer.attn_t, 0), (layer.attn_h, 1), (layer.attn_w, 2)):
        weights = (part.w_qs.weight, part.w_ks.weight, part.w_vs.weight, part.fc.weight)
        total = total + plain(h, *weights, part.fc.bias, layer.heads, on_a_line(x.shape[2:], axis))
    return total.mT.unflatten(2, x.shape[2:])


def outcome(function, layer, x, upstream):
    """The output and all gradients of one run in the layer's dtype."""
    x = x.to(next(layer.parameters()).dtype).requires_grad_()
    y = function(layer, x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream.to(y.dtype))]


def agrees(layer, function, x):
    """Values and gradients within the yardstick of a plain function; values without gradients too."""
    for weight in layer.parameters():
        if weight.ndim > 1:  # large enough for attention to choose, or the gradients of q and k are but rounding
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    exact, upstream = copy.deepcopy(layer).double(), torch.randn(x.shape)
    wanted, peers = outcome(function, exact, x, upstream), outcome(function, layer, x, upstream)
    for ours, true, peer in zip(outcome(lambda m, x: m(x), layer, x, upstream), wanted, peers, strict=True):
        assert_within_yardstick(ours, true, peer)
    with torch.no_grad():
        assert_within_yardstick(layer(x), wanted[0].detach(), peers[0])


@pytest.mark.parametrize("sum_axial_out", [True, False], ids=["sum", "sequence"])
@pytest.mark.parametrize("grid", [(7,), (4, 5), GRID, (2, 3, 2, 3)], ids=len)
@pytest.mark.parametrize("dim_index", [-1, 1])
def test_axial_attention_is_attention_on_lines(grid, dim_index, sum_axial_out):
    layer = AxialAttention(8, len(grid), heads=2, dim_heads=3, dim_index=dim_index, sum_axial_out=sum_axial_out)
    shape = (2, 8, *grid) if dim_index == 1 else (2, *grid, 8)
    agrees(layer, plain_axial, torch.randn(shape))


def test_channels_may_stand_between_the_axes():
    layer = AxialAttention(8, 4, heads=2, dim_index=-3)
    assert layer.dim_index == 3
    agrees(layer, plain_axial, torch.randn(2, 3, 2, 8, 3, 4))


@pytest.mark.parametrize("heads", [1, 2])
def test_the_block_of_videogpt_is_attention_on_lines(heads):
    agrees(AxialBlock(8, heads), plain_block, torch.randn(2, 8, *GRID))


def test_the_block_has_videogpts_parameters():
    layer = AxialBlock(240)
    names = [f"attn_{axis}.{name}" for axis in "wht" for name in
             ("w_qs.weight", "w_ks.weight", "w_vs.weight", "fc.weight", "fc.bias")]  # fmt: skip
    assert [*layer.state_dict()] == names and layer.heads == 2
    for name, value in layer.state_dict().items():
        assert value.shape == ((240,) if "bias" in name else (240, 240))
        if "bias" not in name:
            assert value.std().item() == pytest.approx(240**-0.5, rel=0.02)


MAKES = {
    "sum": lambda: (AxialAttention(8, 3, 2), (2, *GRID, 8)),
    "sequence": lambda: (AxialAttention(8, 2, 2, dim_index=1, sum_axial_out=False), (2, 8, 4, 5)),
    "five": lambda: (AxialAttention(8, 5, 2), (1, 2, 2, 3, 2, 2, 8)),
    "block": lambda: (AxialBlock(8), (2, 8, *GRID)),
    "normed": lambda: (AxisAttention(2, 1, PreNorm(8, SelfAttention(8, 2))), (2, 8, 4, 5)),
    "line": lambda: (SelfAttention(8, 2), (2, 5, 8)),
}


@pytest.mark.parametrize("name", ["block", "normed"])
def test_compiles_whole(name):
    layer, shape = MAKES[name]()
    x = torch.randn(shape)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_compiles_with_its_gradients():
    layer, x = AxialAttention(8, 1, 2), torch.randn(1, 3, 8, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, wanted = (torch.autograd.grad(m(x).square().sum(), [x, *layer.parameters()]) for m in (compiled, layer))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", MAKES)
def test_dtypes_devices_and_copies(name):
    layer, shape = MAKES[name]()
    x = torch.randn(shape)
    y = layer(x).detach()
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        with torch.autocast("cpu", dtype):
            cast = layer(x)
            cast.sum().backward()
            with torch.no_grad():
                torch.testing.assert_close(layer(x), cast.detach(), rtol=tolerance, atol=tolerance)
        assert cast.dtype == dtype
        torch.testing.assert_close(cast.float(), y, rtol=tolerance, atol=tolerance)
    assert layer(x[:0]).shape == (0, *shape[1:])
    with torch.device("meta"):
        far, _ = MAKES[name]()
        assert far(torch.randn(shape)).shape == shape
    far = far.to_empty(device="cpu")
    far.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(far(x), y)
    torch.testing.assert_close(copy.deepcopy(layer).double()(x.double()), y.double(), rtol=1e-4, atol=1e-5)


def test_a_line_knows_nothing_of_the_others():
    layer, x = AxialAttention(8, 3, 2), torch.randn(1, *GRID, 8)
    y = layer(x).detach()
    changed = x.clone()
    changed[0, 1, 2, 3] += 1
    for reached in ((layer(changed) != y).any(-1)[0], (layer(changed).detach() != y).any(-1)[0]):
        coordinates = torch.cartesian_prod(*map(torch.arange, GRID)).view(*GRID, 3)
        same = (coordinates == torch.tensor([1, 2, 3])).sum(-1)
        assert torch.equal(reached, same >= 2)


def test_outputs_lie_in_memory_as_those_they_replace():
    layer, x = AxialAttention(8, 2, 2, dim_index=1), torch.randn(2, 8, 4, 5)
    block = AxialBlock(8)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            assert layer(x).is_contiguous() and layer.axial_attentions[0](x).is_contiguous()
            assert layer(x[:, :, ::2]).is_contiguous()
            last = x.to(memory_format=torch.channels_last)
            assert layer(last).is_contiguous()
            torch.testing.assert_close(layer(last), layer(x))
            assert block(x[:, :, None]).is_contiguous(memory_format=torch.channels_last_3d)


def test_without_gradients_it_is_one_op():
    layer, x = AxialAttention(8, 3, 2), torch.randn(1, *GRID, 8)
    with ops.served() as record:
        layer(x)
    assert {*record} == {"axial_attention"}
    with ops.served() as record, torch.no_grad():
        layer(x)
    assert {*record} == {"axial_self_attention"}
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    with ops.served() as record:
        layer(x)
        assert layer(x.requires_grad_()).requires_grad
    assert {*record} == {"axial_attention", "axial_self_attention"}


def test_refusals():
    with pytest.raises(ValueError, match="`heads` must divide `dim`, got 3 and 8"):
        AxialAttention(8, 2, 3)
    for wrong in (0, 4, -5):
        with pytest.raises(ValueError, match="`dim_index` must be an axis after the first of the 4"):
            AxialAttention(8, 2, 2, dim_index=wrong)
    with pytest.raises(ValueError, match=r"4 axes and 8 channels at axis 1, got \[2, 4, 8, 5\]"):
        AxialAttention(8, 2, 2, dim_index=1)(torch.randn(2, 4, 8, 5))
    with pytest.raises(ValueError, match="4 axes"):
        AxialAttention(8, 2, 2)(torch.randn(2, 4, 8))
    with pytest.raises(ValueError, match="`heads` must divide `dim`, got 3 and 8"):
        AxialBlock(8, 3)
    with pytest.raises(ValueError, match=r"\[B, 8, T, H, W\], got \[2, 3, 4, 5, 8\]"):
        AxialBlock(8)(torch.randn(2, *GRID, 8))
    assert "axis=2, channel_axis=1" in repr(nn.Sequential(MAKES["normed"]()[0]))
