"""StyleGAN-V's layout, a folder or zip of video*/frame*.jpg, and any other zip of folders of frames, read in place."""

import os
import re
import threading
import zipfile
import zlib
from functools import cache
from pathlib import Path, PurePosixPath

from torch import Tensor

from fastvid.data._images import decode_image
from fastvid.data._layouts import Layout, Size, Skipped, natural_key
from fastvid.data.formats import cityscapes, sky_timelapse
from fastvid.data.formats._peek import first_match
from fastvid.data.formats._shared import check_any, choose_split, is_video, stack_images
from fastvid.data.formats._stills import Stills, images_in, still_layout
from fastvid.data.video import IMAGE_SUFFIXES
from fastvid.errors import DataError, VideoError

NAME = "StyleGAN-V (folders of frames)"
OPTIONS: dict[str, str] = {}

CLIP = re.compile(r"video.*", re.IGNORECASE)
FRAME = re.compile(r"frame.*\.(jpg|jpeg|png)", re.IGNORECASE)
SPLITS = ("train", "val", "test")
MAGIC = b"PK\x03\x04"
MEMBER_BYTES = 64 << 20  # the largest image file taken out of an archive
RATIO = 200  # images hardly shrink: a member that shrinks more, and is not small, is made to fill the memory
SMALL = 1 << 20
BROKEN = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def recognise(root: Path) -> str | None:
    """Why `root` has the layout, in words, or None.

    root:    a file or folder. Returns: words. Raises: OSError if a file cannot be read.
    """
    if root.is_file():
        if root.suffix.lower() != ".zip":
            return None
        with root.open("rb") as file:
            return "a zip of frames" if file.read(4) == MAGIC else None
    for place in ("", *SPLITS):
        names, folders = _inside(root / place)
        if any(map(is_video, names)):
            return None
        fit = folders and all(map(CLIP.fullmatch, folders))
        if fit and (frame := first_match(root / place / folders[0], 1, FRAME)):
            return f"it holds {Path(place, folders[0], frame).as_posix()}"
    return None


def open_layout(root: Path, split: str | None, options: dict[str, str]) -> Layout:
    """The clips of a split, one a folder of frames; of a zip nothing is unpacked to disk.

    root:    a folder of video*/frame*.jpg, or a .zip of folders of images, either with train/ and test/ above.
    split:   asked for, or None. options: none.
    Returns: Layout, frames in natural order. No image is opened yet.
    Raises:  DataError for a missing split, a damaged archive, or no usable clip. Members of a zip with a name that
             points out of it, encrypted ones, and ones that unpack to far more than an image does make their clip
             unusable.
    Source:  universome/stylegan-v, the layout of its data sets.
    """
    if root.is_file():
        return _from_zip(root, split)
    own, words = choose_split(root, split, [name for name in SPLITS if (root / name).is_dir()])
    top = root / own if own else root
    folders = sorted((path for path in top.iterdir() if path.is_dir() and path.name[0] != "."), key=natural_key)
    skipped: Skipped = []
    clips = []
    for folder in folders:
        name = folder.relative_to(root).as_posix()
        try:
            clips.append(Stills(name, folder, images_in(folder)))
        except OSError as error:
            skipped.append((name, f"cannot be listed: {error.strerror}"))
    return still_layout(root, clips, words, skipped)


def _inside(folder: Path) -> tuple[list[str], list[str]]:
    """Names of files and of folders in a folder; a missing one has none."""
    if not folder.is_dir():
        return [], []
    with os.scandir(folder) as entries:
        seen = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    return [name for name, below in seen if not below], sorted((n for n, below in seen if below), key=natural_key)


def _from_zip(path: Path, split: str | None) -> Layout:
    folders, skipped = _folders(path)
    own, words, folders = _of_split(path, split, folders)
    names = sorted(folders, key=natural_key)
    check_any(path, names, skipped)

    @cache
    def archive(process: int) -> zipfile.ZipFile:
        """One handle a process: children of a fork share the place in their parent's file."""
        return zipfile.ZipFile(path)

    lock = threading.Lock()

    def load(i: int, start: int, count: int, size: Size | None) -> Tensor:
        where = f"{path}, {names[i]}"
        with lock:
            members = [_member(archive(os.getpid()), info) for info in folders[names[i]][start : start + count]]
        images = (decode_image(data, f"{where}/{name}") for name, data in members)
        return stack_images(images, count, size, where)

    return Layout(names, [len(folders[name]) for name in names], load, words, skipped)


def _folders(path: Path) -> tuple[dict[str, list[zipfile.ZipInfo]], Skipped]:
    """Image members by folder, in natural order; clips with a suspicious member are skipped."""
    try:
        with zipfile.ZipFile(path) as archive:
            everything = archive.infolist()
    except BROKEN as error:
        raise DataError(f"{path}: cannot be read as a zip: {' '.join(str(error).split())}") from error
    members = [member for member in everything if member.filename.lower().endswith(IMAGE_SUFFIXES)]
    if unread := _other_format([PurePosixPath(member.filename).name for member in everything]):
        raise DataError(f"{path}: holds {unread}, which is not read inside a zip; unpack it and name the folder.")
    folders: dict[str, list[zipfile.ZipInfo]] = {}
    bad: dict[str, str] = {}
    for member in members:
        folder = PurePosixPath(member.filename).parent.as_posix()
        if reason := _suspicious(member):
            bad.setdefault(folder, f"{member.filename}: {reason}")
        if not PurePosixPath(member.filename).name.startswith("."):
            folders.setdefault(folder, []).append(member)
    for files in folders.values():
        files.sort(key=lambda member: natural_key(member.filename))
    return {name: files for name, files in folders.items() if name not in bad}, list(bad.items())


def _other_format(names: list[str]) -> str | None:
    """What the files of a zip are, where their folders are not the clips."""
    for what, frame in (("Cityscapes", cityscapes.FRAME), ("Sky Time-lapse", sky_timelapse.FRAME)):
        if seen := next(filter(frame.fullmatch, names), None):
            return f"frames of {what} ({seen})"
    films = list(filter(is_video, names))
    images = any(name.lower().endswith(IMAGE_SUFFIXES) for name in names)
    return f"videos ({films[0]})" if films and not images else None


def _suspicious(member: zipfile.ZipInfo) -> str | None:
    parts = PurePosixPath(member.filename).parts
    if ".." in parts or member.filename.startswith("/") or "\\" in member.filename or ":" in parts[0]:
        return "its name points out of the archive"
    if member.flag_bits & 1:
        return "it is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "it is neither stored nor deflated; pack the archive anew"
    if member.file_size > MEMBER_BYTES:
        return f"it unpacks to {member.file_size} bytes, above {MEMBER_BYTES}"
    if member.file_size > SMALL and member.file_size > RATIO * max(1, member.compress_size):
        return f"it unpacks from {member.compress_size} to {member.file_size} bytes, as no image does"
    return None


def _of_split(path: Path, asked: str | None, folders: dict) -> tuple[str | None, str, dict]:
    """The folders below the split's own; a split may lie below one folder that all share."""
    tops = {name.split("/")[0] for name in folders}
    depth = 1 if len(tops) == 1 and not tops & set(SPLITS) else 0
    part = {name: (*name.split("/"), "", "")[depth] for name in folders}
    own, words = choose_split(path, asked, [name for name in SPLITS if name in part.values()])
    return own, words, {name: files for name, files in folders.items() if own in (None, part[name])}


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[str, bytes]:
    try:
        with archive.open(info) as file:
            # with a number, no more is ever unpacked than the size that was checked; the CRC is verified at the end
            return PurePosixPath(info.filename).name, file.read(info.file_size + 1)
    except BROKEN as error:
        reason = " ".join(str(error).split())
        raise VideoError(f"{archive.filename}: {info.filename} cannot be read: {reason}") from error
