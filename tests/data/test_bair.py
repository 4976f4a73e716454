"""BAIR's three copies on disk: TFRecords, the PNG tree, HDF5; whole ones give their frames, damage is named."""

import io
import struct

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
    for image, file in zip(clip, files, strict=True):
        Image.fromarray(image.numpy()).save(file, kind)
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


@pytest.mark.parametrize("kind, near", [("PNG", 0), ("JPEG", 255)])
def test_encoded_images(tmp_path, kind, near):
    bair(tmp_path, 2, kind=kind, cameras=("view0",))
    clips = open_clips(tmp_path)
    assert "camera view0, JPEG or PNG" in clips.describe()
    assert clips.read(1).shape == (T, SIDE, SIDE, 3)
    assert (clips.read(1).int() - video(1).int()).abs().max() <= near
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
