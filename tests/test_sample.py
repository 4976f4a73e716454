import json
from pathlib import Path

import pytest
import torch
from dvdgan_folders import NAMES, save_classed, save_dvdgan

import fastvid
from fastvid.checkpoint import manifest_hash
from fastvid.data.sheet import ROWS
from fastvid.data.video import frame_hash, read_video
from fastvid.errors import UsageError, VideoError
from fastvid.sample import find_classes, sample_clips

SIDE, FRAMES = 16, 4  # of the tiny preset


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A generator with classes in a run folder, one without, and a predictor."""
    folder = tmp_path_factory.mktemp("place")
    save_classed(folder / "run" / "model")
    save_dvdgan(folder / "plain")
    save_dvdgan(folder / "fp", "tiny-fp")
    return folder


def hashes(report: dict) -> dict[str, str]:
    return {sample["file"]: sample["frame_hash"] for sample in report["samples"]}


def one_by_one(model, count: int, *how) -> torch.Tensor:
    """Rounding may depend on the batch."""
    label, *rest = how or (None,)
    labels = None if label is None else [label]
    return torch.cat([model.sample(1, labels, *rest, numbers=[k]) for k in range(count)])


def expected(video: torch.Tensor) -> list[str]:
    """Hashes of [n, T, 3, H, W] in [0, 1]."""
    return [frame_hash(one.mul(255).round().to(torch.uint8).movedim(1, -1)) for one in video]


def test_clips_of_classes_with_sheet_and_report(place, tmp_path, capsys):
    out = tmp_path / "out"
    report = sample_clips(place / "run", ("4", "0"), clips=3, seed=5, truncation=0.5, out=out, fps=8)
    files = [f"{stem}_sample{k}.mp4" for stem in ("class1_4", "class0_zero") for k in range(3)]
    assert [sample["file"] for sample in report["samples"]] == files
    assert sorted(path.name for path in out.iterdir()) == sorted([*files, "samples.json", "samples_contact.png"])
    assert json.loads((out / "samples.json").read_text()) == report
    assert report["classes"] == [{"number": 0, "name": "zero"}, {"number": 1, "name": "4"}]
    options = {"classes": ["4", "0"], "clips": 3, "seed": 5, "truncation": 0.5, "kind": "scaled", "interpolate": None,
               "fps": 8}  # fmt: skip
    assert report["options"] == options
    assert report["model"] == {"name": str(place / "run"), "sha256": manifest_hash(place / "run" / "model")}
    assert report["seconds"] > 0 and report["frames"] == FRAMES and report["size"] == [SIDE, SIDE]
    assert report["frames_per_second"] == pytest.approx(6 * FRAMES / report["seconds"], rel=0.01)
    video, fps = read_video(out / files[0])
    assert video.shape == (FRAMES, SIDE, SIDE, 3) and fps == pytest.approx(8)
    sheet, _ = read_video(out / "samples_contact.png")
    assert (sheet.shape[1] - 1) % 6 == 0 and (sheet.shape[2] - 1) % FRAMES == 0
    assert f"6 clips of {FRAMES} frames in" in capsys.readouterr().out


def test_hashes_are_of_the_model_s_own_frames(place, tmp_path):
    report = sample_clips(place / "run", ("4",), clips=3, seed=5, truncation=0.7, kind="truncated", out=tmp_path / "o")
    model = fastvid.load(place / "run")
    assert isinstance(model, fastvid.models.DVDGANGenerator) and not model.training
    assert [*hashes(report).values()] == expected(one_by_one(model, 3, 1, 5, 0.7, "truncated"))
    assert len(set(hashes(report).values())) == 3


def test_same_seed_same_bytes_and_every_option_counts(place, tmp_path):
    plain = {"classes": ("4",), "clips": 2}
    changes = [{}, {}, {"seed": 1}, {"truncation": 0.3}, {"kind": "truncated"}, {"classes": ("zero",)}]
    reports = [sample_clips(place / "run", **(plain | change), out=tmp_path / str(i))
               for i, change in enumerate(changes)]  # fmt: skip
    assert hashes(reports[0]) == hashes(reports[1])
    for file in [*hashes(reports[0]), "samples_contact.png"]:
        assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "1" / file).read_bytes()
    assert len({tuple(hashes(report).values()) for report in reports}) == 5


def test_a_clip_does_not_depend_on_its_company(place, tmp_path):
    many = hashes(sample_clips(place / "run", NAMES, clips=4, seed=2, out=tmp_path / "many"))
    few = hashes(sample_clips(place / "run", ("4",), clips=2, seed=2, out=tmp_path / "few"))
    assert few.items() <= many.items() and len(set(many.values())) == 12


def test_without_classes_named_they_come_in_turn(place, tmp_path):
    report = sample_clips(place / "run", clips=4, out=tmp_path / "a")
    assert [(sample["class"], sample["number"]) for sample in report["samples"]] == [(0, 0), (1, 1), (2, 2), (0, 3)]
    assert [sample["file"] for sample in report["samples"]][2] == "class2_a_b_c_sample2.mp4"
    plain = sample_clips(place / "plain", clips=2, out=tmp_path / "b")
    assert list(hashes(plain)) == ["sample0.mp4", "sample1.mp4"] and plain["classes"] == []
    assert [*hashes(plain).values()] == expected(one_by_one(fastvid.load(place / "plain"), 2))


def test_a_line_between_two_classes(place, tmp_path):
    report = sample_clips(place / "run", clips=2, seed=3, interpolate="zero:a b/c", out=tmp_path / "o")
    files = [f"class0to2_sample{k}_step{i}.mp4" for k in range(2) for i in range(8)]
    assert list(hashes(report)) == files and [one["number"] for one in report["classes"]] == [0, 2]
    model = fastvid.load(place / "run")
    found = [*hashes(report).values()]
    assert found[8:] == expected(model.between_classes(model.noise([1], 3)[0], 0, 2))
    assert len(set(found[:8])) == 8


def test_a_line_between_two_noises(place, tmp_path):
    report = sample_clips(place / "run", ("4",), clips=1, seed=3, interpolate="z", out=tmp_path / "o")
    model = fastvid.load(place / "run")
    found = [*hashes(report).values()]
    assert found == expected(model.between_noises(*model.noise(range(2), 3), label=1)) and len(set(found)) == 8
    plain = sample_clips(place / "plain", clips=1, interpolate="z", out=tmp_path / "p")
    assert list(hashes(plain))[3] == "z0to1_step3.mp4"


def test_a_sheet_shows_every_class(place, tmp_path):
    sample_clips(place / "run", NAMES, clips=12, out=tmp_path / "o")
    sheet, _ = read_video(tmp_path / "o" / "samples_contact.png")
    assert (sheet.shape[1] - 1) % ROWS == 0
    cell = (sheet.shape[1] - 1) // ROWS
    first = one_by_one(fastvid.load(place / "run"), 1, 2)[0, 0]  # the class that comes last
    scale = (cell - 5) // SIDE
    row = sheet[0, 22 * cell + 3 : 22 * cell + 3 + scale * SIDE : scale, 3 : 3 + scale * SIDE : scale]
    assert torch.equal(row, first.mul(255).round().to(torch.uint8).movedim(0, -1))


def test_classes_by_name_then_by_number():
    assert find_classes(("7", "2", "3"), 3, ("3", "7", "9")) == [1, 2, 0]
    assert find_classes((), 3, ()) == []
    with pytest.raises(UsageError, match=r"no class '3'; there are 0 to 2\."):
        find_classes(("3",), 3, ())
    many = tuple(f"n{i}" for i in range(45))
    with pytest.raises(UsageError, match=r"0 n0, 1 n1, .* 39 n39 and 5 more"):
        find_classes(("x",), 45, many)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("run", {"classes": ("7",)}, r"no class '7'; there are 0 zero, 1 4, 2 a b/c\."),
        ("run", {"classes": ("-1",)}, "no class '-1'"),
        ("run", {"classes": ("4", "1")}, "class '1' is given twice"),
        ("run", {"clips": 0}, "-n must be at least 1, got 0"),
        ("run", {"seed": -1}, "--seed must lie in"),
        ("run", {"truncation": 0.0}, "--truncation must be a finite number above 0"),
        ("run", {"truncation": float("nan")}, "--truncation must be a finite number above 0"),
        ("run", {"kind": "cut"}, "must be scaled or truncated, got 'cut'"),
        ("run", {"fps": 0}, "--fps must be from 0.01 to 1000, got 0"),
        ("run", {"device": "tpu"}, "--device must be cpu or cuda"),
        ("run", {"interpolate": "zero"}, "A:B, two classes, or z, got 'zero'; classes are 0 zero"),
        ("run", {"interpolate": "zero:5"}, "no class '5'"),
        ("run", {"interpolate": "0:1", "classes": ("2",)}, "says the classes itself; leave --classes out"),
        ("run", {"interpolate": "z"}, "name a class with --classes"),
        ("plain", {"classes": ("0",)}, "the model has no classes, got 0; leave them out"),
        ("plain", {"interpolate": "0:1"}, "the model has no classes"),
        ("fp", {}, "continues clips and makes none from nothing; use fastvid predict"),
        ("nothing", {}, "unknown model"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(place, tmp_path, name, options, words):
    model = place / name if name != "nothing" else name
    with pytest.raises(UsageError, match=words):
        sample_clips(model, **options, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_half_written(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    sample_clips(place / "plain", clips=2, out=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    calls = []

    def full(*_):
        calls.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastvid.sample.write_png", full)
    with pytest.raises(VideoError, match="No space left on device"):
        sample_clips(place / "plain", clips=2, seed=1, out=out)
    assert calls and {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written to"):
        sample_clips(place / "plain", out=tmp_path / "file")
