"""`train_dvdgan` on generated digits: classes by name, a model folder that generates, and windows to go on from."""

import csv
from dataclasses import replace

import pytest
import torch

from fastvid import models
from fastvid.checkpoint import load_folder, load_parts
from fastvid.data import Clips
from fastvid.data._layouts import Layout
from fastvid.errors import UsageError
from fastvid.train import train_dvdgan
from fastvid.train.dvdgan import _classed

pytest.importorskip("sklearn", reason="scikit-learn is not installed; it carries the digits")
FEW = {"batch_size": 2, "checkpoint_every": 1, "log_every": 1, "sample_every": 2, "threads": 1,
       "discriminator_steps": 1}
TINY = models.preset("dvdgan", "tiny")


def clips_of(labels: list[str] | None) -> Clips:
    count = 7 if labels is None else len(labels)
    return Clips(Layout([f"{i}" for i in range(count)], [9] * count, lambda i, *_: i, "seven", [], labels))


def test_a_run_that_goes_on_equals_an_unbroken_one_and_leaves_a_generator(tmp_path, capfd):
    arguments = "digits?count=1", "tiny"
    threads = torch.get_num_threads()
    train_dvdgan(*arguments, tmp_path / "whole", steps=2, classes=["7", "1"], **FEW)
    assert "2 classes: 1, 7" in capfd.readouterr().err
    train_dvdgan(*arguments, tmp_path / "parts", steps=1, classes=["7", "1"], **FEW)
    train_dvdgan(*arguments, tmp_path / "parts", steps=2, classes=["7", "1"], **FEW, resume=True)
    torch.set_num_threads(threads)
    whole, parts = (load_parts(tmp_path / name / "checkpoint")[0] for name in ("whole", "parts"))
    assert all(torch.equal(t, parts[part][name]) for part, tensors in whole.items() for name, t in tensors.items())
    tensors, config = load_folder(tmp_path / "whole" / "model")
    assert config.pop("kind") == "dvdgan" and config["classes"] == 2 and config["class_names"] == ["1", "7"]
    generator = models.build("dvdgan", config).eval()
    generator.load_state_dict(tensors)
    assert generator.sample(2, labels=[0, 1]).shape == (2, 4, 3, 16, 16)
    assert (tmp_path / "whole" / "samples" / "step_00000002.png").is_file()
    with pytest.raises(UsageError, match="its data = .*, now it is"):
        train_dvdgan(*arguments, tmp_path / "parts", steps=3, classes=["7", "2"], **FEW, resume=True)


def test_recomputed_activations_change_nothing(tmp_path):
    threads = torch.get_num_threads()
    few = FEW | {"sample_every": 0}
    train_dvdgan("digits", "tiny", tmp_path / "kept", steps=1, **few)
    train_dvdgan("digits", "tiny", tmp_path / "recomputed", steps=1, checkpointing=True, **few)
    torch.set_num_threads(threads)
    kept, again = (load_parts(tmp_path / name / "checkpoint")[0] for name in ("kept", "recomputed"))
    assert all(torch.equal(t, again[part][name]) for part, tensors in kept.items() for name, t in tensors.items())


def test_windows_to_go_on_from_have_given_and_generated_frames(tmp_path, capfd):
    threads = torch.get_num_threads()
    train_dvdgan("digits?count=1", "tiny-fp", tmp_path / "run", steps=1, frame_step=2, precision="bfloat16",
                 **FEW | {"sample_every": 1})  # fmt: skip
    torch.set_num_threads(threads)
    said = capfd.readouterr().err
    assert "windows of 15 frames, one in 2 kept" in said and "without classes" in said
    tensors, config = load_folder(tmp_path / "run" / "model")
    assert config.pop("kind") == "dvdgan" and (config["given"], config["classes"]) == (4, 0)
    model = models.build("dvdgan", config).eval()
    model.load_state_dict(tensors)
    assert model.predict(torch.rand(1, 4, 3, 16, 16), n=3).shape == (1, 1, 3, 3, 16, 16)
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["learning_rate_discriminator"]) == 5e-4 and float(row["diversity"]) > 0


def test_classes_are_sorted_naturally_and_clips_without_one_left_out():
    clips, config, numbers = _classed(clips_of(["b10", "b9", "", "a", "b10", "b9", "c"]), TINY, None)
    assert config.class_names == ("a", "b9", "b10", "c") and config.classes == 4
    assert clips.names == ["0", "1", "3", "4", "5", "6"] and numbers.tolist() == [2, 1, 0, 2, 1, 3]
    clips, config, numbers = _classed(clips_of(["b10", "b9", "", "a", "b10", "b9", "c"]), TINY, ["c", "b9", "c"])
    assert config.class_names == ("b9", "c") and clips.names == ["1", "5", "6"] and numbers.tolist() == [0, 0, 1]
    assert clips.read(2) == 6


def test_data_without_classes_and_models_that_go_on_have_none():
    clips, config, numbers = _classed(clips_of(None), replace(TINY, classes=3), None)
    assert numbers is None and config.classes == 0 and len(clips) == 7
    labelled, fp = clips_of(["a", "b"]), models.preset("dvdgan", "tiny-fp")
    assert _classed(labelled, fp, None)[2] is None
    with pytest.raises(UsageError, match="--classes: a model that goes on from frames has no classes"):
        _classed(labelled, fp, ["b"])


@pytest.mark.parametrize(("labels", "wanted", "words"), [
    (["a", "b10", "b9"], ["a", "z"], "the data have no class z; there are: a, b9, b10."),
    (None, ["a"], "the data name no classes"), (["a"], [], "wanted at least one, got none; there are: a"),
])
def test_classes_that_the_data_lack_are_one_line_with_those_they_have(labels, wanted, words):
    with pytest.raises(UsageError, match=words) as caught:
        _classed(clips_of(labels), TINY, wanted)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"preset": "huge"}, "unknown preset 'huge'"), ({"size": 30}, "size must be 4 times a power of two"),
    ({"frames": 6}, "multiple of 4"), ({"generator_rate": 0.0}, "--generator-rate"),
    ({"classes": ["10"]}, "no class 10; there are: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"), ({"frame_step": 0}, "frame_step"),
])
def test_wrong_arguments_are_one_line(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        train_dvdgan("digits?count=1", out=tmp_path / "run", **{"preset": "tiny", **FEW, **arguments})
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


