"""Swapping layers inside a live model: the same tensors, the same numbers, and reasons for what stays."""

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import fastvid
from fastvid import accelerate
from fastvid.nn import VectorQuantize

peer = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed: pip install -e '.[bench]'"
)


class Autoencoder(nn.Module):
    """Quantisers at several depths, two of them one layer, and dropout, which shows any random number too many."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Tanh())
        self.levels = nn.ModuleList([
            peer.VectorQuantize(16, 32, threshold_ema_dead_code=2),
            nn.Sequential(nn.Linear(16, 16), nn.Identity()),
            peer.VectorQuantize(16, 32, codebook_dim=4, kmeans_init=True, kmeans_iters=3),
            peer.VectorQuantize(16, 24, heads=2, separate_codebook_per_head=True, use_cosine_sim=True),
        ])
        self.again = self.levels[0]
        self.residual = peer.ResidualVQ(dim=16, num_quantizers=3, codebook_size=16, rotation_trick=False)
        self.decode = nn.Linear(16, 8)

    def forward(self, x):
        # side by side: rows that were quantised before are few different ones, and k-means among equals is chance
        h = self.levels[1](self.encode(x))
        layers = (self.levels[0], self.levels[2], self.levels[3], self.again, self.residual)
        outputs = [layer(h) for layer in layers]
        made = self.decode(sum(quantized for quantized, _, _ in outputs))
        return (made - x).square().mean() + sum(loss.sum() for _, _, loss in outputs)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for n in steps:
        torch.manual_seed(n)
        loss = model(torch.randn(4, 30, 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("before", [0, 5])
def test_training_goes_on_as_if_nothing_had_happened(before):
    torch.manual_seed(0)
    model = Autoencoder()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    train(model, optimizer, range(before))
    plain, plain_optimizer = copy.deepcopy((model, optimizer))
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    ids = [id(p) for p in model.parameters()] + [id(b) for b in model.state_dict(keep_vars=True).values()]
    report = accelerate(model)
    assert report.module is model and report.left == {}
    assert list(report.swapped) == [
        "levels.0", "levels.2", "levels.3", "again", "residual.layers.0", "residual.layers.1", "residual.layers.2"
    ]  # fmt: skip
    assert all(isinstance(model.get_submodule(name), VectorQuantize) for name in report.swapped)
    assert model.again is model.levels[0]
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == tensors
    assert [id(p) for p in model.parameters()] + [id(b) for b in model.state_dict(keep_vars=True).values()] == ids
    steps = range(before, before + 20)
    assert train(model, optimizer, steps) == pytest.approx(train(plain, plain_optimizer, steps), rel=1e-5)
    plain.load_state_dict(model.state_dict(), strict=True)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_a_second_call_finds_nothing():
    model = Autoencoder()
    accelerate(model)
    layers = [*model.modules()]
    again = accelerate(model)
    assert again.swapped == {} and again.left == {} and str(again) == "swapped 0, left 0"
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))


class Louder(peer.VectorQuantize):
    """Somebody's own layer."""


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"learnable_codebook": True, "ema_update": False}, "learnable_codebook, ema_update"),
        ({"orthogonal_reg_weight": 1.0, "ema_update": False}, "orthogonal_reg_weight"),
        ({"codebook_diversity_loss_weight": 1.0}, "uses codebook_diversity_loss_weight, which"),
        ({"commitment_use_cross_entropy_loss": True}, "commitment_use_cross_entropy_loss"),
        ({"stochastic_sample_codes": True}, "stochastic_sample_codes"),
        ({"straight_through": True, "rotation_trick": False}, "straight_through"),
        ({"affine_param": True}, "affine_param"),
        ({"manual_ema_update": True}, "manual_ema_update"),
        ({"ema_update": False}, "uses ema_update, which"),
        ({"directional_reparam": True, "threshold_ema_dead_code": 2}, "directional_reparam"),
        ({"sync_codebook": True, "sync_kmeans": False}, "sync_kmeans"),
    ],
)
def test_what_is_not_taken_stays_with_its_reason(options, reason):
    model = nn.Sequential(nn.Linear(4, 4), peer.VectorQuantize(4, 8, **options), peer.VectorQuantize(4, 8))
    kept = model[1]
    report = accelerate(model)
    assert model[1] is kept and isinstance(model[2], VectorQuantize)
    assert list(report.swapped) == ["2"] and reason in report.left["1"], report.left
    assert str(report).splitlines()[0] == "swapped 1, left 1" and f"left    1: {report.left['1']}" in str(report)


def test_subclasses_and_other_versions_stay():
    layer = peer.VectorQuantize(4, 8)
    del layer._codebook.decay, layer._codebook.manual_ema_update
    model = nn.ModuleDict({"own": Louder(4, 8), "old": layer})
    report = accelerate(model)
    assert report.swapped == {} and model["old"] is layer
    assert "subclass" in report.left["own"] and "not of a version that is known here" in report.left["old"]


def test_a_layer_by_itself_is_returned():
    layer = peer.VectorQuantize(4, 8).eval()
    report = accelerate(layer)
    assert isinstance(report.module, VectorQuantize) and not report.module.training
    assert "go on with report.module" in str(report) and "(the model itself)" in str(report)
    x = torch.randn(3, 5, 4)
    assert torch.equal(report.module(x)[1], layer(x)[1])


def test_hooks_and_flags_are_kept():
    model = nn.Sequential(peer.VectorQuantize(4, 8), peer.VectorQuantize(4, 8, codebook_dim=2))
    model[0].eval()
    model[1].project_in.requires_grad_(False)
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[1].register_forward_pre_hook(lambda *_: calls.append("before"))
    model[1]._codebook.register_forward_pre_hook(lambda *_: calls.append("codebook"))
    accelerate(model)
    assert not model[0].training and not model[0]._codebook.training and model[1].training
    assert not model[1].project_in.weight.requires_grad and model[1].project_out.weight.requires_grad
    model[0](torch.randn(2, 4)), model[1](torch.randn(2, 4))
    assert calls == ["after", "before", "codebook"]
    handle.remove()
    model[0](torch.randn(2, 4))
    assert len(calls) == 3


def test_half_precision():
    model = nn.Sequential(peer.VectorQuantize(4, 8, codebook_dim=2)).to(torch.bfloat16)
    accelerate(model)
    assert model[0].codebook.dtype == torch.float32 and model[0].project_in.weight.dtype == torch.bfloat16
    quantized, indices, _ = model[0](torch.randn(3, 4, dtype=torch.bfloat16))
    assert quantized.dtype == model[0].get_output_from_indices(indices).dtype == torch.bfloat16


def test_a_shared_codebook_stays_shared():
    layers = [peer.VectorQuantize(4, 8) for _ in range(2)]
    layers[1]._codebook = layers[0]._codebook
    model = nn.Sequential(*layers)
    accelerate(model)
    assert model[0]._codebook is model[1]._codebook and model[0] is not model[1]


def test_the_old_layers_are_let_go():
    model = nn.Sequential(peer.VectorQuantize(4, 8))
    old = weakref.ref(model[0])
    accelerate(model)
    gc.collect()
    assert old() is None


def test_no_package_is_imported():
    probe = """
import sys, torch
from fastvid import accelerate
report = accelerate(torch.nn.Linear(2, 2))
sys.exit("imported it" if "vector_quantize_pytorch" in sys.modules else str(report) != "swapped 0, left 0")
"""
    where = str(Path(fastvid.__file__).parents[1])
    told = subprocess.run([sys.executable, "-c", probe], env={"PYTHONPATH": where}, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="wanted a torch.nn.Module, got dict"):
        accelerate({})
