"""Broken, hostile and mistaken files: all frames, or one VideoError of one line, and never anything else."""

import os
import random
import struct
import zlib

import av
import numpy as np
import pytest
import torch

from fastvid.data import _decode
from fastvid.data import video as module
from fastvid.data.video import count_frames, probe_video, read_video, write_video
from fastvid.errors import VideoError


def moving(frames=10, height=48, width=64) -> torch.Tensor:
    """A smooth pattern that moves."""
    t, y, x, c = torch.meshgrid(*(torch.arange(n) for n in (frames, height, width, 3)), indexing="ij")
    return ((torch.sin(x / 9 + t / 5 + c) * torch.cos(y / 7 - t / 4) + 1) * 127).round().to(torch.uint8)


def mpeg4(path, video):
    """A file in a container that write_video does not write."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width = video.shape[1:3]
        for image in video.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def sound(path, codec):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)


def broken_file(folder, kind):
    path = folder / f"{kind}.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("not a video\n" * 50)
    elif kind == "empty":
        path.touch()
    elif kind == "sound":
        sound(path, "aac")
    elif kind == "wave":
        sound(folder / "wave.wav", "pcm_s16le")
        (folder / "wave.wav").rename(path)
    elif kind == "huge":
        header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)  # a PNG: 8-bit RGB
        chunks = [header, b"IDAT" + zlib.compress(bytes(10_000)), b"IEND"]
        packed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    elif kind in ("playlist", "list"):
        write_video(folder / "other.mp4", moving(3))
        playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n"
        path.write_text(playlist if kind == "playlist" else "ffconcat version 1.0\nfile other.mp4\n")
    elif kind == "headless":
        write_video(path, moving(6))
        path.write_bytes(bytes(64) + path.read_bytes()[64:])
    return path


@pytest.mark.parametrize(
    "kind, words",
    [
        ("missing", "no such file"),
        ("folder", "is a folder"),
        ("text", "cannot be read"),
        ("empty", "0 bytes"),
        ("sound", "no video stream"),
        ("wave", "no video stream"),
        ("huge", "huge.mp4"),
        ("playlist", "cannot be read"),
        ("list", "cannot be read"),
        ("headless", "."),
    ],
)
def test_what_is_no_video_is_one_line(tmp_path, kind, words):
    path = broken_file(tmp_path, kind)
    for read in (read_video, probe_video, count_frames):
        with pytest.raises(VideoError) as caught:
            read(path)
        message = str(caught.value)
        assert path.name in message and words in message and "\n" not in message


@pytest.mark.parametrize("share", [0.97, 0.8, 0.5, 0.2])
@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "a.avi", "a.mkv"])
def test_a_file_cut_short_is_an_error(tmp_path, name, share):
    video = torch.randint(0, 256, (40, 32, 32, 3), dtype=torch.uint8)
    if name in ("a.avi", "a.mkv"):
        mpeg4(tmp_path / name, video)
    else:
        write_video(tmp_path / name, video)
    everything = read_video(tmp_path / name)[0]
    assert len(everything) == 40
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    if share == 0.97 and name in ("a.avi", "a.mkv"):  # only the index at the end is lost
        assert torch.equal(read_video(tmp_path / name)[0], everything)
        return
    with pytest.raises(VideoError):
        read_video(tmp_path / name)


# a GIF has neither a count nor a checksum: a hole is seen only where its blocks no longer fit together
@pytest.mark.parametrize(
    "name, share", [("a.mp4", 0.3), ("a.mp4", 0.7), ("a.webm", 0.3), ("a.webm", 0.7), ("a.gif", 0.3)]
)
def test_a_file_with_a_hole_is_never_a_short_clip(tmp_path, name, share):
    write_video(tmp_path / name, moving(40, 32, 32))
    whole = (tmp_path / name).read_bytes()
    hole = int(len(whole) * share)
    (tmp_path / name).write_bytes(whole[:hole] + whole[hole + 40 :])
    try:
        assert len(read_video(tmp_path / name)[0]) == 40
    except VideoError as error:
        assert "\n" not in str(error) and name in str(error)


def test_huge_frames_are_refused_before_decoding(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", moving(2, 32, 40))
    monkeypatch.setattr(_decode, "FRAME_PIXELS", 32 * 40 - 1)
    for place in (_decode, module):
        monkeypatch.setattr(place, "picture", lambda frame: pytest.fail("a frame was decoded"))
    for read in (read_video, probe_video, count_frames):
        with pytest.raises(VideoError, match="frames of 40x32 exceed the limit of 1279 pixels"):
            read(tmp_path / "a.mp4")


def test_failures_leave_no_file_open(tmp_path):
    write_video(tmp_path / "a.mp4", moving(6))
    paths = [broken_file(tmp_path, kind) for kind in ("text", "sound", "headless")] + [tmp_path / "a.mp4"]
    before = len(os.listdir("/proc/self/fd"))
    for path in paths * 5:
        with pytest.raises(VideoError):
            read_video(path, frames=7)
    assert len(os.listdir("/proc/self/fd")) <= before


def mutant(data: bytes, draw: random.Random) -> bytes:
    data = bytearray(data)
    kind, at = draw.randrange(5), draw.randrange(len(data))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    if kind == 2:
        data[at : at + 32] = draw.randbytes(len(data[at : at + 32]))
    if kind == 3:
        del data[at : at + draw.randint(1, 200)]
    if kind == 4:
        data[at:at] = draw.randbytes(draw.randint(1, 50))
    return bytes(data)


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_mutants_give_all_frames_or_one_error(tmp_path, name):
    write_video(tmp_path / name, moving(12, 32, 32))
    whole = (tmp_path / name).read_bytes()
    draw, outcomes = random.Random(7), []
    for _ in range(40):
        (tmp_path / f"mutant_{name}").write_bytes(mutant(whole, draw))
        try:
            back, fps = read_video(tmp_path / f"mutant_{name}")
        except VideoError as error:
            assert "\n" not in str(error) and f"mutant_{name}" in str(error)
            outcomes.append("error")
        else:
            assert back.shape == (12, 32, 32, 3) and fps > 0
            outcomes.append("read")
    assert 5 < outcomes.count("error") < 40
