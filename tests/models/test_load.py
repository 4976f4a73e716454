"""fastvid.load: which model a folder gives, from a model folder or the run folder around it."""

import json
from dataclasses import asdict

import pytest
import torch
from dvdgan_folders import NAMES, save_classed, save_dvdgan

import fastvid
from fastvid.checkpoint import load_folder, save_folder
from fastvid.errors import CheckpointError, UsageError
from fastvid.models import DVDGANGenerator, DVDGANPredictor, VideoPredictor, about, build, preset


def test_the_kind_of_a_folder_decides(tmp_path):
    save_classed(tmp_path / "run" / "model")
    save_dvdgan(tmp_path / "fp", "tiny-fp")
    generator, predictor = fastvid.load(tmp_path / "run"), fastvid.load(tmp_path / "fp")
    assert type(generator) is DVDGANGenerator and generator.config.class_names == NAMES and not generator.training
    assert type(predictor) is DVDGANPredictor and predictor.config.given == 4
    assert about(tmp_path / "run") == ("dvdgan", (16, 16), 0) and about(tmp_path / "fp") == ("dvdgan", (16, 16), 4)
    assert about("dino64") == ("predictor", (64, 64), 4)
    assert isinstance(fastvid.load("dino64"), VideoPredictor)


def test_what_is_loaded_is_what_was_saved(tmp_path):
    folder = save_classed(tmp_path / "model")
    tensors, config = load_folder(folder)
    model = build("dvdgan", {name: value for name, value in config.items() if name != "kind"})
    model.load_state_dict(tensors)
    before = torch.get_rng_state()
    loaded = fastvid.load(folder)
    assert torch.equal(torch.get_rng_state(), before), "loading drew random numbers"
    assert torch.equal(loaded.sample(2, [0, 2], seed=4), model.eval().sample(2, [0, 2], seed=4))
    assert loaded.sample(1, [0]).std() > 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "top"}, "wanted a predictor, got kind 'top'"),
        ({"kind": "dvdgan", "size": "large"}, "wanted whole numbers size and given in its config, got 'large'"),
        ({"kind": "dvdgan", "given": -1}, "wanted whole numbers size and given"),
        ({"kind": "dvdgan", "size": 17}, "describes no dvdgan"),
        ({"kind": "dvdgan", "groups": [2, 2]}, "do not fit"),
        ({"kind": "dvdgan", "width": 1 << 20}, "describes no dvdgan: .* beyond all the weights"),
    ],
)
def test_folders_that_are_none(tmp_path, change, words):
    tensors, config = load_folder(save_dvdgan(tmp_path / "good"))
    save_folder(tmp_path / "bad", tensors, json.loads(json.dumps(config)) | change)
    with pytest.raises(CheckpointError, match=words):
        fastvid.load(tmp_path / "bad")


def test_an_empty_run_folder_is_no_model(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(CheckpointError):
        fastvid.load(tmp_path / "run")
    with pytest.raises(UsageError, match="unknown model"):
        about(tmp_path / "nowhere")


def test_loading_computes_no_starting_values(tmp_path, monkeypatch):
    folder = save_dvdgan(tmp_path / "model")
    monkeypatch.setattr("fastvid.nn.spectral.ops.spectral_norm", None)
    monkeypatch.setattr("torch.nn.init.orthogonal_", None)
    with pytest.raises(TypeError):
        build("dvdgan", asdict(preset("dvdgan", "tiny")))
    loaded = fastvid.load(folder)
    monkeypatch.undo()
    tensors, _ = load_folder(folder)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())
