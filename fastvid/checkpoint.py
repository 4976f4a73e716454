"""Model folders: config.json, model.safetensors and a manifest of hashes, written whole or not at all.

A folder appears under its name by one rename, after everything in it has reached the disk. While an older folder of
that name steps aside there is an instant with no such name; readers then find the older one under its side name.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save_file
from torch import Tensor

from fastvid.errors import CheckpointError

FORMAT = 1
PART = re.compile(r"[a-z][a-z0-9_]*")
JSON_LIMIT = 64 * 2**20
DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
# what the reader of a damaged or hostile file is known to raise
READ_ERRORS = (SafetensorError, OSError, KeyError, AttributeError, TypeError, ValueError, RuntimeError)
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_folder(
    path: str | Path, tensors: dict[str, Tensor], config: dict, dtype: torch.dtype | None = None,
    parts: dict[str, dict[str, Tensor]] | None = None,
) -> Path:
    """Write a model folder so that a kill at any moment leaves either the old or the new one loadable.

    tensors, config: any device and layout, dtypes of `DTYPES`; JSON values only.
    dtype:           floating tensors are stored in it (None keeps each as it is).
    parts:           further tensor files by name, {"ema": {...}} becomes ema.safetensors.
    Returns:         the folder.
    Raises:          CheckpointError when something cannot be stored (dtype, config) or the disk refuses.
    """
    path = Path(path).resolve()
    everything = {"model": tensors, **(parts or {})}
    for part, group in everything.items():
        _check_storable(path, part, group)
    work = _side_name(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _settle(path)
        work.mkdir()
        listed = {part: _write_part(work / f"{part}.safetensors", group, dtype) for part, group in everything.items()}
        _write_file(work / "config.json", _json_bytes(config))
        _write_file(work / "manifest.json", _manifest_bytes(work, listed))
        sync(work)
        _swap(path, work)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot write {path}: {error}; what was there before is untouched.") from error
    return path


def load_folder(path: str | Path, verify: bool = True) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the config of a model folder, on the CPU, checked against its manifest.

    verify:  False skips the hashes (names, shapes, dtypes and sizes are always checked).
    Returns: (tensors by name, config).
    Raises:  CheckpointError naming file, tensor and reason for anything missing, damaged or added.
    """
    parts, config = load_parts(path, verify)
    return parts["model"], config


def load_parts(path: str | Path, verify: bool = True) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """Like `load_folder`, with every tensor file of the folder: {"model": {...}, "ema": {...}}.

    path, verify: as in `load_folder`.
    Returns:      (tensors by part and name, config).
    Raises:       CheckpointError, as `load_folder`.
    """
    folder = _readable(Path(path).resolve())
    manifest = _read_manifest(folder)
    for name, entry in manifest["files"].items():
        _check_size(folder / name, entry)
    config = _read_config(folder, manifest, verify)
    parts = {}
    for part, entries in manifest["tensors"].items():
        file = folder / f"{part}.safetensors"
        parts[part] = _read_part(file, manifest["files"][file.name], entries, verify)
    return parts, config


def read_config(path: str | Path) -> dict:
    """The config of a model folder alone, checked against its manifest.

    path:   a model folder.
    Raises: CheckpointError if the manifest or the config is missing or damaged.
    """
    folder = _readable(Path(path).resolve())
    return _read_config(folder, _read_manifest(folder), verify=True)


def has_folder(path: str | Path) -> bool:
    """Whether a folder was ever completed under this name (it may still be damaged).

    path:    where `save_folder` wrote.
    Returns: True also in the instant in which an older folder stands aside for a newer one.
    Raises:  nothing.
    """
    path = Path(path).resolve()
    return any((place / "manifest.json").is_file() for place in (path, _side_name(path, "old")))


def manifest_hash(path: str | Path) -> str:
    """sha256 (hex) that identifies the content of a model folder: of its manifest, which hashes all the rest.

    path:   a model folder.
    Raises: CheckpointError if there is no readable manifest.
    """
    folder = _readable(Path(path).resolve())
    _read_manifest(folder)
    return _digest(_json_data(folder / "manifest.json"))


# ---- writing


def _side_name(path: Path, suffix: str) -> Path:
    return path.parent / f".{path.name}.{suffix}"


def _settle(path: Path) -> None:
    """Finish or undo what a killed writer left: a half-written folder, or an old one still standing aside."""
    shutil.rmtree(_side_name(path, "tmp"), ignore_errors=True)
    aside = _side_name(path, "old")
    if not aside.exists():
        return
    if path.exists():
        shutil.rmtree(aside)
    else:
        os.rename(aside, path)


def _swap(path: Path, work: Path) -> None:
    aside = _side_name(path, "old")
    if path.exists():
        os.rename(path, aside)
    os.rename(work, path)
    sync(path.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _check_storable(path: Path, part: str, tensors: dict[str, Tensor]) -> None:
    if not PART.fullmatch(part):
        raise CheckpointError(f"cannot write {path}: a part is named by small letters, digits and _, got {part!r}.")
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise CheckpointError(f"cannot write {path}: {part}: tensor {name!r} has dtype {tensor.dtype}; convert it.")


def _write_part(file: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, dict]:
    # a copy each: the format refuses tensors that share memory, and tied weights do
    stored = {
        name: t.detach().to("cpu", dtype if dtype is not None and t.is_floating_point() else t.dtype)
        .clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    save_file(stored, file)
    sync(file)
    return {
        name: {"dtype": _DTYPE_NAMES[t.dtype], "shape": list(t.shape), "sha256": _tensor_digest(t)}
        for name, t in stored.items()
    }


def _manifest_bytes(folder: Path, tensors: dict[str, dict]) -> bytes:
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": _file_digest(file)} for file in sorted(folder.iterdir())
    }
    body = {"format": FORMAT, "files": files, "tensors": tensors}
    return _json_bytes(body | {"sha256": _digest(_json_bytes(body))})


def _json_bytes(value: dict) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _write_file(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    sync(file)


def sync(path: Path) -> None:
    """Wait until a file or a folder's entries have reached the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- reading


def _readable(path: Path) -> Path:
    for place in (path, _side_name(path, "old")):
        if place.is_dir():
            return place
    raise CheckpointError(f"{path}: wanted a model folder, there is {'a file' if path.exists() else 'nothing'}.")


def _read_manifest(folder: Path) -> dict:
    file = folder / "manifest.json"
    data = _json_data(file)
    manifest = _parsed(file, data)
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    if body.get("format") != FORMAT and isinstance(body.get("format"), int):
        raise CheckpointError(f"{file}: format {body['format']} is not {FORMAT}; it needs another fastvid version.")
    # the body's bytes are those of the file without one line: to write the body out again would take far longer
    claimed = manifest.get("sha256")
    if _digest(data.replace(f' "sha256": "{claimed}",\n'.encode(), b"", 1)) != claimed:
        raise CheckpointError(f"{file}: damaged: it does not match its own sha256; fetch or train the model again.")
    _check_manifest(file, body)
    return manifest


def _check_manifest(file: Path, body: dict) -> None:
    files, tensors = body.get("files"), body.get("tensors")
    good = isinstance(files, dict) and isinstance(tensors, dict) and "model" in tensors
    # only these names are ever opened, so no entry can lead out of the folder
    good = good and all(PART.fullmatch(part) for part in tensors)
    good = good and set(files) == {"config.json", *(f"{part}.safetensors" for part in tensors)}
    good = good and all(_is_entry(entry, bytes=int, sha256=str) for entry in files.values())
    good = good and all(isinstance(group, dict) for group in tensors.values())
    good = good and all(_is_entry(e, dtype=str, shape=list, sha256=str) for g in tensors.values() for e in g.values())
    if not good:
        raise CheckpointError(f"{file}: is not the manifest of a model folder; it lists unexpected files or fields.")


def _is_entry(entry: object, **fields: type) -> bool:
    return isinstance(entry, dict) and set(entry) == set(fields) and all(
        isinstance(entry[name], kind) for name, kind in fields.items()
    )


def _read_config(folder: Path, manifest: dict, verify: bool) -> dict:
    file = folder / "config.json"
    entry = manifest["files"][file.name]
    _check_size(file, entry)
    data = _json_data(file)
    if verify and _digest(data) != entry["sha256"]:
        raise _damaged(file, "it does")
    return _parsed(file, data)


def _check_size(file: Path, entry: dict) -> None:
    size = _regular_size(file)
    if size != entry["bytes"]:
        raise CheckpointError(f"{file}: has {size} bytes, its manifest says {entry['bytes']}; it was cut or changed.")


def _damaged(file: Path, culprit: str) -> CheckpointError:
    return CheckpointError(f"{file}: damaged: {culprit} not match its sha256; fetch or train the model again.")


def _read_part(file: Path, entry: dict, entries: dict[str, dict], verify: bool) -> dict[str, Tensor]:
    try:
        # read, not mapped: what is hashed here is what the model gets, whatever becomes of the file meanwhile
        data = _contents(file, entry["bytes"])
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}.") from error
    whole = not verify or _digest(data) == entry["sha256"]
    try:
        tensors = parse_tensors(data)
    except READ_ERRORS as error:
        if not whole:
            raise _damaged(file, "it does") from error
        raise CheckpointError(f"{file}: is not a readable safetensors file: {error}.") from error
    if not whole:
        known = (name for name in entries if name in tensors)
        culprit = next((name for name in known if _tensor_digest(tensors[name]) != entries[name]["sha256"]), None)
        raise _damaged(file, "it does" if culprit is None else f"tensor {culprit!r} does")
    for name in sorted(set(tensors) ^ set(entries)):
        raise CheckpointError(f"{file}: tensor {name!r} is {'not in the manifest' if name in tensors else 'missing'}.")
    for name, tensor_entry in entries.items():
        _check_tensor(file, name, tensors[name], tensor_entry, verify)
    return tensors


def _check_tensor(file: Path, name: str, tensor: Tensor, entry: dict, verify: bool) -> None:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{file}: tensor {name!r} has the unknown dtype {entry['dtype']!r}.")
    if tensor.dtype != DTYPES[entry["dtype"]] or list(tensor.shape) != entry["shape"]:
        raise CheckpointError(
            f"{file}: tensor {name!r} is {list(tensor.shape)} {tensor.dtype} where the manifest says "
            f"{entry['shape']} {entry['dtype']}."
        )
    if tensor.dtype == torch.bool and tensor.numel() and tensor.view(torch.uint8).max() > 1:
        raise CheckpointError(f"{file}: tensor {name!r} has truth values other than 0 and 1.")
    if verify and _tensor_digest(tensor) != entry["sha256"]:
        raise CheckpointError(f"{file}: tensor {name!r} does not match its sha256.")


def _json_data(file: Path) -> bytes:
    size = _regular_size(file)
    if size > JSON_LIMIT:
        raise CheckpointError(f"{file}: is larger than {JSON_LIMIT} bytes, which no {file.name} is.")
    try:
        return _contents(file, size)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}.") from error


def _parsed(file: Path, data: bytes) -> dict:
    try:
        value = json.loads(data, object_pairs_hook=_without_twins, parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not readable JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: wanted a JSON object, got a {type(value).__name__}.")
    return value


def _without_twins(pairs: list[tuple]) -> dict:
    """A JSON object; of two entries under one name another reader might take the other."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"the name {next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))!r} stands twice")
    return value


def _not_a_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")


def _regular_size(file: Path) -> int:
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: missing or unreadable: {error.strerror}.") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file}: is not a regular file.")
    return status.st_size


def _contents(file: Path, size: int) -> bytes:
    """The file, of which no more is taken than was seen before, should it grow meanwhile."""
    with open(file, "rb") as handle:
        return handle.read(size)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(memoryview(flat.numpy())).hexdigest()


def _file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as handle:
            while block := handle.read(2**20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}.") from error
    return digest.hexdigest()
