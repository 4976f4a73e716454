"""Data sets on disk: lossless, the same whatever interrupts or divides the work, and refused where they do not fit."""

import json
import os
import signal
import subprocess
import sys
import time

import av
import pytest
import torch

from fastvid.data import digits, make, open_clips
from fastvid.data.make import look, make_clips
from fastvid.data.video import read_video
from fastvid.errors import DataError

pytest.importorskip("sklearn", reason="scikit-learn is not installed; it carries the digits")

SMALL = {"frames": 5, "size": (16, 32)}


def record(folder):
    return json.loads((folder / "dataset.json").read_text())


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_is_what_was_made(tmp_path):
    assert make_clips("digits", tmp_path, 3, split="test", first=4, **SMALL) == tmp_path / "test"
    assert record(tmp_path) == {
        "kind": "digits", "version": digits.VERSION, "frames": 5, "size": [16, 32], "splits": {"test": [4, 3]},
    }  # fmt: skip
    assert sorted(files(tmp_path)) == ["dataset.json", *(f"test/{2_000_004 + i}.mp4" for i in range(3))]
    for i in range(3):
        video, fps = read_video(tmp_path / f"test/{2_000_004 + i}.mp4")
        assert torch.equal(video, digits.make_clip(2_000_004 + i, **SMALL)) and fps == digits.FPS
    clips = open_clips(tmp_path, "test")
    assert torch.equal(clips.read(1), digits.make_clip(2_000_005, **SMALL))


def test_splits_and_ranges_join(tmp_path):
    make_clips("digits", tmp_path, 2, **SMALL)
    make_clips("digits", tmp_path, 1, split="test", **SMALL)
    make_clips("digits", tmp_path, 3, first=1, **SMALL)
    assert record(tmp_path)["splits"] == {"train": [0, 4], "test": [0, 1]}
    make_clips("digits", tmp_path, 1, **SMALL)
    assert record(tmp_path)["splits"]["train"] == [0, 4]
    with pytest.raises(DataError, match="`first` = 4"):
        make_clips("digits", tmp_path, 1, first=5, **SMALL)


def test_workers_change_nothing_and_the_clips_after_an_interruption_are_the_same(tmp_path, monkeypatch):
    make_clips("digits", tmp_path / "whole", 6, **SMALL)
    make_clips("digits", tmp_path / "two", 6, workers=2, **SMALL)
    assert files(tmp_path / "two") == files(tmp_path / "whole")

    def write_three(path, *arguments, **options):
        if path.name == "0000003.mp4":
            raise KeyboardInterrupt
        write(path, *arguments, **options)

    write = make.write_video
    monkeypatch.setattr(make, "write_video", write_three)
    with pytest.raises(KeyboardInterrupt):
        make_clips("digits", tmp_path / "cut", 6, **SMALL)
    monkeypatch.undo()
    assert record(tmp_path / "cut")["splits"] == {}
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut/train").iterdir()}
    assert sorted(kept) == [f"000000{i}.mp4" for i in range(3)]
    make_clips("digits", tmp_path / "cut", 6, **SMALL)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert {name: (tmp_path / "cut/train" / name).stat().st_mtime_ns for name in kept} == kept


def test_half_a_clip_is_made_again(tmp_path):
    make_clips("digits", tmp_path, 2, **SMALL)
    before = files(tmp_path)
    for name, rest in [("train/0000000.mp4", 200), ("train/0000001.mp4", 0)]:
        (tmp_path / name).write_bytes(before[name][:rest])
    make_clips("digits", tmp_path, 2, **SMALL)
    assert files(tmp_path) == before


@pytest.mark.parametrize(("signals", "workers"), [("SIGKILL", 1), ("SIGINT", 2)])
def test_killed_it_leaves_whole_clips(tmp_path, signals, workers):
    out = tmp_path / "out"
    script = f"from fastvid.data.make import make_clips; make_clips('digits', {str(out)!r}, 20_000, workers={workers})"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while process.poll() is None and not (out / "train/0000003.mp4").exists():
            time.sleep(0.02)
        assert process.poll() is None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, getattr(signal, signals))
    assert process.wait(300) != 0
    written = sorted(path for path in (out / "train").iterdir() if not path.name.startswith("."))
    assert len(written) >= 4
    for path in [*written[:3], *written[-3:]]:
        assert torch.equal(read_video(path)[0], digits.make_clip(int(path.stem)))
    assert record(out)["splits"] == {}
    make_clips("digits", out, 4)
    assert record(out)["splits"] == {"train": [0, 4]}


def test_workers_leave_with_a_parent_that_is_killed(tmp_path):
    script = f"from fastvid.data.make import make_clips; make_clips('digits', {str(tmp_path)!r}, 20_000, workers=2)"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not (tmp_path / "train/0000003.mp4").exists():
        time.sleep(0.02)
    assert process.poll() is None
    process.kill()  # it alone
    process.wait()
    try:
        for _ in range(600):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    except ProcessLookupError:
        return
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("workers are still there a minute after their parent was killed")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"kind": "cats"}, "digits, push, dino"),
        ({"clips": 0}, "`clips`"),
        ({"frames": 0}, "`frames`"),
        ({"split": "val"}, "train, test"),
        ({"first": -1}, "`first`"),
        ({"first": 999_999, "clips": 2}, "1000000 clips"),
        ({"size": (8, 64)}, "8x64"),
        ({"workers": 0}, "`workers`"),
    ],
)
def test_messages(tmp_path, changes, word):
    with pytest.raises(DataError, match=word) as caught:
        make_clips(**{"kind": "digits", "out": tmp_path / "out", "clips": 1, **changes})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_generator_that_cannot_start_is_one_message(tmp_path, monkeypatch, workers):
    monkeypatch.setenv("FASTVID_CHROMIUM", "no-such-browser")
    with pytest.raises(DataError, match="no-such-browser"):
        make_clips("dino", tmp_path, 2, workers=workers)


@pytest.mark.parametrize("changed", [{"kind": "push"}, {"version": 99}, {"frames": 6}, {"size": [16, 16]}])
def test_another_data_set_is_left_alone(tmp_path, changed):
    make_clips("digits", tmp_path, 1, **SMALL)
    (tmp_path / "dataset.json").write_text(json.dumps({**record(tmp_path), **changed}))
    before = files(tmp_path)
    with pytest.raises(DataError, match=f"{next(iter(changed))} .*choose another folder"):
        make_clips("digits", tmp_path, 2, **SMALL)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kind": 1, "version": 1, "frames": 5, "size": 3, "splits": {"a": 1}}']
)
def test_a_damaged_record_is_one_message(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match="dataset.json: wanted the record"):
        make_clips("digits", tmp_path, 1, **SMALL)


def test_strange_files_are_left_alone(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/0000000.mp4").write_bytes(b"holiday")
    with pytest.raises(DataError, match="choose an empty folder"):
        make_clips("digits", tmp_path, 1, **SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="choose another folder"):
        make_clips("digits", tmp_path / "file", 1, **SMALL)


def test_look_draws_clips_and_says_what_is_there(tmp_path, capsys):
    make_clips("digits", tmp_path / "set", 3, frames=7, size=(64, 96))
    look(tmp_path / "set", tmp_path / "look.png", clips=2)
    assert "3 clips of 7 frames" in capsys.readouterr().out
    with av.open(str(tmp_path / "look.png")) as file:
        sheet = torch.from_numpy(next(file.decode(video=0)).to_ndarray(format="rgb24"))
    assert sheet.shape == (2 * (64 * 2 + 5) + 1, 3 * (96 * 2 + 5) + 1, 3)
    for row, seed in enumerate((0, 1)):
        frame = sheet[row * 133 + 3 :, 197 + 3 :][: 2 * 64 : 2, : 2 * 96 : 2]
        assert torch.equal(frame, digits.make_clip(seed, 7, (64, 96))[3])
    with pytest.raises(DataError, match="`clips`"):
        look(tmp_path / "set", tmp_path / "look.png", clips=0)
