import math

import pytest
import torch

from fastvid.metrics import best_of


def test_by_hand():
    values = torch.tensor([[[1.0, 2.0], [5.0, 0.0], [2.0, 1.0]], [[0.5, 0.5], [0.25, 0.0], [1.0, 1.0]]])  # [2, 3, 2]
    high, low = best_of(values, higher_is_better=True), best_of(values, higher_is_better=False)
    assert high.index.tolist() == [1, 2] and low.index.tolist() == [0, 1]  # samples 0 and 2 tie: the first counts
    assert high.value.tolist() == [2.5, 1.0] and low.value.tolist() == [1.5, 0.125]
    assert high.curve.tolist() == [[5.0, 0.0], [1.0, 1.0]] and low.curve.tolist() == [[1.0, 2.0], [0.25, 0.0]]
    assert high.mean.tolist() == low.mean.tolist() == pytest.approx([11 / 6, 3.25 / 6])


def test_agrees_with_a_loop():
    values = torch.rand(5, 7, 4, generator=torch.Generator().manual_seed(0))
    told = best_of(values, higher_is_better=False)
    for i, clip in enumerate(values.double()):
        chosen = min(range(7), key=lambda s: clip[s].mean().item())
        assert told.index[i] == chosen
        assert torch.equal(told.curve[i], clip[chosen])
        assert told.value[i].item() == pytest.approx(clip[chosen].mean().item(), rel=1e-15)


def test_more_samples_never_do_worse_and_the_mean_stays_put():
    values = torch.rand(64, 100, 6, generator=torch.Generator().manual_seed(1))
    tens = [best_of(values[:, :n], higher_is_better=True) for n in (1, 10, 100)]
    assert all((more.value >= fewer.value).all() for fewer, more in zip(tens, tens[1:], strict=False))
    assert torch.equal(tens[0].value, tens[0].mean)


def test_an_exact_prediction_has_infinite_psnr_and_is_chosen():
    told = best_of(torch.tensor([[[30.0, 40.0], [math.inf, 20.0]]]), higher_is_better=True)
    assert told.index.tolist() == [1] and told.value.tolist() == [math.inf]
    assert told.curve.tolist() == [[math.inf, 20.0]]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (torch.rand(3, 4), r"\[B, S, n\], none of them 0, got torch.float32 \[3, 4\]"),
        (torch.rand(3, 0, 4), r"got torch.float32 \[3, 0, 4\]"),
        (torch.ones(1, 2, 3, dtype=torch.int64), "must be floating"),
        (torch.tensor([[[1.0], [math.nan]]]), "1 of 2 samples hold a NaN"),
    ],
)
def test_refusals(values, words):
    with pytest.raises(ValueError, match=words):
        best_of(values, higher_is_better=True)
