"""The clips a prediction starts from: which files are meant, and the frames that are given and known of each."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastvid.data.clips import natural_key
from fastvid.data.sheet import COLUMNS
from fastvid.data.video import VIDEO_SUFFIXES, count_frames, fit_frames, probe_video, read_video
from fastvid.errors import UsageError, VideoError

GIVEN = 4  # frames that a prediction starts from, where a model does not say otherwise
SLOWEST, FASTEST, USUAL_FPS = 0.01, 1000.0, 25.0  # frames a second that a video can be written with


@dataclass(frozen=True)
class SourceClip:
    """One clip, fitted to the model: given [G, H, W, 3] and, where known, what came next [<= n, H, W, 3], uint8.

    Of what came next only so many frames are here as a contact sheet shows; `known` says how many the clip has.
    """

    path: Path
    name: str  # of its files in the output folder
    given: Tensor
    truth: Tensor
    known: int
    first: int  # number of the first given frame
    fps: float
    notes: tuple[str, ...]


def find_clips(paths: list[str | Path]) -> list[Path]:
    """The video files that paths name; a folder stands for those in it, in natural order, a file is listed once.

    paths:   files or folders.
    Returns: at least one path; that a file holds video has not been looked at.
    Raises:  UsageError for no paths, VideoError for a missing one or a folder without clips.
    """
    if not paths:
        raise UsageError("predict: name at least one clip: fastvid predict CLIP...")
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise VideoError(f"{path}: no such file or folder.")
        inside = [path]
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir(), key=natural_key) if p.is_file() and _is_clip(p)]
        if not inside:
            raise VideoError(f"{path}: no clips in this folder ({' '.join(VIDEO_SUFFIXES)}).")
        for file in inside:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def read_clip(
    path: Path, name: str, size: tuple[int, int], frames: int, start: int | None = None, given: int = GIVEN
) -> SourceClip:
    """The `given` frames of a file to go on from, and up to `frames` true ones after them, or as many as a sheet shows.

    path:    a video file. name: for its outputs. size: (H, W) to fit every frame to.
    start:   number of the first given frame, from 0; None takes the last `given`.
    Returns: SourceClip.
    Raises:  VideoError for a file that cannot be read or has too few frames.
    """
    info = probe_video(path)
    known = info.frames or count_frames(path)
    first = max(0, known - given) if start is None else start
    if known - first < given:
        wanted = f"at least {given} frames" if start is None else f"{given} frames from frame {start} on"
        raise VideoError(f"{path}: wanted {wanted}, the file has {known}; give a longer clip.")
    after = min(known - first - given, frames)
    video, fps = read_video(path, first, given + min(after, COLUMNS - given), size)
    notes = [fit_frames(torch.zeros(1, info.height, info.width, 3, dtype=torch.uint8), *size)[1]]
    if not SLOWEST <= fps <= FASTEST:
        notes.append(f"{fps:g} frames a second cannot be written, {USUAL_FPS:g} taken instead")
        fps = USUAL_FPS
    return SourceClip(path, name, video[:given], video[given:], after, first, fps, tuple(filter(None, notes)))


def _is_clip(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")
