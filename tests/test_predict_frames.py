"""fastvid predict with a model that generates frames at once and draws no codes."""

import json
from pathlib import Path

import pytest
import torch
from dvdgan_folders import save_dvdgan

import fastvid
from fastvid.data.source import read_clip
from fastvid.data.video import frame_hash, read_video, write_video
from fastvid.errors import UsageError, VideoError
from fastvid.models import DVDGANPredictor
from fastvid.predict import predict_clips

SIDE = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """It takes five frames and makes seven at once."""
    return save_dvdgan(tmp_path_factory.mktemp("model") / "fp", "tiny-fp", given=5, frames=7)


@pytest.fixture
def clip(tmp_path) -> Path:
    video = torch.randint(0, 256, (20, 24, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_video(tmp_path / "clip.mp4", video, 25, lossless=True)
    return tmp_path / "clip.mp4"


def hashes(video: torch.Tensor) -> list[str]:
    """Of samples [S, n, 3, H, W] in [0, 1]."""
    return [frame_hash(one.mul(255).round().to(torch.uint8).movedim(1, -1)) for one in video]


def test_the_outputs_are_those_of_any_model_without_codes(clip, model, tmp_path, capsys):
    out = tmp_path / "out"
    (report,) = predict_clips([clip], model, frames=10, samples=2, seed=3, temperature=0.8, out=out, start=2)
    names = {"clip.json", "clip_contact.png", "clip_sample0.mp4", "clip_sample1.mp4"}
    assert {path.name for path in out.iterdir()} == names
    assert json.loads((out / "clip.json").read_text()) == report
    assert not {"codes", "codes_per_second", "passes_per_code", "near_ties", "drift"} & set(report)
    assert report["given_frames"] == [2, 6] and report["true_frames_known"] == 10
    assert list(report["seconds"]) == ["generate"] and report["seconds"]["generate"] > 0
    given = read_clip(clip, "clip", (SIDE, SIDE), 10, 2, 5).given
    made = fastvid.load(model).predict(given[None].movedim(-1, 2) / 255, 10, 2, 3, 0.8)[0]
    assert report["samples"] == [
        {"file": f"clip_sample{k}.mp4", "frame_hash": digest} for k, digest in enumerate(hashes(made))
    ]
    video, _ = read_video(out / "clip_sample0.mp4")
    assert len(video) == 15
    sheet, _ = read_video(out / "clip_contact.png")
    assert (sheet.shape[1] - 1) % 3 == 0 and (sheet.shape[2] - 1) % 15 == 0  # the truth and two samples
    said = capsys.readouterr().out
    assert "10 frames x 2 samples in" in said and "frames/s" in said and "codes" not in said


def test_frames_are_written_as_they_come(clip, model, tmp_path, monkeypatch):
    """Each pass is in the files before the next one is begun."""
    stream, seen = DVDGANPredictor.predict_stream, []
    monkeypatch.setattr(fastvid.predict.VideoWriter, "add", lambda writer, video: seen.append(len(video)))
    monkeypatch.setattr(fastvid.predict.VideoWriter, "__exit__", lambda writer, *_: writer._encoder.abandon())

    def watched(model, *args):
        for number, made in enumerate(stream(model, *args)):
            assert seen == [5, *[7] * number]
            yield made

    monkeypatch.setattr(DVDGANPredictor, "predict_stream", watched)
    monkeypatch.setattr(fastvid.predict.os, "replace", lambda *_: None)
    predict_clips([clip], model, frames=21, out=tmp_path / "out")
    assert seen == [5, 7, 7, 7]


def test_a_sample_does_not_depend_on_its_company(clip, model, tmp_path):
    write_video(tmp_path / "other.mp4", torch.randint(0, 256, (6, 24, 32, 3), dtype=torch.uint8))
    both = predict_clips([clip, tmp_path / "other.mp4"], model, samples=3, seed=1, out=tmp_path / "both")
    (alone,) = predict_clips([tmp_path / "other.mp4"], model, samples=1, seed=1, out=tmp_path / "alone")
    assert both[1]["samples"][0] == alone["samples"][0]
    assert len({sample["frame_hash"] for report in both for sample in report["samples"]}) == 6


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"weights": "int8"}, UsageError, "--weights int8: .* draws no codes; leave the option out"),
        ({"start": 16}, VideoError, "wanted 5 frames from frame 16 on, the file has 20"),
    ],
)
def test_what_it_cannot_do(clip, model, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        predict_clips([clip], model, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_generator_predicts_nothing(clip, tmp_path):
    folder = save_dvdgan(tmp_path / "generator")
    with pytest.raises(UsageError, match="continues none; use fastvid sample"):
        predict_clips([clip], folder, out=tmp_path / "out")
