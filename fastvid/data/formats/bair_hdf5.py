"""BAIR robot pushing as VideoGPT converts it, and other data sets in its form: one HDF5 file with both splits."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvid.data._decode import FRAME_PIXELS
from fastvid.data._layouts import Layout, Size
from fastvid.data.formats._shared import choose_split, lone_files
from fastvid.data.video import READ_BYTES, fit_frames
from fastvid.errors import DataError, FastvidError, VideoError

NAME = "BAIR robot pushing (VideoGPT's HDF5)"
OPTIONS: dict[str, str] = {}

SUFFIXES = (".hdf5", ".h5")
MAGIC = b"\x89HDF\r\n\x1a\n"
SPLITS = ("train", "test")
# h5py's exceptions for damage, depending on the place of it
BROKEN = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError)


def recognise(root: Path) -> str | None:
    """Why `root` is an HDF5 file, or a folder with no more than one, in words, or None.

    root:    a file or folder. Returns: words. Raises: OSError if the file cannot be read.
    """
    path = _file(root)
    if path is None:
        return None
    with path.open("rb") as file:
        return f"{path.name} is an HDF5 file" if file.read(len(MAGIC)) == MAGIC else None


def open_layout(root: Path, split: str | None, options: dict[str, str]) -> Layout:
    """The clips of a split, one a start in `{split}_idx`.

    root:    the file, or the folder it lies in. split: asked for, or None. options: none.
    Returns: Layout; a clip ends where the next one starts. No frame is read yet.
    Raises:  DataError without the package h5py, for a missing split, or arrays of another form.
    Source:  wilson1yan/VideoGPT: `{split}_data` uint8 [frames of all clips, H, W, 3], `{split}_idx` first frames.
    """
    path = _file(root)
    if path is None:
        raise DataError(f"{root}: no HDF5 file ({' '.join(SUFFIXES)}), or more than one; name one.")
    with _open(path) as file:
        own, words = choose_split(path, split, [name for name in SPLITS if f"{name}_data" in file])
        if own is None:
            keys = ", ".join(list(file)[:5]) or "nothing"
            raise DataError(f"{path}: no train_data and no test_data in it, but {keys}.")
        shape = _data(file, own, path).shape
        starts = _starts(file, own, path, shape[0])
    lengths = [end - start for start, end in zip(starts, [*starts[1:], shape[0]], strict=True)]

    def load(i: int, start: int, count: int, size: Size | None) -> Tensor:
        first = starts[i] + start
        if count * math.prod(shape[1:]) > READ_BYTES:
            raise VideoError(f"{path}: {count} frames of {shape[2]}x{shape[1]} exceed {READ_BYTES} bytes.")
        try:
            with _open(path) as file:
                clip = torch.from_numpy(_data(file, own, path)[first : first + count])  # [T, H, W, 3]
        except DataError as error:
            raise VideoError(f"{own} clip {i}: {error}") from error
        return fit_frames(clip, *size)[0] if size else clip

    return Layout([f"{own}/{i}" for i in range(len(starts))], lengths, load, words, [])


def _file(root: Path) -> Path | None:
    files = lone_files(root, SUFFIXES)
    return files[0] if len(files) == 1 else None


@contextmanager
def _open(path: Path) -> Iterator:
    """An h5py.File; whatever the package finds wrong with it inside becomes one DataError."""
    try:
        import h5py
    except ImportError as error:
        raise DataError(f"{path}: HDF5 needs the package h5py; pip install 'fastvid-torch[data]'.") from error
    try:
        with h5py.File(path, "r") as file:
            yield file
    except FastvidError:
        raise
    except BROKEN as error:
        raise DataError(f"{path}: cannot be read as HDF5: {' '.join(str(error).split())}") from error


def _array(file, name: str, path: Path):
    """An array that lies in this very file: links and outside storage could name any file of the machine."""
    import h5py

    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise DataError(f"{path}: {name} is missing, or a link out of the file.")
    array = file[name]
    if not isinstance(array, h5py.Dataset) or array.external or array.is_virtual:
        raise DataError(f"{path}: {name} is no array in the file itself.")
    return array


def _data(file, split: str, path: Path):
    array = _array(file, f"{split}_data", path)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
        raise DataError(f"{path}: {split}_data must be uint8 [frames, H, W, 3], got {array.dtype} {list(array.shape)}.")
    if array.shape[1] * array.shape[2] > FRAME_PIXELS:
        raise DataError(f"{path}: frames of {array.shape[2]}x{array.shape[1]} exceed {FRAME_PIXELS} pixels.")
    if array.chunks and math.prod(array.chunks) > READ_BYTES:
        raise DataError(f"{path}: {split}_data is stored in pieces of {list(array.chunks)}, above {READ_BYTES} bytes.")
    return array


def _starts(file, split: str, path: Path, frames: int) -> list[int]:
    array = _array(file, f"{split}_idx", path)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not 1 <= len(array) <= frames:
        raise DataError(f"{path}: {split}_idx must be whole numbers [n], got {array.dtype} {list(array.shape)}.")
    starts = array[:].astype(np.int64).tolist()
    rising = all(a < b for a, b in zip(starts, starts[1:], strict=False))
    if not rising or starts[0] < 0 or starts[-1] >= frames:
        raise DataError(f"{path}: {split}_idx must rise and stay from 0 to below {frames}, the frames of {split}_data.")
    return starts
