"""BAIR's three copies on disk: TFRecords, the PNG tree, HDF5; whole ones give their frames, damage is named."""

import io
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from write_bair import crc32c as plain_crc32c
from write_bair import example, field, framed, trajectory, varint

from fastvid.data import ClipWindows, open_clips
from fastvid.data.formats._tfrecord import crc32c, parse_example
from fastvid.data.formats.bair import read_actions
from fastvid.data.video import fit_frames
from fastvid.errors import DataError, VideoError

T, SIDE = 3, 8


def video(number, side=SIDE, frames=T) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (frames, side, side, 3), dtype=torch.uint8, generator=generator)


def numbers(number, frames=T):
    generator = np.random.default_rng(number)
    return generator.normal(size=(frames, 4)).astype("f4"), generator.normal(size=(frames, 3)).astype("f4")


def stored(clip, kind="raw") -> list[bytes]:
    if kind == "raw":
        return [image.numpy().tobytes() for image in clip]
    files = [io.BytesIO() for _ in clip]
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    for image, file in zip(clip, files, strict=True):
        Image.fromarray(image.numpy()).save(file, kind, **options)
    return [file.getvalue() for file in files]


def record(number, kind="raw", frames=T, cameras=("aux1", "main")) -> bytes:
    videos = {c: stored(video(number + 1000 * i, frames=frames), kind) for i, c in enumerate(cameras)}
    return framed(trajectory(videos, *numbers(number, frames)))


def bair(root, count=4, a_file=2, first=0, **options):
    root.mkdir(parents=True, exist_ok=True)
    for start in range(first, first + count, a_file):
        data = b"".join(record(number, **options) for number in range(start, start + a_file))
        (root / f"traj_{start}_to_{start + a_file - 1}.tfrecords").write_bytes(data)
    return root


def test_checksum():
    # RFC 3720, B.4
    known = {b"123456789": 0xE3069283, bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E}
    assert {data: crc32c(data) for data in known} == known
    noise = np.random.default_rng(0).bytes(5000)
    for length in (*range(70), 127, 128, 129, 256, 257, 4095, 4096, 5000):
        assert crc32c(noise[:length]) == plain_crc32c(noise[:length])
        assert crc32c(bytes(length)) == plain_crc32c(bytes(length))


def test_messages_are_taken_apart():
    floats = np.array([1.5, -2.0], "<f4")
    features = {"a": b"\0\xff", "b": [1, -1, 2**62], "c": floats.tolist(), "": b""}
    found = parse_example(example(features))
    assert found["a"] == [b"\0\xff"] and found[""] == [b""]
    assert found["b"].tolist() == [1, -1, 2**62] and found["c"].tolist() == [1.5, -2.0]
    # numbers one by one, an unknown field of every wire type before them, and a feature of no kind
    unpacked = b"".join(varint(1 << 3 | 5) + number.tobytes() for number in floats)
    odd = varint(7 << 3) + varint(5) + varint(8 << 3 | 1) + bytes(8) + varint(9 << 3 | 5) + bytes(4) + field(10, b"x")
    entries = [field(1, b"d") + odd + field(2, field(2, unpacked)), field(1, b"e") + field(2, b"")]
    entries.append(field(1, b"f") + field(2, field(3, varint(8) + varint(300) + varint(8) + varint(2**64 - 3))))
    found = parse_example(odd + field(1, b"".join(field(1, entry) for entry in entries)))
    assert found["d"].tolist() == [1.5, -2.0] and found["e"] == [] and found["f"].tolist() == [300, -3]


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_cut_message_is_refused(cut):
    whole = example({"0/action": [1.0, 2.0, 3.0], "a": b"xyz"})
    with pytest.raises(ValueError, match="no Example message"):
        parse_example(whole[:-cut])


def test_splits_cameras_and_frames(tmp_path):
    bair(tmp_path / "softmotion30_44k" / "train", 4)
    bair(tmp_path / "softmotion30_44k" / "test", 2, first=50)
    clips = open_clips(tmp_path, "train")
    assert (len(clips), clips.lengths, clips.skipped) == (4, [T] * 4, [])
    assert clips.names[3] == "softmotion30_44k/train/traj_2_to_3.tfrecords/1"
    said = clips.describe()
    assert "BAIR" in said and "split train" in said and "camera aux1, raw 8x8" in said
    for number in range(4):
        assert torch.equal(clips.read(number), video(number))
    assert torch.equal(clips.read(2, 1, 2, (4, 4)), fit_frames(video(2)[1:], 4, 4)[0])
    assert torch.equal(open_clips(f"{tmp_path}?camera=main", "test").read(1), video(1051))
    assert torch.equal(open_clips(tmp_path / "softmotion30_44k", "test").read(0), video(50))
    inner = tmp_path / "softmotion30_44k" / "train"
    assert open_clips(inner, "test").names[0] == "traj_0_to_1.tfrecords/0"
    assert "all clips count as test" in open_clips(inner, "test").describe()
    assert torch.equal(open_clips(inner / "traj_2_to_3.tfrecords").read(0), video(2))
    with pytest.raises(DataError, match="no camera 'view0' in the records; there are: aux1, main"):
        open_clips(f"{inner}?camera=view0")
    with pytest.raises(DataError, match="no option 'kamera'; there are: camera .*split"):
        open_clips(f"{inner}?kamera=main")


@pytest.mark.parametrize("kind, near", [("PNG", 0), ("JPEG", 3)])
def test_encoded_images(tmp_path, kind, near):
    bair(tmp_path, 2, kind=kind, cameras=("view0",))
    clips = open_clips(tmp_path)
    assert "camera view0, JPEG or PNG" in clips.describe()
    assert clips.read(1).shape == (T, SIDE, SIDE, 3)
    files = map(io.BytesIO, stored(video(1), kind))
    expected = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])
    assert (clips.read(1).int() - expected.int()).abs().max() <= near
    assert torch.equal(clips.read(1, 2, 1), clips.read(1)[2:])


def test_actions(tmp_path):
    bair(tmp_path / "train")
    actions, positions = read_actions(tmp_path, [3, 0])
    assert actions.shape == (2, T, 4) and positions.shape == (2, T, 3) and actions.dtype == torch.float32
    assert actions.tolist() == [numbers(3)[0].tolist(), numbers(0)[0].tolist()]
    assert positions.tolist() == [numbers(3)[1].tolist(), numbers(0)[1].tolist()]
    with pytest.raises(DataError, match="clip 4 wanted, but there are 4"):
        read_actions(tmp_path, [0, 4])
    (tmp_path / "train" / "traj_4_to_4.tfrecords").write_bytes(framed(example({"0/image_aux1/encoded": b"abc"})))
    with pytest.raises(VideoError, match="traj_4_to_4.tfrecords, record 0: wanted 4 numbers under 0/action"):
        read_actions(tmp_path, [4])


def test_fewer_or_more_records_than_the_name_promises(tmp_path):
    bair(tmp_path)
    whole = (tmp_path / "traj_0_to_1.tfrecords").read_bytes()
    for last, data in ((17, whole), (20, whole + whole[:-1]), (30, whole + whole)):
        (tmp_path / f"traj_10_to_{last}.tfrecords").write_bytes(data)
    (tmp_path / "traj_40_to_41.tfrecords").write_bytes(whole[:5])
    (tmp_path / "traj_50_to_50.tfrecords").write_bytes(whole)
    clips = open_clips(tmp_path)
    assert len(clips) == 4 + 2 + 3 + 4 + 0 + 1
    reasons = dict(clips.skipped)
    assert reasons["traj_10_to_17.tfrecords"] == "its name promises 8 records, 2 are there"
    assert reasons["traj_10_to_20.tfrecords"].endswith("11 records, 3 are there; record 3 is cut short")
    assert reasons["traj_40_to_41.tfrecords"].endswith("0 are there; record 0 is cut short")
    assert "more records than the 1 of its name" in reasons["traj_50_to_50.tfrecords"]


def test_a_flipped_bit_is_seen_wherever_it_is(tmp_path):
    bair(tmp_path, 2)
    path = tmp_path / "traj_0_to_1.tfrecords"
    whole = path.read_bytes()
    second = 16 + struct.unpack("<Q", whole[:8])[0]
    for at in (*range(second, second + 20), second + 500, len(whole) - 20, *range(len(whole) - 4, len(whole))):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        clips = open_clips(tmp_path)
        assert torch.equal(clips.read(0), video(0))
        if len(clips) == 2:
            with pytest.raises(VideoError, match="traj_0_to_1.tfrecords, record 1: the checksum.*download"):
                clips.read(1)
        else:
            assert "the checksum of its length is wrong" in clips.skipped[0][1] and at < second + 12


def test_a_record_unlike_the_others_is_a_bad_clip(tmp_path):
    bair(tmp_path, 40, a_file=40)
    short, other = record(0, frames=2), framed(trajectory({"aux1": stored(video(1, 9))}, *numbers(1)))
    (tmp_path / "traj_40_to_42.tfrecords").write_bytes(short + other + framed(b"\x0a\xff"))
    clips = open_clips(tmp_path)
    for number, reason in ((40, "shorter than the others"), (41, "243 bytes, raw 8x8 has 192"), (42, "no Example")):
        with pytest.raises(VideoError, match=reason):
            clips.read(number)
    with pytest.warns(UserWarning, match="traj_40_to_42"), pytest.raises(DataError, match="3 of 43 clips"):
        windows = ClipWindows(clips, frames=T, size=None)
        for step in range(40):
            windows.batch(step, 16)


def test_nothing_usable_is_one_line(tmp_path):
    (tmp_path / "traj_0_to_255.tfrecords").write_bytes(b"")
    with pytest.raises(DataError, match="no usable clip, 1 unusable; the first: .*promises 256 records, 0 are there"):
        open_clips(tmp_path)
    (tmp_path / "traj_0_to_255.tfrecords").write_bytes(framed(example({"steps": [1, 2]})))
    with pytest.raises(DataError, match="no key like 0/image_aux1/encoded, but steps"):
        open_clips(tmp_path)
    (tmp_path / "traj_0_to_255.tfrecords").write_bytes(framed(b"hello"))
    with pytest.raises(DataError, match="no record can be read; the first: .*no Example message"):
        open_clips(tmp_path)


def png_tree(root, split="train", group="traj_0_to_1", clips=(1, 2, 10)):
    for number in clips:
        folder = root / split / group / str(number)
        folder.mkdir(parents=True)
        for t, image in enumerate(stored(video(number, frames=12), "PNG")):
            (folder / f"{t}.png").write_bytes(image)


def test_png_tree(tmp_path):
    png_tree(tmp_path / "processed_data")
    png_tree(tmp_path / "processed_data", "test", "traj_256_to_511", [3])
    clips = open_clips(tmp_path)
    assert clips.names == [f"processed_data/train/traj_0_to_1/{number}" for number in (1, 2, 10)]
    assert clips.lengths == [12] * 3 and "BAIR robot pushing (PNG)" in clips.describe()
    assert torch.equal(clips.read(2), video(10, frames=12))
    test = open_clips(tmp_path / "processed_data", "test")
    assert torch.equal(test.read(0, 9, 3), video(3, frames=12)[9:])
    assert len(open_clips(tmp_path / "processed_data" / "train")) == 3


def test_png_tree_with_holes(tmp_path):
    png_tree(tmp_path)
    (tmp_path / "train" / "traj_0_to_1" / "2" / "4.png").unlink()
    (tmp_path / "train" / "traj_0_to_1" / "10" / "11.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    clips = open_clips(tmp_path)
    assert clips.skipped == [("train/traj_0_to_1/2", "frame 4.png is missing")] and len(clips) == 2
    assert torch.equal(clips.read(1, 0, 11), video(10, frames=12)[:11])
    with pytest.raises(VideoError, match="10/11.png"):
        clips.read(1)


def hdf5(path, splits=("train", "test"), **changes):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install 'fastvid-torch[data]'")
    with h5py.File(path, "w") as file:
        for i, split in enumerate(splits):
            frames = torch.cat([video(10 * i), video(10 * i + 1, frames=T + 2), video(10 * i + 2)])
            file[f"{split}_data"] = changes.get("data", frames.numpy())
            if "index" not in changes:
                file[f"{split}_idx"] = np.array([0, T, 2 * T + 2])
            elif changes["index"] is not None:
                file[f"{split}_idx"] = changes["index"]
    return path


def test_hdf5(tmp_path):
    path = hdf5(tmp_path / "bair.hdf5")
    clips = open_clips(path)
    assert (clips.names, clips.lengths) == (["train/0", "train/1", "train/2"], [T, T + 2, T])
    assert "VideoGPT" in clips.describe() and "split train" in clips.describe()
    assert torch.equal(clips.read(1), video(1, frames=T + 2)) and torch.equal(clips.read(2), video(2))
    test = open_clips(tmp_path, "test")
    assert torch.equal(test.read(1, 2, 2, (4, 4)), fit_frames(video(11, frames=T + 2)[2:4], 4, 4)[0])


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"splits": ()}, "no train_data and no test_data in it, but nothing"),
        ({"splits": ("test",)}, "no split 'train' in it; there are: test"),
        ({"data": np.zeros((11, 8, 8, 3), "f4")}, "must be uint8 .*, got float32"),
        ({"data": np.zeros((11, 8, 8), "u1")}, r"must be uint8 .*, got uint8 \[11, 8, 8\]"),
        ({"index": None}, "train_idx is missing"),
        ({"index": np.array([0, 3, 3])}, "train_idx must rise"),
        ({"index": np.array([0, 11])}, "train_idx must rise and stay from 0 to below 11"),
        ({"index": np.array([-1, 3])}, "train_idx must rise"),
        ({"index": np.array([0.0, 3.0])}, "train_idx must be whole numbers"),
    ],
)  # fmt: skip
def test_hdf5_of_another_form(tmp_path, changes, reason):
    with pytest.raises(DataError, match=reason):
        open_clips(hdf5(tmp_path / "a.h5", **changes), "train")


def test_hdf5_reads_nothing_but_the_file_itself(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install 'fastvid-torch[data]'")
    (tmp_path / "secret").write_bytes(bytes(8 * 8 * 3))
    with h5py.File(tmp_path / "outside.h5", "w") as file:
        storage = [(str(tmp_path / "secret"), 0, 8 * 8 * 3)]
        file.create_dataset("train_data", (1, 8, 8, 3), "u1", external=storage)
        file["train_idx"] = np.array([0])
    hdf5(tmp_path / "whole.h5")
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["train_data"] = h5py.ExternalLink(str(tmp_path / "whole.h5"), "/train_data")
    for name, reason in (("outside", "no array in the file itself"), ("link", "missing, or a link out of the file")):
        with pytest.raises(DataError, match=reason):
            open_clips(tmp_path / f"{name}.h5")


def test_damaged_hdf5(tmp_path):
    path = hdf5(tmp_path / "a.h5")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="a.h5: cannot be read as HDF5"):
        open_clips(path)
    path.write_bytes(b"hello, no HDF5")
    with pytest.raises(DataError, match="cannot be read"):
        open_clips(path)


def test_hdf5_without_its_package(tmp_path, monkeypatch):
    path = hdf5(tmp_path / "a.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match="needs the package h5py; pip install"):
        open_clips(path)
