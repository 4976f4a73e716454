"""The cache of codes: right, used when it fits, made again when it does not."""

from dataclasses import asdict

import pytest
import torch
from fake_tasks import Windows

from fastvid import models
from fastvid.errors import DataError, VideoError
from fastvid.train import encode_windows, load_latents
from fastvid.train.latents import as_model_input

IDENTITY = {"vqvae": "abc", "clips": "def"}


@pytest.fixture
def vqvae():
    torch.manual_seed(0)
    return models.build("vqvae", asdict(models.preset("vqvae", "tiny")))


class Counting(Windows):
    """Counts the windows that are read; clips in `bad` cannot be."""

    read = 0
    bad: tuple[int, ...] = ()

    def at(self, clip, start):
        Counting.read += 1
        if clip in self.bad:
            raise VideoError(f"clip{clip}.mp4: cut short")
        return super().at(clip, start)


@pytest.fixture(autouse=True)
def none_read():
    Counting.read = 0


def test_codes_are_those_of_the_whole_window_and_of_its_first_frames_alone(vqvae):
    windows = Windows(clips=5)
    vqvae.train()
    before = {k: v.clone() for k, v in vqvae.state_dict().items()}
    latents = encode_windows(vqvae, windows, "key", batch_size=2)
    assert vqvae.training and all(torch.equal(v, before[k]) for k, v in vqvae.state_dict().items())
    video = as_model_input(windows.clips)
    vqvae.eval()
    for got, want in zip(latents[:4], (*vqvae.encode(video[:, :, :4]), *vqvae.encode(video)), strict=True):
        assert got.dtype == torch.int16 and torch.equal(got.long(), want)
    assert [tuple(c.shape[1:]) for c in latents[:4]] == [(1, 4, 4), (2, 8, 8), (4, 4, 4), (8, 8, 8)]


def test_the_cache_is_used_and_equal(tmp_path, vqvae):
    first = load_latents(tmp_path / "latents", vqvae, Counting(), IDENTITY)
    assert Counting.read == 5
    second = load_latents(tmp_path / "latents", vqvae, Counting(), IDENTITY)
    assert Counting.read == 5
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True)) and first.key == second.key


@pytest.mark.parametrize(("identity", "every"), [
    (IDENTITY | {"vqvae": "other"}, 4), (IDENTITY | {"clips": "other"}, 4), (IDENTITY, 2),
])
def test_a_stale_cache_is_made_again_and_said(tmp_path, vqvae, capfd, identity, every):
    old = load_latents(tmp_path / "latents", vqvae, Counting(seed=1), IDENTITY)
    new = load_latents(tmp_path / "latents", vqvae, Counting(seed=2), identity, every)
    assert Counting.read == 10 and "encoding again" in capfd.readouterr().err
    assert new.key != old.key and not torch.equal(new.bottom, old.bottom)
    load_latents(tmp_path / "latents", vqvae, Counting(seed=2), identity, every)
    assert Counting.read == 10


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_a_damaged_cache_is_made_again_and_said(tmp_path, vqvae, capfd, name):
    first = load_latents(tmp_path / "latents", vqvae, Counting(), IDENTITY)
    file = tmp_path / "latents" / name
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    again = load_latents(tmp_path / "latents", vqvae, Counting(), IDENTITY)
    assert Counting.read == 10 and name in capfd.readouterr().err
    assert torch.equal(first.bottom, again.bottom)


def test_clips_that_cannot_be_decoded_are_named_and_left_out(vqvae, capfd):
    windows = Counting(clips=40)
    windows.bad = (3, 17)
    latents = encode_windows(vqvae, windows, "key")
    assert len(latents.top) == 38
    message = capfd.readouterr().err
    assert message.count("clip3.mp4: cut short") == 1 and message.count("clip17.mp4") == 1
    windows.bad = (3, 17, 20)
    with pytest.raises(DataError, match=r"3 clips cannot be decoded, the last: clip20\.mp4"):
        encode_windows(vqvae, windows, "key")


def test_no_window_at_all(vqvae):
    windows = Windows()
    windows.windows = lambda every: []
    with pytest.raises(DataError, match="no window"):
        encode_windows(vqvae, windows, "key")
