"""Any causal model through one loop: its own codes, whatever the batch; what is wrong with a broken one is named."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvid.nn import GatedPixelStack, GatedStackConfig
from fastvid.sampling import Noise, sample
from fastvid.sampling.conv_steps import ConvCache, ConvSteps
from fastvid.sampling.steps import ForwardSteps, StackSteps, before, check_steps, raster, sample_steps

K = 11


class Masked:
    """Mixed into a convolution: dead taps from the middle one on, or from the one behind it."""

    def __init__(self, kind, *args, **kwargs):
        super().__init__(*args, **kwargs)
        flat = torch.zeros(self.weight[0, 0].numel())
        flat[: flat.numel() // 2 + (kind == "B")] = 1
        self.register_buffer("mask", flat.view_as(self.weight[0, 0]))

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class Conv1(Masked, nn.Conv1d):
    pass


class Conv2(Masked, nn.Conv2d):
    pass


class Conv3(Masked, nn.Conv3d):
    pass


class Net(nn.Module):
    """Masked convolutions with a residual, a norm and 1x1s, in one to three dimensions, conditioned on a class."""

    def __init__(self, conv, kernel=3, channels=8, dilation=1, norm=nn.Identity):
        super().__init__()
        self.embed, self.label = nn.Embedding(K, channels), nn.Embedding(5, channels)
        pads = {"padding": kernel // 2 * dilation, "dilation": dilation}
        self.first = conv("A", channels, channels, kernel, padding=kernel // 2)
        self.second = conv("B", channels, channels, kernel, **pads)
        self.third = conv("B", channels, channels, kernel, padding="same", bias=False)
        self.norm, self.head = norm(channels), nn.Linear(channels, K)
        self.axes = self.first.weight.ndim - 2
        with torch.no_grad():
            for conv in (self.first, self.second, self.third):
                conv.weight *= 3  # far enough from zero that a wrong tap changes codes

    def forward(self, codes, label=None):  # [B, T, H, W] -> [B, T, H, W, K]
        grid = codes.shape
        x = self.embed(codes.reshape(grid[0], *grid[4 - self.axes :])).movedim(-1, 1)
        x = self.first(x)
        if label is not None:
            x = x + self.label(label).view(*x.shape[:2], *[1] * self.axes)
        x = x + F.elu(self.second(x))
        x = self.norm(x + torch.tanh(self.third(x)))
        return 3 * self.head(torch.tanh(x).movedim(1, -1)).view(*grid, K)


class Attention(nn.Module):
    """A transformer of one layer, a learned start and a key-value cache, written against the contract by hand."""

    def __init__(self, channels=8, positions=64):
        super().__init__()
        self.embed, self.where = nn.Embedding(K + 1, channels), nn.Parameter(torch.randn(positions, channels))
        self.qkv, self.head = nn.Linear(channels, 3 * channels), nn.Linear(channels, K)

    def forward(self, codes):
        flat = codes.flatten(1)
        x = self.embed(F.pad(flat[:, :-1], (1, 0), value=K)) + self.where[: flat.shape[1]]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return 3 * self.head(x).view(*codes.shape, K)

    def new_cache(self, batch, shape):
        return {"keys": [], "values": [], "start": torch.full((batch,), K)}

    def step(self, cache, codes, position):
        x = self.embed(cache["start"] if codes is None else codes) + self.where[len(cache["keys"])]
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # [B, C] each
        cache["keys"].append(k), cache["values"].append(v)
        keys, values = torch.stack(cache["keys"], dim=1), torch.stack(cache["values"], dim=1)
        x = x + F.scaled_dot_product_attention(q[:, None], keys, values).squeeze(1)
        return 3 * self.head(x)


def norm(channels):
    """A batch norm that has seen something."""
    made = nn.BatchNorm2d(channels)
    made.running_mean.normal_(0, 0.3)
    made.running_var.uniform_(0.5, 2)
    return made


NETS = {
    "1d": (lambda: Net(Conv1), (1, 1, 12)),
    "1d-dilated": (lambda: Net(Conv1, kernel=5, dilation=2), (1, 1, 15)),
    "2d": (lambda: Net(Conv2, norm=norm), (1, 5, 6)),
    "2d-wide-kernel": (lambda: Net(Conv2, kernel=7), (1, 4, 3)),
    "2d-dilated": (lambda: Net(Conv2, dilation=2), (1, 6, 7)),
    "3d": (lambda: Net(Conv3), (3, 4, 3)),
    "3d-one-position": (lambda: Net(Conv3), (1, 1, 1)),
}


def stepped(name):
    make, shape = NETS[name]
    return ConvSteps(make().eval(), lambda net, codes, **conditioning: net(codes, **conditioning)), shape


def naive(forward, shape, noise, temperature=1.0):
    """The definition, written out once more without the code under test."""
    codes = torch.zeros(len(noise.samples), *shape, dtype=torch.int64)
    with torch.no_grad():
        for t, y, x in raster(shape):
            gumbel = noise.row(t, y, shape[2], K, torch.device("cpu"))[:, x]
            codes[:, t, y, x] = (forward(codes)[:, t, y, x] / temperature + gumbel).argmax(dim=1)
    return codes


@pytest.mark.parametrize("name", NETS)
def test_a_module_of_convolutions_draws_its_naive_codes(name):
    steps, shape = stepped(name)
    noise = Noise(seed=5, samples=(3, 9), stream=1, first_step=2)
    check_steps(steps, steps.forward, shape)
    codes = sample_steps(steps, shape, noise, temperature=0.7)
    assert torch.equal(codes, naive(steps.forward, shape, noise, temperature=0.7))
    assert codes.numel() == 2 or codes.unique().numel() > 4


def test_a_transformer_and_any_forward_draw_their_naive_codes():
    model, shape, noise = Attention(), (1, 3, 7), Noise(1, (0, 1, 2))
    check_steps(model, model, shape)
    codes = sample_steps(model, shape, noise)
    assert torch.equal(codes, naive(model, shape, noise))
    assert torch.equal(codes, sample_steps(ForwardSteps(model), shape, noise))


def test_the_gated_stack_keeps_the_contract():
    config = GatedStackConfig(codes=K, channels=8, layers=3, condition_channels=4, attention_every=2, heads=2)
    stack, condition, noise = GatedPixelStack(config).eval(), torch.randn(2, 3, 4, 3, 4), Noise(4, (1, 2))
    steps = StackSteps(stack)
    check_steps(steps, lambda codes, condition: stack(codes, condition), (3, 4, 3), condition=condition)
    assert torch.equal(sample_steps(steps, (3, 4, 3), noise, condition=condition), sample(stack, condition, noise))


@pytest.mark.parametrize("name", ["1d-dilated", "2d", "3d"])
def test_a_sample_does_not_depend_on_its_batch(name):
    steps, shape = stepped(name)
    alone = sample_steps(steps, shape, Noise(1, (7,)))
    assert torch.equal(sample_steps(steps, shape, Noise(1, (*range(20, 37), 7)))[-1:], alone)
    assert not torch.equal(sample_steps(steps, shape, Noise(2, (7,))), alone)


def test_conditioning_travels_to_the_module():
    steps, shape = stepped("2d")
    label = torch.tensor([4, 0])
    check_steps(steps, steps.forward, shape, label=label)
    one, other = (sample_steps(steps, shape, Noise(0, (0, 1)), label=chosen) for chosen in (label, label.flip(0)))
    assert torch.equal(one, naive(lambda codes: steps.forward(codes, label=label), shape, Noise(0, (0, 1))))
    assert not torch.equal(one, other)


def test_given_codes_stand_and_the_rest_follows_them():
    steps, shape = stepped("2d")
    noise = Noise(3, (0, 1))
    free = sample_steps(steps, shape, noise)
    given = torch.full((2, *shape), -1)
    given[0, 0, 1:3] = (free[0, 0, 1:3] + 1) % K
    told = sample_steps(steps, shape, noise, given=given)
    assert torch.equal(told[0, 0, 1:3], given[0, 0, 1:3]) and torch.equal(told[1], free[1])
    assert torch.equal(told[0, 0, 0], free[0, 0, 0]) and not torch.equal(told[0, 0, 3:], free[0, 0, 3:])
    assert torch.equal(sample_steps(steps, shape, noise, given=free), free)


def test_progress_and_raster_order():
    steps, shape = stepped("3d")
    told = []
    sample_steps(steps, shape, Noise(0, (0,)), progress=told.append)
    positions = list(raster(shape))
    assert sum(told) == len(positions) == 36 and positions == sorted(positions)
    assert [before(p, shape) for p in positions] == [None, *positions[:-1]]


def test_the_module_is_left_as_it_was():
    steps, shape = stepped("2d")
    codes, state = torch.randint(K, (1, *shape)), {k: v.clone() for k, v in steps.module.state_dict().items()}
    first = steps.forward(codes)
    cache = steps.new_cache(1, shape)
    sample_steps(steps, shape, Noise(0, (0,)))
    assert torch.equal(steps.forward(codes), first)
    assert all(torch.equal(v, state[k]) for k, v in steps.module.state_dict().items())
    assert cache.module.head.weight is steps.module.head.weight  # a cache holds no second copy of the weights


class Conditional(Conv2):
    """A convolution whose forward wants more than its input, as class-conditional PixelCNNs have them."""

    def forward(self, x, shift):
        return nn.Conv2d.forward(self, x) + shift


class InPlace(nn.Conv2d):
    """Masks its weight when it is first run; the mask has another name."""

    def forward(self, x):
        self.weight.data[:, :, 1, 1:] = 0
        self.weight.data[:, :, 2:] = 0
        return super().forward(x)


def test_convolutions_with_a_forward_of_their_own():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = InPlace(1, 8, 3, padding=1), Conditional("B", 8, 8, 3, padding=1)
            self.head = nn.Conv2d(8, K, 1)

        def forward(self, codes):
            self.second.weight.data *= self.second.mask
            return self.head(self.second(self.first(codes.float()).relu(), 0.5)).movedim(1, -1)[:, None]

    steps = ConvSteps(Odd(), lambda net, codes: net(codes))
    check_steps(steps, steps.forward, (1, 5, 5))


def test_codes_that_are_ruled_out():
    never = torch.where(torch.arange(K) < 3, -torch.inf, 0.0)
    model = Attention()
    barred = ConvSteps(Net(Conv2).eval(), lambda net, codes: net(codes) + never)
    check_steps(barred, barred.forward, (1, 4, 4))
    assert sample_steps(barred, (1, 4, 4), Noise(0, (0, 1))).min() >= 3
    with pytest.raises(AssertionError, match=r"leave the forward at \(t, y, x\) = \(0, 0, 0\), by inf"):
        check_steps(model, lambda codes: model(codes) + never, (1, 2, 2))


# ---- broken models


def test_a_leak_from_the_future_is_named():
    net, shape = Net(Conv2).eval(), (1, 4, 5)
    net.first.mask[1, 2] = 1
    with pytest.raises(AssertionError, match=r"the future: logits at \(t, y, x\) = \(0, 0, 0\) .* code at \(0, 0, 1\)"):
        check_steps(ForwardSteps(net), net, shape)
    with pytest.raises(ValueError, match=r"`first`: ConvCache: .* tap at \(dt, dy, dx\) = \(0, 0, 1\)"):
        ConvSteps(net, lambda net, codes: net(codes)).new_cache(1, shape)


def test_a_code_that_sees_itself_is_named():
    net = Net(Conv2).eval()
    net.first.mask[1, 1] = 1  # B where A belongs
    steps = ConvSteps(net, lambda net, codes: net(codes))
    with pytest.raises(AssertionError, match=r"logits at .* = \(0, (\d), (\d)\) move by .* code at \(0, \1, \2\)"):
        check_steps(steps, steps.forward, (1, 4, 5))


class Forgetful(Attention):
    """Loses its oldest key."""

    def step(self, cache, codes, position):
        if position == (0, 1, 0):
            cache["keys"][0] = cache["keys"][0] * 0
        return super().step(cache, codes, position)


class Shared(Attention):
    """Keeps its keys on the module, so that two batches mix."""

    def new_cache(self, batch, shape):
        self.kept = super().new_cache(batch, shape)
        return None

    def step(self, cache, codes, position):
        return super().step(self.kept, codes, position)


def test_a_wrong_cache_is_named():
    model = Forgetful()
    with pytest.raises(AssertionError, match=r"leave the forward at \(t, y, x\) = \(0, 1, 0\), by .* all earlier"):
        check_steps(model, model, (1, 3, 4))
    model = Shared(positions=128)
    with pytest.raises(AssertionError, match="something outside its cache"):
        check_steps(model, model, (1, 3, 4))


def test_not_a_number_is_no_agreement():
    model = Attention()
    model.step = lambda cache, codes, position: torch.full((2, K), torch.nan)
    with pytest.raises(AssertionError, match="leave the forward"):
        check_steps(model, model, (1, 3, 4))


# ---- refusals


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stride": 2}, "stride 1, one group"), ({"groups": 2}, "groups 2"),
        ({"padding_mode": "circular", "padding": 1}, "circular"), ({"padding": 1}, "mask it"),
    ],
)  # fmt: skip
def test_convolutions_without_a_cached_form_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConvCache(nn.Conv2d(4, 4, 3, **options), 1, (1, 4, 4))


class Functional(Conv2):
    """Goes past nn.Conv2d's own forward, and does more than convolve."""

    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask, padding=1) + 1


def test_a_forward_that_cannot_be_followed_is_refused():
    net = Net(Functional, kernel=3).eval()
    with pytest.raises(ValueError, match=r"\['first', 'second', 'third'\] convolve in their own way; write a `step`"):
        sample_steps(ConvSteps(net, lambda net, codes: net(codes)), (1, 3, 3), Noise(0, (0,)))


def test_a_mask_and_a_padding_can_be_told():
    conv, x = nn.Conv1d(3, 5, 4), torch.randn(2, 3, 9)
    with torch.no_grad():
        wanted = conv(F.pad(x, (3, 0)))  # padded outside of the convolution, as causal layers often are
        cache = ConvCache(conv, 2, (1, 1, 9), padding=(3,))
        found = torch.stack([cache.step(x[..., i], (0, 0, i)) for i in range(9)], dim=2)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        blind = ConvCache(conv, 2, (1, 1, 9), padding=(3,), mask=torch.zeros(4))
        torch.testing.assert_close(blind.at((0, 0, 4)), conv.bias.expand(2, -1), rtol=0, atol=0)


def test_refusals():
    model, shape, noise = Attention(), (1, 2, 3), Noise(0, (0, 1))
    with pytest.raises(ValueError, match=r"three positive sizes \(T, H, W\), got \(2, 3\)"):
        sample_steps(model, (2, 3), noise)
    with pytest.raises(ValueError, match=r"`given` must be \[2, 1, 2, 3\] int64"):
        sample_steps(model, shape, noise, given=torch.zeros(2, 1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codes in \[0, 11\) or -1, got 0 to 11 in row \(t, y\) = \(0, 1\)"):
        given = torch.zeros(2, *shape, dtype=torch.int64)
        given[1, 0, 1, 2] = K
        sample_steps(model, shape, noise, given=given)
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        sample_steps(model, shape, noise, temperature=0.0)
    model.step = lambda cache, codes, position: torch.zeros(3, K)
    with pytest.raises(ValueError, match=r"floating logits \[2, K\], got \[3, 11\]"):
        sample_steps(model, shape, noise)
    with pytest.raises(ValueError, match=r"`forward` must give \[2, 1, 2, 3, 'K'\]"):
        check_steps(model, lambda codes: torch.zeros(2, 1, K), shape)


def test_training_mode_is_refused():
    noisy = nn.Sequential(nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"Dropout `0` is in training mode"):
        sample_steps(noisy, (1, 1, 1), Noise(0, (0,)))
    with pytest.raises(ValueError, match=r"BatchNorm2d `norm` is in training mode"):
        sample_steps(ConvSteps(Net(Conv2, norm=norm), lambda net, codes: net(codes)), (1, 1, 1), Noise(0, (0,)))


def test_grids_reshaped_by_the_module_are_refused():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, K, 3)

        def forward(self, codes):
            return self.conv(F.pad(codes.flatten(1)[:, None].float(), (3, 0))[..., :-1]).movedim(1, -1)[:, None, None]

    with pytest.raises(ValueError, match="`conv`: ConvCache: `conv` must not see later positions"):
        sample_steps(ConvSteps(Padded(), lambda net, codes: net(codes)), (1, 1, 4), Noise(0, (0,)))


def test_the_example(capsys):
    path = Path(__file__).resolve().parents[1] / "examples" / "sample_your_pixelcnn.py"
    spec = importlib.util.spec_from_file_location("sample_your_pixelcnn", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    ratios = example.main(["--size", "5", "--samples", "2", "--runs", "1"])
    assert set(ratios) == {"ConvSteps", "step by hand"}
    assert "2 x 5x5 codes, the same from all" in capsys.readouterr().out
