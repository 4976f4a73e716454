"""DVD-GAN's separable attention against plain attention between all positions, masked; pooled keys; frame by frame."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvid.nn.separable import SeparableAttention
from fastvid.testing import assert_within_yardstick

GRID = (4, 6, 2)
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "pooled": {"pool": 2},
    "pooled causal": {"pool": (1, 3, 2), "causal": True},
}


def plain_layer(part: nn.Module, x: torch.Tensor, axis: int, pool: int, causal: bool) -> torch.Tensor:
    """SAGAN's layer on [B, C, T, H, W] with dense scores, in which a query sees what lies on its own line."""
    weight = lambda name: getattr(part, name).weight[:, :, None, None, None]  # noqa: E731
    window = [pool if axis == i else 1 for i in range(3)]
    theta = F.conv3d(x, weight("theta"))
    phi, g = (F.max_pool3d(F.conv3d(x, weight(name)), window) for name in ("phi", "g"))
    places, keys = (torch.cartesian_prod(*map(torch.arange, h.shape[2:])) for h in (theta, phi))  # [N, 3], [M, 3]
    same = places[:, None] == keys
    same[:, :, axis] = keys[:, axis] <= places[:, None, axis] if causal else True
    scores = (theta.flatten(2).mT @ phi.flatten(2)).masked_fill(~same.all(-1), float("-inf"))  # [B, N, M]
    attended = (g.flatten(2) @ scores.softmax(-1).mT).view(x.shape[0], -1, *x.shape[2:])
    return part.gamma * F.conv3d(attended, weight("o")) + x


def plain(layer: SeparableAttention, x: torch.Tensor) -> torch.Tensor:
    """What SeparableAttention is to give."""
    for part, axis in ((layer.along_h, 1), (layer.along_w, 2), (layer.along_t, 0)):
        x = plain_layer(part, x, axis, part.pool, layer.causal and axis == 0)
    return x


def make(**options) -> SeparableAttention:
    layer = SeparableAttention(16, **options)
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 0:
            nn.init.normal_(parameter, 1, 0.2)
        elif "original" not in name:  # whose norm was measured at the start
            nn.init.normal_(parameter, std=0.2)
    return layer


def outcome(function, layer, x, upstream):
    x = x.to(next(layer.parameters()).dtype).requires_grad_()
    y = function(layer, x)
    grad_x, *grads = torch.autograd.grad(y, [x, *layer.parameters()], upstream.to(y.dtype))
    # those of a part together: of gamma's, one number, plain torch may be right by luck
    return [y, grad_x, *(torch.cat([grad.flatten() for grad in grads[i : i + 5]]) for i in (0, 5, 10))]


@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_are_plain_attention(name):
    layer, x = make(**OPTIONS[name]), torch.randn(2, 16, *GRID)
    exact, upstream = copy.deepcopy(layer).double(), torch.randn(x.shape)
    wanted, peers = outcome(plain, exact, x, upstream), outcome(plain, layer, x, upstream)
    for ours, true, peer in zip(outcome(lambda m, x: m(x), layer, x, upstream), wanted, peers, strict=True):
        assert_within_yardstick(ours, true, peer)
    with torch.no_grad():
        assert_within_yardstick(layer(x), wanted[0].detach(), peers[0])
        last = x.to(memory_format=torch.channels_last_3d)
        assert_within_yardstick(layer(last), wanted[0].detach(), peers[0])
    assert layer(x).is_contiguous(memory_format=torch.channels_last_3d)


def test_a_fresh_layer_changes_nothing():
    layer, x = SeparableAttention(32), torch.randn(1, 32, *GRID)
    assert torch.equal(layer(x), x)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        f"along_{axis}.{name}": shape for axis in "hwt" for name, shape in
        (("gamma", ()), ("theta.weight", (4, 32)), ("phi.weight", (4, 32)), ("g.weight", (16, 32)),
         ("o.weight", (32, 16)))
    }  # fmt: skip
    layer(x).sum().backward()
    assert all(part.gamma.grad for part in (layer.along_h, layer.along_w, layer.along_t))


@pytest.mark.parametrize("pool", [1, (1, 3, 2)])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_stacked_steps_are_the_forward(pool, autocast):
    layer, x = make(pool=pool, causal=True), torch.randn(2, 16, *GRID)
    exact = plain(copy.deepcopy(layer).double(), x.double())
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        cache, peer = layer.new_cache(2, GRID), plain(layer, x)
        assert_within_yardstick(layer(x), exact, peer)
        for _ in range(2):  # a cache that was used serves again
            stepped = torch.stack([layer.step(x[:, :, t], cache, t) for t in range(GRID[0])], dim=2)
            assert_within_yardstick(stepped, exact, peer)
    assert cache.keys.dtype == (autocast or torch.float32)


@torch.no_grad()
def test_the_future_never_touches_the_past():
    layer, x = make(causal=True), torch.randn(2, 16, *GRID)
    before = layer(x)
    for t in range(GRID[0]):
        changed = x.clone()
        changed[:, :, t] += torch.randn(2, 16, *GRID[1:])
        after = layer(changed)
        assert torch.equal(after[:, :, :t], before[:, :, :t]) and (after[:, :, t:] != before[:, :, t:]).any(1).all()


def test_every_position_reaches_every_other():
    layer, x = make().double(), torch.randn(1, 16, *GRID).double()
    with torch.no_grad():
        before, changed = layer(x), x.clone()
        changed[0, :, 1, 2, 1] += 3
        assert (layer(changed) != before).any(1).all()


@pytest.mark.parametrize("training", [True, False])
def test_spectral_norm(training):
    layer, x = make(spectral_norm=True).train(training), torch.randn(1, 16, *GRID)
    for _ in range(50 if training else 0):
        layer(x)
    layer.eval()
    if training:  # the power iteration has found the largest singular value
        assert torch.linalg.matrix_norm(layer.along_w.g.weight, 2).item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(layer(x), plain(layer, x))
    other = SeparableAttention(16, spectral_norm=True).eval()
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x), layer(x))
    layer.train(training)(x).square().sum().backward()
    assert all(parameter.grad.ne(0).any() for parameter in layer.parameters())


def test_compiles_whole_in_every_dtype_and_without_memory():
    layer, x = make(pool=(1, 3, 1), causal=True, spectral_norm=True).eval(), torch.randn(1, 16, *GRID)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        with torch.autocast("cpu", dtype):
            y = layer(x)
            y.sum().backward()
        assert y.dtype == torch.float32  # the residual's
        torch.testing.assert_close(y, layer(x), rtol=tolerance, atol=tolerance)
    assert layer(x[:0]).shape == (0, 16, *GRID)
    with torch.device("meta"):
        far = SeparableAttention(16, (1, 3, 1), causal=True, spectral_norm=True).eval()
        assert far(torch.randn(1, 16, *GRID)).shape == x.shape
    far = far.to_empty(device="cpu")
    far.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(far(x), layer(x))


def test_refusals():
    for channels in (4, 12):
        with pytest.raises(ValueError, match=f"a multiple of 8, got {channels}"):
            SeparableAttention(channels)
    for pool in (0, (2, 2), (1, 2, 0)):
        with pytest.raises(ValueError, match="`pool` must be a number from 1, or three"):
            SeparableAttention(8, pool)
    with pytest.raises(ValueError, match=r"for `causal` pass pool=\(1, 2, 2\)"):
        SeparableAttention(8, 2, causal=True)
    layer = SeparableAttention(8, (1, 4, 1), causal=True)
    with pytest.raises(ValueError, match="`pool` 4 must divide H = 6"):
        layer(torch.randn(1, 8, *GRID))
    with pytest.raises(ValueError, match=r"\[B, 8, T, H, W\], got \[1, 4, 6, 2, 8\]"):
        layer(torch.randn(1, *GRID, 8))
    with pytest.raises(ValueError, match="causal=True"):
        SeparableAttention(8).new_cache(1, GRID)
    layer = SeparableAttention(8, causal=True)
    cache = layer.new_cache(1, GRID)
    with pytest.raises(ValueError, match=r"\[1, 8, 6, 2\] as one of 4 frames, got \[1, 8, 6, 2\] as frame 4"):
        layer.step(torch.randn(1, 8, 6, 2), cache, 4)
    with pytest.raises(ValueError, match=r"got \[2, 8, 6, 2\] as frame 0"):
        layer.step(torch.randn(2, 8, 6, 2), cache, 0)
