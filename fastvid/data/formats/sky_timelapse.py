"""Sky Time-lapse: folders of jpg frames, one a clip, below sky_train/ and sky_test/."""

import os
import re
from pathlib import Path

from fastvid.data._layouts import Layout, Skipped, natural_key
from fastvid.data.formats._peek import first_match
from fastvid.data.formats._shared import choose_split
from fastvid.data.formats._stills import Stills, gap_note, images_in, runs, still_layout
from fastvid.data.formats._stills import frame_number as number
from fastvid.errors import DataError

NAME = "Sky-Timelapse"
OPTIONS = {"gaps": "clips that lack frames in their middle: keep (default) as they are, or skip"}
SPLITS = {"train": "sky_train", "test": "sky_test"}

FRAME = re.compile(r".+_frames_\d{8}\.jpe?g", re.IGNORECASE)
_TOP = re.compile("sky_train|sky_test")


def recognise(root: Path) -> str | None:
    """Whether a folder is Sky Time-lapse, or one of its two halves.

    root:    any path.
    Returns: the reason in words, or None.
    Raises:  nothing.
    Source:  Xiong et al. 2018, arXiv:1709.07592, whose data set it is.
    """
    if top := first_match(root, 1, _TOP):
        return f"holds {top}/"
    seen = first_match(root, 3, FRAME)
    return f"frames are called as in {seen}" if seen else None


def open_layout(root: Path, split: str | None, options: dict[str, str]) -> Layout:
    """One clip a folder that holds images, at any depth, frames in the order of their numbers.

    root:    the folder above sky_train/ and sky_test/, or one of those, which is then not divided.
    split:   train or test. options: see OPTIONS.
    Returns: Layout; clips that lack frames in their middle are named in `found`, or skipped if so asked.
    Raises:  DataError for an unknown split or option, or no usable clip.
    Source:  Xiong et al. 2018, arXiv:1709.07592, whose data set it is.
    """
    gaps = options.get("gaps", "keep")
    if gaps not in ("keep", "skip"):
        raise DataError(f"{root}: gaps must be keep or skip, got '{gaps}'.")
    name, found = choose_split(root, split, [name for name, folder in SPLITS.items() if (root / folder).is_dir()])
    skipped: Skipped = []
    clips = _clips(root, root / SPLITS[name] if name else root, skipped)
    if gaps == "skip":
        broken = {clip.name for clip in clips if len(runs([number(file) for file in clip.files])) > 1}
        skipped += [(name, "lacks frames in its middle (gaps=skip)") for name in sorted(broken, key=natural_key)]
        clips = [clip for clip in clips if clip.name not in broken]
    return still_layout(root, clips, found + gap_note(clips), skipped)


def _clips(root: Path, top: Path, skipped: Skipped) -> list[Stills]:
    clips = []
    for folder, below, _ in os.walk(top, onerror=lambda e: skipped.append((str(e.filename), str(e.strerror)))):
        below[:] = [name for name in below if not name.startswith(".")]
        if files := images_in(Path(folder)):
            clips.append(Stills(Path(folder).relative_to(root).as_posix(), Path(folder), files))
    return sorted(clips, key=lambda clip: natural_key(clip.name))
