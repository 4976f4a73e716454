"""Moving digits: the same clip for a seed anywhere, straight flight between walls, other digits in the test split."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from fastvid.data import digits, open_clips
from fastvid.data.video import frame_hash
from fastvid.errors import DataError

pytest.importorskip("sklearn", reason="scikit-learn is not installed; it carries the digits")


def test_shape_and_range():
    clip = digits.make_clip(3, 12, (48, 80))
    assert clip.shape == (12, 48, 80, 3) and clip.dtype == torch.uint8 and clip.is_contiguous()
    assert torch.equal(clip[..., 0], clip[..., 1]) and torch.equal(clip[..., 0], clip[..., 2])
    assert clip.min() == 0 and clip.max() > 200


def test_a_seed_is_a_clip_in_any_order_and_length():
    one, two = digits.make_clip(1), digits.make_clip(2_000_001)
    assert not torch.equal(one, two)
    assert torch.equal(digits.make_clip(2_000_001), two) and torch.equal(digits.make_clip(1), one)
    assert torch.equal(digits.make_clip(1, 7), one[:7])


def test_known_bytes_in_another_process():
    script = "from fastvid.data import digits, video; print(video.frame_hash(digits.make_clip(999_999, 20)))"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == frame_hash(digits.make_clip(999_999, 20))
    assert (
        printed.strip() == "c65f66af9cc465fc080496195374ada2c0d31f41c9754727cf6918e0e5076a8e"
    )  # VERSION must rise if this changes


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (33, 70)])
def test_digits_fly_straight_and_turn_only_at_walls(size):
    side, fastest = min(size) * 7 // 16, max(1, min(size) // 16)
    room = size[0] - side, size[1] - side
    turns = 0
    for seed in range(20):
        bits = np.random.default_rng(seed).integers(0, 2**31, (200, 4)).tolist()
        path = np.array(digits._path(bits, *room, fastest))
        assert (path >= 0).all() and (path < room).all()
        steps = np.diff(path, axis=0)
        assert (abs(steps) <= fastest).all()
        for t in np.flatnonzero((np.diff(steps, axis=0) != 0).any(1)) + 1:
            # a step that would leave is cut short at the wall, and the next one is new: both begin or end at a wall
            assert np.isin(path[t : t + 2], [0, room[0] - 1, room[1] - 1]).any()
            turns += 1
    assert turns > 100


def test_every_clip_of_a_sample_moves():
    for seed in range(50):
        clip = digits.make_clip(seed, 16).short()
        assert (clip[1:] != clip[:-1]).any(0).any()


def test_train_and_test_show_different_digits():
    assert not set(digits.SPLITS["train"]) & set(digits.SPLITS["test"])
    train, test = digits._images("train"), digits._images("test")
    assert len(train) + len(test) == 1797
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def test_enlargement_is_bilinear():
    image = torch.from_numpy(digits._images("train")[5])
    for side in (7, 8, 28):
        wanted = torch.nn.functional.interpolate(image[None, None].double(), (side, side), mode="bilinear")[0, 0]
        got = torch.from_numpy(digits._enlarge(image.numpy(), side).astype(float))
        assert (got - wanted * 255 / 16).abs().max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((-1,), "seed"), ((1_500_000,), "1500000"), ((0, 0), "frames"), ((0, 4, (15, 64)), "15x64"),
        ((0, 4, (16, 16), 3), "count"),
    ],
)
def test_messages(arguments, word):
    with pytest.raises(DataError, match=word) as caught:
        digits.make_clip(*arguments)
    assert "\n" not in str(caught.value)


def test_missing_scikit_learn_is_named(monkeypatch):
    digits._handwriting.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        digits.make_clip(0)


def test_the_label_of_one_digit_is_its_value():
    """The images of the value that the label names, and no others, hold the digit that the clip shows."""
    clips = open_clips("digits?count=1", "test", frames=3, size=(32, 32))
    assert len(clips.labels) == len(clips) == 1000 and set(clips.labels) == set("0123456789")
    images, values = digits._handwriting("test")
    for i in range(30):
        shown = clips.read(i)[0, ..., 0]
        rows, columns = shown.any(1).nonzero()[:, 0], shown.any(0).nonzero()[:, 0]
        ink = shown[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].numpy()
        found = {str(value) for image, value in zip(images, values, strict=True) if _same_ink(image, ink)}
        assert found == {clips.labels[i]}
    assert clips.labels[7] == digits.labels([2_000_007], 1)[0]


def _same_ink(image: np.ndarray, ink: np.ndarray) -> bool:
    large = digits._enlarge(image, 14).astype(np.uint8)
    rows, columns = large.any(1).nonzero()[0], large.any(0).nonzero()[0]
    return np.array_equal(large[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], ink)


def test_two_digits_are_unchanged_by_the_option_and_have_no_class():
    plain, two = open_clips("digits", frames=5), open_clips("digits?count=2", frames=5)
    assert plain.labels is two.labels is None
    assert torch.equal(plain.read(3), two.read(3)) and torch.equal(two.read(3), digits.make_clip(3, 5))


@pytest.mark.parametrize("spec", ["digits?count=3", "digits?count=one", "digits?number=1", "push?count=1"])
def test_other_options_are_refused(spec):
    with pytest.raises(DataError, match="count must be 1 or 2|no option") as caught:
        open_clips(spec)
    assert "\n" not in str(caught.value)
