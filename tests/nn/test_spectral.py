"""Spectral normalisation in groups: torch's numbers, one iteration a forward, and nothing that outlives its use."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torchs
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fastvid
from fastvid.nn import (
    SeparableAttention,
    SpectralNorm,
    orthogonal_init_,
    spectral_norm,
    spectral_norm_all,
    spectral_norms,
)
from fastvid.testing import assert_within_yardstick


class Net(nn.Module):
    """Every kind of layer that is normalised, and what is not."""

    def __init__(self, checkpointing=False):
        super().__init__()
        self.first, self.embed = nn.Conv2d(3, 8, 3, padding=1), nn.Embedding(5, 8)
        self.deep = nn.Sequential(nn.Conv3d(8, 6, (1, 3, 3), padding=(0, 1, 1)), nn.ReLU(), nn.BatchNorm3d(6))
        self.score = nn.Linear(6, 1)
        self.checkpointing = checkpointing

    def body(self, x, label):
        h = self.first(x) + self.embed(label)[:, :, None, None]  # [B, C, H, W]
        return self.deep(h[:, :, None]).mean((2, 3, 4))

    def forward(self, x, label):
        h = checkpoint(self.body, x, label, use_reentrant=False) if self.checkpointing else self.body(x, label)
        return self.score(h)


NAMES = ["first", "embed", "deep.0", "score"]


def inputs(B=4):
    return torch.randn(B, 3, 6, 5), torch.randint(5, (B,))


def twins(checkpointing=False):
    """A net in a group, and the same with torch's parametrization on each layer."""
    ours, theirs = Net(checkpointing), Net()
    for name in NAMES:
        torchs.spectral_norm(theirs.get_submodule(name))
    group = spectral_norm_all(ours)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, group


def grads(net):
    return {name: p.grad for name, p in net.named_parameters()}


def close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def weight_of(net, name="first"):
    return net.get_submodule(name).parametrizations.weight


# ---- one layer


@pytest.mark.parametrize("make", [
    lambda: nn.Linear(7, 5), lambda: nn.Conv2d(3, 6, 3), lambda: nn.Embedding(9, 4),
    lambda: nn.ConvTranspose2d(4, 6, 3),
])  # fmt: skip
def test_one_layer_is_torchs_word_for_word(make):
    ours = make()
    theirs = copy.deepcopy(ours)
    torch.manual_seed(3)
    spectral_norm(ours, n_power_iterations=2)
    torch.manual_seed(3)
    torchs.spectral_norm(theirs, n_power_iterations=2)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        torch.testing.assert_close(ours.weight, theirs.weight)
        close(ours.state_dict(), theirs.state_dict())
    for net in (ours.train(), theirs.train()):
        net.weight.square().sum().backward()
    close(grads(ours), grads(theirs))


def test_a_layer_refuses_what_it_cannot_normalise():
    with pytest.raises(ValueError, match="two axes or more, got \\[3\\]"):
        spectral_norm(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="`gain` must be a tensor"):
        spectral_norm(nn.Linear(2, 2), "gain")
    with pytest.raises(ValueError, match="1 or more, got 0"):
        spectral_norm(nn.Linear(2, 2), n_power_iterations=0)


# ---- a group


def test_a_group_trains_as_torchs_layers_do():
    ours, theirs, _ = twins()
    steps = [torch.optim.SGD(net.parameters(), 0.1) for net in (ours, theirs)]
    for _ in range(3):
        x, label = inputs()
        for net, step in zip((ours, theirs), steps, strict=True):
            step.zero_grad()
            net(x, label).square().mean().backward()
            step.step()
        close(grads(ours), grads(theirs))
        close(ours.state_dict(), theirs.state_dict())
    ours.eval(), theirs.eval()
    x, label = inputs()
    torch.testing.assert_close(ours(x, label), theirs(x, label), rtol=1e-4, atol=1e-5)


def test_state_dicts_load_both_ways():
    ours, theirs, _ = twins()
    ours(*inputs())
    theirs.load_state_dict(ours.state_dict())
    ours.eval(), theirs.eval()
    x, label = inputs()
    torch.testing.assert_close(ours(x, label), theirs(x, label))


def test_two_forwards_before_their_backwards():
    ours, theirs, _ = twins()
    real, fake = inputs(), inputs()
    for net in (ours, theirs):
        (net(*fake).relu().mean() - net(*real).mean()).backward()
    close(grads(ours), grads(theirs))


def test_an_iteration_happens_at_the_forward_alone():
    net, _, group = twins()
    before = weight_of(net)[0]._u.clone()
    for _ in range(3):
        _ = net.first.weight
        net.deep[0](torch.randn(1, 8, 1, 3, 3))
    assert torch.equal(weight_of(net)[0]._u, before)
    net(*inputs())
    assert not torch.equal(weight_of(net)[0]._u, before)
    after = weight_of(net)[0]._u.clone()
    net.eval()(*inputs())
    assert torch.equal(weight_of(net)[0]._u, after)
    assert list(group.layers) == NAMES


def test_one_call_for_all_layers(monkeypatch):
    net, _, _ = twins()
    calls = []
    honest = fastvid.ops.spectral_norm
    monkeypatch.setattr(fastvid.ops, "spectral_norm", lambda *args: calls.append(len(args[0])) or honest(*args))
    net(*inputs())
    assert calls == [4]
    net.eval()
    with torch.no_grad():
        net(*inputs())
        calls.clear()
        for _ in range(3):
            net(*inputs())
    assert calls == []


def test_checkpointing_recomputes_the_same_weights():
    plain, _, _ = twins()
    recomputed = copy.deepcopy(plain)
    recomputed.checkpointing = True
    x, label = inputs()
    for net in (plain, recomputed):
        net(x, label).square().sum().backward()
    for name, grad in grads(plain).items():
        assert torch.equal(grad, grads(recomputed)[name]), name
    assert torch.equal(weight_of(plain)[0]._u, weight_of(recomputed)[0]._u)


@pytest.mark.parametrize("change", ["step", "load", "set", "buffer", "replace"])
def test_a_kept_weight_goes_when_something_changes(change):
    net, _, _ = twins()
    net.eval()
    entry = weight_of(net)
    with torch.no_grad():
        old = net.first.weight
        assert net.first.weight.data_ptr() == old.data_ptr()
        if change == "step":
            entry.original.mul_(3).add_(1)
        elif change == "load":
            net.load_state_dict({name: tensor + 0.5 for name, tensor in net.state_dict().items()})
        elif change == "set":
            net.first.weight = torch.randn_like(old)
        elif change == "buffer":
            entry[0]._u.neg_()
        else:
            entry.original = nn.Parameter(torch.randn_like(old))
        new = net.first.weight
    matrix = entry.original.detach().flatten(1).double()
    sigma = entry[0]._u.double() @ matrix @ entry[0]._v.double()
    torch.testing.assert_close(new.double(), entry.original.detach().double() / sigma, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(new, old)


def test_nothing_outlives_its_backward():
    net, _, _ = twins()
    loss = net(*inputs()).sum()
    assert net.first.weight.requires_grad
    loss.backward()
    net.first.weight.sum().backward()  # a graph of its own
    net.first.weight.sum().backward()
    net.eval()
    for _ in range(2):
        net(*inputs()).sum().backward()
    a, b = net(*inputs()), net(*inputs())
    a.sum().backward()
    b.sum().backward()


def test_copies_in_the_middle_of_a_step():
    net, _, group = twins()
    x, label = inputs()
    out = net(x, label)
    twin, layer = copy.deepcopy(net), copy.deepcopy(net.first)
    out.sum().backward()
    theirs = next(iter(twin._forward_pre_hooks.values()))
    assert isinstance(theirs, SpectralNorm) and theirs is not group
    assert theirs.layers["first"] is weight_of(twin)
    before = weight_of(net)[0]._u.clone()
    twin(x, label).sum().backward()
    assert torch.equal(weight_of(net)[0]._u, before) and not torch.equal(weight_of(twin)[0]._u, before)
    # a layer that leaves its group iterates by itself
    _ = layer.weight
    assert not torch.equal(layer.parametrizations.weight[0]._u, before)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    net.load_state_dict(torch.load(buffer, weights_only=True))


def test_frozen_layers_and_modes_within_one_root():
    net, theirs, _ = twins()
    for each in (net, theirs):
        each.embed.requires_grad_(False)
        each.deep.eval()
        each(*(torch.ones(2, 3, 4, 4), torch.tensor([0, 3]))).sum().backward()
    close({n: g for n, g in grads(net).items() if g is not None},
          {n: g for n, g in grads(theirs).items() if g is not None})  # fmt: skip
    assert weight_of(net, "embed").original.grad is None
    close(net.state_dict(), theirs.state_dict())


def test_inference_mode_leaves_nothing_that_autograd_refuses():
    net, _, _ = twins()
    net.eval().requires_grad_(False)
    x, label = inputs()
    with torch.inference_mode():
        first = net(x, label)
    x.requires_grad_()
    out = net(x, label)
    out.sum().backward()
    assert torch.equal(first, out) and x.grad.abs().sum() > 0


def test_autocast_and_half_weights_keep_float32_vectors():
    net, _, _ = twins()
    x, label = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, label)
        assert net.first.weight.dtype == torch.float32
    out.float().sum().backward()
    exact = weight_of(net)[0]._u.clone()
    net.bfloat16()
    assert weight_of(net)[0]._u.dtype == torch.float32 and torch.equal(weight_of(net)[0]._u, exact)
    net(x.bfloat16(), label).float().sum().backward()
    assert net.first.weight.dtype == torch.bfloat16
    net.double()(x.double(), label).sum().backward()
    assert weight_of(net)[0]._u.dtype == torch.float64


def test_torchs_layers_are_taken_over_with_their_numbers():
    block = SeparableAttention(8, spectral_norm=True)
    theirs = copy.deepcopy(block)
    group = spectral_norm_all(block)
    assert len(group.layers) == 12
    x = torch.randn(2, 8, 3, 4, 4)
    for net in (block, theirs):
        for along in (net.along_h, net.along_w, net.along_t):
            nn.init.ones_(along.gamma)
        net(x).square().sum().backward()
    close(block.state_dict(), theirs.state_dict())
    close(grads(block), grads(theirs))


def test_what_is_excluded_and_what_is_refused():
    net = Net()
    group = spectral_norm_all(net, exclude=["deep", net.score])
    assert list(group.layers) == ["first", "embed"] and spectral_norm_all(net, exclude=["deep"]) is group
    assert list(group.layers) == ["first", "embed", "score"] and len(net._forward_pre_hooks) == 1
    with pytest.raises(ValueError, match="`exclude` names 'depe', which is not in Net"):
        spectral_norm_all(net, exclude=["depe"])
    with pytest.raises(ValueError, match="`0.first` is in the group of another root"):
        spectral_norm_all(nn.Sequential(net))
    other = nn.Sequential(torchs.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="has the parametrization _WeightNorm"):
        spectral_norm_all(other)
    with pytest.raises(ValueError, match="is no parameter"):
        spectral_norm_all(nn.Sequential(nn.utils.spectral_norm(nn.Linear(2, 2))))


def test_another_weight_is_swapped_in_for_a_call():
    net, _, _ = twins()
    net.eval()
    x, label = inputs()
    swapped = {name: p.detach() * 0 + 0.5 for name, p in net.named_parameters() if name.endswith("original")}
    kept = net(x, label)
    other = torch.func.functional_call(net, swapped, (x, label))
    assert not torch.allclose(kept, other) and torch.equal(net(x, label), kept)


# ---- logs and beginnings


def test_norms_of_all_layers_for_a_log():
    net = Net()
    spectral_norm_all(net, exclude=["score"])
    torchs.spectral_norm(net.score)
    net.train()
    with torch.no_grad():
        for _ in range(100):
            net(*inputs())
    found = spectral_norms(net)
    assert list(found) == NAMES
    for name in NAMES:
        true = torch.linalg.matrix_norm(weight_of(net, name).original.flatten(1), 2).item()
        assert abs(found[name] / true - 1) < 1e-3
    assert spectral_norms(nn.Linear(2, 2)) == {}


def test_orthogonal_beginning():
    net = Net()
    spectral_norm_all(net)
    assert orthogonal_init_(net) is net
    for name in NAMES:
        matrix = weight_of(net, name).original.flatten(1)
        narrow = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        torch.testing.assert_close(narrow @ narrow.T, torch.eye(len(narrow)), atol=1e-5, rtol=0)
        torch.testing.assert_close(net.eval().get_submodule(name).weight.flatten(1), matrix, atol=1e-4, rtol=0)
        assert name == "embed" or not net.get_submodule(name).bias.any()
    plain = orthogonal_init_(nn.ConvTranspose2d(4, 4, 1))
    assert not plain.bias.any()


def test_a_tied_yardstick():
    net, theirs, _ = twins()
    x, label = inputs()
    exact = copy.deepcopy(theirs).double()
    outs = [net(x, label), exact(x.double(), label), theirs(x, label)]
    assert_within_yardstick(*outs, factor=4)  # through a batch norm, of four samples


def test_removal_leaves_the_normalised_weight():
    net, _, _ = twins()
    net.eval()
    weight = net.first.weight.detach().clone()
    parametrize.remove_parametrizations(net.first, "weight")
    assert torch.equal(net.first.weight, weight)
    net(*inputs())
