import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fastvid.metrics import psnr, ssim


def _pictures(seed, *shape):
    g = torch.Generator().manual_seed(seed)
    smooth = torch.rand(shape, generator=g).cumsum(-1).cumsum(-2)
    a = smooth / smooth.max()
    return a, (a + 0.2 * torch.randn(shape, generator=g)).clamp(0, 1)


def test_psnr_by_hand():
    a = torch.full((2, 3, 4, 5), 0.5)
    b = a.clone()
    b[0] += 0.1  # mse 0.01 -> 20 dB
    b[1, 0] += 0.3  # a third of the values off by 0.3: mse 0.03
    assert psnr(a.double(), b.double()).tolist() == pytest.approx([20.0, -10 * math.log10(0.03)], abs=1e-5)


def test_psnr_of_equal_frames_is_infinite():
    a = torch.rand(3, 8, 8)
    assert psnr(a, a) == math.inf


def test_ssim_by_hand_on_flat_frames():
    # without variance only the luminance term is left: (2ab + c1) / (a^2 + b^2 + c1)
    a, b = torch.full((1, 16, 16), 0.5), torch.full((1, 16, 16), 0.25)
    wanted = (2 * 0.5 * 0.25 + 1e-4) / (0.25 + 0.0625 + 1e-4)
    assert ssim(a, b).item() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(("H", "W"), [(64, 64), (11, 11), (37, 50)])
def test_ssim_agrees_with_scikit_image(H, W):
    a, b = _pictures(H, 5, 3, H, W)
    for x, y, ours in zip(a, b, ssim(a, b), strict=True):
        _, full = structural_similarity(
            x.double().numpy(), y.double().numpy(), channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, full=True,
        )
        # scikit-image reflects at the border; where the window fits both see the same pixels
        assert ours.item() == pytest.approx(np.mean(full[:, 5 : H - 5, 5 : W - 5]), abs=1e-6)


def _published():
    """Two 64x64 images whose likeness systems of the field have reported: ramps that wrap, one of them shifted."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    a = torch.stack([4 * x, 4 * y, 2 * (x + y)]) % 256
    b = torch.stack([4 * x + 32, 4 * y + 64, 2 * (x + y) + 16]) % 256
    return a.double() / 255, b.double() / 255


def test_golden_values():
    a, b = _published()
    assert ssim(a, b).item() == pytest.approx(0.803917, abs=5e-7)
    assert ssim(a, b, window="uniform7").item() == pytest.approx(0.797480, abs=5e-7)
    # the squares of all differences of 0..255, added up in whole numbers
    assert psnr(a, b).item() == pytest.approx(-10 * math.log10(82_345_984 / (3 * 64 * 64 * 255**2)), abs=1e-12)
    assert psnr(a, b).item() == pytest.approx(9.869192, abs=1e-6)  # as published, computed in float32


@pytest.mark.parametrize("window", ["gaussian11", "uniform7"])
@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_100_random_cases_against_scikit_image(window, data_range):
    words = {"gaussian11": {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False},
             "uniform7": {"win_size": 7, "use_sample_covariance": True}}[window]
    rng = np.random.default_rng(7)
    for case in range(25 if window == "gaussian11" else 75):
        C, H, W = int(rng.integers(1, 5)), *rng.integers(11, 48, 2).tolist()
        a, b = (x.double() for x in _pictures(100 + case, C, H, W))
        theirs = structural_similarity(a.numpy(), b.numpy(), channel_axis=0, data_range=data_range, **words)
        assert ssim(a, b, window, data_range).item() == pytest.approx(theirs, rel=1e-6)
        ratios = [peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=1.0) for x, y in zip(a, b, strict=True)]
        assert psnr(a, b, channels="mean").item() == pytest.approx(np.mean(ratios), rel=1e-6)
        theirs = peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1.0)
        assert psnr(a, b).item() == pytest.approx(theirs, rel=1e-6)


def test_a_wider_range_hides_differences():
    a, b = _published()
    assert ssim(a, b, "uniform7", data_range=2.0) > ssim(a, b, "uniform7")
    # scaling values and range together changes nothing
    assert ssim(2 * a, 2 * b, "uniform7", 2.0).item() == pytest.approx(ssim(a, b, "uniform7").item(), rel=1e-12)


def test_psnr_of_channels():
    a = torch.zeros(3, 4, 4, dtype=torch.float64)
    b = torch.stack([torch.full((4, 4), v) for v in (0.1, 0.1, 0.01)]).double()
    assert psnr(a, b, channels="mean").item() == pytest.approx((20 + 20 + 40) / 3, abs=1e-6)
    assert psnr(a, b, channels="joint").item() == pytest.approx(-10 * math.log10(0.0201 / 3), abs=1e-6)


def test_ssim_knows_equal_frames_and_order_does_not_matter():
    a, b = _pictures(1, 2, 4, 3, 20, 24)
    assert torch.allclose(ssim(a, a), torch.ones(2, 4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(ssim(a, b), ssim(b, a), atol=1e-12)
    assert ssim(a, b).shape == (2, 4)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_more_noise_is_worse(metric):
    a, _ = _pictures(2, 3, 32, 32)
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(3))
    values = [metric(a, a + s * noise).item() for s in (0.01, 0.05, 0.2)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_in_pieces_equals_whole(monkeypatch, metric):
    a, b = _pictures(4, 7, 3, 16, 16)
    whole = metric(a, b)
    for pixels in (4 * 16 * 16, 1):  # the last piece is smaller; a plane is never cut
        monkeypatch.setattr("fastvid.metrics.pixel._PIXELS_AT_ONCE", pixels)
        assert torch.allclose(metric(a, b), whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(("planes", "side"), [(40, 16), (10, 32), (3, 64)])
def test_large_frames_are_held_a_few_at_a_time(monkeypatch, metric, planes, side):
    monkeypatch.setattr("fastvid.metrics.pixel._PIXELS_AT_ONCE", 4096)
    double, sizes = torch.Tensor.double, []
    monkeypatch.setattr(torch.Tensor, "double", lambda x: sizes.append(x.numel()) or double(x))
    metric(torch.rand(planes, 1, side, side), torch.rand(planes, 1, side, side))
    assert max(sizes) == 4096 and sum(sizes) == 2 * planes * side**2  # whatever the size of a plane


@pytest.mark.parametrize(
    ("metric", "a", "b", "words"),
    [
        (psnr, torch.zeros(3, 8, 8), torch.zeros(3, 8, 9), "got \\[3, 8, 8\\] and \\[3, 8, 9\\]"),
        (psnr, torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8), "must be floating"),
        (ssim, torch.zeros(8, 8), torch.zeros(8, 8), "C, H, W"),
        (ssim, torch.zeros(3, 10, 64), torch.zeros(3, 10, 64), "at least 11x11, got 10x64"),
    ],
)
def test_wrong_frames_are_refused(metric, a, b, words):
    with pytest.raises(ValueError, match=words):
        metric(a, b)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a: psnr(a, a, channels="luma"), "one of joint, mean, got 'luma'"),
        (lambda a: ssim(a, a, window="gaussian7"), "of gaussian11, uniform7 .* got 'gaussian7'"),
        (lambda a: ssim(a, a, data_range=0.0), "above 0, got 'gaussian11' and 0.0"),
        (lambda a: ssim(a[..., :6], a[..., :6], window="uniform7"), "at least 7x7, got 16x6"),
    ],
)
def test_wrong_words_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.rand(3, 16, 16))
