"""DVD-GAN: shapes and parameter counts of every preset, conditioning, truncation, interpolation, prediction, errors."""

import dataclasses

import pytest
import torch
from torch import nn

from fastvid.errors import UsageError
from fastvid.models import (
    PRESETS,
    DVDGANConfig,
    DVDGANGenerator,
    DVDGANPredictor,
    SpatialDiscriminator,
    TemporalDiscriminator,
    build,
    load,
)
from fastvid.models.dvd_gan import generator_of

CONFIGS = PRESETS["dvdgan"]
TINY, TINY_FP = CONFIGS["tiny"], CONFIGS["tiny-fp"]
CLASSED = dataclasses.replace(TINY, classes=3)


def made(config: DVDGANConfig, kind=generator_of) -> nn.Module:
    torch.manual_seed(0)
    return kind(config).eval()


def noise(config: DVDGANConfig, count: int = 2) -> torch.Tensor:
    return torch.randn(count, config.latent, generator=torch.Generator().manual_seed(1))


# --- shapes and counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize("config", [TINY, CLASSED, TINY_FP], ids=["plain", "classes", "given"])
def test_all_networks_have_the_right_shapes_and_every_weight_a_gradient(variant, config):
    config = dataclasses.replace(config, variant=variant)
    generator = made(config).train()
    label = torch.tensor([0, 2]) if config.classes else None
    given = torch.rand(2, 3, config.given, 16, 16) if config.given else None
    video = generator(noise(config), label, given=given)
    assert video.shape == (2, 3, 4, 16, 16) and video.abs().max() <= 1
    seen = video if given is None else torch.cat([given * 2 - 1, video], dim=2)
    spatial, temporal = made(config, SpatialDiscriminator).train(), made(config, TemporalDiscriminator).train()
    scores = spatial(seen, label), temporal(seen, label)
    assert all(score.shape == (2,) for score in scores)
    sum(score.sum() for score in scores).backward()
    without = [name for net in (generator, spatial, temporal) for name, p in net.named_parameters() if p.grad is None]
    assert without == []


def conv(cin: int, cout: int, taps: int = 9) -> int:
    return cin * cout * taps + cout


def generator_count(c: DVDGANConfig) -> int:
    """Numbers of a version 2 generator, summed by hand."""
    widths, condition = [c.width * units for units in c.groups], c.latent + (c.embedding if c.classes else 0)
    total = c.classes * c.embedding + conv(condition, 16 * widths[0], 1)
    for cin, cout in zip([widths[0], *widths], widths, strict=False):
        total += 3 * conv(cin + cout, cout) + 4 * conv(cout, cout) + 4 * 2 * condition * cout + conv(cout, cout, 1)
    return total + 2 * condition * widths[-1] + conv(widths[-1], 3)


def discriminator_count(c: DVDGANConfig, volumes: int) -> int:
    widths = [3, *(c.discriminator_width * units for units in c.discriminator)]
    total = widths[-1] + 1 + c.classes * widths[-1]
    for level, (cin, cout) in enumerate(zip(widths, widths[1:], strict=False)):
        taps = 27 if level < volumes else 9
        total += conv(cin, cout, taps) + conv(cout, cout, taps) + conv(cin, cout, 1)
    return total


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", ["digits32", "tiny"])
def test_parameter_counts_are_those_of_the_layers(name):
    for config in (CONFIGS[name], dataclasses.replace(CONFIGS[name], classes=10)):
        assert count(made(config)) == generator_count(config)
        assert count(made(config, SpatialDiscriminator)) == discriminator_count(config, 0)
        assert count(made(config, TemporalDiscriminator)) == discriminator_count(config, 2)


@pytest.mark.parametrize("name, millions", [("64x48", 328.4), ("128x12", 336.5), ("256x12", 338.6)])
def test_the_paper_sizes_have_their_counts(name, millions):
    assert generator_count(CONFIGS[name]) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_presets_end_at_their_size(name):
    config = CONFIGS[name]
    assert 4 << len(config.groups) == config.size == 4 << len(config.discriminator)
    assert config.shown % 4 == 0


# --- what the networks must not mix up -----------------------------------------------------------------------------


def test_samples_depend_on_their_number_and_class_alone():
    generator = made(CLASSED)
    together = generator.sample(3, [0, 1, 2], seed=5)
    alone = generator.sample(1, [2], seed=5, numbers=[2])
    assert together.shape == (3, 4, 3, 16, 16) and 0 <= together.min() and together.max() <= 1
    torch.testing.assert_close(alone[0], together[2], atol=1e-5, rtol=0)
    assert not torch.equal(generator.sample(1, [0], seed=5), generator.sample(1, [1], seed=5))
    assert not torch.equal(together, generator.sample(3, [0, 1, 2], seed=6))


def test_both_truncations_are_what_they_say():
    generator = made(TINY)
    plain = generator.noise(2000, seed=1)
    assert plain.std() == pytest.approx(1, abs=0.02) and plain.mean() == pytest.approx(0, abs=0.02)
    torch.testing.assert_close(generator.noise(2000, seed=1, truncation=0.44), 0.44 * plain)
    cut = generator.noise(2000, seed=1, truncation=0.5, kind="truncated")
    assert 0.49 < cut.abs().max() <= 0.5
    # the variance of a standard normal cut at 0.5 is 1 - 2 * 0.5 * density(0.5) / mass
    assert cut.std() == pytest.approx((1 - 0.3520653 / 0.3829249) ** 0.5, abs=0.01)


def test_interpolations_begin_and_end_at_their_ends():
    generator = made(CLASSED)
    first, second = generator.noise(2)
    classes = generator.between_classes(first, 0, 2, steps=5)
    ends = generator.sample(2, [0, 2], numbers=[0, 0])
    torch.testing.assert_close(classes[[0, -1]], ends, atol=1e-5, rtol=0)
    noises = generator.between_noises(first, second, label=1, steps=5)
    torch.testing.assert_close(noises[[0, -1]], generator.sample(2, [1, 1]), atol=1e-5, rtol=0)
    assert not torch.equal(noises[2], noises[0])


def test_standing_statistics_replace_the_running_ones_and_change_no_weight():
    generator = made(CLASSED)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    generator.standing_statistics(batches=2, batch=4, seed=3)
    after = generator.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "norm.running_mean" in moved and "norm.running_var" in moved
    assert not any(name.endswith(("original", "bias")) for name in moved)
    assert not generator.training
    predictor = made(TINY_FP)
    with pytest.raises(ValueError, match="need `given`"):
        predictor.standing_statistics()
    predictor.standing_statistics(batches=1, batch=2, given=torch.rand(3, 3, 4, 16, 16))
    assert predictor.norm.num_batches_tracked == 1 and predictor.norm.running_mean.abs().max() > 0


def test_the_discriminators_look_at_what_they_say():
    config = dataclasses.replace(TINY, frames=8)
    spatial, temporal = made(config, SpatialDiscriminator), made(config, TemporalDiscriminator)
    video = torch.rand(2, 3, 8, 16, 16)
    chosen = torch.tensor([[0, 2, 3], [1, 4, 7]])
    changed = video.clone()
    changed[0, :, 5] = 0
    assert torch.equal(spatial(video, frames=chosen), spatial(changed, frames=chosen))
    assert not torch.equal(temporal(video)[0], temporal(changed)[0])
    each = torch.stack([spatial(video, frames=chosen[:, i : i + 1]) for i in range(3)]).sum(0)
    torch.testing.assert_close(spatial(video, frames=chosen), each)
    # half size: what vanishes in 2x2 means is invisible to the temporal one
    fine = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8) * 0.1
    torch.testing.assert_close(temporal(video + fine), temporal(video), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(spatial(video + fine, frames=chosen), spatial(video, frames=chosen), atol=1e-3)


def test_drawn_frames_are_different_ones_in_order():
    spatial = made(dataclasses.replace(TINY, frames=4, spatial_frames=4), SpatialDiscriminator)
    video = torch.rand(2, 3, 4, 16, 16)
    torch.testing.assert_close(spatial(video), spatial(video, frames=torch.arange(4).expand(2, 4)))


def test_every_weight_layer_has_a_spectral_norm_of_one():
    torch.manual_seed(0)
    for network in (DVDGANGenerator(CLASSED), SpatialDiscriminator(CLASSED), TemporalDiscriminator(CLASSED)):
        layers = {n: m for n, m in network.named_modules() if isinstance(getattr(m, "weight", None), torch.Tensor)}
        assert len(layers) > 5
        for name, layer in layers.items():
            largest = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2)
            assert largest == pytest.approx(1, abs=0.1), name


def test_checkpointing_changes_neither_gradients_nor_statistics():
    found = []
    for checkpointing in (False, True):
        generator = made(CLASSED).train()
        generator.checkpointing = checkpointing
        generator(noise(CLASSED), torch.tensor([1, 2])).square().sum().backward()
        gradients = {name: p.grad for name, p in generator.named_parameters()}
        found.append(gradients | dict(generator.named_buffers()))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], msg=name)


# --- prediction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_prediction_goes_on_from_the_given_frames(variant):
    model = made(dataclasses.replace(TINY_FP, variant=variant))
    frames = torch.rand(2, 4, 3, 16, 16)
    made_frames = model.predict(frames, n=6, samples=2, seed=3)
    assert made_frames.shape == (2, 2, 6, 3, 16, 16)
    assert torch.equal(model.predict(frames[1:], n=3, samples=range(1, 2), seed=3)[0, 0], made_frames[1, 1, :3])
    other = frames.clone()
    other[0] = 1 - other[0]
    changed = model.predict(other, n=6, samples=2, seed=3)
    assert torch.equal(changed[1], made_frames[1]) and not torch.equal(changed[0], made_frames[0])


def test_a_saved_model_draws_the_same_videos(tmp_path):
    generator = made(CLASSED)
    generator.standing_statistics(batches=1, batch=4)
    for dtype, atol in ((torch.float32, 0), (torch.float16, 0.02)):
        generator.save(tmp_path / str(dtype), dtype)
        again = load(tmp_path / str(dtype))
        torch.testing.assert_close(again.sample(2, [0, 1]), generator.sample(2, [0, 1]), atol=atol, rtol=0)
    whole, half = (sum(f.stat().st_size for f in (tmp_path / str(d)).iterdir()) for d in (torch.float32, torch.float16))
    assert half < 0.75 * whole


def test_a_config_survives_its_dict():
    config = dataclasses.replace(TINY, classes=2, class_names=("left", "right"))
    again = build("dvdgan", {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()})
    assert again.config == config and type(again) is DVDGANGenerator
    assert type(build("dvdgan", dataclasses.asdict(TINY_FP))) is DVDGANPredictor


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, told", [
    ({"size": 48}, "size must be 4 times a power of two"),
    ({"groups": (2, 1, 1)}, "groups must be 2 numbers"),
    ({"discriminator": (1,)}, "discriminator must be 2 numbers"),
    ({"frames": 6}, "multiple of 4; got 0 \\+ 6"),
    ({"spatial_frames": 5}, "spatial_frames must lie in 1..4, got 5"),
    ({"variant": "v3"}, "variant must be v1 or v2, got 'v3'"),
    ({"variant": "v1", "width": 3}, "multiples of 8"),
    ({"classes": 2, "class_names": ("a",)}, "2 classes and 1 names"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(change, told):
    with pytest.raises(UsageError, match=told):
        dataclasses.replace(TINY, **change)


def test_inputs_that_do_not_fit_are_refused():
    generator, classed, predictor = made(TINY), made(CLASSED), made(TINY_FP)
    z = noise(TINY)
    for call, told in [
        (lambda: generator(z[:, :3]), r"`z` must be \[B, 8\], got \[2, 3\]"),
        (lambda: generator(z, torch.tensor([0, 0])), "the model has no classes"),
        (lambda: classed(z), "has 3 classes; pass `label` or `embedding`"),
        (lambda: classed(z, torch.tensor([0, 3])), r"classes must lie in 0..2, got \[0, 3\]"),
        (lambda: classed(z, torch.tensor([0.0, 1.0])), "int64"),
        (lambda: classed(z, embedding=torch.zeros(2, 5)), r"\[2, 4\] beside this z, got \[2, 5\]"),
        (lambda: generator(z, given=torch.zeros(2, 3, 4, 16, 16)), "given=0"),
        (lambda: predictor(z), r"`given` must be \[2, 3, 4, 16, 16\]"),
        (lambda: made(TINY, SpatialDiscriminator)(torch.zeros(1, 1, 4, 16, 16)), r"\[B, 3, 4, 16, 16\]"),
        (lambda: made(TINY, TemporalDiscriminator)(torch.zeros(1, 3, 5, 16, 16)), r"\[B, 3, 4, 16, 16\]"),
        (lambda: made(CLASSED, TemporalDiscriminator)(torch.zeros(1, 3, 4, 16, 16)), "both be there"),
    ]:
        with pytest.raises(ValueError, match=told):
            call()
    for call, told in [
        (lambda: generator.sample(2, truncation=0), "truncation must be a finite number above 0"),
        (lambda: generator.noise(2, kind="cut"), "scaled or truncated, got 'cut'"),
        (lambda: classed.sample(2, [0]), r"wanted 2 classes in 0..2"),
        (lambda: generator.sample(1, [0]), "no classes"),
        (lambda: predictor.predict(torch.zeros(1, 3, 3, 16, 16)), r"\[B, 4, 3, 16, 16\]"),
        (lambda: predictor.predict(torch.zeros(1, 4, 3, 16, 16), n=0), "n and samples from 1 on"),
        (lambda: DVDGANPredictor(TINY), "given > 0"),
    ]:
        with pytest.raises(UsageError, match=told):
            call()
