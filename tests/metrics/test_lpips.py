import math
import os
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fastvid.metrics import LPIPS
from fastvid.metrics.lpips import PIXELS_AT_ONCE, tensor_shapes

BLACK, WHITE = torch.zeros(3, 64, 64), torch.ones(3, 64, 64)


def _frames(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@cache
def _random(net):
    """Tensors as published ones are named, none of which a right reading may ignore."""
    g = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=g) * (2 / max(1, shape[:-1].numel())) ** 0.5
            for name, shape in tensor_shapes(net).items()}
    return {name: t.abs() if "Lin" in name else t for name, t in made.items()}


@pytest.fixture(scope="module")
def alex(lpips_alex_weights):
    return LPIPS.from_tensors("alex", load_file(lpips_alex_weights))


def test_golden_values_alex(alex, lpips_alex_weights):
    assert alex(BLACK, WHITE).item() == pytest.approx(0.813954, abs=2e-6)
    spatial = LPIPS.from_tensors("alex", load_file(lpips_alex_weights), spatial=True)
    assert spatial(BLACK, WHITE).item() == pytest.approx(0.814043, abs=2e-6)


def test_golden_value_vgg():
    folder = os.environ.get("FASTVID_TEST_WEIGHTS")
    path = Path(folder or "", "lpips_vgg16.safetensors")
    if not folder or not path.is_file():
        pytest.skip(f"needs {path.name} in the folder that FASTVID_TEST_WEIGHTS names, got {folder or 'no folder'}")
    assert LPIPS.from_tensors("vgg", load_file(path))(BLACK, WHITE).item() == pytest.approx(0.453837, abs=2e-6)


def _formula(net, tensors, a, b):
    """The published formula once more, in float64 and step by step, for one pair [3, H, W]: plain and spatial."""
    pools = {"alex": {1: 3, 2: 3}, "vgg": {2: 2, 4: 2, 7: 2, 10: 2}}[net]
    taps = {"alex": range(5), "vgg": (1, 3, 6, 9, 12)}[net]
    prefix = {"alex": "AlexNet_0", "vgg": "VGG16_0"}[net]
    shift, scale = (torch.tensor(v).double()[:, None, None] for v in ((-.030, -.088, -.188), (.458, .448, .450)))
    z = (2 * torch.stack([a, b]).double() - 1 - shift) / scale
    plain = spatial = 0.0
    for i in range(5 if net == "alex" else 13):
        kernel, bias = (tensors[f"{prefix}|Conv_{i}|{part}"].double() for part in ("kernel", "bias"))
        stride, padding = {("alex", 0): (4, 2), ("alex", 1): (1, 2)}.get((net, i), (1, 1))
        if i in pools:
            z = F.max_pool2d(z, pools[i], 2)
        z = F.conv2d(z, kernel.permute(3, 2, 0, 1), bias, stride, padding).clamp(min=0)
        if i in taps:
            x, y = z / (z.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
            head = tensors[f"NetLinLayer_{list(taps).index(i)}|Conv_0|kernel"].double().view(-1, 1, 1)
            distances = (head * (x - y).square()).sum(dim=0)
            plain += distances.mean().item()
            spatial += F.interpolate(distances[None, None], a.shape[-2:], mode="bilinear").mean().item()
    return plain, spatial


@pytest.mark.parametrize(("net", "H", "W"), [("alex", 31, 50), ("alex", 64, 47), ("vgg", 17, 22)])
def test_agrees_with_the_formula(net, H, W):
    a, b = _frames(1, 2, 2, 3, H, W), _frames(2, 2, 2, 3, H, W)
    plain, spatial = (LPIPS.from_tensors(net, _random(net), spatial)(a, b) for spatial in (False, True))
    assert plain.shape == spatial.shape == (2, 2) and plain.dtype == torch.float32
    wanted = _formula(net, _random(net), a[1, 0], b[1, 0])
    assert [plain[1, 0].item(), spatial[1, 0].item()] == pytest.approx(wanted, rel=2e-5)


def test_equal_frames_order_and_noise(alex):
    a = _frames(3, 4, 3, 64, 64)
    assert torch.equal(alex(a, a), torch.zeros(4))
    noisy = [(a + s * torch.randn(a.shape, generator=torch.Generator().manual_seed(4))).clamp(0, 1) for s in (.05, .2)]
    assert torch.allclose(alex(a, noisy[0]), alex(noisy[0], a), rtol=1e-5)
    assert (alex(a, noisy[0]) < alex(a, noisy[1])).all()


def test_in_pieces_equals_whole(alex, monkeypatch):
    a, b = _frames(5, 5, 3, 40, 40), _frames(6, 5, 3, 40, 40)
    whole = alex(a, b)
    monkeypatch.setitem(PIXELS_AT_ONCE, "alex", 2 * 40 * 40)
    assert torch.allclose(alex(a, b), whole, rtol=1e-5)
    assert alex(a[0], b[0]).shape == ()


@pytest.mark.parametrize("pixels", [1 << 19, 5 * 40 * 40])
def test_an_expanded_truth_counts_as_often_as_it_is_given(alex, monkeypatch, pixels):
    monkeypatch.setitem(PIXELS_AT_ONCE, "alex", pixels)
    future, truth = _frames(5, 2, 3, 4, 3, 40, 40), _frames(6, 2, 1, 4, 3, 40, 40)
    seen, features = [], alex._features
    monkeypatch.setattr(alex, "_features", lambda frames: features(frames[seen.append(len(frames)) or slice(None)]))
    expanded, copied = alex(future, truth.expand_as(future)), alex(future, truth.expand_as(future).clone())
    assert torch.allclose(expanded, copied, rtol=1e-5)
    assert torch.equal(alex(truth.expand_as(future), future).argmax(), copied.argmax())
    if pixels == 1 << 19:
        assert seen == [24 + 8, 24 + 24, 8 + 24]


def test_any_floating_dtype_is_computed_in_float32(alex):
    a, b = _frames(7, 3, 48, 48), _frames(8, 3, 48, 48)
    assert torch.equal(alex(a.double(), b.double()), alex(a, b))
    half = alex(a.half(), b.half())
    assert half.dtype == torch.float32 and torch.allclose(half, alex(a, b), rtol=1e-2)


def test_gradients_reach_the_frames_and_nothing_else(alex):
    a = _frames(9, 3, 40, 40).requires_grad_()
    alex(a, torch.zeros(3, 40, 40)).backward()
    assert a.grad.isfinite().all() and a.grad.abs().sum() > 0
    assert list(alex.parameters()) == []


@pytest.mark.parametrize(("net", "least"), [("alex", 31), ("vgg", 16)])
def test_the_least_size_is_the_least(net, least):
    metric = LPIPS.from_tensors(net, _random(net))
    assert math.isfinite(metric(_frames(0, 3, least, least), _frames(1, 3, least, least)))
    small = torch.zeros(3, least - 1, 64)
    with pytest.raises(ValueError, match=f"{net} must be at least {least}x{least}, got {least - 1}x64"):
        metric(small, small)
    with pytest.raises(RuntimeError, match="too small"):  # the check refuses no size that the net could take
        list(metric._features(torch.zeros(1, 3, least - 1, least)))


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.zeros(3, 64, 64), torch.zeros(3, 64, 65), r"got \[3, 64, 64\] and \[3, 64, 65\]"),
        (torch.zeros(1, 64, 64), torch.zeros(1, 64, 64), r"must both be \[..., 3, H, W\]"),
        (torch.zeros(0, 3, 64, 64), torch.zeros(0, 3, 64, 64), "pixels in them"),
        (torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(3, 64, 64), "must be floating"),
    ],
)
def test_wrong_frames_are_refused(a, b, words):
    with pytest.raises(ValueError, match=words):
        LPIPS("alex")(a, b)


def test_random_weights_make_a_distance():
    metric = LPIPS("alex")
    a, b = _frames(0, 2, 3, 40, 40), _frames(1, 2, 3, 40, 40)
    assert torch.equal(metric(a, a), torch.zeros(2)) and (metric(a, b) > 0).all()


def test_wrong_tensors_are_refused():
    tensors = _random("alex")
    missing = {name: t for name, t in tensors.items() if name != "AlexNet_0|Conv_3|bias"}
    with pytest.raises(ValueError, match=r"wants \[256\] as AlexNet_0\|Conv_3\|bias, got nothing"):
        LPIPS.from_tensors("alex", missing)
    with pytest.raises(ValueError, match=r"wants nothing as extra, got \[1\]"):
        LPIPS.from_tensors("alex", tensors | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"got \[64, 1\]"):
        LPIPS.from_tensors("alex", tensors | {"NetLinLayer_0|Conv_0|kernel": torch.zeros(64, 1)})
    with pytest.raises(ValueError, match="one of alex, vgg, got 'squeeze'"):
        LPIPS("squeeze")
