"""Something-Something: webm by json, folders of frames by csv, labels kept, what is missing named."""

import json
import os

import pytest
import torch
from PIL import Image

from fastvid.data import open_clips
from fastvid.data.formats import something
from fastvid.data.video import read_video, write_video
from fastvid.errors import DataError

TRAIN = [
    {"id": "100218", "label": "holding potato next to vicks vaporub bottle",
     "template": "Holding [something] next to [something]", "placeholders": ["potato", "vicks vaporub bottle"]},
    {"id": "2", "label": "dropping a card", "template": "Dropping [something]", "placeholders": ["a card"]},
    {"id": "3", "label": "gone", "template": "Dropping [something]", "placeholders": ["a card"]},
]  # fmt: skip
VALIDATION = [{"id": "7", "label": "dropping a cup", "template": "Dropping [something]", "placeholders": ["a cup"]}]


def frames(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 16, 24, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Bytes of VP9 files of 3 to 6 frames."""
    folder = tmp_path_factory.mktemp("films")
    for n in range(3, 7):
        write_video(folder / f"{n}.webm", frames(n), fps=12)
    return {n: (folder / f"{n}.webm").read_bytes() for n in range(3, 7)}


@pytest.fixture(params=["something-something-v2-", ""], ids=["prefixed", "plain"])
def root(request, tmp_path, films):
    """Version 2 with both names that its lists had."""
    place = tmp_path / "set" / ("labels" if request.param == "" else ".")
    videos = tmp_path / "set" / "videos"
    videos.mkdir(parents=True)
    place.mkdir(exist_ok=True)
    for name, count in (("100218", 3), ("2", 4), ("7", 5), ("8", 6)):
        (videos / f"{name}.webm").write_bytes(films[count])
    for name, rows in (("train", TRAIN), ("validation", VALIDATION), ("labels", {"Dropping something": "0"})):
        (place / f"{request.param}{name}.json").write_text(json.dumps(rows))
    return tmp_path / "set"


def test_clips_of_a_json_list(root):
    train = open_clips(root)
    assert train.names == ["videos/100218.webm", "videos/2.webm"] and train.lengths == [3, 4]
    assert train.labels == ["Holding something next to something", "Dropping something"]
    assert [name for name, _ in train.skipped] == ["3"] and "train.json names it" in train.skipped[0][1]
    assert "Something-Something" in train.describe() and "split train by" in train.describe()
    assert torch.equal(train.read(1, 1, 2), read_video(root / "videos/2.webm", 1, 2)[0])
    assert open_clips(f"{root}?labels=text").labels == [row["label"] for row in TRAIN[:2]]


def test_validation_counts_as_test_where_test_is_not_there(root):
    test = open_clips(root, "test")
    assert (test.lengths, test.labels) == ([5], ["Dropping something"])
    assert "split validation (as test)" in test.describe()
    listed = next(root.rglob("*train.json"))
    listed.with_name(listed.name.replace("train", "test")).write_text('[{"id": "8"}]')
    test = open_clips(root, "test")
    assert (test.lengths, test.labels) == ([6], None)
    assert open_clips(f"{root}?split=validation", "test").lengths == [5]


def test_a_list_can_be_named(root):
    (root / "mine.json").write_text('[{"id": 8}, {"id": "2", "template": "x"}]')
    clips = open_clips(f"{root}?list=mine.json", "test")
    assert (clips.lengths, clips.labels) == ([6, 4], ["", "x"]) and "count as test by mine.json" in clips.describe()
    with pytest.raises(DataError, match="list=none.json is not there"):
        open_clips(f"{root}?list=none.json")
    with pytest.raises(DataError, match="labels must be class or text"):
        open_clips(f"{root}?labels=none")


@pytest.mark.parametrize(
    "text", ["", "[", "{}{}", '{"id": "1"}', '[{"label": "x"}]', '[["1"]]', '[{"id": "../1"}]',
             '[{"id": "1", "template": 3}]', "[" * 100_000, "\ud800"], ids=range(10),
)  # fmt: skip
def test_a_damaged_list_is_one_line(root, text):
    (root / "mine.json").write_text(text, errors="surrogatepass")
    with pytest.raises(DataError, match=r"mine\.json: cannot be read as a list of clips") as caught:
        open_clips(f"{root}?list=mine.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_damaged_clips_are_named(root):
    (root / "videos" / "2.webm").write_bytes(b"")
    clips = open_clips(root)
    assert clips.lengths == [3] and ("videos/2.webm", "the file is empty (0 bytes).") in clips.skipped


@pytest.fixture
def first(tmp_path):
    """Version 1: folders of numbered jpg files and lists in csv."""
    root = tmp_path / "sth"
    for name, count in (("10", 3), ("9", 4), ("11", 2)):
        folder = root / "20bn-something-something-v1" / name
        folder.mkdir(parents=True)
        for i, image in enumerate(frames(count), 1 if name != "9" else 3):
            Image.fromarray(image.numpy()).save(folder / f"{i:05d}.jpg")
    (root / "20bn-something-something-v1" / "9" / "00004.jpg").unlink()
    (root / "something-something-v1-train.csv").write_text("10;Holding something\n9;Tearing something; slowly\n12;x\n")
    (root / "something-something-v1-validation.csv").write_text("11;Holding something\n")
    return root


def test_version_1_has_folders_and_csv(first):
    train, test = open_clips(first), open_clips(first, "test")
    assert train.names == [f"20bn-something-something-v1/{n}" for n in (10, 9)] and train.lengths == [3, 3]
    assert train.labels == ["Holding something", "Tearing something; slowly"]
    assert [name for name, _ in train.skipped] == ["12"]
    assert "1 clip lacks frames: 20bn-something-something-v1/9 (after frame 3)" in train.describe()
    assert (test.lengths, test.labels) == ([2], ["Holding something"])
    # jpg halves the colours of noise, but its brightness stays
    grey = train.read(0).float().mean(-1), frames(3).float().mean(-1)
    assert torch.corrcoef(torch.stack(grey).flatten(1))[0, 1] > 0.8
    assert train.read(1, 1, 2).shape == (2, 16, 24, 3)
    (first / "something-something-v1-train.csv").write_text("Holding something\n")
    with pytest.raises(DataError, match="wanted a number as id, got 'Holding something'"):
        open_clips(first)


def test_without_a_list_every_clip_is_one_split(first):
    for path in first.glob("*.csv"):
        path.unlink()
    clips = open_clips(first / "20bn-something-something-v1", "test")
    assert clips.names == ["9", "10", "11"] and "no list of clips there" in clips.describe()
    assert clips.labels is None and "count as test" in clips.describe()


def test_the_folder_of_clips_finds_the_lists_above_it(root, first):
    clips = open_clips(root / "videos")
    assert clips.names == ["100218.webm", "2.webm"] and "Something-Something" in clips.describe()
    assert open_clips(root / "videos", "test").lengths == [5]
    assert open_clips(first / "20bn-something-something-v1", "test").names == ["11"]


def test_lists_are_found_among_more_clips_than_are_looked_at(tmp_path, films):
    for number in range(100, 170):
        (tmp_path / f"{number}.webm").touch()
    (tmp_path / "7.webm").write_bytes(films[5])
    (tmp_path / "train.json").write_text(json.dumps(VALIDATION))
    assert something.recognise(tmp_path) == "holds train.json" and open_clips(tmp_path).names == ["7.webm"]
    os.unlink(tmp_path / "train.json")
    os.mkfifo(tmp_path / "train.json")
    assert something.recognise(tmp_path) is None


def test_numbered_videos_alone_are_a_plain_folder(tmp_path, films):
    (tmp_path / "1.webm").write_bytes(films[3])
    assert "Something" not in open_clips(tmp_path).describe()
    with pytest.raises(DataError, match="cannot be listed"):
        open_clips(f"{tmp_path / '1.webm'}?format=something")
