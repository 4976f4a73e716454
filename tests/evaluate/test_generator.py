"""A generator's clips against held-out ones, and a frame predictor without codes; I3D's place is taken by means."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dvdgan_folders import save_dvdgan

import fastvid
from fastvid.data.video import read_video, write_video
from fastvid.errors import DataError, UsageError, WeightsError
from fastvid.evaluate import evaluate, extract, generator, protocol_line, table, tally
from fastvid.metrics.frechet import frechet_from_features
from fastvid.metrics.i3d import I3DOutput
from fastvid.models import DVDGANGenerator, DVDGANPredictor
from fastvid.train.ranks import Ranks
from fastvid.weights import Weights

SIDE, FRAMES = 16, 12
NAMES = ("Archery", "Fencing")


class Means:
    """Stands for I3D: features that are means over parts of the clip, so that their distances are known."""

    seen = 0

    @classmethod
    def from_tensors(cls, tensors):
        return cls()

    @staticmethod
    def features(network, video, resize):
        Means.seen += len(video)
        means = torch.nn.functional.adaptive_avg_pool3d(video, (4, 10, 10)).flatten(1)  # [n, 1200]
        return I3DOutput(means[:, :1024], means[:, -400:])


@pytest.fixture(autouse=True)
def judged(monkeypatch, tmp_path) -> Path:
    """The cache of the test's own."""
    kinds = {"i3d": "FVD", "i3d_other": "another extractor", "lpips_alex": "LPIPS"}
    known = {kind: Weights(kind, {}, kind[0] * 64, metric) for kind, metric in kinds.items()}
    monkeypatch.setattr(tally, "load_weights", known.__getitem__)
    monkeypatch.setattr(extract.network, "I3D", Means)
    monkeypatch.setattr(extract.network, "features", Means.features)
    difference = SimpleNamespace(from_tensors=lambda net, tensors: lambda a, b: (a - b).abs().mean(dim=(-3, -2, -1)))
    monkeypatch.setattr(tally, "LPIPS", difference)
    Means.seen = 0
    return tmp_path / "cache"


def moving(frames: int, seed: int) -> torch.Tensor:
    """A square that drifts over noise. uint8 [T, H, W, 3]."""
    video = torch.randint(0, 120, (1, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(seed))
    video = video.repeat(frames, 1, 1, 1)
    for t in range(frames):
        video[t, (seed + t) % 10 : (seed + t) % 10 + 5, 4:9] = 230
    return video.to(torch.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """As UCF-101: of one class two clips are held out, of another three, of a third, which no model has, one."""
    root = tmp_path_factory.mktemp("ucf")
    held = [("Archery", 1), ("Archery", 2), ("Fencing", 1), ("Fencing", 2), ("Fencing", 3), ("Golf", 1)]
    trained = [(name, group) for name in ("Archery", "Fencing", "Golf") for group in (8, 9, 10, 11)]
    (root / "lists").mkdir()
    for seed, (name, group) in enumerate([*held, *trained]):
        (root / name).mkdir(exist_ok=True)
        write_video(root / name / f"v_{name}_g{group:02}_c01.mp4", moving(14, seed), lossless=True)
    lists = root / "ucfTrainTestlist"
    (root / "lists").rename(lists)
    lines = {part: [f"{name}/v_{name}_g{group:02}_c01.avi" for name, group in clips]
             for part, clips in (("test", held), ("train", trained))}  # fmt: skip
    (lists / "testlist01.txt").write_text("\n".join(lines["test"]) + "\n")
    (lists / "trainlist01.txt").write_text("".join(f"{line} {1 + i // 4}\n" for i, line in enumerate(lines["train"])))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "run" / "model"
    save_dvdgan(folder, classes=2, class_names=NAMES, frames=FRAMES)
    return folder.parent


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> Path:
    return save_dvdgan(tmp_path_factory.mktemp("model") / "fp", "tiny-fp", frames=8)


def values(result: dict) -> dict[str, float]:
    return {name: figure["value"] for name, figure in result["figures"].items()}


def held_clips() -> list[torch.Tensor]:
    """Those of the model's classes, in the order of the list."""
    return [moving(14, seed)[:FRAMES] for seed in range(5)]


def features(clips: list[torch.Tensor]) -> I3DOutput:
    return Means.features(None, torch.stack(clips).float().div(255).movedim(-1, 1), "tf1")


def test_every_figure_of_a_generator(model, data, judged, tmp_path, monkeypatch):
    monkeypatch.setattr("fastvid.evaluate.figure.LEAST_CLIPS", 5)
    monkeypatch.setattr("fastvid.evaluate.report.LEAST_CLIPS", 5)
    result = evaluate(model, str(data), clips=5, json_file=tmp_path / "f.json", sheet=tmp_path / "s.png", cache=judged)
    assert json.loads((tmp_path / "f.json").read_text()) == result
    sets = ("model", "untrained", "noise", "train")
    names = {f"{metric}_{who}" for metric in ("fvd", "fid_i3d400", "is_i3d400") for who in sets} | {"is_i3d400_real"}
    assert set(result["figures"]) == names and result["missing"] == {} and result["kind"] == "generator"
    assert {figure["n"] for figure in result["figures"].values()} == {5}
    for name, figure in result["figures"].items():
        assert figure["low"] is None if name.startswith("is_") else figure["low"] <= figure["value"] <= figure["high"]
    protocol = result["protocol"]
    said = {"windows": 5, "clips": 5, "frames": FRAMES, "stride": 1, "size": [SIDE, SIDE], "seed": 0, "truncation": 1.0,
            "classes": "2, each as often as in the windows", "intervals": "95%, bootstrap over 5 clips",
            "train": "5 windows of the train split, of the same classes"}  # fmt: skip
    assert said.items() <= protocol.items() and "5 clips for the 400 features of FVD" in protocol["warning"]
    text = table(result)
    assert protocol_line(protocol) in text and "untrained model" in text and "training clips" in text
    assert all(f"{values(result)[f'fvd_{who}']:.4g}" in text for who in sets) and "FVD*" not in text
    sheet, _ = read_video(tmp_path / "s.png")
    assert (sheet.shape[1] - 1) % 10 == 0 and (sheet.shape[2] - 1) % FRAMES == 0  # real and generated in turn


def test_distances_are_those_of_the_model_s_samples(model, data, judged):
    found = values(evaluate(model, str(data), clips=5, seed=3, cache=judged, truncation=0.8))
    made = fastvid.load(model).sample(5, [0, 0, 1, 1, 1], 3, 0.8)
    made = [clip.mul(255).round().to(torch.uint8).movedim(1, -1) for clip in made]
    real, other = features(held_clips()), features(made)
    assert found["fvd_model"] == pytest.approx(frechet_from_features(real.logits, other.logits), rel=1e-5)
    assert found["fid_i3d400_model"] == pytest.approx(frechet_from_features(real.pooled, other.pooled), rel=1e-5)


def test_a_generator_of_the_real_clips_is_at_no_distance(model, data, judged, monkeypatch):
    def replay(self, n, labels, seed, truncation, numbers):
        assert labels == [0, 0, 1, 1, 1] and list(numbers) == [0, 1, 2, 3, 4]
        return torch.stack(held_clips()).movedim(-1, 2).float() / 255

    monkeypatch.setattr(DVDGANGenerator, "sample", replay)
    found = values(evaluate(model, str(data), clips=5, cache=judged))
    assert found["fvd_model"] == pytest.approx(0, abs=1e-9) and found["is_i3d400_model"] == found["is_i3d400_real"]
    assert found["fvd_noise"] > found["fvd_train"] > 0.01


def test_classes_are_mixed_as_the_windows_are(model, data):
    sets = generator.choose_sets(fastvid.load(model), str(data), 5, 0, 1)
    assert sets.labels == [0, 0, 1, 1, 1] and not sets.why
    clips = sets.trained.windows.clips
    assert Counter(clips.labels[clip] for clip, _ in sets.trained.places) == {"Archery": 2, "Fencing": 3}
    few = generator.choose_sets(fastvid.load(model), str(data), 4, 0, 1)
    assert len(few.labels) == 4 == len(few.trained.places)


def test_same_seed_same_figures_and_features_are_computed_once(model, data, judged):
    first = evaluate(model, str(data), clips=5, seed=1, cache=judged)
    assert Means.seen == 25  # real, model, untrained, noise, train
    assert evaluate(model, str(data), clips=5, seed=1, cache=judged) == first and Means.seen == 25
    other = values(evaluate(model, str(data), clips=5, seed=2, cache=judged))
    for who in ("model", "untrained", "noise"):
        assert other[f"fvd_{who}"] != values(first)[f"fvd_{who}"]
    assert other["fvd_train"] == values(first)["fvd_train"]


def test_data_without_classes_or_split(tmp_path, model, judged):
    clips = tmp_path / "clips"
    clips.mkdir()
    for seed in range(4):
        write_video(clips / f"{seed}.mp4", moving(23, seed), lossless=True)
    with pytest.raises(DataError, match="the model draws classes, which these data do not have"):
        evaluate(model, str(clips), clips=4, cache=judged)
    plain = save_dvdgan(tmp_path / "plain", frames=FRAMES)
    result = evaluate(plain, str(clips), clips=4, cache=judged)
    assert result["protocol"]["classes"] == "none" and "fvd_train" not in result["figures"]
    assert result["missing"] == {"train": "the data have no train split of their own"}
    assert "training clips" not in table(result) and "not measured: train: the data have no train" in table(result)
    strided = evaluate(plain, str(clips), clips=4, cache=judged, frame_step=2)
    assert strided["protocol"]["stride"] == 2 and strided["protocol"]["frames"] == FRAMES
    real = features([moving(23, seed)[::2] for seed in range(4)])
    made = fastvid.load(plain).sample(4).mul(255).round().to(torch.uint8).movedim(2, -1)
    distance = frechet_from_features(real.logits, features(list(made)).logits)
    assert values(strided)["fvd_model"] == pytest.approx(distance, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metrics": ("fvd", "ssim", "bits")}, "--metrics ssim,bits: a generated clip has no truth beside it"),
        ({"truncation": 0}, "--truncation must be a finite number above 0, got 0"),
        ({"frame_step": 0}, "--frame-step must be at least 1, got 0"),
        ({"clips": 1}, "--clips must be at least 2 for a distance between sets, got 1"),
    ],
)
def test_what_a_generator_cannot_be_asked(model, data, options, words):
    with pytest.raises(UsageError, match=words):
        evaluate(model, str(data), **{"clips": 5, "cache": None, **options})


def test_short_clips_and_other_classes(data, tmp_path):
    with pytest.raises(UsageError, match="FVD needs 9 frames; this generator makes 4"):
        evaluate(save_dvdgan(tmp_path / "short"), str(data), clips=3)
    named = save_dvdgan(tmp_path / "named", classes=1, class_names=("Juggling",), frames=FRAMES)
    with pytest.raises(DataError, match="no clip is of the model's classes, Juggling"):
        evaluate(named, str(data), clips=3)
    unnamed = save_dvdgan(tmp_path / "unnamed", classes=2, frames=FRAMES)
    with pytest.raises(UsageError, match="does not name its classes"):
        evaluate(unnamed, str(data), clips=3)


def test_without_weights_a_generator_is_not_measured(model, data, monkeypatch):
    def missing(kind):
        raise WeightsError("get them with fastvid weights add")

    monkeypatch.setattr(tally, "load_weights", missing)
    with pytest.raises(WeightsError, match="fastvid weights add"):
        evaluate(model, str(data), clips=5)


class Rank(Ranks):
    """One process of two that take turns: each leaves its share, the last one finds them all."""

    shares: list = []

    def __init__(self, rank: int):
        self.rank, self.world = rank, 2

    def gather(self, mine):
        Rank.shares.append(mine)
        return Rank.shares


def test_processes_share_the_work_and_agree(model, data, monkeypatch):
    loaded = fastvid.load(model)
    sets, extractor = generator.choose_sets(loaded, str(data), 5, 0, 1), extract.Extractor(
        tally.load_weights("i3d"), "tf1", None
    )
    monkeypatch.setattr(generator, "AT_ONCE", 2)  # three parts of five clips
    alone = generator.compare(loaded, sets, extractor, 0, 1.0, Ranks())
    Rank.shares = []
    with pytest.raises(KeyError, match="0"):
        generator.compare(loaded, sets, extractor, 0, 1.0, Rank(1))
    together = generator.compare(loaded, sets, extractor, 0, 1.0, Rank(0))
    assert [sorted(share) for share in Rank.shares] == [[1], [0, 2]]
    assert all(torch.equal(together[0][name], value) for name, value in alone[0].items())
    assert alone[0].keys() == together[0].keys() and len(alone[2]) == 10


def test_a_frame_predictor_has_all_figures_but_those_of_codes(predictor, data, judged, tmp_path):
    result = evaluate(predictor, str(data), clips=5, samples=2, cache=judged, sheet=tmp_path / "s.png")
    beside = ("repeat", "untrained", "noise")
    likeness = {f"{metric}_{who}" for metric in ("psnr", "ssim") for who in ("best", "mean", "wins", *beside)}
    distances = {f"{metric}_{who}" for metric in ("fvd", "fid_i3d400", "is_i3d400") for who in ("model", *beside)}
    assert likeness | distances | {"is_i3d400_real"} == set(result["figures"])
    assert result["kind"] == "frame predictor" and result["missing"]["bits"] == "the model draws no codes"
    assert "31 pixels a side" in result["missing"]["lpips"]
    protocol = result["protocol"]
    assert {"frames": 12, "given": 4, "predicted": 8, "samples": 2}.items() <= protocol.items()
    assert "FVD*" not in table(result) and "codes by themselves" not in table(result)
    assert {name: len(curve) for name, curve in result["curves"].items()}["psnr"] == 8
    sheet, _ = read_video(tmp_path / "s.png")
    assert (sheet.shape[1] - 1) % 12 == 0  # truth and two samples of each of four windows
    with pytest.raises(UsageError, match="--metrics bits: the model draws no codes; leave it out"):
        evaluate(predictor, str(data), clips=5, metrics=("bits",))
    with pytest.raises(UsageError, match="--truncation is for generators"):
        evaluate(predictor, str(data), clips=5, truncation=0.5)


def test_the_truth_as_a_prediction_wins(predictor, data, monkeypatch):
    windows = {moving(14, seed)[3].float().sum().item(): moving(14, seed)[4:12] for seed in range(6)}

    def knows(self, frames, n, samples, seed):
        sums = [round(float(given[3].mul(255).sum())) for given in frames]
        future = torch.stack([windows[total] for total in sums]).movedim(-1, 2).float().div(255).unsqueeze(1)
        return torch.cat([future, torch.zeros_like(future)], dim=1)  # only the first sample is right

    monkeypatch.setattr(DVDGANPredictor, "predict", knows)
    found = values(evaluate(predictor, str(data), clips=6, samples=2, metrics=("psnr", "fvd"), cache=None))
    assert found["psnr_best"] == 100 and found["psnr_wins"] == 100 and found["psnr_mean"] < 60
    assert found["fvd_model"] == pytest.approx(0, abs=1e-9) and found["fvd_repeat"] > 0.01
