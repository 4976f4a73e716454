"""The codebook race: what its gate lets through, who is missing, and that nobody works with other threads."""

import dataclasses
import sys
from types import SimpleNamespace

import cases
import peak
import pytest
import torch
import vq_cases
import vq_peers
from timing import GateError, threads

TINY = vq_cases.Size(300, 20, 6, chunk=128)


def moved(step: vq_peers.Step, **changes) -> vq_peers.Step:
    return step._replace(**{name: change(getattr(step, name)) for name, change in changes.items()})


def gate(way: vq_peers.Way, **changes) -> str:
    """The gate's verdict on ours after these changes of what it decided, beside the torch peer."""
    x, codebook = vq_cases._fresh(TINY, 0)
    decided = {}
    for one in (way, vq_peers.torch_peer(TINY.chunk)):
        state = one.state(x, codebook)
        decided[one.name] = (one, one.read(one.run(x, state), state))
    decided[way.name] = (way, moved(decided[way.name][1], **changes))
    return vq_cases._gate(x, codebook, decided)


def test_the_gate_holds():
    told = gate(vq_peers.fastvid_way())
    assert "roundings" in told and "fastvid ran" in told


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"indices": lambda t: torch.cat([t[:-1], (t[-1:] + 1) % 20])}, "roundings of float32 beyond"),
        ({"counts": lambda t: t.roll(1)}, "counts rows"),
        ({"sums": lambda t: t + 1e-4}, "sums"),
        ({"sums": lambda t: t * float("nan")}, "sums"),
        ({"codebook": lambda t: t + 2e-5}, "moves the codebook"),
        ({"codebook": lambda t: t * float("nan")}, "moves the codebook"),
    ],
)
def test_the_gate_sees(changes, told):
    with pytest.raises(GateError, match=told):
        gate(vq_peers.fastvid_way(), **changes)


def test_a_rounded_product_is_seen():
    # bfloat16 products are good enough for who says so, and not for who claims float32
    def rounded(x, state):
        return torch.cdist(x.bfloat16().float(), state[0].bfloat16().float()).argmin(1)

    size = dataclasses.replace(TINY, N=4000, K=200)
    x, codebook = vq_cases._fresh(size, 0)
    indices = rounded(x, (codebook,))
    for precision, right in (("bfloat16", True), ("float32", False)):
        way = vq_peers.Way("w", None, rounded, None, precision)
        decided = {"w": (way, vq_peers.Step(indices)), "fastvid": (way, vq_peers.Step(indices))}
        if right:
            assert vq_cases._gate(x, codebook, decided)
        else:
            with pytest.raises(GateError, match="roundings of float32"):
                vq_cases._gate(x, codebook, decided)


@pytest.mark.parametrize("name", ["vector-quantize-pytorch", "faiss", "fastvid layer"])
def test_peers_do_the_job(name):
    if reason := vq_peers.not_installed(name):
        pytest.skip(reason)
    race = vq_cases.vq_race(TINY)
    told = race.gate()
    contestant = next(one for one in race.contestants if one.name == name)
    assert contestant.missing is None, contestant.missing
    assert name != "vector-quantize-pytorch" or "of vector-quantize-pytorch's" in told


def test_a_layer_that_learns_otherwise_is_seen(monkeypatch):
    pytest.importorskip("vector_quantize_pytorch", reason="needs vector-quantize-pytorch: pip install '.[bench]'")
    x, codebook = vq_cases._fresh(TINY, 0)
    decided = {name: vq_cases._tried(name, make, x, codebook)
               for name, make in (("fastvid", vq_peers.fastvid_way), ("vector-quantize-pytorch", vq_peers.layer_peer))}
    assert "0 rows disputed" in vq_cases._compare_layers(decided, codebook)[0]
    way, step = decided["vector-quantize-pytorch"]
    with pytest.raises(GateError, match="away from vector-quantize-pytorch"):
        decided["vector-quantize-pytorch"] = (way, moved(step, codebook=lambda t: t + 1e-4))
        vq_cases._compare_layers(decided, codebook)
    with pytest.raises(GateError, match="choose differently"):
        decided["vector-quantize-pytorch"] = (way, moved(step, indices=lambda t: t.roll(1)))
        vq_cases._compare_layers(decided, codebook)


def test_a_peer_that_is_missing_or_raises_is_told(monkeypatch):
    monkeypatch.setitem(vq_peers.PACKAGES, "faiss", "no_such_package")
    monkeypatch.setattr(vq_cases, "torch_peer", lambda rows: (_ for _ in ()).throw(RuntimeError("out of memory\nmore")))
    case = cases.Case("tiny", "", "fastvid", {"torch": 2.0, "faiss": 1.0}, open=lambda: vq_cases.vq_race(TINY))
    measured = cases.measure(case, 3)
    rows = {row["name"]: row for row in measured["contestants"]}
    assert measured["check"] == "ok" and rows["fastvid"]["runs"] == 3
    assert rows["faiss"]["missing"] == "faiss is not installed" and measured["ratio"] == {"torch": None, "faiss": None}
    assert rows["torch"]["missing"] == "raised RuntimeError: out of memory"
    assert measured["floor_s"] > 0 and "operations at" in measured["floor_from"]


def test_ours_may_not_fail(monkeypatch):
    monkeypatch.setattr(vq_peers.ops, "nearest_codebook", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vq_cases.vq_race(TINY)


def test_state_and_rows_are_fresh_in_every_round():
    race = vq_cases.vq_race(TINY)
    (x, states), (other, _) = race.inputs(0), race.inputs(1)
    assert not torch.equal(x, other)
    before = states["fastvid"][0].clone()
    for contestant in race.contestants:
        if contestant.run is not None:
            contestant.run((x, states))
    again = race.inputs(0)
    assert torch.equal(again[0], x) and torch.equal(again[1]["fastvid"][0], before)
    assert not torch.equal(states["fastvid"][0], before)


def test_everybody_has_the_same_threads(monkeypatch):
    faiss = pytest.importorskip("faiss", reason="needs faiss-cpu: pip install '.[bench]'")
    for count in (1, 2):
        with threads(count):
            vq_peers.faiss_peer().state(*vq_cases._fresh(TINY, 0))
            assert faiss.omp_get_max_threads() == count == torch.get_num_threads()


def test_gpu_ways_are_made_without_a_gpu():
    # flash-kmeans and flashlib are imported when they are tried, so that lacking one costs its own row alone
    names = [list(vq_cases._ways(size)) for size in (vq_cases.GPU_PAPER, vq_cases.GPU_PAPER_BF16, vq_cases.GPU_16K)]
    for case, made in zip((cases.VQ_PAPER, cases.VQ_PAPER_BF16, cases.VQ_16K), names, strict=True):
        assert {"fastvid", *case.goal} <= set(made)


@pytest.mark.parametrize("name", ["flash-kmeans", "flashlib"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kmeans_steps_by_their_words(monkeypatch, name, dtype):
    # their kernels need a GPU: here their signatures are served by torch, so that shapes and roles are tried
    def assign(x, centroids, *norms):
        assert x.dtype == centroids.dtype == dtype and x.ndim == centroids.ndim == 3
        assert [norm.shape for norm in norms] == ([x.shape[:2]] if name == "flash-kmeans" else [])
        return torch.cdist(x.float(), centroids.float()).argmin(2).int()

    def update(x, cluster_ids, old_centroids, *, centroid_sums, centroid_cnts, calculate_new):
        assert not calculate_new and centroid_cnts.dtype == torch.int32 and centroid_sums.shape == old_centroids.shape
        centroid_sums[0].index_add_(0, cluster_ids[0].long(), x[0].float())
        centroid_cnts[0] += torch.bincount(cluster_ids[0], minlength=old_centroids.shape[1]).int()

    served = SimpleNamespace(euclid_assign_triton=assign, triton_centroid_update_sorted_euclid=update)
    monkeypatch.setattr(vq_peers.importlib, "import_module", lambda _: served)
    x, codebook = vq_cases._fresh(dataclasses.replace(TINY, dtype=dtype), 0)
    decided = {"fastvid": vq_cases._tried("fastvid", vq_peers.fastvid_way, x, codebook)}
    for statistics in (True, False):
        way = vq_peers.kmeans_peer(name, statistics)
        state = way.state(x, codebook)
        decided[name] = (way, way.read(way.run(x, state), state))
        assert "roundings" in vq_cases._gate(x, codebook, decided)
        assert (decided[name][1].codebook is None) != statistics


@pytest.mark.parametrize(
    "case, size",
    [(cases.VQ_512, vq_cases.CPU_512), (cases.VQ_8192, vq_cases.CPU_8192), (cases.VQ_PAPER, vq_cases.GPU_PAPER),
     (cases.VQ_PAPER_BF16, vq_cases.GPU_PAPER_BF16), (cases.VQ_16K, vq_cases.GPU_16K)],
)  # fmt: skip
def test_cases_tell_their_sizes(case, size):
    assert case.size == str(size)
    assert case.extra_limit == (size.score_bytes // 100 if size.statistics else 100_000_000)


@pytest.mark.gpu
def test_a_gpu_race():
    for dtype in (torch.float32, torch.bfloat16):
        assert "fastvid ran triton" in vq_cases.vq_race(dataclasses.replace(TINY, device="cuda", dtype=dtype)).gate()


def test_rates_without_a_compiler(monkeypatch):
    monkeypatch.setattr(peak, "PRODUCT_SIZES", (64,))
    monkeypatch.setattr(peak, "_probe", lambda: None)
    rate, what = peak.cpu_rate(1)
    assert rate > 0 and what == "float32 matrix product"
    monkeypatch.undo()
    monkeypatch.setattr(peak.shutil, "which", lambda name: None)
    assert peak._probe.__wrapped__() is None


@pytest.mark.skipif(sys.platform != "linux" or peak._probe() is None, reason="needs a C compiler")
def test_the_probe_counts_its_operations():
    sink = peak.ctypes.c_float()
    assert peak._probe().fma_steps(10, peak.ctypes.byref(sink)) in (96, 192, 384) and sink.value != 0
    assert peak._probe().madd_steps(10, peak.ctypes.byref(sink)) in (0, 384, 768)
    assert peak.cpu_rate(1)[1] == "float32 multiply-adds" and peak.cpu_rate(1, narrow=True)[1].endswith("multiply-adds")
    seconds, told = peak.floor(1e9, 0.0, "cpu", 1)
    assert 0 < seconds < 10 and told.startswith("1 G operations")
