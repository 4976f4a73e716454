"""Video files: what is written comes back, what is odd is understood, what is broken is one VideoError."""

import os
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from fastvid.data import _encode
from fastvid.data import video as module
from fastvid.data.video import (
    FrameHash,
    VideoWriter,
    count_frames,
    fit_frames,
    frame_hash,
    probe_video,
    read_image,
    read_video,
    write_video,
)
from fastvid.errors import VideoError


def moving(frames=10, height=48, width=64) -> torch.Tensor:
    """A smooth pattern that moves: what a lossy codec must keep."""
    t, y, x, c = torch.meshgrid(*(torch.arange(n) for n in (frames, height, width, 3)), indexing="ij")
    wave = torch.sin(x / 9 + t / 5 + c) * torch.cos(y / 7 - t / 4)
    return ((wave + 1) * 127).round().to(torch.uint8)


def noise(*shape) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def psnr(a, b) -> float:
    return float(10 * torch.log10(255**2 / ((a.double() - b.double()) ** 2).mean()))


def encode(path, images, codec="libx264rgb", pixels="rgb24", source="rgb24", times=None, prepare=None, options=None):
    """Write a file with PyAV alone; times in units of 1/25 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {"qp": "0"})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, 25)
        if prepare:
            prepare(stream)
        for time, image in zip(times or range(len(images)), images, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=source)
            frame.pts, frame.time_base = time, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("height, width", [(64, 64), (63, 65), (1, 1), (17, 130)])
def test_lossless_comes_back_bit_for_bit(tmp_path, height, width):
    video = noise(9, height, width, 3)
    write_video(tmp_path / "a.mp4", video, fps=12.5, lossless=True)
    back, fps = read_video(tmp_path / "a.mp4")
    assert torch.equal(back, video) and back.dtype == torch.uint8
    assert fps == 12.5


@pytest.mark.parametrize("height, width", [(48, 64), (63, 65), (62, 65), (1, 1)])
@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".MP4"])
def test_lossy_stays_close(tmp_path, suffix, height, width):
    video = moving(10, height, width)
    write_video(tmp_path / f"a{suffix}", video)
    back, fps = read_video(tmp_path / f"a{suffix}")
    assert back.shape == video.shape
    assert psnr(back, video) > 30
    assert fps == pytest.approx(25, rel=1e-6)


def test_a_still_clip_keeps_every_frame(tmp_path):
    video = moving(1).expand(12, -1, -1, -1)
    for name in ("a.mp4", "a.webm", "a.gif"):
        write_video(tmp_path / name, video)
        assert len(read_video(tmp_path / name)[0]) == 12


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "lossless.mp4"])
def test_equal_frames_give_equal_bytes(tmp_path, name):
    files = []
    for folder, video in (("one", moving()), ("two", moving().transpose(1, 2).contiguous().transpose(1, 2))):
        (tmp_path / folder).mkdir()
        write_video(tmp_path / folder / name, video, lossless="lossless" in name)
        files.append((tmp_path / folder / name).read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("fps", [1, 12.5, 24000 / 1001, 30, 60])
def test_the_rate_is_kept(tmp_path, fps):
    write_video(tmp_path / "a.mp4", moving(5), fps=fps)
    assert read_video(tmp_path / "a.mp4")[1] == pytest.approx(fps, rel=1e-5)


@pytest.mark.parametrize(
    "name, video, options, words",
    [
        ("a.avi", moving(2), {}, [".mp4, .webm, .gif", "'.avi'"]),
        ("a", moving(2), {}, [".mp4, .webm, .gif"]),
        ("a.webm", moving(2), {"lossless": True}, [".mp4 only"]),
        ("a.mp4", moving(2).float(), {}, ["torch.uint8", "torch.float32"]),
        ("a.mp4", moving(2)[..., :2], {}, ["[2, 48, 64, 2]"]),
        ("a.mp4", moving(2)[:0], {}, ["at least one frame"]),
        ("a.mp4", moving(2).numpy(), {}, ["ndarray"]),
        ("a.mp4", moving(2), {"fps": 0}, ["fps", "0"]),
        ("a.mp4", moving(2), {"fps": float("nan")}, ["fps", "nan"]),
        ("a.gif", moving(2), {"fps": 60}, ["50"]),
        ("no/a.mp4", moving(2), {}, ["does not exist"]),
        ("folder.mp4", moving(2), {}, ["is a folder"]),
    ],
)
def test_what_cannot_be_written_is_said(tmp_path, name, video, options, words):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(VideoError) as caught:
        write_video(tmp_path / name, video, **options)
    assert all(word in str(caught.value) for word in [*words, name]) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["folder.mp4"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure):
    write_video(tmp_path / "a.mp4", moving(3))
    before = (tmp_path / "a.mp4").read_bytes()

    def fail(encoder, video):
        add(encoder, video[:1])
        raise failure

    add = _encode.Encoder.add
    monkeypatch.setattr(_encode.Encoder, "add", fail)
    with pytest.raises(VideoError if isinstance(failure, OSError) else KeyboardInterrupt, match="space|^$"):
        write_video(tmp_path / "a.mp4", moving(5))
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == before


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif"])
def test_piece_by_piece_gives_the_same_bytes(tmp_path, name):
    video = noise(9, 16, 18, 3)
    write_video(tmp_path / name, video)
    (tmp_path / "pieces").mkdir()
    with VideoWriter(tmp_path / "pieces" / name, (16, 18)) as writer:
        for piece in video.split(4):
            writer.add(piece)
        assert not (tmp_path / "pieces" / name).exists()  # not before it is whole
    assert os.listdir(tmp_path / "pieces") == [name]
    assert (tmp_path / "pieces" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_hash_of_pieces_is_that_of_the_whole():
    video = noise(9, 16, 18, 3)
    digest = FrameHash((9, 16, 18, 3))
    for piece in video.split(4):
        with pytest.raises(ValueError, match="promised"):
            digest.hexdigest()
        digest.add(piece)
    assert digest.hexdigest() == frame_hash(video) != frame_hash(video[:8])


def test_a_writer_that_is_left_early_leaves_nothing(tmp_path):
    for reason in (KeyboardInterrupt, VideoError):
        with pytest.raises(reason), VideoWriter(tmp_path / "a.mp4", (16, 18)) as writer:
            writer.add(noise(3, 16, 18, 3))
            if reason is KeyboardInterrupt:
                raise reason
            writer.add(noise(3, 18, 16, 3))
    with pytest.raises(VideoError, match="at least one frame"), VideoWriter(tmp_path / "a.mp4", (16, 18)):
        pass
    assert os.listdir(tmp_path) == []


def test_a_part_of_a_file_is_that_part(tmp_path):
    video = noise(12, 16, 16, 3)
    write_video(tmp_path / "a.mp4", video, lossless=True)
    assert torch.equal(read_video(tmp_path / "a.mp4", start=3, frames=4)[0], video[3:7])
    assert torch.equal(read_video(tmp_path / "a.mp4", start=11)[0], video[11:])
    for size in ((8, 8), (5, 9), (32, 20)):
        assert torch.equal(read_video(tmp_path / "a.mp4", 2, 3, size)[0], fit_frames(video, *size)[0][2:5])


@pytest.mark.parametrize(
    "start, frames, words",
    [(0, 13, "wanted 13 frames from frame 0 on, but the file has 12"), (10, 3, "has 12"), (12, None, "has 12"),
     (-1, 2, "-1"), (0, 0, "at least 1")],
)  # fmt: skip
def test_too_few_frames_are_never_a_short_clip(tmp_path, start, frames, words):
    write_video(tmp_path / "a.mp4", moving(12))
    with pytest.raises(VideoError, match=words):
        read_video(tmp_path / "a.mp4", start, frames)


def test_probe_says_what_reading_gives(tmp_path):
    write_video(tmp_path / "a.mp4", moving(7, 30, 50), fps=10)
    info = probe_video(tmp_path / "a.mp4")
    assert (info.frames, info.height, info.width, info.fps) == (7, 30, 50, 10)
    write_video(tmp_path / "a.gif", moving(7, 30, 50), fps=10)
    info = probe_video(tmp_path / "a.gif")
    assert (info.frames, info.height, info.width) == (None, 30, 50)
    assert count_frames(tmp_path / "a.gif") == 7


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_variable_rate_keeps_each_frame_once_in_order(tmp_path, name):
    video = moving(8).flip(0)
    times = [0, 1, 2, 3, 10, 30, 31, 49]
    # B-frames: stored in another order than shown
    encode(tmp_path / name, video.numpy(), "libx264", "yuv444p", times=times, options={"crf": "8", "bf": "3"})
    with av.open(str(tmp_path / name)) as container:
        stored = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert stored != sorted(stored)
    back, fps = read_video(tmp_path / name)
    assert [max(range(8), key=lambda i: psnr(video[i], image)) for image in back] == list(range(8))
    if name == "a.mp4":  # Matroska stores no average
        assert fps < 10


def test_the_edit_list_is_respected(tmp_path):
    # a start before zero makes FFmpeg write an edit list that hides the first frames
    video = moving(10)
    encode(tmp_path / "a.mp4", video.numpy(), times=range(-3, 7), options={"qp": "0", "bf": "0", "g": "1"})
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].frames == 10
    back = read_video(tmp_path / "a.mp4")[0]
    assert torch.equal(back, video[10 - len(back) :])
    assert probe_video(tmp_path / "a.mp4").frames == len(back)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirror", [False, True])
def test_rotation_and_mirror_metadata_are_applied(tmp_path, degrees, mirror):
    video = moving(3, 32, 48)
    name = tmp_path / "a.mp4"
    encode(name, video.numpy(), prepare=lambda stream: stream.set_display_rotation(degrees, hflip=mirror))
    upright = torch.rot90(video, degrees // 90, dims=(1, 2))  # counter-clockwise
    upright = upright.flip(2) if mirror else upright
    back = read_video(name)[0]
    assert torch.equal(back, upright)
    info = probe_video(name)
    assert (info.height, info.width) == tuple(upright.shape[1:3])


def test_a_phone_held_upright(tmp_path):
    # the matrix that phones write for portrait: turn clockwise to show
    matrix = [0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30]
    video = moving(2, 32, 48)
    encode(tmp_path / "a.mp4", video.numpy(), prepare=lambda stream: stream.set_display_matrix(matrix))
    assert torch.equal(read_video(tmp_path / "a.mp4")[0], torch.rot90(video, -1, dims=(1, 2)))


@pytest.mark.parametrize(
    "name, codec, pixels, source, close",
    [
        ("grey.mkv", "ffv1", "gray", "rgb24", False),
        ("ten_bit.mkv", "libx265", "yuv420p10le", "rgb24", True),
        ("ten_bit_rgb.mkv", "ffv1", "gbrp10le", "rgb24", True),
        ("alpha.mkv", "ffv1", "bgra", "rgba", False),
        ("deep_png.mov", "png", "rgb48be", "rgb24", False),
        ("motion_jpeg.avi", "mjpeg", "yuvj444p", "rgb24", True),
        ("mpeg4.avi", "mpeg4", "yuv420p", "rgb24", True),
        ("mpeg2.mpg", "mpeg2video", "yuv420p", "rgb24", True),
    ],
)
def test_other_pixels_and_containers_come_out_as_rgb(tmp_path, name, codec, pixels, source, close):
    video = moving(6, 64, 64)
    if pixels == "gray":
        video = video[..., :1].expand(-1, -1, -1, 3)
    images = video.numpy()
    if source == "rgba":
        images = np.concatenate([images, noise(6, 64, 64, 1).numpy()], axis=-1)
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {"b": "20000000"}
    encode(tmp_path / name, images, codec, pixels, source, options=options)
    back, fps = read_video(tmp_path / name)
    assert back.shape == video.shape and fps == 25
    assert psnr(back, video) > 30 if close else torch.equal(back, video)


def test_a_still_image(tmp_path):
    image = moving(1, 20, 31)
    for name, codec, pixels in (("a.png", "png", "rgb24"), ("a.jpg", "mjpeg", "yuvj444p"), ("a.bmp", "bmp", "bgr24")):
        encode(tmp_path / name, image.numpy(), codec, pixels, options={"qmin": "1", "qmax": "2", "update": "1"})
        assert psnr(read_image(tmp_path / name), image[0]) > 35
    with pytest.raises(VideoError, match="no such file"):
        read_image(tmp_path / "b.png")


@pytest.mark.parametrize("name", ["12:30.mp4", "été ✓.mp4", "-v.mp4", "a%03d.mp4", "a b'c\".mp4"])
def test_any_file_name_works(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(name, moving(4))
    assert len(read_video(name)[0]) == 4
    assert os.listdir(tmp_path) == [name]


def test_a_video_over_the_limit_says_how_much_to_ask_for(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", moving(12, 16, 16))
    write_video(tmp_path / "a.gif", moving(12, 16, 16))
    monkeypatch.setattr(module, "READ_BYTES", 5 * 16 * 16 * 3)
    for name in ("a.mp4", "a.gif"):
        with pytest.raises(VideoError, match="pass frames= .at most 5."):
            read_video(tmp_path / name)
        assert len(read_video(tmp_path / name, frames=5)[0]) == 5
        assert len(read_video(tmp_path / name, size=(8, 8))[0]) == 12


@pytest.mark.parametrize(
    "source, target, note",
    [
        ((720, 1280), (64, 64), "cropped 1280x720 to 720x720 (centre) and resized to 64x64"),
        ((64, 64), (64, 64), None),
        ((128, 128), (64, 64), "resized to 64x64"),
        ((64, 80), (64, 64), "cropped 80x64 to 64x64 (centre)"),
        ((40, 30), (64, 64), "cropped 30x40 to 30x30 (centre) and resized to 64x64"),
        ((1080, 1920), (9, 16), "resized to 16x9"),
        ((3, 500), (500, 3), "cropped 500x3 to 1x3 (centre) and resized to 3x500"),
    ],
)
def test_fitting_says_what_it_did(source, target, note):
    video, said = fit_frames(noise(2, *source, 3), *target)
    assert video.shape == (2, *target, 3) and video.is_contiguous()
    assert said == note


def test_fitting_takes_the_centre_and_the_mean_of_blocks():
    video = noise(3, 8, 12, 3)
    blocks = video[:, :, 2:10].double().reshape(3, 4, 2, 4, 2, 3).mean(dim=(2, 4))
    assert torch.equal(fit_frames(video, 4, 4)[0], (blocks + 0.5).floor().to(torch.uint8))


@pytest.mark.parametrize("size", [(7, 7), (10, 20), (16, 16), (33, 50), (64, 64), (1, 1)])
def test_fitting_keeps_flat_colours_and_hides_fine_patterns(size):
    flat = torch.tensor([3, 200, 255], dtype=torch.uint8).expand(2, 32, 32, 3)
    assert torch.equal(fit_frames(flat, *size)[0], flat[:1, :1, :1].expand(2, *size, 3))
    if size[0] <= 16:
        checkers = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 255
        grey = fit_frames(checkers.to(torch.uint8)[None, :, :, None].expand(1, 32, 32, 3), *size)[0]
        assert (grey.int() - 127).abs().max() < 40  # dropping pixels would leave 0 and 255


def test_fitting_refuses_what_is_no_video():
    with pytest.raises(VideoError, match="float32"):
        fit_frames(torch.zeros(1, 4, 4, 3), 2, 2)
    with pytest.raises(VideoError, match="0x2"):
        fit_frames(noise(1, 4, 4, 3), 2, 0)


def test_the_hash_sees_shape_and_pixels_only():
    video = noise(2, 4, 6, 3)
    assert frame_hash(video) == frame_hash(video.transpose(1, 2).contiguous().transpose(1, 2))
    assert frame_hash(video) != frame_hash(video.reshape(2, 6, 4, 3))
    other = video.clone()
    other[1, 3, 5, 2] ^= 1
    assert frame_hash(video) != frame_hash(other)
    # sha256sum of "(1, 1, 1, 3)" and three zero bytes
    assert frame_hash(torch.zeros(1, 1, 1, 3, dtype=torch.uint8)).startswith("59716cc20a59")
