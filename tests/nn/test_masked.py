"""Masked convolutions over live taps against torch's dense ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvid.nn import MaskedConv2d, MaskedConv3d
from fastvid.testing import assert_within_yardstick


def raster_mask(mask_type, kernel):
    """Mask A or B [*kernel] in raster order."""
    flat = torch.zeros(kernel).flatten()
    middle = 0
    for k in kernel:
        middle = middle * k + k // 2
    flat[: middle + (mask_type == "B")] = 1
    return flat.view(kernel)


class Masked:
    """The masked convolution as it is usually written."""

    def __init__(self, mask_type, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", raster_mask(mask_type, self.kernel_size).expand_as(self.weight).clone())

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class Dense2d(Masked, nn.Conv2d):
    """Over H, W."""


class Dense3d(Masked, nn.Conv3d):
    """Over T, H, W."""


OURS = {Dense2d: MaskedConv2d, Dense3d: MaskedConv3d}
GRIDS = {Dense2d: (9, 11), Dense3d: (3, 7, 8)}
WORDS = [
    (Dense2d, {"kernel_size": 3, "padding": 1}),
    (Dense2d, {"kernel_size": 7, "padding": 3, "bias": False}),
    (Dense2d, {"kernel_size": (3, 5), "padding": (1, 2)}),
    (Dense2d, {"kernel_size": 4, "padding": 2}),
    (Dense2d, {"kernel_size": (2, 4), "padding": "same"}),
    (Dense2d, {"kernel_size": 5, "padding": "same", "dilation": 2}),
    (Dense2d, {"kernel_size": 3, "padding": "valid"}),
    (Dense2d, {"kernel_size": (2, 3), "padding": (0, 4), "dilation": (3, 1)}),
    (Dense3d, {"kernel_size": 3, "padding": 1}),
    (Dense3d, {"kernel_size": (2, 4, 3), "padding": "same", "bias": False}),
    (Dense3d, {"kernel_size": (3, 3, 5), "padding": (2, 2, 4), "dilation": (2, 2, 2)}),
    (Dense3d, {"kernel_size": 7, "padding": 3}),
    (Dense3d, {"kernel_size": (1, 3, 3)}),
]


def pair(dense, mask_type, words, channels=(3, 4)):
    """A dense layer, and ours with its weights."""
    theirs = dense(mask_type, *channels, **words)
    ours = OURS[dense](mask_type, *channels, **words)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize("dense, words", WORDS, ids=str)
def test_equals_the_dense_masked_convolution(dense, words, mask_type):
    ours, theirs = pair(dense, mask_type, words)
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(2, 3, *GRIDS[dense])
    inputs = [x.clone().to(dtype).requires_grad_() for dtype in (x.dtype, x.dtype, torch.float64)]
    outputs = [layer(given) for layer, given in zip((ours, theirs, exact), inputs, strict=True)]
    assert_within_yardstick(outputs[0], outputs[2], outputs[1])
    upstream = torch.randn_like(outputs[1])
    for output in outputs:
        output.backward(upstream.to(output.dtype))
    assert_within_yardstick(inputs[0].grad, inputs[2].grad, inputs[1].grad)
    live = [ours.live_kernel.live(layer.weight.grad) for layer in (exact, theirs)]
    assert_within_yardstick(ours.weight.grad, *live)
    if ours.bias is not None:
        assert_within_yardstick(ours.bias.grad, exact.bias.grad, theirs.bias.grad)
    format = torch.channels_last if dense is Dense2d else torch.channels_last_3d
    assert outputs[0].is_contiguous(memory_format=format)


@pytest.mark.parametrize("dense", [Dense2d, Dense3d])
def test_unbatched_and_every_memory_format(dense):
    ours, theirs = pair(dense, "B", {"kernel_size": 3, "padding": 1})
    x = torch.randn(2, 3, *GRIDS[dense])
    expected = theirs(x)
    torch.testing.assert_close(ours(x[0]), expected[0])
    last = x.to(memory_format=torch.channels_last if dense is Dense2d else torch.channels_last_3d)
    strided = torch.randn(2, 3, *(2 * n for n in GRIDS[dense]))
    strided = strided[(slice(None), slice(None), *(slice(None, None, 2) for _ in GRIDS[dense]))].copy_(x)
    for given in (last, strided, x.flip(0).flip(0), x.expand(2, *x.shape)[1]):
        assert torch.equal(ours(given), ours(x))
    assert ours(x[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("dense, words", [WORDS[1], WORDS[8]], ids=str)
def test_a_fresh_layer_is_torchs_for_the_same_seed(dense, words):
    torch.manual_seed(3)
    theirs = dense("A", 3, 4, **words)
    after = torch.rand(2)
    torch.manual_seed(3)
    ours = OURS[dense]("A", 3, 4, **words)
    assert torch.equal(torch.rand(2), after)
    assert torch.equal(ours.dense_weight(), theirs.weight * theirs.mask)
    assert (ours.bias is None) == (theirs.bias is None) and (ours.bias is None or torch.equal(ours.bias, theirs.bias))
    x = torch.randn(1, 3, *GRIDS[dense])
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("mask", [None, (4, 3, 3, 5), (1, 1, 3, 5), (3, 5)])
def test_dense_state_dicts_load(mask):
    theirs = Dense2d("B", 3, 4, (3, 5), padding="same")
    ours = MaskedConv2d("B", 3, 4, (3, 5), padding="same")
    state = theirs.state_dict()
    state.pop("mask")
    if mask:
        state["mask"] = raster_mask("B", (3, 5)).expand(mask).to(torch.uint8)
    given = dict(state)
    assert str(ours.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert state.keys() == given.keys() and all(state[key] is given[key] for key in given)  # the caller's stays whole
    assert torch.equal(ours.dense_weight(), theirs.weight * theirs.mask)
    again = MaskedConv2d("B", 3, 4, (3, 5), padding="same")
    again.load_state_dict(ours.state_dict(), strict=True)
    assert again.weight.shape == (8, 3, 4) and torch.equal(again.weight, ours.weight)
    other = nn.Sequential(MaskedConv2d("B", 3, 4, (3, 5), device="meta"))
    other.load_state_dict({f"0.{key}": value for key, value in state.items()}, strict=True, assign=True)
    assert torch.equal(other[0].weight, ours.weight)


def test_states_of_other_layers_are_refused():
    ours = nn.Sequential(MaskedConv2d("A", 3, 4, 3))
    before = ours[0].weight.clone()
    state = nn.Sequential(Dense2d("B", 3, 4, 3)).state_dict()
    with pytest.raises(RuntimeError, match=r"0\.mask is of another layer: this one was made with mask A"):
        ours.load_state_dict(state)
    state["0.mask"] = torch.full((3, 3), 0.5)
    with pytest.raises(RuntimeError, match="mask is of another layer"):
        ours.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for 0.weight"):
        nn.Sequential(MaskedConv2d("A", 3, 4, 5)).load_state_dict(nn.Sequential(Dense2d("A", 3, 4, 3)).state_dict())
    del state["0.bias"], state["0.mask"]
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(state)
    assert before.shape == ours[0].weight.shape


def vertical(mask):
    mask[2:] = 0


def own_frame(mask):
    mask[:, 1, 1:] = 0
    mask[:, 2:] = 0


def scattered(mask):
    mask[:] = torch.eye(mask.shape[-1])


def last_frame(mask):
    mask[:2] = 0


@pytest.mark.parametrize(
    "layer, hide",
    [
        (nn.Conv2d(3, 4, 3, padding=1), vertical), (nn.Conv2d(3, 4, 5, padding=4, dilation=2), scattered),
        (nn.Conv3d(3, 4, 3, padding=1), own_frame), (nn.Conv3d(3, 4, 3, padding=(1, 0, 2), bias=False), last_frame),
    ],
    ids=["vertical", "scattered", "own-frame", "last-frame"],
)  # fmt: skip
def test_from_dense_takes_any_mask_that_is_the_same_for_all_channels(layer, hide):
    layer = copy.deepcopy(layer).double().eval()
    mask = torch.ones(layer.kernel_size)
    hide(mask)
    layer.weight.requires_grad_(False)
    made = (MaskedConv2d if isinstance(layer, nn.Conv2d) else MaskedConv3d).from_dense(layer, mask)
    assert made.mask_type == "own" and made.weight.dtype == torch.float64 and len(made.weight) == mask.sum()
    assert not made.weight.requires_grad and not made.training and (layer.bias is None or made.bias.requires_grad)
    assert not any(a.data_ptr() == b.data_ptr() for a, b in zip(made.parameters(), layer.parameters(), strict=True))
    x = torch.randn(2, 3, *((6, 7) if mask.ndim == 2 else (4, 5, 6)), dtype=torch.float64)
    expected = layer._conv_forward(x, layer.weight * mask, layer.bias)
    torch.testing.assert_close(made(x), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(made.dense_weight(), layer.weight * mask)


def test_from_dense_takes_the_mask_of_the_layer():
    theirs = Dense3d("A", 2, 3, (2, 3, 3), padding=1)
    random = torch.get_rng_state()
    ours = MaskedConv3d.from_dense(theirs)
    assert torch.equal(torch.get_rng_state(), random) and ours.mask_type == "A"
    x = torch.randn(1, 2, 3, 4, 5)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("dense, grid", [(Dense2d, (5, 6)), (Dense3d, (3, 4, 5))])
@torch.no_grad()
def test_stacked_masks_are_causal_to_the_bit(dense, grid):
    kind = OURS[dense]
    stack = nn.Sequential(kind("A", 2, 9, 3, padding=1), nn.Tanh(), kind("B", 9, 9, 5, padding="same"), nn.Tanh(),
                          kind("B", 9, 3, 3, padding=2, dilation=2))  # fmt: skip
    x = torch.randn(2, 2, *grid)
    before = stack(x).flatten(2)
    reached = 0
    for p in range(before.shape[2]):
        changed = x.flatten(2).clone()
        changed[:, :, p] += 1
        after = stack(changed.view_as(x)).flatten(2)
        assert torch.equal(after[:, :, : p + 1], before[:, :, : p + 1]), f"input {p} reached an earlier output"
        reached += (after[:, :, p + 1 : p + 2] != before[:, :, p + 1 : p + 2]).any().item()
    assert reached >= before.shape[2] * (grid[-1] - 1) // grid[-1]  # within a row the next position sees it


def pixelcnn(kind):
    return nn.Sequential(
        kind("A", 1, 12, 7, padding=3, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        kind("B", 12, 12, 3, padding=1), nn.ReLU(), kind("B", 12, 12, kernel_size=3, padding="same", dilation=2),
        nn.ReLU(), nn.Conv2d(12, 5, 1),
    )  # fmt: skip


def test_a_pixelcnn_trains_as_the_dense_one():
    torch.manual_seed(0)
    ours = pixelcnn(MaskedConv2d)
    torch.manual_seed(0)
    theirs = pixelcnn(Dense2d)
    losses = {}
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
        losses[model] = []
        for step in range(4):
            torch.manual_seed(step)
            codes = torch.randint(5, (3, 8, 8))
            loss = F.cross_entropy(model(codes[:, None] / 4), codes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[model].append(loss.item())
    assert losses[ours] == pytest.approx(losses[theirs], rel=1e-4)
    ours.eval(), theirs.eval()
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    fresh = pixelcnn(MaskedConv2d).eval()
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(fresh(x), theirs(x))


@pytest.mark.parametrize("dense", [Dense2d, Dense3d])
def test_compiles_whole(dense):
    layer = OURS[dense]("B", 3, 4, 3, padding=2)
    x = torch.randn(2, 3, *GRIDS[dense])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (layer, compiled):
        y = call(x)
        gradients.append((y, *torch.autograd.grad(y.square().sum(), (layer.weight, layer.bias))))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_autocast_and_half_precision():
    ours, theirs = pair(Dense2d, "B", {"kernel_size": 3, "padding": 1}, channels=(16, 8))
    x = torch.randn(2, 16, 6, 6)
    exact = copy.deepcopy(theirs).bfloat16().double()(x.bfloat16().double())
    with torch.autocast("cpu", torch.bfloat16):
        y, peer = ours(x), theirs(x)
        y.float().sum().backward()
    assert ours.weight.grad.dtype == torch.float32
    assert_within_yardstick(y, exact, peer)
    assert_within_yardstick(ours.bfloat16()(x.bfloat16()), exact, theirs.bfloat16()(x.bfloat16()))


@pytest.mark.parametrize(
    "words, error, message",
    [
        ({"stride": 2}, NotImplementedError, r"MaskedConv2d: `stride` is taken only as \(1, 1\), got \(2, 2\)"),
        ({"groups": 2}, NotImplementedError, "`groups` is taken only as 1, got 2; keep the dense masked layer"),
        ({"padding_mode": "reflect"}, NotImplementedError, "`padding_mode` is taken only as zeros, got reflect"),
        ({"mask_type": "C"}, ValueError, "the mask must be 'A', 'B' or a tensor of 0 and 1, got 'C'"),
        ({"mask_type": torch.ones(4, 4)}, ValueError, r"broadcast to the weight \[4, 2, 3, 3\], got \[4, 4\] float32"),
        ({"mask_type": torch.full((3, 3), 0.3)}, ValueError, "must be 0 and 1"),
        ({"mask_type": torch.zeros(3, 3)}, ValueError, r"leaves no tap of the kernel \(3, 3\)"),
        ({"mask_type": "A", "kernel_size": 1}, ValueError, "leaves no tap"),
        ({"mask_type": torch.ones(4, 1, 1, 1) * torch.tensor([1, 1, 0, 0])[:, None, None, None]}, NotImplementedError,
         "the mask differs between channels"),
        ({"kernel_size": 0}, ValueError, "`kernel_size` must be an integer of at least 1"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "or 2 of them"),
        ({"padding": "full"}, ValueError, "`padding` must be integers, 'same' or 'valid'"),
        ({"padding": -1}, ValueError, "`padding` must be an integer of at least 0"),
        ({"in_channels": 0}, ValueError, "must be at least 1"),
    ],
)
def test_words_that_are_not_taken(words, error, message):
    with pytest.raises(error, match=message):
        MaskedConv2d(**({"mask_type": "B", "in_channels": 2, "out_channels": 4, "kernel_size": 3} | words))


def test_inputs_that_do_not_fit():
    layer = MaskedConv2d("B", 2, 4, 3)
    with pytest.raises(ValueError, match=r"\[B, C, H, W\] or \[C, H, W\] with C = 2, got \[1, 3, 5, 5\]"):
        layer(torch.zeros(1, 3, 5, 5))
    with pytest.raises(ValueError, match="with C = 2"):
        layer(torch.zeros(5, 5))
    with pytest.raises(ValueError, match=r"smaller than the kernel.*\[5, 2\] gives an output of \[3, 0\]"):
        layer(torch.zeros(1, 2, 5, 2))
    with pytest.raises(ValueError, match=r"\[B, C, T, H, W\] or \[C, T, H, W\]"):
        MaskedConv3d("B", 2, 4, 3)(torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match="from_dense: wanted nn.Conv2d, got Conv3d"):
        MaskedConv2d.from_dense(nn.Conv3d(2, 2, 3))
    with pytest.raises(ValueError, match="has no tensor `mask`"):
        MaskedConv2d.from_dense(nn.Conv2d(2, 2, 3))
    with pytest.raises(NotImplementedError, match="`groups` is taken only as 1"):
        MaskedConv2d.from_dense(nn.Conv2d(2, 2, 3, groups=2), torch.ones(3, 3))


def test_says_what_it_is():
    layer = MaskedConv2d("A", 3, 8, 7, padding=3, bias=False)
    assert repr(layer) == (
        "MaskedConv2d('A', 3, 8, kernel_size=(7, 7), padding=(3, 3), dilation=(1, 1), bias=False)"
    )
    torchs = nn.Conv2d(3, 8, 7, padding=3, bias=False)
    for word in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(layer, word) == getattr(torchs, word)
