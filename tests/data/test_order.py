"""Epochs visit every window once, in an order of seed and epoch, whatever breaks: files, processes, the run itself."""

import json
import warnings
from collections import Counter

import pytest
import torch

from fastvid.data import ClipOrder, ClipWindows
from fastvid.data._layouts import Layout
from fastvid.data.clips import Clips
from fastvid.data.order import Permutation
from fastvid.errors import DataError, VideoError


def windows_of(lengths, bad=(), frames=4, **options) -> ClipWindows:
    """Clips of grey frames whose value is the frame's number; clips of `bad` cannot be decoded."""

    def load(i, start, count, size):
        opened[i] += 1
        if i in bad:
            raise VideoError(f"clip{i}: damaged")
        ramp = torch.arange(start, start + count, dtype=torch.uint8)
        return torch.cat([torch.full_like(ramp, i), ramp]).view(2, -1).T[:, :, None, None].repeat(1, 1, 1, 3)

    opened = Counter()
    layout = Layout([f"clip{i}" for i in range(len(lengths))], list(lengths), load, "made", [])
    made = ClipWindows(Clips(layout), frames=frames, size=None, **options)
    made.opened = opened
    return made


def places(windows) -> list[tuple[int, int]]:
    return [(window.clip, window.start) for window in windows]


def places_in_batches(order, batch_size=1) -> list[tuple[int, int]]:
    """The same by what `windows_of` paints into the frames, for several ranks."""
    batches = [batch for batch in order.batches(batch_size) if batch is not None]
    return [(int(window[0, 0, 0, 0]), int(window[0, 1, 0, 0])) for batch in batches for window in batch]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 17, 1000])
def test_a_permutation_has_every_number_once(count):
    for key in ("a", "b"):
        assert sorted(Permutation(count, key)[i] for i in range(count)) == list(range(count))
    if count > 3:
        assert [Permutation(count, "a")[i] for i in range(count)] != [Permutation(count, "b")[i] for i in range(count)]
    for outside in (-1, count):
        with pytest.raises(IndexError):
            Permutation(count, "a")[outside]


def test_a_huge_permutation_costs_nothing():
    shuffled = Permutation(10**12, "key")
    first = [shuffled[i] for i in range(200)]
    assert len(set(first)) == 200 and max(first) > 9 * 10**11 and min(first) < 10**11
    rising = sum(a < b for a, b in zip(first, first[1:], strict=False))
    assert 70 < rising < 130  # half of 199, standard deviation 4 (the rises of a random order)


def test_every_number_comes_at_every_place_equally_often():
    draws, count = 2000, 7
    table = torch.zeros(count, count)
    pairs = Counter()
    for key in range(draws):
        order = [Permutation(count, str(key))[place] for place in range(count)]
        table[range(count), order] += 1
        pairs[order[0], order[1]] += 1
    expected = draws / count
    # 36 degrees of freedom: 99.99% of random orders stay below 78
    assert ((table - expected) ** 2 / expected).sum() < 78
    # 41 degrees of freedom: 99.99% below 85
    expected = draws / (count * (count - 1))
    assert sum((pairs[a, b] - expected) ** 2 / expected for a in range(7) for b in range(7) if a != b) < 85


def test_an_epoch_visits_every_start_once_and_the_next_in_another_order():
    windows = windows_of([9, 3, 4, 10], stride=2, frame_step=1)
    order = ClipOrder(windows, seed=5)
    wanted = [(0, 0), (0, 2), (0, 4), (2, 0), (3, 0), (3, 2), (3, 4), (3, 6)]
    first, second = places(order), places(order)
    assert len(order) == 8 and sorted(first) == sorted(second) == wanted and first != second
    assert order.epoch == 2 and order.position == 0
    assert places(ClipOrder(windows, seed=5)) == first != places(ClipOrder(windows, seed=6))
    for clip, start, frames in ClipOrder(windows, seed=5):
        assert frames[0, 0, 0, 0] == clip and frames[:, 1, 0, 0].tolist() == list(range(start, start + 4))
    with pytest.raises(DataError, match="place 8 wanted, an epoch has 8"):
        order.place(0, 8)


def test_one_bad_file_in_a_hundred_is_named_once_and_the_epoch_ends():
    whole = places(ClipOrder(windows_of([6] * 100), seed=1))
    windows = windows_of([6] * 100, bad={37}, cache_bytes=0)
    order = ClipOrder(windows, seed=1)
    with pytest.warns(UserWarning, match="clip skipped: clip37: damaged") as caught:
        visited = places(order)
    assert len(caught) == 1 and windows.skipped == [("clip37", "clip37: damaged")]
    assert visited == [place for place in whole if place[0] != 37] and len(visited) == 297
    assert order.epoch == 1 and windows.opened[37] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(places(order)) == 297


def test_too_many_bad_files_stop_the_work():
    order = ClipOrder(windows_of([6] * 100, bad=set(range(0, 100, 16))), seed=1)
    with pytest.warns(UserWarning), pytest.raises(DataError, match="6 of 100 clips cannot be decoded"):
        places(order)


def test_three_interruptions_repeat_and_skip_nothing():
    windows = windows_of([7] * 25, bad={3})
    with pytest.warns(UserWarning) as caught:
        order = ClipOrder(windows, seed=2)
        unbroken = places(order) + places(order)
    assert len(caught) == 1
    visited, state = [], json.dumps(ClipOrder(windows_of([7] * 25), seed=2).state())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for stop in (17, 60, 130, 10_000):
            order = ClipOrder.from_state(windows_of([7] * 25, bad={3}), json.loads(state))
            while order.epoch < 2 and len(visited) < stop:
                for window in order:
                    visited.append((window.clip, window.start))
                    if len(visited) == stop:
                        break
            state = json.dumps(order.state())
    assert visited == unbroken and len(visited) == 2 * 24 * 4
    assert len([one for one in caught if "clip3" in str(one.message)]) == 1


def test_two_ranks_see_together_what_one_sees():
    alone = ClipOrder(windows_of([7] * 9), seed=3)
    ranks = [ClipOrder(windows_of([7] * 9), 3, rank, 2) for rank in range(2)]
    for _ in range(2):
        whole, parts = places(alone), [places_in_batches(rank, 4) for rank in ranks]
        assert whole[0::2] == parts[0] and whole[1::2] == parts[1]
    batches = list(zip(*(ClipOrder(windows_of([7] * 9), 3, rank, 2).batches(5) for rank in range(2)), strict=True))
    alone = list(ClipOrder(windows_of([7] * 9), 3).batches(10))
    assert [sum(map(len, pair)) for pair in batches] == [len(batch) for batch in alone] == [10, 10, 10, 6]
    for pair, batch in zip(batches, alone, strict=True):
        assert torch.equal(pair[0], batch[0::2]) and torch.equal(pair[1], batch[1::2])


def test_another_number_of_ranks_goes_on_where_the_first_stopped():
    whole = places(ClipOrder(windows_of([7] * 9), seed=3))
    ranks = [ClipOrder(windows_of([7] * 9), 3, rank, 2) for rank in range(2)]
    for rank in ranks:
        steps = rank.batches(3)
        next(steps), next(steps)
    state = ranks[0].state()
    assert state == ranks[1].state() and state["position"] == 12
    rest = [places_in_batches(ClipOrder.from_state(windows_of([7] * 9), state, rank, 3)) for rank in range(3)]
    assert sorted(sum(rest, [])) == sorted(whole[12:]) and rest[0] == whole[12::3]


def test_a_state_knows_its_data_set():
    state = json.loads(json.dumps(ClipOrder(windows_of([7, 9])).state()))
    ClipOrder.from_state(windows_of([7, 9]), state)
    renamed = windows_of([7, 9])
    renamed.clips.names[0] = "clip7"
    # as many windows in all of these
    for others in (windows_of([9, 7]), windows_of([8, 8]), windows_of([4, 6], frames=1), renamed,
                   windows_of([10, 12], frames=4, frame_step=2)):  # fmt: skip
        with pytest.raises(DataError, match="of other clips, or of windows cut otherwise"):
            ClipOrder.from_state(others, state)


def test_every_rank_gets_as_many_batches_and_none_for_an_empty_one():
    with pytest.warns(UserWarning):
        ranks = [list(ClipOrder(windows_of([4] * 21, bad={8}), 0, rank, 4).batches(2)) for rank in range(4)]
        alone = list(ClipOrder(windows_of([4] * 21, bad={8}), seed=0).batches(1))
    assert [len(batches) for batches in ranks] == [3] * 4
    assert sum(len(batch) for batches in ranks for batch in batches if batch is not None) == 20
    assert len(alone) == 21 and sum(batch is None for batch in alone) == 1
    last = ClipOrder(windows_of([4] * 5), seed=0, rank=3, world=4)
    assert [None if batch is None else len(batch) for batch in last.batches(1)] == [1, None]
    assert last.epoch == 1 and last.position == 0


def test_what_makes_no_sense_is_refused():
    windows = windows_of([7, 7])
    for rank, world in ((2, 2), (-1, 1), (0, 0)):
        with pytest.raises(DataError, match="ranks count from 0"):
            ClipOrder(windows, 0, rank, world)
    with pytest.raises(DataError, match="batch_size must be at least 1"):
        next(ClipOrder(windows).batches(0))
    state = ClipOrder(windows).state()
    for wrong in ({}, {**state, "bad": None}, {**state, "epoch": "x"}, []):
        with pytest.raises(DataError, match="wanted a state of one"):
            ClipOrder.from_state(windows, wrong)
    with pytest.raises(DataError, match="of 8 windows at 0, 0; the data set has 12"):
        ClipOrder.from_state(windows_of([7, 7, 7]), state)
    with pytest.raises(DataError, match="ranks count from 0"):
        ClipOrder.from_state(windows, state, 4, 4)
    with pytest.raises(DataError, match="rank 1 of 2 must use batches"):
        next(iter(ClipOrder(windows, 0, 1, 2)))
    uneven = windows_of([7, 7])
    uneven.clips._layout = uneven.clips._layout._replace(load=lambda i, s, n, size: torch.zeros(n, 4 + i, 4, 3).byte())
    with pytest.raises(DataError, match="differ in height and width"):
        list(ClipOrder(uneven).batches(8))
