"""Sky Time-lapse: one clip a folder of frames, gaps named, nothing decoded before it is read."""

import os

import pytest
import torch
from PIL import Image

from fastvid.data import ClipWindows, open_clips
from fastvid.data.formats._stills import runs
from fastvid.data.video import fit_frames
from fastvid.errors import DataError, VideoError


def frame(number: int, height=18, width=32) -> torch.Tensor:
    """Two grey halves that tell the number."""
    halves = torch.tensor([number % 16, number // 16], dtype=torch.uint8) * 15
    return halves.repeat_interleave(width // 2)[None, :, None].expand(height, -1, 3)


def write_jpg(path, image: torch.Tensor):
    Image.fromarray(image.numpy()).save(path, quality=95)


def put_clip(folder, video: str, numbers):
    folder.mkdir(parents=True)
    for number in numbers:
        write_jpg(folder / f"{video}_frames_{number:08d}.jpg", frame(number))


def same(frames: torch.Tensor, expected: torch.Tensor) -> bool:
    """Up to what a jpg loses: far less than from one number to the next."""
    return frames.shape == expected.shape and (frames.int() - expected.int()).abs().float().mean() < 2


@pytest.fixture
def root(tmp_path):
    put_clip(tmp_path / "sky/sky_train/-abc/-abc_1", "-abc", range(1, 6))
    put_clip(tmp_path / "sky/sky_train/-abc/-abc_10", "-abc", range(9, 15))
    put_clip(tmp_path / "sky/sky_train/-abc/-abc_2", "-abc", [6, 7, 9, 10])
    put_clip(tmp_path / "sky/sky_test/xyz/xyz_1", "xyz", range(98, 103))
    return tmp_path / "sky"


def test_folders_of_frames_are_clips(root):
    train, test = open_clips(root), open_clips(root, "test")
    assert train.names == [f"sky_train/-abc/-abc_{n}" for n in (1, 2, 10)] and train.lengths == [5, 4, 6]
    assert (test.names, test.lengths, test.labels) == (["sky_test/xyz/xyz_1"], [5], None)
    expected = torch.stack([frame(n) for n in range(98, 103)])
    assert same(test.read(0), expected) and not same(test.read(0, 0, 4), expected[1:])
    assert torch.equal(test.read(0, 1, 3), test.read(0)[1:4])
    assert torch.equal(test.read(0, 3, 2, (4, 4)), fit_frames(test.read(0)[3:], 4, 4)[0])
    assert "Sky-Timelapse" in test.describe() and "split test: 1 clip of 5 frames" in test.describe()
    assert ClipWindows(train, 4, size=(8, 8)).batch(0, 5).shape == (5, 4, 8, 8, 3)


def test_gaps_are_named_or_skipped(root):
    assert "1 clip lacks frames: sky_train/-abc/-abc_2 (after frame 7)" in open_clips(root).describe()
    clips = open_clips(f"{root}?gaps=skip")
    assert clips.lengths == [5, 6]
    assert clips.skipped == [("sky_train/-abc/-abc_2", "lacks frames in its middle (gaps=skip)")]
    with pytest.raises(DataError, match="gaps must be keep or skip, got 'split'"):
        open_clips(f"{root}?gaps=split")


def test_many_gaps_are_counted(tmp_path):
    for clip in range(11):
        put_clip(tmp_path / f"sky_train/v/v_{clip}", "v", [1, 3])
    told = open_clips(tmp_path).describe()
    assert "11 clips lack frames" in told and "v_7 (after frame 1) and 3 more" in told


def test_half_of_the_set_is_not_divided(root):
    clips = open_clips(root / "sky_test", "test")
    assert clips.names == ["xyz/xyz_1"] and "frames are called as in xyz/xyz_1/xyz_frames_" in clips.describe()
    assert "all clips count as test" in clips.describe()
    (root / "sky_test").rename(root / "elsewhere")
    with pytest.raises(DataError, match="no split 'test' in it; there are: train"):
        open_clips(root, "test")


def test_damaged_frames_are_found_when_they_are_read(root):
    bad = root / "sky_test/xyz/xyz_1/xyz_frames_00000100.jpg"
    whole = bad.read_bytes()
    clips = open_clips(root, "test")
    for damaged in (whole[:-30], whole[: len(whole) // 2], whole[:20], b"", b"hello"):
        bad.write_bytes(damaged)
        assert clips.read(0, 0, 2).shape == (2, 18, 32, 3)
        with pytest.raises(VideoError, match="frames_00000100.jpg: ") as caught:
            clips.read(0)
        assert "\n" not in str(caught.value)
    bad.unlink()
    with pytest.raises(VideoError, match="frames_00000100.jpg: no such file"):
        clips.read(0)
    write_jpg(bad, frame(100, 10, 16))
    with pytest.raises(VideoError, match="xyz_1: the frames differ in size"):
        open_clips(root, "test").read(0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_file_is_left_out(root):
    os.mkfifo(root / "sky_test/xyz/xyz_1/xyz_frames_00000103.jpg")
    (root / "sky_test/xyz/xyz_1/xyz_frames_00000104.jpg").mkdir()
    (root / "sky_test/xyz/xyz_1/.xyz_frames_00000105.jpg").write_bytes(b"")
    assert open_clips(root, "test").lengths == [5]


def test_no_frames_is_one_line(tmp_path):
    (tmp_path / "sky_train" / "a").mkdir(parents=True)
    (tmp_path / "sky_train" / "a" / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="no usable clip"):
        open_clips(tmp_path)


def test_runs_of_numbers():
    assert runs([1, 2, 3]) == [(0, 3)] and runs([]) == [(0, 0)] and runs([5]) == [(0, 1)]
    assert runs([1, 2, 4, 5, 5]) == [(0, 2), (2, 4), (4, 5)]
    assert runs([1, None, 7, 9]) == [(0, 3), (3, 4)]
