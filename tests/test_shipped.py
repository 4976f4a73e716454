"""The models that come along: small, whole, and of use on their examples."""

import json
from pathlib import Path

import pytest
import torch

import fastvid
from fastvid.data.video import read_video
from fastvid.metrics import ssim
from fastvid.models.predictor import SHIPPED

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# name: example, its first given frame, largest folder in bytes, least PSNR of the example's reconstruction in dB,
# least change of the liveliest future from any frame to the next
MODELS = {
    "dino64": ("dino.mp4", 10, 6_000_000, 30, 0.3),  # a cactus is coming into view; in some future the dinosaur jumps
    "push64": ("push.mp4", 6, 12_000_000, 26, 0.1),  # the arm is on its way
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def shipped(request):
    example, start, *limits = MODELS[request.param]
    window = read_video(EXAMPLES / example, start, 16)[0].movedim(-1, 1).float().div(255)  # [T, 3, H, W]
    return request.param, fastvid.load(request.param), window, *limits


def test_all_are_listed():
    assert fastvid.list_models() == sorted(MODELS)


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
