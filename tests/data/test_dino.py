"""The recorder of the dinosaur game: repeatable to the bit, and a game that is really played."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from fastvid.data import dino
from fastvid.data.dino import DinoRecorder
from fastvid.errors import DataError


def has_chromium():
    try:
        return bool(dino._find_chromium())
    except DataError:
        return False


needs_chromium = pytest.mark.skipif(not has_chromium(), reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def clips():
    """Three clips of 48 frames by seed, from one browser."""
    with DinoRecorder() as game:
        return {seed: game.clip(seed, 48) for seed in (3, 4, 2_000_001)}


@needs_chromium
def test_same_bytes_from_another_browser_in_another_order(clips):
    with DinoRecorder() as game:
        for seed in (2_000_001, 3, 4):
            assert torch.equal(game.clip(seed, 48), clips[seed])
        # a shorter clip of a seed is the beginning of the longer one
        assert torch.equal(game.clip(4, 10), clips[4][:10])


@needs_chromium
def test_frames_are_grey_and_seeds_differ(clips):
    for clip in clips.values():
        assert clip.shape == (48, 64, 64, 3) and clip.dtype == torch.uint8
        assert torch.equal(clip[..., 0], clip[..., 1]) and torch.equal(clip[..., 0], clip[..., 2])
        assert clip.float().mean() > 200  # day: mostly white
    assert not torch.equal(clips[3], clips[4])


@needs_chromium
def test_the_dinosaur_jumps_and_obstacles_come_closer(clips):
    dark = torch.cat([clip[..., 0] for clip in clips.values()]) < 128  # [T, H, W]
    heights = [int(frame[:, 5:21].any(1).nonzero()[0]) for frame in dark]  # top row of the dinosaur's columns
    assert max(heights) - min(heights) > 15
    # right of the dinosaur only obstacles are dark: their left edge moves left by about 4 pixels a frame
    moves = []
    for clip in clips.values():
        edges = [f[40:57, 24:].any(0).nonzero().flatten() for f in clip[..., 0] < 128]
        pairs = [(a, b) for a, b in zip(edges, edges[1:], strict=False) if len(a) and len(b) and a[0] > 6]
        moves += [int(a[0] - b[0]) for a, b in pairs]
    assert len(moves) > 20 and sum(3 <= move <= 6 for move in moves) > 0.8 * len(moves)


@needs_chromium
def test_other_frame_sizes():
    with DinoRecorder(size=(32, 48)) as game:
        assert game.clip(5, 2).shape == (2, 32, 48, 3)
        with pytest.raises(DataError, match="at least 1"):
            game.clip(5, 0)
        with pytest.raises(DataError, match="seed"):
            game.clip(-1, 4)


def test_refusals(monkeypatch):
    with pytest.raises(DataError, match="with statement"):
        DinoRecorder().clip(1, 4)
    monkeypatch.setenv("FASTVID_CHROMIUM", "no-such-browser")
    with pytest.raises(DataError, match="no-such-browser"), DinoRecorder():
        pass


@pytest.fixture
def temporary_folder(monkeypatch):
    """What a recorder may leave behind, where nobody else writes; a short path, since it holds the browser's socket."""
    with tempfile.TemporaryDirectory(prefix="dino-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield folder


@needs_chromium
def test_nothing_is_left_behind_when_the_browser_dies(temporary_folder):
    with pytest.raises(DataError, match="ended before it answered"), DinoRecorder() as game:
        assert os.listdir(temporary_folder)
        process = game._browser.process
        process.kill()
        process.wait()
        game.clip(1, 4)
    assert process.returncode is not None and os.listdir(temporary_folder) == []


@needs_chromium
def test_a_browser_that_hangs_is_given_up(temporary_folder, monkeypatch):
    with pytest.raises(DataError, match="did not answer within 1 s"), DinoRecorder() as game:
        monkeypatch.setattr(dino, "CALL_SECONDS", 1.0)
        game._browser.evaluate("for (;;) {}")
    assert os.listdir(temporary_folder) == []


def test_a_file_that_is_no_browser(temporary_folder, monkeypatch):
    binary = Path(temporary_folder) / "chromium"
    binary.write_bytes(b"\x7fELF no program")
    binary.chmod(0o755)
    monkeypatch.setenv("FASTVID_CHROMIUM", str(binary))
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DataError, match="cannot be run"), DinoRecorder():
        pass
    assert os.listdir(temporary_folder) == ["chromium"] and len(os.listdir("/proc/self/fd")) == open_files
