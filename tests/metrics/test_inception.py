import math

import numpy as np
import pytest
import torch

from fastvid.metrics.inception import inception_score


def test_sure_and_varied_is_the_number_of_classes():
    assert inception_score(torch.eye(7).repeat(3, 1)) == pytest.approx((7.0, 0.0))


def test_unsure_or_all_alike_is_one():
    assert inception_score(torch.full((5, 4), 0.25))[0] == pytest.approx(1.0, abs=1e-12)
    one = torch.tensor([[0.0, 1.0, 0.0]]).repeat(6, 1)
    assert inception_score(one)[0] == 1.0


def test_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)  # their mean is 0.6, 0.4
    first = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    second = 0.3 * math.log(0.3 / 0.6) + 0.7 * math.log(0.7 / 0.4)
    assert inception_score(p)[0] == pytest.approx(math.exp((first + second) / 2), rel=1e-12)


def test_parts_agree_with_numpy():
    p = torch.randn(103, 20, generator=torch.Generator().manual_seed(0)).mul(2).softmax(dim=1).double()
    p = p / p.sum(dim=1, keepdim=True)
    scores = []
    for part in np.array_split(p.numpy(), 10):
        divergence = (part * (np.log(part) - np.log(part.mean(0, keepdims=True)))).sum(1)
        scores.append(np.exp(divergence.mean()))
    assert inception_score(p, splits=10) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_coarse_probabilities_are_taken(dtype):
    p = torch.randn(50, 400, generator=torch.Generator().manual_seed(1)).mul(3).softmax(dim=1)
    mean, std = inception_score(p.to(dtype))
    assert isinstance(mean, float) and std == 0.0
    assert mean == pytest.approx(inception_score(p.double())[0], rel=0.01)


@pytest.mark.parametrize(
    ("probabilities", "splits", "words"),
    [
        (torch.ones(4), 1, "floating \\[n, K\\], got torch.float32 \\[4\\]"),
        (torch.ones(4, 1, dtype=torch.int64), 1, "got torch.int64"),
        (torch.tensor([[2.0, -1.0]]), 1, "take a softmax"),
        (torch.randn(3, 5), 1, "take a softmax"),
        (torch.tensor([[torch.nan, 1.0]]), 1, "take a softmax"),
        (torch.ones(4, 1), 5, "in \\[1, 4\\]"),
        (torch.ones(4, 1), 0, "in \\[1, 4\\]"),
        (torch.ones(0, 3), 1, "in \\[1, 0\\]"),
    ],
)
def test_wrong_arguments_are_refused(probabilities, splits, words):
    with pytest.raises(ValueError, match=words):
        inception_score(probabilities, splits)
