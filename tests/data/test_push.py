"""The pushing arm: the same clip for a seed anywhere, an arm that goes where it is told, objects that get pushed."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from fastvid.data import push
from fastvid.data.video import frame_hash
from fastvid.errors import DataError

needs_pybullet = pytest.mark.skipif(find_spec("pybullet") is None, reason="pybullet is not installed")

HASH = """
from fastvid.data.push import PushSimulator
from fastvid.data.video import frame_hash
with PushSimulator() as arm:
    print(frame_hash(arm.clip({seed}, {frames})))
"""


@pytest.fixture(scope="module")
def arm():
    with push.PushSimulator() as simulator:
        yield simulator


def objects_after(seed, frames):
    """Places of the objects at the start and at the end of a clip."""
    with push.PushSimulator((16, 16)) as simulator:
        found, places = {}, []
        set_up = simulator._set_up

        def remember(*arguments):
            robot, found["objects"] = set_up(*arguments)
            places.append(read())
            return robot, found["objects"]

        def read():
            bodies = found["objects"]
            return torch.tensor([simulator._bullet.getBasePositionAndOrientation(body)[0] for body in bodies])

        simulator._set_up = remember
        simulator.clip(seed, frames)
        return places[0], read()


@needs_pybullet
def test_a_seed_is_a_clip_in_any_order_and_length(arm):
    first = arm.clip(1, 8)
    assert first.shape == (8, 64, 64, 3) and first.dtype == torch.uint8
    other = arm.clip(2_000_007, 3)
    assert torch.equal(arm.clip(1, 8), first) and torch.equal(arm.clip(2_000_007, 3), other)
    assert torch.equal(arm.clip(1, 5), first[:5])
    assert not torch.equal(first[:3], other)


@needs_pybullet
def test_same_bytes_in_another_process(arm):
    arm.clip(4, 6)
    here = frame_hash(arm.clip(5, 6))
    script = HASH.format(seed=5, frames=6)
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.split()[-1] == here


@needs_pybullet
def test_two_simulators_do_not_disturb_each_other(arm):
    alone = arm.clip(11, 4)
    with push.PushSimulator() as second:
        second.clip(12, 2)
        assert torch.equal(arm.clip(11, 4), alone)
        assert torch.equal(second.clip(11, 4), alone)


@needs_pybullet
def test_the_hand_follows_its_actions(arm):
    clip = arm.clip(0, 30)
    moved = arm.last_positions[1:] - arm.last_positions[:-1]
    assert arm.last_positions.shape == arm.last_actions.shape == (30, 3)
    assert (moved - arm.last_actions[:-1]).abs().max() < 0.03  # it lags a little where the hand turns
    assert (arm.last_positions[-1] - arm.last_positions[0] - arm.last_actions[:-1].sum(0)).abs().max() < 0.03
    assert moved.norm(dim=1).sum() > 0.3
    assert ((clip[1:].int() - clip[:-1].int()).abs() > 20).any(-1).flatten(1).float().mean(1).min() > 0.001


@needs_pybullet
def test_objects_are_pushed_and_stay_in_the_tray():
    pushed = 0
    for seed in range(4):
        before, after = objects_after(seed, 30)
        assert 4 <= len(before) <= 6
        assert ((after[:, :2] - torch.tensor([0.65, 0.0])).abs() < 0.3).all() and (after[:, 2] > 0).all()
        pushed += int(((after - before).norm(dim=1) > 0.02).sum())
    assert pushed >= 6


@needs_pybullet
def test_colours_are_distinct(arm):
    frame = arm.clip(3, 1)[0].int()
    vivid = frame[(frame.max(-1).values - frame.min(-1).values) > 90]
    assert len({tuple(colour.tolist()) for colour in vivid // 64}) >= 4


@needs_pybullet
@pytest.mark.parametrize("size", [(16, 16), (48, 80), (33, 17)])
def test_any_size(size):
    with push.PushSimulator(size) as simulator:
        assert simulator.clip(0, 2).shape == (2, *size, 3)


def test_odd_shapes_of_train_and_test_are_different_ones():
    train, test = (set(range(*push._SHAPES[split])) for split in ("train", "test"))
    assert not train & test and len(train | test) == 1000
    assert not set(push.SPLITS["train"]) & set(push.SPLITS["test"])


@needs_pybullet
@pytest.mark.parametrize(("arguments", "word"), [((1_000_000,), "1000000"), ((0, 0), "frames")])
def test_messages(arm, arguments, word):
    with pytest.raises(DataError, match=word) as caught:
        arm.clip(*arguments)
    assert "\n" not in str(caught.value)


def test_more_messages(monkeypatch):
    with pytest.raises(DataError, match="8x64"):
        push.PushSimulator((8, 64))
    with pytest.raises(DataError, match="not running"):
        push.PushSimulator().clip(0)
    monkeypatch.setitem(sys.modules, "pybullet", None)
    with pytest.raises(DataError, match="pip install pybullet"):
        push.PushSimulator().__enter__()
