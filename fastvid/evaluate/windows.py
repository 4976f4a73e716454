"""Which windows are measured, their codes, and the codes that baselines are fitted to."""

import hashlib
import sys
from typing import NamedTuple
from urllib.parse import quote

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastvid.data.clips import NOMINAL_FRAMES, Clips, ClipWindows, open_clips
from fastvid.data.formats import parse_spec
from fastvid.errors import DataError
from fastvid.models import VideoPredictor
from fastvid.models.predictor import FRAMES_PER_STEP, GIVEN
from fastvid.train.latents import Latents, as_model_input
from fastvid.train.ranks import Ranks

FIT_WINDOWS = 512  # training windows that the baselines are fitted to
ENCODED_AT_ONCE = 16


class Window(NamedTuple):
    """What a model sees at once: frames, the first `given` of which it goes on from, of size (H, W) in pixels."""

    frames: int
    given: int
    size: tuple[int, int]


def window_of(model: nn.Module) -> Window:
    """The window of a VideoPredictor, a DVDGANPredictor or, with given=0, a DVDGANGenerator. Raises nothing."""
    if isinstance(model, VideoPredictor):
        return Window(FRAMES_PER_STEP * (model.top.config.steps + 1), GIVEN, model.size)
    config = model.config
    return Window(config.given + config.frames, config.given, (config.size, config.size))


class Held(NamedTuple):
    """Held-out windows: where they lie as (clip, first frame), how they were chosen, and what they come from."""

    windows: ClipWindows
    places: list[tuple[int, int]]
    how: str

    def clips(self, first: int, last: int) -> Tensor:
        """Windows `first` to `last` - 1 as uint8 [B, T, H, W, 3]."""
        return torch.stack([self.windows.at(*place) for place in self.places[first:last]])

    def groups(self) -> Tensor:
        """[n] int64: the clip of each window."""
        return torch.tensor([clip for clip, _ in self.places])


def held_out(model: nn.Module, data: str, split: str, clips: int, seed: int, frame_step: int = 1) -> Held:
    """Windows of a data set's split, as long as the model's and of its size.

    A clip that cannot be decoded is named in a warning and in `windows.skipped`, and left out.
    Raises: DataError where there is nothing to measure, or where too many clips cannot be decoded.
    """
    windows = opened(window_of(model), data, split, frame_step)
    places, how = choose_windows(windows.clips.lengths, windows.span, clips, seed)
    return Held(windows, decodable(windows, places), how)


def opened(window: Window, data: str, split: str, frame_step: int) -> ClipWindows:
    """Windows of a data set's split, of a model's length and size. Raises DataError where there are none."""
    frames = max(NOMINAL_FRAMES, (window.frames - 1) * frame_step + 1)  # of clips that a generator of data makes
    clips = open_clips(data, split, frames, window.size)
    return ClipWindows(clips, window.frames, window.size, frame_step=frame_step)


def decodable(windows: ClipWindows, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of the places that can be read, found out now rather than after hours. Raises DataError for none."""
    places = [place for place in places if windows.try_at(*place) is not None]
    if not places:
        raise DataError(f"evaluate: none of the chosen clips can be decoded: {windows.skipped[-1][1]}")
    return places


def choose_windows(lengths: list[int], span: int, count: int, seed: int) -> tuple[list[tuple[int, int]], str]:
    """Which windows to measure: one per clip, or, of too few clips, several that start at different frames.

    lengths: frames of each clip. span: of a window. count: windows wanted. seed: of the choice of starts.
    Returns: at most `count` (clip, start) pairs in order, all different, and how they were chosen in words.
    Raises:  DataError if no clip is long enough.
    """
    usable = [i for i, length in enumerate(lengths) if length >= span]
    if not usable:
        raise DataError(f"evaluate: wanted clips of {span} frames, the longest has {max(lengths)}; give longer ones.")
    if len(usable) >= count:
        # data sets are listed class by class: the first ones would be of few classes
        kept = [usable[i * len(usable) // count] for i in range(count)]
        return [(i, 0) for i in kept], f"one per clip from its first frame on, {count} of {len(usable)} evenly spread"
    for every in (span, span // 2, span // 4, 1):
        places = [(i, start) for i in usable for start in range(0, lengths[i] - span + 1, every)]
        if len(places) >= count:
            break
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(len(places), generator=generator)[:count].sort().values.tolist()
    overlap = "" if every >= span else " and overlap"
    return [places[i] for i in kept], f"from {len(usable)} of the clips; starts are multiples of {every}{overlap}"


def fitted_codes(predictor: VideoPredictor, data: str, held: Held, seed: int, ranks: Ranks) -> tuple[Latents, str]:
    """Codes that baselines are fitted to, and their description: of the train split, or, without one, of `held`."""
    try:
        train = held_out(predictor, undivided(data), "train", FIT_WINDOWS, seed, held.windows.frame_step)
    except DataError:
        train = held
    if same_clips(train.windows.clips, held.windows.clips):
        return encoded(predictor, held, ranks), "the measured windows themselves, for want of a train split"
    return encoded(predictor, train, ranks), f"{len(train.places)} windows of the train split"


@torch.no_grad()
def encoded(predictor: VideoPredictor, held: Held, ranks: Ranks) -> Latents:
    """Codes of all windows; the processes of `ranks` share the work."""
    mine, quiet = {}, not (ranks.leads and sys.stderr.isatty())
    with tqdm(total=len(held.places), unit="window", desc="baselines", disable=quiet) as bar:
        for number, first in enumerate(range(0, len(held.places), ENCODED_AT_ONCE)):
            if number % ranks.world == ranks.rank:
                mine[number] = encode(predictor, as_model_input(held.clips(first, first + ENCODED_AT_ONCE)))
            bar.update(min(ENCODED_AT_ONCE, len(held.places) - first))
    parts = {number: codes for share in ranks.gather(mine) for number, codes in share.items()}
    return joined([parts[number] for number in range(-(-len(held.places) // ENCODED_AT_ONCE))])


def encode(predictor: VideoPredictor, video: Tensor) -> Latents:
    """Codes of [B, 3, T, H, W], of the given frames alone and of the whole."""
    return Latents(*predictor.vqvae.encode(video[:, :, :GIVEN]), *predictor.vqvae.encode(video), "")


def joined(parts: list[Latents]) -> Latents:
    """Codes of all windows, from those of a few at a time."""
    return Latents(*(torch.cat(codes) for codes in list(zip(*parts, strict=True))[:4]), "")


def levels(codes: Latents) -> dict[str, tuple[Tensor, Tensor]]:
    """Per level the codes of the future, and those one latent step earlier as a predictor has them."""
    found = {}
    for name, given, whole in (("top", codes.given_top, codes.top), ("bottom", codes.given_bottom, codes.bottom)):
        known = given.shape[1]
        seen = torch.cat([given, whole[:, known:]], dim=1)
        found[name] = (seen[:, known:], seen[:, known - 1 : -1])
    return found


def marginal_codes(fit: Latents, codes: Latents, first: int, seed: int) -> tuple[Tensor, Tensor]:
    """The given codes, then futures in which every code is drawn by itself from those at its place in `fit`.

    codes:   of windows number `first` and following, which with the seed decides the draws.
    Returns: top [B, steps, h, w], bottom [B, 2 steps, 2h, 2w].
    """
    drawn = []
    for stream, (given, whole, there) in enumerate(
        ((codes.given_top, codes.top, fit.top), (codes.given_bottom, codes.bottom, fit.bottom))
    ):
        rows = [_rows(len(there), whole.shape[1:], (seed, stream, first + i)) for i in range(len(whole))]
        future = there.gather(0, torch.stack(rows))
        drawn.append(torch.cat([given, future[:, given.shape[1] :]], dim=1))
    return tuple(drawn)


def undivided(spec: str) -> str:
    """The spec without a split of its own: its train split is asked for."""
    place, options = parse_spec(spec)
    rest = "&".join(f"{key}={quote(value)}" for key, value in options.items() if key != "split")
    return f"{place}?{rest}" if rest else place


def same_clips(a: Clips, b: Clips) -> bool:
    """Whether two splits are one: data without splits give all their clips as either."""
    return a.names == b.names and a.lengths == b.lengths and torch.equal(a.read(0), b.read(0))


def _rows(count: int, shape: torch.Size, key: tuple[int, int, int]) -> Tensor:
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randint(count, shape, generator=generator)
