"""The races of attention inside boxes: what their gates see, who is timed, and that every peer does the same job."""

import dataclasses
import functools
import itertools
import sys
from types import SimpleNamespace

import axial_cases
import axial_layer_cases
import axial_peers
import cases
import jobs
import pytest
import torch
import torch.nn.functional as F
from axial_peers import Part, along
from timing import GateError

GRID = (2, 3, 4)
KINDS = (along(1, GRID, "causal"), along(2, GRID), along(3, GRID))
JOBS = {
    "core": axial_cases.Core((2, *GRID), 2, 5, KINDS),
    "train": axial_cases.Core((2, *GRID), 2, 5, KINDS, train=True),
    "bfloat16": axial_cases.Core((2, *GRID), 2, 16, KINDS, train=True, dtype=torch.bfloat16),
    "blocks": axial_cases.Core((1, 2, 4, 6), 2, 8, (Part((2, 2, 3), "causal"),), bias=True),
    "layer": axial_layer_cases.Layer((1, *GRID), 8, 2),
    "layer-train": axial_layer_cases.Layer((2, *GRID), 8, 2, train=True),
    "step": axial_layer_cases.Step(7, 2, 4, steps=3),
}
PEERS = {"core": {"axial-attention", "sdpa"}, "step": {"sdpa in place", "sdpa heads first"}}
PEERS |= dict.fromkeys(("train", "bfloat16", "blocks"), PEERS["core"])
PEERS |= dict.fromkeys(("layer", "layer-train"), {"axial-attention", "sdpa in place", "sdpa permuted"})


@functools.cache
def computed(name: str) -> tuple[tuple, dict[str, tuple]]:
    job = JOBS[name]
    values = job.draw(0)
    done = {who: way(values) for who, way in job.ways(values).items() if not way.missing}
    return values, {"fastvid": tuple(part.detach() for part in job.plain(values))} | done


def results(name: str) -> tuple[jobs.Job, tuple, dict[str, tuple]]:
    """A job, fresh values and what those who can do it make of them; plain torch stands in for a lacking fastvid."""
    values, found = computed(name)
    return JOBS[name], values, {**found}


@pytest.mark.parametrize("name", JOBS)
def test_the_gate_holds_for_everybody(name):
    job, values, found = results(name)
    lacking = axial_peers.lacking("axial_attention", "") and name.startswith("layer")
    assert set(found) == PEERS[name] - ({"axial-attention"} if lacking else set()) | {"fastvid"}
    assert len({len(parts) for parts in found.values()} | {len(job.parts)}) == 1
    told = jobs._gate(job, values, found)
    assert told.startswith("out") and ("and 10 more within" in told) == (name == "layer-train") and not found


def wrong_parts() -> list:
    counts = ((name, len(job.parts)) for name, job in JOBS.items())
    return [pytest.param(name, part, id=f"{name}-{part}") for name, count in counts for part in range(count)]


@pytest.mark.parametrize("name, part", wrong_parts())
def test_the_gate_sees(name, part):
    job, values, found = results(name)
    for who, wrong in itertools.product(
        ("fastvid", next(iter(PEERS[name] & set(found)))),
        (lambda t: t * (1.1 if t.dtype == torch.bfloat16 else 1.0001), lambda t: t.roll(1), lambda t: t * float("nan")),
    ):
        parts = list(found[who])
        parts[part] = wrong(parts[part])
        with pytest.raises(GateError, match=f"{who}: {job.parts[part]}: "):
            jobs._gate(job, values, found | {who: tuple(parts)})


@pytest.mark.parametrize("name", ["core", "blocks"])
def test_a_peer_that_forgets_its_mask_is_seen(name):
    job, values, found = results(name)
    seeing = dataclasses.replace(job, kinds=tuple(Part(kind.box) for kind in job.kinds))
    with pytest.raises(GateError, match="fastvid: out"):
        jobs._gate(job, values, found | {"fastvid": seeing.plain(values)})


@pytest.mark.parametrize("name", JOBS)
def test_every_round_has_values_of_its_own(name):
    first, again, other = (JOBS[name].draw(number)[:2] for number in (1, 1, 2))
    for one, same, new in zip(first, again, other, strict=True):
        assert one is None or torch.equal(one, same) and not torch.equal(one, new)


@pytest.mark.parametrize("box", [(1, 1, 6), (1, 4, 1), (2, 1, 1), (2, 2, 3), (1, 1, 1)])
def test_boxes_are_cut_in_raster_order_and_joined_again(box):
    x = torch.arange(3 * 2 * 4 * 6 * 2.0).view(3, 2, 4, 6, 2, 1)
    lines = axial_peers.cut(x, box)
    first = [x[0, t, h, w] for t, h, w in itertools.product(*map(range, box))]
    assert torch.equal(lines[0], torch.stack(first))
    back = axial_peers.joined(lines, box, x.shape)
    assert torch.equal(back, x) and back.is_contiguous()


def whole_window(q, k, v, kernel_size, is_causal):
    """What NATTEN makes of [lines, n, A, E] where the window is the line."""
    assert kernel_size == q.shape[1]
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=is_causal).transpose(1, 2)


def masked(q, k, v, block_mask, kernel_options):
    """What flex_attention makes of [lines, A, n, E]."""
    n = torch.arange(q.shape[2])
    seen = None if block_mask is None else block_mask.mask_mod(0, 0, n[:, None], n)
    return F.scaled_dot_product_attention(q, k, v, seen)


@pytest.mark.parametrize("peer", ["flex_attention", "natten"])
def test_peers_of_the_gpu_do_the_same_job(peer, monkeypatch):
    # neither the compiler nor the package is needed to see how lines and masks are handed over
    monkeypatch.setattr(axial_peers, "_compiled_flex", lambda: masked)
    mask = lambda seen, B, H, n, m, device: SimpleNamespace(mask_mod=seen)  # noqa: E731
    monkeypatch.setattr("torch.nn.attention.flex_attention.create_block_mask", mask)
    monkeypatch.setattr(axial_peers, "lacking", lambda *_: None)
    monkeypatch.setitem(sys.modules, "natten", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "natten.functional", SimpleNamespace(na1d=whole_window))
    job = dataclasses.replace(JOBS["core"], peers=(peer,))
    values = job.draw(0)
    way = job.ways(values)[peer]
    assert "within" in jobs._gate(job, values, {peer: way(values)})


def test_a_package_that_is_not_there_is_told():
    way = dataclasses.replace(JOBS["core"], peers=("natten",)).ways(JOBS["core"].draw(0))["natten"]
    assert way.missing == axial_peers.lacking("natten", "natten") or way.missing is None
    assert axial_peers.lacking("no_such_package", "it") == "it is not installed"


def test_what_is_ours_may_not_fail():
    def broken(_):
        raise RuntimeError("no")

    way = jobs.Way(lambda values: values, broken)
    with pytest.raises(RuntimeError):
        jobs._tried("fastvid", way, ())
    assert jobs._tried("sdpa", way, ()) == (None, "raised RuntimeError: no")


def test_useful_work_is_counted_by_what_is_seen():
    seen = sum(int(torch.ones(n, n).tril().sum()) * 12 for n in (2,)) + 24 * (3 + 4)
    operations, moved = JOBS["core"].work
    assert operations == 2 * 2 * 2 * seen * 2 * 5 and moved == 4 * 4 * 3 * 48 * 10
    assert JOBS["train"].work == (3 * operations, 3 * moved)
    large = axial_cases.gpu("h")
    assert large.work[1] == 4 * 2 * 8 * 16 * 64 * 64 * 512
    assert axial_cases.gpu().kinds == (Part((16, 1, 1), "causal"), Part((1, 64, 1)), Part((1, 1, 64)))
    projected, core = 2.0 * 24 * 3 * 4 * 64, 2.0 * 2.0 * 24 * 8 * (2 + 3 + 4)
    assert JOBS["layer"].work[0] == projected + core and JOBS["layer-train"].work[0] == 6 * (projected + core)
    assert JOBS["step"].work == (2 * 2 * 3 * 7 * 8, 2 * 4 * 3 * 7 * 8)


def test_a_race_is_timed():
    job = JOBS["layer"]
    race = jobs.race(job)
    case = cases.Case("tiny", "", "fastvid", {"axial-attention": 1e9, "sdpa": None}, open=lambda: race, threads=1)
    entry = cases.measure(case, rounds=1)
    rows = {row["name"]: row for row in entry["contestants"]}
    assert entry["check"] == "ok" and set(rows) == {"fastvid", "sdpa", *PEERS["layer"]}
    assert rows["sdpa"]["fastest"] in ("sdpa in place", "sdpa permuted") and entry["floor_s"] > 0
    assert rows["fastvid"]["runs"] == 1 or rows["fastvid"]["missing"]


def test_cases_are_listed_with_goals():
    listed = {case.name: case for case in cases.CASES}
    for name in ("axial_cpu", "axial_cpu_1t"):
        assert listed[name].goal == {"axial-attention": 2.5, "sdpa": 2.2}
        assert listed[name].extra_limit == 4 * 32 * 32 * 256 * 4
    for name in ("axial_core_cpu", "axial_core_cpu_1t"):
        assert listed[name].goal == {"axial-attention": 4.0, "sdpa": 4.0}
    for name in ("axial_core_gpu", "axial_core_gpu_t", "axial_core_gpu_h", "axial_core_gpu_w"):
        wanted = {"axial-attention": 8.0, "sdpa": 2.5, "flex_attention": 3.0, "torch.compile": None, "natten": None}
        assert listed[name].goal == wanted and {"fastvid", *axial_cases.gpu().peers} == {"fastvid", *wanted}
    assert set(listed["axial_train_cpu"].goal) == {"axial-attention", "sdpa"}
    assert {"axial_core_train_cpu", "axial_step_cpu", "block_local_cpu", "axial_core_train_gpu"} <= set(listed)
