"""What a code costs in bits, under a prior and under the simple distributions that a prior has to beat."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ContextFreeBits(NamedTuple):
    """Bits per code of one distribution for every position.

    fitted: the frequencies of the training codes. oracle: those of the test codes themselves, which no fixed
    distribution can beat. best: the lower of the two.
    """

    fitted: float
    oracle: float
    best: float


class CopyBits(NamedTuple):
    """Bits per code of "the code stays", and the error rate that it was fitted with."""

    bits: float
    error_rate: float


def bits_per_code(logits: Tensor, codes: Tensor) -> Tensor:
    """Mean cost of codes under a prior's logits.

    logits:  [B, ..., K], floating. codes: [B, ...] int64 in [0, K).
    Returns: [B] float64, bits per code of each batch row: cross-entropy / ln 2.
    Raises:  ValueError if the shapes disagree or a row has no code.
    """
    if logits.shape[:-1] != codes.shape or codes.ndim < 2 or codes.numel() == 0:
        raise ValueError(
            f"bits_per_code: `logits` must be [B, ..., K] over `codes` [B, ...], got {list(logits.shape)} and "
            f"{list(codes.shape)}."
        )
    K = logits.shape[-1]
    # float32: a K-way sum of probabilities in half precision would bias the mean
    nats = F.cross_entropy(logits.float().reshape(-1, K), codes.reshape(-1), reduction="none")
    return nats.double().view(codes.shape[0], -1).mean(dim=1) / math.log(2)


def bits_per_dim(bits: Tensor | float, codes: int, dims: int) -> Tensor | float:
    """Cost of all codes of a window, spread over its pixel values; add up the levels of a hierarchy.

    It is what the codes cost under their prior, not a bound on the pixels: the decoder does not give them back exactly,
    and what it leaves out is not counted. So it says nothing beside the bits per dimension of a likelihood model.

    bits:    bits per code, any shape, from 0 on. codes: how many codes of this level a window has.
    dims:    how many values its pixels have: T x H x W x 3 of the frames that the codes stand for.
    Returns: bits * codes / dims, of the shape of `bits`.
    Raises:  ValueError for counts below 1.
    """
    if codes < 1 or dims < 1:
        raise ValueError(f"bits_per_dim: `codes` and `dims` must be at least 1, got {codes} and {dims}.")
    return bits * (codes / dims)


def unigram(codes: Tensor, K: int) -> Tensor:
    """Frequencies of the codes with half a count added to each.

    codes:   int64, any shape, in [0, K).
    Returns: [K] float64, above 0, summing to 1.
    Raises:  ValueError for a code outside [0, K).
    Source:  Krichevsky and Trofimov 1981, doi:10.1109/TIT.1981.1056331.
    """
    counts = _counts("unigram", codes, K, least=0)
    return (counts + 0.5) / (counts.sum() + 0.5 * K)


def code_perplexity(codes: Tensor, K: int) -> tuple[float, int]:
    """Two to the entropy of the codes' frequencies, and how many of the K codes occur at all.

    codes:   int64, any shape, at least one, in [0, K).
    Returns: (perplexity in [1, K], count in [1, K]).
    Raises:  ValueError for no codes or a code outside [0, K).
    """
    counts = _counts("code_perplexity", codes, K)
    return 2 ** _entropy(counts), int((counts > 0).sum())


def context_free_bits(train_codes: Tensor, test_codes: Tensor, K: int) -> ContextFreeBits:
    """Bits per test code of the best distribution that looks at no other code.

    train_codes: int64, any shape, in [0, K): it is fitted to these. test_codes: likewise, at least one.
    Returns:     ContextFreeBits.
    Raises:      ValueError for no test codes or a code outside [0, K).
    """
    counts = _counts("context_free_bits", test_codes, K)
    fitted = float(-(counts * unigram(train_codes, K).log2()).sum() / counts.sum())
    oracle = _entropy(counts)
    return ContextFreeBits(fitted, oracle, min(fitted, oracle))


def copy_bits(
    train_codes: Tensor, train_previous: Tensor, test_codes: Tensor, test_previous: Tensor, K: int
) -> CopyBits:
    """Bits per test code if a code repeats the one at its place a latent step ago, but for a fitted error rate e.

    p(code) is 1 - e for the previous code and shares e among the others by their frequency. On the training codes e is
    the maximum-likelihood one with half a count added to either outcome.

    train_codes, test_codes:       int64, any shape, at least one, in [0, K).
    train_previous, test_previous: the codes one latent step before, of the same shape.
    Returns:                       CopyBits: bits per code, e in (0, 1).
    Raises:                        ValueError if shapes differ, nothing is given, K is 1, or a code lies outside [0, K).
    """
    for codes, previous in ((train_codes, train_previous), (test_codes, test_previous)):
        _check("copy_bits", codes, K)
        _check("copy_bits", previous, K)
        if codes.shape != previous.shape:
            raise ValueError(
                f"copy_bits: codes and the codes before them must have one shape, got {list(codes.shape)} and "
                f"{list(previous.shape)}."
            )
    if K < 2:
        raise ValueError(f"copy_bits: wanted K of at least 2, got {K}; with one code there is nothing to repeat.")
    frequency = unigram(train_codes, K)
    changed = int((train_codes != train_previous).sum())
    e = (changed + 0.5) / (train_codes.numel() + 1)
    # what is left for the others is rescaled, or the distribution would not sum to one
    moved = math.log2(e) + frequency[test_codes].log2() - torch.log1p(-frequency[test_previous]) / math.log(2)
    bits = torch.where(test_codes == test_previous, math.log2(1 - e), moved)
    return CopyBits(float(-bits.mean()), e)


def _entropy(counts: Tensor) -> float:
    """Bits, of counts [K]."""
    share = counts / counts.sum()
    return float(torch.special.entr(share).sum() / math.log(2))


def _counts(name: str, codes: Tensor, K: int, least: int = 1) -> Tensor:
    _check(name, codes, K, least)
    return torch.bincount(codes.reshape(-1), minlength=K).double()


def _check(name: str, codes: Tensor, K: int, least: int = 1) -> None:
    if codes.numel() < least:
        raise ValueError(f"{name}: wanted at least one code, got none.")
    span = [int(end) for end in codes.aminmax()] if codes.numel() else []
    if codes.dtype != torch.int64 or (span and not 0 <= span[0] <= span[1] < K):
        raise ValueError(f"{name}: codes must be int64 in [0, {K}), got {codes.dtype} in {span or 'nothing'}.")
