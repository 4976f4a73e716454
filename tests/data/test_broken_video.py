"""Broken, hostile and mistaken files: all frames, or one VideoError of one line, and never anything else."""

import json
import os
import subprocess
import sys
import time
from collections import Counter

import av
import broken_videos
import pytest
import torch
from broken_videos import CONTAINERS, confined, damaged, verdict, whole_file
from crafted_videos import CRAFTED

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


@pytest.mark.parametrize("name", [name for name, (_, want) in CRAFTED.items() if isinstance(want, str)])
def test_what_is_no_video_is_one_line_wherever_it_is_opened(tmp_path, name):
    CRAFTED[name][0](tmp_path / name)
    for read in (probe_video, count_frames):
        try:
            read(tmp_path / name)
        except VideoError as error:
            assert name in str(error) and "\n" not in str(error)


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
    for name in ("text.mp4", "sound.mp4", "no_moov.mp4"):
        CRAFTED[name][0](tmp_path / name)
    before = len(os.listdir("/proc/self/fd"))
    for name in ["text.mp4", "sound.mp4", "no_moov.mp4", "a.mp4"] * 5:
        with pytest.raises(VideoError):
            read_video(tmp_path / name, frames=7)
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_file_is_read_right_or_refused(tmp_path, name):
    make, want = CRAFTED[name]
    make(tmp_path / name)
    kind, words = verdict(tmp_path / name, None)
    if want is None:
        assert (kind, words) == ("read", "[6, 32, 48, 3]") or kind == "error", words
    elif isinstance(want, str):
        assert kind == "error" and want in words
    else:
        assert (kind, words) == ("read", str(list(want)))


def test_an_unreadable_file_says_so(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", moving(2))

    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_decode.av, "open", refused)  # the administrator may read everything
    with pytest.raises(VideoError, match="a.mp4: cannot be read as video: Permission denied"):
        read_video(tmp_path / "a.mp4")


@pytest.fixture(scope="module", params=CONTAINERS)
def whole(request, tmp_path_factory):
    """An undamaged file and its frames."""
    path = whole_file(tmp_path_factory.mktemp("whole"), request.param)
    video = read_video(path)[0]
    assert video.shape == (24, 48, 64, 3)
    return path, video


# GIF and H.264 carry no checksum: other pixels can still come out, but never another number of frames or size
def test_damage_gives_all_frames_or_one_error(whole, tmp_path):
    path, video = whole
    told = Counter()
    for number in range(8 * CONTAINERS.index(path.name), 8 * CONTAINERS.index(path.name) + 8):
        what, data = damaged(path.read_bytes(), number)
        (tmp_path / path.name).write_bytes(data)
        kind, words = verdict(tmp_path / path.name, video)
        assert kind in ("right", "error", "other pixels"), (number, what, kind, words)
        told[kind] += 1
    assert told["error"] >= 2 and (told["other pixels"] == 0 or path.name in ("a.gif", "a.mp4")), told


def test_whole_files_of_all_kinds_pass_the_checks(whole):
    assert verdict(*whole) == ("right", "")


def test_the_child_that_judges_sees_crashes_and_hangs(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").touch()
    assert confined(str(tmp_path / "a.mp4"), None)["verdict"] == "error"
    monkeypatch.setattr(broken_videos, "read_video", lambda path: os.kill(os.getpid(), 9))
    assert confined("a.mp4", None)["verdict"] == "crash"
    monkeypatch.setattr(broken_videos, "SECONDS", 1)
    monkeypatch.setattr(broken_videos, "read_video", lambda path: time.sleep(30))
    assert confined("a.mp4", None)["verdict"] == "hang"


@pytest.mark.long
def test_200_damaged_and_all_crafted_videos_in_children_with_limits(tmp_path, capsys):
    """Prints what became of them; the most memory and time that one took are beyond what the imports took."""
    jobs = [(name, tmp_path / name, None) for name in CRAFTED]
    for name, (make, _) in CRAFTED.items():
        make(tmp_path / name)
    for name in CONTAINERS:
        path = whole_file(tmp_path, f"{name}")
        torch.save(read_video(path)[0], tmp_path / f"{name}.pt")
        for number in range(40):
            what, data = damaged(path.read_bytes(), number)
            target = tmp_path / f"{number}_{name}"
            target.write_bytes(data)
            jobs.append((name, target, tmp_path / f"{name}.pt"))
    lines = "".join(json.dumps([str(path), frames and str(frames)]) + "\n" for _, path, frames in jobs)
    judge = [sys.executable, broken_videos.__file__]
    done = subprocess.run(judge, input=lines, capture_output=True, text=True, env=os.environ, check=True)
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    counts = {name: Counter() for name in [*CONTAINERS, "crafted"]}
    for (name, _, frames), told in zip(jobs, verdicts, strict=True):
        counts[name if frames else "crafted"][told["verdict"]] += 1
    with capsys.disabled():
        for name, told in counts.items():
            print(f"\n{name}: {dict(told)}", end="")
        print(f"\nat most {max(t.get('mb', 0) for t in verdicts):.0f} MB and {max(t['s'] for t in verdicts):.2f} s")
    assert {kind for told in counts.values() for kind in told} <= {"right", "read", "error", "other pixels"}
