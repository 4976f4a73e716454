"""The codebook layer: straight-through gradient, start, restart, and what stays float32."""

import pytest
import torch

from fastvid.nn import VectorQuantize, perplexity


def test_straight_through_and_commitment():
    layer = VectorQuantize(4, 8).eval()
    x = torch.randn(2, 3, 4, requires_grad=True)
    quantized, indices, loss = layer(x)
    assert torch.allclose(quantized, layer.lookup(indices)) and indices.shape == (2, 3)
    upstream = torch.randn_like(x)
    (through,) = torch.autograd.grad(quantized, x, upstream, retain_graph=True)
    assert torch.equal(through, upstream)
    (pull,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(pull, 0.25 * 2 * (x - layer.lookup(indices)).detach() / x.numel())


def test_quantised_rows_come_from_the_codebook_before_its_update():
    layer = VectorQuantize(4, 8)
    layer.started.fill_(True)
    before = layer.codebook.clone()
    quantized, indices, _ = layer(torch.randn(64, 4))
    torch.testing.assert_close(quantized, before[indices])
    assert not torch.equal(layer.codebook, before)


def test_first_batch_seeds_the_codebook():
    layer = VectorQuantize(4, 8)
    rows = torch.randn(500, 4) + 100
    layer(rows)
    assert (layer.codebook - 100).abs().max() < 6  # far from the random start around 0
    assert bool(layer.started)


def test_evaluation_moves_nothing():
    layer = VectorQuantize(4, 8).eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer(torch.randn(64, 4))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_dead_codes_are_reborn_with_their_statistics():
    layer = VectorQuantize(2, 4, decay=0.5, dead_below=0.2)
    layer.started.fill_(True)
    layer.codebook.copy_(torch.tensor([[0.0, 0], [1, 1], [500, 500], [600, 600]]))
    layer.cluster_sum.copy_(layer.codebook)
    rows = torch.rand(256, 2)
    for _ in range(3):
        layer(rows)
    assert layer.codebook.abs().max() < 2
    # a code revived alone would be averaged back: its sum over its count must agree with it
    torch.testing.assert_close(layer.cluster_sum / layer.cluster_size[:, None], layer.codebook, rtol=1e-2, atol=1e-2)


def test_training_finds_clusters():
    centres = 10 * torch.randn(16, 8)
    layer = VectorQuantize(8, 16, decay=0.8, dead_below=1.0)
    for _ in range(60):
        rows = centres[torch.randint(16, (512,))] + 0.1 * torch.randn(512, 8)
        layer(rows)
    nearest = torch.cdist(centres, layer.codebook).amin(1)
    assert (nearest < 0.5).float().mean() > 0.8


def test_half_precision_input_keeps_a_float32_codebook():
    layer = VectorQuantize(4, 8)
    quantized, _, _ = layer(torch.randn(32, 4, dtype=torch.bfloat16))
    assert quantized.dtype == torch.bfloat16 and layer.codebook.dtype == torch.float32


def test_wrong_width_is_refused():
    with pytest.raises(ValueError, match="D = 4"):
        VectorQuantize(4, 8)(torch.zeros(2, 5))


def test_perplexity():
    assert perplexity(torch.tensor([0, 1, 2, 3]), 10).item() == pytest.approx(4)
    assert perplexity(torch.zeros(7, dtype=torch.int64), 10).item() == pytest.approx(1)
