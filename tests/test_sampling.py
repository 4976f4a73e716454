"""The plan against the naive sampler: the same codes, the same logits, whatever the batch."""

from dataclasses import replace

import pytest
import torch

from fastvid.nn import GatedPixelStack, GatedStackConfig
from fastvid.sampling import Noise, SamplingPlan, sample, sample_naive

BASE = GatedStackConfig(codes=40, channels=16, layers=4, kernel=3, time_kernel=3, condition_channels=6,
                        attention_every=2, heads=2)
CASES = {
    "3d": (replace(BASE, attention_every=0), (2, 3, 4, 5)),
    "3d-attention": (BASE, (2, 3, 4, 4)),
    "3d-two-frames": (replace(BASE, time_kernel=2, layers=3), (1, 4, 3, 6)),
    "3d-kernel-5": (replace(BASE, kernel=5, layers=2), (3, 2, 5, 4)),
    "2d": (replace(BASE, time_kernel=1, attention_every=0), (3, 1, 6, 7)),
    "2d-attention": (replace(BASE, time_kernel=1), (2, 1, 7, 5)),
    "2d-kernel-5": (replace(BASE, time_kernel=1, kernel=5, attention_every=1, layers=2, heads=4), (2, 1, 6, 6)),
    "one-position": (BASE, (1, 1, 1, 1)),
}


def make(name):
    config, grid = CASES[name]
    stack = GatedPixelStack(config).eval()
    with torch.no_grad():
        for p in stack.parameters():  # far enough from uniform that a wrong tap changes codes
            p.mul_(1.5)
    return stack, torch.randn(*grid, config.condition_channels)


@pytest.mark.parametrize("name", CASES)
def test_plan_draws_the_naive_codes(name):
    stack, condition = make(name)
    noise = Noise(seed=11, samples=tuple(range(3, 3 + condition.shape[0])), stream=1, first_step=5)
    naive, planned = sample_naive(stack, condition, noise), sample(stack, condition, noise)
    assert torch.equal(naive, planned)
    assert planned.numel() == 1 or planned.unique().numel() > 5


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_plan_logits_equal_the_forward(name):
    stack, condition = make(name)
    codes = torch.randint(40, condition.shape[:-1])
    forward, plan = stack(codes, condition), SamplingPlan(stack, condition)
    stepped = torch.empty_like(forward)
    for t in range(codes.shape[1]):
        plan.frame(t)
        for y in range(codes.shape[2]):
            plan.row(y)
            for x in range(codes.shape[3]):
                stepped[:, t, y, x] = plan.pixel(x)
                plan.put(x, codes[:, t, y, x])
    torch.testing.assert_close(stepped, forward, rtol=0, atol=1e-5)
    assert torch.equal(plan.codes, codes)


@pytest.mark.parametrize("name", ["3d-attention", "2d-kernel-5"])
def test_a_sample_does_not_depend_on_its_batch(name):
    stack, condition = make(name)
    row = condition[:1]
    alone = sample(stack, row, Noise(1, (7,)))
    others = torch.randn(20, *row.shape[1:])
    crowd = sample(stack, torch.cat([others, row]), Noise(1, (*range(100, 120), 7)))
    assert torch.equal(crowd[-1:], alone)
    assert not torch.equal(sample(stack, row, Noise(2, (7,))), alone)


def test_temperature_and_progress():
    stack, condition = make("2d")
    told = []
    cold = sample(stack, condition, Noise(0, (0, 1, 2)), temperature=1e-4, progress=told.append)
    assert sum(told) == 6 * 7
    assert torch.equal(cold, sample(stack, condition, Noise(9, (5, 6, 7)), temperature=1e-4))  # greedy: noise is moot


@pytest.mark.parametrize("channels, inside", [(16, 1), (256, 3)])
def test_a_narrow_stack_samples_on_one_thread(channels, inside):
    stack = GatedPixelStack(replace(BASE, channels=channels, layers=1, attention_every=0)).eval()
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(3)
        condition = torch.randn(1, 1, 1, 1, 6)
        sample(stack, condition, Noise(0, (0,)), progress=lambda _: seen.append(torch.get_num_threads()))
        assert seen == [inside] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_refusals():
    stack, condition = make("2d")
    with pytest.raises(ValueError, match="names 1 samples"):
        sample(stack, condition, Noise(0, (0,)))
    with pytest.raises(ValueError, match="condition"):
        sample(stack, condition[..., :2], Noise(0, (0, 1, 2)))
    noisy = GatedPixelStack(replace(BASE, dropout=0.1))
    with pytest.raises(ValueError, match="eval"):
        sample(noisy, torch.randn(1, 1, 2, 2, 6), Noise(0, (0,)))
