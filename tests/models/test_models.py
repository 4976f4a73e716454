"""The models' sizes as published, every latent shape, gradients, and the window of the bottom prior."""

from dataclasses import asdict, replace

import pytest
import torch

from fastvid import models
from fastvid.errors import UsageError
from fastvid.models.predictor import bottom_window

# pixels of a frame, bottom grid, top grid
SHAPES = {"paper": (256, 64, 32), "dino64": (64, 16, 8), "push64": (64, 16, 8), "tiny": (32, 8, 4)}


def make(kind, name):
    return models.build(kind, asdict(models.preset(kind, name)))


@pytest.mark.parametrize("kind, published", [("top", 418e6), ("bottom", 241e6)])
def test_paper_parameter_counts(kind, published):
    with torch.device("meta"):
        stack = make(kind, "paper").stack
    count = sum(p.numel() for p in stack.core_parameters())
    assert abs(count / published - 1) < 0.01
    assert count < sum(p.numel() for p in stack.parameters())  # input tables apart


@pytest.mark.parametrize("name", SHAPES)
def test_latent_shapes(name):
    pixels, fine, coarse = SHAPES[name]
    with torch.device("meta"):
        vqvae, top, bottom = (make(kind, name) for kind in ("vqvae", "top", "bottom"))
        level_top, level_bottom, _ = vqvae.eval()._quantize(torch.zeros(2, 3, 16, pixels, pixels))
        assert level_top.indices.shape == (2, 4, coarse, coarse)
        assert level_bottom.indices.shape == (2, 8, fine, fine)
        K = vqvae.config.codes
        codes = torch.zeros(2, 3, coarse, coarse, dtype=torch.int64)
        given = (codes[:, :1], torch.zeros(2, 2, fine, fine, dtype=torch.int64))
        assert top.condition(*given).shape == (2, 3, coarse, coarse, top.config.stack.condition_channels)
        assert top(codes, *given).shape == (2, 3, coarse, coarse, K)
        window = torch.zeros(2, 4, fine, fine, dtype=torch.int64)
        index, tops = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4, coarse, coarse, dtype=torch.int64)
        assert bottom(window[:, 0], index, tops, window).shape == (2, fine, fine, K)


@pytest.mark.parametrize("kind", ["top", "bottom"])
def test_the_wavefront_preset_has_the_same_sizes(kind):
    config, twin = models.preset(kind, "dino64-wavefront"), models.preset(kind, "dino64")
    assert config.stack.wavefront and replace(config, stack=replace(config.stack, wavefront=False)) == twin
    model = models.build(kind, asdict(config))  # as from a saved config
    assert model.stack.config.wavefront and all(layer.attention is None or layer.attention.axial
                                                for layer in model.stack.layers)
    older = {name: value for name, value in asdict(twin.stack).items() if name != "wavefront"}
    assert models.build(kind, asdict(twin) | {"stack": older}).config == twin  # configs saved before there was a choice


@pytest.mark.parametrize("size", [(16, 32, 32), (4, 32, 32), (8, 16, 40)])
def test_vqvae_round_trip_shapes(size):
    vqvae = make("vqvae", "tiny").eval()
    video = torch.rand(2, 3, *size)
    top, bottom = vqvae.encode(video)
    T, H, W = size
    assert top.shape == (2, T // 4, H // 8, W // 8) and bottom.shape == (2, T // 2, H // 4, W // 4)
    decoded = vqvae.decode(top, bottom)
    assert decoded.shape == video.shape and decoded.min() >= 0 and decoded.max() <= 1
    # decoding the codes is what the forward reconstructs
    torch.testing.assert_close(decoded, vqvae(video).reconstruction.clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_vqvae_learns_a_batch():
    vqvae = make("vqvae", "tiny").train()
    video = torch.nn.functional.interpolate(torch.rand(2, 3, 2, 4, 4), (8, 32, 32), mode="trilinear")
    optimizer = torch.optim.Adam(vqvae.parameters(), 3e-3)
    before = {name: p.detach().clone() for name, p in vqvae.named_parameters()}
    losses = []
    for _ in range(60):
        out = vqvae(video)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.reconstruction_loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert [name for name, p in vqvae.named_parameters() if torch.equal(p, before[name])] == []


def test_masking_hides_the_bottom_level():
    vqvae = make("vqvae", "tiny")
    video = torch.rand(1, 3, 8, 32, 32)
    hidden = vqvae.eval().decode(vqvae.encode(video)[0], None)
    vqvae.config = type(vqvae.config)(**{**asdict(vqvae.config), "mask_probability": 1.0})
    for quantizer in (vqvae.quantize_top, vqvae.quantize_bottom):
        quantizer._codebook.initted.fill_(True)
    torch.testing.assert_close(vqvae.train()(video).reconstruction.clamp(0, 1), hidden, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(vqvae.eval()(video).reconstruction.clamp(0, 1), hidden, atol=1e-3)


def test_priors_have_gradients_everywhere():
    top, bottom = make("top", "tiny"), make("bottom", "tiny")
    codes = torch.randint(32, (2, 3, 4, 4))
    given = torch.randint(32, (2, 1, 4, 4)), torch.randint(32, (2, 2, 8, 8))
    top(codes, *given).square().sum().backward()
    window = torch.randint(-1, 32, (2, 4, 8, 8))
    tops = torch.randint(32, (2, 4, 4, 4))
    bottom(window[:, 0].clamp(min=0), torch.tensor([2, 7]), tops, window).square().sum().backward()
    for prior in (top, bottom):
        unread = [n for n, p in prior.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
        assert unread == [], unread


@pytest.mark.parametrize("kind", ["top", "bottom"])
@torch.no_grad()
def test_the_future_never_touches_the_past(kind):
    prior = make(kind, "tiny").eval()
    grid, context = {
        "top": ((3, 4, 4), (torch.randint(32, (1, 1, 4, 4)), torch.randint(32, (1, 2, 8, 8)))),
        "bottom": ((8, 8), (torch.tensor([5]), torch.randint(32, (1, 4, 4, 4)), torch.randint(-1, 32, (1, 4, 8, 8)))),
    }[kind]
    codes = torch.randint(32, (1, *grid))
    before = prior(codes, *context).flatten(1, -2)  # [1, N, K]
    for p in torch.randint(codes.numel(), (100,)).tolist():
        changed = codes.flatten().clone()
        changed[p] = (changed[p] + 1 + p % 31) % 32
        after = prior(changed.view_as(codes), *context).flatten(1, -2)
        assert torch.equal(after[:, : p + 1], before[:, : p + 1])
        assert p + 1 == codes.numel() or not torch.equal(after[:, p + 1 :], before[:, p + 1 :])


def test_bottom_window():
    bottom = torch.arange(8).view(1, 8, 1, 1)
    assert bottom_window(bottom, 6, 4).flatten().tolist() == [2, 3, 4, 5]
    assert bottom_window(bottom, 2, 4).flatten().tolist() == [-1, -1, 0, 1]


def test_refusals():
    with pytest.raises(UsageError, match="dino64"):
        models.preset("vqvae", "dyno")
    with pytest.raises(ValueError, match="divisible by 4"):
        make("vqvae", "tiny").encode(torch.zeros(1, 3, 5, 32, 32))
    with pytest.raises(ValueError, match="four given frames"):
        two_steps = torch.zeros(1, 2, 4, 4, dtype=torch.int64)
        make("top", "tiny").condition(two_steps, torch.zeros(1, 2, 8, 8, dtype=torch.int64))
    with pytest.raises(UsageError, match="no field"):
        models.build("vqvae", {"hiden": 3})
