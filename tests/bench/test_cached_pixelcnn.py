"""The cached peer is exact, so that the plan is measured against something that does the same job."""

from dataclasses import replace

import pytest
import torch
from cached_pixelcnn import CachedPixelCNN, sample_cached

from fastvid.nn import GatedPixelStack, GatedStackConfig
from fastvid.sampling import Noise, sample_naive

BASE = GatedStackConfig(codes=40, channels=16, layers=4, kernel=3, time_kernel=3, condition_channels=6,
                        attention_every=0)
CASES = {
    "3d": (BASE, (2, 4, 4, 5)),
    "3d-two-frames": (replace(BASE, time_kernel=2, layers=3), (1, 3, 3, 6)),
    "3d-kernel-5": (replace(BASE, kernel=5, layers=2), (2, 3, 5, 4)),
    "2d": (replace(BASE, time_kernel=1), (2, 1, 6, 7)),
    "2d-kernel-5": (replace(BASE, time_kernel=1, kernel=5, layers=2), (2, 1, 6, 6)),
    "one-position": (BASE, (2, 1, 1, 1)),
    "attention": (replace(BASE, attention_every=2, heads=2), (2, 3, 3, 4)),
    "2d-attention": (replace(BASE, time_kernel=1, attention_every=4, heads=4), (1, 1, 5, 5)),
}


def make(name):
    config, grid = CASES[name]
    stack = GatedPixelStack(config).eval()
    with torch.no_grad():
        for p in stack.parameters():  # far enough from uniform that a wrong tap changes codes
            p.mul_(1.5)
    return stack, torch.randn(*grid, config.condition_channels)


@pytest.mark.parametrize("name", CASES)
def test_cached_draws_the_naive_codes(name):
    stack, condition = make(name)
    noise = Noise(seed=11, samples=tuple(range(3, 3 + condition.shape[0])), stream=1, first_step=5)
    cached = sample_cached(stack, condition, noise)
    assert torch.equal(cached, sample_naive(stack, condition, noise))
    assert cached[0].numel() == 1 or cached.unique().numel() > 5
    cold = sample_cached(stack, condition, noise, temperature=0.5)
    assert torch.equal(cold, sample_naive(stack, condition, noise, temperature=0.5))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_cached_logits_equal_the_forward(name):
    stack, condition = make(name)
    codes = torch.randint(40, condition.shape[:-1])
    forward, cached = stack(codes, condition), CachedPixelCNN(stack, condition)
    stepped = torch.empty_like(forward)
    for t in range(codes.shape[1]):
        for y in range(codes.shape[2]):
            cached.row(t, y)
            for x in range(codes.shape[3]):
                stepped[:, t, y, x] = cached.pixel(x)
                cached.put(x, codes[:, t, y, x])
    torch.testing.assert_close(stepped, forward, rtol=0, atol=1e-5)
    assert torch.equal(cached.codes, codes)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_rows_after_a_fill_are_those_of_the_forward(name):
    stack, condition = make(name)
    codes = torch.randint(40, condition.shape[:-1])
    _, T, H, W = codes.shape
    cached, last = CachedPixelCNN(stack, condition), codes.clone()
    last[:, -1, H // 2 :] = 0  # what a row does not see yet may be anything
    torch.testing.assert_close(cached.fill(last), stack(last, condition), rtol=0, atol=1e-5)
    forward = stack(codes, condition)
    for _ in range(2):  # a row may be taken again
        cached.row(T - 1, H // 2)
        for x in range(W):
            torch.testing.assert_close(cached.pixel(x), forward[:, T - 1, H // 2, x], rtol=0, atol=1e-5)
            cached.put(x, codes[:, T - 1, H // 2, x])


def test_refusals():
    condition = torch.randn(1, 1, 2, 2, 6)
    with pytest.raises(ValueError, match="axial"):
        CachedPixelCNN(GatedPixelStack(replace(BASE, attention_every=2, heads=2, wavefront=True)), condition)
    with pytest.raises(ValueError, match="eval"):
        CachedPixelCNN(GatedPixelStack(replace(BASE, dropout=0.1)), condition)
