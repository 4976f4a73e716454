"""The image convolution's contract: torch's numbers and gradients, what is refused, who serves."""

import pytest
import torch
import torch.nn.functional as F
from fastvid.kernels.image_conv import cases

import fastvid
from fastvid import ops
from fastvid.testing import assert_within_yardstick

CASE = next(case for case in cases.ALL if case.name == "odd")


def differentiable(args, dtype=None) -> list:
    return [None if a is None else a.detach().to(dtype or a.dtype).requires_grad_() for a in args]


def plain(x, weight, bias=None, residual=None):
    """By torch's own layout, and the sum in a pass of its own."""
    out = F.conv2d(x.movedim(-1, 1).contiguous(), weight, bias, padding=1).movedim(1, -1)
    return out if residual is None else out + residual


@pytest.mark.parametrize("backend", ["", "cpu", "reference"])
@pytest.mark.parametrize("case", [CASE, cases.ALL[3]], ids=str)
def test_values_and_gradients_are_torchs(case, backend):
    if backend == "cpu" and ops.image_conv.reasons(*case.make(), backend=backend).get("cpu") != "serves":
        pytest.skip(ops.image_conv.explain(*case.make(), backend=backend))
    args, upstream = case.make(), torch.randn(*case.images, case.channels[1])
    found = []
    for function, dtype in ((ops.image_conv, None), (plain, torch.float64), (plain, None)):
        given = differentiable(args, dtype)
        out = function(*given, **({"backend": backend} if function is ops.image_conv else {}))
        inputs = [tensor for tensor in given if tensor is not None]
        found.append((out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))))
    for ours, exact, peer in zip(*found, strict=True):
        assert_within_yardstick(ours, exact, peer)


def test_gradcheck():
    inputs = differentiable(cases.Case("", (2, 3, 4), (3, 2)).make(dtype=torch.float64))
    assert torch.autograd.gradcheck(ops.image_conv, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(ops.image_conv, inputs, fast_mode=True)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_wanted(wanted):
    x, weight, grad, _ = CASE.make_backward()
    found = ops.image_conv_backward(x, weight, grad, wanted)
    shapes = (x.shape, weight.shape, weight.shape[:1])
    assert [f.shape for f in found] == [s if asked else (0,) for s, asked in zip(shapes, wanted, strict=True)]


def step(x, weight, bias, residual):
    return ops.image_conv(x, weight, bias, residual).square().sum()


def test_compiles_whole_and_trains_alike():
    given, other = differentiable(CASE.make()), differentiable(CASE.make())
    for mine, theirs in zip(given, other, strict=True):
        theirs.data.copy_(mine.data)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(*given), compiled(*other), rtol=0, atol=0)
    step(*given).backward()
    compiled(*other).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(given, other, strict=True))


def test_the_gradient_is_served_by_who_served_the_forward():
    given = differentiable(CASE.make())
    with fastvid.backend("reference"):
        loss = step(*given)
    with ops.served() as record:
        loss.backward()
    assert record == {"image_conv_backward": "reference"}


def test_autocast_as_convolutions_do():
    x, weight, bias, residual = differentiable(CASE.make())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        summed, alone = ops.image_conv(x, weight, bias, residual), ops.image_conv(x, weight, bias)
    assert (summed.dtype, alone.dtype) == (torch.float32, torch.bfloat16)
    summed.sum().backward()
    assert {tensor.grad.dtype for tensor in (x, weight, bias, residual)} == {torch.float32}


@pytest.mark.parametrize(
    "change, told",
    [
        ({"x": torch.zeros(2, 3, 4)}, r"\[N, H, W, Cin\]"),
        ({"x": torch.zeros(2, 3, 4, 5).long()}, "floating"),
        ({"x": torch.zeros(2, 0, 4, 5)}, "at least 1"),
        ({"weight": torch.zeros(6, 5, 3, 1)}, r"\[Cout, Cin, 3, 3\]"),
        ({"weight": torch.zeros(0, 5, 3, 3)}, "at least 1"),
        ({"bias": torch.zeros(5)}, r"`bias` must be \[6\]"),
        ({"residual": torch.zeros(2, 3, 4, 5)}, r"`residual` must be \[2, 3, 4, 6\]"),
        ({"weight": torch.zeros(6, 5, 3, 3).double()}, "one dtype"),
    ],
)
def test_what_does_not_fit_is_refused(change, told):
    given = {"x": torch.zeros(2, 3, 4, 5), "weight": torch.zeros(6, 5, 3, 3)}
    with pytest.raises(ValueError, match=told):
        ops.image_conv(**given | change)
    assert ops.image_conv(**given).shape == (2, 3, 4, 6)


def test_a_gradient_of_another_shape_is_refused():
    x, weight, grad, wanted = CASE.make_backward()
    with pytest.raises(ValueError, match=r"`grad` must be \[3, 5, 7, 9\], got \[3, 5, 7, 8\]"):
        ops.image_conv_backward(x, weight, grad[..., :8], wanted)
