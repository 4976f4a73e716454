"""NumPy arrays of clips: time first as Moving MNIST is published, or clips first; mapped from the disk."""

import zipfile

import numpy as np
import pytest
import torch

from fastvid.data import open_clips
from fastvid.data.video import fit_frames, write_video
from fastvid.errors import DataError


def noise(*shape) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, np.uint8)


def rgb(clip) -> torch.Tensor:
    return torch.from_numpy(clip).reshape(*clip.shape[:3], -1).expand(-1, -1, -1, 3)


def test_moving_mnist_has_time_first(tmp_path):
    array = noise(20, 7, 16, 16)
    np.save(tmp_path / "mnist_test_seq.npy", array)
    for place in (tmp_path, tmp_path / "mnist_test_seq.npy"):
        clips = open_clips(place, "test")
        assert (len(clips), clips.lengths) == (7, [20] * 7)
        assert "time first" in clips.describe() and "all clips count as test" in clips.describe()
        assert torch.equal(clips.read(3, 5, 4), rgb(array[5:9, 3]))
        assert clips.read(3, 5, 4).is_contiguous()
    resized = fit_frames(rgb(array[:, 6]).contiguous(), 8, 8)[0]
    assert torch.equal(clips.read(6, size=(8, 8)), resized)


def test_other_arrays_have_clips_first_unless_told(tmp_path):
    path = tmp_path / "clips.npy"
    array = noise(5, 6, 8, 9)
    np.save(path, array)
    clips = open_clips(path)
    assert clips.lengths == [6] * 5 and "read as [N, T, H, W]" in clips.describe()
    assert torch.equal(clips.read(4), rgb(array[4]))
    told = open_clips(f"{path}?time=first")
    assert told.lengths == [5] * 6 and torch.equal(told.read(4), rgb(array[:, 4]))
    np.save(tmp_path / "mnist_test_seq.npy", array)
    assert open_clips(f"{tmp_path}/mnist_test_seq.npy?time=second").lengths == [6] * 5
    with pytest.raises(DataError, match="time must be first or second, got 'last'"):
        open_clips(f"{path}?time=last")
    with pytest.raises(DataError, match="key=a is for a .npz"):
        open_clips(f"{path}?key=a")


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_and_orders_of_memory(tmp_path, channels):
    array = noise(4, 5, 6, 7, channels)
    np.save(tmp_path / "a.npy", np.asfortranarray(array))
    clips = open_clips(tmp_path / "a.npy")
    assert torch.equal(clips.read(2), rgb(array[2])) and clips.read(2).shape == (5, 6, 7, 3)


def test_one_clip(tmp_path):
    array = noise(5, 6, 7, 3)
    np.save(tmp_path / "a.npy", array)
    clips = open_clips(tmp_path / "a.npy")
    assert clips.lengths == [5] and torch.equal(clips.read(0), torch.from_numpy(array))


def test_a_file_a_split(tmp_path):
    for name, count in (("train", 3), ("val", 2)):
        np.save(tmp_path / f"{name}.npy", noise(count, 4, 8, 8))
    assert [len(open_clips(tmp_path, split)) for split in (None, "train", "test")] == [3, 3, 2]
    assert "split val (as test)" in open_clips(tmp_path, "test").describe()
    assert len(open_clips(f"{tmp_path}?split=val", "train")) == 2


def test_other_arrays_beside_the_splits_are_left_aside(tmp_path):
    for name, count in (("train", 3), ("test", 2), ("labels", 1), ("mean", 1)):
        np.save(tmp_path / f"{name}.npy", noise(count, 4, 8, 8))
    assert [len(open_clips(tmp_path, split)) for split in ("train", "test")] == [3, 2]


@pytest.mark.parametrize("name", ["flow.npy", "features.npz", "index.h5"])
def test_an_array_does_not_claim_a_folder_of_films(tmp_path, name):
    clip = tmp_path / "clips" / "season" / "day" / "a.mp4"
    clip.parent.mkdir(parents=True)
    write_video(clip, torch.zeros(3, 16, 16, 3, dtype=torch.uint8))
    magic = {"npy": b"\x93NUMPY", "npz": b"PK\x03\x04", "h5": b"\x89HDF\r\n\x1a\n"}
    (tmp_path / name).write_bytes(magic[name.rpartition(".")[2]])
    assert open_clips(tmp_path).names == ["clips/season/day/a.mp4"]


def test_npz(tmp_path):
    train, test = noise(3, 4, 8, 8), noise(2, 4, 8, 8)
    np.savez_compressed(tmp_path / "both.npz", train=train, test=test, labels=np.zeros(3))
    assert torch.equal(open_clips(tmp_path / "both.npz", "test").read(1), rgb(test[1]))
    assert "split test" in open_clips(tmp_path / "both.npz", "test").describe()
    np.savez(tmp_path / "one.npz", train)
    assert torch.equal(open_clips(tmp_path / "one.npz", "test").read(2), rgb(train[2]))
    np.savez(tmp_path / "more.npz", a=train, b=test)
    assert torch.equal(open_clips(f"{tmp_path}/more.npz?key=b").read(0), rgb(test[0]))
    for spec in ("more.npz", "more.npz?key=c"):
        with pytest.raises(DataError, match="give one of: a, b"):
            open_clips(f"{tmp_path}/{spec}")


def test_a_clip_that_a_caller_changes_leaves_the_file_as_it_was(tmp_path):
    array = noise(2, 3, 4, 4, 3)
    np.save(tmp_path / "a.npy", array)
    clips = open_clips(tmp_path / "a.npy")
    clips.read(0).zero_()
    assert torch.equal(clips.read(0), rgb(array[0])) and np.array_equal(np.load(tmp_path / "a.npy"), array)


@pytest.mark.parametrize(
    "array, reason",
    [
        (np.zeros((2, 3, 4, 4), "f4"), "wanted uint8 in 0..255, got float32"),
        (np.zeros((2, 3, 4), "u1"), r"wanted \[N, T, H, W\] or .*, got array \[2, 3, 4\]"),
        (np.zeros((2, 3, 4, 4, 2), "u1"), r"wanted \[N, T, H, W\] or"),
        (np.zeros((0, 3, 4, 4), "u1"), "no frame in an array"),
        (np.array([{}, []], object), "cannot be read as .npy"),
    ],
)
def test_arrays_of_another_kind(tmp_path, array, reason):
    np.save(tmp_path / "a.npy", array, allow_pickle=array.dtype == object)
    with pytest.raises(DataError, match=reason):
        open_clips(tmp_path / "a.npy")


def test_damaged_arrays(tmp_path):
    np.save(tmp_path / "a.npy", noise(4, 5, 6, 7))
    whole = (tmp_path / "a.npy").read_bytes()
    header = whole.index(b"(4,")
    for data in (whole[:-1], whole[:40], whole[:8], whole.replace(b"(4,", b"(9,"), whole[:header] + b"\xff" * 60):
        (tmp_path / "a.npy").write_bytes(data)
        with pytest.raises(DataError, match="a.npy: cannot be read as .npy") as caught:
            open_clips(tmp_path / "a.npy")
        assert "\n" not in str(caught.value)
    np.savez_compressed(tmp_path / "a.npz", noise(4, 5, 6, 7))
    whole = (tmp_path / "a.npz").read_bytes()
    for data in (whole[:-30], whole[:60] + b"\0\1\2\3" + whole[64:], whole[:200] + b"\0\1\2\3" + whole[204:]):
        (tmp_path / "a.npz").write_bytes(data)
        with pytest.raises(DataError, match="a.npz: cannot be read as .npz"):
            open_clips(tmp_path / "a.npz")


def test_a_npz_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fastvid.data.formats.moving_mnist.READ_BYTES", 1000)
    np.savez_compressed(tmp_path / "a.npz", np.zeros((4, 5, 6, 9), "u1"))
    with pytest.raises(DataError, match="arr_0 unpacks to 1208 bytes, above 1000; store it as .npy"):
        open_clips(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(DataError, match="a.txt is no array"):
        open_clips(tmp_path / "b.npz")
