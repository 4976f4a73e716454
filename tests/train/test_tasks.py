"""What the three tasks show a model, and what they ask of it."""

import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from fake_tasks import Windows
from torch import nn

from fastvid import models
from fastvid.models.predictor import bottom_window
from fastvid.train import BottomTask, Latents, TopTask, VQVAETask
from fastvid.train.latents import as_model_input
from fastvid.train.tasks import as_frames, bottom_inputs


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return models.build(kind, asdict(models.preset(kind, "tiny")))


@pytest.fixture
def latents() -> Latents:
    """Codes of 6 windows, every grid with codes of its own, so that a mixed-up source shows."""
    def grid(steps, size):
        return torch.randint(0, 32, (6, steps, size, size), dtype=torch.int16)

    return Latents(grid(1, 4), grid(2, 8), grid(4, 4), grid(8, 8), "key")


class Spy(nn.Module):
    """Stands in for a prior: keeps what it was shown, answers uniform logits."""

    def __init__(self, like: nn.Module):
        super().__init__()
        self.config, self.weight = like.config, nn.Parameter(torch.zeros(32))

    def forward(self, *inputs):
        self.inputs = inputs
        return self.weight.expand(*inputs[0].shape, 32)


@pytest.mark.parametrize("n", range(2, 8))
def test_the_bottom_prior_sees_what_exists_when_slice_n_is_sampled(latents, n):
    codes = latents.take(torch.arange(6))
    target, top, window = bottom_inputs(codes, torch.full((6,), n), 4)
    assert torch.equal(target, codes.bottom[:, n])
    assert torch.equal(top, torch.cat([codes.given_top, codes.top[:, 1:]], 1))
    for place, m in enumerate(range(n - 4, n)):
        want = torch.full((6, 8, 8), -1) if m < 0 else codes.given_bottom[:, m] if m < 2 else codes.bottom[:, m]
        assert torch.equal(window[:, place], want), m
    # the same as the sampler's own view of the codes so far
    so_far = torch.cat([codes.given_bottom, codes.bottom[:, 2:]], 1)
    assert torch.equal(window, bottom_window(so_far, n, 4))


def test_each_row_has_its_own_slice(latents):
    codes, slices = latents.take(torch.arange(6)), torch.tensor([7, 2, 3, 6, 5, 4])
    mixed = bottom_inputs(codes, slices, 4)
    for row, n in enumerate(slices):
        alone = bottom_inputs(codes, torch.full((6,), int(n)), 4)
        assert all(torch.equal(a[row], b[row]) for a, b in zip(mixed, alone, strict=True))


def test_the_top_task_asks_for_the_future_given_the_four_frames_alone(latents):
    spy = Spy(build("top"))
    loss, metrics = TopTask(spy, latents, 6).loss(0, 0, 1)
    codes, given_top, given_bottom = spy.inputs
    rows = [next(i for i in range(6) if torch.equal(latents.given_top[i].long(), g)) for g in given_top]
    assert torch.equal(codes, latents.top[rows, 1:].long())
    assert torch.equal(given_bottom, latents.given_bottom[rows].long())
    assert loss.item() == pytest.approx(math.log(32)) and metrics["bits_per_code"].item() == pytest.approx(5)


def test_the_bottom_task_draws_every_future_slice_and_no_given_one(latents):
    spy, seen = Spy(build("bottom")), []
    task = BottomTask(spy, latents, 8)
    for step in range(40):
        loss, metrics = task.loss(step, 0, 1)
        seen += spy.inputs[1].tolist()
    assert set(seen) == {2, 3, 4, 5, 6, 7}
    assert min(seen.count(n) for n in range(2, 8)) > 25  # 320 draws, 53 expected each
    assert metrics["bits_per_code"].item() == pytest.approx(5)


@pytest.mark.parametrize(("kind", "task"), [("top", TopTask), ("bottom", BottomTask)])
def test_the_loss_is_the_mean_cross_entropy_of_the_target(latents, kind, task):
    model = build(kind).eval()
    loss, metrics = task(model, latents, 4, seed=3).loss(7, 0, 1)
    spy = Spy(model)
    task(spy, latents, 4, seed=3).loss(7, 0, 1)
    p = torch.log_softmax(model(*spy.inputs).double(), -1)
    want = -p.gather(-1, spy.inputs[0].unsqueeze(-1)).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert metrics["bits_per_code"].item() == pytest.approx(want.item() / math.log(2), rel=1e-5)


@pytest.mark.parametrize(("kind", "task"), [("top", TopTask), ("bottom", BottomTask)])
def test_a_batch_depends_on_seed_and_step_and_ranks_share_it(latents, kind, task):
    spy = Spy(build(kind))

    def shown(seed, step, rank=0, world=1):
        task(spy, latents, 4, seed).loss(step, rank, world)
        return spy.inputs

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    whole = shown(0, 5)
    assert same(whole, shown(0, 5)) and not same(whole, shown(0, 6)) and not same(whole, shown(1, 5))
    halves = [shown(0, 5, rank, 2) for rank in (0, 1)]
    assert same(whole, [torch.cat(part) for part in zip(*halves, strict=True)])


def test_the_autoencoders_metrics(latents):
    model = build("vqvae").train()
    task = VQVAETask(model, Windows(), 4, {"clips": "noise"})
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(1)
    loss, metrics = task.loss(3, 0, 1)
    model.load_state_dict(state)
    torch.manual_seed(1)
    video = as_model_input(Windows().batch(3, 4))
    out = model(video)
    assert torch.equal(loss, out.loss)
    want = -10 * math.log10(F.mse_loss(out.reconstruction.clamp(0, 1), video).item())
    assert metrics["psnr"].item() == pytest.approx(want, rel=1e-5)
    assert metrics["perplexity_top"] == out.perplexity_top and metrics["perplexity_bottom"] == out.perplexity_bottom


def test_frames_go_to_the_model_and_back_unchanged():
    clips = torch.arange(256, dtype=torch.uint8).repeat(6).view(2, 2, 8, 16, 3)
    video = as_model_input(clips)
    assert video.shape == (2, 3, 2, 8, 16) and video.min() == 0 and video.max() == 1
    assert torch.equal(video[1, 2, 0, 3, 4] * 255, clips[1, 0, 3, 4, 2].float())
    assert torch.equal(as_frames(video), clips)


def test_the_top_alone_is_what_a_masked_clip_is_decoded_to():
    model = models.build("vqvae", asdict(models.preset("vqvae", "tiny")) | {"mask_probability": 1.0})
    video = as_model_input(Windows().batch(0, 2))
    model(video)  # starts the codebooks
    state = {k: v.clone() for k, v in model.state_dict().items()}
    masked = model.train()(video).reconstruction.clamp(0, 1)
    model.load_state_dict(state)
    top, _ = model.eval().encode(video)
    torch.testing.assert_close(model.decode(top, None), masked, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "task"), [("top", TopTask), ("bottom", BottomTask)])
def test_sheets_of_the_priors_pair_truth_and_samples(latents, kind, task):
    vqvae, model = build("vqvae").eval(), build(kind).eval()
    assert task(model, latents, 4).sheet(model) is None
    with torch.no_grad():
        sheet = task(model, latents, 4, vqvae=vqvae).sheet(model)
        again = task(model, latents, 4, vqvae=vqvae).sheet(model)
    assert sheet.dtype == torch.uint8 and torch.equal(sheet, again)
    assert len(sheet.float().mean((1, 2)).unique()) > 6  # not one colour


def test_the_autoencoders_sheet_shows_the_clips_themselves(latents):
    model = build("vqvae").eval()
    windows = Windows()
    with torch.no_grad():
        sheet = VQVAETask(model, windows, 4, {}).sheet(model)
    first = windows.batch(0, 4)[0, 0]  # [H, W, 3], enlarged by 3 behind a border
    assert torch.equal(sheet[3:99:3, 3:99:3], first)
