"""The gated stack: which codes a logit may depend on, and the drop-in parts."""

from dataclasses import replace

import pytest
import torch

from fastvid.nn import CausalAttention3d, GatedPixelStack, GatedStackConfig
from fastvid.nn.attention import coordinates
from fastvid.nn.gated import horizontal_taps, input_horizontal_taps, input_vertical_taps, vertical_taps

CONFIGS = {
    "3d": GatedStackConfig(codes=11, channels=12, layers=3, kernel=3, time_kernel=3, condition_channels=5,
                           attention_every=0),
    "3d-attention": GatedStackConfig(codes=11, channels=12, layers=4, kernel=3, time_kernel=2, condition_channels=5,
                                     attention_every=2, heads=3),
    "3d-wide": GatedStackConfig(codes=11, channels=12, layers=2, kernel=5, time_kernel=3, condition_channels=5,
                                attention_every=2, heads=2),
    "2d": GatedStackConfig(codes=11, channels=12, layers=3, kernel=5, time_kernel=1, condition_channels=5,
                           attention_every=0),
    "2d-attention": GatedStackConfig(codes=11, channels=12, layers=4, kernel=3, time_kernel=1, condition_channels=5,
                                     attention_every=2, heads=2),
}
GRIDS = {"3d": (3, 4, 5), "3d-attention": (3, 4, 5), "3d-wide": (3, 5, 6), "2d": (1, 6, 7), "2d-attention": (1, 6, 5)}
WAVEFRONT = {  # all with attention, whose columns carry what the few layers' taps do not reach
    "wavefront-3d": (replace(CONFIGS["3d-attention"], wavefront=True), (2, 4, 6)),
    "wavefront-3d-wide": (replace(CONFIGS["3d-wide"], wavefront=True), (2, 4, 7)),
    "wavefront-2d": (replace(CONFIGS["2d-attention"], wavefront=True), (1, 5, 7)),
    "wavefront-2d-wide": (replace(CONFIGS["2d"], attention_every=1, heads=3, wavefront=True), (1, 4, 8)),
}
for _name, (_config, _grid) in WAVEFRONT.items():
    CONFIGS[_name], GRIDS[_name] = _config, _grid


def make(name):
    stack = GatedPixelStack(CONFIGS[name]).eval()
    codes = torch.randint(11, (2, *GRIDS[name]))
    return stack, codes, torch.randn(2, *GRIDS[name], 5)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_future_never_touches_the_past(name):
    stack, codes, condition = make(name)
    before = stack(codes, condition).flatten(1, 3)  # [B, N, K]
    N = before.shape[1]
    touched = 0
    for p in torch.randint(N, (100,)).tolist():
        changed = codes.flatten(1).clone()
        changed[:, p] = (changed[:, p] + 1 + p % 10) % 11
        after = stack(changed.view_as(codes), condition).flatten(1, 3)
        assert torch.equal(after[:, : p + 1], before[:, : p + 1]), f"position {p} reached its own or an earlier logit"
        touched += bool((after[:, p + 1 :] != before[:, p + 1 :]).any())
    assert touched > 50  # the codes do matter to what follows


@pytest.mark.parametrize("name", WAVEFRONT)
@torch.no_grad()
def test_a_wavefront_code_reaches_nothing_up_right_of_its_wave(name):
    stack, codes, condition = make(name)
    before = stack(codes, condition)
    T, H, W = GRIDS[name]
    for t, y, x in [(t, y, x) for t in range(T) for y in range(H) for x in range(W)]:
        changed = codes.clone()
        changed[:, t, y, x] = (changed[:, t, y, x] + 1 + x) % 11
        reached = (stack(changed, condition) != before).any(-1).any(0)  # [T, H, W]
        assert not reached[:t].any()
        r = CONFIGS[name].kernel // 2
        allowed = [[v == y and u > x or v > y and u >= x - r for u in range(W)] for v in range(H)]
        assert reached[t].tolist() == allowed, f"code at {(t, y, x)}"


@pytest.mark.parametrize("name", WAVEFRONT)
def test_a_wavefront_logit_depends_on_its_wave_past_alone(name):
    stack, codes, condition = make(name)
    T, H, W = GRIDS[name]
    embedded = []
    stack.embed.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    logits = stack(codes[:1], condition[:1])
    for t, y, x in [(t, y, x) for t in range(T) for y in range(H) for x in range(W)]:
        grad, = torch.autograd.grad(logits[0, t, y, x].square().sum(), embedded, retain_graph=True)
        seen = (grad[0] != 0).any(-1)  # [T, H, W]
        r = CONFIGS[name].kernel // 2
        allowed = [[v == y and u < x or v < y and u <= x + r for u in range(W)] for v in range(H)]
        assert seen[t].tolist() == allowed, f"logits at {(t, y, x)}"
        assert not seen[t + 1:].any() and (t == 0 or seen[t - 1, y, x])


@pytest.mark.parametrize("name", ["3d-attention", "2d-attention"])
def test_a_wavefront_model_has_the_same_parameters_but_for_sideways_taps(name):
    stack, codes, condition = make(name)
    narrow = GatedPixelStack(replace(CONFIGS[name], wavefront=True))
    narrow(codes, condition)  # keeps nothing in the state
    own, other = ({key: value.shape for key, value in s.state_dict().items()} for s in (narrow, stack))
    assert list(own) == list(other)
    differ = {key for key in own if own[key] != other[key]}
    assert differ == (set() if "3d" in name else {f"layers.{i}.vertical.weight" for i in range(4)})


@pytest.mark.parametrize("name", ["2d-attention", "wavefront-2d"])
def test_compiles_whole(name):
    stack, codes, condition = make(name)
    compiled = torch.compile(stack, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(codes, condition), stack(codes, condition))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_condition_reaches_every_logit(name):
    stack, codes, condition = make(name)
    condition.requires_grad_()
    stack(codes, condition).square().sum().backward()
    assert (condition.grad.abs().sum(-1) > 0).all()


def test_attention_sees_everything_before():
    attention = CausalAttention3d(8, 2)
    h = torch.randn(1, 2, 3, 4, 8, requires_grad=True)
    attention(h)[0, 1, 1, 2].sum().backward()
    seen = h.grad.abs().sum(-1).flatten() > 0
    assert seen.tolist() == [True] * (12 + 4 + 3) + [False] * (24 - 19)


@pytest.mark.parametrize("grid", [(1, 4, 5), (3, 1, 4), (2, 3, 1), (3, 4, 3)])
def test_axial_attention_is_one_softmax_over_three_axes(grid):
    T, H, W = grid
    attention = CausalAttention3d(8, 2, axial=True).double()
    h = torch.randn(2, *grid, 8, dtype=torch.float64)
    qkv = attention.qkv(h) + attention.qkv_position(coordinates(T, H, W).double())
    q, k, v = qkv.unflatten(-1, (3, 2, 4)).unbind(-3)  # [B, T, H, W, A, E] each
    expected = torch.empty_like(h)
    for t, y, x in [(t, y, x) for t in range(T) for y in range(H) for x in range(W)]:
        keys = [(t, y, u) for u in range(x + 1)] + [(t, u, x) for u in range(y)] + [(u, y, x) for u in range(t)]
        scores = torch.stack([(q[:, t, y, x] * k[(slice(None), *key)]).sum(-1) / 2 for key in keys])  # [keys, B, A]
        seen = torch.stack([v[(slice(None), *key)] for key in keys])  # [keys, B, A, E]
        expected[:, t, y, x] = attention.out((scores.softmax(0).unsqueeze(-1) * seen).sum(0).flatten(1))
    torch.testing.assert_close(attention(h), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("axial", [False, True])
@pytest.mark.parametrize("grid", [(1, 1, 5), (3, 2, 4), (2, 4, 1)])
def test_stacked_steps_of_attention_equal_its_forward(axial, grid):
    T, H, W = grid
    attention = CausalAttention3d(12, 3, axial).double()
    h = torch.randn(2, *grid, 12, dtype=torch.float64)
    for runs in ([1] * W, [W], [W // 2, W - W // 2]):
        cache, stepped = attention.new_cache(2, grid), torch.empty_like(h)
        for t, y in [(t, y) for t in range(T) for y in range(H)]:
            for x, n in zip((0, *torch.tensor(runs).cumsum(0).tolist()), filter(None, runs), strict=False):
                stepped[:, t, y, x : x + n] = attention.step(h[:, t, y, x : x + n], cache, (t, y, x))
        torch.testing.assert_close(stepped, attention(h), rtol=1e-9, atol=1e-12)


def test_axial_attention_keeps_no_scores_for_training():
    attention = CausalAttention3d(8, 2, axial=True)
    h, sizes = torch.randn(1, 2, 8, 8, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: sizes.append(kept.numel()) or kept, lambda kept: kept):
        attention(h).sum()
    assert max(sizes) <= 2 * 8 * 8 * 3 * 8  # qkv; the scores would be 128 x 128


def test_taps_are_those_of_the_paper():
    assert len(vertical_taps(3, 3)) == len(horizontal_taps(3, 3)) == 8
    assert len(vertical_taps(5, 1)) == 15 and len(horizontal_taps(5, 1)) == 3
    assert vertical_taps(5, 1, wavefront=True) == ((0, -2, 0), (0, -1, 0), (0, 0, 0))
    assert vertical_taps(3, 3, wavefront=True) == vertical_taps(3, 3)
    assert len(input_vertical_taps(3, 3)) == 21 and len(input_horizontal_taps(3, 3)) == 19
    assert (0, 0, 0) not in input_vertical_taps(5, 3) + input_horizontal_taps(5, 3)


def test_refusals():
    stack, codes, condition = make("2d")
    with pytest.raises(ValueError, match="condition"):
        stack(codes, condition[..., :3])
    with pytest.raises(ValueError, match="divide"):
        CausalAttention3d(10, 4)
    attention = CausalAttention3d(8, 2)
    cache = attention.new_cache(1, (2, 3, 4))
    for run, position in ((torch.zeros(1, 3, 8), (0, 0, 2)), (torch.zeros(2, 1, 8), (0, 0, 0))):
        with pytest.raises(ValueError, match="within a row of the grid"):
            attention.step(run, cache, position)
