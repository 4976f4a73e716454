"""The gated stack: which codes a logit may depend on, and the drop-in parts."""

import pytest
import torch

from fastvid.nn import CausalAttention, GatedPixelStack, GatedStackConfig
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


@pytest.mark.parametrize("name", CONFIGS)
def test_the_condition_reaches_every_logit(name):
    stack, codes, condition = make(name)
    condition.requires_grad_()
    stack(codes, condition).square().sum().backward()
    assert (condition.grad.abs().sum(-1) > 0).all()


def test_attention_sees_everything_before():
    attention = CausalAttention(8, 2)
    h = torch.randn(1, 2, 3, 4, 8, requires_grad=True)
    attention(h)[0, 1, 1, 2].sum().backward()
    seen = h.grad.abs().sum(-1).flatten() > 0
    assert seen.tolist() == [True] * (12 + 4 + 3) + [False] * (24 - 19)


def test_taps_are_those_of_the_paper():
    assert len(vertical_taps(3, 3)) == len(horizontal_taps(3, 3)) == 8
    assert len(vertical_taps(5, 1)) == 15 and len(horizontal_taps(5, 1)) == 3
    assert len(input_vertical_taps(3, 3)) == 21 and len(input_horizontal_taps(3, 3)) == 19
    assert (0, 0, 0) not in input_vertical_taps(5, 3) + input_horizontal_taps(5, 3)


def test_refusals():
    stack, codes, condition = make("2d")
    with pytest.raises(ValueError, match="condition"):
        stack(codes, condition[..., :3])
    with pytest.raises(ValueError, match="divide"):
        CausalAttention(10, 4)
