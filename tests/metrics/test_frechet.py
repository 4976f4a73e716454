import numpy as np
import pytest
import torch

from fastvid.metrics.frechet import Moments, bootstrap_frechet, frechet_distance, frechet_from_features


def _features(seed, n, F, rank=None, offset=0.0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    inner = torch.randn(n, rank or F, generator=g, dtype=torch.float64)
    return scale * inner @ torch.randn(rank or F, F, generator=g, dtype=torch.float64) + offset


def _moments(x, *sizes):
    moments = Moments()
    for part in x.split(list(sizes) or len(x)):
        moments.add(part)
    return moments


def _by_the_book(x, y):
    """The formula as it is printed; numpy finds the eigenvalues of the product, some of them complex by rounding."""
    x, y = x.double().numpy(), y.double().numpy()
    a, b = np.atleast_2d(np.cov(x, rowvar=False)), np.atleast_2d(np.cov(y, rowvar=False))
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).sum().real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root


@pytest.mark.parametrize("seed", range(100))
def test_agrees_with_the_formula(seed):
    # F up to 40 and 2 to 80 rows: about half of these covariances lack rank
    g = torch.Generator().manual_seed(1000 + seed)
    n, m, F = (int(torch.randint(low, high, (), generator=g)) for low, high in ((2, 80), (2, 80), (1, 40)))
    x, y = _features(2 * seed, n, F, offset=3.0), _features(2 * seed + 1, m, F, scale=1.5)
    wanted = _by_the_book(x, y)
    assert frechet_from_features(x, y) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(_moments(x), _moments(y)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("n", "m", "F"), [(300, 200, 30), (30, 20, 300), (300, 20, 60), (20, 300, 60)])
def test_both_ways_agree(n, m, F):
    x, y = _features(0, n, F, offset=10.0), _features(1, m, F)
    assert frechet_from_features(x, y) == pytest.approx(frechet_distance(_moments(x), _moments(y)), rel=1e-9)


def test_one_feature_by_hand():
    # Gaussians on a line: (difference of means)^2 + (difference of deviations)^2
    x, y = torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([[2.0], [4.0], [6.0]])
    assert frechet_from_features(x, y) == pytest.approx(4.0**2 + (2.0 - 1.0) ** 2, rel=1e-14)


def test_covariances_that_commute_by_hand():
    x = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    y = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    wanted = ((3 - 1) ** 2 + (2 - 1) ** 2) * 2 / 3
    assert frechet_from_features(x, y) == pytest.approx(wanted, rel=1e-12)
    assert frechet_distance(_moments(x), _moments(y)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_equal_sets_are_nothing_apart(rank):
    x = _features(3, 200, 40, rank, offset=50.0)
    size = float(x.var(dim=0).sum())
    for distance in (frechet_from_features(x, x), frechet_distance(_moments(x), _moments(x))):
        assert 0 <= distance <= 1e-9 * size


def test_rank_that_is_missing_costs_no_digits():
    # y is x moved and stretched along its own 3 directions: the distance is known exactly
    x = _features(4, 50, 100, rank=3)
    y = x.mean(dim=0) + 2 * (x - x.mean(dim=0)) + 1.0
    wanted = 100 + float(x.var(dim=0).sum())
    assert frechet_distance(_moments(x), _moments(y)) == pytest.approx(wanted, rel=1e-12)
    assert frechet_from_features(x, y) == pytest.approx(wanted, rel=1e-12)


def test_features_that_never_vary_leave_the_means():
    x, y = torch.zeros(2, 4), torch.ones(3, 4)
    assert frechet_from_features(x, y) == frechet_distance(_moments(x), _moments(y)) == 4.0


def test_neither_order_nor_side_matters():
    x, y = _features(5, 60, 20), _features(6, 70, 20, offset=0.5)
    assert frechet_from_features(x, y) == pytest.approx(frechet_from_features(y, x.flip(0)), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_moments_in_parts_are_those_of_the_whole(dtype):
    x = _features(7, 100, 12, offset=30.0).to(dtype)
    moments = _moments(x, 1, 0, 2, 60, 37)
    assert moments.count == 100 and moments.mean.dtype == moments.covariance.dtype == torch.float64
    assert torch.allclose(moments.mean, x.double().mean(dim=0), rtol=1e-13)
    assert np.allclose(moments.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-12)


def test_a_large_mean_does_not_cancel_the_covariance():
    x = _features(8, 500, 6)
    wanted = torch.from_numpy(np.cov(x.numpy(), rowvar=False))
    far = (x + 1e6).double()
    covariance = _moments(far, *[50] * 10).covariance
    assert float((covariance - wanted).norm() / wanted.norm()) < 1e-9  # 1e12 of mean squared against 1 would leave 1e-4


def test_moments_that_merge():
    x = _features(9, 90, 8)
    first, second, empty = _moments(x[:30]), _moments(x[30:]), Moments()
    first.merge(second)
    first.merge(empty)
    empty.merge(first)
    for moments in (first, empty):
        assert moments.count == 90
        assert torch.allclose(moments.covariance, _moments(x).covariance, rtol=1e-12)
    assert second.count == 60


def test_moments_are_kept_and_go_on():
    x = _features(10, 80, 8)
    kept = _moments(x[:50]).state()
    moments = Moments.from_state(kept)
    moments.add(x[50:])
    assert moments.count == 80 and torch.allclose(moments.covariance, _moments(x).covariance, rtol=1e-12)
    assert int(kept["count"]) == 50 and torch.equal(kept["mean"], _moments(x[:50]).mean)


@pytest.mark.parametrize("spoilt", [{}, {"count": torch.tensor(3)}, {"scatter": torch.zeros(3, 2)}])
def test_other_tensors_are_no_state(spoilt):
    state = _moments(torch.rand(4, 2)).state()
    with pytest.raises(ValueError, match="wanted count \\[1\\]"):
        Moments.from_state({**state, **spoilt} if spoilt else {})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda: Moments().add(torch.zeros(3, 4, dtype=torch.int64)), "floating features"),
        (lambda: Moments().add(torch.zeros(3)), "floating features"),
        (lambda: Moments().add(torch.tensor([[1.0], [torch.nan], [torch.inf]])), "2 of 3 rows are not"),
        (lambda: _moments(torch.zeros(2, 3)).add(torch.zeros(2, 4)), "wanted 3 features as before, got 4"),
        (lambda: _moments(torch.zeros(1, 3)).covariance, "at least 2 rows, got 1"),
        (lambda: Moments().mean, "at least 1 rows, got 0"),
        (lambda: Moments().state(), "at least 1 rows, got 0"),
        (lambda: frechet_distance(_moments(torch.zeros(2, 3)), _moments(torch.zeros(2, 4))), "the 3 features"),
        (lambda: frechet_from_features(torch.zeros(1, 3), torch.zeros(2, 3)), "at least 2, got \\[1, 3\\]"),
        (lambda: frechet_from_features(torch.zeros(2, 3), torch.zeros(2, 4)), "\\[2, 3\\] and \\[2, 4\\]"),
        (lambda: _interval(torch.arange(9)), "int64 \\[8\\], one a row, got torch.int64 \\[9\\]"),
        (lambda: _interval(torch.arange(8).float()), "got torch.float32"),
        (lambda: _interval(torch.zeros(8, dtype=torch.int64)), "at least two clips"),
        (lambda: _interval(torch.arange(8) + 1, paired=True), "must hold the same clips"),
    ],
)
def test_wrong_arguments_are_refused(spoil, words):
    with pytest.raises(ValueError, match=words):
        spoil()


def _interval(groups_other, paired=False):
    x, y = _features(11, 8, 3), _features(12, 8, 3)
    return bootstrap_frechet(x, y, torch.arange(8), groups_other, paired, draws=2)


def test_interval_lies_around_the_distance():
    x, y = _features(13, 60, 5), _features(14, 50, 5, offset=1.0)
    low, high = bootstrap_frechet(x, y, torch.arange(60), torch.arange(50), False)
    assert 0 <= low < frechet_from_features(x, y) < high


def test_interval_is_as_wide_as_the_figure_varies():
    def pair(seed):
        g = torch.Generator().manual_seed(seed)
        return torch.randn(80, 4, generator=g), 1.5 * torch.randn(80, 4, generator=g) + 1

    spread = torch.tensor([frechet_from_features(*pair(seed)) for seed in range(100)]).std()
    clips = torch.arange(80)
    widths = [bootstrap_frechet(*pair(200 + seed), clips, clips, False) for seed in range(5)]
    ratio = float(np.mean([high - low for low, high in widths]) / (2 * 1.96 * spread))
    assert 0.75 < ratio < 1.5


def test_pairs_are_drawn_together():
    # other clips are the same ones, moved: whichever are drawn, the distance is the move
    x = _features(15, 30, 4, scale=5.0)
    y, clips = x + 1.0, torch.arange(30)
    low, high = bootstrap_frechet(x, y, clips, clips, paired=True)
    assert low == pytest.approx(4.0, rel=1e-9) and high == pytest.approx(4.0, rel=1e-9)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert bootstrap_frechet(x, y[order], clips, order, paired=True) == pytest.approx((4.0, 4.0), rel=1e-9)
    low, high = bootstrap_frechet(x, y, clips, clips, paired=False)
    assert high - low > 1


def test_windows_of_a_clip_are_drawn_together():
    x, y = _features(16, 20, 3), _features(17, 20, 3)
    clips = torch.arange(20)
    low, high = bootstrap_frechet(x.repeat(6, 1), y.repeat(6, 1), clips.repeat(6), clips.repeat(6), False)
    alone = bootstrap_frechet(x.repeat(6, 1), y.repeat(6, 1), torch.arange(120), torch.arange(120), False)
    assert alone[1] - alone[0] < 0.7 * (high - low)


def test_same_seed_same_interval():
    x, y, clips = _features(18, 20, 3), _features(19, 20, 3), torch.arange(20)
    first, again, other = (bootstrap_frechet(x, y, clips, clips, False, 20, seed) for seed in (3, 3, 4))
    assert first == again != other


def test_two_clips_never_draw_one_alone():
    # so every draw is both of them, and the interval, as its docstring says, has no width
    x, y, clips = _features(20, 2, 3), _features(21, 2, 3), torch.arange(2)
    low, high = bootstrap_frechet(x, y, clips, clips, True, draws=50)
    assert low == pytest.approx(high) == pytest.approx(frechet_from_features(x, y))
