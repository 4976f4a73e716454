"""The conditional batch normalisation layer: running statistics, two processes, recomputation, refusals."""

import copy
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastvid
from fastvid.nn import ConditionalBatchNorm, frozen_statistics, standing_statistics

STATE = ["running_mean", "running_var", "num_batches_tracked"]


def layer_and_input(B=3, C=5, D=4, T=2, size=4, **options):
    return ConditionalBatchNorm(C, D, T, **options), torch.randn(B, C, T, size, size), torch.randn(B, D)


def torchs_own(x, running_mean, running_var, momentum):
    """torch's batch normalisation with every frame's channels as channels of their own."""
    B, C, T, H, W = x.shape
    folded = x.transpose(1, 2).reshape(B, T * C, H, W)
    out = F.batch_norm(folded, running_mean, running_var, training=True, momentum=momentum)
    return out.view(B, T, C, H, W).transpose(1, 2)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_normalisation_of_every_frame(momentum):
    layer, _, _ = layer_and_input(momentum=momentum, relu=True)
    mean, var = torch.zeros(2 * 5), torch.ones(2 * 5)
    for i in range(3):
        x, condition = torch.randn(3, 5, 2, 4, 4) * 2 + 1, torch.randn(3, 4)
        out = layer(x, condition)
        normed = torchs_own(x, mean, var, 1 / (i + 1) if momentum is None else momentum)
        gain, bias = 1 + condition @ layer.gain.weight.T, condition @ layer.bias.weight.T
        expected = (normed * gain[:, :, None, None, None] + bias[:, :, None, None, None]).relu()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.running_mean.flatten(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var.flatten(), var, rtol=1e-5, atol=1e-6)
    assert layer.num_batches_tracked == 3


def test_in_eval_mode_running_statistics_serve_and_stay():
    layer, x, condition = layer_and_input(upsample=True)
    layer(x, condition)
    before = copy.deepcopy(layer.eval().state_dict())
    whole, one = layer(x, condition), layer(x[:1], condition[:1])
    torch.testing.assert_close(whole[:1], one)
    assert whole.shape == (3, 5, 2, 8, 8)
    assert layer(x[:0], condition[:0]).shape == (0, 5, 2, 8, 8)
    assert all(torch.equal(before[name], layer.state_dict()[name]) for name in STATE)
    other = ConditionalBatchNorm(5, 4, 2, upsample=True).eval()
    other.load_state_dict(before)
    assert torch.equal(other(x, condition), whole)


def test_the_layout_is_channels_last():
    layer, x, condition = layer_and_input()
    assert layer(x, condition).movedim(1, -1).is_contiguous()
    last = layer(x.movedim(1, -1).contiguous().movedim(-1, 1), condition)
    torch.testing.assert_close(last, layer(x, condition))


def test_frozen_statistics_do_not_move():
    layer, x, condition = layer_and_input()
    layer(x, condition)
    before = copy.deepcopy(layer.state_dict())
    with frozen_statistics():
        out = layer(x + 1, condition)
    assert all(torch.equal(before[name], layer.state_dict()[name]) for name in STATE)
    assert torch.equal(layer(x + 1, condition), out) and layer.num_batches_tracked == 2


def test_recomputed_under_checkpointing_it_counts_a_batch_once():
    plain, x, condition = layer_and_input(relu=True, upsample=True)
    stored, inputs = copy.deepcopy(plain), [x.clone().requires_grad_(), x.clone().requires_grad_()]
    plain(inputs[0], condition).square().sum().backward()
    checkpoint(stored, inputs[1], condition, use_reentrant=False,
               context_fn=lambda: (nullcontext(), frozen_statistics())).square().sum().backward()  # fmt: skip
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(plain.gain.weight.grad, stored.gain.weight.grad)
    assert all(torch.equal(plain.state_dict()[name], stored.state_dict()[name]) for name in STATE)


def test_standing_statistics_are_the_average_of_what_is_seen():
    model = nn.ModuleDict({"a": ConditionalBatchNorm(5, 4, 2), "b": ConditionalBatchNorm(5, 4, 2, momentum=0.3)})
    batches, condition = [torch.randn(3, 5, 2, 4, 4) + i for i in range(4)], torch.randn(3, 4)
    model["a"](batches[3], condition)
    model.eval()
    model["b"].train()
    with torch.no_grad(), standing_statistics(model):
        for x in batches:
            for layer in model.values():
                layer(x, condition)
    assert [(layer.training, layer.momentum) for layer in model.values()] == [(False, 0.1), (True, 0.3)]
    for layer in model.values():
        means = torch.stack([x.mean((0, 3, 4)).T for x in batches])
        variances = torch.stack([x.var((0, 3, 4)).T for x in batches])
        torch.testing.assert_close(layer.running_mean, means.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var, variances.mean(0), rtol=1e-5, atol=1e-6)
        assert layer.num_batches_tracked == 4


def test_standing_statistics_give_the_mode_back_after_an_error():
    layer = ConditionalBatchNorm(5, 4, 2).eval()
    with pytest.raises(RuntimeError, match="on purpose"), standing_statistics(layer):
        raise RuntimeError("on purpose")
    assert not layer.training and layer.momentum == 0.1


def test_without_a_process_group_sync_changes_nothing():
    layer, x, condition = layer_and_input()
    other = copy.deepcopy(layer)
    other.sync = True
    assert torch.equal(layer(x, condition), other(x, condition))


def test_autocast_keeps_statistics_in_float32():
    layer, x, condition = layer_and_input(relu=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x.bfloat16(), condition)
    assert out.dtype == torch.bfloat16 and layer.running_mean.dtype == torch.float32
    out.sum().backward()
    assert layer.gain.weight.grad.dtype == torch.float32


def test_a_parametrized_weight_is_read_at_every_forward():
    layer, x, condition = layer_and_input()
    nn.utils.parametrizations.spectral_norm(layer.gain)
    layer(x, condition).sum().backward()
    assert layer.gain.parametrizations.weight.original.grad is not None


def test_compiles_whole():
    layer, x, condition = layer_and_input(relu=True, upsample=True)
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, condition), layer(x, condition), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(other.state_dict()[name], layer.state_dict()[name]) for name in STATE)


@pytest.mark.parametrize(
    "x, condition, told",
    [
        ((3, 5, 3, 4, 4), (3, 4), r"`x` must be \[B, 5, 2, H, W\]"),
        ((3, 6, 2, 4, 4), (3, 4), r"\[3, 6, 2, 4, 4\]"),
        ((3, 5, 2, 4), (3, 4), r"\[3, 5, 2, 4\]"),
        ((3, 5, 2, 4, 4), (2, 4), r"`condition` \[B, 4\]"),
        ((1, 5, 2, 1, 1), (1, 4), "more than one value"),
    ],
)
def test_what_does_not_fit_is_refused(x, condition, told):
    layer = ConditionalBatchNorm(5, 4, 2)
    with pytest.raises(ValueError, match=told):
        layer(torch.zeros(x), torch.zeros(condition))


@pytest.mark.parametrize("sizes", [(0, 4, 2), (5, 0, 2), (5, 4, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        ConditionalBatchNorm(*sizes)


def test_two_processes_normalise_as_one_does(tmp_path):
    program, where = Path(__file__).with_name("two_norms.py"), str(Path(fastvid.__file__).parents[1])
    command = [sys.executable, program, str(tmp_path / "store"), str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": where}, stderr=subprocess.PIPE, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.manual_seed(0)
    layer, x, condition = layer_and_input(relu=True, upsample=True)
    x.requires_grad_()
    out = layer(x, condition)
    out.square().sum().backward()
    shared = {"gain": layer.gain.weight.grad, "bias": layer.bias.weight.grad}
    torch.testing.assert_close(torch.cat([part["out"] for part in parts]), out)
    torch.testing.assert_close(torch.cat([part["grad_x"] for part in parts]), x.grad, rtol=1e-4, atol=1e-4)
    for name, expected in shared.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], expected, rtol=1e-4, atol=1e-4)
    for part in parts:
        for name in STATE:
            torch.testing.assert_close(part[name], layer.state_dict()[name], rtol=1e-5, atol=1e-6)
