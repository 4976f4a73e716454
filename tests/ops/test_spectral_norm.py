"""Spectral normalisation of many weights against torch's of each, and what only the op itself promises."""

import pytest
import torch
from fastvid.kernels.spectral_norm import cases, reference
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm as torchs

from fastvid import ops
from fastvid.testing import assert_within_yardstick


def made(case, dtype=torch.float32):
    weights, u, v, iterations, eps, dims = case.make(dtype=dtype)
    return [weight.requires_grad_() for weight in weights], u, v, iterations, eps, dims


def test_equals_torchs_parametrization():
    layers = [nn.Conv2d(5, 9, 3), nn.Linear(7, 4), nn.ConvTranspose2d(6, 5, 2), nn.Embedding(11, 3)]
    dims = [0, 0, 1, 0]
    for layer in layers:
        torchs(layer)
    lists = [layer.parametrizations.weight for layer in layers]
    weights = [entry.original.detach().clone().requires_grad_() for entry in lists]
    u, v = ([getattr(entry[0], name).clone() for entry in lists] for name in ("_u", "_v"))
    done = ops.spectral_norm(weights, u, v, True, dims=dims)
    upstream = [torch.randn_like(weight) for weight in weights]
    torch.autograd.backward(done.out, upstream)
    for layer, grad in zip(layers, upstream, strict=True):
        layer.weight.backward(grad)
    for i, entry in enumerate(lists):
        torch.testing.assert_close(done.u[i], entry[0]._u)
        torch.testing.assert_close(done.v[i], entry[0]._v)
        torch.testing.assert_close(weights[i].grad, entry.original.grad)


@pytest.mark.parametrize("iterations", [0, 1])
def test_gradcheck(iterations):
    case = cases.Case("", ((3, 4), (2, 3, 2, 2), (4, 2, 2)), (0, 0, 1), iterations)
    weights, u, v, _, eps, dims = made(case, torch.float64)
    if iterations:
        done = ops.spectral_norm(weights, u, v, 1, eps, dims)
        u, v = done.u, done.v  # as constants: with those it moved to, the op is a function of the weights alone

    def normed(*weights):
        return tuple(ops.spectral_norm(list(weights), u, v, 0, eps, dims).out)

    assert torch.autograd.gradcheck(normed, weights, fast_mode=True)
    assert torch.autograd.gradgradcheck(normed, weights, fast_mode=True)


def test_the_gradient_after_an_iteration_takes_the_new_vectors():
    weights, u, v, _, eps, dims = made(cases.ALL[2])
    done = ops.spectral_norm(weights, u, v, 1, eps, dims)
    assert not (done.sigma.requires_grad or done.u[0].requires_grad)
    upstream = [torch.randn_like(out) for out in done.out]
    found = torch.autograd.grad(done.out, weights, upstream)
    again = ops.spectral_norm(weights, done.u, done.v, 0, eps, dims)
    same = torch.autograd.grad(again.out, weights, upstream)
    for ours, theirs in zip(found, same, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert again.u == [] and again.v == []


def test_weights_that_nobody_used_have_no_gradient():
    weights, u, v, iterations, eps, dims = made(cases.ALL[2])
    weights[1].requires_grad_(False)
    done = ops.spectral_norm(weights, u, v, iterations, eps, dims)
    (done.out[0].sum() + done.out[1].sum()).backward()
    assert weights[0].grad is not None and all(weight.grad is None for weight in weights[1:])


def test_converges_to_the_largest_singular_value():
    weights = [torch.randn(12, 30), torch.randn(8, 3, 3, 3)]
    u, v = [torch.randn(12), torch.randn(8)], [torch.randn(30), torch.randn(27)]
    done = ops.spectral_norm(weights, u, v, 500)
    for weight, sigma in zip(weights, done.sigma, strict=True):
        true = torch.linalg.matrix_norm(weight.double().flatten(1), 2)
        peer = torch.linalg.matrix_norm(weight.flatten(1), 2)
        assert_within_yardstick(sigma, true, peer)


def test_zero_weights_divide_as_torch_does():
    done = ops.spectral_norm([torch.zeros(3, 4)], [torch.ones(3)], [torch.ones(4)])
    assert done.sigma.tolist() == [0.0] and done.out[0].isnan().all()
    assert done.u[0].tolist() == [0.0] * 3 and done.v[0].tolist() == [0.0] * 4


def test_memory_formats_are_kept():
    weight = torch.randn(8, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    u, v = torch.randn(8), torch.randn(54)
    done = ops.spectral_norm([weight], [u], [v])
    assert done.out[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(done.out[0], ops.spectral_norm([weight.contiguous()], [u], [v]).out[0])


def test_compiles_whole():
    weights, u, v, iterations, eps, dims = made(cases.ALL[2])

    def step(weights, u, v):
        done = ops.spectral_norm(weights, u, v, iterations, eps, dims)
        return sum(out.square().sum() for out in done.out), done.u

    loss, new = torch.compile(step, fullgraph=True, backend="aot_eager")(weights, u, v)
    peer, same = step(weights, u, v)
    torch.testing.assert_close(loss, peer)
    torch.testing.assert_close(new, same)
    for ours, theirs in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(peer, weights), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("spoil, told", [
    (lambda w, u, v: (w, u[1:], v), "every weight wants a u, a v and a dim, got 4 weights, 3 u, 4 v and 4 dims"),
    (lambda w, u, v: ([w[0][:, 0, 0, 0], *w[1:]], u, v), r"weight 0 must be floating with two axes or more"),
    (lambda w, u, v: (w, [u[0][:2], *u[1:]], v), r"weight 0 wants u \[3\] and v \[45\], got \[2\] and \[45\]"),
    (lambda w, u, v: (w, [u[0].double(), *u[1:]], v), "u and v must be float32"),
    (lambda w, u, v: ([w[0], w[1].double(), *w[2:]], u, v), "u and v must be float32"),
    (lambda w, u, v: (w, [u[0].to("meta"), *u[1:]], v), "one device is wanted, got meta and cpu"),
])  # fmt: skip
def test_refuses(spoil, told):
    weights, u, v, *_ = cases.ALL[2].make()
    with pytest.raises(ValueError, match=told):
        ops.spectral_norm(*spoil(weights, u, v))
    with pytest.raises(ValueError, match="`iterations` must be 0 or more"):
        ops.spectral_norm(weights, u, v, -1)


def test_half_weights_are_summed_in_float32():
    weights, u, v, _, eps, dims = cases.ALL[9].make(dtype=torch.bfloat16)
    sigma = ops.spectral_norm(weights, u, v, 1, eps, dims).sigma
    exact = [reference.spectral_norm([w.double()], [a.double()], [b.double()], 1, eps, [d])[3][0]
             for w, a, b, d in zip(weights, u, v, dims, strict=True)]  # fmt: skip
    torch.testing.assert_close(sigma.double(), torch.stack(exact), rtol=1e-5, atol=0)


def test_no_weights():
    assert ops.spectral_norm([], [], []).out == []
    assert ops.spectral_norm_backward([], [], [], [], torch.empty(0), []) == []
