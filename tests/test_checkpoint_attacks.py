"""200 damaged model folders and 30 forged ones: each is one CheckpointError of one line, and nothing of theirs runs."""

import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvid
from fastvid.checkpoint import _digest, _file_digest, _json_bytes, load_parts, save_folder
from fastvid.errors import CheckpointError

DAMAGES = ("cut", "flipped bits", "overwritten", "zeroed", "deleted", "inserted", "swapped")
SHIPPED = "dino64"


@pytest.fixture
def folder(tmp_path) -> Path:
    g = torch.Generator().manual_seed(0)
    tensors = {"weight": torch.randn(40, 50, generator=g), "count": torch.arange(300), "on": torch.ones(9) > 0}
    return save_folder(tmp_path / "model", tensors, {"kind": "x", "sizes": [1, 2]}, parts={"ema": dict(tensors)})


def damaged(whole: bytes, number: int) -> bytes:
    draw, data, what = random.Random(number), bytearray(whole), DAMAGES[number % len(DAMAGES)]
    at, length = draw.randrange(len(data)), draw.randint(1, 64)
    if what == "cut":
        del data[at:]
    elif what == "flipped bits":
        data[at] ^= 1 << draw.randrange(8)
    elif what == "overwritten":
        data[at : at + length] = draw.randbytes(len(data[at : at + length]))
    elif what == "zeroed":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif what == "deleted":
        del data[at : at + length]
    elif what == "inserted":
        data[at:at] = draw.randbytes(length)
    else:
        middle = len(data) // 2
        data = data[middle:] + data[:middle]
    return bytes(data)


def refused(act) -> str:
    """The one line that an action is refused with."""
    with pytest.raises(CheckpointError) as caught:
        act()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


def test_200_damaged_files_are_200_errors(folder):
    files, seen = sorted(folder.iterdir()), 0
    assert [file.name for file in files] == ["config.json", "ema.safetensors", "manifest.json", "model.safetensors"]
    wholes = [file.read_bytes() for file in files]
    for number in range(230):
        file, whole = files[number % 4], wholes[number % 4]
        data = damaged(whole, number)
        if data == whole or seen == 200:  # zeros that were zeros
            continue
        seen += 1
        file.write_bytes(data)
        assert file.name in refused(lambda: load_parts(folder)), number
        file.write_bytes(whole)
    assert seen == 200
    load_parts(folder)


# ---- forged folders: every hash is right, only the meaning is not


def forge(folder: Path, change=lambda manifest: None) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    for name in manifest["files"]:
        file = folder / name
        if file.is_file():
            manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": _file_digest(file)}
    change(manifest)
    sign(folder, _json_bytes(manifest))


def sign(folder: Path, body: bytes) -> None:
    """Put a manifest in place under its own hash, written as `save_folder` writes it."""
    line = f' "sha256": "{_digest(body)}",\n'.encode()
    at = body.index(b' "tensors"') if b' "tensors"' in body else body.index(b"\n") + 1
    (folder / "manifest.json").write_bytes(body[:at] + line + body[at:])


def signed(change):
    """Forge the manifest's text itself."""
    def attack(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["sha256"]
        sign(folder, change(_json_bytes(manifest)))
    return attack


def weights(data: bytes):
    def attack(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(data)
        forge(folder)
    return attack


def config(data: bytes):
    def attack(folder: Path) -> None:
        (folder / "config.json").write_bytes(data)
        forge(folder)
    return attack


def lie(field: str, value):
    return lambda folder: forge(folder, lambda m: m["tensors"]["model"]["weight"].update({field: value}))


def header(text: str, data: bytes = b"") -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode() + data


def entry(kind: str, shape: str, start: int, end: int) -> str:
    return f'{{"dtype":"{kind}","shape":{shape},"data_offsets":[{start},{end}]}}'


class Bomb:
    """Would leave a file behind if it were ever unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def payload(wrapped: bool) -> bytes:
    if not wrapped:
        return b"cos\nmkdir\n(V" + os.environ["BOMB"].encode() + b"\ntR."
    buffer = io.BytesIO()
    torch.save({"weight": Bomb()}, buffer)
    return buffer.getvalue()


def link(name: str, target: str):
    def attack(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)
    return attack


def grown(name: str, size: int):
    """Sparse: takes no room on the disk, but would in memory."""
    def attack(folder: Path) -> None:
        with open(folder / name, "r+b") as file:
            file.truncate(size)
    return attack


def half_truths(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    at = data.index(bytes([1] * 9))
    data[at] = 7
    file.write_bytes(data)
    told = _digest(bytes(data[at : at + 9]))
    forge(folder, lambda m: m["tensors"]["model"]["on"].update(sha256=told))


def appended(folder: Path) -> None:
    weights((folder / "model.safetensors").read_bytes() + payload(False))(folder)


TWICE = f'{{"a":{entry("U8", "[2]", 0, 2)},"a":{entry("U8", "[2]", 0, 2)}}}'
ATTACKS = {
    "huge header": weights((1 << 62).to_bytes(8, "little") + b"{}"),
    "header longer than the file": weights((10_000).to_bytes(8, "little") + b"{}"),
    "overlap": weights(header(f'{{"a":{entry("U8", "[4]", 0, 4)},"b":{entry("U8", "[4]", 2, 6)}}}', bytes(6))),
    "hole": weights(header(f'{{"a":{entry("U8", "[2]", 0, 2)},"b":{entry("U8", "[2]", 4, 6)}}}', bytes(6))),
    "past the end": weights(header(f'{{"a":{entry("F32", "[99]", 0, 396)}}}', bytes(4))),
    "backwards": weights(header(f'{{"a":{entry("U8", "[4]", 4, 0)}}}', bytes(4))),
    "negative shape": weights(header(f'{{"a":{entry("F32", "[-1]", 0, 4)}}}', bytes(4))),
    "overflowing shape": weights(header(f'{{"a":{entry("F32", "[4294967296,4294967296]", 0, 4)}}}', bytes(4))),
    "shape of NaN": weights(header(f'{{"a":{entry("F32", "[NaN]", 0, 4)}}}', bytes(4))),
    "unknown dtype": weights(header(f'{{"a":{entry("F99", "[1]", 0, 4)}}}', bytes(4))),
    "deep header": weights(header('{"a":' + "[" * 100_000)),
    "a name twice in the weights": weights(header(TWICE, bytes(2))),
    "pickle": lambda folder: weights(payload(False))(folder),
    "torch file": lambda folder: weights(payload(True))(folder),
    "pickle behind the weights": appended,
    "truth values of 7": half_truths,
    "another dtype": lie("dtype", "int32"),
    "a dtype of torch that is none": lie("dtype", "__class__"),
    "another shape": lie("shape", [50, 40]),
    "shape of words": lie("shape", ["40", "50"]),
    "another tensor's hash": lie("sha256", "0" * 64),
    "path out": lambda folder: forge(folder, lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}})),
    "part out": lambda folder: forge(folder, lambda m: m["tensors"].update({"/etc/x": {}})),
    "a name twice in the manifest": signed(lambda body: body.replace(b'"format": 1,', b'"format": 1,\n "format": 1,')),
    "size of NaN": signed(lambda body: body.replace(b'"bytes": ', b'"bytes": NaN, "x": ', 1)),
    "size below zero": lambda folder: forge(folder, lambda m: m["files"]["config.json"].update(bytes=-1)),
    "a number of 5000 digits": signed(lambda body: body.replace(b'"bytes": ', b'"bytes": ' + b"9" * 5000, 1)),
    "deep manifest": lambda folder: (folder / "manifest.json").write_bytes(b'{"a":' * 100_000),
    "deep config": config(b'{"a":' * 100_000),
    "config of NaN": config(b'{"kind": "x", "size": NaN}'),
    "config with a name twice": config(b'{"kind": "x", "kind": "y"}'),
    "config in another encoding": config('{"kind": "é"}'.encode("latin-1")),
    "weights are a device": link("model.safetensors", "/dev/zero"),
    "weights are another's file": link("model.safetensors", "/etc/passwd"),
    "config leads to itself": link("config.json", "config.json"),
    "manifest of 3 GB": grown("manifest.json", 3 << 30),
    "weights of 30 GB": grown("model.safetensors", 30 << 30),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_one_error_and_runs_nothing(folder, name, monkeypatch):
    monkeypatch.setenv("BOMB", str(folder.parent / "bomb"))
    ATTACKS[name](folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(lambda: load_parts(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # kilobytes; the files have 20
    assert not (folder.parent / "bomb").exists()


def test_the_bomb_would_have_gone_off(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "bomb"))
    (tmp_path / "payload").write_bytes(payload(False))
    subprocess.run([sys.executable, "-m", "pickle", tmp_path / "payload"], check=True, capture_output=True)
    assert (tmp_path / "bomb").exists()


# ---- a shipped model through fastvid.load

CONFIGS = {
    "no parts": lambda c: c.pop("vqvae"),
    "no size": lambda c: c.pop("size"),
    "size of words": lambda c: c.update(size="64"),
    "size of one": lambda c: c.update(size=[64]),
    "no multiple of 8": lambda c: c.update(size=[64, 63]),
    "another kind": lambda c: c.update(kind="os.system"),
    "a part that is a list": lambda c: c.update(top=[]),
    "unknown field": lambda c: c["vqvae"].update(hook="x"),
    "a width of words": lambda c: c["vqvae"].update(hidden="64"),
    "a width of nothing": lambda c: c["vqvae"].update(hidden=None),
    "a width below zero": lambda c: c["vqvae"].update(hidden=-64),
    "a width beyond memory": lambda c: c["vqvae"].update(hidden=1 << 40),
    "another width": lambda c: c["vqvae"].update(hidden=72),
    "heads that do not divide": lambda c: c["top"]["stack"].update(heads=5),
}


@pytest.fixture
def shipped(tmp_path) -> Path:
    return shutil.copytree(Path(fastvid.__file__).parent / "models" / "weights" / SHIPPED, tmp_path / SHIPPED)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_builds_no_model_is_one_error(shipped, name):
    told = json.loads((shipped / "config.json").read_text())
    CONFIGS[name](told)
    (shipped / "config.json").write_bytes(_json_bytes(told))
    forge(shipped)
    assert SHIPPED in refused(lambda: fastvid.load(shipped))


def test_damage_of_a_shipped_model_is_one_error(shipped):
    for number in range(12):
        file = sorted(shipped.iterdir())[number % 3]
        whole = file.read_bytes()
        file.write_bytes(damaged(whole, number + 1))
        assert file.name in refused(lambda: fastvid.load(shipped))
        file.write_bytes(whole)
    fastvid.load(shipped)


def test_a_load_takes_little_more_than_twice_the_file(tmp_path):
    """Measured in a child, whose highest use of memory starts anew."""
    path = save_folder(tmp_path / "m", {"a": torch.zeros(8 << 20), "b": torch.zeros(4 << 20)}, {})
    child = os.fork()
    if child == 0:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            held = peak()
            load_parts(path)
            os._exit(0 if peak() - held < 2 * 48 * 1024 + 8 * 1024 else 3)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def peak() -> int:
    """Highest use of memory in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
