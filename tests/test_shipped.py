"""The models that come along: small, whole, and of use on their examples."""

import json
from pathlib import Path

import pytest
import torch

import fastvid
from fastvid.data.video import read_video
from fastvid.metrics import ssim
from fastvid.models import DVDGANPredictor
from fastvid.models.predictor import SHIPPED

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# name: example, its first given frame, largest folder in bytes, least PSNR of the example's reconstruction in dB,
# least change of the liveliest future from any frame to the next
MODELS = {
    "dino64": ("dino.mp4", 10, 6_000_000, 30, 0.3),  # a cactus is coming into view; in some future the dinosaur jumps
    "push64": ("push.mp4", 6, 12_000_000, 26, 0.1),  # the arm is on its way
}
GANS = {"dvdgan": 2_000_000, "dvdgan-push": 3_000_000}  # name: largest folder in bytes


@pytest.fixture(scope="module", params=sorted(MODELS))
def shipped(request):
    example, start, *limits = MODELS[request.param]
    window = read_video(EXAMPLES / example, start, 16)[0].movedim(-1, 1).float().div(255)  # [T, 3, H, W]
    return request.param, fastvid.load(request.param), window, *limits


def test_all_are_listed():
    assert fastvid.list_models() == sorted([*MODELS, *GANS])


def test_it_is_small(shipped):
    name, _, _, largest, *_ = shipped
    assert sum(path.stat().st_size for path in (SHIPPED / name).iterdir()) <= largest
    assert json.loads((SHIPPED / name / "config.json").read_text())["size"] == [64, 64]


@torch.no_grad()
def test_it_reconstructs_the_example(shipped):
    _, model, window, _, least, _ = shipped
    video = window.transpose(0, 1).unsqueeze(0)
    error = (model.vqvae.decode(*model.vqvae.encode(video)) - video).square().mean()
    assert -10 * torch.log10(error) > least


def test_its_futures_are_nearer_to_the_truth_than_standing_still(shipped):
    _, model, window, *_, lively = shipped
    future = model.predict(window[None, :4], n=12, samples=4, seed=0)[0]  # [S, 12, 3, H, W]
    truth = window[4:]
    best = max(float(ssim(sample, truth).mean()) for sample in future)
    assert best > float(ssim(window[3].expand_as(truth), truth).mean())
    steps = (future[:, 1:] - future[:, :-1]).abs().amax(dim=(-3, -2, -1))  # [S, 11]
    assert steps.amin(dim=1).max() > lively


@pytest.mark.parametrize("name", sorted(GANS))
def test_the_small_gans_are_small(name):
    assert sum(path.stat().st_size for path in (SHIPPED / name).iterdir()) <= GANS[name]


def test_the_generator_draws_moving_strokes_on_black():
    videos = fastvid.load("dvdgan").sample(10, list(range(10)), seed=1)  # [10, 12, 3, 32, 32]
    assert videos.mean() < 0.25 and (videos.amax(dim=(1, 2, 3, 4)) > 0.7).all()
    assert (videos.amax(dim=2) - videos.amin(dim=2)).mean() < 0.05  # grey, as the digits are
    moved = (videos[:, 1:] - videos[:, :-1]).abs().amax(dim=(2, 3, 4))  # [10, 11]
    assert (moved.amax(dim=1) > 0.3).all()


def test_the_frame_predictor_is_nearer_to_the_truth_than_an_untrained_one():
    frames = read_video(EXAMPLES / "push.mp4", 6, 16, (32, 32))[0].movedim(-1, 1).float().div(255)  # [16, 3, 32, 32]
    model = fastvid.load("dvdgan-push")
    torch.manual_seed(0)
    errors = [
        (one.predict(frames[None, :4], n=12, seed=1)[0, 0] - frames[4:]).square().mean()
        for one in (model, DVDGANPredictor(model.config).eval())
    ]
    assert errors[0] < errors[1] / 3
