"""The pushing arm's clips in BAIR's layout: what was simulated comes back through the reader, bit by bit."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from write_bair import example, framed

from fastvid.data import make_bair, open_clips
from fastvid.data.formats._write_tfrecord import serialize_example, write_records
from fastvid.data.formats.bair import read_actions
from fastvid.data.push import SPLITS, PushSimulator
from fastvid.errors import DataError


class FakeArm:
    """As quick as noise; counts what it makes, and may break down."""

    made: list[int] = []
    last = None

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def clip(self, seed, frames):
        if seed == self.last:
            raise KeyboardInterrupt
        self.made.append(seed)
        generator = torch.Generator().manual_seed(seed)
        self.last_actions, self.last_positions = torch.rand(2, frames, 3, generator=generator)
        return torch.randint(0, 256, (frames, *self.size, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(make_bair, "PushSimulator", FakeArm)
    monkeypatch.setattr(make_bair, "RECORDS", 4)
    monkeypatch.setattr(FakeArm, "made", [])
    return FakeArm


def make(out, clips, frames=3, **options):
    return make_bair.make_bair(out, clips, frames, size=(16, 16), **options)


def test_messages_are_those_of_another_writer():
    numbers = np.array([1, -1, 2**62]), np.array([0.5, -2.0], np.float32)
    ours = serialize_example({"a": b"x" * 300, "b": numbers[0], "c": numbers[1]})
    assert ours == example({"a": b"x" * 300, "b": numbers[0].tolist(), "c": numbers[1].tolist()})
    with pytest.raises(TypeError, match="got bool"):
        serialize_example({"a": np.array([True])})


def test_files_are_those_of_another_writer_and_appear_whole(tmp_path):
    write_records(tmp_path / "a", [b"abc", b""])
    assert (tmp_path / "a").read_bytes() == framed(b"abc") + framed(b"")

    def breaks():
        yield b"abc"
        raise KeyError

    with pytest.raises(KeyError):
        write_records(tmp_path / "b", breaks())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_clips_and_actions_come_back(tmp_path, fake):
    folder = make(tmp_path, 10)
    assert sorted(path.name for path in folder.iterdir()) == [
        "traj_0_to_3.tfrecords", "traj_4_to_7.tfrecords", "traj_8_to_9.tfrecords"]  # fmt: skip
    make(tmp_path, 2, split="test")
    clips, arm = open_clips(tmp_path, "train"), FakeArm((16, 16))
    actions, positions = read_actions(tmp_path, range(10), "train")
    assert (len(clips), clips.lengths, clips.skipped) == (10, [3] * 10, []) and len(open_clips(tmp_path, "test")) == 2
    for i in range(10):
        assert torch.equal(clips.read(i), arm.clip(SPLITS["train"][i], 3))
        assert torch.equal(actions[i, :, :3], arm.last_actions) and not actions[i, :, 3].any()
        assert torch.equal(positions[i], arm.last_positions)


def test_an_interrupted_run_goes_on_with_the_next_file(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(fake, "last", 6)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, 10)
    monkeypatch.setattr(fake, "last", None)
    fake.made.clear()
    folder = make(tmp_path, 10)
    assert fake.made == list(range(4, 10)) and len(open_clips(tmp_path)) == 10
    path = folder / "traj_4_to_7.tfrecords"
    path.write_bytes(path.read_bytes()[:-1])
    fake.made.clear()
    make(tmp_path, 10)
    make(tmp_path, 4, first=12)
    assert fake.made == [*range(4, 8), *range(12, 16)] and len(open_clips(tmp_path)) == 14


def test_other_clips_in_the_folder_are_refused(tmp_path, fake):
    make(tmp_path, 8)
    for options in ({"frames": 2}, {"frames": 4}):
        with pytest.raises(DataError, match="traj_0_to_3.tfrecords: holds clips of another length"):
            make(tmp_path, 8, **options)
    with pytest.raises(DataError, match="traj_4_to_7.tfrecords: holds some of clips 0 to 5"):
        make(tmp_path, 6)


def test_what_makes_no_sense_is_refused(tmp_path, fake):
    for arguments in ({"clips": 0}, {"clips": 1, "first": 3}, {"clips": 1, "first": -4}, {"clips": 10**7}):
        with pytest.raises(DataError, match="data make: wanted at least 1 of"):
            make(tmp_path, **arguments)
    with pytest.raises(DataError, match="unknown split 'val'"):
        make(tmp_path, 1, split="val")
    with pytest.raises(DataError, match="square, got 16x24"):
        make_bair.make_bair(tmp_path, 1, size=(16, 24))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        make(tmp_path / "file", 1)


@pytest.mark.skipif(find_spec("pybullet") is None, reason="pybullet is not installed")
def test_the_arm_itself(tmp_path):
    make(tmp_path, 2, frames=2)
    with PushSimulator((16, 16)) as arm:
        clip = arm.clip(SPLITS["train"][1], 2)
    assert torch.equal(open_clips(tmp_path).read(1), clip)
    assert torch.equal(read_actions(tmp_path, [1])[0][0, :, :3], arm.last_actions)
