import hashlib
import io
import json
import sys
import weakref
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import fastvid
from fastvid import backend, ops
from fastvid.checkpoint import manifest_hash
from fastvid.data import _encode
from fastvid.data.video import VideoWriter, fit_frames, frame_hash, read_video, write_video
from fastvid.errors import UsageError, VideoError
from fastvid.models import VideoPredictor, build, preset
from fastvid.predict import find_clips, predict_clips, read_clip

SIDE = 32  # pixels of the tiny preset


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny predictor with random weights, in a folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    parts = [build(kind, asdict(preset(kind, "tiny"))) for kind in ("vqvae", "top", "bottom")]
    VideoPredictor(*parts, size=(SIDE, SIDE)).save(folder)
    return folder


def moving(frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A bright square that wanders over a shaded ground. uint8 [T, H, W, 3]."""
    video = torch.zeros(frames, height, width, 3, dtype=torch.uint8)
    video[..., 0] = torch.linspace(0, 200, width).to(torch.uint8)
    video[..., 1] = torch.linspace(0, 150, height).to(torch.uint8)[:, None]
    for t in range(frames):
        y, x = (3 * t + 5 * seed) % (height * 3 // 4), (4 * t + 7 * seed) % (width * 3 // 4)
        video[t, y : y + height // 4, x : x + width // 4] = 255
    return video


@pytest.fixture
def clip(tmp_path) -> Path:
    write_video(tmp_path / "clip.mp4", moving(20, 48, 64), 25, lossless=True)
    return tmp_path / "clip.mp4"


def hashes(reports: list[dict]) -> list[list[str]]:
    return [[sample["frame_hash"] for sample in report["samples"]] for report in reports]


def test_a_phone_like_clip(tmp_path, model, capsys):
    path = tmp_path / "VID 2024.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30000, 1001))
        stream.width, stream.height, stream.pix_fmt = 1080, 607, "yuv444p"
        stream.set_display_rotation(90)
        for image in moving(9, 607, 1080).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
    out = tmp_path / "out"
    (report,) = predict_clips([path], model, samples=2, out=out)
    wanted = ["VID 2024.json", "VID 2024_contact.png", "VID 2024_sample0.mp4", "VID 2024_sample1.mp4"]
    assert sorted(p.name for p in out.iterdir()) == wanted
    assert "cropped 607x1080 to 607x607 (centre) and resized to 32x32" in capsys.readouterr().out
    whole, _ = read_video(path)
    given = fit_frames(whole, SIDE, SIDE)[0][-4:]
    for sample in report["samples"]:
        video, fps = read_video(out / sample["file"])
        assert video.shape == (16, SIDE, SIDE, 3)
        assert fps == pytest.approx(30000 / 1001, abs=1e-3)
        assert (video[:4].int() - given.int()).abs().float().mean() < 10  # H.264 keeps them nearly
    assert report["given_frames"] == [5, 8]
    sheet, _ = read_video(out / "VID 2024_contact.png")
    assert sheet.shape[1] < sheet.shape[2]


def test_the_report_says_what_was_done(clip, model, tmp_path):
    out = tmp_path / "out"
    (report,) = predict_clips([clip], model, frames=5, samples=2, seed=7, temperature=0.5, out=out, start=3)
    assert json.loads((out / "clip.json").read_text()) == report
    options = {"frames": 5, "samples": 2, "seed": 7, "temperature": 0.5, "start": 3, "weights": "auto"}
    assert report["options"] == options and report["device"] == "cpu"
    assert report["model"] == {"name": str(model), "sha256": manifest_hash(model)}
    assert report["given_frames"] == [3, 6] and report["true_frames_known"] == 5
    assert set(report["seconds"]) == {"pack", "encode", "top", "bottom", "decode"}
    assert report["codes"] == {"top": 2 * 3 * 4 * 4, "bottom": 2 * 6 * 8 * 8}
    for stage, codes in report["codes"].items():
        assert report["codes_per_second"][stage] == pytest.approx(codes / report["seconds"][stage], rel=0.01)
        assert 0 < report["passes_per_code"][stage] <= 1 and 0 <= report["near_ties"][stage] <= codes / 10
    assert "drift" not in report
    assert {"fastvid", "torch", "python"} == set(report["versions"])


def test_hashes_are_of_the_predicted_frames_and_codes(clip, model, tmp_path):
    (report,) = predict_clips([clip], model, samples=2, seed=3, out=tmp_path / "out")
    given = read_clip(clip, "clip", (SIDE, SIDE), 12).given
    prediction = fastvid.load(model).predict_codes(given[None].movedim(-1, 2) / 255, 12, samples=2, seed=3)
    frames = (prediction.frames[0] * 255).round().to(torch.uint8).movedim(2, -1)
    assert hashes([report]) == [[frame_hash(sample) for sample in frames]]
    for k, sample in enumerate(report["samples"]):
        digest = hashlib.sha256()
        for codes in (prediction.top[0][0, k], prediction.bottom[0][0, k]):
            digest.update(repr(tuple(codes.shape)).encode() + codes.numpy().tobytes())
        assert sample["codes_sha256"] == digest.hexdigest()
    assert len({sample["codes_sha256"] for sample in report["samples"]}) == 2, "two samples drew the same codes"


def test_the_report_names_the_backends_that_ran(model, clip, tmp_path):
    (report,) = predict_clips([clip], model, frames=1, out=tmp_path / "out")
    with backend("reference"):
        (other,) = predict_clips([clip], model, frames=1, out=tmp_path / "other")
    assert set(report["backends"]) - {"gated_causal_conv"} == {"nearest_codebook", "pixelcnn_sample"}
    assert set(other["backends"].values()) == {"reference"}
    given = torch.zeros(1, 8), torch.zeros(32, 8)
    assert ops.nearest_codebook.reasons(*given)[report["backends"]["nearest_codebook"]] == "serves"
    assert hashes([report]) == hashes([other]), "another backend drew other codes"


def test_same_seed_same_bytes(clip, model, tmp_path):
    outs = [tmp_path / name for name in ("a", "b", "c")]
    reports = [predict_clips([clip], model, samples=2, seed=seed, out=out)
               for out, seed in zip(outs, (5, 5, 6), strict=True)]
    assert hashes(reports[0]) == hashes(reports[1])
    assert hashes(reports[0]) != hashes(reports[2])
    for file in ("clip_sample0.mp4", "clip_sample1.mp4", "clip_contact.png"):
        assert (outs[0] / file).read_bytes() == (outs[1] / file).read_bytes()
        assert (outs[0] / file).read_bytes() != (outs[2] / file).read_bytes()


def test_a_sample_does_not_depend_on_its_company(model, tmp_path):
    for i in range(3):
        write_video(tmp_path / f"c{i}.mp4", moving(6, 40, 40, seed=i), 10, lossless=True)
    clips = [tmp_path / f"c{i}.mp4" for i in range(3)]
    together = predict_clips(clips, model, samples=3, out=tmp_path / "together")
    assert [report["timed"] for report in together] == [{"clips": 3, "samples": 3}] * 3
    for i, clip in enumerate(clips):
        (alone,) = predict_clips([clip], model, samples=1, out=tmp_path / f"alone{i}")
        assert alone["samples"][0]["frame_hash"] == together[i]["samples"][0]["frame_hash"]
        assert alone["samples"][0]["codes_sha256"] == together[i]["samples"][0]["codes_sha256"]
    assert len({h for report in hashes(together) for h in report}) == 9


def test_more_clips_than_fit_together(model, tmp_path, monkeypatch):
    monkeypatch.setattr("fastvid.predict.ROWS_AT_ONCE", 4)
    for i in range(3):
        write_video(tmp_path / f"c{i}.mp4", moving(4, 40, 40, seed=i), 10, lossless=True)
    reports = predict_clips([tmp_path], model, samples=2, out=tmp_path / "out")
    assert [report["timed"]["clips"] for report in reports] == [2, 2, 1]
    monkeypatch.undo()
    assert hashes(predict_clips([tmp_path], model, samples=2, out=tmp_path / "again")) == hashes(reports)


def test_by_default_the_last_frames_are_given(clip):
    video, _ = read_video(clip, size=(SIDE, SIDE))
    last = read_clip(clip, "clip", (SIDE, SIDE), 12)
    assert torch.equal(last.given, video[16:]) and last.first == 16 and len(last.truth) == 0


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])  # of a webm nobody knows the length before decoding it
def test_start_leaves_the_truth_to_compare_with(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    write_video(path, moving(20, 48, 64), 25)
    video, _ = read_video(path, size=(SIDE, SIDE))
    early, late = (read_clip(path, "clip", (SIDE, SIDE), 12, start) for start in (2, 9))
    assert torch.equal(early.given, video[2:6]) and torch.equal(early.truth, video[6:18])
    assert torch.equal(late.given, video[9:13]) and torch.equal(late.truth, video[13:20])
    assert torch.equal(read_clip(path, "clip", (SIDE, SIDE), 12).given, video[16:])
    with pytest.raises(VideoError, match="wanted 4 frames from frame 17 on, the file has 20"):
        read_clip(path, "clip", (SIDE, SIDE), 12, 17)


def test_the_truth_is_the_sheet_s_first_row(clip, model, tmp_path):
    predict_clips([clip], model, samples=2, out=tmp_path / "with", start=2)
    predict_clips([clip], model, samples=2, out=tmp_path / "without")
    compared, plain = (read_video(tmp_path / name / "clip_contact.png")[0][0] for name in ("with", "without"))
    assert compared.shape[0] - 1 == (plain.shape[0] - 1) / 2 * 3
    fifth = read_video(clip, 6, 1, (SIDE, SIDE))[0][0]  # the first frame after the given ones
    scale, cell = 3, 3 * SIDE + 5
    shown = compared[3 : 3 + scale * SIDE, 4 * cell + 3 : 4 * cell + 3 + scale * SIDE]
    assert torch.equal(shown[::scale, ::scale], fifth)


def test_more_than_twelve_frames(clip, model, tmp_path):
    (report,) = predict_clips([clip], model, frames=30, out=tmp_path / "out")
    video, _ = read_video(tmp_path / "out" / "clip_sample0.mp4")
    assert len(video) == 34
    assert report["codes"]["top"] == 3 * 3 * 16


def test_frames_are_written_as_they_come(clip, model, tmp_path, monkeypatch):
    """Before a stretch is computed, all frames before it are in the encoders and out of memory."""
    encoders, handed = [], []
    begin, stream = _encode.Encoder.__init__, VideoPredictor.predict_stream

    def noted(encoder, *args):
        begin(encoder, *args)
        encoders.append(encoder)

    def watched(predictor, *args):
        source = stream(predictor, *args)
        for number in range(3):
            assert [encoder.count for encoder in encoders] == [4 + 12 * number] * 2
            assert all(storage() is None for storage in handed[:-1])
            stretch = next(source)
            handed.append(weakref.ref(stretch.frames.untyped_storage()))
            yield stretch
            del stretch
        assert next(source, None) is None

    monkeypatch.setattr(_encode.Encoder, "__init__", noted)
    monkeypatch.setattr(VideoPredictor, "predict_stream", watched)
    (report,) = predict_clips([clip], model, frames=36, samples=2, out=tmp_path / "out")
    assert len(handed) == 3
    monkeypatch.undo()
    given = read_clip(clip, "clip", (SIDE, SIDE), 36).given[None].movedim(-1, 2) / 255
    again = fastvid.load(model).predict(given, 36, samples=2)[0]
    assert hashes([report]) == [[frame_hash((one * 255).round().to(torch.uint8).movedim(1, -1)) for one in again]]


def test_interrupted_while_writing_leaves_nothing(clip, model, tmp_path, monkeypatch):
    out, add, begun = tmp_path / "out", VideoWriter.add, []
    predict_clips([clip], model, seed=1, out=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def interrupted(writer, video):
        add(writer, video)
        # the encoder looks ahead some forty frames before it writes the first
        begun.append(len(list(out.glob(".predict-*/.*.mp4"))))
        if begun[-1] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(VideoWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict_clips([clip], model, frames=96, samples=2, seed=2, out=out)
    assert len(begun) < 2 * 9, "it was not interrupted on its way"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_more_samples_than_files_may_be_open(clip, model, tmp_path, monkeypatch):
    (whole,) = predict_clips([clip], model, frames=13, samples=5, out=tmp_path / "whole", start=1)
    monkeypatch.setattr("fastvid.predict.ROWS_AT_ONCE", 2)
    (parts,) = predict_clips([clip], model, frames=13, samples=5, out=tmp_path / "parts", start=1)
    assert whole["samples"] == parts["samples"] and whole["codes"] == parts["codes"]
    for file in ("clip_sample4.mp4", "clip_contact.png"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


def test_a_long_clip_s_truth_is_counted_and_shown_no_further_than_a_sheet(tmp_path):
    write_video(tmp_path / "long.mp4", moving(90, 16, 16), 25)
    source = read_clip(tmp_path / "long.mp4", "long", (16, 16), 80, 0)
    assert source.known == 80 and len(source.truth) == 60
    assert read_clip(tmp_path / "long.mp4", "long", (16, 16), 100, 0).known == 86


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_smaller_weights_say_how_far_they_drift(clip, model, tmp_path, capsys, weights):
    (report,) = predict_clips([clip], model, samples=2, out=tmp_path / "out", weights=weights)
    assert set(report["drift"]) == {"top", "bottom"} and report["options"]["weights"] == weights
    for drift in report["drift"].values():
        assert 0 < drift["nats_per_code_size"] < 0.2 and abs(drift["nats_per_code"]) <= drift["nats_per_code_size"]
    said = [f"{name} {drift['nats_per_code']:+.4f} (mean size {drift['nats_per_code_size']:.4f})"
            for name, drift in report["drift"].items()]
    assert f"{weights} weights against float32, nats per code: {', '.join(said)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, words",
    [({"device": "tpu"}, "--device must be cpu or cuda"), ({"weights": "int4"}, "--weights must be one of auto, float"),
     ({"samples": 0}, "--samples must be at least 1")],
)  # fmt: skip
def test_options_that_are_none(clip, model, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        predict_clips([clip], model, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there(clip, model, tmp_path):
    with pytest.raises(UsageError, match="torch finds no GPU here"):
        predict_clips([clip], model, out=tmp_path / "out", device="cuda")
    (report,) = predict_clips([clip], model, frames=1, out=tmp_path / "out")
    assert report["device"] == "cpu"


def test_clips_of_one_name_do_not_overwrite_each_other(model, tmp_path):
    paths = [tmp_path / "a" / "x.mp4", tmp_path / "b" / "x.mp4", tmp_path / "a" / "x.webm", tmp_path / "a" / "x_2.mp4"]
    for seed, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        write_video(path, moving(5, 40, 40, seed=seed), 10)
    reports = predict_clips(paths, model, out=tmp_path / "out")
    files = [sample["file"] for report in reports for sample in report["samples"]]
    assert files == ["x_sample0.mp4", "x_2_sample0.mp4", "x_3_sample0.mp4", "x_2_2_sample0.mp4"]
    assert len(list((tmp_path / "out").iterdir())) == 12


def test_a_folder_stands_for_its_clips_and_no_clip_comes_twice(tmp_path):
    for name in ("b10.mp4", "b9.mp4"):
        write_video(tmp_path / name, moving(4, 16, 16))
    (tmp_path / "notes.txt").write_text("no clip")
    found = find_clips([tmp_path, tmp_path / "b9.mp4", tmp_path / "." / "b10.mp4"])
    assert [path.name for path in found] == ["b9.mp4", "b10.mp4"]


@pytest.mark.parametrize("broken", ["fastvid.predict.write_png", "fastvid.predict.VideoWriter.add"])
def test_nothing_half_written(clip, model, tmp_path, monkeypatch, broken):
    out = tmp_path / "out"
    predict_clips([clip], model, seed=1, out=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, full)
    with pytest.raises(VideoError, match="No space left on device"):
        predict_clips([clip], model, seed=2, out=out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_clip_is_never_its_own_output(model, tmp_path):
    for name in ("a.mp4", "a_sample0.mp4"):
        write_video(tmp_path / name, moving(5, 40, 40))
    before = (tmp_path / "a_sample0.mp4").read_bytes()
    with pytest.raises(UsageError, match="a_sample0.mp4 there is one of the clips to predict"):
        predict_clips([tmp_path], model, out=tmp_path)
    assert (tmp_path / "a_sample0.mp4").read_bytes() == before


def test_progress_on_a_terminal_only(clip, model, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = {}
    for kind in (Terminal, io.StringIO):
        monkeypatch.setattr(sys, "stderr", shown.setdefault(kind, kind()))
        predict_clips([clip], model, frames=13, samples=2, out=tmp_path / "out")
    text = shown[Terminal].getvalue()
    assert "clip.mp4: top" in text and "clip.mp4: bottom" in text and "code/s" in text
    assert shown[io.StringIO].getvalue() == ""


def test_an_impossible_rate_is_replaced_and_said(clip, monkeypatch):
    real = read_video
    monkeypatch.setattr("fastvid.data.source.read_video", lambda *args: (real(*args)[0], 90000.0))
    source = read_clip(clip, "clip", (SIDE, SIDE), 12)
    assert source.fps == 25.0 and "90000 frames a second cannot be written, 25 taken instead" in source.notes


def test_all_clips_are_checked_before_the_model_runs(clip, model, tmp_path, monkeypatch):
    write_video(tmp_path / "short.mp4", moving(3, 40, 40))

    def must_not_run(*_, **__):
        raise AssertionError("the model ran")

    monkeypatch.setattr(VideoPredictor, "predict_stream", must_not_run)
    monkeypatch.setattr("fastvid.predict.load", must_not_run)
    with pytest.raises(VideoError, match="short.mp4: wanted at least 4 frames, the file has 3"):
        predict_clips([clip, tmp_path / "short.mp4"], model, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_programs_can_play_it(clip, model, tmp_path):
    """The written mp4 is what players expect: H.264, 4:2:0, even size."""
    predict_clips([clip], model, out=tmp_path / "out")
    with av.open(str(tmp_path / "out" / "clip_sample0.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.width) == ("h264", "yuv420p", SIDE)
