"""StyleGAN-V's folders of frames, on disk and in a zip that is read in place; archives made to harm are refused."""

import io
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastvid.data import open_clips
from fastvid.data.formats import stylegan_v
from fastvid.data.video import fit_frames
from fastvid.errors import DataError, VideoError


def images(number, frames=12, kind="JPEG") -> list[bytes]:
    noise = np.random.default_rng(number).integers(0, 256, (frames, 12, 16, 3), np.uint8)
    noise[:] = noise[:, :1, :1]  # one colour an image, which JPEG keeps nearly
    files = [io.BytesIO() for _ in noise]
    for image, file in zip(noise, files, strict=True):
        Image.fromarray(image).save(file, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return [file.getvalue() for file in files]


def pixels(files) -> torch.Tensor:
    """What another decoder makes of the files."""
    return torch.stack([torch.from_numpy(np.array(Image.open(io.BytesIO(file)).convert("RGB"))) for file in files])


def members(prefix="", kind="JPEG") -> dict[str, bytes]:
    suffix = {"JPEG": "jpg", "PNG": "png"}[kind]
    names = [f"{prefix}video{clip}/frame{t}.{suffix}" for clip in (2, 10) for t in range(12)]
    return dict(zip(names, images(2, kind=kind) + images(10, kind=kind), strict=True))


def packed(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def unpacked(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def near(a, b) -> bool:
    return a.shape == b.shape and (a.int() - b.int()).abs().max() <= 3


@pytest.mark.parametrize("place", ["folder", "zip"])
def test_clips_in_natural_order(tmp_path, place):
    source = (unpacked if place == "folder" else packed)(tmp_path / "set.zip", members())
    clips = open_clips(source, "test")
    assert (clips.names, clips.lengths, clips.skipped) == (["video2", "video10"], [12, 12], [])
    assert "StyleGAN-V" in clips.describe() and "all clips count as test" in clips.describe()
    assert near(clips.read(1), pixels(images(10))) and near(clips.read(0, 9, 3), pixels(images(2)[9:]))
    assert torch.equal(clips.read(1, 3, 2, (6, 6)), fit_frames(clips.read(1)[3:5], 6, 6)[0])


@pytest.mark.parametrize("prefix", ["", "set/"])
@pytest.mark.parametrize("place", ["folder", "zip"])
def test_splits(tmp_path, place, prefix):
    files = members(f"{prefix}train/", "PNG")
    files |= {f"{prefix}val/video7/frame{t}.png": data for t, data in enumerate(images(7, 3, "PNG"))}
    source = unpacked(tmp_path / "set", files) / prefix if place == "folder" else packed(tmp_path / "set.zip", files)
    assert [len(open_clips(source, split)) for split in (None, "train", "test")] == [2, 2, 1]
    clips = open_clips(source, "test")
    assert "split val (as test)" in clips.describe()
    assert torch.equal(clips.read(0), pixels(images(7, 3, "PNG")))
    with pytest.raises(DataError, match="no split 'other' in it; there are: train, val"):
        open_clips(f"{source}?split=other")


def test_folders_with_other_things_in_them_are_not_stylegan_v(tmp_path):
    unpacked(tmp_path, members())
    assert "it holds video2/frame" in stylegan_v.recognise(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "notes.txt").touch()
    assert stylegan_v.recognise(tmp_path)
    (tmp_path / "walk").mkdir()
    assert stylegan_v.recognise(tmp_path) is None
    (tmp_path / "walk").rmdir()
    (tmp_path / "holiday.mp4").touch()
    assert stylegan_v.recognise(tmp_path) is None


@pytest.mark.parametrize(
    "name, told",
    [
        ("leftImg8bit_sequence/val/ulm/ulm_000000_000012_leftImg8bit.png", "frames of Cityscapes .ulm_000000_000012"),
        ("sky_train/a/b/b_frames_00000012.jpg", "frames of Sky Time-lapse .b_frames_00000012"),
        ("films/cat.MP4", "videos .cat.MP4"),
    ],
)
def test_zips_of_other_formats_say_what_to_do(tmp_path, name, told):
    path = packed(tmp_path / "set.zip", {"readme.txt": b"hello", name: images(1, 1)[0]})
    with pytest.raises(DataError, match=f"set.zip: holds {told}.*unpack it and name the folder"):
        open_clips(path)


def test_any_zip_of_folders_of_images_and_what_else_lies_in_it(tmp_path):
    noise = pixels(images(5, 2, "PNG"))
    bmp = io.BytesIO()
    Image.fromarray(noise[1].numpy()).save(bmp, "BMP")
    files = {"a/b/1.png": images(5, 2, "PNG")[0], "a/b/2.bmp": bmp.getvalue(), "notes.txt": b"hello",
             "__MACOSX/a/b/._1.png": b"fork", "a/b/.hidden.png": b"x"}  # fmt: skip
    clips = open_clips(packed(tmp_path / "set.zip", files, zipfile.ZIP_STORED))
    assert clips.names == ["a/b"] and torch.equal(clips.read(0), noise)


def test_each_process_has_a_handle_of_its_own(tmp_path, monkeypatch):
    clips = open_clips(packed(tmp_path / "set.zip", members()))
    opened = []
    real = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda path: opened.append(path) or real(path))
    for process in (1, 1, 2, 1):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        assert near(clips.read(1), pixels(images(10)))
    assert len(opened) == 2


@pytest.mark.parametrize(
    "name, reason",
    [
        ("../video1/frame0.png", "its name points out of the archive"),
        ("video1/../../frame0.png", "its name points out of the archive"),
        ("/etc/frame0.png", "its name points out of the archive"),
        ("video1\\frame0.png", "its name points out of the archive"),
        ("C:/video1/frame0.png", "its name points out of the archive"),
    ],
)
def test_names_that_point_outside_are_refused(tmp_path, name, reason):
    clips = open_clips(packed(tmp_path / "set.zip", members() | {name: images(1, 1, "PNG")[0]}))
    assert clips.names == ["video2", "video10"]
    assert len(clips.skipped) == 1 and reason in clips.skipped[0][1] and name in clips.skipped[0][1]
    with pytest.raises(DataError, match="no usable clip, 1 unusable; the first: .*points out"):
        open_clips(packed(tmp_path / "set.zip", {name: images(1, 1, "PNG")[0]}))


def test_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fastvid.data.formats.stylegan_v.MEMBER_BYTES", 4 << 20)
    files = members() | {"video3/frame0.jpg": bytes(3 << 20), "video4/frame0.jpg": bytes(5 << 20)}
    clips = open_clips(packed(tmp_path / "set.zip", files))
    reasons = dict(clips.skipped)
    assert clips.names == ["video2", "video10"] and sorted(reasons) == ["video3", "video4"]
    assert "as no image does" in reasons["video3"] and "above 4194304" in reasons["video4"]
    with pytest.raises(DataError, match="neither stored nor deflated"):
        open_clips(packed(tmp_path / "set.zip", members(), zipfile.ZIP_LZMA))


def test_a_member_that_lies_about_its_size_is_not_unpacked_beyond_it(tmp_path):
    path = packed(tmp_path / "set.zip", {"video1/frame0.jpg": bytes(20 << 20)})
    whole = path.read_bytes()
    true, said = (20 << 20).to_bytes(4, "little"), (9 << 10).to_bytes(4, "little")
    assert whole.count(true) == 2
    path.write_bytes(whole.replace(true, said))
    clips = open_clips(path)
    tracemalloc.start()
    with pytest.raises(VideoError, match="video1/frame0.jpg cannot be read: Bad CRC-32"):
        clips.read(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_damage_is_named(tmp_path):
    path = packed(tmp_path / "set.zip", members(), zipfile.ZIP_STORED)
    whole = bytearray(path.read_bytes())
    at = whole.index(images(2)[3]) + 100
    whole[at] ^= 1
    path.write_bytes(whole)
    clips = open_clips(path)
    with pytest.raises(VideoError, match="set.zip: video2/frame3.jpg cannot be read: Bad CRC-32"):
        clips.read(0)
    assert len(clips.read(0, 4)) == 8
    path.write_bytes(whole[:-40])
    with pytest.raises(DataError, match="set.zip: cannot be read as a zip"):
        open_clips(path)


@pytest.mark.parametrize("data, reason", [(b"hello", "text.jpg"), (images(1)[0][:300], "text.jpg"), (b"", "text.jpg")])
def test_images_that_are_none(tmp_path, data, reason):
    clips = open_clips(packed(tmp_path / "set.zip", {"a/text.jpg": data}))
    with pytest.raises(VideoError, match=reason) as caught:
        clips.read(0)
    assert "\n" not in str(caught.value)


def test_frames_of_unequal_size_need_a_size(tmp_path):
    large = io.BytesIO()
    Image.new("RGB", (20, 20)).save(large, "PNG")
    files = {"video0/frame0.png": images(1, 1, "PNG")[0], "video0/frame1.png": large.getvalue()}
    clips = open_clips(packed(tmp_path / "set.zip", files))
    with pytest.raises(VideoError, match="differ in size"):
        clips.read(0)
    assert clips.read(0, size=(8, 8)).shape == (2, 8, 8, 3)
