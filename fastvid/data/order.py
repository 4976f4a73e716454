"""Epochs over clips: every window once, in an order that depends on seed and epoch alone, resumable at any place."""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastvid.data.clips import ClipWindows
from fastvid.errors import DataError

ROUNDS = 8  # of the permutation; four are proven enough for a random function, the rest is for small numbers


class Window(NamedTuple):
    """A window that was read: clip number, first frame, uint8 [T, H, W, 3]."""

    clip: int
    start: int
    frames: Tensor


class Permutation:
    """A shuffled range(count), any place of which is computed without the others.

    count:   how many numbers, at least 1. key: text that decides the order.
    Raises:  IndexError for a place outside.
    Source:  an alternating Feistel network on (x mod a, x div a) with sha256 as round function (Luby and Rackoff 1988);
             places beyond `count` are walked on (Black and Rogaway 2002, cycle walking).
    """

    def __init__(self, count: int, key: str):
        self.count, self.key = count, key
        side = math.isqrt(count - 1) + 1
        self._sides = side, -(-count // side)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self.count:
            raise IndexError(place)
        # the sides multiply to less than count + their length, so hardly a place is walked on
        place = self._once(place)
        while place >= self.count:
            place = self._once(place)
        return place

    def _once(self, place: int) -> int:
        halves = [place % self._sides[0], place // self._sides[0]]
        for number in range(ROUNDS):
            near, far = number % 2, 1 - number % 2
            digest = hashlib.sha256(f"{self.key}/{number}/{halves[far]}".encode()).digest()
            halves[near] = (halves[near] + int.from_bytes(digest[:8], "little")) % self._sides[near]
        return halves[1] * self._sides[0] + halves[0]


class ClipOrder:
    """Every usable window start once an epoch, for training that counts epochs; `ClipWindows.batch` draws at random.

    The order is drawn from sha256 of (seed, epoch). Place p of it belongs to rank p mod world, so all ranks together
    see what one would. A clip that cannot be decoded is left out, named once in a warning and in `windows.skipped`;
    the others keep their order, and the epoch ends.

    windows: ClipWindows; its stride decides which starts there are. seed: of the order. rank, world: this process and
             how many there are.
    Raises:  DataError for a rank outside the world, and later if more than 5 in 100 clips cannot be decoded.
    """

    def __init__(self, windows: ClipWindows, seed: int = 0, rank: int = 0, world: int = 1):
        if not 0 <= rank < world:
            raise DataError(f"clip order: got rank {rank} of {world}; ranks count from 0.")
        self.windows, self.seed, self.rank, self.world = windows, seed, rank, world
        self.epoch, self.position = 0, 0
        spans = [windows.clips.lengths[i] - windows.span for i in windows.usable]
        self._ends = list(accumulate(span // windows.stride + 1 for span in spans))

    def __len__(self) -> int:
        """Windows of an epoch, over all ranks."""
        return self._ends[-1]

    def place(self, epoch: int, position: int) -> tuple[int, int]:
        """What is visited at a place of an epoch.

        epoch, position: from 0; the position counts over all ranks.
        Returns: clip number and first frame.
        Raises:  DataError for a position outside the epoch.
        """
        if not 0 <= position < len(self):
            raise DataError(f"clip order: place {position} wanted, an epoch has {len(self)} windows.")
        number = Permutation(len(self), f"{self.seed}/{epoch}")[position]
        which = bisect_right(self._ends, number)
        before = self._ends[which - 1] if which else 0
        return self.windows.usable[which], (number - before) * self.windows.stride

    def __iter__(self) -> Iterator[Window]:
        """The windows from here to the end of the epoch, for one process; then the next epoch begins.

        Returns: Windows; `position` has moved past each when it is handed out.
        Raises:  DataError where there are several ranks: by windows, one could run out before the others.
        """
        if self.world > 1:
            raise DataError(f"clip order: rank {self.rank} of {self.world} must use batches: they end for all at once.")
        while self.position < len(self):
            here, self.position = self.position, self.position + 1
            window = self._read(here)
            if window is not None:
                yield window
        self.epoch, self.position = self.epoch + 1, 0

    def batches(self, batch_size: int) -> Iterator[Tensor | None]:
        """This rank's windows in batches from here to the end of the epoch; every rank gets the same number of them.

        batch_size: places of a batch on this rank, at least 1.
        Returns: uint8 [B, T, H, W, 3] in 0..255; B is smaller in the last batch and where a clip cannot be decoded, and
                 None stands for a batch without any window.
        Raises:  DataError for a batch_size below 1 or windows of unequal size.
        """
        if batch_size < 1:
            raise DataError(f"clip order: batch_size must be at least 1, got {batch_size}.")
        while self.position < len(self):
            first = self.position + self.rank
            self.position += batch_size * self.world
            read = [self._read(first + i * self.world) for i in range(batch_size)]
            frames = [window.frames for window in read if window is not None]
            if any(one.shape != frames[0].shape for one in frames):
                raise DataError("the clips differ in height and width; give ClipWindows one size.")
            yield torch.stack(frames) if frames else None
        self.epoch, self.position = self.epoch + 1, 0

    def state(self) -> dict:
        """Where the order is and what it knows, for a checkpoint.

        Returns: JSON-ready: epoch, position over all ranks, seed, windows, sha256 of the clips and how they are cut,
                 and the names of clips that were bad as far as this rank has read; others may have found others, and
                 whoever goes on from here finds those again.
        """
        names = self.windows.clips.names
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "windows": len(self),
                "data": self._data, "bad": sorted(names[i] for i in self.windows.bad)}  # fmt: skip

    @cached_property
    def _data(self) -> str:
        windows, clips = self.windows, self.windows.clips
        what = [clips.names, clips.lengths, windows.span, windows.stride, windows.frame_step]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    @classmethod
    def from_state(cls, windows: ClipWindows, state: dict, rank: int = 0, world: int = 1) -> "ClipOrder":
        """Go on where `state` was taken, with any number of ranks.

        windows: over the same data set. state: of `state()`. rank, world: as for the class.
        Returns: ClipOrder; clips that were bad are not tried or named again.
        Raises:  DataError for a state of another data set or of windows cut otherwise, or none.
        """
        try:
            seed, epoch, position, counted = (int(state[key]) for key in ("seed", "epoch", "position", "windows"))
            bad, data = set(state["bad"]), state["data"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"clip order: wanted a state of one, got {str(state)[:80]}: {error!r}.") from error
        order = cls(windows, seed, rank, world)
        if counted != len(order) or epoch < 0 or position < 0:
            raise DataError(
                f"clip order: the state is of {counted} windows at {epoch}, {position}; the data set has {len(order)}."
            )
        if data != order._data:
            raise DataError(
                "clip order: the state is of other clips, or of windows cut otherwise; open the same data set with the "
                "same frames, stride and frame_step, or begin anew."
            )
        order.epoch, order.position = epoch, position
        for number, name in enumerate(windows.clips.names):
            if name in bad:
                windows.leave_out(number)
        return order

    def _read(self, position: int) -> Window | None:
        if position >= len(self):
            return None
        clip, start = self.place(self.epoch, position)
        frames = self.windows.try_at(clip, start)
        return None if frames is None else Window(clip, start, frames)
