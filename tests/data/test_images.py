"""Still images: as another decoder sees them, upright, under any name, and one line where they are damaged."""

import io
import os
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from fastvid.data import open_clips
from fastvid.data._images import decode_image
from fastvid.data.video import read_image, read_video
from fastvid.errors import DataError, VideoError

KINDS = {  # how to write them with the least loss, and how far another decoder may be off
    "JPEG": ({"quality": 95, "subsampling": 0}, 3), "progressive": ({"quality": 95, "subsampling": 0}, 3),
    "PNG": ({}, 0), "WEBP": ({"lossless": True}, 0), "BMP": ({}, 0),
}  # fmt: skip
ImageFile.MAXBLOCK = 1 << 22  # noise does not shrink, and Pillow writes progressive files in one piece
SUFFIXES = {"JPEG": "jpg", "progressive": "jpeg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}


def noise(height, width, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def stored(image: np.ndarray, kind: str, orientation: int | None = None, **extra) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[0x010E], exif[0x0112] = "a description", orientation
        extra["exif"] = exif
    progressive = kind == "progressive"
    name = "JPEG" if progressive else kind
    Image.fromarray(image).save(file, name, **KINDS[kind][0], **({"progressive": True} if progressive else {}), **extra)
    return file.getvalue()


def seen(data: bytes) -> torch.Tensor:
    """What Pillow makes of a file."""
    return torch.from_numpy(np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")))


def off(a: torch.Tensor, b: torch.Tensor) -> int:
    assert a.shape == b.shape and a.dtype == torch.uint8
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_image_on_disk(tmp_path, kind):
    data = stored(noise(360, 640), kind)
    path = tmp_path / f"frame00000001.{SUFFIXES[kind]}"
    path.write_bytes(data)
    assert off(read_image(path), seen(data)) <= KINDS[kind][1]
    assert read_image(path).is_contiguous()


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_images_come_upright(kind, orientation):
    data = stored(noise(24, 40), kind, orientation)
    assert off(decode_image(data, "a"), seen(data)) <= KINDS[kind][1]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_film_of_turned_photographs_comes_upright(tmp_path, orientation):
    files = [stored(noise(48, 64, t), "JPEG", orientation) for t in range(3)]
    with av.open(str(tmp_path / "a.avi"), "w") as film:
        stream = film.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj444p"
        for t, data in enumerate(files):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, t, t, Fraction(1, 25)
            film.mux(packet)
    video, _ = read_video(tmp_path / "a.avi")
    assert off(video, torch.stack([seen(data) for data in files])) <= 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, on writing it
@pytest.mark.parametrize("order", ["little", "big"])
def test_orientation_in_either_byte_order(order):
    head = {"little": b"II*\0", "big": b"MM\0*"}[order]
    fields = [(8, 4), (1, 2), (0x0112, 2), (3, 2), (1, 4), (6, 2), (0, 2)]
    tiff = head + b"".join(value.to_bytes(size, order) for value, size in fields)
    data = stored(noise(24, 40), "JPEG", exif=b"Exif\0\0" + tiff)
    assert off(decode_image(data, "a"), seen(data)) <= 3 and decode_image(data, "a").shape == (40, 24, 3)
    for cut in range(len(tiff)):
        part = stored(noise(24, 40), "JPEG", exif=b"Exif\0\0" + tiff[:cut])
        # the value is whole, or lacks a high byte that is 0
        assert decode_image(part, "a").shape == ((40, 24, 3) if cut >= 20 - (order == "little") else (24, 40, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_one_line(kind):
    thumbnail = stored(noise(8, 8), "JPEG")  # has an end of its own
    options = {"exif": b"Exif\0\0" + b"II*\0" + bytes(4) + thumbnail} if kind in ("JPEG", "progressive") else {}
    data = stored(noise(48, 64), kind, **options)
    for cut in (1, 2, 3, 4, 12, 30, len(data) // 2, len(data) - 200, len(data) - 1):
        with pytest.raises(VideoError, match="^a: ") as caught:
            decode_image(data[:cut], "a")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"hello, no image", b"GIF89a" + bytes(50), b"#EXTM3U\n/etc/passwd\n"])
def test_other_files_are_no_images(data):
    with pytest.raises(VideoError, match="is no JPEG, PNG, BMP or WebP"):
        decode_image(data, "a.png")


def test_files_that_are_not_read(tmp_path, monkeypatch):
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "large.png").write_bytes(stored(noise(9, 9), "PNG"))
    monkeypatch.setattr("fastvid.data._images.FILE_BYTES", 100)
    told = {"empty": "0 bytes", "pipe": "regular file", "large": "too many for", "none": "no such", "": "folder"}
    for name, reason in told.items():
        with pytest.raises(VideoError, match=reason):
            read_image(tmp_path / f"{name}.png" if name else tmp_path)


@pytest.mark.parametrize("name", ["a{b", "a*?", "50%03d", "a[1]", "12:30", "été ✓"])
def test_a_plain_folder_of_photographs_of_any_name(tmp_path, name):
    files = [stored(noise(36, 64, t), "JPEG", 6 if t else None) for t in range(3)]
    (tmp_path / name).mkdir()
    for t, data in enumerate(files):
        (tmp_path / name / f"{name}{t}.jpg").write_bytes(data)
    clips = open_clips(tmp_path)
    assert (clips.names, clips.lengths) == ([name], [3])
    assert off(clips.read(0, 1, 2), torch.stack([seen(data) for data in files[1:]])) <= 3
    with pytest.raises(VideoError, match="differ in size"):
        clips.read(0)
    assert clips.read(0, size=(8, 8)).shape == (3, 8, 8, 3)


def test_many_large_images_are_refused_before_they_fill_the_memory(tmp_path, monkeypatch):
    for t in range(10):
        (tmp_path / f"{t}.png").write_bytes(stored(noise(16, 16, t), "PNG"))
    monkeypatch.setattr("fastvid.data.video.READ_BYTES", 4 * 16 * 16 * 3)
    clips = open_clips(tmp_path)
    decoded = []

    def counted(path):
        decoded.append(path)
        return read_image(path)

    monkeypatch.setattr("fastvid.data.formats._stills.image_file", counted)
    with pytest.raises(VideoError, match="10 frames of 16x16 exceed the limit"):
        clips.read(0)
    assert len(decoded) == 1
    assert clips.read(0, 3, 4).shape == (4, 16, 16, 3) and clips.read(0, size=(8, 8)).shape == (10, 8, 8, 3)


def test_a_broken_image_spoils_its_own_clip_alone(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(stored(noise(8, 8), "PNG") if name == "a" else b"hello")
    clips = open_clips(tmp_path)
    assert clips.read(0).shape == (1, 8, 8, 3)
    with pytest.raises(VideoError, match="b/0.png"):
        clips.read(1)
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="no clips"):
        open_clips(tmp_path / "c")
