import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import fastvid
from fastvid.data.sheet import write_png
from fastvid.data.video import read_video, write_video
from fastvid.errors import DataError, FastvidError, UsageError, WeightsError
from fastvid.evaluate import choose_windows, evaluate, extract, protocol_line, table, tally, windows
from fastvid.metrics import context_free_bits
from fastvid.metrics.frechet import frechet_from_features
from fastvid.metrics.i3d import I3DOutput
from fastvid.models import VideoPredictor, build, preset
from fastvid.train.ranks import Ranks
from fastvid.weights import Weights

SIDE, K = 32, 32


@pytest.fixture(autouse=True)
def no_weights(monkeypatch, tmp_path):
    """Whatever weights this user has: with them more is measured."""
    monkeypatch.setenv("FASTVID_WEIGHTS", str(tmp_path / "no weights"))


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


class Means:
    """Stands for I3D: features that are means over parts of the clip, so that their distances are known."""

    calls = 0

    @classmethod
    def from_tensors(cls, tensors):
        return cls()

    @staticmethod
    def features(network, video, resize):
        Means.calls += len(video)
        means = torch.nn.functional.adaptive_avg_pool3d(video, (4, 10, 10)).flatten(1)  # [n, 1200]
        return I3DOutput(means[:, :1024], means[:, -400:])


@pytest.fixture
def judged(monkeypatch, tmp_path):
    """I3D's place is taken by Means, LPIPS's by a mean absolute difference; the cache is the test's own."""
    tensors = {"i3d": "FVD", "i3d_other": "another extractor", "lpips_alex": "LPIPS"}
    known = {kind: Weights(kind, {}, kind[0] * 64, metric) for kind, metric in tensors.items()}
    monkeypatch.setattr(tally, "load_weights", known.__getitem__)
    monkeypatch.setattr(extract.network, "I3D", Means)
    monkeypatch.setattr(extract.network, "features", Means.features)
    difference = SimpleNamespace(from_tensors=lambda net, tensors: lambda a, b: (a - b).abs().mean(dim=(-3, -2, -1)))
    monkeypatch.setattr(tally, "LPIPS", difference)
    Means.calls = 0
    return tmp_path / "cache"


def values(result: dict) -> dict[str, float]:
    return {name: figure["value"] for name, figure in result["figures"].items()}


def test_every_figure_with_its_number_and_interval(model, data, tmp_path, judged, monkeypatch):
    monkeypatch.setattr("fastvid.evaluate.figure.LEAST_CLIPS", 5)
    monkeypatch.setattr("fastvid.evaluate.report.LEAST_CLIPS", 5)
    result = evaluate(
        model, str(data), clips=5, samples=3, json_file=tmp_path / "f.json", sheet=tmp_path / "s.png", cache=judged
    )
    assert json.loads((tmp_path / "f.json").read_text()) == result
    assert {figure["n"] for figure in result["figures"].values()} == {5}
    plain = ("perplexity", "used", "oracle_bits", "copy_error")
    for name, figure in result["figures"].items():
        if name.endswith(plain) or name.startswith("is_"):
            assert figure["low"] is None, name
        else:
            assert figure["low"] <= figure["value"] <= figure["high"], name
    contestants = ("model", "repeat", "marginal", "reconstruction")
    likeness = {f"{metric}_{who}" for metric in ("psnr", "ssim", "lpips") for who in ("best", "mean", *contestants[1:])}
    distances = {f"{metric}_{who}" for metric in ("fvd", "fid_i3d400", "is_i3d400") for who in contestants}
    bits = {f"{level}_{name}" for level in ("top", "bottom") for name in ("bits", "copy_bits", "perplexity", "used")}
    alone = {"psnr_rebuilt", "fvd_star_model", "fvd_star_repeat", "fvd_star_marginal", "is_i3d400_real", "psnr_wins"}
    assert likeness | distances | bits | alone <= set(result["figures"]) and not result["missing"]
    assert {name: len(curve) for name, curve in result["curves"].items()} == {"psnr": 12, "ssim": 12, "lpips": 12}
    for name, curve in result["curves"].items():
        assert np.mean(curve) == pytest.approx(result["figures"][f"{name}_best"]["value"])
    sheet_and_table(result, tmp_path)


def sheet_and_table(result, tmp_path):
    protocol = result["protocol"]
    said = {"windows": 5, "clips": 5, "skipped": 0, "frames": 16, "given": 4, "stride": 1, "size": [SIDE, SIDE],
            "samples": 3, "seed": 0}  # fmt: skip
    assert said.items() <= protocol.items()
    assert protocol["extractor"] == f"i3d, sha256 {'i' * 64}" and protocol["resize"].startswith("tf1")
    assert protocol["baselines_fitted_on"] == "30 windows of the train split"
    assert protocol["intervals"] == "95%, bootstrap over 5 clips"
    assert "5 clips for the 400 features" in protocol["warning"]
    text = table(result)
    assert protocol_line(protocol) in text and "FVD*" in text and "best of 3" in text and "repeat frame 4" in text
    for name in ("psnr_best", "fvd_model", "top_bits", "code_bits_per_dim"):
        assert f"{result['figures'][name]['value']:.4g}" in text
    sheet, _ = read_video(tmp_path / "s.png")
    assert (sheet.shape[1] - 1) % 12 == 0  # truth and two samples of each of four windows


def test_frames_against_scikit_image(model, data):
    found = values(evaluate(model, str(data), clips=5, samples=2, metrics=("psnr", "ssim")))
    rebuilt = []
    predictor = fastvid.load(model)
    errors, dB, alike = [], [], []
    for seed in range(5):
        clip = moving(20, seed)[:16]
        video = clip.movedim(-1, 0)[None].float() / 255
        with torch.no_grad():
            made = predictor.vqvae.decode(*predictor.vqvae.encode(video))
        errors.append(float((made - video).double().square().mean()))
        made = made[0, :, 4:].clamp(0, 1).movedim(0, -1).numpy()
        rebuilt.append(np.mean([peak_signal_noise_ratio(*pair, data_range=1) for pair in
                                zip(clip[4:].numpy().astype(np.float32) / 255, made, strict=True)]))  # fmt: skip
        last, truth = clip[3].numpy() / 255, clip[4:].numpy() / 255
        dB.append(np.mean([peak_signal_noise_ratio(frame, last, data_range=1) for frame in truth]))
        maps = [structural_similarity(frame, last, channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5,
                                      use_sample_covariance=False, full=True)[1] for frame in truth]  # fmt: skip
        alike.append(np.mean([m[5:-5, 5:-5] for m in maps]))
    assert found["psnr_rebuilt"] == pytest.approx(-10 * math.log10(np.mean(errors)), abs=1e-3)
    assert found["psnr_rebuilt_per_clip"] == pytest.approx(np.mean(-10 * np.log10(errors)), abs=1e-3)
    assert found["psnr_repeat"] == pytest.approx(np.mean(dB), abs=1e-4)
    assert found["psnr_reconstruction"] == pytest.approx(np.mean(rebuilt), abs=1e-3)
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
    assert not any(name.startswith(("ssim", "psnr", "lpips", "fvd")) for name in found)


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
    def knows(self, frames, n, samples, seed, weights):
        truth = {tuple(moving(20, s)[3, 0, :9, 0].tolist()): moving(20, s)[4:16] for s in range(5)}
        rows = [truth[tuple((given[3, 0, 0, :9] * 255).round().long().tolist())] for given in frames]
        future = torch.stack(rows).movedim(-1, 2).float().div(255).unsqueeze(1).repeat(1, len(samples[0]), 1, 1, 1, 1)
        future[:, 1:] = 0  # only the first sample is right
        return future

    monkeypatch.setattr(VideoPredictor, "predict", knows)
    found = values(evaluate(model, str(data), clips=5, samples=4, metrics=("psnr", "ssim")))
    assert found["psnr_best"] == 100 and found["ssim_best"] == pytest.approx(1, abs=1e-9)
    assert found["psnr_wins"] == found["ssim_wins"] == 100
    assert found["ssim_mean"] < 0.5


def test_a_still_clip_is_repeated_without_error(model, tmp_path):
    write_video(tmp_path / "still.mp4", moving(1, 0).expand(16, -1, -1, -1), lossless=True)
    result = evaluate(model, str(tmp_path), clips=1, samples=1, metrics=("psnr", "ssim", "bits"))
    found = values(result)
    assert found["psnr_repeat"] == 100 and found["ssim_repeat"] == pytest.approx(1)
    assert found["psnr_wins"] == 0
    assert result["figures"]["ssim_best"]["low"] is None
    assert result["protocol"]["intervals"] == "none, there are 1 clips"
    assert "the measured windows themselves" in result["protocol"]["baselines_fitted_on"]
    # drawn from the only window there is, codes by themselves are its own codes, behind those of the given frames
    assert found["psnr_marginal"] == pytest.approx(found["psnr_reconstruction"], abs=1e-3)


def test_same_seed_same_figures(model, data):
    results = [evaluate(model, str(data), clips=4, samples=2, seed=s, metrics=("ssim", "bits")) for s in (1, 1, 2)]
    assert results[0] == results[1]
    assert values(results[0])["ssim_best"] != values(results[2])["ssim_best"]


def test_one_window_per_clip_where_there_are_enough():
    assert choose_windows([20, 16, 15, 40], 16, 3, 0)[0] == [(0, 0), (1, 0), (3, 0)]
    # sets are listed class by class
    places, how = choose_windows([16] * 10 + [3] + [16] * 10, 16, 4, 0)
    assert places == [(0, 0), (5, 0), (11, 0), (16, 0)] and "4 of 20 evenly spread" in how


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
        ({"clips": 0}, "--clips must be from 1 to 65536, got 0"),
        ({"samples": -1}, "--samples must be from 1 to 65536, got -1"),
        ({"seed": -1}, "--seed must lie in"),
        ({"metrics": ("ssim", "mse")}, "--metrics must name some of psnr,ssim,lpips,fvd,bits, got ssim,mse"),
        ({"metrics": ()}, "got none"),
        ({"extractor": "lpips_alex"}, "--extractor must be i3d or i3d_other, got lpips_alex"),
        ({"resize": "area"}, "--resize must be tf1 or torch, got area"),
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
    with pytest.raises(FastvidError, match="no split 'test'"):
        evaluate(model, str(tmp_path))


def test_distances_are_those_of_the_features(model, data, judged):
    found = values(evaluate(model, str(data), clips=5, samples=1, metrics=("fvd",), cache=judged))
    real = torch.stack([moving(20, seed)[:16] for seed in range(5)])
    still = torch.cat([real[:, :4], real[:, 3:4].expand(-1, 12, -1, -1, -1)], dim=1)
    a, b = (Means.features(None, clips.float().div(255).movedim(-1, 1), "tf1") for clips in (real, still))
    assert found["fvd_repeat"] == pytest.approx(frechet_from_features(a.logits, b.logits), rel=1e-6)
    assert found["fid_i3d400_repeat"] == pytest.approx(frechet_from_features(a.pooled, b.pooled), rel=1e-6)
    assert found["fvd_star_model"] != found["fvd_model"] > 0


def test_features_are_computed_once(model, data, judged):
    first = evaluate(model, str(data), clips=2, samples=1, metrics=("fvd",), cache=judged)
    assert Means.calls == 10  # real, model, repeat, marginal, reconstruction
    again = evaluate(model, str(data), clips=2, samples=1, metrics=("fvd",), cache=judged)
    assert Means.calls == 10 and again == first
    kept = sorted(judged.rglob("*.features"))
    assert len(kept) == 10
    kept[0].write_bytes(kept[0].read_bytes()[:-40])
    kept[1].write_bytes(bytes([kept[1].read_bytes()[0] ^ 1]) + kept[1].read_bytes()[1:])
    assert evaluate(model, str(data), clips=2, samples=1, metrics=("fvd",), cache=judged) == first
    assert Means.calls == 12
    evaluate(model, str(data), clips=2, samples=1, metrics=("fvd",), cache=judged, resize="torch")
    assert Means.calls == 22  # another resize is another feature
    evaluate(model, str(data), clips=2, samples=1, metrics=("fvd",), cache=None)
    assert Means.calls == 32


def test_windows_that_a_metric_cannot_judge(model, data, judged, tmp_path):
    write_video(tmp_path / "one.mp4", moving(16, 0), lossless=True)
    result = evaluate(model, str(tmp_path / "one.mp4"), clips=1, samples=1, cache=judged)
    assert result["missing"] == {"fvd": "a distance between sets needs two windows"}
    assert "lpips_best" in result["figures"]
    with pytest.raises(UsageError, match="--metrics fvd: a distance between sets needs two windows; leave it out"):
        evaluate(model, str(tmp_path / "one.mp4"), clips=1, samples=1, metrics=("fvd",), cache=judged)
    left = tally.judges(("ssim", "lpips", "psnr"), "i3d", "tf1", None)
    tally.leave_out(left, False, 5, 16, (16, 24))
    assert left.metrics == ("ssim", "psnr") and "31 pixels a side, the model's are 24x16" in left.missing["lpips"]


def test_every_window_has_noise_of_its_own(model, tmp_path):
    """Two clips of the same pixels: with shared noise their futures would be one."""
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", moving(16, 0), lossless=True)
    predictor, judged = fastvid.load(model), tally.judges(("psnr",), "i3d", "tf1", None)
    held = windows.held_out(predictor, str(tmp_path), "test", 2, 0)
    fit = windows.encoded(predictor, held, Ranks())
    found = tally.measure(predictor, held, fit, judged, 2, 0, Ranks()).values
    assert found["psnr_repeat"][0] == found["psnr_repeat"][1] and found["psnr_mean"][0] != found["psnr_mean"][1]
    assert found["psnr_marginal"][0] == found["psnr_marginal"][1]  # both windows are fitted to hold the same codes


def test_a_clip_that_cannot_be_read_is_left_out(model, tmp_path):
    for i in range(21):
        for t, frame in enumerate(moving(16, i)):
            write_png(tmp_path / f"{i:02}" / f"{t:02}.png", frame)
    bad = tmp_path / "07" / "09.png"
    bad.write_bytes(bad.read_bytes()[:500])
    with pytest.warns(UserWarning, match="09.png"):
        result = evaluate(model, str(tmp_path), clips=21, metrics=("bits",))
    assert result["protocol"]["windows"] == 20 and result["protocol"]["skipped"] == 1


def test_another_network_is_never_called_fvd(model, data, judged):
    result = evaluate(
        model, str(data), clips=3, samples=1, metrics=("fvd",), cache=judged, extractor="i3d_other"
    )
    assert not any(name.startswith(("fvd", "fid", "is_")) for name in result["figures"])
    assert {"frechet_other_model", "frechet_other_star_repeat"} <= set(result["figures"])
    assert "not FVD" in table(result) and "FVD," not in table(result)


def test_missing_weights_are_said_or_refused(model, data):
    result = evaluate(model, str(data), clips=2, samples=1)
    assert set(result["missing"]) == {"lpips", "fvd"} and "psnr_best" in result["figures"]
    assert "not measured: fvd: " in table(result) and "fastvid weights add" in table(result)
    for name in ("lpips", "fvd"):
        with pytest.raises(WeightsError, match="fastvid weights add"):
            evaluate(model, str(data), clips=2, samples=1, metrics=(name,))


class Rank(Ranks):
    """One process of two that take turns: each leaves its share, the last one finds them all."""

    shares: list = []

    def __init__(self, rank: int):
        self.rank, self.world = rank, 2

    def gather(self, mine):
        Rank.shares.append(mine)
        return Rank.shares


def test_processes_share_the_work_and_agree(model, data, monkeypatch):
    monkeypatch.setattr(tally, "ROWS_AT_ONCE", 2)  # three parts of five windows
    predictor, judged = fastvid.load(model), tally.judges(("psnr", "bits"), "i3d", "tf1", None)
    held = windows.held_out(predictor, str(data), "test", 5, 0)
    fit = windows.encoded(predictor, held, Ranks())
    alone = tally.measure(predictor, held, fit, judged, 1, 0, Ranks())
    Rank.shares = []
    with pytest.raises(KeyError, match="0"):  # the second process alone has no first part
        tally.measure(predictor, held, fit, judged, 1, 0, Rank(1))
    together = tally.measure(predictor, held, fit, judged, 1, 0, Rank(0))
    assert [sorted(share) for share in Rank.shares] == [[1], [0, 2]]
    assert together.values.keys() == alone.values.keys()
    for name, value in alone.values.items():
        assert torch.equal(together.values[name], value), name
    assert torch.equal(together.codes.top, alone.codes.top)
    assert all(torch.equal(a, b) for a, b in zip(together.rows, alone.rows, strict=True))
