"""Moving MNIST's file of clips, and any other NumPy array of clips: mapped, not loaded."""

import math
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from torch import Tensor

from fastvid.data._layouts import Layout, Size
from fastvid.data.formats._shared import choose_split, lone_files
from fastvid.data.video import READ_BYTES, fit_frames
from fastvid.errors import DataError

NAME = "NumPy array of clips"
OPTIONS = {
    "time": "first for [T, N, H, W] as in mnist_test_seq.npy, second for [N, T, H, W]; by default what the name says",
    "key": "the array's name in a .npz",
}

MAGICS = {".npy": b"\x93NUMPY", ".npz": b"PK\x03\x04"}
SPLITS = ("train", "val", "valid", "validation", "test")
PUBLISHED = "mnist_test_seq"
# what NumPy raises for a header that says nonsense
BROKEN = (OSError, ValueError, KeyError, OverflowError, TypeError, MemoryError, SyntaxError, TokenError)


def recognise(root: Path) -> str | None:
    """Why `root` is a NumPy file, or a folder with one (or with one a split), in words, or None.

    root:    a file or folder. Returns: words that name the file seen. Raises: OSError if it cannot be read.
    """
    files = _files(root)
    if not files:
        return None
    path = next(iter(files.values()))
    magic = MAGICS[path.suffix.lower()]
    with path.open("rb") as file:
        return f"{path.name} is a NumPy file" if file.read(len(magic)) == magic else None


def open_layout(root: Path, split: str | None, options: dict[str, str]) -> Layout:
    """The clips of an array.

    root:    a .npy or .npz of uint8 [N, T, H, W], [N, T, H, W, 1] or [N, T, H, W, 3], of one clip [T, H, W, 3], or
             with time first [T, N, H, W]; or a folder that holds one, or train.npy, test.npy and so on.
    split:   asked for, or None: picks the file, or the array of a .npz, of that name.
    options: time, key.
    Returns: Layout; grey comes out as RGB. A .npy stays on disk, a .npz is unpacked into memory at its first use.
    Raises:  DataError for a damaged file, another type or shape, or more than 2 GiB in a .npz.
    Source:  Srivastava et al. 2015, arXiv:1502.04681: mnist_test_seq.npy, uint8 [20, 10000, 64, 64], time first.
    """
    files = _files(root)
    if not files:
        raise DataError(f"{root}: no .npy or .npz in it, or several without the name of a split; name one.")
    own, words = choose_split(root, split, [name for name in files if name])
    path = files[own or ""]
    if path.suffix.lower() == ".npz":
        array, key_words = _from_npz(path, split if own is None else None, options.get("key"))
        words = key_words if own is None else words
    elif "key" in options:
        raise DataError(f"{path}: key={options['key']} is for a .npz, this is a .npy with one array.")
    else:
        array = _mapped(path)
    clips, order = _clips_first(path, array, options.get("time"))
    _check(path, clips)

    def load(i: int, start: int, count: int, size: Size | None) -> Tensor:
        frames = np.array(clips[i, start : start + count])  # a copy: the file stays as it is
        clip = torch.from_numpy(frames).expand(-1, -1, -1, 3)  # [T, H, W, 3]
        return fit_frames(clip, *size)[0] if size else clip.contiguous()

    names = [f"{path.stem}/{i}" for i in range(len(clips))]
    return Layout(names, [clips.shape[1]] * len(clips), load, f"{words}, {order}", [])


def _files(root: Path) -> dict[str, Path]:
    """NumPy files by split; one alone has the split ""."""
    files = lone_files(root, list(MAGICS))
    by_split = {path.stem: path for name in SPLITS for path in files if path.stem == name}
    if root.is_dir() and by_split:  # other arrays beside them are labels, actions or the like
        return by_split
    return {"": files[0]} if len(files) == 1 else {}


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except BROKEN as error:
        raise DataError(f"{path}: cannot be read as .npy: {' '.join(str(error).split())}") from error


def _from_npz(path: Path, split: str | None, asked: str | None) -> tuple[np.ndarray, str]:
    """The array that `key` or the split names, or the only one, and words for the split."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
        key, words = _choose_key(path, sizes, split, asked)
        if sizes[key] > READ_BYTES:
            raise DataError(f"{path}: {key} unpacks to {sizes[key]} bytes, above {READ_BYTES}; store it as .npy.")
        with np.load(path) as arrays:
            array = arrays[key]
    except DataError:
        raise
    except (*BROKEN, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as .npz: {' '.join(str(error).split())}") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: {key} is no array.")
    return array, words


def _choose_key(path: Path, sizes: dict[str, int], split: str | None, asked: str | None) -> tuple[str, str]:
    splits = [name for name in SPLITS if name in sizes]
    if asked is None and splits:
        return choose_split(path, split, splits)
    if asked is None and len(sizes) == 1:
        return next(iter(sizes)), choose_split(path, split, [])[1]
    if asked not in sizes:
        raise DataError(f"{path}: key={asked or '?'} is not in it; give one of: {', '.join(sizes) or 'none there'}.")
    return asked, f"array {asked}"


def _clips_first(path: Path, array: np.ndarray, time: str | None) -> tuple[np.ndarray, str]:
    """[N, T, H, W, C] of any accepted shape, and words for how it was read."""
    if time not in (None, "first", "second"):
        raise DataError(f"{path}: time must be first or second, got '{time}'.")
    shape = f"array {list(array.shape)}"
    if array.ndim == 4 and array.shape[-1] == 3:
        return array[None], f"{shape} read as one clip [T, H, W, 3]"
    grey = array.ndim == 4
    array = array[..., None] if grey else array
    if array.ndim != 5 or array.shape[-1] not in (1, 3):
        raise DataError(f"{path}: wanted [N, T, H, W] or [N, T, H, W, 3], got {shape}.")
    if time == "first" or (time is None and path.stem.startswith(PUBLISHED)):
        return array.swapaxes(0, 1), f"{shape} read with time first"
    return array, f"{shape} read as [N, T, H, W{'' if grey else ', C'}]"


def _check(path: Path, clips: np.ndarray) -> None:
    if clips.dtype != np.uint8:
        raise DataError(f"{path}: wanted uint8 in 0..255, got {clips.dtype}; convert the array.")
    if 0 in clips.shape:
        raise DataError(f"{path}: no frame in an array of {list(clips.shape)}.")
    if 3 * math.prod(clips.shape[1:4]) > READ_BYTES:
        raise DataError(f"{path}: a clip of {list(clips.shape[1:4])} exceeds {READ_BYTES} bytes; cut it into clips.")
