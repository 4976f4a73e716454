"""The whole chain on a tiny model with random weights: shapes, independence of the batch, folders, refusals."""

import weakref
from dataclasses import asdict

import pytest
import torch

import fastvid
from fastvid import models
from fastvid.checkpoint import load_folder, save_folder
from fastvid.errors import CheckpointError, UsageError
from fastvid.models import VideoPredictor


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(5)
    parts = [models.build(kind, asdict(models.preset(kind, "tiny"))) for kind in ("vqvae", "top", "bottom")]
    return VideoPredictor(*parts, size=(32, 32))


@pytest.fixture(scope="module")
def frames():
    return torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_shapes_and_codes(predictor, frames):
    told = []
    result = predictor.predict_codes(frames, n=12, samples=2, progress=lambda *report: told.append(report))
    assert result.frames.shape == (2, 2, 12, 3, 32, 32)
    assert result.frames.min() >= 0 and result.frames.max() <= 1
    (top,), (bottom,) = result.top, result.bottom
    assert top.shape == (2, 2, 4, 4, 4) and bottom.shape == (2, 2, 8, 8, 8)
    assert bottom.min() >= 0  # every slice was drawn
    codes = {name: stage.codes for name, stage in result.stages.items()}
    assert codes == {"pack": 0, "encode": 0, "top": 4 * 48, "bottom": 4 * 384, "decode": 0}
    assert all(stage.seconds > 0 for stage in result.stages.values())
    # the whole run is told in advance, and every row of codes counts
    done = [done for _, done, _ in told]
    assert done == sorted(set(done)) and done[-1] == 4 * (48 + 384) and {total for *_, total in told} == {done[-1]}
    assert [stage for stage, *_ in told] == ["top"] * 12 + ["bottom"] * 48
    # the given codes are those of the four frames encoded alone
    given_top, given_bottom = predictor.vqvae.encode(frames.transpose(1, 2))
    assert torch.equal(top[:, 0, :1], given_top) and torch.equal(bottom[:, 1, :2], given_bottom)


def test_frames_are_the_decoded_codes(predictor, frames):
    result = predictor.predict_codes(frames, samples=1)
    decoded = predictor.vqvae.decode(result.top[0][:, 0], result.bottom[0][:, 0])  # [B, 3, T, H, W]
    torch.testing.assert_close(result.frames[:, 0], decoded[:, :, 4:].transpose(1, 2), rtol=0, atol=1e-5)


def test_clips_may_have_samples_of_their_own_numbers(predictor, frames):
    both = predictor.predict(frames, samples=[range(5, 7), range(9, 11)], seed=4)
    assert torch.equal(both[:1], predictor.predict(frames[:1], samples=range(5, 7), seed=4))
    assert torch.equal(both[1:], predictor.predict(frames[1:], samples=range(9, 11), seed=4))
    twins = predictor.predict(frames[:1].expand(2, -1, -1, -1, -1), samples=[range(1), range(1, 2)])
    assert not torch.equal(twins[0], twins[1])
    for wrong in ([range(2)], [range(2), range(3)], [range(0), range(0)]):
        with pytest.raises(UsageError, match="samples"):
            predictor.predict(frames, samples=wrong)


def test_a_sample_does_not_depend_on_its_company(predictor, frames):
    together = predictor.predict(frames, n=12, samples=3, seed=4)
    alone = predictor.predict(frames[1:], n=12, samples=1, seed=4)
    assert torch.equal(together[1:, :1], alone)
    assert not torch.equal(together[:, 0], together[:, 1])
    assert not torch.equal(predictor.predict(frames[1:], seed=5), alone)


def test_it_slides_on_over_its_own_output(predictor, frames):
    long = predictor.predict(frames[:1], n=30, seed=2)
    assert long.shape == (1, 1, 30, 3, 32, 32)
    assert torch.equal(long[:, :, :12], predictor.predict(frames[:1], n=12, seed=2))
    assert torch.equal(long[:, :, :7], predictor.predict(frames[:1], n=7, seed=2))
    again = predictor.predict(long[:, 0, 8:12], n=12, seed=2)
    assert not torch.equal(again, long[:, :, 12:24])  # a later stretch draws noise of its own


def test_stretches_come_one_by_one_and_none_is_kept(predictor, frames, monkeypatch):
    decode, decoded, seen, dropped = predictor.vqvae.decode, [], [], []
    monkeypatch.setattr(predictor.vqvae, "decode", lambda *codes: decoded.append(len(seen)) or decode(*codes))
    for stretch in predictor.predict_stream(frames[:1], n=42, seed=2):
        # what is dropped is gone from memory, and not only out of sight: its storage has no owner left
        assert all(storage() is None for storage in dropped)
        dropped = [weakref.ref(t.untyped_storage()) for t in (stretch.frames, stretch.top, stretch.bottom)]
        assert all(storage() is not None for storage in dropped)
        seen.append(stretch.frames.clone())
        del stretch
    assert decoded == [0, 1, 2, 3], "a stretch was computed before the one before it was handed over"
    assert [part.shape[2] for part in seen] == [12, 12, 12, 6]
    whole = predictor.predict_codes(frames[:1], n=42, seed=2)
    assert torch.equal(torch.cat(seen, dim=2), whole.frames) and len(whole.top) == 4


def test_samples_by_their_numbers(predictor, frames):
    every = predictor.predict(frames, samples=5, seed=3)
    assert torch.equal(predictor.predict(frames, samples=range(2, 4), seed=3), every[:, 2:4])


def test_a_clip_is_encoded_once_for_all_its_samples(predictor, frames, monkeypatch):
    encode, encoded = predictor.vqvae.encode, []
    monkeypatch.setattr(predictor.vqvae, "encode", lambda video: encoded.append(len(video)) or encode(video))
    predictor.predict(frames, n=12, samples=4)
    assert encoded == [1, 1]
    predictor.predict(frames, n=13, samples=4)
    assert encoded == [1, 1] + [1, 1] + [1] * 8  # the second stretch starts from each sample's own frames


def test_rows_beyond_what_fits_together(predictor, frames, monkeypatch):
    whole = predictor.predict(frames, n=14, samples=3, seed=6)
    monkeypatch.setattr("fastvid.models.predictor.ROWS_AT_ONCE", 2)
    assert torch.equal(predictor.predict(frames, n=14, samples=3, seed=6), whole)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_smaller_weights_are_judged_by_float32(predictor, frames, weights):
    (stretch,) = predictor.predict_stream(frames, samples=2, seed=1, weights=weights, compare=True)
    exact = predictor.predict_codes(frames, samples=2, seed=1)
    for name in ("top", "bottom"):
        stage = stretch.stages[name]
        if weights == "float32":
            assert stage.drift_size < 1e-4 * stage.codes
        else:
            assert 1e-5 * stage.codes < stage.drift_size and abs(stage.drift) <= stage.drift_size < 0.2 * stage.codes
    assert torch.equal(stretch.frames, exact.frames) or weights != "float32"


def test_folder_round_trip(predictor, frames, tmp_path):
    predictor.save(tmp_path / "whole")
    loaded = fastvid.load(tmp_path / "whole")
    assert loaded.size == (32, 32)
    assert torch.equal(loaded.predict(frames), predictor.predict(frames))
    predictor.save(tmp_path / "half", torch.float16)
    halved = fastvid.load(tmp_path / "half")
    assert all(p.dtype == torch.float32 for p in halved.parameters())
    assert torch.equal(halved.vqvae.quantize_top.codebook, predictor.vqvae.quantize_top.codebook)
    small, large = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole"))
    assert small < 0.6 * large


def test_loading_draws_no_random_numbers(predictor, tmp_path):
    predictor.save(tmp_path / "whole")
    before = torch.get_rng_state()
    loaded = fastvid.load(tmp_path / "whole")
    assert torch.equal(torch.get_rng_state(), before)
    state = predictor.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    # outside of load, a new model still starts from drawn weights
    fresh = models.build("top", asdict(models.preset("top", "tiny")))
    assert all(p.isfinite().all() for p in fresh.parameters()) and fresh.stack.embed.weight.std() > 0.1
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_frame_size_is_known_without_the_weights(predictor, tmp_path, monkeypatch):
    predictor.save(tmp_path / "whole")
    monkeypatch.setattr("fastvid.models.predictor.load_folder", None)
    assert models.frame_size(tmp_path / "whole") == (32, 32)
    with pytest.raises(UsageError, match="unknown model 'nosuch'"):
        models.frame_size("nosuch")


def test_assemble(predictor, frames, tmp_path):
    for kind in ("vqvae", "top", "bottom"):
        part = getattr(predictor, kind)
        # a run folder holds its model folder inside
        save_folder(tmp_path / kind / "model", part.state_dict(), {"kind": kind, **asdict(part.config)})
    paths = [tmp_path / kind for kind in ("vqvae", "top", "bottom")]
    assembled = models.assemble(*paths, size=(32, 32))
    assert torch.equal(assembled.predict(frames), predictor.predict(frames))
    with pytest.raises(CheckpointError, match="wanted a top"):
        models.assemble(paths[0], paths[2], paths[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n": 0}, "at least 1"),
        ({"samples": -1}, "at least 1"),
        ({"temperature": 0.0}, "temperature"),
        ({"weights": "float16"}, "float32, bfloat16, int8, got 'float16'"),
        ({"samples": range(3, 3)}, "at least 1"),
        ({"frames": torch.zeros(1, 3, 3, 32, 32)}, r"\[B, 4, 3, H, W\]"),
        ({"frames": torch.zeros(1, 4, 3, 30, 32)}, "divisible by 8"),
    ],
)
def test_refusals(predictor, frames, change, message):
    with pytest.raises(UsageError, match=message):
        predictor.predict(**{"frames": frames, **change})


def test_unknown_model_and_wrong_kind(tmp_path):
    with pytest.raises(UsageError, match="unknown model 'nosuch'"):
        fastvid.load("nosuch")
    save_folder(tmp_path / "part", {"x": torch.zeros(1)}, {"kind": "top"})
    with pytest.raises(CheckpointError, match="wanted a predictor"):
        fastvid.load(tmp_path / "part")


def test_weights_that_do_not_fit_their_config_are_refused(predictor, tmp_path):
    predictor.save(tmp_path / "whole")
    tensors, config = load_folder(tmp_path / "whole")
    config["top"]["stack"]["channels"] = 24
    save_folder(tmp_path / "wrong", tensors, config)
    with pytest.raises(CheckpointError, match="do not fit"):
        fastvid.load(tmp_path / "wrong")
