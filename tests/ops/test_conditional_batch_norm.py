"""Conditional batch normalisation against the composition of torch's own functions, and what the ops alone promise."""

import pytest
import torch
import torch.nn.functional as F
from fastvid.kernels.conditional_batch_norm import cases, reference

import fastvid
from fastvid import ops
from fastvid.testing import assert_within_yardstick


def composed(x, gain, bias, eps, relu, upsample):
    """What a user of torch would write: frames' channels side by side as the channels of one batch normalisation."""
    B, T, H, W, C = x.shape
    folded = x.permute(0, 2, 3, 1, 4).reshape(B * H * W, T * C)
    if len(folded) > 1:
        out = F.batch_norm(folded, None, None, training=True, eps=eps)
    else:
        out = (folded - folded.mean(0)) / eps**0.5
    out = out.view(B, H, W, T, C).permute(0, 3, 4, 1, 2)  # [B, T, C, H, W]
    out = out * gain[:, None, :, None, None] + bias[:, None, :, None, None]
    out = out.relu() if relu else out
    if upsample:
        out = F.interpolate(out.flatten(0, 1), scale_factor=2, mode="bilinear", align_corners=False)
        out = out.unflatten(0, (B, T))
    return out.movedim(2, -1)


def in_dtype(args, dtype=None):
    return [a.detach().to(dtype or a.dtype).requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]


def clear_of_the_corner(case):
    x, _, _, gain, bias, _, eps, relu, upsample, *_ = case.make_backward()
    return x, gain, bias, eps, relu, upsample


@pytest.mark.parametrize("case", [case for case in cases.ALL if case.offset < 10 and case.own], ids=str)
def test_equals_the_composition_of_torch(case):
    args, results, gradients, upstream = clear_of_the_corner(case), [], [], None
    for function, dtype in ((ops.conditional_batch_norm, None), (composed, torch.float64), (composed, None)):
        given = in_dtype(args, dtype)
        out = function(*given)
        out = out.out if isinstance(out, ops.Normed) else out
        upstream = torch.randn_like(out) if upstream is None else upstream
        results.append(out)
        gradients.append(torch.autograd.grad(out, given[:3], upstream.to(out.dtype)))
    assert_within_yardstick(*results)
    for ours, exact, peer in zip(*gradients, strict=True):
        assert_within_yardstick(ours, exact, peer)


@pytest.mark.parametrize("upsample", [False, True])
def test_given_moments_of_a_batch_are_its_own(upsample):
    args = cases.Case("", (2, 3, 4, 5, 6), upsample=upsample).make()
    x, _, _, gain, bias, *options = args
    normed, moments = ops.conditional_batch_norm(x, gain, bias, *options), ops.frame_moments(x)
    out = ops.conditional_norm(x, *moments, gain, bias, *options)
    for ours, other in zip(normed, (out, *moments), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)


def test_moments_of_what_is_far_from_zero_do_not_cancel():
    x = torch.randn(3, 2, 5, 5, 4) / 16 + 4096
    mean, var = ops.frame_moments(x)
    exact = x.double().var(dim=(0, 2, 3), correction=0)
    assert ((var - exact).abs() < 1e-4 * exact).all()
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck(relu, upsample):
    x, mean, var, gain, bias, _, eps, *_ = cases.Case(
        "", (2, 2, 3, 2, 2), upsample=upsample, own=False
    ).make_backward(dtype=torch.float64)
    given = [tensor.requires_grad_() for tensor in (x, mean, var, gain, bias)]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda *given: ops.conditional_norm(*given, eps, relu, upsample), given, fast_mode=True)
        assert check(
            lambda *given: ops.conditional_batch_norm(*given, eps, relu, upsample).out, (x, gain, bias), fast_mode=True
        )
        assert check(ops.frame_moments, (x,), fast_mode=True)


def test_the_gradient_through_the_moments_is_the_sum_of_both_ways():
    given = in_dtype(clear_of_the_corner(cases.Case("", (2, 3, 6, 5, 8), upsample=True)))
    direct = ops.conditional_batch_norm(*given).out
    upstream = torch.randn_like(direct)
    apart = ops.conditional_norm(given[0], *ops.frame_moments(given[0]), *given[1:])
    for ours, other in zip(
        torch.autograd.grad(direct, given[:3], upstream), torch.autograd.grad(apart, given[:3], upstream), strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_running_statistics_are_constants():
    x, mean, var, gain, bias, *options = cases.ALL[2].make()
    x.requires_grad_()
    ops.conditional_norm(x, mean, var, gain, bias, *options).sum().backward()
    with ops.served() as record:
        out = ops.conditional_norm(x, mean, var, gain.requires_grad_(), bias, *options)
        (to_gain,) = torch.autograd.grad(out.sum(), gain)
    assert to_gain.shape == gain.shape and mean.grad is None and var.grad is None
    assert set(record) == {"conditional_norm", "conditional_norm_backward"}


def step(x, gain, bias):
    done = ops.conditional_batch_norm(x, gain, bias, upsample=True)
    held = ops.conditional_norm(x, done.mean, done.var, gain, bias)
    return done.out.square().sum() + held.sin().sum() + ops.frame_moments(x).var.sum()


def test_compiles_whole_and_trains_alike():
    args = clear_of_the_corner(cases.ALL[7])[:3]
    given, other = in_dtype(args), in_dtype(args)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(step(*given), compiled(*other), rtol=0, atol=0)
        step(*given).backward()
        compiled(*other).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(given, other, strict=True))


def test_a_frame_knows_nothing_of_the_others():
    x, gain, bias, *options = cases.ALL[2].make_batch()
    before = ops.conditional_batch_norm(x, gain, bias, *options).out
    x[:, 1] += 5 * torch.rand_like(x[:, 1])
    after = ops.conditional_batch_norm(x, gain, bias, *options).out
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.equal(before[:, 1], after[:, 1])


def test_a_nan_stays_visible_in_its_channel():
    x, gain, bias, *options = cases.ALL[2].make_batch()
    x[0, 0, 0, 0, 3] = torch.nan
    done = ops.conditional_batch_norm(x, gain, bias, *options)
    assert done.out[:, 0, ..., 3].isnan().all() and done.mean[0, 3].isnan() and done.var[0, 3].isnan()
    assert done.out.isnan().sum() == done.out[:, 0, ..., 3].numel()


def test_the_gradient_is_served_by_who_served_the_forward():
    given = in_dtype(clear_of_the_corner(cases.ALL[7]))
    with fastvid.backend("reference"):
        loss = ops.conditional_batch_norm(*given).out.sum()
    with ops.served() as record:
        loss.backward()
    assert record == {"conditional_norm_backward": "reference"}


def test_small_ones_may_be_in_half_precision():
    x, mean, var, gain, bias, *options = cases.ALL[2].make()
    half = [tensor.bfloat16().requires_grad_() for tensor in (gain, bias)]
    out = ops.conditional_norm(x, mean, var, *half, *options)
    assert out.dtype == torch.float32
    assert torch.equal(out, ops.conditional_norm(x, mean, var, *(part.float() for part in half), *options))
    out.sum().backward()
    assert {part.grad.dtype for part in half} == {torch.bfloat16}


@pytest.mark.parametrize(
    "change, told",
    [
        ({"x": torch.zeros(2, 3, 4, 6)}, r"`x` must be floating \[B, T, H, W, C\]"),
        ({"x": torch.zeros(2, 3, 0, 4, 6)}, "T, H, W, C > 0"),
        ({"x": torch.zeros(2, 3, 4, 4, 6, dtype=torch.int32)}, "must be floating"),
        ({"mean": torch.zeros(2, 6)}, r"`mean` must be floating \[3, 6\]"),
        ({"var": torch.zeros(3, 6, dtype=torch.int64)}, r"`var` must be floating \[3, 6\]"),
        ({"gain": torch.zeros(3, 6)}, r"`gain` must be floating \[2, 6\]"),
        ({"bias": torch.zeros(2, 6, device="meta")}, r"`bias` must be floating \[2, 6\] on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change, told):
    given = {"x": torch.zeros(2, 3, 4, 4, 6), "mean": torch.zeros(3, 6), "var": torch.ones(3, 6),
             "gain": torch.ones(2, 6), "bias": torch.zeros(2, 6)}  # fmt: skip
    with pytest.raises(ValueError, match=told):
        ops.conditional_norm(**given | change)
    if "mean" in change or "var" in change:
        return
    apart = {name: tensor for name, tensor in (given | change).items() if name not in ("mean", "var")}
    with pytest.raises(ValueError, match=told):
        ops.conditional_batch_norm(**apart)


def test_a_gradient_of_another_shape_is_refused():
    x, small = torch.zeros(1, 1, 2, 2, 3), torch.ones(1, 3)
    with pytest.raises(ValueError, match=r"`grad_out` must be \[1, 1, 4, 4, 3\]"):
        ops.conditional_norm_backward(x, small, small, small, small, x, 1e-5, True, True, True, [True] * 5)


def test_the_definition_enlarges_as_torch_does():
    z = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = F.interpolate(z, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(reference.enlarged(reference.enlarged(z, 2), 3), expected)
    torch.testing.assert_close(
        (reference.enlarged(z, 3) * expected[:, :, ::2]).sum(), (reference.gathered(expected[:, :, ::2], 3) * z).sum()
    )
