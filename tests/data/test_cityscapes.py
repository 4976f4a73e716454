"""Cityscapes sequences: clips end where frame numbers jump; the centre square is cut on demand."""

import pytest
import torch

from fastvid.data import open_clips
from fastvid.data.sheet import write_png
from fastvid.data.video import fit_frames
from fastvid.errors import DataError, VideoError


def frame(number: int, height=16, width=32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)


def put(folder, sequence: int, numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        write_png(folder / f"{folder.name}_{sequence:06d}_{number:06d}_leftImg8bit.png", frame(number))


@pytest.fixture
def root(tmp_path):
    top = tmp_path / "city" / "leftImg8bit_sequence"
    put(top / "train" / "aachen", 0, range(0, 4))
    put(top / "train" / "aachen", 1, range(4, 9))  # goes on counting, but is another sequence
    put(top / "train" / "hanover", 0, [*range(145, 150), *range(700, 703), 999])
    put(top / "val" / "ulm", 10, range(0, 6))
    return tmp_path / "city"


def test_clips_end_where_frame_numbers_jump(root):
    clips = open_clips(root)
    assert clips.names == ["aachen_000000_000000", "aachen_000001_000004", "hanover_000000_000145",
                           "hanover_000000_000700", "hanover_000000_000999"]  # fmt: skip
    assert (clips.lengths, clips.labels, clips.skipped) == ([4, 5, 5, 3, 1], None, [])
    assert torch.equal(clips.read(3), torch.stack([frame(n) for n in (700, 701, 702)]))
    assert "Cityscapes" in clips.describe() and "holds leftImg8bit_sequence/" in clips.describe()


def test_val_counts_as_test_where_test_is_not_there(root):
    clips = open_clips(root, "test")
    assert clips.names == ["ulm_000010_000000"] and "split val (as test)" in clips.describe()
    put(root / "leftImg8bit_sequence" / "test" / "berlin", 0, range(3))
    assert open_clips(root, "test").names == ["berlin_000000_000000"]
    assert open_clips(f"{root}?split=val", "test").names == ["ulm_000010_000000"]
    with pytest.raises(DataError, match="no split 'demo' in it; there are: train, val, test"):
        open_clips(f"{root}?split=demo")


@pytest.mark.parametrize("below", ["leftImg8bit_sequence", "leftImg8bit_sequence/train/aachen"])
def test_a_part_of_the_set_can_be_opened(root, below):
    clips = open_clips(root / below)
    assert clips.names[0] == "aachen_000000_000000" and "frames are called as in" in clips.describe()


def test_the_centre_square_is_cut_out(root):
    cut, whole = open_clips(f"{root}?crop=16"), open_clips(root)
    assert torch.equal(cut.read(0), whole.read(0)[:, :, 8:24])
    assert torch.equal(cut.read(0, 1, 2, (8, 8)), whole.read(0, 1, 2, (8, 8)))
    assert torch.equal(cut.read(0, 0, 1, (8, 4)), fit_frames(whole.read(0, 0, 1)[:, :, 8:24], 8, 4)[0])
    assert "crop 16" in cut.describe()
    with pytest.raises(VideoError, match="crop=17 wanted, but the image is 32x16"):
        open_clips(f"{root}?crop=17").read(0)
    for crop in ("0", "-3", "all", "1.5"):
        with pytest.raises(DataError, match="crop must be a whole number"):
            open_clips(f"{root}?crop={crop}")


def test_other_images_are_named_and_damaged_ones_found_when_read(root):
    aachen = root / "leftImg8bit_sequence" / "train" / "aachen"
    write_png(aachen / "thumbnail.png", frame(0))
    (aachen / "aachen_000000_000002_leftImg8bit.png").write_bytes(b"")
    clips = open_clips(root)
    assert clips.skipped == [("leftImg8bit_sequence/train/aachen", "1 images are not called like frames")]
    assert len(clips.read(0, 0, 2)) == 2
    with pytest.raises(VideoError, match="aachen_000000_000002_leftImg8bit.png: the file is empty"):
        clips.read(0)


def test_no_frames_is_one_line(tmp_path):
    (tmp_path / "leftImg8bit_sequence" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="no usable clip"):
        open_clips(tmp_path)
