"""Every sampler against the naive one: the same codes, the network's own log-probabilities, whatever the batch."""

from dataclasses import replace

import pytest
import torch

from fastvid import ops
from fastvid.nn import GatedPixelStack, GatedStackConfig
from fastvid.sampling import Noise, code_loglikelihood, pack_stack, sample, sample_grid, sample_naive

BASE = GatedStackConfig(codes=40, channels=16, layers=4, kernel=3, time_kernel=3, condition_channels=6,
                        attention_every=2, heads=2)
CASES = {
    "3d": (replace(BASE, attention_every=0), (2, 3, 4, 5)),
    "3d-attention": (BASE, (2, 3, 4, 4)),
    "3d-two-frames": (replace(BASE, time_kernel=2, layers=3), (1, 4, 3, 6)),
    "3d-kernel-5": (replace(BASE, kernel=5, layers=2), (3, 2, 5, 4)),
    "3d-wavefront": (replace(BASE, wavefront=True), (2, 3, 5, 4)),
    "odd-widths": (replace(BASE, channels=20, heads=4, codes=37), (1, 2, 3, 4)),
    "2d": (replace(BASE, time_kernel=1, attention_every=0), (3, 1, 6, 7)),
    "2d-attention": (replace(BASE, time_kernel=1), (2, 1, 7, 5)),
    "2d-kernel-5": (replace(BASE, time_kernel=1, kernel=5, attention_every=1, layers=2, heads=4), (2, 1, 6, 6)),
    "2d-wavefront": (replace(BASE, time_kernel=1, kernel=5, wavefront=True), (2, 1, 5, 7)),
    "one-position": (BASE, (1, 1, 1, 1)),
}
BACKENDS = ["reference", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def make(name):
    config, grid = CASES[name]
    stack = GatedPixelStack(config).eval()
    with torch.no_grad():
        for p in stack.parameters():  # far enough from uniform that a wrong tap changes codes
            p.mul_(1.5)
    return stack, torch.randn(*grid, config.condition_channels)


@pytest.mark.parametrize("name", CASES)
def test_the_naive_codes_are_drawn(name, backend):
    stack, condition = make(name)
    noise = Noise(seed=11, samples=tuple(range(3, 3 + condition.shape[0])), stream=1, first_step=5)
    naive, sampled = sample_naive(stack, condition, noise), sample_grid(stack, condition, noise, backend=backend)
    assert sampled.near_ties() == 0, "another seed is needed: here either code would be right"
    assert torch.equal(naive, sampled.codes)
    assert naive.numel() == 1 or naive.unique().numel() > 5
    assert torch.equal(sample(stack, condition, noise, backend=backend), naive)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_log_probabilities_are_the_networks(name, backend):
    stack, condition = make(name)
    codes = torch.randint(stack.config.codes, condition.shape[:-1])
    told = code_loglikelihood(stack, codes, condition, backend=backend)
    forward = stack(codes, condition).log_softmax(dim=-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(told, forward, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["3d-attention", "2d-kernel-5"])
def test_a_sample_does_not_depend_on_its_batch(name, backend):
    stack, condition = make(name)
    row = condition[:1]
    alone = sample(stack, row, Noise(1, (7,)), backend=backend)
    others = torch.randn(20, *row.shape[1:])
    crowd = sample(stack, torch.cat([others, row]), Noise(1, (*range(100, 120), 7)), backend=backend)
    assert torch.equal(crowd[-1:], alone)
    assert not torch.equal(sample(stack, row, Noise(2, (7,)), backend=backend), alone)


def test_temperature_and_progress(backend):
    stack, condition = make("2d")
    told = []
    cold = sample(stack, condition, Noise(0, (0, 1, 2)), temperature=1e-4, progress=told.append, backend=backend)
    assert sum(told) == 6 * 7
    greedy = sample(stack, condition, Noise(9, (5, 6, 7)), temperature=1e-4, backend=backend)
    assert torch.equal(cold, greedy)  # noise is moot


def test_given_codes_stand_and_decide_what_follows(backend):
    stack, condition = make("3d-attention")
    noise = Noise(3, (0, 1))
    first = sample_grid(stack, condition, noise, backend=backend)
    given = torch.full_like(first.codes, -1)
    given[:, 0], given[:, 1, 1, 2] = first.codes[:, 0], first.codes[:, 1, 1, 2]
    again = sample_grid(stack, condition, noise, given=given, backend=backend)
    assert torch.equal(again.codes, first.codes)
    torch.testing.assert_close(again.logprob, first.logprob, rtol=0, atol=1e-5)
    assert torch.equal(again.margin.isinf(), given >= 0)
    given[:, 1, 1, 2] = (given[:, 1, 1, 2] + 1) % 40
    other = sample_grid(stack, condition, noise, given=given, backend=backend)
    assert torch.equal(other.codes[:, 1, 1, 2], given[:, 1, 1, 2])
    assert torch.equal(other.codes[:, 1, 1, :2], first.codes[:, 1, 1, :2])
    assert not torch.equal(other.codes, first.codes)


def test_margins_tell_how_sure_a_draw_was(backend):
    stack, condition = make("3d")
    noise = Noise(5, (0, 1))
    sampled = sample_grid(stack, condition, noise, backend=backend)
    logits = stack(sampled.codes, condition).detach()
    gumbel = torch.stack(
        [torch.stack([noise.row(t, y, 5, 40, condition.device) for y in range(4)], dim=1) for t in range(3)], dim=1
    )
    best = (logits + gumbel).topk(2, dim=-1).values
    torch.testing.assert_close(sampled.margin, best[..., 0] - best[..., 1], rtol=0, atol=2e-5)
    assert sampled.near_ties() == 0 and sampled._replace(margin=sampled.margin * 0).near_ties() == sampled.codes.numel()


@pytest.mark.parametrize("weights, drift", [("bfloat16", 0.02), ("int8", 0.05)])
def test_smaller_weights_sample_nearly_the_same_model(weights, drift, backend):
    stack, condition = make("3d-attention")
    codes = torch.randint(40, condition.shape[:-1])
    exact, ours = (code_loglikelihood(stack, codes, condition, w, backend) for w in ("float32", weights))
    assert 0 < (ours - exact).abs().mean() < drift
    # the format says which model it is; a backend may keep keys and values in bfloat16 beside such weights
    told = code_loglikelihood(stack, codes, condition, weights, "reference")
    assert (ours - told).abs().mean() < 1e-3


def test_packed_weights_follow_the_stack():
    stack, condition = make("3d")
    noise = Noise(0, (0, 1))
    before, packed = sample(stack, condition, noise), pack_stack(stack)
    assert pack_stack(stack) is packed
    with torch.no_grad():
        stack.head[3].bias.mul_(-3)
    assert pack_stack(stack) is not packed
    assert torch.equal(sample(stack, condition, noise), sample_naive(stack, condition, noise))
    assert not torch.equal(sample(stack, condition, noise), before)
    packed = pack_stack(stack)
    stack.embed.weight.data[3, 2] += 1  # no version counts this
    assert pack_stack(stack) is not packed


def test_big_models_are_sampled_from_half_the_bytes():
    small = GatedPixelStack(BASE)
    assert pack_stack(small) is not pack_stack(small, "bfloat16")
    large = GatedPixelStack(replace(BASE, channels=640, layers=1, attention_every=0, heads=1)).eval()
    weights = [pack_stack(large, name).weights.numel() for name in ("auto", "bfloat16", "float32", "int8")]
    assert weights[0] == weights[1] < weights[2] and weights[3] < weights[1]


@pytest.mark.parametrize("channels, inside", [(16, 1), (256, 3)])
def test_a_narrow_stack_samples_on_one_thread(channels, inside, monkeypatch):
    stack = GatedPixelStack(replace(BASE, channels=channels, layers=1, attention_every=0)).eval()
    before, seen = torch.get_num_threads(), []
    baddbmm = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *a: seen.append(torch.get_num_threads()) or baddbmm(*a))
    try:
        torch.set_num_threads(3)
        sample(stack, torch.randn(1, 1, 1, 1, 6), Noise(0, (0,)), backend="reference")
        assert set(seen) == {inside} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_refusals():
    stack, condition = make("2d")
    noise = Noise(0, (0, 1, 2))
    with pytest.raises(ValueError, match="names 1 samples"):
        sample(stack, condition, Noise(0, (0,)))
    with pytest.raises(ValueError, match="condition"):
        sample(stack, condition[..., :2], noise)
    with pytest.raises(ValueError, match="temperature"):
        sample(stack, condition, noise, temperature=0)
    with pytest.raises(ValueError, match="wavefront=True"):
        sample(stack, condition, noise, order="wavefront")
    with pytest.raises(ValueError, match="diagonal"):
        sample(stack, condition, noise, order="diagonal")
    with pytest.raises(ValueError, match="weights"):
        sample(stack, condition, noise, weights="float8")
    for wrong in (torch.zeros(3, 1, 6, 6, dtype=torch.int64), torch.full((3, 1, 6, 7), 40), torch.zeros(3, 1, 6, 7)):
        with pytest.raises(ValueError, match="given"):
            sample(stack, condition, noise, given=wrong)
    with pytest.raises(ValueError, match="float64"):
        sample(stack.double(), condition, noise)
    with pytest.raises(ValueError, match="2\\^32"):
        Noise(0, (1 << 32,))
    noisy = GatedPixelStack(replace(BASE, dropout=0.1))
    with pytest.raises(ValueError, match="eval"):
        sample(noisy, torch.randn(1, 1, 2, 2, 6), Noise(0, (0,)))
    with pytest.raises(ValueError, match="version"):
        ops.pixelcnn_sample(torch.zeros(8, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64), condition, None)
