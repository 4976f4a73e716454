import math

import pytest
import torch

from fastvid.metrics import (
    bits_per_code,
    bits_per_dim,
    code_perplexity,
    context_free_bits,
    copy_bits,
    unigram,
)


def _codes(*values):
    return torch.tensor(values, dtype=torch.int64)


def test_bits_of_known_logits():
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(2, 4, 3)
    codes = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 1]])
    assert bits_per_code(logits, codes).tolist() == pytest.approx([1.0, 1.75], abs=1e-6)


def test_bits_ignore_a_shift_of_the_logits():
    logits = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    codes = torch.randint(8, (3, 2, 5), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(bits_per_code(logits, codes), bits_per_code(logits + 7, codes), atol=1e-5)


def test_unigram_adds_half_a_count():
    assert unigram(_codes(0, 0, 0, 1), 4).tolist() == pytest.approx([3.5 / 6, 1.5 / 6, 0.5 / 6, 0.5 / 6])


def test_perplexity_counts_what_is_used():
    perplexity, used = code_perplexity(_codes(1, 1, 3, 3, 5, 5, 7, 7), 512)
    assert perplexity == pytest.approx(4.0)
    assert used == 4
    assert code_perplexity(_codes(2, 2), 8) == (1.0, 1)
    assert code_perplexity(torch.arange(64).repeat(3), 64) == (pytest.approx(64), 64)
    perplexity, used = code_perplexity(_codes([1, 1, 1, 1], [5, 5, 3, 3]), 8)
    assert perplexity == pytest.approx(2**1.5) and used == 3


def test_context_free_by_hand():
    train, test = _codes(0, 0, 0, 1), _codes(0, 1)
    bits = context_free_bits(train, test, 2)
    assert bits.fitted == pytest.approx(-0.5 * (math.log2(3.5 / 5) + math.log2(1.5 / 5)))
    assert bits.oracle == pytest.approx(1.0)
    assert bits.best == bits.oracle


def test_no_fixed_distribution_beats_the_oracle():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        train, test = (torch.randint(6, (n,), generator=g) for n in (200, 15))
        assert context_free_bits(train, test, 6).oracle <= context_free_bits(train, test, 6).fitted + 1e-12


def test_copy_by_hand():
    train, train_previous = _codes(0, 0, 0, 1), _codes(0, 0, 0, 0)  # one of four changes
    test, test_previous = _codes(0, 2), _codes(0, 1)
    bits, e = copy_bits(train, train_previous, test, test_previous, 3)
    assert e == pytest.approx(1.5 / 5)
    u = [3.5 / 5.5, 1.5 / 5.5, 0.5 / 5.5]
    wanted = -0.5 * (math.log2(1 - 0.3) + math.log2(0.3 * u[2] / (1 - u[1])))
    assert bits == pytest.approx(wanted)


def test_copy_is_a_distribution_and_its_error_rate_the_most_likely_one():
    g = torch.Generator().manual_seed(0)
    previous = torch.randint(5, (4000,), generator=g)
    codes = torch.where(torch.rand(4000, generator=g) < 0.2, torch.randint(5, (4000,), generator=g), previous)
    every = torch.arange(5)
    for p in range(5):
        one = [copy_bits(codes, previous, every[c : c + 1], _codes(p), 5).bits for c in range(5)]
        assert sum(2**-b for b in one) == pytest.approx(1.0, abs=1e-12)
    bits, e = copy_bits(codes, previous, codes, previous, 5)
    changed = (codes != previous).double().mean().item()
    assert e == pytest.approx(changed, abs=1e-3)
    assert bits < context_free_bits(codes, codes, 5).best


def test_copy_of_a_still_scene_costs_almost_nothing():
    still = torch.arange(4).repeat(1000)
    assert copy_bits(still, still, still, still, 4).bits < 0.001


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bits_per_code(torch.zeros(2, 3, 4), torch.zeros(2, 2, dtype=torch.int64)), "got \\[2, 3, 4\\]"),
        (lambda: unigram(_codes(0, 4), 4), "\\[0, 4\\), got torch.int64 in \\[0, 4\\]"),
        (lambda: unigram(torch.zeros(3), 4), "must be int64"),
        (lambda: code_perplexity(_codes(), 4), "at least one code"),
        (lambda: context_free_bits(_codes(0), _codes(), 4), "at least one code"),
        (lambda: copy_bits(_codes(0), _codes(0), _codes(0, 1), _codes(0), 4), "one shape"),
        (lambda: copy_bits(_codes(0), _codes(0), _codes(0), _codes(-1), 4), "\\[-1, -1\\]"),
        (lambda: copy_bits(_codes(0), _codes(0), _codes(9), _codes(0), 4), "\\[9, 9\\]"),
        (lambda: copy_bits(_codes(0, 3), _codes(0, 4), _codes(0), _codes(0), 4), "int64 in \\[0, 4\\), .*\\[0, 4\\]"),
        (lambda: copy_bits(_codes(0), _codes(0).int(), _codes(0), _codes(0), 4), "got torch.int32"),
        (lambda: copy_bits(_codes(5), _codes(0), _codes(0), _codes(0), 4), "\\[5, 5\\]"),
        (lambda: copy_bits(_codes(), _codes(), _codes(0), _codes(0), 4), "copy_bits: wanted at least one code"),
        (lambda: copy_bits(_codes(0), _codes(0), _codes(), _codes(), 4), "copy_bits: wanted at least one code"),
        (lambda: copy_bits(_codes(0), _codes(0), _codes(0), _codes(0), 1), "K of at least 2, got 1"),
    ],
)
def test_wrong_codes_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_bits_per_dim_by_hand():
    # two levels of a 64x64 window of 16 frames: 8 x 8 x 8 and 16 x 16 x 16 codes
    dims = 16 * 64 * 64 * 3
    assert bits_per_dim(6.0, 512, dims) + bits_per_dim(3.0, 4096, dims) == pytest.approx((3072 + 12288) / 196608)
    assert torch.equal(bits_per_dim(torch.tensor([2.0, 4.0]), 10, 80), torch.tensor([0.25, 0.5]))
    with pytest.raises(ValueError, match="at least 1, got 0 and 5"):
        bits_per_dim(1.0, 0, 5)
