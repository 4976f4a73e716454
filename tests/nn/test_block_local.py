"""Block-local attention against dense masked attention, and against the Latent Video Transformer's layer."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvid.nn.block_local import BlockLocalAttention
from fastvid.testing import assert_within_yardstick

GRID = (2, 4, 6)
BLOCKS = [(2, 4, 6), (1, 2, 3), (2, 4, 1), (1, 4, 6), (2, 1, 2)]


def dense(layer: BlockLocalAttention, x: torch.Tensor) -> torch.Tensor:
    """The layer on [B, C, T, H, W] by scores between all positions, each with its number per axis."""
    grid, A, (bt, bh, bw) = x.shape[2:], layer.heads, layer.block
    places = torch.cartesian_prod(*map(torch.arange, grid))  # [N, 3]
    apart = places - places[:, None]  # [N, N, 3]: how far a key lies after its query
    size = torch.tensor(layer.block)
    seen = (places // size == (places // size)[:, None]).all(-1)
    if layer.causal:
        seen &= torch.ones_like(seen).tril()
    rows = x.flatten(2).mT  # [B, N, C]
    h = F.layer_norm(rows, rows.shape[-1:], layer.norm.weight, layer.norm.bias)
    q, k, v = (F.linear(h, w).unflatten(-1, (A, -1)).transpose(1, 2) for w in layer.to_qkv.weight.chunk(3))
    tables = (layer.distance_t, layer.distance_h, layer.distance_w)
    inside = [apart[..., i].clamp(1 - b, b - 1) + b - 1 for i, b in enumerate((bt, bh, bw))]
    bias = sum(table[:, index] for table, index in zip(tables, inside, strict=True))  # [A, N, N]
    scores = (q @ k.mT / q.shape[-1] ** 0.5 + bias).masked_fill(~seen, float("-inf"))
    out = rows + F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), layer.to_out.weight)
    out = out if layer.mlp is None else out + layer.mlp(out)
    return out.mT.unflatten(2, grid)


class Original(nn.Module):
    """The Latent Video Transformer's layer, from its description, with its names: one weight for each head, a number
    for every distance of a query after its key, -1e4 for what is hidden."""

    def __init__(self, block, width, d, heads, masked):
        super().__init__()
        self.block, self.masked, n = block, masked, block[0] * block[1] * block[2]
        self.mha = nn.Module()
        self.mha.layer_norm, self.mha.proj = nn.LayerNorm(d), nn.Linear(heads * width, d, bias=False)
        for name in "qkv":
            self.mha.register_parameter(f"w_{name}", nn.Parameter(torch.randn(heads, d, width) * d**-0.5))
        self.ffn = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))
        places = torch.cartesian_prod(*map(torch.arange, block)).view(-1, 3)
        for i, (axis, extent) in enumerate(zip("thw", block, strict=True)):
            self.register_parameter(f"d{axis}_bank", nn.Parameter(torch.randn(heads, 2 * extent - 1)))
            after = places[:, None, i] - places[:, i] + extent - 1
            self.register_buffer(f"d{axis}", after.flatten())
        self.register_buffer("mask", torch.ones(1, 1, n, n).triu(1) if masked else None)

    def attend(self, x):
        """[B, n, d] of one block -> [B, n, d]"""
        h, n, heads = self.mha.layer_norm(x), x.shape[1], []
        for head in range(len(self.mha.w_q)):
            q, k, v = (h @ getattr(self.mha, f"w_{name}")[head] for name in "qkv")
            scores = q @ k.mT / q.shape[-1] ** 0.5
            for axis in "thw":
                scores = scores + getattr(self, f"d{axis}_bank")[head][getattr(self, f"d{axis}")].view(n, n)
            scores = scores.masked_fill(self.mask[0].bool(), -1e4) if self.masked else scores
            heads.append(scores.softmax(-1) @ v)
        x = x + self.mha.proj(torch.cat(heads, dim=-1))
        return x + self.ffn(x)

    def forward(self, x):
        out = torch.empty_like(x)
        for corner in product(*(range(0, extent, b) for extent, b in zip(x.shape[2:], self.block, strict=True))):
            spot = (..., *(slice(at, at + b) for at, b in zip(corner, self.block, strict=True)))
            out[spot] = self.attend(x[spot].flatten(2).mT).mT.view(x[spot].shape)
        return out


def make(block, causal=False, mlp=True) -> BlockLocalAttention:
    layer = BlockLocalAttention(8, 2, 3, block, causal, mlp)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def outcome(function, layer, x, upstream):
    x = x.to(next(layer.parameters()).dtype).requires_grad_()
    y = function(layer, x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream.to(y.dtype))]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_values_and_gradients_are_dense_masked_attention(block, causal):
    layer, x = make(block, causal, mlp=block != (2, 4, 1)), torch.randn(2, 8, *GRID)
    exact, upstream = copy.deepcopy(layer).double(), torch.randn(x.shape)
    wanted, peers = outcome(dense, exact, x, upstream), outcome(dense, layer, x, upstream)
    for ours, true, peer in zip(outcome(lambda m, x: m(x), layer, x, upstream), wanted, peers, strict=True):
        if true.shape == (2, 1):  # the same number for every key: its gradient is zero, and what is left rounding
            torch.testing.assert_close(true, torch.zeros_like(true))
            torch.testing.assert_close(ours, torch.zeros_like(ours), rtol=0, atol=1e-4)
        else:
            assert_within_yardstick(ours, true, peer)
    with torch.no_grad():
        y = layer(x.to(memory_format=torch.channels_last_3d))
    assert_within_yardstick(y, wanted[0].detach(), peers[0])
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("block", BLOCKS[:2], ids=str)
def test_the_latent_video_transformers_layer_loads(block, causal):
    theirs, ours = Original(block, 3, 8, 2, causal), BlockLocalAttention(8, 2, 3, block, causal)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 8, *GRID)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    state = {f"layers.0.{name}": value for name, value in theirs.state_dict().items()}
    model = nn.ModuleDict({"layers": nn.ModuleList([BlockLocalAttention(8, 2, 3, block, causal)])})
    model.load_state_dict(state, strict=True)
    assert torch.equal(model["layers"][0](x), ours(x)) and "layers.0.mha.w_q" in state
    with pytest.raises(RuntimeError, match="mlp.1.weight"):
        BlockLocalAttention(8, 2, 3, block, causal, mlp=False).load_state_dict(theirs.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for distance_w"):
        BlockLocalAttention(8, 2, 3, (*block[:2], 1), causal).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block, run", [((2, 4, 6), 1), ((1, 2, 3), 1), ((1, 4, 6), 6), ((2, 2, 2), 2), ((1, 4, 6), 4)])
@torch.no_grad()
def test_stacked_steps_are_the_forward(block, run, autocast):
    layer, x = make(block, causal=True), torch.randn(2, 8, *GRID)
    exact = dense(copy.deepcopy(layer).double(), x.double())
    rows = x.flatten(2).mT  # [B, N, C]
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        cache, peer = layer.new_cache(2, GRID), dense(layer, x)
        assert_within_yardstick(layer(x), exact, peer)
        for _ in range(2 if run == 1 else 1):  # a cache that was used serves again
            stepped = []
            for t, y, start in product(*map(range, GRID)):
                n = min(run, block[2] - start % block[2])
                if start % block[2] % run == 0:
                    place = (t * GRID[1] + y) * GRID[2] + start
                    stepped.append(layer.step(rows[:, place : place + n], cache, (t, y, start)))
            assert_within_yardstick(torch.cat(stepped, 1).mT.unflatten(2, GRID), exact, peer)
    assert cache.keys.dtype == (autocast or torch.float32)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@torch.no_grad()
def test_the_future_never_touches_the_past(block):
    layer, x = make(block, causal=True), torch.randn(1, 8, *GRID)
    before = layer(x).flatten(2)
    N = before.shape[2]
    places = torch.cartesian_prod(*map(torch.arange, GRID)) // torch.tensor(block)
    for p in torch.randint(N, (15,)).tolist():
        changed = x.clone().flatten(2)
        changed[:, :, p] += torch.randn(8)
        reached = (layer(changed.view_as(x)).flatten(2) != before).any(1)[0]
        assert torch.equal(reached, (torch.arange(N) >= p) & (places == places[p]).all(-1))


def test_a_fresh_layer():
    layer = BlockLocalAttention(64, 4, 32, (2, 3, 4))
    assert [*layer.state_dict()] == [
        "distance_t", "distance_h", "distance_w", "norm.weight", "norm.bias", "to_qkv.weight", "to_out.weight",
        "mlp.0.weight", "mlp.0.bias", "mlp.1.weight", "mlp.1.bias", "mlp.3.weight", "mlp.3.bias",
    ]  # fmt: skip
    assert layer.bias().shape == (4, 24, 24) and not layer.bias().any()
    bound = (6 / (64 + 4 * 32)) ** 0.5
    for weight in (*layer.to_qkv.weight.chunk(3), layer.to_out.weight):
        assert 0.98 * bound < weight.abs().max() <= bound
    assert "block=(2, 3, 4), causal=False" in repr(layer)


def test_compiles_whole_in_every_dtype_and_without_memory():
    layer, x = make((1, 2, 3), causal=True), torch.randn(1, 8, *GRID)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        with torch.autocast("cpu", dtype):
            y = layer(x)
            y.sum().backward()
        assert y.dtype == torch.float32  # the residual's
        torch.testing.assert_close(y, layer(x), rtol=tolerance, atol=tolerance)
    assert layer(x[:0]).shape == (0, 8, *GRID)
    with torch.device("meta"):
        far = BlockLocalAttention(8, 2, 3, (1, 2, 3), causal=True)
        assert far(torch.randn(1, 8, *GRID)).shape == x.shape
    far = far.to_empty(device="cpu")
    far.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(far(x), layer(x))


def test_refusals():
    for block in ((2, 2), (1, 0, 2)):
        with pytest.raises(ValueError, match=r"`block` must be \(bt, bh, bw\)"):
            BlockLocalAttention(8, 2, 4, block)
    layer = BlockLocalAttention(8, 2, 4, (1, 3, 2), causal=True)
    with pytest.raises(ValueError, match=r"the grid \(2, 4, 6\) must divide into blocks \(1, 3, 2\)"):
        layer(torch.randn(1, 8, *GRID))
    with pytest.raises(ValueError, match="must divide into blocks"):
        layer.new_cache(1, GRID)
    with pytest.raises(ValueError, match=r"\[B, 8, T, H, W\], got \[1, 2, 4, 6, 8\]"):
        layer(torch.randn(1, *GRID, 8))
    with pytest.raises(ValueError, match="causal=True"):
        BlockLocalAttention(8, 2, 4, (1, 2, 2)).new_cache(1, GRID)
    cache = layer.new_cache(1, (2, 6, 4))
    for shape, position in (((2, 1, 8), (0, 0, 0)), ((1, 2, 8), (0, 0, 1)), ((1, 1, 8), (2, 0, 0)),
                            ((1, 1, 8), (0, 0, -1)), ((1, 0, 8), (0, 0, 0)), ((1, 1, 7), (0, 0, 0))):  # fmt: skip
        with pytest.raises(ValueError, match=r"a row of a block \(1, 3, 2\) of the grid \(2, 6, 4\)"):
            layer.step(torch.randn(shape), cache, position)
