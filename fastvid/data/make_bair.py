"""The pushing arm's clips, with actions and positions of the hand, in the layout of BAIR robot pushing."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastvid.data.formats._tfrecord import index_records, parse_example, read_record
from fastvid.data.formats._write_tfrecord import serialize_example, write_records
from fastvid.data.formats.bair import FILE
from fastvid.data.push import SPLITS, VERSION, PushSimulator
from fastvid.data.seeds import check_request
from fastvid.errors import DataError

FOLDER = "softmotion30_44k"
RECORDS = 256  # a file, as published


def make_bair(
    out: str | Path,
    clips: int,
    frames: int = 30,
    split: str = "train",
    first: int = 0,
    size: tuple[int, int] = (64, 64),
) -> Path:
    """Make clips of the pushing arm as TFRecords that BAIR's readers take, this package's among them.

    Files appear whole or not at all, and whole ones that are there already are kept, so that an interrupted run is
    continued by the same call. Two processes with a different `first` may write into one folder.

    out:     folder of the data set, made where missing; files are out/softmotion30_44k/split/traj_A_to_B.tfrecords of
             256 records, A to B being places in the split's range of seeds.
    clips:   how many, at least 1. frames: of each. split: "train" or "test". first: place of the first clip, a
             multiple of 256, so that files never overlap. size: (H, W), a square, since BAIR's records do not say it.
    Returns: the folder of the files. A record holds, for each t, {t}/image_aux1/encoded (raw RGB), {t}/action float [4]
             (the commanded move in metres; the fourth, BAIR's gripper, is 0) and {t}/endeffector_pos float [3] in
             metres; besides them seed and generator_version. A tqdm bar on standard error counts clips.
    Raises:  DataError for numbers out of range, an unknown split, files of other clips in the folder, a missing
             simulator, or where the disk refuses.
    Source:  layout of Ebert et al. 2017, arXiv:1710.05268.
    """
    seeds = _seeds(split, first, clips)
    check_request("push", frames, size)
    if size[0] != size[1]:
        raise DataError(f"data make: frames in BAIR's layout are square, got {size[0]}x{size[1]}.")
    folder = Path(out) / FOLDER / split
    parts = [seeds[i : i + RECORDS] for i in range(0, clips, RECORDS)]
    files = {folder / _name(first + i * RECORDS, len(part)): part for i, part in enumerate(parts)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_overlap(folder, files, first, first + clips)
        missing = {path: part for path, part in files.items() if not _whole(path, part, frames, size[0])}
        done = clips - sum(map(len, missing.values()))
        with tqdm(total=clips, initial=done, desc=f"push {split}", unit="clip") as bar, PushSimulator(size) as arm:
            for path, part in missing.items():
                write_records(path, _records(arm, part, frames, bar))
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}; choose another folder.") from error
    return folder


def record_of(seed: int, video: Tensor, actions: Tensor, positions: Tensor) -> bytes:
    """One clip as BAIR stores it.

    seed:    of the clip. video: uint8 [T, H, W, 3]. actions, positions: float32 [T, 3] in metres.
    Returns: the serialized tf.train.Example, as `make_bair` says.
    Raises:  nothing.
    """
    features: dict[str, bytes | np.ndarray] = {"seed": np.array([seed]), "generator_version": np.array([VERSION])}
    grip = F.pad(actions, (0, 1))  # [T, 4]
    for t in range(len(video)):
        features[f"{t}/image_aux1/encoded"] = video[t].contiguous().numpy().tobytes()
        features[f"{t}/action"] = grip[t].numpy()
        features[f"{t}/endeffector_pos"] = positions[t].numpy()
    return serialize_example(features)


def _seeds(split: str, first: int, clips: int) -> range:
    if split not in SPLITS:
        raise DataError(f"data make: unknown split {split!r}; push has {', '.join(SPLITS)}.")
    if clips < 1 or first < 0 or first % RECORDS or first + clips > len(SPLITS[split]):
        raise DataError(
            f"data make: wanted at least 1 of {len(SPLITS[split])} clips, the first a multiple of {RECORDS}, "
            f"got first {first} and {clips} clips."
        )
    return SPLITS[split][first : first + clips]


def _name(first: int, count: int) -> str:
    return f"traj_{first}_to_{first + count - 1}.tfrecords"


def _records(arm: PushSimulator, seeds: range, frames: int, bar: tqdm) -> Iterator[bytes]:
    for seed in seeds:
        video = arm.clip(seed, frames)
        yield record_of(seed, video, arm.last_actions, arm.last_positions)
        bar.update()


def _check_overlap(folder: Path, files: dict[Path, range], first: int, end: int) -> None:
    """A file of another range would hold some of the clips a second time."""
    for path in folder.iterdir():
        match = FILE.fullmatch(path.name)
        if match and path not in files and int(match[1]) < end and int(match[2]) >= first:
            raise DataError(f"{path}: holds some of clips {first} to {end - 1} already; choose another folder.")


def _whole(path: Path, seeds: range, frames: int, side: int) -> bool:
    """Whether a file holds these clips; DataError if it holds others, False if it is missing or damaged."""
    if not path.exists():
        return False
    places, problem = index_records(path, len(seeds) + 1)
    if problem or len(places) != len(seeds):
        return False
    try:
        found = parse_example(read_record(path, *places[0]))
    except ValueError:
        return False
    image, beyond = found.get(f"{frames - 1}/image_aux1/encoded", []), f"{frames}/image_aux1/encoded" in found
    same = [len(part) for part in image] == [3 * side * side] and not beyond
    if not same or list(found.get("seed", [])) != [seeds[0]] or list(found.get("generator_version", [])) != [VERSION]:
        raise DataError(f"{path}: holds clips of another length, size or making; choose another folder.")
    return True
