"""causal_conv and the gate against torch's dense convolution with a masked kernel."""

import pytest
import torch
import torch.nn.functional as F
from fastvid.kernels.gated_causal_conv import cases

from fastvid import ops
from fastvid.testing import assert_within_yardstick


def dense(x, weight, bias, taps):
    """The same convolution as a zero-padded F.conv3d whose kernel is zero at every dead tap."""
    reach = [max(abs(tap[axis]) for tap in taps) for axis in range(3)]
    kernel = x.new_zeros(weight.shape[2], weight.shape[1], *(2 * r + 1 for r in reach))
    for i, tap in enumerate(taps):
        kernel[(slice(None), slice(None), *(r + d for r, d in zip(reach, tap, strict=True)))] = weight[i].T
    return F.conv3d(x.movedim(-1, 1), kernel, bias, padding=tuple(reach)).movedim(1, -1)


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_equals_dense_masked_convolution(case):
    inputs = [t.requires_grad_() for t in case.make()]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    ours, peer = ops.causal_conv(*inputs, case.taps), dense(*inputs, case.taps)
    exact = dense(*exact_inputs, case.taps)
    assert_within_yardstick(ours, exact, peer)
    upstream = torch.randn_like(ours)
    gradients = (torch.autograd.grad(y, inputs, upstream) for y in (ours, peer))
    for mine, wanted, theirs in zip(
        next(gradients), torch.autograd.grad(exact, exact_inputs, upstream.double()), next(gradients), strict=True
    ):
        assert_within_yardstick(mine, wanted, theirs)


def test_no_bias_and_empty_batch():
    taps = ((0, 0, -1), (0, 0, 0))
    assert ops.causal_conv(torch.zeros(0, 1, 2, 3, 4), torch.randn(2, 4, 5), None, taps).shape == (0, 1, 2, 3, 5)


def test_a_later_frame_is_refused():
    with pytest.raises(ValueError, match="dt <= 0"):
        ops.causal_conv(torch.zeros(1, 2, 2, 2, 4), torch.zeros(1, 4, 4), None, ((1, 0, 0),))


def test_disagreeing_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[2 taps, Cin, Cout\]"):
        ops.causal_conv(torch.zeros(1, 2, 2, 2, 4), torch.zeros(3, 4, 4), None, ((0, 0, 0), (0, 0, -1)))


def test_gate():
    pre = torch.randn(3, 10)
    expected = torch.tanh(pre[:, :5].double()) * torch.sigmoid(pre[:, 5:].double())
    torch.testing.assert_close(ops.gate(pre).double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="even"):
        ops.gate(torch.zeros(3, 5))
