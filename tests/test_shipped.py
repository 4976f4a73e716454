"""The model that comes along: small, whole, and of use on its example."""

import json
from pathlib import Path

import pytest
import torch

import fastvid
from fastvid.data.video import read_video
from fastvid.metrics import ssim
from fastvid.models.predictor import SHIPPED

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "dino.mp4"
START = 10  # the first given frame; a cactus is coming into view


@pytest.fixture(scope="module")
def model():
    return fastvid.load("dino64")


@pytest.fixture(scope="module")
def window():
    video, _ = read_video(EXAMPLE, START, 16)
    return video.movedim(-1, 1).float().div(255)  # [T, 3, H, W]


def test_it_is_listed_and_small():
    assert "dino64" in fastvid.list_models()
    assert sum(path.stat().st_size for path in (SHIPPED / "dino64").iterdir()) <= 6_000_000
    assert json.loads((SHIPPED / "dino64" / "config.json").read_text())["size"] == [64, 64]


@torch.no_grad()
def test_it_reconstructs_the_example(model, window):
    video = window.transpose(0, 1).unsqueeze(0)
    error = (model.vqvae.decode(*model.vqvae.encode(video)) - video).square().mean()
    assert -10 * torch.log10(error) > 30


def test_its_futures_are_nearer_to_the_truth_than_standing_still(model, window):
    future = model.predict(window[None, :4], n=12, samples=4, seed=0)[0]  # [S, 12, 3, H, W]
    truth = window[4:]
    best = max(float(ssim(sample, truth).mean()) for sample in future)
    assert best > float(ssim(window[3].expand_as(truth), truth).mean())
    # in some future the cactus comes and the dinosaur jumps: no two consecutive frames are alike
    steps = (future[:, 1:] - future[:, :-1]).abs().amax(dim=(-3, -2, -1))  # [S, 11]
    assert steps.amin(dim=1).max() > 0.3
