"""Tensors out of files of strangers: archives, pickles, PyTorch files, safetensors. Nothing in them is run."""

import gzip
import hashlib
import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from fastvid.errors import WeightsError
from fastvid.weights._pickles import read_arrays

FILE_LIMIT, MEMBER_LIMIT = 1 << 30, 1 << 28  # bytes
SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors")  # of members of archives that may hold weights
LEGACY_TORCH = b"\x80\x02\x8a\x0a"  # how PyTorch files before 1.6 begin; else 0x80 begins a pickle
_NESTS = ("state_dict", "model_state_dict", "model")
_READ_ERRORS = (OSError, EOFError, ValueError, zlib.error, tarfile.TarError, zipfile.BadZipFile, NotImplementedError,
                RuntimeError)  # fmt: skip


class Found(NamedTuple):
    """One set of tensors, or why a member of an archive was passed over. source: file and member, for messages."""

    source: str
    sha256: str
    tensors: dict[str, Tensor]
    refusal: str = ""


def read_weights(path: Path, torchscript: bool) -> list[Found]:
    """Every set of tensors in a file.

    path:        a file of any of the kinds above. torchscript: True runs a TorchScript archive's code to read it.
    Returns:     at least one Found; tensors float32, contiguous, finite, under the names that the file has.
    Raises:      WeightsError if it is missing, too large, damaged, of another kind, or asks for code to be run.
    """
    try:
        if not path.is_file():
            raise WeightsError(f"{path}: no such file; wanted a downloaded archive or weights file.")
        if path.stat().st_size > FILE_LIMIT:
            raise WeightsError(f"{path}: over {FILE_LIMIT >> 30} GiB, larger than any weights known here.")
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            file.seek(0)
            members = _members(file, str(path))
            if members is None:
                return [Found(str(path), digest.hexdigest(), _tensors(file, str(path), torchscript))]
            found = [_member(f"{path}: {name}", data, torchscript) for name, data in members]
    except WeightsError:
        raise
    except _READ_ERRORS as error:
        raise WeightsError(f"{path}: cannot be read ({_first_line(error)}); download it again.") from error
    if not found:
        raise WeightsError(f"{path}: an archive without weights; wanted a member named {', '.join(SUFFIXES)}.")
    return found


def _member(source: str, data: bytes, torchscript: bool) -> Found:
    digest = hashlib.sha256(data).hexdigest()
    try:
        return Found(source, digest, _tensors(io.BytesIO(data), source, torchscript))
    except WeightsError as error:
        return Found(source, digest, {}, str(error))


def _members(file: BinaryIO, source: str) -> Iterator[tuple[str, bytes]] | None:
    """The members of an archive that may hold weights; None where the file is no archive."""
    start = file.read(2)
    file.seek(0)
    if start == b"\x1f\x8b":
        return _of_tar(file, source)
    if start == b"PK" and not _is_torch(zipfile.ZipFile(file).namelist()):
        return _of_zip(zipfile.ZipFile(file), source)
    file.seek(0)
    return None


def _of_tar(file: BinaryIO, source: str) -> Iterator[tuple[str, bytes]]:
    with gzip.open(file) as stream, tarfile.open(fileobj=_Metered(stream, source), mode="r|") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(SUFFIXES):
                _check_size(source, member.name, member.size)
                yield member.name, archive.extractfile(member).read()


def _of_zip(archive: zipfile.ZipFile, source: str) -> Iterator[tuple[str, bytes]]:
    members = [member for member in archive.infolist() if member.filename.endswith(SUFFIXES)]
    if sum(member.file_size for member in members) > FILE_LIMIT:  # reading stops at what the directory says
        raise WeightsError(f"{source}: unpacks to over {FILE_LIMIT} bytes; not an archive of weights.")
    for member in members:
        _check_size(source, member.filename, member.file_size)
        yield member.filename, archive.read(member)


def _check_size(source: str, member: str, size: int) -> None:
    if size > MEMBER_LIMIT:
        raise WeightsError(f"{source}: {member[:80]} says it has {size} bytes; at most {MEMBER_LIMIT} are unpacked.")


class _Metered:
    """Stops a small archive that unpacks without end."""

    def __init__(self, stream: BinaryIO, source: str):
        self.stream, self.source, self.left = stream, source, FILE_LIMIT

    def read(self, size: int) -> bytes:
        """At most `size` further bytes. Raises WeightsError after FILE_LIMIT of them."""
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise WeightsError(f"{self.source}: unpacks to over {FILE_LIMIT} bytes; not an archive of weights.")
        return data


def _is_torch(names: list[str]) -> bool:
    return any(name == "data.pkl" or name.endswith("/data.pkl") for name in names)


def _tensors(file: BinaryIO, source: str, torchscript: bool) -> dict[str, Tensor]:
    start = file.read(9)
    file.seek(0)
    if start[:2] == b"PK":
        archive = zipfile.ZipFile(file)
        if sum(member.file_size for member in archive.infolist()) > FILE_LIMIT:
            raise WeightsError(f"{source}: unpacks to over {FILE_LIMIT} bytes, more than any weights known here.")
        program = any(name.endswith(("/constants.pkl", ".py")) for name in archive.namelist())
        file.seek(0)
        found = _of_torchscript(file, source, torchscript) if program else _of_torch(file, source)
    elif start[:4] == LEGACY_TORCH:
        found = _of_torch(file, source)
    elif start[:1] == b"\x80":
        found = read_arrays(file.read(), source)
    elif start[8:] == b"{":
        found = _of_safetensors(file.read(), source)
    else:
        raise WeightsError(
            f"{source}: wanted a PyPI archive (.tar.gz, .whl), a flax .ckpt, a PyTorch .pt or .pth, or .safetensors; "
            f"this is none, it begins with {start[:8]!r}; was a web page saved in its place?"
        )
    return _plain(found, source)


def _of_torch(file: BinaryIO, source: str) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a stranger's file can make torch raise anything
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        asked = f"it asks for {name[1]}" if name else _first_line(error)
        raise WeightsError(f"{source}: refused or damaged: {asked}; wanted a state dict of plain tensors.") from error
    return _state_dict(found, source)


def _of_torchscript(file: BinaryIO, source: str, allowed: bool) -> dict[str, Tensor]:
    if not allowed:
        raise WeightsError(
            f"{source}: a TorchScript archive, which is a program: reading it runs code. Pass --torchscript if you "
            "trust where it came from; only its tensors are kept."
        )
    try:
        return _state_dict(dict(torch.jit.load(file, map_location="cpu").state_dict()), source)
    except RuntimeError as error:
        raise WeightsError(f"{source}: cannot be read as TorchScript ({_first_line(error)}).") from error


def _of_safetensors(data: bytes, source: str) -> dict[str, Tensor]:
    try:
        return parse_safetensors(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(f"{source}: damaged safetensors ({_first_line(error)}); get it again.") from error


def _state_dict(found: object, source: str) -> dict[str, Tensor]:
    for nest in _NESTS:
        if isinstance(found, dict) and isinstance(found.get(nest), dict):
            found = found[nest]
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise WeightsError(f"{source}: wanted a state dict of tensors by name, got {type(found).__name__}.")
    return {name.removeprefix("module."): values for name, values in found.items() if isinstance(values, Tensor)}


def _plain(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Floating tensors as float32; others (counters) are left out."""
    kept = {name: values for name, values in tensors.items() if values.is_floating_point()}
    for name, values in kept.items():
        if values.layout != torch.strided or values.is_meta:
            raise WeightsError(f"{source}: {name[:80]} is not a plain tensor.")
    if 4 * sum(values.numel() for values in kept.values()) > FILE_LIMIT:
        raise WeightsError(f"{source}: its tensors would take over {FILE_LIMIT} bytes, more than any known here.")
    kept = {name: values.detach().float().contiguous() for name, values in kept.items()}
    if broken := next((name for name, values in kept.items() if not bool(values.isfinite().all())), None):
        raise WeightsError(f"{source}: {broken[:80]} holds values that are not finite; the file is damaged.")
    return kept


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
