"""Wavefront models: whole anti-diagonals of a frame drawn at once are the codes of the naive sampler."""

from dataclasses import replace

import pytest
import torch

from fastvid import ops
from fastvid.nn import GatedPixelStack, GatedStackConfig
from fastvid.ops._op import SERVES
from fastvid.sampling import Noise, pack_stack, sample_grid, sample_naive

BASE = GatedStackConfig(codes=40, channels=16, layers=4, kernel=3, time_kernel=3, condition_channels=6,
                        attention_every=2, heads=2, wavefront=True)
CASES = {
    "3d": (BASE, (2, 2, 4, 5)),
    "3d-no-attention": (replace(BASE, attention_every=0), (2, 3, 4, 4)),
    "3d-two-frames": (replace(BASE, time_kernel=2, layers=3, attention_every=1), (1, 3, 3, 6)),
    "3d-kernel-5": (replace(BASE, kernel=5, layers=2), (3, 2, 4, 5)),
    "2d": (replace(BASE, time_kernel=1), (2, 1, 7, 5)),
    "2d-no-attention": (replace(BASE, time_kernel=1, attention_every=0), (3, 1, 5, 7)),
    "2d-kernel-5": (replace(BASE, time_kernel=1, kernel=5, attention_every=1, layers=2, heads=4), (2, 1, 5, 6)),
    "one-row": (replace(BASE, time_kernel=1), (1, 1, 1, 6)),
    "one-column": (replace(BASE, time_kernel=1), (1, 1, 6, 1)),
}


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Each sampler, where this machine has it."""
    stack, condition, _ = make("one-row")
    told = ops.pixelcnn_sample.reasons(
        *pack_stack(stack), condition, torch.zeros(1, dtype=torch.int64), backend=request.param
    )
    if told.get(request.param) != SERVES:
        pytest.skip(f"{request.param}: {told.get(request.param, 'not built')}")
    return request.param


def sharp(config):
    """A stack far enough from uniform that one wrong code changes those after it."""
    stack = GatedPixelStack(config).eval()
    with torch.no_grad():
        for p in stack.parameters():
            p.mul_(2.5)
    return stack


def make(name):
    config, grid = CASES[name]
    stack = sharp(config)
    noise = Noise(seed=11, samples=tuple(range(3, 3 + grid[0])), stream=1, first_step=5)
    return stack, torch.randn(*grid, config.condition_channels), noise


def anti_diagonals(H, W, r):
    """The positions (y, x) of every sequential step of a frame: those with the same x + (1 + r) y."""
    steps = [[] for _ in range(W + (1 + r) * (H - 1))]
    for y in range(H):
        for x in range(W):
            steps[x + (1 + r) * y].append((y, x))
    return steps


@torch.no_grad()
def sample_along_waves(stack, condition, noise, step, fill):
    """As `sample_naive`, but every forward of the network draws a whole step. Codes not drawn yet are `fill`."""
    B, T, H, W = condition.shape[:4]
    codes = torch.full((B, T, H, W), fill)
    for t in range(T):
        gumbel = [noise.row(t, y, W, stack.config.codes, condition.device) for y in range(H)]
        for places in anti_diagonals(H, W, step):
            logits = stack(codes, condition)[:, t]  # [B, H, W, K]
            for y, x in places:
                codes[:, t, y, x] = ops.draw(logits[:, y, x], gumbel[y][:, x], 1.0)
    return codes


@pytest.mark.parametrize("name", CASES)
def test_waves_draw_the_naive_codes(name):
    stack, condition, noise = make(name)
    naive = sample_naive(stack, condition, noise)
    r = stack.config.kernel // 2
    assert torch.equal(sample_along_waves(stack, condition, noise, r, fill=0), naive)
    # nothing undrawn is looked at, so what stands there does not matter
    assert torch.equal(sample_along_waves(stack, condition, noise, r, fill=17), naive)
    assert naive.unique().numel() > 1


@pytest.mark.parametrize("name", ["3d", "2d", "2d-kernel-5"])
def test_steeper_waves_would_not_do(name):
    stack, condition, noise = make(name)
    naive = sample_naive(stack, condition, noise)
    assert not torch.equal(sample_along_waves(stack, condition, noise, stack.config.kernel // 2 - 1, fill=0), naive)


@pytest.mark.parametrize("name", ["3d", "2d"])
def test_waves_do_not_serve_a_full_raster_model(name):
    config, _ = CASES[name]
    _, condition, noise = make(name)
    stack = sharp(replace(config, wavefront=False))
    naive = sample_naive(stack, condition, noise)
    assert not torch.equal(sample_along_waves(stack, condition, noise, 1, fill=0), naive)


def test_every_position_has_a_step_after_all_that_it_sees():
    for H, W, r in ((1, 1, 1), (4, 9, 1), (6, 3, 2), (5, 5, 2)):
        step = {place: s for s, places in enumerate(anti_diagonals(H, W, r)) for place in places}
        assert len(step) == H * W and max(step.values()) == W + (1 + r) * (H - 1) - 1
        for y, x in step:
            seen = [(v, u) for v, u in step if v == y and u < x or v < y and u <= x + r]
            assert all(step[place] < step[y, x] for place in seen)


@pytest.mark.parametrize("name", CASES)
def test_samplers_draw_the_naive_codes_in_either_order(name, backend):
    stack, condition, noise = make(name)
    naive = sample_naive(stack, condition, noise)
    raster = sample_grid(stack, condition, noise, order="raster", window=1, backend=backend)
    assert raster.near_ties() == 0, "another seed is needed: here either code would be right"
    for order in ("wavefront", "auto"):
        waves = sample_grid(stack, condition, noise, order=order, backend=backend)
        assert torch.equal(raster.codes, naive) and torch.equal(waves.codes, naive)
        torch.testing.assert_close(waves.logprob, raster.logprob, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_wave_takes_the_steps_that_it_promises(name, backend):
    if backend == "reference":
        pytest.skip("the reference draws every order row by row")
    stack, condition, noise = make(name)
    _, T, H, W = condition.shape[:4]
    passes = sample_grid(stack, condition, noise, order="wavefront", backend=backend).passes  # [B, T, H]
    assert (passes[:, :, 0] == W + (1 + stack.config.kernel // 2) * (H - 1)).all() and (passes[:, :, 1:] == 0).all()
    assert (sample_grid(stack, condition, noise, order="raster", window=1, backend=backend).passes == W).all()


@pytest.mark.parametrize("name", ["3d", "2d", "2d-kernel-5"])
def test_given_codes_stand_in_a_wave(name, backend):
    stack, condition, noise = make(name)
    given = torch.randint(stack.config.codes, condition.shape[:4])
    given[torch.rand(given.shape) < 0.6] = -1
    raster, waves = (
        sample_grid(stack, condition, noise, order=order, given=given, backend=backend)
        for order in ("raster", "wavefront")
    )
    assert torch.equal(waves.codes, raster.codes) and torch.equal(waves.codes[given >= 0], given[given >= 0])
    assert (waves.margin[given >= 0] == torch.inf).all() and waves.margin[given < 0].isfinite().all()


def test_a_full_raster_model_has_no_wavefront():
    config, _ = CASES["3d"]
    _, condition, noise = make("3d")
    with pytest.raises(ValueError, match="wavefront"):
        sample_grid(sharp(replace(config, wavefront=False)), condition, noise, order="wavefront")
