"""Contact sheets keep every pixel, mark what was given, and survive the PNG file."""

import av
import pytest
import torch

from fastvid.data.sheet import contact_sheet, write_png
from fastvid.errors import DataError, VideoError


def frames(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def read_png(path):
    with av.open(str(path)) as file:
        return torch.from_numpy(next(file.decode(video=0)).to_ndarray(format="rgb24"))


def test_every_frame_stands_in_its_cell():
    rows = [frames(3, 8, 10, 3, seed=1), frames(2, 8, 10, 3, seed=2)]
    sheet = contact_sheet(rows, scale=2)
    cell_h, cell_w = 8 * 2 + 5, 10 * 2 + 5
    assert sheet.shape == (2 * cell_h + 1, 3 * cell_w + 1, 3)
    for r, row in enumerate(rows):
        for c, frame in enumerate(row):
            large = sheet[r * cell_h + 3 :, c * cell_w + 3 :][:16, :20]
            assert torch.equal(large[::2, ::2], frame)
            assert torch.equal(large[1::2, 1::2], frame)


def test_small_frames_are_enlarged_and_large_ones_are_not():
    assert contact_sheet([frames(1, 64, 64, 3)]).shape[0] == 128 + 6
    assert contact_sheet([frames(1, 120, 160, 3)]).shape[:2] == (126, 166)


def test_borders_tell_given_from_predicted():
    row = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    sheet = contact_sheet([row], given=2, scale=1)
    border = [tuple(sheet[1, 1 + 13 * c].tolist()) for c in range(4)]
    assert border[0] == border[1] != border[2] == border[3]
    plain = contact_sheet([row], scale=1)
    assert len({tuple(plain[1, 1 + 13 * c].tolist()) for c in range(4)}) == 1


def test_png_round_trip_and_repeatable(tmp_path):
    image = frames(33, 47, 3)
    write_png(tmp_path / "new" / "a.png", image)
    write_png(tmp_path / "b.png", image)
    assert torch.equal(read_png(tmp_path / "new" / "a.png"), image)
    assert (tmp_path / "new" / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.png", "b.png", "new"]


@pytest.mark.parametrize(
    ("rows", "options", "word"),
    [
        ([], {}, "at least one clip"),
        ([torch.zeros(2, 8, 8, 3)], {}, "uint8"),
        ([frames(0, 8, 8, 3)], {}, "clip 0"),
        ([frames(1, 8, 8, 3), frames(1, 9, 8, 3)], {}, "share one frame size"),
        ([frames(1, 8, 8, 3)], {"scale": 0}, "`scale`"),
        ([frames(1, 8, 8, 3)], {"given": -1}, "`given`"),
    ],
)
def test_messages(rows, options, word):
    with pytest.raises(DataError, match=word) as caught:
        contact_sheet(rows, **options)
    assert "\n" not in str(caught.value)


def test_png_messages(tmp_path):
    with pytest.raises(DataError, match="uint8"):
        write_png(tmp_path / "a.png", torch.zeros(4, 4, 3))
    (tmp_path / "file").write_text("")
    with pytest.raises(VideoError, match="choose another place"):
        write_png(tmp_path / "file" / "a.png", frames(4, 4, 3))
