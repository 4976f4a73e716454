"""Clips: a path is understood, what is unusable is named, and a window depends on seed, step and place alone."""

import os

import pytest
import torch

from fastvid.data import ClipWindows, open_clips
from fastvid.data.clips import natural_key
from fastvid.data.sheet import write_png
from fastvid.data.video import fit_frames, write_video
from fastvid.errors import DataError, VideoError


def clip(number, frames=20, height=16, width=16) -> torch.Tensor:
    """Noise in which the first pixel names the clip and the second the frame."""
    video = torch.randint(
        0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number)
    )
    video[:, 0, 0] = number
    video[:, 0, 1] = torch.arange(frames, dtype=torch.uint8)[:, None]
    return video


def folder_of_clips(root, count=5, **options):
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        write_video(root / f"clip{number}.mp4", clip(number, **options), lossless=True)
    return root


def frame_folder(root, video, suffix=".png"):
    root.mkdir(parents=True)
    for number, image in enumerate(video):
        write_png(root / f"frame{number}{suffix}", image)


def test_a_video_file_is_one_clip(tmp_path):
    folder_of_clips(tmp_path, 1)
    clips = open_clips(tmp_path / "clip0.mp4")
    assert (clips.names, clips.lengths, len(clips), clips.skipped) == (["clip0.mp4"], [20], 1, [])
    assert torch.equal(clips.read(0), clip(0))
    assert torch.equal(clips.read(0, start=5, frames=3), clip(0)[5:8])
    assert torch.equal(clips.read(0, 5, 3, size=(8, 8)), fit_frames(clip(0), 8, 8)[0][5:8])


def test_a_folder_is_searched_at_any_depth_in_natural_order(tmp_path):
    for name in ("b/clip10.mp4", "b/clip9.webm", "a/x.gif", ".hidden/c.mp4", "a/.temporary.mp4", "clip2.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_video(tmp_path / name, clip(1, frames=len(name)))
    (tmp_path / "dataset.json").write_text("{}")
    clips = open_clips(str(tmp_path))
    assert clips.names == ["a/x.gif", "b/clip9.webm", "b/clip10.mp4", "clip2.mp4"]
    assert clips.lengths == [7, 12, 12, 9]
    assert "4 clips of 7 to 12 frames" in clips.describe() and ".json" in clips.describe()


def test_frame_folders_are_clips_in_natural_order(tmp_path):
    frame_folder(tmp_path / "walk10", clip(1, 12))
    frame_folder(tmp_path / "walk2", clip(2, 11))
    clips = open_clips(tmp_path)
    assert (clips.names, clips.lengths) == (["walk2", "walk10"], [11, 12])
    assert torch.equal(clips.read(0), clip(2, 11))
    assert torch.equal(clips.read(1, 9, 3), clip(1, 12)[9:])
    assert torch.equal(clips.read(1, 9, 3, (4, 4)), fit_frames(clip(1, 12)[9:], 4, 4)[0])
    alone = open_clips(tmp_path / "walk2")
    assert (alone.names, alone.lengths) == (["walk2"], [11])
    assert torch.equal(alone.read(0, 2, 1), clip(2, 11)[2:3])


def test_frames_of_unequal_size_are_an_error_unless_resized(tmp_path):
    frame_folder(tmp_path / "a", clip(1, 3))
    write_png(tmp_path / "a" / "frame3.png", clip(1, 1, 20, 20)[0])
    clips = open_clips(tmp_path)
    with pytest.raises(VideoError, match="differ in size"):
        clips.read(0)
    assert clips.read(0, size=(8, 8)).shape == (4, 8, 8, 3)


def test_splits_are_picked_by_name(tmp_path):
    folder_of_clips(tmp_path / "train", 3)
    folder_of_clips(tmp_path / "test", 2)
    assert [len(open_clips(tmp_path, split)) for split in (None, "train", "test")] == [3, 3, 2]
    assert len(open_clips(tmp_path / "test")) == 2
    with pytest.raises(DataError, match="split must be"):
        open_clips(tmp_path, "validation")
    os.rename(tmp_path / "test", tmp_path / "train" / "more")
    with pytest.raises(DataError, match="no split 'test' in it; there are: train"):
        open_clips(tmp_path, "test")
    clips = open_clips(tmp_path / "train", "test")
    assert len(clips) == 5 and "all clips count as test" in clips.describe()


def test_validation_counts_as_test_where_no_test_is_there(tmp_path):
    for name, count in (("train", 3), ("val", 2)):
        folder_of_clips(tmp_path / name, count, frames=2)
    assert [len(open_clips(tmp_path, split)) for split in (None, "train", "test")] == [3, 3, 2]
    assert "split val (as test)" in open_clips(tmp_path, "test").describe()
    assert len(open_clips(f"{tmp_path}?split=validation")) == 2
    os.rename(tmp_path / "train", tmp_path / "walks")
    assert len(open_clips(tmp_path)) == 5 and "all clips count as test" in open_clips(tmp_path, "test").describe()


@pytest.mark.parametrize("spec", ["{}/" + "a" * 5000, "{}?split=" + "a" * 5000, "{}?format=kinetics&csv=" + "a" * 5000])
def test_names_that_are_too_long_are_one_line(tmp_path, spec):
    folder_of_clips(tmp_path, 1, frames=2)
    with pytest.raises(DataError, match="cannot be opened: File name too long") as caught:
        open_clips(spec.format(tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_unusable_files_are_skipped_and_named(tmp_path):
    folder_of_clips(tmp_path, 3)
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.webm").touch()
    whole = (tmp_path / "clip1.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 20])
    (tmp_path / "most.mp4").write_bytes(whole[: len(whole) * 9 // 10])
    clips = open_clips(tmp_path)
    assert clips.names == ["clip0.mp4", "clip1.mp4", "clip2.mp4"]
    reasons = dict(clips.skipped)
    assert sorted(reasons) == ["empty.webm", "half.mp4", "most.mp4", "text.mp4"] and "0 bytes" in reasons["empty.webm"]
    assert "cut short" in reasons["most.mp4"]
    lines = clips.describe().splitlines()
    assert lines[1] == "skipped 4:" and [line.split(":")[0].strip() for line in lines[2:]] == sorted(reasons)


@pytest.mark.parametrize("kind", ["missing", "empty", "other files", "all broken", "misspelled generator"])
def test_no_clip_is_one_line(tmp_path, kind):
    spec = "digit" if kind == "misspelled generator" else tmp_path / "data"
    if kind not in ("missing", "misspelled generator"):
        spec.mkdir()
    if kind == "other files":
        (spec / "notes.txt").write_text("hello")
    if kind == "all broken":
        (spec / "a.mp4").write_text("hello")
    with pytest.raises(DataError) as caught:
        open_clips(spec)
    assert "\n" not in str(caught.value) and str(spec) in str(caught.value)


def test_reading_outside_a_clip_is_an_error(tmp_path):
    clips = open_clips(folder_of_clips(tmp_path, 2))
    for arguments in ((2,), (-1,), (0, 20), (0, -1, 3), (0, 18, 3), (0, 0, 0)):
        with pytest.raises(DataError):
            clips.read(*arguments)


def test_a_generator_needs_no_file():
    train, test = open_clips("digits"), open_clips("digits", "test")
    assert len(train) == 10_000 and len(test) == 1_000 and set(test.lengths) == {30}
    assert not set(train.names) & set(test.names)
    assert torch.equal(train.read(7)[4:9], train.read(7, 4, 5))
    assert open_clips("digits", frames=12, size=(32, 48)).read(0).shape == (12, 32, 48, 3)
    assert not torch.equal(train.read(7), train.read(8))


def test_a_batch_is_a_pure_function_of_seed_step_and_place(tmp_path):
    clips = open_clips(folder_of_clips(tmp_path, 5))
    windows = ClipWindows(clips, frames=4, size=None, seed=3)
    batch = windows.batch(7, 8)
    assert batch.shape == (8, 4, 16, 16, 3) and batch.dtype == torch.uint8
    state = torch.get_rng_state()
    fresh = ClipWindows(clips, frames=4, size=None, seed=3, cache_bytes=0)
    fresh.batch(1, 3)
    assert torch.equal(fresh.batch(7, 8), batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(windows.batch(8, 8), batch)
    assert not torch.equal(ClipWindows(clips, frames=4, size=None, seed=4).batch(7, 8), batch)
    ranks = [windows.batch(7, 2, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat(ranks), batch)


def test_random_windows_reach_every_start_of_every_clip_evenly(tmp_path):
    clips = open_clips(folder_of_clips(tmp_path, 3, frames=9))
    windows = ClipWindows(clips, frames=3, size=None, frame_step=2, stride=2)
    seen = torch.zeros(3, 9)
    for step in range(60):
        for window in windows.batch(step, 10):
            number, times = int(window[0, 0, 0, 0]), window[:, 0, 1, 0].tolist()
            assert times == [times[0], times[0] + 2, times[0] + 4]
            assert torch.equal(window, clip(number, 9)[times])
            seen[number, times[0]] += 1
    assert seen[:, [1, 3, 5, 6, 7, 8]].sum() == 0
    # 600 draws over 9 places: 67 each, standard deviation 8
    assert seen[:, [0, 2, 4]].min() > 67 - 40 and seen.max() < 67 + 40


def test_all_windows_can_be_walked(tmp_path):
    clips = open_clips(folder_of_clips(tmp_path, 2, frames=11))
    windows = ClipWindows(clips, frames=4, size=(8, 8))
    assert windows.windows(every=3) == [(0, 0), (0, 3), (0, 6), (1, 0), (1, 3), (1, 6)]
    for number, start in windows.windows(every=3):
        assert torch.equal(windows.at(number, start), fit_frames(clip(number, 11), 8, 8)[0][start : start + 4])
    for number, start in ((0, 8), (0, -1), (2, 0), (-1, 0)):
        with pytest.raises(DataError):
            windows.at(number, start)
    with pytest.raises(DataError):
        windows.windows(every=0)


def test_what_a_caller_does_to_a_window_stays_with_the_caller(tmp_path):
    windows = ClipWindows(open_clips(folder_of_clips(tmp_path, 1)), frames=4, size=None)
    windows.at(0, 2).zero_()
    windows.batch(0, 2).zero_()
    assert torch.equal(windows.at(0, 2), clip(0)[2:6])


def test_decoded_clips_are_kept_up_to_the_budget(tmp_path):
    root = folder_of_clips(tmp_path / "data", 3)
    kept = ClipWindows(open_clips(root), frames=4, size=None, cache_bytes=2 * clip(0).numel())
    every = [kept.at(number, 1) for number in range(3)]
    for number in range(3):
        (root / f"clip{number}.mp4").unlink()
    assert torch.equal(kept.at(0, 1), every[0]) and torch.equal(kept.at(1, 1), every[1])
    with pytest.raises(VideoError, match="clip2.mp4: no such file"):
        kept.at(2, 1)


def test_short_clips_are_left_out_and_named(tmp_path):
    folder_of_clips(tmp_path, 2, frames=12)
    write_video(tmp_path / "short.mp4", clip(9, 5))
    windows = ClipWindows(open_clips(tmp_path), frames=6, size=None, frame_step=2)
    assert windows.skipped == [("short.mp4", "5 frames, a window spans 11")]
    assert {number for number, _ in windows.windows(1)} == {0, 1} and "short.mp4" in windows.describe()
    with pytest.raises(DataError, match="span 31 frames, but the longest clip has 12"):
        ClipWindows(open_clips(tmp_path), frames=31)


def damage(path):
    """The header and the length stay whole, so that opening sees nothing; the last frames are gone."""
    whole = path.read_bytes()
    kept = len(whole) * 3 // 4
    path.write_bytes(whole[:kept] + b"\xff" * (len(whole) - kept))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_a_bad_clip_is_named_once_and_drawn_again(tmp_path, cache_bytes):
    folder_of_clips(tmp_path, 21)
    damage(tmp_path / "clip3.mp4")
    clips = open_clips(tmp_path)
    assert len(clips) == 21
    windows = ClipWindows(clips, frames=4, size=None, cache_bytes=cache_bytes)
    with pytest.warns(UserWarning, match="clip3.mp4") as caught:
        batches = [windows.batch(step, 4) for step in range(30)]
    assert len(caught) == 1
    assert [name for name, _ in windows.skipped] == ["clip3.mp4"] and clips.skipped == []
    assert 3 not in torch.stack(batches)[:, :, 0, 0, 0, 0]
    # the same draws, whatever was known of the clip before
    assert all(torch.equal(windows.batch(step, 4), batch) for step, batch in enumerate(batches))


def test_too_many_bad_clips_stop_the_work(tmp_path):
    folder_of_clips(tmp_path, 5)
    damage(tmp_path / "clip3.mp4")
    windows = ClipWindows(open_clips(tmp_path), frames=4, size=None)
    with pytest.raises(DataError, match="1 of 5 clips cannot be decoded.*clip3.mp4"):
        for step in range(20):
            windows.batch(step, 8)


def test_bad_clips_are_counted_among_those_that_are_long_enough(tmp_path):
    folder_of_clips(tmp_path, 30, frames=4, height=8, width=8)
    write_video(tmp_path / "long.mp4", clip(1), lossless=True)
    damage(tmp_path / "long.mp4")
    windows = ClipWindows(open_clips(tmp_path), frames=8, size=None)
    for _ in range(2):  # a second try ends as well
        with pytest.raises(DataError, match="1 of 1 clips cannot be decoded.*long.mp4"):
            windows.batch(0, 2)
    windows = ClipWindows(open_clips(tmp_path), frames=8, size=None)
    windows.leave_out(3)
    with pytest.raises(DataError, match="1 of 1 clips cannot be decoded.*long.mp4, as an earlier run"):
        windows.leave_out(30)


def test_a_clip_too_large_to_be_read_at_once_is_read_in_windows(tmp_path, monkeypatch):
    for module in ("clips", "video"):
        monkeypatch.setattr(f"fastvid.data.{module}.READ_BYTES", 10 * 16 * 16 * 3)
    windows = ClipWindows(open_clips(folder_of_clips(tmp_path, 1)), frames=4, size=None)
    assert torch.equal(windows.at(0, 9), clip(0)[9:13])
    assert windows.batch(0, 3).shape == (3, 4, 16, 16, 3) and windows.skipped == []


def test_clips_of_unequal_size_need_a_size(tmp_path):
    write_video(tmp_path / "a.mp4", clip(1, 8, 16, 16))
    write_video(tmp_path / "b.mp4", clip(2, 8, 24, 16))
    with pytest.raises(DataError, match="differ in height and width"):
        ClipWindows(open_clips(tmp_path), frames=4, size=None).batch(0, 16)
    assert ClipWindows(open_clips(tmp_path), frames=4, size=(8, 8)).batch(0, 16).shape == (16, 4, 8, 8, 3)


@pytest.mark.parametrize("options", [{"frames": 0}, {"stride": 0}, {"frame_step": 0}])
def test_windows_refuse_what_makes_no_sense(tmp_path, options):
    clips = open_clips(folder_of_clips(tmp_path, 1))
    with pytest.raises(DataError, match="at least 1"):
        ClipWindows(clips, **options)


@pytest.mark.parametrize("arguments", [(-1, 2), (0, 0), (0, 2, 2, 2), (0, 2, -1, 2)])
def test_a_batch_refuses_what_makes_no_sense(tmp_path, arguments):
    windows = ClipWindows(open_clips(folder_of_clips(tmp_path, 1)), frames=4)
    with pytest.raises(DataError, match="batch:"):
        windows.batch(*arguments)


def test_natural_order():
    names = ["frame10", "frame9", "frame1", "2", "10", "a1b20", "a1b3", ""]
    assert sorted(names, key=natural_key) == ["", "2", "10", "a1b3", "a1b20", "frame1", "frame9", "frame10"]


def test_some_clips_alone_keep_their_frames_and_labels():
    clips = open_clips("digits?count=1", frames=4, size=(16, 16))
    some = clips.only([5, 2, 9])
    assert len(some) == 3 and some.labels == [clips.labels[i] for i in (5, 2, 9)]
    assert some.names == [clips.names[i] for i in (5, 2, 9)] and torch.equal(some.read(1), clips.read(2))
    for wanted in ([], [10_000], [-1]):
        with pytest.raises(DataError, match="wanted of a set of 10000"):
            clips.only(wanted)


def test_a_batch_names_its_clips():
    windows = ClipWindows(open_clips("digits", frames=6, size=(16, 16)), frames=4, size=None, seed=3)
    clips, frames = windows.batch_of(7, 5)
    assert torch.equal(frames, windows.batch(7, 5))
    for clip, window in zip(clips, frames, strict=True):
        assert any(torch.equal(windows.at(clip, start), window) for start in range(3))
