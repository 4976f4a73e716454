import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import fastvid
from fastvid.data.video import read_video, write_video
from fastvid.errors import DataError, FastvidError, UsageError
from fastvid.evaluate import choose_windows, evaluate, table
from fastvid.metrics import context_free_bits
from fastvid.models import VideoPredictor, build, preset

SIDE, K = 32, 32


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny predictor whose codebooks were drawn from real features, so that many codes are in use."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    vqvae, top, bottom = (build(kind, asdict(preset(kind, "tiny"))) for kind in ("vqvae", "top", "bottom"))
    vqvae.train()
    for step in range(3):
        vqvae(torch.stack([moving(16, seed=8 * step + i) for i in range(8)]).movedim(-1, 1).float() / 255)
    VideoPredictor(vqvae, top, bottom, size=(SIDE, SIDE)).save(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Five test and six training clips of 20 frames, kept without loss."""
    folder = tmp_path_factory.mktemp("data")
    for split, seeds in (("test", range(5)), ("train", range(100, 106))):
        (folder / split).mkdir()
        for seed in seeds:
            write_video(folder / split / f"{seed}.mp4", moving(20, seed), lossless=True)
    return folder


def moving(frames: int, seed: int) -> torch.Tensor:
    """Noise in colour under a square that drifts. uint8 [T, H, W, 3]."""
    g = torch.Generator().manual_seed(seed)
    video = torch.randint(0, 120, (1, SIDE, SIDE, 3), generator=g).expand(frames, -1, -1, -1).clone()
    video += torch.randint(0, 9, video.shape, generator=g)
    for t in range(frames):
        video[t, (seed + t) % 22 : (seed + t) % 22 + 9, 8:20] = 230
    return video.to(torch.uint8)


def values(result: dict) -> dict[str, float]:
    return {name: figure["value"] for name, figure in result["figures"].items()}


def test_every_figure_with_its_number_and_interval(model, data, tmp_path):
    result = evaluate(model, str(data), clips=5, samples=3, json_file=tmp_path / "f.json", sheet=tmp_path / "s.png")
    assert json.loads((tmp_path / "f.json").read_text()) == result
    assert {figure["n"] for figure in result["figures"].values()} == {5}
    for name, figure in result["figures"].items():
        if not name.endswith(("perplexity", "used", "oracle_bits")):  # the entropy of fewer clips is always lower
            assert figure["low"] <= figure["value"] <= figure["high"], name
    wanted = {"reconstruction_psnr", "top_bits", "bottom_bits", "top_copy_bits", "bottom_context_free_oracle_bits",
              "top_perplexity", "bottom_used", "ssim_best", "ssim_repeat", "psnr_best", "psnr_wins"}  # fmt: skip
    assert wanted <= set(result["figures"])
    protocol = result["protocol"]
    assert "5 windows of 16 frames at 32x32, one per clip from its first frame on" in protocol
    assert "Baselines of bits are fitted on 30 windows of the train split" in protocol
    assert "bootstrap over 5 clips" in protocol
    text = table(result)
    assert all(figure["label"] in text for figure in result["figures"].values()) and protocol in text
    sheet, _ = read_video(tmp_path / "s.png")
    assert (sheet.shape[1] - 1) % 12 == 0  # truth and two samples of each of four windows


def test_frames_against_scikit_image(model, data):
    found = values(evaluate(model, str(data), clips=5, samples=2, metrics=("psnr", "ssim")))
    predictor = fastvid.load(model)
    errors, dB, alike = [], [], []
    for seed in range(5):
        clip = moving(20, seed)[:16]
        video = clip.movedim(-1, 0)[None].float() / 255
        with torch.no_grad():
            made = predictor.vqvae.decode(*predictor.vqvae.encode(video))
        errors.append(float((made - video).double().square().mean()))
        last, truth = clip[3].numpy() / 255, clip[4:].numpy() / 255
        dB.append(np.mean([peak_signal_noise_ratio(frame, last, data_range=1) for frame in truth]))
        maps = [structural_similarity(frame, last, channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5,
                                      use_sample_covariance=False, full=True)[1] for frame in truth]  # fmt: skip
        alike.append(np.mean([m[5:-5, 5:-5] for m in maps]))
    assert found["reconstruction_psnr"] == pytest.approx(-10 * math.log10(np.mean(errors)), abs=1e-3)
    assert found["reconstruction_psnr_per_clip"] == pytest.approx(np.mean(-10 * np.log10(errors)), abs=1e-3)
    assert found["psnr_repeat"] == pytest.approx(np.mean(dB), abs=1e-4)
    assert found["ssim_repeat"] == pytest.approx(np.mean(alike), abs=1e-6)


def test_a_prior_that_knows_nothing_pays_for_every_code(model, data, tmp_path):
    predictor = fastvid.load(model)
    for prior in (predictor.top, predictor.bottom):
        torch.nn.init.zeros_(prior.stack.head[-1].weight)
        torch.nn.init.zeros_(prior.stack.head[-1].bias)
    predictor.save(tmp_path / "ignorant")
    found = values(evaluate(tmp_path / "ignorant", str(data), clips=5, metrics=("bits",)))
    assert found["top_bits"] == pytest.approx(math.log2(K), abs=1e-6)
    assert found["bottom_bits"] == pytest.approx(math.log2(K), abs=1e-6)
    assert not any(name.startswith(("ssim", "psnr", "reconstruction")) for name in found)


def test_a_prior_that_knows_the_frequencies_pays_what_the_baseline_says(model, data, tmp_path):
    """A constant prior set to the test codes' frequencies must cost exactly the context-free oracle."""
    predictor = fastvid.load(model)
    clips = torch.stack([moving(20, seed)[:16] for seed in range(5)]).movedim(-1, 1).float() / 255
    with torch.no_grad():
        top, bottom = predictor.vqvae.encode(clips)
    for prior, future in ((predictor.top, top[:, 1:]), (predictor.bottom, bottom[:, 2:])):
        share = torch.bincount(future.flatten(), minlength=K) / future.numel()
        torch.nn.init.zeros_(prior.stack.head[-1].weight)
        prior.stack.head[-1].bias.data = share.clamp(min=1e-30).log()
    predictor.save(tmp_path / "frequent")
    found = values(evaluate(tmp_path / "frequent", str(data), clips=5, metrics=("bits",)))
    for level, future in (("top", top[:, 1:]), ("bottom", bottom[:, 2:])):
        oracle = context_free_bits(future, future, K).oracle
        assert oracle > 0.5, "too few codes in use for this test to mean anything"
        assert found[f"{level}_bits"] == pytest.approx(oracle, abs=1e-4)
        assert found[f"{level}_context_free_oracle_bits"] == pytest.approx(oracle, abs=1e-9)
        assert found[f"{level}_context_free_fitted_bits"] > oracle


def test_the_truth_as_a_prediction_wins(model, data, monkeypatch):
    def knows(self, frames, n, samples, seed):
        truth = {tuple(moving(20, s)[3, 0, :9, 0].tolist()): moving(20, s)[4:16] for s in range(5)}
        rows = [truth[tuple((given[3, 0, 0, :9] * 255).round().long().tolist())] for given in frames]
        future = torch.stack(rows).movedim(-1, 2).float().div(255).unsqueeze(1).repeat(1, samples, 1, 1, 1, 1)
        future[:, 1:] = 0  # only the first sample is right
        return future

    monkeypatch.setattr(VideoPredictor, "predict", knows)
    found = values(evaluate(model, str(data), clips=5, samples=4, metrics=("psnr", "ssim")))
    assert found["psnr_best"] == 100 and found["ssim_best"] == pytest.approx(1, abs=1e-9)
    assert found["psnr_wins"] == found["ssim_wins"] == 100
    assert found["ssim_mean"] < 0.5


def test_a_still_clip_is_repeated_without_error(model, tmp_path):
    write_video(tmp_path / "still.mp4", moving(1, 0).expand(16, -1, -1, -1), lossless=True)
    result = evaluate(model, str(tmp_path), clips=1, samples=1)
    found = values(result)
    assert found["psnr_repeat"] == 100 and found["ssim_repeat"] == pytest.approx(1)
    assert found["psnr_wins"] == 0
    assert result["figures"]["ssim_best"]["low"] is None and "No intervals: there is one clip." in result["protocol"]
    assert "fitted on the measured windows themselves, for want of a train split" in result["protocol"]


def test_same_seed_same_figures(model, data):
    results = [evaluate(model, str(data), clips=4, samples=2, seed=seed) for seed in (1, 1, 2)]
    assert results[0] == results[1]
    assert values(results[0])["ssim_best"] != values(results[2])["ssim_best"]


def test_one_window_per_clip_where_there_are_enough():
    assert choose_windows([20, 16, 15, 40], 16, 2, 0)[0] == [(0, 0), (1, 0)]
    assert choose_windows([20, 16, 15, 40], 16, 3, 0)[0] == [(0, 0), (1, 0), (3, 0)]


def test_too_few_clips_give_several_windows():
    apart, how = choose_windows([160, 15, 160], 16, 12, seed=0)
    assert len(set(apart)) == 12 and all(start % 16 == 0 and clip != 1 for clip, start in apart)
    assert "multiples of 16" in how and "overlap" not in how
    again, other = (choose_windows([160, 15, 160], 16, 12, seed)[0] for seed in (0, 1))
    assert again == apart != other
    close, how = choose_windows([160, 160], 16, 60, seed=0)
    assert len(set(close)) == 60 and all(start % 4 == 0 and start <= 144 for _, start in close)
    assert "multiples of 4 and overlap" in how
    everything, _ = choose_windows([20, 18], 16, 100, seed=0)
    assert everything == [*((0, s) for s in range(5)), *((1, s) for s in range(3))]


def test_no_clip_is_long_enough():
    with pytest.raises(DataError, match="wanted clips of 16 frames, the longest has 15"):
        choose_windows([3, 15], 16, 2, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clips": 0}, "--clips must be at least 1, got 0"),
        ({"samples": -1}, "--samples must be at least 1, got -1"),
        ({"seed": -1}, "--seed must lie in"),
        ({"metrics": ("ssim", "lpips")}, "--metrics must name some of psnr,ssim,bits, got ssim,lpips"),
        ({"metrics": ()}, "got none"),
        ({"metrics": ("bits",), "sheet": "s.png"}, "--sheet shows predictions"),
        ({"json_file": "nowhere/f.json"}, "nowhere/f.json: cannot be written"),
    ],
)
def test_wrong_options_are_refused_at_once(options, words, data):
    with pytest.raises(UsageError, match=words):
        evaluate("no model is loaded for this", str(data), **options)


def test_wrong_data_are_refused(model, tmp_path):
    (tmp_path / "train").mkdir()
    write_video(tmp_path / "train" / "a.mp4", moving(16, 0))
    with pytest.raises(FastvidError, match="no test/ folder"):
        evaluate(model, str(tmp_path))
