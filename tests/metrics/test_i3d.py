import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from fastvid.metrics import i3d as room
from fastvid.metrics.frechet import frechet_from_features
from fastvid.metrics.i3d import I3D, MIXED, I3DOutput, features, preprocess


@pytest.fixture(scope="module")
def published(i3d_weights):
    return I3D.from_tensors(load_file(i3d_weights))


@pytest.fixture(scope="module")
def tensors():
    """Random tensors by the names of the published file, of a size that keeps the maps alive to the end."""
    g, made = torch.Generator().manual_seed(0), {}

    def unit(name, C, width, k):
        made[f"params|{name}|Conv_0|kernel"] = torch.randn(k, k, k, C, width, generator=g) * (2 / (C * k**3)) ** 0.5
        made[f"params|{name}|BatchNorm_0|bias"] = 0.3 * torch.randn(width, generator=g)
        made[f"batch_stats|{name}|BatchNorm_0|mean"] = 0.3 * torch.randn(1, 1, 1, 1, width, generator=g)
        made[f"batch_stats|{name}|BatchNorm_0|var"] = 0.5 + torch.rand(1, 1, 1, 1, width, generator=g)
        return width

    C = unit("Conv3d_2c_3x3", unit("Conv3d_2b_1x1", unit("Conv3d_1a_7x7", 3, 64, 7), 64, 1), 192, 3)
    for name, (a, b, c, d, e, f) in MIXED.items():
        block = f"Mixed_{name}|Branch_"
        unit(f"{block}0|Conv3d_0a_1x1", C, a, 1)
        unit(f"{block}1|Conv3d_0b_3x3", unit(f"{block}1|Conv3d_0a_1x1", C, b, 1), c, 3)
        unit(f"{block}2|Conv3d_0b_3x3", unit(f"{block}2|Conv3d_0a_1x1", C, d, 1), e, 3)
        unit(f"{block}3|Conv3d_0b_1x1", C, f, 1)
        C = a + c + e + f
    made["params|Logits|Conv3d_0c_1x1|Conv_0|kernel"] = torch.randn(1, 1, 1, C, 400, generator=g) / C**0.5
    made["params|Logits|Conv3d_0c_1x1|Conv_0|bias"] = torch.randn(400, generator=g)
    return made


def _pad_same(x, kernel, stride):
    """Zeros by TensorFlow's rule: as many outputs as ceil(size / stride), the odd zero behind."""
    pads = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def _plain_i3d(tensors, x, eps):
    """The network as its paper draws it: a convolution a unit, zeros written out, nothing folded or joined."""

    def unit(x, name, stride=1):
        weight = tensors[f"params|{name}|Conv_0|kernel"].permute(4, 3, 0, 1, 2)
        x = F.conv3d(_pad_same(x, weight.shape[2:], [stride] * 3), weight, stride=stride)
        mean, var = (tensors[f"batch_stats|{name}|BatchNorm_0|{which}"].flatten() for which in ("mean", "var"))
        x = (x - mean.view(-1, 1, 1, 1)) / (var.view(-1, 1, 1, 1) + eps).sqrt()
        return (x + tensors[f"params|{name}|BatchNorm_0|bias"].view(-1, 1, 1, 1)).relu()

    def pool(x, kernel, stride):
        x = _pad_same(x, kernel, stride).contiguous(memory_format=torch.channels_last_3d)  # pools are faster so
        return F.max_pool3d(x, kernel, stride)

    x = pool(unit(x, "Conv3d_1a_7x7", 2), (1, 3, 3), (1, 2, 2))
    x = pool(unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
    for name in MIXED:
        x = {"4b": lambda x: pool(x, (3, 3, 3), (2, 2, 2)), "5b": lambda x: pool(x, (2, 2, 2), (2, 2, 2))}.get(
            name, lambda x: x
        )(x)
        block = f"Mixed_{name}|Branch_"
        x = torch.cat([
            unit(x, f"{block}0|Conv3d_0a_1x1"),
            unit(unit(x, f"{block}1|Conv3d_0a_1x1"), f"{block}1|Conv3d_0b_3x3"),
            unit(unit(x, f"{block}2|Conv3d_0a_1x1"), f"{block}2|Conv3d_0b_3x3"),
            unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{block}3|Conv3d_0b_1x1"),
        ], dim=1)  # fmt: skip
    x = F.avg_pool3d(x, (2, 7, 7), 1)
    kernel = tensors["params|Logits|Conv3d_0c_1x1|Conv_0|kernel"].permute(4, 3, 0, 1, 2)
    logits = F.conv3d(x, kernel, tensors["params|Logits|Conv3d_0c_1x1|Conv_0|bias"])
    return x.mean(dim=(2, 3, 4)), logits.mean(dim=(2, 3, 4))


def test_agrees_with_the_plain_network(tensors, device):
    # 9 frames: odd in time twice on the way down; autocast must not reach the network
    clips = torch.rand(1, 3, 9, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pooled, logits = _plain_i3d(tensors, clips, eps=0.1)
    i3d = I3D.from_tensors(tensors, eps=0.1).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = i3d(clips.to(device))
    try:
        for word in ("ieee", "tf32"):  # what the user allows afterwards still reaches every convolution
            torch.backends.fp32_precision = word
            assert torch.backends.cudnn.conv.fp32_precision == word
    finally:
        torch.backends.fp32_precision = "none"
    assert logits.std() > 0.1 and pooled.std() > 0.01  # the random network tells something
    for got, wanted in ((ours.pooled, pooled), (ours.logits, logits)):
        assert got.shape == wanted.shape and float((got.cpu() - wanted).norm() / wanted.norm()) < 2e-5


def test_a_convolution_on_cuda_refuses_tf32_in_the_call(monkeypatch):
    x, weight, bias = torch.randn(1, 4, 6, 7, 8), torch.randn(5, 4, 3, 3, 3), torch.randn(5)
    real, calls = torch.ops.aten._convolution, []
    monkeypatch.setattr(torch.ops.aten, "_convolution", lambda *given: calls.append(given) or real(*given))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # no such device is needed to see what is asked of it
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    got = room._conv(x, weight, bias, 2, [1, 0, 1])
    assert torch.equal(got, real(x, weight, bias, [2] * 3, [1, 0, 1], [1] * 3, False, [0] * 3, 1, *[False] * 4))
    assert torch.allclose(got, F.conv3d(x.double(), weight.double(), bias.double(), 2, [1, 0, 1]).float(), atol=1e-5)
    asked = dict(zip([argument.name for argument in real.default._schema.arguments], calls[0], strict=True))
    assert asked["allow_tf32"] is False and asked["cudnn_enabled"] is True


def _black_and_white(T):
    return torch.stack([torch.zeros(3, T, 64, 64), torch.ones(3, T, 64, 64)])


def _apart(black, white):
    """Sets that do not vary: what is left are the means."""
    return frechet_from_features(black.expand(2, -1), white.expand(2, -1))


def test_distance_of_black_and_white_clips(published):
    together = published(preprocess(_black_and_white(15)))
    assert _apart(*together.logits) == pytest.approx(133.908, abs=1e-3)


def test_distance_of_black_and_white_clips_as_published(published):
    # the published code prints 151.39244, this network in float64 gives 151.39248
    assert _apart(*features(published, _black_and_white(30)).logits) == pytest.approx(151.39247, rel=5e-6)


def _ramps():
    t, y, x = torch.meshgrid(torch.arange(16), torch.arange(64), torch.arange(64), indexing="ij")
    return (torch.stack([4 * x + 8 * t, 4 * y + 16 * t, 2 * (x + y) + 4 * t]) % 256).float().unsqueeze(0) / 255


@pytest.mark.parametrize(
    ("resize", "norm", "first"),
    [("torch", 40.20931, [1.27029, 1.79126, 3.25368, 2.74500, -0.27240]), ("tf1", 39.85102, None)],
)
def test_logits_of_moving_ramps(published, resize, norm, first):
    logits = features(published, _ramps(), resize).logits[0]
    assert float(logits.norm()) == pytest.approx(norm, rel=1e-5)
    assert first is None or logits[:5].tolist() == pytest.approx(first, abs=1e-4)


class _Counting(nn.Module):
    """Takes the place of the network: says what it was given."""

    def __init__(self):
        super().__init__()
        self.classes, self.asked = nn.Linear(1, 1), []

    def forward(self, clips):
        self.asked.append(len(clips))
        return I3DOutput(clips.mean(dim=(2, 3, 4)), self.classes.weight * clips.amax(dim=(1, 2, 3, 4)).unsqueeze(1))


@pytest.mark.parametrize(("frames", "parts"), [(16, [1, 1, 1, 1, 1]), (18, [2, 2, 1]), (1, [1] * 5), (900, [5])])
def test_features_are_taken_of_a_few_clips_at_a_time(monkeypatch, frames, parts):
    monkeypatch.setitem(room._FRAMES_AT_ONCE, "cpu", frames)
    counting, video = _Counting(), torch.rand(5, 3, 9, 20, 30)
    output = features(counting, video, "torch")
    assert counting.asked == parts and not output.logits.requires_grad
    assert torch.allclose(output.pooled, preprocess(video, "torch").mean(dim=(2, 3, 4)), atol=1e-6)


@pytest.fixture(scope="module")
def fresh():
    return I3D()


def test_a_fresh_network_folds_to_itself(fresh):
    fresh = copy.deepcopy(fresh)
    unit = fresh.conv_2c
    unit.mean.uniform_(-1, 1)
    unit.variance.uniform_(0.5, 2)
    unit.bias.data.uniform_(-1, 1)
    x = torch.rand(1, 64, 3, 6, 5)
    folded = copy.deepcopy(fresh).fold().fold()
    assert torch.allclose(folded.conv_2c(x), unit(x), atol=1e-5)
    assert not any("mean" in name or "variance" in name for name in folded.state_dict())
    assert not fresh.training and not any(p.requires_grad for p in fresh.parameters())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop("params|Mixed_4c|Branch_2|Conv3d_0b_3x3|Conv_0|kernel"), "Mixed_4c.*0b_3x3.*missing"),
        (lambda t: t.update({"params|Mixed_5d|x": torch.zeros(1)}), "1 tensors have no place in it, params.Mixed_5d"),
        (lambda t: t.update({"params|Conv3d_1a_7x7|BatchNorm_0|bias": torch.zeros(63)}), "must make \\[64\\]"),
        (lambda t: t.update({"params|Conv3d_1a_7x7|BatchNorm_0|bias": torch.zeros(())}), "must make \\[64\\]"),
        (lambda t: t.update({"params|Conv3d_2b_1x1|Conv_0|kernel": torch.zeros(64, 64)}), "must have 5 axes"),
        (lambda t: t.update({"params|Logits|Conv3d_0c_1x1|Conv_0|kernel": torch.zeros(1, 1, 1, 1024, 600)}),
         "must make \\[400, 1024\\], got \\[\\[600, 1024\\]\\]"),
    ],
)  # fmt: skip
def test_other_tensors_are_refused(tensors, spoil, words):
    spoilt = dict(tensors)
    spoil(spoilt)
    with pytest.raises(ValueError, match=words):
        I3D.from_tensors(spoilt)


@pytest.mark.parametrize(
    ("clips", "words"),
    [
        (torch.zeros(1, 3, 8, 224, 224), "at least 9 frames, got 8"),
        (torch.zeros(1, 3, 9, 64, 64), "got torch.float32 \\[1, 3, 9, 64, 64\\]"),
        (torch.zeros(1, 1, 9, 224, 224), "floating \\[B, 3, T, 224, 224\\]"),
        (torch.zeros(1, 3, 9, 224, 224, dtype=torch.uint8), "got torch.uint8"),
    ],
)
def test_other_clips_are_refused(fresh, clips, words):
    with pytest.raises(ValueError, match=words):
        fresh(clips)


@pytest.mark.parametrize(("H", "W"), [(64, 64), (1, 1), (5, 224), (224, 300), (240, 320)])
@pytest.mark.parametrize("resize", ["tf1", "torch"])
def test_resize_by_hand(resize, H, W):
    frames = torch.randint(0, 256, (1, 3, 2, H, W))
    got = preprocess(frames.double() / 255, resize)

    def matrix(size):
        """[224, size]: what each output takes of each input."""
        half = 0.5 if resize == "torch" else 0.0
        where = np.clip((np.arange(224) + half) * size / 224 - half, 0, size - 1)
        low = np.minimum(where.astype(int), size - 1)
        taken = np.zeros((224, size))
        np.add.at(taken, (np.arange(224), low), 1 - (where - low))
        np.add.at(taken, (np.arange(224), np.minimum(low + 1, size - 1)), where - low)
        return taken

    wanted = 2 * (matrix(H) @ frames.double().numpy() @ matrix(W).T) / 255 - 1
    assert got.dtype == torch.float32 and np.abs(got.numpy() - wanted).max() < 5e-5


def test_values_are_rounded_to_eight_bits():
    video = torch.full((1, 3, 1, 224, 224), 0.501)  # 127.755 of 255
    assert torch.equal(preprocess(video), torch.full_like(video, 128) / 127.5 - 1)
    assert torch.equal(preprocess(torch.ones_like(video), "torch"), torch.ones_like(video))


@pytest.mark.parametrize(
    ("video", "resize", "words"),
    [
        (torch.zeros(1, 3, 9, 8, 8), "bicubic", "one of tf1, torch, got 'bicubic'"),
        (torch.zeros(3, 9, 8, 8), "tf1", "got torch.float32 \\[3, 9, 8, 8\\]"),
        (torch.zeros(1, 3, 9, 0, 8), "tf1", "with pixels"),
        (torch.zeros(1, 3, 9, 8, 8, dtype=torch.uint8), "tf1", "got torch.uint8"),
        (torch.full((1, 3, 9, 8, 8), 255.0), "tf1", "in \\[0, 1\\], got \\[255.0, 255.0\\]; scale it"),
        (torch.full((1, 3, 9, 8, 8), torch.nan), "tf1", "got \\[nan, nan\\]"),
    ],
)
def test_other_videos_are_refused(video, resize, words):
    with pytest.raises(ValueError, match=words):
        preprocess(video, resize)
