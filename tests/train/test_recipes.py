"""The three doors that the command line calls, on clips in files."""

from pathlib import Path

import pytest
import torch

from fastvid import models
from fastvid.checkpoint import load_folder, save_folder
from fastvid.data.digits import make_clip
from fastvid.data.video import write_video
from fastvid.errors import CheckpointError, DataError, UsageError, WeightsError
from fastvid.metrics import LPIPS
from fastvid.train import train_bottom, train_decoder, train_top, train_vqvae
from fastvid.weights import load_weights

FEW = {"steps": 3, "batch_size": 2, "checkpoint_every": 2, "log_every": 1, "sample_every": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Six clips of 30 frames."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "train").mkdir()
    for seed in range(6):
        write_video(folder / "train" / f"{seed}.mp4", make_clip(seed, 30, (32, 32)), lossless=True)
    return str(folder)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """The run folder of an autoencoder."""
    out = tmp_path_factory.mktemp("runs") / "vqvae"
    train_vqvae(data, "tiny", out, **FEW)
    return out


def test_the_whole_chain_leaves_three_models_that_load(data, trained, tmp_path, capfd):
    for kind, recipe in (("top", train_top), ("bottom", train_bottom)):
        result = recipe(data, trained, "tiny", tmp_path / kind, every=8, **FEW)
        assert result.finished and (tmp_path / kind / "samples" / "step_00000003.png").is_file()
        assert (tmp_path / kind / "latents" / "manifest.json").is_file()
    assert "6 clips of 30 frames" in capfd.readouterr().err
    for folder in (trained, tmp_path / "top", tmp_path / "bottom"):
        tensors, config = load_folder(folder / "model")
        kind = config.pop("kind")
        models.build(kind, config).load_state_dict(tensors)


@pytest.mark.parametrize("scene", [False, True])
def test_a_decoder_trained_on_keeps_the_codes(data, trained, tmp_path, scene):
    few = FEW | {"learning_rate": 1e-2, "warmup": 0, "ema_decay": 0.0}
    train_decoder(data, trained, tmp_path / "decoder", scene=scene, **few)
    old, new = (models.load_part("vqvae", folder)[0] for folder in (trained, tmp_path / "decoder"))
    assert new.config.scene == ([32, 32] if scene else None)
    decoder = ("upsample_top.", "decode_both.", "scene")
    kept = {name for name in old.state_dict() if not name.startswith(decoder)}
    assert all(torch.equal(old.state_dict()[name], new.state_dict()[name]) for name in kept)
    video = make_clip(9, 16, (32, 32)).movedim(-1, 0)[None].float() / 255
    codes = old.encode(video)
    assert all(torch.equal(a, b) for a, b in zip(codes, new.encode(video), strict=True))
    before, after = ((vqvae.decode(*codes) - video).abs().mean() for vqvae in (old, new))
    assert after < before


def test_perceptual_training_needs_its_weights_and_lowers_lpips(
    data, trained, tmp_path, monkeypatch, lpips_alex_weights
):
    few = FEW | {"learning_rate": 1e-2, "warmup": 0, "ema_decay": 0.0, "steps": 6}
    monkeypatch.setenv("FASTVID_WEIGHTS", str(tmp_path / "none"))
    with pytest.raises(WeightsError, match="fastvid weights add lpips"):
        train_decoder(data, trained, tmp_path / "out", perceptual=1.0, **few)
    with pytest.raises(UsageError, match="--perceptual must be at least 0, got -1"):
        train_decoder(data, trained, tmp_path / "out", perceptual=-1, **few)
    monkeypatch.setenv("FASTVID_WEIGHTS", str(lpips_alex_weights.parent))
    train_decoder(data, trained, tmp_path / "out", perceptual=1.0, **few)
    judge = LPIPS.from_tensors("alex", load_weights("lpips_alex").tensors)
    video = make_clip(0, 16, (32, 32)).movedim(-1, 0)[None].float() / 255
    codes = models.load_part("vqvae", trained)[0].encode(video)
    made = [models.load_part("vqvae", run)[0].decode(*codes) for run in (trained, tmp_path / "out")]
    before, after = (judge(frames.movedim(2, 1), video.movedim(2, 1)).mean() for frames in made)
    assert after < before


def test_a_scene_starts_as_what_stands_still(data, trained, tmp_path):
    write_video(tmp_path / "train.mp4", torch.full((30, 32, 32, 3), 200, dtype=torch.uint8), lossless=True)
    train_decoder(str(tmp_path / "train.mp4"), trained, tmp_path / "out", scene=True, **FEW | {"learning_rate": 1e-9})
    still = models.load_part("vqvae", tmp_path / "out")[0]
    torch.testing.assert_close(still.scene, torch.full((3, 32, 32), 200 / 255), rtol=0, atol=1e-5)
    codes = still.encode(torch.rand(1, 3, 16, 32, 32))
    plain = models.load_part("vqvae", trained)[0].decode(*codes, clamp=False)
    torch.testing.assert_close(still.decode(*codes, clamp=False), (plain + 200 / 255) / 2, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="a scene of .32, 32., got codes of frames of .64, 64."):
        still.decode(*still.encode(torch.rand(1, 3, 16, 64, 64)))
    with pytest.raises(UsageError, match="has a scene already"):
        train_decoder(data, tmp_path / "out", tmp_path / "again", scene=True, size=32, **FEW)


def test_the_same_seed_makes_the_same_model(data, trained, tmp_path):
    train_vqvae(data, "tiny", tmp_path / "again", **FEW)
    train_vqvae(data, "tiny", tmp_path / "other", **FEW, seed=1)
    first, again, other = (load_folder(p / "model")[0] for p in (trained, tmp_path / "again", tmp_path / "other"))
    assert all(torch.equal(t, again[name]) for name, t in first.items())
    assert not torch.equal(first["to_top.weight"], other["to_top.weight"])


def test_a_prior_goes_on_with_the_same_codes_only(data, trained, tmp_path):
    train_top(data, trained, "tiny", tmp_path / "top", **FEW, minutes=1e-9)
    assert train_top(data, trained / "model", "tiny", tmp_path / "top", **FEW, resume=True).finished
    train_vqvae(data, "tiny", tmp_path / "other", **FEW, seed=1)
    with pytest.raises(UsageError, match="its data"):
        train_top(data, tmp_path / "other", "tiny", tmp_path / "top", **FEW, resume=True)


def test_the_priors_take_the_frame_size_of_the_autoencoders_run(data, tmp_path):
    train_vqvae(data, "tiny", tmp_path / "vq", size=16, **FEW)
    train_top(data, tmp_path / "vq", "tiny", tmp_path / "top", **FEW)
    assert load_folder(tmp_path / "top" / "latents")[0]["top"].shape[1:] == (4, 2, 2)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"preset": "huge"}, "unknown preset 'huge'"), ({"size": 30}, "--size must be a positive multiple of 8"),
    ({"size": 0}, "--size"), ({"steps": 0}, "--steps"),
])
def test_wrong_arguments_are_one_line(data, tmp_path, arguments, words):
    with pytest.raises(UsageError, match=words) as caught:
        train_vqvae(data, out=tmp_path / "run", **{"preset": "tiny", **FEW, **arguments})
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(data, tmp_path, device):
    with pytest.raises(UsageError, match=f"--device {device}: torch cannot use it"):
        train_vqvae(data, "tiny", tmp_path / "run", device=device, **FEW)
    assert not (tmp_path / "run").exists()


def test_what_is_no_autoencoder_is_refused(data, trained, tmp_path):
    with pytest.raises(CheckpointError, match="wanted a model folder"):
        train_top(data, tmp_path / "none", "tiny", tmp_path / "top", **FEW)
    with pytest.raises(UsageError, match="32 codes per level, the top preset dino64 is for 512"):
        train_top(data, trained, "dino64", tmp_path / "top", **FEW)
    save_folder(tmp_path / "prior", {"a": torch.zeros(1)}, {"kind": "top"})
    with pytest.raises(CheckpointError, match="wanted a vqvae, it is of kind 'top'"):
        train_top(data, tmp_path / "prior", "tiny", tmp_path / "top", **FEW)
    tensors, config = load_folder(trained / "model")
    tensors.pop("to_top.bias")
    save_folder(tmp_path / "torn", tensors, config)
    with pytest.raises(CheckpointError, match="do not fit"):
        train_top(data, tmp_path / "torn", "tiny", tmp_path / "top", **FEW)
    with pytest.raises(DataError, match="no such file"):
        train_vqvae(str(tmp_path / "nowhere"), "tiny", tmp_path / "run", **FEW)
