"""The races of the gated convolution and of whole training steps: what their gates see, and who is timed."""

import copy
import dataclasses
import itertools

import cases
import conv_cases
import conv_peers
import jobs
import pytest
import torch
import train_cases
from fastvid.kernels.gated_causal_conv.cases import LEFT_5, PLANE_XT, PLANE_YT, ROWS_5
from report import text_of
from timing import Contestant, GateError, Race
from torch import nn

from fastvid.models import bottom_prior, top_prior
from fastvid.nn import GatedCausalConv3d

TINY = conv_cases.Size((2, 2, 3, 4), 6, PLANE_XT, train=True)
FORWARD = conv_cases.Size((1, 1, 4, 5), 8, ROWS_5)


def results(size: conv_cases.Size) -> tuple[conv_cases.Fresh, dict[str, tuple]]:
    """Fresh values and what torch's contestants compute of them, gather in ours' place: its gate is the same."""
    fresh = size.draw(0)
    done = {name: way(fresh) for name, way in size.ways(fresh).items() if name != "fastvid"}
    return fresh, {"fastvid": done["gather"], **done}


def native_missing() -> str | None:
    return TINY.ways(TINY.draw(0))["fastvid"].missing


# ---- one layer


@pytest.mark.parametrize("size", [TINY, FORWARD], ids=["train", "forward"])
def test_the_gate_holds_for_everybody(size):
    fresh, found = results(size)
    assert set(found) == {"fastvid", "masked conv3d ncdhw", "masked conv3d channels_last_3d", "gather"}
    assert "out" in jobs._gate(size, fresh, found)


@pytest.mark.parametrize("name", ["fastvid", "masked conv3d ncdhw"])
@pytest.mark.parametrize("part", range(4), ids=conv_cases.PARTS)
@pytest.mark.parametrize("wrong", [lambda t: t * 1.0001, lambda t: t.roll(1), lambda t: t * float("nan")],
                         ids=["rounded", "shifted", "nan"])  # fmt: skip
def test_the_gate_sees(name, part, wrong):
    fresh, found = results(TINY)
    parts = list(found[name])
    parts[part] = wrong(parts[part])
    with pytest.raises(GateError, match=f"{name}: {conv_cases.PARTS[part]}"):
        jobs._gate(TINY, fresh, found | {name: tuple(parts)})


def test_a_peer_that_forgets_its_mask_is_seen():
    size = conv_cases.Size((1, 1, 3, 4), 4, LEFT_5, train=True)
    way = size.dense_way("ncdhw")

    def forgetful(fresh):
        (x, dense, bias, mask), grad = way.ready(fresh)
        return (x, dense + (1 - mask), bias, torch.ones_like(mask)), grad

    fresh, found = results(size)
    unmasked = dataclasses.replace(way, ready=forgetful)(fresh)
    with pytest.raises(GateError, match="masked conv3d ncdhw: out"):
        jobs._gate(size, fresh, found | {"masked conv3d ncdhw": unmasked})


def test_every_round_has_values_of_its_own():
    first, again, other = (TINY.draw(number) for number in (1, 1, 2))
    for one, same, new in zip(first, again, other, strict=True):
        assert torch.equal(one, same) and not torch.equal(one, new)


@pytest.mark.parametrize("taps", [PLANE_XT, PLANE_YT, ROWS_5, LEFT_5])
def test_useful_multiply_adds_are_those_inside_the_grid(taps):
    grid = (3, 4, 5)
    inside = sum(all(0 <= p + d < n for p, d, n in zip(place, tap, grid, strict=True))
                 for place in itertools.product(*map(range, grid)) for tap in taps)  # fmt: skip
    forward = conv_cases.Size((2, *grid), 7, taps)
    assert forward.multiply_adds == pytest.approx(2 * inside * 7 * 14)
    assert conv_cases.Size((2, *grid), 7, taps, train=True).multiply_adds == pytest.approx(3 * 2 * inside * 7 * 14)


def test_a_race_is_timed_and_told():
    if reason := native_missing():
        pytest.skip(reason)
    goal = {"masked conv3d": 1e9, "gather": None}
    case = cases.Case("tiny", str(TINY), "fastvid", goal, open=lambda: jobs.race(TINY), threads=1)
    entry = cases.measure(case, rounds=2)
    rows = {row["name"]: row for row in entry["contestants"]}
    assert entry["check"] == "ok" and all(row["runs"] == 2 for row in rows.values())
    fastest = min((row for name, row in rows.items() if name.startswith("masked conv3d ")), key=lambda r: r["median_s"])
    assert rows["masked conv3d"]["fastest"] == fastest["name"]
    assert entry["ratio"]["masked conv3d"] == fastest["median_s"] / rows["fastvid"]["median_s"]
    told = text_of(entry)
    assert f"here {fastest['name']}" in told and ">= 1e+09 missed" in told


def test_the_best_of_nobody_is_missing():
    absent = [Contestant("a", missing="gone"), Contestant("ours", lambda _: None), Contestant("best", best_of=("a",))]
    race = Race(lambda: "", int, absent)
    entry = cases.measure(cases.Case("c", "", "ours", {"best": 2.0}, open=lambda: race), rounds=1)
    best = entry["contestants"][-1]
    assert entry["ratio"] == {"best": None} and best["missing"].startswith("none of those")
    assert "missing: none of those" in text_of(entry)


# ---- whole steps


@pytest.fixture(scope="module")
def tiny_top() -> tuple[nn.Module, tuple]:
    config = top_prior.PRESETS["tiny"]
    batch = train_cases._codes(0, config.stack.codes, 2, ((3, 2, 2), (1, 2, 2), (2, 4, 4)))
    return train_cases._fresh(top_prior.TopPrior, config), batch


def test_a_dense_model_is_the_same_model(tiny_top):
    model, batch = tiny_top
    for layout in conv_peers.FORMATS:
        dense = conv_peers.densify_(copy.deepcopy(model), layout)
        assert not [module for module in dense.modules() if isinstance(module, GatedCausalConv3d)]
        told = train_cases._gate({layout: (dense, "reference")}, model, batch)
        assert "within" in told and all(parameter.grad is None for parameter in dense.parameters())


@pytest.mark.parametrize("name", ["fastvid", "masked conv3d ncdhw"])
def test_a_model_that_is_a_little_off_is_seen(tiny_top, name):
    model, batch = tiny_top
    off = copy.deepcopy(model)
    with torch.no_grad():
        off.stack.layers[1].horizontal.weight[0] *= 1.01
    with pytest.raises(GateError, match=f"{name}: (loss|gradients)"):
        train_cases._gate({name: (off, "reference")}, model, batch)


def test_a_gradient_that_is_lacking_is_seen(tiny_top):
    model, batch = tiny_top
    frozen = copy.deepcopy(model)
    frozen.stack.layers[0].vertical.bias.requires_grad_(False)
    with pytest.raises(GateError, match="layers.0.vertical.bias"):
        train_cases._gate({"fastvid": (frozen, "reference")}, model, batch)


@pytest.mark.parametrize("level", ["top", "bottom"])
def test_a_step_trains(level):
    config = {"top": top_prior, "bottom": bottom_prior}[level].PRESETS["tiny"]
    side = {"top": 2, "bottom": 4}[level]
    race = getattr(train_cases, f"{level}_race")(config, batch=2, side=side)
    names = [contestant.name for contestant in race.contestants]
    assert names == ["fastvid", "masked conv3d ncdhw", "masked conv3d channels_last_3d", "reference", "masked conv3d",
                     "torch"]  # fmt: skip
    assert "gradients" in race.gate()
    batch = race.inputs(1)
    for contestant in race.contestants[1:4]:
        losses = [contestant.run(batch) for _ in range(3)]
        assert losses[2] < losses[1] < losses[0]


# ---- the list


def test_cases_are_listed_with_goals():
    listed = {case.name: case for case in cases.CASES}
    for C, goal in ((64, 4.0), (128, 2.5), (256, 2.0)):
        for name in (f"conv_gated_cpu_{C}", f"conv_gated_cpu_{C}_1t"):
            assert listed[name].goal["masked conv3d"] == goal
        assert listed[f"conv_gated_train_cpu_{C}"].goal["masked conv3d"] == 1.5
    for level in ("top", "bottom"):
        assert listed[f"conv_gated_gpu_{level}"].goal == {
            "masked conv3d ncdhw": 3.0, "tuned conv3d": 1.7, "gather": None
        }  # fmt: skip
        assert listed[f"conv_gated_train_gpu_{level}"].goal["masked conv3d"] == 1.5
    assert listed["train_step_prior_cpu"].goal["torch"] == listed["train_step_bottom_cpu"].goal["torch"] == 1.5
