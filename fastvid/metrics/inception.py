"""Inception score: how sure a classifier is of each sample, and how varied it finds them all."""

import torch
from torch import Tensor


def inception_score(probabilities: Tensor, splits: int = 1) -> tuple[float, float]:
    """Exponential of the mean divergence between a sample's classes and the classes of all samples.

    probabilities: [n, K], floating, rows at least 0 and summing to 1 (a softmax); n at least `splits`.
    splits:        the samples are scored in so many consecutive parts, as even as can be.
    Returns:       (mean, standard deviation) over the parts (1 / splits), float64; each part's score is in [1, K].
    Raises:        ValueError for another shape or dtype, rows that are no probabilities, or too few samples.
    Source:        Salimans et al. 2016, arXiv:1606.03498.
    """
    if probabilities.ndim != 2 or not probabilities.is_floating_point():
        raise ValueError(
            f"inception_score: `probabilities` must be floating [n, K], got {probabilities.dtype} "
            f"{list(probabilities.shape)}."
        )
    p = probabilities.detach().double()
    off = (p.sum(dim=1) - 1).abs()
    # float16 keeps three digits; a row of logits is far further off. Written so that NaN fails, too
    if not bool(((off < 5e-3) & (p >= 0).all(dim=1)).all()):
        raise ValueError("inception_score: rows of `probabilities` must be at least 0 and sum to 1; take a softmax.")
    if not 1 <= splits <= len(p):
        raise ValueError(f"inception_score: `splits` must be in [1, {len(p)}], the number of samples, got {splits}.")
    scores = torch.stack([_score(part) for part in p.tensor_split(splits)])
    return float(scores.mean()), float(scores.std(correction=0))


def _score(p: Tensor) -> Tensor:
    # the mean divergence is the entropy of the mean less the mean entropy
    gain = torch.special.entr(p.mean(dim=0)).sum() - torch.special.entr(p).sum(dim=1).mean()
    return gain.clamp(min=0).exp()  # rounding may leave it below zero
