"""Kinetics: lists and files are matched, what is missing or broken is named, labels are kept."""

import csv

import pytest
import torch

from fastvid.data import ClipWindows, open_clips
from fastvid.data.video import write_video
from fastvid.errors import DataError

HEADER = ["label", "youtube_id", "time_start", "time_end", "split", "is_cc"]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Bytes of mp4 files by their number of frames, 2 to 8."""
    folder = tmp_path_factory.mktemp("films")
    for n in range(2, 9):
        frames = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 16, 16, 3) * 20
        write_video(folder / f"{n}.mp4", frames, lossless=True)
    return {n: (folder / f"{n}.mp4").read_bytes() for n in range(2, 9)}


@pytest.fixture
def put(tmp_path, films):
    """Writes a clip of so many frames, 0 for an empty file, under a name below the data set's folder."""

    def write(name: str, frames: int):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(films.get(frames, b""))

    return write


def rows(path, *lines, header=HEADER):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *lines])


def test_clips_of_a_list_lie_flat_or_in_folders_of_classes(tmp_path, put):
    rows(tmp_path / "train.csv",
         ["making \"tea\", hot", "-a_bcdefghi", 5, 15, "train", 0], ["abseiling", "bbbbbbbbbbb", 100, 110, "train", 1],
         ["abseiling", "ccccccccccc", 0, 10, "train", 0], ["abseiling", "ddddddddddd", 0, 10, "train", 0],
         ["it's \"art\"", "eeeeeeeeeee", "7.0", "17.0", "train", 0])  # fmt: skip
    put("making \"tea\", hot/-a_bcdefghi_000005_000015.mp4", 3)
    put("bbbbbbbbbbb_000100_000110.mp4", 4)
    put("ccccccccccc.mp4", 5)
    put("abseiling/eeeeeeeeeee_000007_000017.mp4", 6)
    put("abseiling/fffffffffff_000007_000017.mp4", 7)
    clips = open_clips(tmp_path)
    assert clips.lengths == [3, 4, 5, 6]
    assert clips.labels == ["making \"tea\", hot", "abseiling", "abseiling", "it's \"art\""]
    assert clips.skipped == [("ddddddddddd_000000_000010", "no such file, train.csv names it")]
    assert "Kinetics" in clips.describe() and "by train.csv, 4 of 5 clips there" in clips.describe()
    assert clips.read(1, 2, 1).unique().tolist() == [40]


def test_what_is_missing_or_corrupt_is_named_and_the_rest_is_used(tmp_path, put, films):
    ids = [f"{letter}" * 11 for letter in "abcdefghij"]
    rows(tmp_path / "annotations" / "val.csv", *[["x", name, 0, 10, "val", 0] for name in ids])
    for name in ids[:7]:
        put(f"val/{name}_000000_000010.mp4", 8)
    put(f"val/{ids[7]}_000000_000010.mp4", 0)
    (tmp_path / f"val/{ids[8]}_000000_000010.mp4").write_bytes(films[8][: len(films[8]) // 2])
    clips = open_clips(tmp_path, "test")
    assert len(clips) == 7 and "split val (as test)" in clips.describe()
    reasons = dict(clips.skipped)
    assert sorted(reasons) == [f"{ids[9]}_000000_000010", *(f"val/{n}_000000_000010.mp4" for n in ids[7:9])]
    assert "0 bytes" in reasons[f"val/{ids[7]}_000000_000010.mp4"]
    assert "cut short" in reasons[f"val/{ids[8]}_000000_000010.mp4"]
    windows = ClipWindows(clips, 4, size=(8, 8))
    assert windows.batch(0, 3).shape == (3, 4, 8, 8, 3) and windows.skipped == clips.skipped


def test_test_is_the_validation_set_only_where_no_test_clip_is_there(tmp_path, put):
    for split, name in (("train", "a" * 11), ("validate", "b" * 11), ("test", "c" * 11)):
        rows(tmp_path / f"{split}.csv", ["x", name, 0, 10, split])
    put("bbbbbbbbbbb_000000_000010.mp4", 3)
    put("aaaaaaaaaaa_000000_000010.mp4", 2)
    assert open_clips(tmp_path, "test").lengths == [3]
    put("ccccccccccc_000000_000010.mp4", 4)
    assert open_clips(tmp_path, "test").lengths == [4]
    assert open_clips(f"{tmp_path}?split=validate", "test").lengths == [3]
    assert open_clips(f"{tmp_path}?split=val").lengths == [3]
    with pytest.raises(DataError, match="no split 'holdout'"):
        open_clips(f"{tmp_path}?split=holdout")


def test_one_list_may_hold_all_splits(tmp_path, put):
    rows(tmp_path / "all.csv", ["x", "a" * 11, 0, 10, "train"], ["y", "b" * 11, 0, 10, "val"])
    put("aaaaaaaaaaa_000000_000010.mp4", 2)
    put("bbbbbbbbbbb_000000_000010.mp4", 3)
    assert (open_clips(tmp_path).labels, open_clips(tmp_path, "test").labels) == (["x"], ["y"])


def test_a_list_can_be_named(tmp_path, put):
    rows(tmp_path / "train.csv", ["x", "a" * 11, 0, 10, "train"])
    rows(tmp_path / "my list.csv", ["y", "b" * 11, 0, 10], header=HEADER[:4])
    put("aaaaaaaaaaa_000000_000010.mp4", 2)
    put("bbbbbbbbbbb_000000_000010.mp4", 3)
    clips = open_clips(f"{tmp_path}?csv=my%20list.csv", "test")
    assert clips.labels == ["y"] and "all clips count as test by my list.csv" in clips.describe()
    assert open_clips(f"{tmp_path}?csv={tmp_path}/train.csv").labels == ["x"]
    with pytest.raises(DataError, match="no split 'test' in it; there are: train"):
        open_clips(f"{tmp_path}?csv=train.csv", "test")
    with pytest.raises(DataError, match="csv=none.csv is not there"):
        open_clips(f"{tmp_path}?csv=none.csv")
    (tmp_path / "other.csv").write_text("path,label\n")
    with pytest.raises(DataError, match="columns time_end, time_start, youtube_id"):
        open_clips(f"{tmp_path}?csv=other.csv")


def test_without_a_list_folders_divide_the_clips(tmp_path, put):
    put("train/surfing water/aaaaaaaaaaa_000000_000010.mp4", 2)
    put("train/abseiling/bbbbbbbbbbb_000000_000010.mp4", 3)
    put("val/ccccccccccc_000000_000010.mp4", 4)
    train, test = open_clips(tmp_path), open_clips(tmp_path, "test")
    assert (train.lengths, train.labels) == ([3, 2], ["abseiling", "surfing water"])
    assert (test.lengths, test.labels) == ([4], None)
    assert "split val (as test), no csv for it" in test.describe()
    flat = open_clips(tmp_path / "val", "test")
    assert len(flat) == 1 and "all clips count as test" in flat.describe()


@pytest.mark.parametrize(
    "train, val", [("train_256", "val_256"), ("videos_train", "videos_val"), ("video_training_320", "rawframes_valid")]
)
def test_folders_that_scripts_make_divide_the_clips(tmp_path, put, train, val):
    put(f"{train}/aaaaaaaaaaa_000000_000010.mp4", 2)
    put(f"{val}/bbbbbbbbbbb_000000_000010.mp4", 3)
    put("unrestrained_trainings/ccccccccccc_000000_000010.mp4", 4)
    assert (open_clips(tmp_path).lengths, open_clips(tmp_path, "test").lengths) == ([2], [3])


def test_videos_called_otherwise_are_counted(tmp_path, put):
    put("aaaaaaaaaaa_000000_000010.mp4", 2)
    assert "left aside" not in open_clips(tmp_path).describe()
    for name in ("holiday.mp4", "more/cat.mp4", "more/.hidden.mp4"):
        put(name, 3)
    assert "(2 other videos left aside; ?format=folder takes all)" in open_clips(tmp_path).describe()
    assert len(open_clips(f"{tmp_path}?format=folder")) == 3


def test_a_clip_counts_once(tmp_path, put):
    rows(tmp_path / "train.csv", ["x", "a" * 11, 0, 10, "train"], ["x", "a" * 11, 20, 30, "train"],
         ["x", "b" * 11, 0, 10, "train"], ["x", "b" * 11, 0, 10, "train"])  # fmt: skip
    put("aaaaaaaaaaa.mp4", 2)
    put("bbbbbbbbbbb_000000_000010.mp4", 3)
    put("copy/bbbbbbbbbbb_000000_000010.mp4", 3)
    clips = open_clips(tmp_path)
    assert clips.names == ["aaaaaaaaaaa.mp4", "bbbbbbbbbbb_000000_000010.mp4"]
    assert len(clips.skipped) == 3 and "the same clip as bbb" in clips.skipped[0][1]


def test_damaged_lines_are_named(tmp_path, put):
    rows(tmp_path / "train.csv", ["x", "a" * 11, "soon", 10, "train"], ["x", "../../secret", 0, 10, "train"], ["x"],
         ["x", "b" * 11, 0, 1e999, "train"], ["x", "c" * 11, 0, 10, "train", 0, "more"])  # fmt: skip
    put("ccccccccccc_000000_000010.mp4", 3)
    clips = open_clips(tmp_path)
    assert clips.lengths == [3]
    assert [name for name, _ in clips.skipped] == [f"train.csv line {n}" for n in (2, 3, 4, 5)]


@pytest.mark.parametrize("line", [b"x,\xff\xfe,1,2\n", b"x," + b"a" * 200_000 + b",1,2\n"], ids=["bytes", "long"])
def test_a_damaged_list_is_one_line(tmp_path, put, line):
    put("aaaaaaaaaaa_000000_000010.mp4", 3)
    (tmp_path / "train.csv").write_bytes(b"label,youtube_id,time_start,time_end\n" + line)
    with pytest.raises(DataError, match=r"train\.csv: cannot be read") as caught:
        open_clips(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_list_without_any_file_is_one_line(tmp_path):
    rows(tmp_path / "train.csv", ["x", "a" * 11, 0, 10, "train"])
    with pytest.raises(DataError, match="no usable clip, 1 unusable; the first: a{11}_000000_000010: no such file"):
        open_clips(tmp_path)


def test_other_folders_are_not_kinetics(tmp_path, put):
    put("clip_000000_000010.mp4", 3)
    (tmp_path / "files.csv").write_text("path,label\n")
    assert "Kinetics" not in open_clips(tmp_path).describe()
