"""nearest_codebook and its moving average against their definitions in float64."""

import pytest
import torch
from fastvid.kernels.nearest_codebook import cases

from fastvid import ops


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_lookup_regret(case, device):
    x, codebook = case.make(device)
    near = ops.nearest_codebook(x, codebook)
    exact = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    chosen = exact.gather(1, near.indices[:, None]).squeeze(1)
    # rounding may flip a near tie; it may not cost more than rounding
    scale = x.double().square().sum(1) + codebook.double().square().sum(1).max()
    assert (chosen - exact.amin(1) <= 8 * torch.finfo(x.dtype).eps * scale).all()
    torch.testing.assert_close(near.squared_distance.double(), chosen, rtol=1e-4, atol=1e-4 * float(scale.max()))
    assert torch.equal(near.quantized, codebook[near.indices])


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_statistics(case, device):
    x, codebook = case.make(device)
    near = ops.nearest_codebook(x, codebook)
    one_hot = torch.nn.functional.one_hot(near.indices, case.K).double()
    assert torch.equal(near.counts, one_hot.sum(0).long())
    torch.testing.assert_close(near.sums.double(), one_hot.T @ x.double(), rtol=1e-5, atol=1e-3)


def test_empty_batch():
    near = ops.nearest_codebook(torch.zeros(0, 4), torch.randn(8, 4))
    assert near.indices.shape == (0,) and near.quantized.shape == (0, 4)
    assert near.counts.tolist() == [0] * 8 and near.sums.abs().sum() == 0


def test_ties_go_to_the_lowest_index():
    codebook = torch.tensor([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert ops.nearest_codebook(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), codebook).indices.tolist() == [1, 1]


def test_non_contiguous_rows():
    x, codebook = torch.randn(16, 40).T, torch.randn(8, 32)[:, ::2]
    assert torch.equal(
        ops.nearest_codebook(x, codebook).indices,
        ops.nearest_codebook(x.contiguous(), codebook.contiguous()).indices,
    )


def test_far_from_the_origin():
    # a common offset must not cost the small differences between codes
    x, codebook = torch.randn(500, 8, dtype=torch.float64), torch.randn(64, 8, dtype=torch.float64)
    moved = ops.nearest_codebook((x + 300).float(), (codebook + 300).float()).indices
    assert (moved == ops.nearest_codebook(x, codebook).indices).double().mean() > 0.99


def test_ema_matches_its_formula():
    K, D, decay, eps = 6, 3, 0.9, 1e-3
    codebook, sums = torch.randn(K, D), torch.randn(K, D)
    size, total, counts = torch.rand(K) + 0.5, torch.randn(K, D), torch.tensor([3, 0, 1, 5, 0, 2])
    N = decay * size.double() + (1 - decay) * counts
    m = decay * total.double() + (1 - decay) * sums.double()
    expected = m / ((N + eps) / (N.sum() + K * eps) * N.sum())[:, None]
    ops.nearest_codebook_ema_(codebook, size, total, counts, sums, decay=decay, eps=eps)
    torch.testing.assert_close(codebook.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(size.double(), N, rtol=1e-6, atol=0)
    torch.testing.assert_close(total.double(), m, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "x, codebook, message",
    [
        (torch.zeros(4, 3), torch.zeros(8, 2), "codebook's width"),
        (torch.zeros(4, 3), torch.zeros(0, 3), "K, D > 0"),
        (torch.zeros(4, 3, dtype=torch.int64), torch.zeros(8, 3), "floating"),
    ],
)
def test_refusals(x, codebook, message):
    with pytest.raises(ValueError, match=message):
        ops.nearest_codebook(x, codebook)


def test_half_precision_state_is_refused():
    half = torch.zeros(4, 2, dtype=torch.float16)
    with pytest.raises(ValueError, match="float32"):
        ops.nearest_codebook_ema_(half, torch.ones(4), torch.zeros(4, 2), torch.ones(4), torch.zeros(4, 2))
