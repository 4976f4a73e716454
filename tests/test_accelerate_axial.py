"""Swapping axial-attention's layers: the same parameters and numbers, and reasons for what stays."""

import copy

import pytest
import torch
from torch import nn

from fastvid import accelerate
from fastvid.nn.axial import AxialAttention, AxisAttention, PreNorm

peer = pytest.importorskip("axial_attention", reason="axial-attention is not installed: pip install -e '.[bench]'")
package = peer.axial_attention  # the module of this name inside, with the layers that the package does not export


class Video(nn.Module):
    """Layers of all kinds, one of them used twice, one by a part of it, with dropout between."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([peer.AxialAttention(8, 3, 2, dim_index=1), peer.AxialAttention(8, 3, 4, 3),
                                   nn.Sequential(peer.AxialAttention(8, 3, 2, sum_axial_out=False))])  # fmt: skip
        self.again = self.body[0]
        self.rows = self.body[1].axial_attentions[2]
        self.alone = package.PermuteToFrom([0, 1, 3, 2, 4], package.SelfAttention(8, 2, 5))
        self.drop = nn.Dropout(0.1)
        self.frames = peer.AxialImageTransformer(8, depth=1, heads=2, reversible=False, axial_pos_emb_shape=(4, 5))
        self.back = peer.AxialImageTransformer(8, depth=2, heads=2, reversible=True)

    def forward(self, x):
        h = x.movedim(1, -1).contiguous()  # [B, T, H, W, C]
        h = h + self.drop(self.body[1](h)) + self.body[2](h) + self.alone(h) + self.rows(h)
        x = x + self.body[0](x) + self.drop(self.again(h.movedim(-1, 1)))
        images = x.movedim(2, 1).flatten(0, 1)  # [B T, C, H, W]
        return self.back(self.frames(images)).unflatten(0, (len(x), -1)).movedim(1, 2)


INSIDE = [f"frames.layers.blocks.0.{i}" for i in (0, 1)] + [
    f"back.layers.blocks.{block}.{part}.net" for block in (0, 2) for part in "fg"
]
NAMES = ["body.0", "body.1", "body.2.0", "again", "rows", "alone", *INSIDE]


def train(model, optimizer, steps):
    losses = []
    for n in steps:
        torch.manual_seed(n)
        x = torch.randn(2, 8, 3, 4, 5)
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("before", [0, 2])
def test_training_goes_on_as_if_nothing_had_happened(before):
    torch.manual_seed(0)
    model = Video()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    train(model, optimizer, range(before))
    plain, plain_optimizer = copy.deepcopy((model, optimizer))
    held = [*model.parameters(), *model.state_dict(keep_vars=True).values()]
    keys, random = [*model.state_dict()], torch.get_rng_state()
    report = accelerate(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert report.left == {} and sorted(report.swapped) == sorted(NAMES) and report.module is model
    assert report.swapped["body.0"] == "axial-attention AxialAttention -> fastvid.nn.AxialAttention"
    assert report.swapped["alone"] == "axial-attention PermuteToFrom -> fastvid.nn.AxisAttention"
    assert model.again is model.body[0] and model.rows is model.body[1].axial_attentions[2]
    assert isinstance(model.get_submodule(INSIDE[0]).fn, PreNorm)
    assert not any(type(layer).__module__.startswith("axial_attention.axial") and "Attention" in type(layer).__name__
                   for layer in model.modules())  # fmt: skip
    now = [*model.parameters(), *model.state_dict(keep_vars=True).values()]
    assert [*model.state_dict()] == keys and all(a is b for a, b in zip(now, held, strict=True))
    steps = range(before, before + 5)
    assert train(model, optimizer, steps) == pytest.approx(train(plain, plain_optimizer, steps), rel=1e-5)
    plain.load_state_dict(model.state_dict(), strict=True)
    model.eval(), plain.eval()
    x = torch.randn(1, 8, 3, 4, 5)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert str(accelerate(model)) == "swapped 0, left 0"


@pytest.mark.parametrize("sum_axial_out", [True, False])
def test_a_layer_by_itself_is_returned(sum_axial_out):
    layer = peer.AxialAttention(8, 2, 2, dim_index=1, sum_axial_out=sum_axial_out).eval()
    layer.axial_attentions[0].fn.to_q.weight.requires_grad_(False)
    report = accelerate(layer)
    ours = report.module
    assert isinstance(ours, AxialAttention) and [*report.swapped] == [""] and not ours.axial_attentions[1].fn.training
    x = torch.randn(2, 8, 4, 5)
    torch.testing.assert_close(ours(x), layer(x), rtol=1e-5, atol=1e-5)
    assert ours(x).stride() == layer(x).stride()
    along = accelerate(package.PermuteToFrom([0, 3, 2, 1], package.SelfAttention(8, 2))).module
    assert isinstance(along, AxisAttention) and (along.axis, along.channel_axis) == (2, 1)


def test_hooks_and_flags_stay():
    model = nn.Sequential(peer.AxialAttention(8, 1, 2), peer.AxialAttention(8, 1, 2).eval()).bfloat16()
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[1].register_forward_pre_hook(lambda *_: calls.append("before"))
    assert [*accelerate(model).swapped] == ["0", "1"]
    assert model[0].training and not model[1].training
    assert model(torch.randn(2, 3, 8).bfloat16()).dtype == torch.bfloat16 and calls == ["after", "before"]
    handle.remove()
    model(torch.randn(2, 3, 8).bfloat16())
    assert calls == ["after", "before", "before"]


class Louder(peer.AxialAttention):
    """Somebody's own layer."""


def changed(change) -> nn.Module:
    layer = peer.AxialAttention(8, 2, 2)
    change(layer)
    return layer


def part(layer: nn.Module, i: int) -> nn.Module:
    return layer.axial_attentions[i]


STAYS = {
    "a hook": (lambda layer: part(layer, 0).fn.to_q.register_forward_hook(print), "the Linear inside has hooks"),
    "a part's hook": (lambda layer: part(layer, 1).register_forward_hook(print), "the PermuteToFrom inside has hooks"),
    "its forward": (lambda layer: setattr(part(layer, 1).fn, "forward", abs), "a forward inside was replaced"),
    "another head": (lambda layer: setattr(part(layer, 1).fn, "heads", 4), "not those that it was made with"),
    "other heads": (lambda layer: setattr(part(layer, 1), "fn", package.SelfAttention(8, 4)), "all with as many heads"),
    "an axis twice": (lambda layer: layer.axial_attentions.__setitem__(1, part(layer, 0)), "for each axis"),
    "weight norm": (lambda layer: nn.utils.parametrizations.weight_norm(part(layer, 0).fn.to_q), "not those that it"),
    "another layer": (lambda layer: setattr(part(layer, 0), "fn", nn.Linear(8, 8)), "is a Linear, which may do"),
    "one more": (lambda layer: layer.axial_attentions.append(nn.Identity()), "other layers than its own"),
    "an older version": (lambda layer: delattr(layer, "total_dimensions"), "not of a version that is known here"),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_what_is_otherwise_stays_with_its_reason(name):
    change, reason = STAYS[name]
    model = nn.ModuleDict({"own": changed(change), "plain": peer.AxialAttention(8, 2, 2)})
    kept = model["own"]
    report = accelerate(model)
    assert model["own"] is kept and reason in report.left["own"], report.left
    assert isinstance(model["plain"], AxialAttention) and report.swapped["plain"]


def test_parts_of_what_stays_are_swapped_by_themselves():
    model = nn.Sequential(Louder(8, 2, 2))
    plain = copy.deepcopy(model)
    report = accelerate(model)
    assert "a subclass" in report.left["0"]
    assert [*report.swapped] == ["0.axial_attentions.0", "0.axial_attentions.1"] and type(model[0]) is Louder
    x = torch.randn(2, 4, 5, 8)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)
    between = package.PermuteToFrom([2, 1, 0, 3], package.SelfAttention(8, 2))
    assert "from sample to sample" in accelerate(nn.Sequential(between)).left["0"]


def test_a_swapped_model_compiles_whole():
    model = nn.Sequential(peer.AxialAttention(8, 2, 2), nn.ReLU())
    accelerate(model)
    x = torch.randn(1, 3, 4, 8)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
