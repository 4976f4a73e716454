"""How a data set is recognised, and what may follow its path."""

import os
import random
import zipfile

import numpy as np
import pytest
import torch
from write_bair import framed, trajectory

from fastvid.data import open_clips
from fastvid.data._images import decode_image
from fastvid.data.formats import FORMATS, named, parse_spec, sniff
from fastvid.data.formats._shared import choose_split
from fastvid.data.sheet import write_png
from fastvid.data.video import write_video
from fastvid.errors import DataError, VideoError


def film(path, frames=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, torch.full((frames, 16, 16, 3), 9, dtype=torch.uint8))
    return path


@pytest.mark.parametrize(
    "spec, place, options",
    [
        ("a/b", "a/b", {}),
        ("a/b?split=val", "a/b", {"split": "val"}),
        ("a?csv=x=y.csv&split=val", "a", {"csv": "x=y.csv", "split": "val"}),
        ("a?csv=what?.csv", "a", {"csv": "what?.csv"}),
        ("a?csv=this%26that.csv", "a", {"csv": "this&that.csv"}),
        ("digits?split=test", "digits", {"split": "test"}),
    ],
)
def test_options_after_a_path(spec, place, options):
    assert parse_spec(spec) == (place, options)


def test_a_path_with_a_question_mark_in_its_name(tmp_path):
    odd = tmp_path / "what?is=this"
    film(odd / "val" / "a.mp4")
    assert parse_spec(odd) == (str(odd), {}) and open_clips(odd).names == ["val/a.mp4"]
    assert parse_spec(f"{odd}?split=val") == (str(odd), {"split": "val"})


@pytest.mark.parametrize("spec", ["a?", "a?split", "a?split=", "a?=val", "a?split=val&", "a?split=val&split=train"])
def test_options_that_are_none(spec):
    with pytest.raises(DataError, match="written .key=value|comes twice"):
        open_clips(spec)


def test_unknown_options_list_the_known_ones(tmp_path):
    film(tmp_path / "a.mp4")
    for spec in (f"{tmp_path}?frames=3", f"{tmp_path}/a.mp4?frames=3", "digits?frames=3"):
        with pytest.raises(DataError, match="no option 'frames'; there are: .*split .*; format "):
            open_clips(spec)
    with pytest.raises(DataError, match=r"no format 'tfds'; there are: bair, .*kinetics.*, folder\."):
        open_clips(f"{tmp_path}?format=tfds")
    with pytest.raises(DataError, match="has the splits train and test"):
        open_clips("digits?split=val")


def test_a_split_in_the_spec_goes_before_the_callers(tmp_path):
    for split in ("train", "test", "val"):
        film(tmp_path / split / f"{split}.mp4")
    assert open_clips(tmp_path, "test").names == ["test.mp4"]
    assert open_clips(f"{tmp_path}?split=val", "test").names == ["val.mp4"]
    assert "split val" in open_clips(f"{tmp_path}?split=val", "test").describe()
    assert set(open_clips("digits?split=test", "train").names) == set(open_clips("digits", "test").names)
    with pytest.raises(DataError, match="no split 'dev' in it; there are: train, test, val"):
        open_clips(f"{tmp_path}?split=dev")
    with pytest.raises(DataError, match="no folder dev/ below it"):
        open_clips(f"{tmp_path}/val?split=dev")


def test_a_format_by_name_or_none(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 4, 4), np.uint8))
    film(tmp_path / "clip.mp4")
    assert open_clips(tmp_path).names == ["clip.mp4"]
    with pytest.raises(DataError, match="cannot be read"):
        open_clips(f"{tmp_path}/a.npy?format=folder")
    assert "asked for by format=moving_mnist" in open_clips(f"{tmp_path}/a.npy?format=moving_mnist").describe()
    assert named("folder") is None and {named(m.__name__.rpartition(".")[2]) for m in FORMATS} == set(FORMATS)


def test_every_format_keeps_the_contract():
    for module in FORMATS:
        assert module.NAME and all(isinstance(text, str) for text in module.OPTIONS.values())
        assert not {"split", "format"} & set(module.OPTIONS)


def test_plain_folders_and_odd_files_are_of_no_format(tmp_path):
    film(tmp_path / "films" / "deep" / "a.mp4")
    for number in range(3):
        frames = tmp_path / "frames" / f"walk{number}"
        frames.mkdir(parents=True)
        write_png(frames / "frame0.png", torch.zeros(4, 4, 3, dtype=torch.uint8))
    (tmp_path / "empty").mkdir()
    for name in ("clip.mp4", "notes.txt", "fake.npy", "fake.npz", "fake.zip", "fake.h5", "traj_1.tfrecords"):
        (tmp_path / name).write_text("hello")
    assert [path.name for path in sorted(tmp_path.iterdir()) if sniff(path)] == []
    assert sniff(tmp_path) is None


def test_recognising_opens_no_pipe(tmp_path):
    for name in ("a.npy", "a.h5", "traj_0_to_255.tfrecords", "train.json", "train.csv", "a.zip"):
        os.mkfifo(tmp_path / name)
    assert sniff(tmp_path / "a.npy") is None
    with pytest.raises(DataError):
        open_clips(tmp_path)


def test_labels_are_none_where_there_are_none(tmp_path):
    film(tmp_path / "a.mp4")
    assert open_clips(tmp_path).labels is None


def test_names_of_splits(tmp_path):
    for asked, available, own, words in (
        (None, ["train", "test"], "train", "split train"), (None, ["val", "test"], "val", "split val"),
        ("test", ["train", "val"], "val", "split val (as test)"), ("test", ["val", "test"], "test", "split test"),
        ("train", ["training"], "training", "split training (as train)"), (None, [], None, "not divided"),
        ("test", ["train", "validation"], "validation", "split validation (as test)"),
        ("test", [], None, "not divided, so all clips count as test"), ("dev", ["dev"], "dev", "split dev"),
    ):  # fmt: skip
        assert choose_split(tmp_path, asked, available) == (own, words)
    for asked in ("train", "dev"):
        with pytest.raises(DataError, match=f"no split '{asked}' in it; there are: val, test"):
            choose_split(tmp_path, asked, ["val", "test"])


def test_images_in_memory(tmp_path):
    noise = torch.randint(0, 256, (9, 7, 3), dtype=torch.uint8)
    write_png(tmp_path / "a.png", noise)
    data = (tmp_path / "a.png").read_bytes()
    assert torch.equal(decode_image(data, "a.png"), noise)
    for damaged in (data[:-1], data[:60], data[:8], b"", b"\xff\xd8\xff", data[:50] + b"\0\0" + data[52:]):
        with pytest.raises(VideoError, match="^a.png: ") as caught:
            decode_image(damaged, "a.png")
        assert "\n" not in str(caught.value)


def tfrecords(path, clips):
    records = []
    for i, clip in enumerate(clips):
        images = {"aux1": [frame.tobytes() for frame in clip]}
        records.append(framed(trajectory(images, np.full((len(clip), 4), i), np.zeros((len(clip), 3)))))
    path.write_bytes(b"".join(records))


def frame_zip(path, clips):
    with zipfile.ZipFile(path, "w") as archive:
        for i, clip in enumerate(clips):
            for t, frame in enumerate(clip):
                write_png(path.with_suffix(".png"), torch.from_numpy(frame))
                archive.write(path.with_suffix(".png"), f"video{i}/frame{t}.png")


def hdf5(path, clips):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install 'fastvid-torch[data]'")
    with h5py.File(path, "w") as file:
        file["train_data"] = np.concatenate(clips)
        file["train_idx"] = np.arange(len(clips)) * len(clips[0])


CONTAINERS = {
    "traj_0_to_1.tfrecords": tfrecords, "a.zip": frame_zip, "a.h5": hdf5, "a.npy": np.save,
    "a.npz": lambda path, clips: np.savez_compressed(path, train=clips, test=clips[:1]),
}  # fmt: skip
CHECKED = ("a.zip", "traj_0_to_1.tfrecords")  # every byte of a frame is under a checksum


def damaged(whole: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(draw.choice((len(whole), min(400, len(whole)))))
    kind = draw.choice(("flip", "cut", "zero", "delete", "insert"))
    if kind == "flip":
        return whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]
    if kind == "cut":
        return whole[:at]
    if kind == "zero":
        return whole[:at] + bytes(min(16, len(whole) - at)) + whole[at + 16 :]
    return whole[:at] + (draw.randbytes(8) if kind == "insert" else b"") + whole[at + 8 * (kind == "delete") :]


@pytest.mark.parametrize("name", CONTAINERS)
def test_damage_is_an_error_of_one_line_or_harmless(tmp_path, name):
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), np.uint8)
    CONTAINERS[name](tmp_path / name, clips)
    whole, draw, errors = (tmp_path / name).read_bytes(), random.Random(name), 0
    for _ in range(100):
        (tmp_path / name).write_bytes(damaged(whole, draw))
        try:
            found = open_clips(tmp_path / name, "train")
            read = [found.read(i) for i in range(min(2, len(found)))]
        except (DataError, VideoError) as error:
            assert "\n" not in str(error) and name in str(error)
            errors += 1
            continue
        if name in CHECKED:
            whole_frames = {frame.tobytes() for clip in clips for frame in clip}
            assert all(frame.numpy().tobytes() in whole_frames for clip in read for frame in clip)
    assert errors > 30
