"""Swapping masked convolutions, whoever wrote them: the same parameters and numbers, and reasons for what stays."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvid import accelerate
from fastvid.nn import DenseMasked, DenseMaskedConv2d, DenseMaskedConv3d, MaskedConv2d


def fill(mask: torch.Tensor, mask_type: str) -> None:
    """Mask A or B of [..., *kernel], as it is usually written."""
    middle = [k // 2 for k in mask.shape[2:]]
    for axis in range(len(middle)):
        later = (slice(None), slice(None), *middle[:axis], slice(middle[axis] + 1, None))
        mask[later] = 0
    if mask_type == "A":
        mask[(slice(None), slice(None), *middle)] = 0


class InPlace(nn.Conv2d):
    """Zeroes its weights whenever it runs."""

    def __init__(self, mask_type, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mask_type = mask_type
        self.register_buffer("mask", torch.ones_like(self.weight))
        fill(self.mask, mask_type)

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


class Product(nn.Conv2d):
    """Multiplies by a mask [kh, kw] that no state dict holds."""

    def __init__(self, mask_type, *args, **kwargs):
        super().__init__(*args, **kwargs)
        mask = torch.ones(1, 1, *self.kernel_size, dtype=torch.bool)
        fill(mask, mask_type)
        self.register_buffer("mask", mask[0, 0], persistent=False)

    def forward(self, input):
        return F.conv2d(input, self.weight * self.mask, self.bias, self.stride, self.padding, self.dilation)


class Video(nn.Conv3d):
    """In raster order of three axes."""

    def __init__(self, mask_type, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones_like(self.weight))
        fill(self.mask, mask_type)

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class OwnFrame(Video):
    """Masked in each frame, and sees the frames on both sides."""

    def __init__(self, *args, **kwargs):
        super().__init__("A", *args, **kwargs)
        self.mask[:] = self.mask[:, :, 1:2]


class Inside(nn.Module):
    """Masks a convolution inside: here one that sees all the rows above."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(*args, **kwargs)
        mask = torch.ones(self.conv.kernel_size)
        mask[len(mask) // 2:] = 0
        self.register_buffer("mask", mask[None, None])

    def forward(self, x):
        self.conv.weight.data *= self.mask
        return self.conv(x)


class PixelCNN(nn.Module):
    """Masked layers of several makes, one of them used twice, with batch norm and dropout between."""

    def __init__(self):
        super().__init__()
        self.first = InPlace("A", 3, 8, 7, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.ModuleList([Product("B", 8, 8, 3, padding=1), Product("B", 8, 8, (3, 5), padding="same"),
                                   InPlace("B", 8, 8, 3, padding=2, dilation=2)])  # fmt: skip
        self.again = self.body[0]
        self.drop = nn.Dropout(0.1)
        self.video = Video("B", 8, 8, (3, 3, 3), padding=1)
        self.frames = OwnFrame(8, 8, (3, 3, 3), padding=1)
        self.rows = Inside(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        h = self.norm(self.first(x))
        for layer in (*self.body, self.again):
            h = h + self.drop(layer(torch.relu(h)))
        video = h.unflatten(0, (-1, 2)).movedim(1, 2)  # [B, C, T, H, W]
        video = self.frames(torch.relu(self.video(video)))
        h = video.movedim(2, 1).flatten(0, 1)
        return self.head(h + self.rows(h))


NAMES = ["first", "body.0", "body.1", "body.2", "again", "video", "frames", "rows"]


def train(model, optimizer, steps):
    losses = []
    for n in steps:
        torch.manual_seed(n)
        x = torch.randn(4, 3, 6, 7)
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("before", [0, 3])
def test_training_goes_on_as_if_nothing_had_happened(before):
    torch.manual_seed(0)
    model = PixelCNN()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    train(model, optimizer, range(before))
    plain, plain_optimizer = copy.deepcopy((model, optimizer))
    held = [*model.parameters(), *model.buffers(), *model.state_dict(keep_vars=True).values()]
    keys, random = [*model.state_dict()], torch.get_rng_state()
    report = accelerate(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert report.left == {} and [*report.swapped] == NAMES and report.module is model
    assert report.swapped["first"] == f"{__name__.split('.')[0]} InPlace -> fastvid.nn.DenseMaskedConv2d"
    kinds = {name: type(model.get_submodule(name)) for name in NAMES}
    assert kinds.pop("rows") is DenseMasked
    assert kinds.pop("video") is kinds.pop("frames") is DenseMaskedConv3d and {*kinds.values()} == {DenseMaskedConv2d}
    assert model.again is model.body[0] and model.first.mask_type == "A"
    now = [*model.parameters(), *model.buffers(), *model.state_dict(keep_vars=True).values()]
    assert [*map(id, now)] == [*map(id, held)] and [*model.state_dict()] == keys
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), f"{name} has changed"
    steps = range(before, before + 5)
    assert train(model, optimizer, steps) == pytest.approx(train(plain, plain_optimizer, steps), rel=1e-4)
    ours, theirs = copy.deepcopy(model).eval(), plain.eval()
    x = torch.randn(2, 3, 6, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), theirs(x))


def test_hidden_weights_get_no_gradient():
    model = nn.Sequential(Product("A", 2, 3, 3, padding=1))
    accelerate(model)
    model(torch.randn(1, 2, 4, 4)).square().sum().backward()
    grad = model[0].weight.grad  # [3, 2, 3, 3]
    assert grad.flatten(2)[:, :, 4:].eq(0).all() and grad.flatten(2)[:, :, :4].ne(0).all()


def test_a_second_call_finds_nothing():
    model = PixelCNN()
    accelerate(model)
    again = accelerate(model)
    assert again.swapped == {} and again.left == {}


def test_ours_and_those_without_a_mask_are_not_meant():
    other = nn.Sequential(nn.Conv2d(3, 3, 3))
    other.register_buffer("mask", torch.ones(7))  # of something else
    report = accelerate(nn.Sequential(MaskedConv2d("A", 2, 3, 3), nn.Conv2d(3, 3, 1), other))
    assert report.swapped == {} and report.left == {}


def masked(layer: nn.Module, mask_type: str = "B") -> nn.Module:
    layer.register_buffer("mask", torch.ones_like(layer.weight))
    fill(layer.mask, mask_type)
    return layer


class Scaled(Product):
    def forward(self, x):
        return super().forward(x) * 1.0001


class Conditioned(Product):
    def forward(self, x, h=None):
        return super().forward(x) if h is None else super().forward(x) + h


class Noisy(Product):
    def forward(self, x):
        return super().forward(x) + self.training * torch.randn(())


class Normalised(Product):
    def forward(self, x):
        self.weight.data /= self.weight.data.norm()
        return super().forward(x)


class Pair(Product):
    def forward(self, x):
        return super().forward(x), self.mask


class Narrow(Product):
    def forward(self, x):
        assert x.shape[-1] == 64, "frames are 64 wide"
        return super().forward(x)


class Extra(Product):
    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(()))


def red_green_blue(layer):
    layer.mask[1:, :, 1, 1] = 1  # the second colour sees the first one at its own position
    return layer


def half_mask(layer):
    layer.mask[:, :, 0] = 0.5
    return layer


def hooked(layer):
    layer.conv.register_forward_hook(lambda *_: None)
    return layer


def patched(layer):
    layer.forward = layer.forward
    return layer


@pytest.mark.parametrize(
    "layer, reason",
    [
        (lambda: masked(nn.Conv2d(2, 2, 3)), "more than, or other than, a convolution with the masked weight"),
        (lambda: Scaled("B", 2, 2, 3), "more than, or other than"),
        (lambda: Noisy("B", 2, 2, 3), "more than, or other than"),
        (lambda: Normalised("B", 2, 2, 3), "more than, or other than"),
        (lambda: Pair("B", 2, 2, 3), "more than, or other than"),
        (lambda: Narrow("B", 2, 2, 3), "AssertionError: frames are 64 wide"),
        (lambda: Conditioned("B", 2, 2, 3), r"takes \(x, h=None\), not one tensor"),
        (lambda: Extra("B", 2, 2, 3), "holds more than weight, bias and mask: gain"),
        (lambda: nn.utils.parametrizations.spectral_norm(Product("B", 2, 2, 3)), "bias and mask: parametrizations"),
        (lambda: patched(Product("B", 2, 2, 3)), "forward was replaced"),
        (lambda: hooked(Inside(2, 2, 3)), "the convolution inside has hooks"),
        (lambda: Inside(2, 2, 3, stride=2), r"`stride` is taken only as"),
        (lambda: InPlace("B", 2, 2, 3, stride=2), r"`stride` is taken only as \(1, 1\), got \(2, 2\)"),
        (lambda: InPlace("B", 2, 2, 3, groups=2), "`groups` is taken only as 1, got 2"),
        (lambda: InPlace("B", 2, 2, 3, padding=1, padding_mode="circular"), "`padding_mode` is taken only as zeros"),
        (lambda: InPlace("A", 2, 2, 1), "leaves no tap"),
        (lambda: masked(nn.Conv2d(2, 2, 1)), "mask hides nothing"),
        (lambda: red_green_blue(InPlace("A", 3, 3, 3)), "differs between channels"),
        (lambda: half_mask(InPlace("A", 3, 3, 3)), "must be 0 and 1"),
        (lambda: InPlace("A", 3, 3, 3).to("meta"), "weight is a Parameter on meta"),
    ],
)  # fmt: skip
def test_what_ours_cannot_stand_for_stays_with_its_reason(layer, reason):
    model = nn.Sequential(Product("B", 2, 2, 3), layer())
    kept, state = model[1], copy.deepcopy(model[1].state_dict())
    report = accelerate(model)
    assert model[1] is kept and [*report.swapped] == ["0"]
    assert re.search(reason, report.left["1"]), report.left["1"]
    if not next(iter(state.values())).is_meta:
        assert all(torch.equal(tensor, state[name]) for name, tensor in model[1].state_dict().items())


def test_hooks_flags_and_dtypes_are_kept():
    model = nn.Sequential(InPlace("A", 2, 4, 3, padding=1), Product("B", 4, 4, 3)).to(torch.bfloat16)
    model[0].eval()
    model[1].bias.requires_grad_(False)
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[1].register_forward_pre_hook(lambda *_: calls.append("before"))
    report = accelerate(model)
    assert [*report.swapped] == ["0", "1"] and calls == []  # what runs to compare is a copy without hooks
    assert not model[0].training and model[1].training and not model[1].bias.requires_grad
    assert model(torch.randn(1, 2, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16 and calls == ["after", "before"]
    handle.remove()
    model(torch.randn(1, 2, 5, 5, dtype=torch.bfloat16))
    assert calls == ["after", "before", "before"]


def test_a_layer_by_itself_is_returned():
    layer = Video("A", 2, 3, (3, 3, 3), padding=1)
    report = accelerate(layer)
    assert isinstance(report.module, DenseMaskedConv3d) and report.module.weight is layer.weight
    x = torch.randn(1, 2, 2, 4, 4)
    torch.testing.assert_close(report.module(x), layer(x))


def test_a_swapped_layer_refuses_another_mask():
    inside = accelerate(Inside(2, 3, 3)).module
    with pytest.raises(RuntimeError, match="mask is of another layer: this one was made with its own mask"):
        inside.load_state_dict(inside.state_dict() | {"mask": torch.ones(3, 3)})
    layer = accelerate(InPlace("A", 2, 3, 3)).module
    with pytest.raises(RuntimeError, match="mask is of another layer: this one was made with mask A"):
        layer.load_state_dict(InPlace("B", 2, 3, 3).state_dict())
    layer.load_state_dict(InPlace("A", 2, 3, 3).state_dict())


def test_outputs_lie_in_memory_as_torch_lays_them():
    plain, x = Product("B", 4, 6, 3, padding=1), torch.randn(2, 4, 5, 7)
    layer = accelerate(copy.deepcopy(plain)).module
    for module in (plain, layer):
        assert module(x).is_contiguous() and module(x[0]).is_contiguous()
        assert module(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
        module.to(memory_format=torch.channels_last)
        assert module(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), plain(x))


def test_a_swapped_model_compiles_whole():
    model = nn.Sequential(InPlace("A", 2, 4, 3, padding=1), nn.ReLU(), Product("B", 4, 4, (3, 5), padding="same"),
                          Inside(4, 4, 3))  # fmt: skip
    assert len(accelerate(model).swapped) == 3
    x = torch.randn(2, 2, 6, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    (expected,) = torch.autograd.grad(model(x).square().sum(), model[0].weight)
    (found,) = torch.autograd.grad(compiled(x).square().sum(), model[0].weight)
    torch.testing.assert_close(found, expected)
