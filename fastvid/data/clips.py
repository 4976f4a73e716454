"""Data sets of clips: `open_clips` sniffs what a path or name means, `ClipWindows` cuts training windows from it."""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastvid.data._layouts import (
    GENERATORS,
    Layout,
    Size,
    from_generator,
    generator_options,
    natural_key,
)
from fastvid.data.formats import check_options, open_known, parse_spec
from fastvid.data.formats._plain import open_plain
from fastvid.data.video import READ_BYTES
from fastvid.errors import DataError, VideoError

__all__ = ["GENERATORS", "ClipWindows", "Clips", "natural_key", "open_clips"]

NOMINAL_FRAMES = 30
CACHE_BYTES = 4 << 30
MAX_BAD_SHARE = 0.05
MAX_LINES = 20
MAX_NAME = 200  # letters of a path in a message on a path that is too long


class Clips:
    """A list of clips that are decoded or made when asked for.

    names:   one a clip, relative to the data set's folder.
    lengths: frames of each clip.
    skipped: (name, reason) of each file that looked like a clip and could not be used.
    labels:  the class of each clip, or None where the data set has no classes.
    """

    def __init__(self, layout: Layout) -> None:
        self.names, self.lengths, self.skipped = layout.names, layout.lengths, layout.skipped
        self.labels = layout.labels
        self._layout = layout

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int, start: int = 0, frames: int | None = None, size: Size | None = None) -> Tensor:
        """Frames of one clip.

        i:      clip number from 0. start: first frame. frames: how many, exactly; None means the rest.
        size:   (H, W) to which `fit_frames` brings each frame; None keeps the clip's own.
        Returns: uint8 [T, H, W, 3] in 0..255, RGB.
        Raises: DataError for a clip or frames outside the data set, VideoError for a file that cannot be decoded.
        """
        if not 0 <= i < len(self):
            raise DataError(f"clip {i} wanted, but there are {len(self)} (0 to {len(self) - 1}).")
        count = self.lengths[i] - start if frames is None else frames
        if start < 0 or count < 1 or start + count > self.lengths[i]:
            raise DataError(
                f"{self.names[i]}: frames {start} to {start + count - 1} wanted, the clip has {self.lengths[i]}."
            )
        return self._layout.load(i, start, count, size)

    def only(self, wanted: Sequence[int]) -> "Clips":
        """Some of the clips, numbered anew, with their labels.

        wanted:  clip numbers, at least one.
        Returns: Clips in that order.
        Raises:  DataError for no clips or one outside the data set.
        """
        outside = [i for i in wanted if not 0 <= i < len(self)]
        if outside or not len(wanted):
            raise DataError(f"clips {list(outside[:1])} wanted of a set of {len(self)}; name some that it has.")
        layout, rows = self._layout, list(wanted)
        return Clips(layout._replace(
            names=[layout.names[i] for i in rows],
            lengths=[layout.lengths[i] for i in rows],
            load=lambda i, *rest: layout.load(rows[i], *rest),
            labels=layout.labels and [layout.labels[i] for i in rows],
        ))

    def describe(self) -> str:
        """What was found and what was skipped, with reasons, in lines of text.

        Returns: text without a final line break; lengths in frames.
        """
        shortest, longest = min(self.lengths), max(self.lengths)
        frames = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
        lines = [f"{self._layout.found}: {len(self)} clip{'s' * (len(self) != 1)} of {frames} frames"]
        if self.skipped:
            lines.append(f"skipped {len(self.skipped)}:")
            lines += [f"  {name}: {reason}" for name, reason in self.skipped[:MAX_LINES]]
        if len(self.skipped) > MAX_LINES:
            lines.append(f"  and {len(self.skipped) - MAX_LINES} more")
        return "\n".join(lines)


def open_clips(
    spec: str | Path, split: str | None = None, frames: int = NOMINAL_FRAMES, size: Size = (64, 64)
) -> Clips:
    """Open a data set, sniffing what `spec` means.

    spec:    a data set as it is published (BAIR, Kinetics, UCF-101, Moving MNIST, ...: `fastvid.data.formats`); a
             video file; a folder of videos, at any depth; a folder of folders of frames (png, jpg, bmp, webp, in
             natural order); either with train/ and test/ below, or val/, which counts as test where that is missing;
             or the name of a generator: digits, push, dino (write ./push for a folder of that name). Options of a
             format or generator follow a question mark: "kinetics?csv=val.csv&split=val", "digits?count=1";
             format=NAME takes a format by name, format=folder none.
    split:   "train" or "test": the split of that meaning, whatever the data set calls it, or the generator's range
             of seeds; None means train where there are splits. A split in the spec, in the set's own words, goes
             before it. A data set that is not divided gives all its clips.
    frames, size: length and (H, W) in pixels of clips that a generator makes; files keep their own.
    Returns: Clips; unreadable files are left out and named in `.skipped`.
    Raises:  DataError if there is nothing at `spec`, no usable clip in it, or an option that nobody knows.
    """
    if split not in (None, "train", "test"):
        raise DataError(f"split must be train, test or None, got '{split}'.")
    try:
        return _opened(spec, split, frames, size)
    except OSError as error:  # a name too long for the disk, a folder that may not be listed
        raise DataError(f"{str(spec)[:MAX_NAME]}: cannot be opened: {error.strerror or error}.") from error


def _opened(spec: str | Path, split: str | None, frames: int, size: Size) -> Clips:
    place, options = parse_spec(spec)
    split = options.get("split", split)
    if place in GENERATORS:
        return Clips(_generated(place, split or "train", options, frames, size))
    root = Path(place)
    if not root.exists():
        raise DataError(f"{place}: no such file or folder, nor a generator ({', '.join(GENERATORS)}).")
    layout = open_known(root, split, options)
    if layout is None:
        check_options(f"{root} (of no known format)", options, {})
        layout = open_plain(root, split)
    return Clips(layout)


def _generated(kind: str, split: str, options: dict[str, str], frames: int, size: Size) -> Layout:
    check_options(f"generator {kind}", options, generator_options(kind))
    if "format" in options or split not in ("train", "test"):
        raise DataError(f"generator {kind}: has the splits train and test and no format, got {options}.")
    own = {key: value for key, value in options.items() if key != "split"}
    return from_generator(kind, split, frames, size, own)


class ClipWindows:
    """Windows of equal length and size, cut from clips, for training and for exhaustive passes.

    clips:      what `open_clips` gave; clips shorter than a window are left out and named in `.skipped`.
    frames:     T of a window. frame_step: keep every n-th frame, so a window spans (frames - 1) * frame_step + 1.
    size:       (H, W) to which `fit_frames` brings every clip; None keeps the clips' own size, equal for all.
    seed:       of the random draws. stride: random windows start at multiples of it.
    cache_bytes: decoded clips are kept in memory as uint8 up to this many bytes.
    bad:        numbers of the clips that could not be decoded so far.
    Raises:     DataError if no clip is long enough, and later if more than 5 in 100 of those that are long enough
                cannot be decoded.
    """

    def __init__(
        self,
        clips: Clips,
        frames: int = 16,
        size: Size | None = (64, 64),
        seed: int = 0,
        stride: int = 1,
        frame_step: int = 1,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if min(frames, stride, frame_step) < 1:
            raise DataError(f"frames, stride and frame_step must be at least 1, got {frames}, {stride}, {frame_step}.")
        self.clips, self.frames, self.size, self.seed = clips, frames, size, seed
        self.stride, self.frame_step, self.cache_bytes = stride, frame_step, cache_bytes
        self.span = (frames - 1) * frame_step + 1
        self.usable = [i for i, length in enumerate(clips.lengths) if length >= self.span]
        if not self.usable:
            raise DataError(f"windows span {self.span} frames, but the longest clip has {max(clips.lengths)}.")
        short = sorted(set(range(len(clips))) - set(self.usable))
        self.skipped = [*clips.skipped]
        self.skipped += [(clips.names[i], f"{clips.lengths[i]} frames, a window spans {self.span}") for i in short]
        self._cache: dict[int, Tensor] = {}
        self._cached_bytes = 0
        self._loose: set[int] = set()
        self.bad: set[int] = set()

    def batch(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Tensor:
        """Random windows: a random clip, then a random start in it, both drawn from sha256(seed, step, item).

        Items are numbered over all ranks (rank * batch_size + position), so two ranks of 8 see together what one
        rank of 16 sees. No global random state is read or moved. A clip that cannot be decoded is skipped, named
        once in a warning and in `.skipped`, and drawn again.

        step, batch_size: step from 0, windows to return. rank, world: this process and how many there are.
        Returns: uint8 [B, T, H, W, 3] in 0..255.
        Raises:  DataError for a rank outside the world, windows of unequal size, or too many bad clips.
        """
        return self.batch_of(step, batch_size, rank, world)[1]

    def batch_of(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> tuple[list[int], Tensor]:
        """As `batch`, with the clips' numbers.

        step, batch_size, rank, world: as in `batch`.
        Returns: B clip numbers, and uint8 [B, T, H, W, 3] in 0..255.
        Raises:  as `batch`.
        """
        if not 0 <= rank < world or batch_size < 1 or step < 0:
            raise DataError(f"batch: got step {step}, batch_size {batch_size}, rank {rank} of {world}.")
        drawn = [self._draw(step, rank * batch_size + position) for position in range(batch_size)]
        clips, windows = zip(*drawn, strict=True)
        if any(window.shape != windows[0].shape for window in windows):
            raise DataError("the clips differ in height and width; give ClipWindows one size.")
        return list(clips), torch.stack(windows)

    def windows(self, every: int = 4) -> list[tuple[int, int]]:
        """All windows that start at multiples of `every` frames.

        every:   distance of starts in frames, at least 1.
        Returns: (clip, start) pairs for `at`, in order.
        Raises:  DataError if every is below 1.
        """
        if every < 1:
            raise DataError(f"windows: every must be at least 1, got {every}.")
        return [(i, s) for i in self.usable for s in range(0, self.clips.lengths[i] - self.span + 1, every)]

    def at(self, clip: int, start: int) -> Tensor:
        """One window.

        clip, start: clip number from 0 and first frame.
        Returns: uint8 [T, H, W, 3] in 0..255.
        Raises:  DataError for a window outside the clip, VideoError if the clip cannot be decoded.
        """
        if not 0 <= clip < len(self.clips) or not 0 <= start <= self.clips.lengths[clip] - self.span:
            raise DataError(f"no window of {self.span} frames starts at frame {start} of clip {clip}.")
        return self._view(clip, start).clone()

    def try_at(self, clip: int, start: int) -> Tensor | None:
        """One window, or None where the clip cannot be decoded.

        Such a clip is named once in a warning and in `.skipped`; it is not opened again.

        clip, start: clip number from 0 and first frame.
        Returns: uint8 [T, H, W, 3] in 0..255, or None.
        Raises:  DataError for a window outside the clip, and if more than 5 in 100 clips cannot be decoded.
        """
        if clip in self.bad:
            return None
        try:
            return self.at(clip, start)
        except VideoError as error:
            self._drop(clip, error)
            return None

    def leave_out(self, clip: int) -> None:
        """Take a clip for undecodable that an earlier run has named so: `try_at` gives None, nothing is said again.

        clip:    clip number from 0; one that is too short for a window is left out already.
        Raises:  DataError for a clip outside the data set, and if more than 5 in 100 clips are out.
        """
        if not 0 <= clip < len(self.clips):
            raise DataError(f"clip {clip} is to be left out, but there are {len(self.clips)}.")
        if self.clips.lengths[clip] >= self.span:
            self.bad.add(clip)
            self._check_share(f"{self.clips.names[clip]}, as an earlier run found")

    def describe(self) -> str:
        """The data set, the windows, and what was skipped.

        Returns: text without a final line break.
        """
        source = Clips(self.clips._layout._replace(skipped=self.skipped))
        return f"windows of {self.span} frames, one in {self.frame_step} kept, from {source.describe()}"

    def _draw(self, step: int, item: int) -> tuple[int, Tensor]:
        attempt = 0
        while True:
            digest = hashlib.sha256(f"{self.seed}/{step}/{item}/{attempt}".encode()).digest()
            clip = self.usable[int.from_bytes(digest[:8], "little") % len(self.usable)]
            starts = (self.clips.lengths[clip] - self.span) // self.stride + 1
            start = int.from_bytes(digest[8:16], "little") % starts * self.stride
            window = self.try_at(clip, start)
            if window is not None:
                return clip, window
            self._check_share(self.clips.names[clip])  # a caller may have gone on after the first DataError
            attempt += 1

    def _view(self, clip: int, start: int) -> Tensor:
        if clip not in self._cache and clip not in self._loose:
            self._keep(clip)
        if clip in self._cache:
            return self._cache[clip][start : start + self.span : self.frame_step]
        return self.clips.read(clip, start, self.span, self.size)[:: self.frame_step]

    def _drop(self, clip: int, error: VideoError) -> None:
        self.bad.add(clip)
        self.skipped.append((self.clips.names[clip], str(error)))
        self._check_share(error)
        warnings.warn(f"clip skipped: {error}", stacklevel=5)

    def _check_share(self, now: VideoError | str) -> None:
        # of the usable ones: where few of many clips are long enough, all of them may be bad, and draws would not end
        if len(self.bad) > MAX_BAD_SHARE * len(self.usable):
            raise DataError(f"{len(self.bad)} of {len(self.usable)} clips cannot be decoded, now: {now}")

    def _keep(self, clip: int) -> None:
        """Decode and cache a whole clip if the budget has room for it; either way decode all of it once."""
        frames = self.clips.lengths[clip]
        height, width = self.size or self.clips.read(clip, 0, 1).shape[1:3]
        size = frames * height * width * 3
        if size <= READ_BYTES and self._cached_bytes + size <= self.cache_bytes:
            self._cache[clip] = self.clips.read(clip, 0, frames, self.size)
            self._cached_bytes += size
        else:
            # a clip damaged near its end must be bad whether or not it fits, or batches would depend on the budget
            self.clips.read(clip, frames - 1, 1, self.size)
            self._loose.add(clip)
