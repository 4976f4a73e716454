"""Counter-based noise: the published Philox vectors, the law of Gumbel noise, and independence of order and batch."""

import math

import pytest
import torch
from fastvid.kernels.pixelcnn_sampler import cases, reference

from fastvid import ops

# known answers of Philox4x32-10 (Random123's kat_vectors): counter, key, output
VECTORS = [
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0),
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


@pytest.mark.parametrize("counter, key, words", VECTORS)
def test_philox_known_answers(counter, key, words):
    assert [int(w) for w in reference.philox(tuple(torch.tensor(c) for c in counter), key)] == words


def test_noise_is_gumbel():
    noise = ops.gumbel_row(3, torch.arange(8), 0, 0, 0, 32, 512).double().flatten()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772156649) < 0.02 and abs(noise.std() - math.pi / math.sqrt(6)) < 0.02


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_shapes(case, device):
    noise = ops.gumbel_row(0, case.make(device), 1, 2, 3, case.W, case.V)
    assert noise.shape == (case.B, case.W, case.V) and noise.dtype == torch.float32
    assert noise.unique().numel() > 0.99 * noise.numel()


def test_noise_depends_on_every_word_and_not_on_the_batch():
    def row(seed=1, samples=(5,), stream=0, t=2, y=3):
        return ops.gumbel_row(seed, torch.tensor(samples), stream, t, y, 4, 10)

    base = row()
    for other in (row(seed=2), row(seed=1 + (1 << 32)), row(samples=(6,)), row(stream=1), row(t=3), row(y=4)):
        assert (other != base).all()
    assert torch.equal(row(samples=(9, 5, 7))[1:2], base)
    assert base.unique().numel() == base.numel()


def test_draws_follow_the_distribution():
    probability = torch.tensor([0.1, 0.2, 0.3, 0.4])
    noise = ops.gumbel_row(0, torch.arange(500), 0, 0, 0, 64, 4)  # 32,000 draws
    drawn = ops.draw(probability.log().expand_as(noise), noise)
    frequency = drawn.flatten().bincount(minlength=4) / drawn.numel()
    assert (frequency - probability).abs().max() < 0.012  # over four standard errors
    cold = ops.draw(probability.log().expand_as(noise), noise, temperature=0.01)
    assert (cold == 3).double().mean() > 0.99


def test_refusals():
    with pytest.raises(ValueError, match="temperature"):
        ops.draw(torch.zeros(2), torch.zeros(2), temperature=0)
    with pytest.raises(ValueError, match="stream"):
        ops.gumbel_row(0, torch.arange(1), 1 << 15, 0, 0, 4, 4)
    with pytest.raises(ValueError, match="columns"):
        ops.gumbel_row(0, torch.arange(1), 0, 0, 0, 0, 4)
