import pytest
import torch

from fastvid.metrics import bootstrap_interval


def test_agrees_with_the_normal_interval_of_a_mean():
    g = torch.Generator().manual_seed(0)
    values = torch.randn(2000, generator=g, dtype=torch.float64) * 3 + 10
    low, high = bootstrap_interval(values, torch.arange(2000))
    mean, half = float(values.mean()), 1.96 * float(values.std()) / 2000**0.5
    assert low == pytest.approx(mean - half, abs=0.02)
    assert high == pytest.approx(mean + half, abs=0.02)


def test_repeating_a_clip_s_windows_adds_no_certainty():
    values = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alone = bootstrap_interval(values, torch.arange(50))
    repeated = bootstrap_interval(values.repeat_interleave(7), torch.arange(50).repeat_interleave(7))
    assert repeated == pytest.approx(alone)
    # taken for 350 independent windows they would look far surer
    low, high = bootstrap_interval(values.repeat_interleave(7), torch.arange(350))
    assert high - low < 0.6 * (alone[1] - alone[0])


def test_the_statistic_is_of_means_over_windows():
    values = torch.tensor([[0.01, 1.0], [0.01, 3.0]])
    low, high = bootstrap_interval(values, torch.tensor([4, 4]), lambda mean: mean[:, 1] - mean[:, 0])
    assert low == high == pytest.approx(1.99)


def test_same_seed_same_interval():
    values, groups = torch.rand(20), torch.arange(20)
    assert bootstrap_interval(values, groups, seed=3) == bootstrap_interval(values, groups, seed=3)
    assert bootstrap_interval(values, groups, seed=3) != bootstrap_interval(values, groups, seed=4)


@pytest.mark.parametrize("at_once", [1, 7 * 50, 1000 * 50 - 1])
def test_draws_in_slices_are_those_of_one_table(monkeypatch, at_once):
    values, groups = torch.rand(120, 3), torch.arange(120) % 50
    whole = bootstrap_interval(values, groups, lambda mean: mean.sum(dim=1))
    randint, sizes = torch.randint, []
    monkeypatch.setattr("fastvid.metrics.interval._DRAWN_AT_ONCE", at_once)
    monkeypatch.setattr(torch, "randint", lambda high, size, **kw: sizes.append(size) or randint(high, size, **kw))
    assert bootstrap_interval(values, groups, lambda mean: mean.sum(dim=1)) == pytest.approx(whole, rel=1e-12)
    assert sum(rows for rows, _ in sizes) == 1000 and max(rows for rows, _ in sizes) == max(1, at_once // 50)


def test_wrong_groups_are_refused():
    with pytest.raises(ValueError, match="got \\[3\\] and \\[2\\]"):
        bootstrap_interval(torch.zeros(2), torch.zeros(3, dtype=torch.int64))
