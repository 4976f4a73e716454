"""Model folders: what is written comes back, damage is named, and a kill leaves the last good one loadable."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastvid import checkpoint
from fastvid.checkpoint import has_folder, load_folder, load_parts, manifest_hash, read_config, save_folder
from fastvid.errors import CheckpointError

CONFIG = {"kind": "vqvae", "sizes": [1, 2, {"deep": None}], "rate": 0.25}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(5, 7, generator=g),
        "half": torch.randn(3, 2, generator=g).half(),
        "brain": torch.randn(4, 4, generator=g).bfloat16().t(),  # not contiguous
        "count": torch.randint(0, 99, (3,), generator=g),
        "codes": torch.randint(0, 99, (2, 2), generator=g, dtype=torch.int16),
        "started": torch.tensor(True),
        "nothing": torch.zeros(0, 3),
        "nan": torch.tensor([float("nan"), float("inf")]),
    }


def assert_same(got: dict, want: dict):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name].nan_to_num(), tensor.nan_to_num()), name


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_folder(tmp_path / "model", tensors(), CONFIG, parts={"optimizer": tensors(1)})


def test_what_is_written_comes_back(folder):
    parts, config = load_parts(folder)
    assert config == CONFIG == read_config(folder)
    assert_same(parts["model"], tensors())
    assert_same(parts["optimizer"], tensors(1))
    assert_same(load_folder(folder, verify=False)[0], tensors())
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "manifest.json", "model.safetensors", "optimizer.safetensors",
    ]


def test_a_dtype_converts_floating_tensors_only(tmp_path):
    got, _ = load_folder(save_folder(tmp_path / "m", tensors(), CONFIG, dtype=torch.float16))
    assert {t.dtype for t in got.values()} == {torch.float16, torch.int64, torch.int16, torch.bool}
    assert torch.equal(got["weight"], tensors()["weight"].half())


def test_tied_tensors_are_kept(tmp_path):
    w = torch.randn(3, 3)
    got, _ = load_folder(save_folder(tmp_path / "m", {"a": w, "b": w, "row": w[1]}, {}))
    assert torch.equal(got["a"], w) and torch.equal(got["b"], w) and torch.equal(got["row"], w[1])


def test_loaded_tensors_do_not_follow_the_file(folder):
    got, _ = load_folder(folder)
    file = folder / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert_same(got, tensors())


def test_the_hash_names_the_content(folder, tmp_path):
    same = save_folder(tmp_path / "same", tensors(), CONFIG, parts={"optimizer": tensors(1)})
    other = save_folder(tmp_path / "other", tensors(2), CONFIG, parts={"optimizer": tensors(1)})
    assert manifest_hash(folder) == manifest_hash(same) != manifest_hash(other)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "optimizer.safetensors", "manifest.json"])
def test_every_damage_is_an_error(folder, name):
    """40 bit flips and 20 cuts a file, at seeded places: each is a CheckpointError that names the file."""
    file, dice = folder / name, random.Random(name)
    whole = file.read_bytes()
    flips = [(dice.randrange(len(whole)), dice.randrange(8)) for _ in range(40)]
    mutants = [whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1:] for at, bit in flips]
    mutants += [whole[:dice.randrange(len(whole))] for _ in range(20)] + [b"", whole + b" ", whole + whole]
    for number, mutant in enumerate(mutants):
        file.write_bytes(mutant)
        with pytest.raises(CheckpointError, match=name) as caught:
            load_parts(folder)
        assert "\n" not in str(caught.value), number
    file.write_bytes(whole)
    load_parts(folder)


def test_the_damaged_tensor_is_named(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    at = bytes(data).index(tensors()["weight"].numpy().tobytes())
    data[at + 9] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="tensor 'weight'"):
        load_folder(folder)


def forge(folder: Path, change) -> None:
    """Rewrite the manifest so that only its meaning is wrong, not its own hashes."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    for name in list(manifest["files"]):
        file = folder / name
        if file.is_file():
            manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": checkpoint._file_digest(file)}
    change(manifest)
    manifest["sha256"] = checkpoint._digest(checkpoint._json_bytes(manifest))
    (folder / "manifest.json").write_bytes(checkpoint._json_bytes(manifest))


def _lie(field, value):
    return lambda m: m["tensors"]["model"]["weight"].update({field: value})


FORGERIES = {
    "unknown dtype": (_lie("dtype", "float3"), "float3"),
    "wrong dtype": (_lie("dtype", "int32"), "weight"),
    "wrong shape": (_lie("shape", [7, 5]), "weight"),
    "wrong tensor hash": (_lie("sha256", "0" * 64), "weight"),
    "missing tensor": (lambda m: m["tensors"]["model"].update(ghost=m["tensors"]["model"]["nan"]), "'ghost' is miss"),
    "extra tensor": (lambda m: m["tensors"]["model"].pop("weight"), "'weight' is not in"),
    "file outside": (lambda m: m["files"].update({"../secret": {"bytes": 1, "sha256": ""}}), "unexpected"),
    "part outside": (lambda m: m["tensors"].update({"../model": {}}), "unexpected"),
    "no model": (lambda m: m["tensors"].pop("model"), "unexpected"),
    "another format": (lambda m: m.update(format=2), "another fastvid version"),
    "files is a list": (lambda m: m.update(files=[]), "unexpected"),
    "an entry too much": (lambda m: m["tensors"]["model"]["weight"].update(hook="x"), "unexpected"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_manifest_is_an_error(folder, name):
    change, words = FORGERIES[name]
    forge(folder, change)
    with pytest.raises(CheckpointError, match=words):
        load_parts(folder)


def _header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


HOSTILE_WEIGHTS = {
    "huge header": (1 << 62).to_bytes(8, "little") + b"{}",
    "overlap": _header(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
                       b'"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}', bytes(6)),
    "past the end": _header(b'{"a":{"dtype":"F32","shape":[99],"data_offsets":[0,396]}}', bytes(4)),
    "negative": _header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', bytes(4)),
    "overflow": _header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', bytes(4)),
    "unknown dtype": _header(b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "pickle": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "not json": _header(b'{"a":' + b"[" * 4000),
    "empty": b"",
}


@pytest.mark.parametrize("name", HOSTILE_WEIGHTS)
def test_hostile_weights_with_an_honest_manifest_are_an_error(folder, name):
    (folder / "model.safetensors").write_bytes(HOSTILE_WEIGHTS[name])
    forge(folder, lambda manifest: None)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_folder(folder)


@pytest.mark.parametrize("text", [b"[" * 200_000, b"[]", b"\xff\xfe", b'{"a": NaN', b""])
@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_json_that_is_none(folder, name, text):
    (folder / name).write_bytes(text)
    if name == "config.json":
        forge(folder, lambda manifest: None)
    with pytest.raises(CheckpointError, match=name):
        load_folder(folder)


def test_a_json_file_beyond_all_measure_is_not_read(folder):
    with open(folder / "manifest.json", "r+b") as file:
        file.truncate(checkpoint.JSON_LIMIT + 1)  # sparse: takes no room
    with pytest.raises(CheckpointError, match="larger"):
        load_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json"])
def test_missing_files_and_things_that_are_no_files(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_folder(folder)
    os.mkfifo(folder / name)  # opening it would wait for ever
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_folder(folder)


def test_no_folder_at_all(tmp_path):
    (tmp_path / "file").write_text("x")
    for name, words in (("none", "nothing"), ("file", "a file")):
        assert not has_folder(tmp_path / name)
        with pytest.raises(CheckpointError, match=words):
            load_folder(tmp_path / name)


def test_a_safetensors_file_of_somebody_else_is_no_model(tmp_path):
    (tmp_path / "m").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"manifest\.json: missing"):
        load_folder(tmp_path / "m")


@pytest.mark.parametrize("bad", [{"a": torch.zeros(2, dtype=torch.complex64)}, {"a": torch.zeros(2).to(torch.uint32)}])
def test_what_cannot_be_stored_is_refused_and_nothing_is_lost(folder, bad):
    with pytest.raises(CheckpointError, match="'a' has dtype"):
        save_folder(folder, bad, CONFIG)
    with pytest.raises(CheckpointError, match="cannot write"):
        save_folder(folder, tensors(5), {"value": object()})
    with pytest.raises(CheckpointError, match="part"):
        save_folder(folder, tensors(5), CONFIG, parts={"../x": {}})
    assert_same(load_folder(folder)[0], tensors())


def test_a_disk_that_refuses_is_one_error_and_nothing_is_lost(folder, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_folder(folder, tensors(3), CONFIG)
    monkeypatch.undo()
    assert_same(load_folder(folder)[0], tensors())
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def _die_at(moment: int) -> None:
    """Patch everything that touches the disk so that this process dies in the call number `moment`, half-done."""
    calls = [0]

    def wrap(function):
        def wrapped(*args, **kwargs):
            calls[0] += 1
            if calls[0] == moment:
                if function.__name__ == "write_bytes":
                    function(args[0], args[1][:len(args[1]) // 2])
                os._exit(9)
            return function(*args, **kwargs)
        return wrapped

    for owner, name in ((os, "rename"), (os, "fsync"), (os, "unlink"), (Path, "mkdir"), (Path, "write_bytes"),
                        (checkpoint, "save_file"), (shutil, "rmtree")):
        setattr(owner, name, wrap(getattr(owner, name)))


def _save_and_die(path: Path, moment: int, seed: int) -> int:
    child = os.fork()
    if child == 0:
        try:
            _die_at(moment)
            save_folder(path, tensors(seed), CONFIG)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_at_every_moment_of_a_save_a_good_folder_loads(tmp_path):
    """The save dies at its first disk call, at its second, and so on; the old or the new folder always loads."""
    path, seen = tmp_path / "model", set()
    for moment in range(1, 200):
        for leftover in tmp_path.iterdir():
            shutil.rmtree(leftover)
        save_folder(path, tensors(0), CONFIG)
        code = _save_and_die(path, moment, seed=1)
        got = load_folder(path)[0]
        seen.add("new" if torch.equal(got["weight"], tensors(1)["weight"]) else "old")
        assert_same(got, tensors(1) if "new" in seen else tensors(0))  # once the new one is there it stays
        assert has_folder(path)
        save_folder(path, tensors(2), CONFIG)
        assert_same(load_folder(path)[0], tensors(2))
        assert [p.name for p in tmp_path.iterdir()] == ["model"], "a stray folder was left"
        if code == 0:
            break
    assert code == 0 and moment > 12 and seen == {"old", "new"}
