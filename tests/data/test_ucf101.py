"""UCF-101: frames are counted as they are shown, lists are followed, and no scene is on both sides of a split."""

import io
import re
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from fastvid.data import open_clips
from fastvid.data.formats._films import shown_frames
from fastvid.data.video import count_frames, read_video, write_video
from fastvid.errors import DataError, VideoError

VOP = b"\0\0\1\xb6"  # starts every picture of MPEG-4
# a picture that is not coded, of a stream whose clock ticks 25 times a second: type P, no whole second, marker, five
# bits of time, marker, vop_coded = 0, stuffing
NOTHING = VOP + bytes([0b01_0_1_0000, 0b0_1_0_01111])


def moving(frames: int) -> np.ndarray:
    """Noise that slides by a column a frame, uint8 [T, 48, 64, 3]."""
    picture = np.random.default_rng(frames).integers(0, 256, (48, 64, 3), np.uint8)
    return np.stack([np.roll(picture, t, 1) for t in range(frames)])


def packets(frames: int, between: int = 0, codec="mpeg4", container="avi") -> list[bytes]:
    """Compressed pictures in the order of storage, `between` of them B-pictures after each other."""
    with av.open(io.BytesIO(), "w", format=container) as film:
        stream = film.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.max_b_frames = between
        coded = []
        for t, picture in enumerate(moving(frames)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = t
            coded += stream.encode(frame)
        return [bytes(packet) for packet in [*coded, *stream.encode()] if packet.size]


def packed(pictures: list[bytes]) -> list[bytes]:
    """As DivX and XviD store a B-picture: behind the P-picture it depends on, with an empty packet in its own place."""
    start = pictures[0].index(VOP)
    header = re.sub(rb"Lavc[\d.]+", lambda _: b"DivX503b1393p\0", pictures[0][:start])
    assert header != pictures[0][:start] and len(pictures) % 2
    stored = [header + pictures[0][start:]]
    for forward, backward in zip(pictures[1::2], pictures[2::2], strict=True):
        stored += [forward + backward, NOTHING]
    return stored


def write_film(path, stored: list[bytes], codec="mpeg4"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as film:
        stream = film.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for t, data in enumerate(stored):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, t, t, Fraction(1, 25)
            packet.is_keyframe = t == 0
            film.mux(packet)
    return path


def hidden(pictures: list[bytes]) -> list[bytes]:
    """VP8 pictures of which the second is not to be shown."""
    return [bytes([data[0] & ~16, *data[1:]]) if i == 1 else data for i, data in enumerate(pictures)]


@pytest.mark.parametrize(
    "stored, suffix, codec, frames",
    [
        (lambda: packets(9), "avi", "mpeg4", 9),
        (lambda: packets(9, between=2), "avi", "mpeg4", 9),
        (lambda: packed(packets(9, between=1)), "avi", "mpeg4", 9),
        (lambda: packed(packets(9, between=1)) + [NOTHING, NOTHING], "avi", "mpeg4", 9),
        (lambda: [*packets(9)[:4], NOTHING, *packets(9)[4:]], "avi", "mpeg4", 9),
        (lambda: packets(9, codec="libvpx", container="webm"), "webm", "libvpx", 9),
        (lambda: hidden(packets(9, codec="libvpx", container="webm")), "webm", "libvpx", 8),
        (lambda: packets(9, codec="mjpeg"), "avi", "mjpeg", 9),
        (lambda: packets(9, codec="mpeg2video", container="mpeg"), "mpg", "mpeg2video", 9),
    ],
    ids=["plain", "B", "packed", "packed, empty end", "dropped", "vp8", "vp8 hidden", "mjpeg", "mpeg"],
)
def test_frames_are_counted_as_they_decode(tmp_path, stored, suffix, codec, frames):
    path = write_film(tmp_path / f"film.{suffix}", stored(), codec)
    assert shown_frames(path) == count_frames(path) == frames


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif"])
def test_frames_of_other_containers(tmp_path, suffix):
    write_video(tmp_path / f"film.{suffix}", torch.from_numpy(moving(7)))
    assert shown_frames(tmp_path / f"film.{suffix}") == 7


def test_frames_of_h264_in_matroska(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as film:
        stream = film.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.max_b_frames = 64, 48, "yuv420p", 2
        for picture in moving(9):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        film.mux(stream.encode())
    assert shown_frames(tmp_path / "a.mkv") == count_frames(tmp_path / "a.mkv") == 9


def test_a_file_without_a_picture_has_no_frames(tmp_path):
    (tmp_path / "a.avi").write_bytes(b"RIFF" + bytes(100))
    with pytest.raises(VideoError, match=r"a\.avi"):
        shown_frames(tmp_path / "a.avi")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Bytes of avi files by their number of frames, 3 to 8."""
    folder = tmp_path_factory.mktemp("films")
    return {n: write_film(folder / f"{n}.avi", packets(n)).read_bytes() for n in range(3, 9)}


CLIPS = {
    "Archery/v_Archery_g01_c01.avi": 3,
    "Archery/v_Archery_g08_c01.avi": 4,
    "Archery/v_Archery_g08_c02.avi": 5,
    "HandstandPushups/v_HandStandPushups_g01_c01.avi": 6,
    "HandstandPushups/v_HandStandPushups_g09_c01.avi": 7,
}
LISTS = {
    "trainlist01.txt": ["Archery/v_Archery_g08_c01.avi 1", "Archery/v_Archery_g08_c02.avi 1",
                        "HandstandPushups/v_HandstandPushups_g09_c01.avi 2"],
    "testlist01.txt": ["Archery/v_Archery_g01_c01.avi", "HandstandPushups/v_HandStandPushups_g01_c01.avi"],
    "trainlist02.txt": ["Archery/v_Archery_g01_c01.avi 1"],
    "testlist02.txt": ["Archery/v_Archery_g08_c01.avi", "Archery/v_Archery_g25_c07.avi"],
}  # fmt: skip


@pytest.fixture
def root(tmp_path, films):
    for name, frames in CLIPS.items():
        path = tmp_path / "ucf" / "UCF-101" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(films[frames])
    lists = tmp_path / "ucf" / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\r\n2 HandstandPushups\r\n")
    for name, lines in LISTS.items():
        (lists / name).write_bytes("\r\n".join([*lines, ""]).encode())
    return tmp_path / "ucf"


def test_the_official_lists_divide_the_clips(root):
    train, test = open_clips(root), open_clips(root, "test")
    assert train.lengths == [4, 5, 7] and test.lengths == [3, 6]
    assert train.labels == ["Archery", "Archery", "HandstandPushups"]
    assert train.names[2] == "UCF-101/HandstandPushups/v_HandStandPushups_g09_c01.avi"
    assert train.skipped == test.skipped == []
    expected = read_video(root / test.names[1])[0]
    assert torch.equal(test.read(1), expected) and torch.equal(test.read(1, 2, 3), expected[2:5])
    assert "UCF-101" in train.describe() and "split train of list 1" in train.describe()


def test_another_list_can_be_asked_for(root):
    train, test = open_clips(f"{root}?list=2"), open_clips(f"{root}?list=2", "test")
    assert (train.lengths, test.lengths) == ([3], [4])
    assert test.skipped == [("Archery/v_Archery_g25_c07.avi", "no such file, testlist02.txt names it")]
    assert "3 clips are in none of the splits" in train.describe()
    assert sorted(open_clips(f"{root}?split=all").lengths) == [3, 4, 5, 6, 7]
    for spec, told in (("list=4", "must be 1, 2 or 3"), ("list=3", "no ucfTrainTestlist/trainlist03"),
                       ("split=val", "no split 'val'"), ("fold=1", "no option 'fold'.*list")):  # fmt: skip
        with pytest.raises(DataError, match=told):
            open_clips(f"{root}?{spec}")


def test_lists_may_lie_beside_the_clips(root):
    assert open_clips(root / "UCF-101", "test").lengths == [3, 6]


def test_without_lists_every_clip_is_one_split(root):
    (root / "ucfTrainTestlist").rename(root / "elsewhere")
    clips = open_clips(root, "test")
    assert len(clips) == 5 and "no lists of splits" in clips.describe() and "count as test" in clips.describe()
    assert clips.labels.count("HandstandPushups") == 2


def test_folders_may_divide_the_clips(tmp_path, films):
    for name, frames in CLIPS.items():
        path = tmp_path / ("test" if "_g01_" in name else "train") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(films[frames])
    assert (open_clips(tmp_path).lengths, open_clips(tmp_path, "test").lengths) == ([4, 5, 7], [3, 6])
    (tmp_path / "test" / "Archery" / "v_Archery_g08_c03.avi").write_bytes(films[8])
    with pytest.raises(DataError, match=r"group g08 of archery.*v_Archery_g08_c01.avi \(train/\).*_c03.avi \(test/\)"):
        open_clips(tmp_path)


def test_a_group_on_both_sides_is_refused(root):
    with (root / "ucfTrainTestlist" / "testlist01.txt").open("a") as file:
        file.write("Archery/v_Archery_g08_c02.avi\n")
    with pytest.raises(DataError, match="g08_c01.avi .trainlist01.*g08_c02.avi .testlist01.*split=all.*format=folder"):
        open_clips(root)
    assert len(open_clips(f"{root}?split=all")) == len(open_clips(f"{root}?format=folder")) == 5


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm"])
def test_clips_in_another_container_are_those_of_the_lists(root, suffix):
    for path in sorted((root / "UCF-101").rglob("*.avi")):
        path.rename(path.with_suffix(f".{suffix}"))
    (root / "UCF-101" / "Archery" / "trailer.avi").write_bytes(b"")
    train = open_clips(root)
    assert (train.lengths, open_clips(root, "test").lengths) == ([4, 5, 7], [3, 6])
    assert train.names[0].endswith(f"v_Archery_g08_c01.{suffix}") and train.skipped == []
    assert "(1 other video left aside; ?format=folder takes all)" in train.describe()


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    "content, told",
    [(b"Archery/../../secret.avi 1\n", "line 1: wanted Class/"), (b"Archery/v_Archery_g08_c01.avi 1 2\n", "line 1"),
     (b"\xff\xfe\x00", "cannot be read"), (None, "missing, its counterpart is there")],
)  # fmt: skip
def test_a_damaged_list_is_one_line(root, split, content, told):
    path = root / "ucfTrainTestlist" / f"{split}list01.txt"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=told) as caught:
        open_clips(root, split)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_clips_are_named(root):
    (root / "UCF-101/Archery/v_Archery_g08_c01.avi").write_bytes(b"")
    whole = (root / "UCF-101/Archery/v_Archery_g08_c02.avi").read_bytes()
    (root / "UCF-101/Archery/v_Archery_g08_c02.avi").write_bytes(whole[:200])
    clips = open_clips(root)
    assert clips.lengths == [7] and [name[-11:] for name, _ in clips.skipped] == ["g08_c01.avi", "g08_c02.avi"]
    (root / "UCF-101/HandstandPushups/v_HandStandPushups_g09_c01.avi").write_bytes(b"")
    with pytest.raises(DataError, match="no usable clip, 3 unusable"):
        open_clips(root)
