"""The codebook layer by itself: shapes, gradients, what moves and what stays, starts and restarts, refusals."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastvid
from fastvid.nn import VectorQuantize, perplexity
from fastvid.nn.draw import distant_rows, stratified_rows
from fastvid.nn.through import past_quantizer


def test_straight_through_and_commitment():
    layer = VectorQuantize(4, 8, rotation_trick=False, commitment_weight=0.25)
    x = torch.randn(2, 3, 4, requires_grad=True)
    before = layer.codebook.clone()
    quantized, indices, loss = layer(x)
    assert torch.equal(quantized, before[indices]) and indices.shape == (2, 3)
    upstream = torch.randn_like(x)
    (through,) = torch.autograd.grad(quantized, x, upstream, retain_graph=True)
    assert torch.equal(through, upstream)
    (pull,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(pull, 0.25 * 2 * (x - before[indices]).detach() / x.numel())


def test_quantised_rows_come_from_the_codebook_before_its_update():
    layer = VectorQuantize(4, 8)
    before = layer.codebook.clone()
    quantized, indices, _ = layer(torch.randn(64, 4))
    assert torch.equal(quantized, before[indices])
    assert not torch.equal(layer.codebook, before)


def test_gradient_of_the_rotation_is_that_of_its_matrix():
    x, code, upstream = torch.randn(3, 50, 3, dtype=torch.float64).unbind()
    code[0] = -1.5 * x[0] + 0.01  # nearly opposite directions, between which the middle one is hard to see
    code[1] = 2 * x[1]
    pull = torch.randn(50, dtype=torch.float64)
    u, v = F.normalize(x, dim=1), F.normalize(code, dim=1)
    w = F.normalize(u + v, dim=1)
    turn = torch.eye(3).double() - 2 * w[:, :, None] * w[:, None] + 2 * v[:, :, None] * u[:, None]
    turn = turn * (code.norm(dim=1) / x.norm(dim=1))[:, None, None]
    torch.testing.assert_close((turn @ x[..., None])[..., 0], code)  # it takes every x to its code
    a = x.clone().requires_grad_()
    outputs = past_quantizer(a, code, (x - code).square().sum(1), rotate=True)
    (x_grad,) = torch.autograd.grad(outputs, a, (upstream, pull))
    wanted = (upstream[:, None] @ turn)[:, 0] + 2 * pull[:, None] * (x - code)
    torch.testing.assert_close(x_grad, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rotate", [False, True])
def test_what_passes_are_the_codes_even_of_rows_without_a_direction(rotate):
    x, code = torch.randn(6, 4), torch.randn(6, 4)
    x[0] = 0
    code[1] = 0
    x.requires_grad_()
    distance = (x.detach() - code).square().sum(1)
    out, far = past_quantizer(x, code, distance, rotate)
    assert torch.equal(out, code) and torch.equal(far, distance) and out.requires_grad
    (only_far,) = torch.autograd.grad(far.sum(), x, retain_graph=True)
    torch.testing.assert_close(only_far, 2 * (x - code).detach())
    (only_out,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (both,) = torch.autograd.grad(out.sum() + far.sum(), x)
    assert both.isfinite().all()
    torch.testing.assert_close(both, only_far + only_out)


@pytest.mark.parametrize(
    "options, shape, indices",
    [
        ({}, (5, 8), (5,)),
        ({}, (5, 3, 8), (5, 3)),
        ({}, (2, 3, 4, 5, 8), (2, 3, 4, 5)),
        ({"channel_last": False}, (5, 8, 3), (5, 3)),
        ({"accept_image_fmap": True}, (2, 8, 3, 4), (2, 3, 4)),
        ({"accept_3d_fmap": True}, (2, 8, 3, 4, 5), (2, 3, 4, 5)),
        ({"heads": 2, "codebook_dim": 4, "accept_3d_fmap": True}, (2, 8, 3, 4, 5), (2, 3, 4, 5, 2)),
        ({"heads": 2, "separate_codebook_per_head": True}, (5, 3, 8), (5, 3, 2)),
        ({"codebook_dim": 3}, (0, 7, 8), (0, 7)),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_shapes(options, shape, indices, training):
    layer = VectorQuantize(8, 16, **options).train(training)
    quantized, codes, loss, parts = layer(torch.randn(shape), return_loss_breakdown=True)
    assert quantized.shape == shape and codes.shape == indices and codes.dtype == torch.int64
    assert loss.shape == () and loss.requires_grad == training and (training or loss == 0)
    assert parts.commitment.shape == () and parts.orthogonal_reg == 0
    assert layer.codebook.shape == ((2, 16, 8) if "separate_codebook_per_head" in options else layer.codebook.shape)


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 3}, {"heads": 2, "separate_codebook_per_head": True}])
def test_evaluation_is_what_its_indices_say(options):
    layer = VectorQuantize(8, 16, accept_3d_fmap=True, **options).eval()
    quantized, indices, _ = layer(torch.randn(2, 8, 2, 3, 4))
    out = layer.project_out(layer.get_codes_from_indices(indices).movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(out, quantized)
    flat = VectorQuantize(8, 16, **options).eval()
    quantized, indices, _ = flat(torch.randn(2, 5, 8))
    torch.testing.assert_close(flat.get_output_from_indices(indices), quantized)


def test_what_moves_a_codebook():
    def moved(layer: nn.Module, **arguments) -> bool:
        before = copy.deepcopy(layer.state_dict())
        layer(torch.randn(64, 4), **arguments)
        return any(not torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())

    assert moved(VectorQuantize(4, 8)) and not moved(VectorQuantize(4, 8).eval())
    assert not moved(VectorQuantize(4, 8), freeze_codebook=True)
    assert not moved(VectorQuantize(4, 8, freeze_codebook=True))
    assert moved(VectorQuantize(4, 8, freeze_codebook=True), freeze_codebook=False)
    assert not moved(VectorQuantize(4, 8, draw="distance").eval())


def test_padding_changes_nothing():
    """Masked tokens may be anything, even NaN: they come back as zeros and -1, and neither codes nor loss see them."""
    x, mask = torch.randn(3, 7, 4), torch.rand(3, 7) > 0.4
    layer, packed = (VectorQuantize(4, 8, kmeans_init=True, threshold_ema_dead_code=2) for _ in range(2))
    packed.load_state_dict(layer.state_dict())
    for step in range(5):
        seeds = torch.random.fork_rng()
        garbage = torch.where(mask[..., None], x + step, torch.nan)
        with seeds:
            torch.manual_seed(step)
            quantized, indices, loss = layer(garbage, mask=mask)
        torch.manual_seed(step)
        wanted = packed((x + step)[mask][None])
        torch.testing.assert_close(quantized[mask], wanted[0][0])
        assert torch.equal(indices[mask], wanted[1][0]) and (indices[~mask] == -1).all()
        assert (quantized[~mask] == 0).all()
        torch.testing.assert_close(loss, wanted[2])
        for name, tensor in layer.state_dict().items():
            torch.testing.assert_close(tensor, packed.state_dict()[name])


def test_gradients_of_padding_are_zero():
    x = torch.randn(2, 5, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    garbage = torch.where(mask[..., None], x, torch.nan)
    quantized, _, loss = VectorQuantize(4, 8)(garbage, lens=torch.tensor([2, 4]))
    (loss + quantized.sum()).backward()
    assert (x.grad[~mask] == 0).all() and (x.grad[mask] != 0).any(1).all() and x.grad.isfinite().all()


def test_rows_that_are_not_finite_never_reach_the_state():
    for options in ({}, {"use_cosine_sim": True}, {"draw": "distance"}, {"kmeans_init": True}):
        layer = VectorQuantize(4, 8, threshold_ema_dead_code=1.0, **options)
        x = torch.randn(40, 4)
        x[::3] = torch.nan
        x[1] = torch.inf
        for _ in range(5):
            layer(x)
        layer(torch.full((40, 4), torch.nan))
        assert all(t.isfinite().all() for t in layer.state_dict().values() if t.is_floating_point()), options


def test_start_by_distance():
    layer = VectorQuantize(4, 8, draw="distance")
    assert not layer._codebook.initted
    layer(torch.randn(500, 4) + 100)
    assert (layer.codebook - 100).abs().max() < 6  # far from the random start around 0
    assert layer._codebook.initted


def test_a_start_that_was_undone_is_made_again():
    """A training loop may put the state back as it was before a step that went wrong."""
    layer = VectorQuantize(4, 8, draw="distance")
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(500, 4) + 100)
    layer(torch.randn(500, 4) + 100)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            tensor.copy_(before[name])
    layer(torch.randn(500, 4) - 100)
    assert (layer.codebook + 100).abs().max() < 6
    layer.load_state_dict(before)
    layer(torch.randn(500, 4) + 100)
    assert (layer.codebook - 100).abs().max() < 6


@pytest.mark.parametrize("draw", ["uniform", "distance"])
def test_dead_codes_are_reborn_with_their_statistics(draw):
    layer = VectorQuantize(2, 4, decay=0.5, threshold_ema_dead_code=0.2, draw=draw)
    layer._codebook.initted.fill_(True)
    layer.codebook = torch.tensor([[0.0, 0], [1, 1], [500, 500], [600, 600]])
    layer._codebook.embed_avg.copy_(layer._codebook.embed)
    rows = torch.rand(256, 2)
    for _ in range(3):
        layer(rows)
    assert layer.codebook.abs().max() < 2
    # a code revived alone would be averaged back: its sum over its count must agree with it
    state = layer._codebook
    torch.testing.assert_close(state.embed_avg / state.cluster_size[..., None], state.embed, rtol=1e-2, atol=1e-2)


def test_training_finds_clusters():
    centres = 10 * torch.randn(16, 8)
    layer = VectorQuantize(8, 16, threshold_ema_dead_code=1.0, draw="distance")
    for _ in range(60):
        rows = centres[torch.randint(16, (512,))] + 0.1 * torch.randn(512, 8)
        layer(rows)
    nearest = torch.cdist(centres, layer.codebook).amin(1)
    assert (nearest < 0.5).float().mean() > 0.8


def test_rows_drawn_without_a_look_are_drawn_fairly():
    M, K, rounds = 50, 7, 2000
    rows, far = torch.arange(M).float()[:, None], torch.ones(M)
    far[10:20] = torch.nan
    drawn = torch.stack([stratified_rows(rows, far, K)[:, 0] for _ in range(rounds)]).long()  # [rounds, K]
    assert all(len(set(draw.tolist())) == K for draw in drawn)  # no row twice
    counts = drawn.flatten().bincount(minlength=M)
    assert (counts[10:20] == 0).all()
    usable = counts[far.isfinite()].double()
    expected = rounds * K / 40
    # one draw in seven takes each of five or six rows: 25 % apart at most, and five standard deviations of chance
    assert ((usable - expected).abs() < 0.25 * expected + 5 * expected**0.5).all()
    per_code = torch.stack([column.bincount(minlength=M) > 0 for column in drawn.T])
    assert per_code[:, far.isfinite()].all()  # every code may get every row
    few = stratified_rows(rows[:3], torch.ones(3), K)
    assert few.shape == (K, 1) and set(few.flatten().tolist()) == {0.0, 1.0, 2.0}
    assert stratified_rows(rows, torch.full((M,), torch.nan), K).shape == (K, 1)


def test_far_rows_are_drawn_in_proportion():
    rows, far = torch.arange(4.0)[:, None] * 10, torch.tensor([1.0, 3.0, torch.nan, 0.0])
    drawn = (distant_rows(rows, far, 20000) / 10).round().long().flatten().bincount(minlength=4) / 20000
    torch.testing.assert_close(drawn, torch.tensor([0.25, 0.75, 0.0, 0.0]), atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_state(dtype):
    layer = VectorQuantize(4, 8, codebook_dim=3)
    state = copy.deepcopy(layer._codebook.state_dict())
    layer.to(dtype)
    assert layer.project_in.weight.dtype == dtype
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer._codebook.state_dict().items())
    quantized, indices, loss = layer(torch.randn(32, 4, dtype=dtype, requires_grad=True))
    assert quantized.dtype == dtype and loss.dtype == torch.float32
    (loss + quantized.float().sum()).backward()
    assert layer.get_codes_from_indices(indices).dtype == layer.get_output_from_indices(indices).dtype == dtype
    assert layer.float().get_codes_from_indices(indices).dtype == torch.float32
    assert layer.codebook.dtype == torch.float32


def test_under_autocast_the_state_follows_in_float32():
    layer, plain = VectorQuantize(4, 8), VectorQuantize(4, 8)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(64, 4)
    with torch.autocast("cpu", torch.bfloat16):
        quantized, indices, _ = layer(x)
    assert torch.equal(indices, plain(x)[1]) and quantized.dtype == torch.float32
    assert torch.equal(layer.codebook, plain.codebook)


def test_double_precision_input():
    quantized, _, loss = VectorQuantize(4, 8)(torch.randn(9, 4, dtype=torch.float64, requires_grad=True))
    assert quantized.dtype == torch.float64 and loss.requires_grad


@pytest.mark.parametrize("options", [{}, {"threshold_ema_dead_code": 1}, {"kmeans_init": True}, {"draw": "distance"},
                                     {"heads": 2, "separate_codebook_per_head": True, "use_cosine_sim": True}])
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_whole(options, masked):
    torch.compiler.reset()
    layer = VectorQuantize(8, 16, **options)
    x, mask = torch.randn(4, 6, 8), torch.rand(4, 6) > 0.3 if masked else None
    layer(x, mask=mask)  # a start asks the device, so the first step is not for compiling
    eager = copy.deepcopy(layer)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for _ in range(3):
        a, b = (x.clone().requires_grad_() for _ in range(2))
        got, wanted = compiled(a, mask=mask), eager(b, mask=mask)
        for out in (got, wanted):
            (out[2] + out[0].square().sum()).backward()
        for one, other in zip((*got, a.grad), (*wanted, b.grad), strict=True):
            torch.testing.assert_close(one, other)
        if layer._codebook.dead_below:  # compiled code draws other rows for the dead
            eager.load_state_dict(layer.state_dict())
        for name, tensor in layer.state_dict().items():
            torch.testing.assert_close(tensor, eager.state_dict()[name])
    assert counter.frame_count == 1
    layer.eval(), eager.eval()
    for one, other in zip(compiled(x), eager(x), strict=True):
        torch.testing.assert_close(one, other)
    assert counter.frame_count == 2


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"threshold_ema_dead_code": 1}, {"kmeans_init": True, "use_cosine_sim": True},
                                     {"draw": "distance", "threshold_ema_dead_code": 1}])  # fmt: skip
def test_a_training_step_never_waits_for_the_device(options):
    layer = VectorQuantize(8, 16, **options).cuda()
    x = torch.randn(4, 60, 8, device="cuda", requires_grad=True)
    mask = torch.rand(4, 60, device="cuda") > 0.3
    layer(x), layer(x, mask=mask)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            quantized, _, loss = layer(x, mask=mask)
            (loss + quantized.square().sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: VectorQuantize(4, 8, learnable_codebook=True), NotImplementedError, "`learnable_codebook`.*True; for"),
        (lambda: VectorQuantize(4, 8, orthogonal_reg_weight=0.1), NotImplementedError, "0.1; add it to your own loss"),
        (lambda: VectorQuantize(4, 8, sync_kmeans=False), NotImplementedError, "leave it True"),
        (lambda: VectorQuantize(4, 8, in_place_codebook_optimizer=dict), NotImplementedError, "got a type"),
        (lambda: VectorQuantize(4, 8, codebook_width=3), TypeError, "unknown option 'codebook_width'"),
        (lambda: VectorQuantize(4, 8, draw="near"), ValueError, "'uniform' or 'distance', got 'near'"),
        (lambda: VectorQuantize(4, 8)(torch.zeros(2, 5)), ValueError, r"\[B, ..., D\] with D = 4, got \[2, 5\]"),
        (lambda: VectorQuantize(4, 8, accept_image_fmap=True)(torch.zeros(2, 4, 5)), ValueError, r"\[B, D, H, W\]"),
        (lambda: VectorQuantize(4, 8)(torch.zeros(2, 3, 4), topk=2), NotImplementedError, "forward: `topk`"),
        (lambda: VectorQuantize(4, 8)(torch.zeros(2, 3, 4), indices=torch.zeros(2)), NotImplementedError, "a Tensor"),
        (lambda: VectorQuantize(4, 8)(torch.zeros(2, 3, 4), mask=torch.ones(2, 4).bool()), ValueError, r"\[2, 3\]"),
        (lambda: VectorQuantize(4, 8)(torch.zeros(2, 3, 4), mask=torch.ones(2, 3)), ValueError, "must be bool"),
        (lambda: VectorQuantize(4, 8, draw="distance")(torch.full((3, 4), torch.nan)), ValueError, "no finite row"),
    ],
)
def test_refusals(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_options_that_ask_for_nothing_are_taken():
    layer = VectorQuantize(4, 8, learnable_codebook=False, ema_update=True, codebook_diversity_temperature=100.0)
    assert layer(torch.zeros(2, 3, 4), ema_update=True, accum_ema_update=False)[0].shape == (2, 3, 4)


def test_two_processes_keep_one_codebook(tmp_path):
    """Bit for bit at every step, through start, restarts and a step in which one of them has no rows."""
    program, where = Path(__file__).with_name("two_ranks.py"), str(Path(fastvid.__file__).parents[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, program, str(rank), tmp_path / "store"], env={**os.environ, "PYTHONPATH": where},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told[0][1] + told[1][1]
    assert told[0][0] == told[1][0] and len(set(told[0][0].split())) == 3 * 8


def test_perplexity():
    assert perplexity(torch.tensor([0, 1, 2, 3]), 10).item() == pytest.approx(4)
    assert perplexity(torch.zeros(7, dtype=torch.int64), 10).item() == pytest.approx(1)
