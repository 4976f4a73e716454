"""The sampler's cases at tiny sizes: their gates see what is wrong, and their JSON says what was counted."""

from types import SimpleNamespace

import cases
import floors
import paper_cases
import peak
import pytest
import sampling_cases
import torch
import window_cases
from report import text_of
from sampling_cases import native_missing
from timing import Contestant, GateError, Race, run_race, threads

from fastvid.models import preset
from fastvid.nn import GatedPixelStack, GatedStackConfig

TINY = GatedStackConfig(codes=30, channels=8, layers=2, kernel=3, time_kernel=3, condition_channels=4,
                        attention_every=0)  # fmt: skip
ATTENDING = GatedStackConfig(codes=30, channels=16, layers=4, kernel=3, time_kernel=3, condition_channels=4,
                             attention_every=2, heads=2)  # fmt: skip
FLAT = GatedStackConfig(codes=30, channels=16, layers=2, kernel=5, time_kernel=1, condition_channels=4,
                        attention_every=2, heads=2)  # fmt: skip
needs_native = pytest.mark.skipif(native_missing() is not None, reason=f"native sampler: {native_missing()}")


def tiny_race(device: str = "cpu") -> Race:
    torch.manual_seed(0)
    return sampling_cases.sampling_race(device, GatedPixelStack(TINY).eval().to(device), (2, 3, 5))


def case(open, goal, **changes) -> cases.Case:
    return cases.Case(**{"name": "tiny", "size": "", "ours": "native", "goal": goal, "open": open, **changes})


def cheap(monkeypatch) -> None:
    """Rates of the machine that nobody waits for."""
    for name in ("cpu_rate", "read_rate"):
        monkeypatch.setattr(paper_cases, name, lambda *_: (1e9, "guesses"))


# ---- sample_cpu_small and sample_gpu_small


def test_the_gate_holds(device):
    with torch.no_grad():
        assert "codes as naive's" in tiny_race(device.type).gate()


@pytest.mark.parametrize("sampler", ["sample_cached", "_tier"])
def test_the_gate_sees_wrong_codes(monkeypatch, sampler):
    right = getattr(sampling_cases, sampler)

    def rolled(*given):
        found = right(*given)
        return found.roll(1, dims=-1) if sampler == "sample_cached" else found._replace(codes=found.codes.roll(1, -1))

    monkeypatch.setattr(sampling_cases, sampler, rolled)
    with pytest.raises(GateError, match="naive"):
        tiny_race().gate()


def test_the_gate_sees_wrong_logits(monkeypatch):
    class Wrong(sampling_cases.CachedPixelCNN):
        def pixel(self, x):
            return super().pixel(x) + 1e-3 * (x == 4)

    monkeypatch.setattr(sampling_cases, "CachedPixelCNN", Wrong)
    with pytest.raises(GateError, match="cached has logits"):
        tiny_race().gate()


def test_the_gate_sees_wrong_log_probabilities(monkeypatch):
    right = sampling_cases._tier
    wrong = lambda *given: (found := right(*given))._replace(logprob=found.logprob + 1e-3)  # noqa: E731
    monkeypatch.setattr(sampling_cases, "_tier", wrong)
    with pytest.raises(GateError, match="has logits"):
        tiny_race().gate()


def test_the_cached_peer_has_one_thread_for_a_narrow_stack(monkeypatch):
    seen = []
    monkeypatch.setattr(sampling_cases, "sample_cached", lambda *_: seen.append(torch.get_num_threads()))
    with threads(3):
        race = tiny_race()
        {contestant.name: contestant for contestant in race.contestants}["cached"].run(race.inputs(0))
        assert seen == [1] and torch.get_num_threads() == 3


def test_small_case_tells_passes():
    measured = cases.measure(case(tiny_race, {"naive": None, "cached": None, "plan": None}, ours="plan"), 2)
    rows = {row["name"]: row for row in measured["contestants"]}
    assert set(rows) == {"naive", "cached", "plan", "native", "sequential"} and measured["check"] == "ok"
    assert rows["plan"]["passes"] == {"median": 30, "min": 30, "max": 30} and rows["plan"]["codes_per_pass"] == 1
    assert "passes" not in rows["naive"] and "sequential evaluations" in text_of(measured)
    assert all(measured["ratio"].values()) and "ratio_of" not in measured
    if native_missing() is None:
        assert rows["native"]["passes"]["max"] <= rows["sequential"]["passes"]["median"] == 30
    else:
        assert rows["native"]["missing"] == native_missing()


# ---- the published priors


@needs_native
def test_slice_of_the_paper_prior(monkeypatch):
    cheap(monkeypatch)
    opened = lambda: paper_cases.slice_race(config=ATTENDING, grid=(3, 3, 5))  # noqa: E731
    measured = cases.measure(case(opened, {"naive": None, "cached": None}), 2)
    rows = {row["name"]: row for row in measured["contestants"]}
    assert measured["check"] == "ok" and set(rows) == {"naive", "cached", "native", "sequential", "float32", "int8"}
    assert all(rows[name]["runs"] == 2 for name in rows) and all(measured["ratio"].values())
    assert rows["naive"]["scaled_from"] == 1 and rows["cached"]["scaled_from"] == 5
    assert rows["sequential"]["passes"]["median"] == 15 and rows["sequential"]["codes_per_pass"] == 1
    assert measured["floor_s"] > 0 and "one by one" in measured["floor_from"] and "float32" in measured["checked"]


def test_slice_with_the_torch_backend(monkeypatch):
    """The case's own machinery without native code."""
    cheap(monkeypatch)
    tier = paper_cases.Tier
    monkeypatch.setattr(paper_cases, "Tier", lambda _, *rest, **more: tier("reference", *rest, **more))
    monkeypatch.setattr(paper_cases, "why_not", lambda *_: None)
    race = paper_cases.slice_race(("float32", "bfloat16"), config=ATTENDING, grid=(3, 2, 3))
    assert "entropy" in race.gate()
    times = run_race(race, 1)
    assert times["native"].passes == [6.0] and all(len(found.seconds) == 1 for found in times.values())


def clips(batch: int, tiers: tuple[str, ...], **changes) -> Race:
    grids = ((3, 3, 4), (1, 5, 6))
    return paper_cases.clip_race(batch, "cpu", (ATTENDING, FLAT), grids, tiers, torch.float32, **changes)


@pytest.mark.parametrize("batch", [1, 3])
def test_whole_clips(batch):
    tiers = ("reference", "cpu") if native_missing() is None else ("reference", "triton")
    goal = {"naive": None, "cached": None} | ({"playback": None} if batch == 1 else {})
    with torch.no_grad():
        measured = cases.measure(case(lambda: clips(batch, tiers), goal, ours=("cuda", "reference")[1:]), 2)
    rows = {row["name"]: row for row in measured["contestants"]}
    assert measured["check"] == "ok" and measured["ours"] == "reference" and all(measured["ratio"].values())
    assert rows["naive"]["scaled_from"] == 4 and rows["cached"]["scaled_from"] == 4
    assert rows["reference"]["passes"]["median"] == 36 + 6 * 30 and rows["reference"]["codes_per_pass"] == batch
    assert ("playback" in rows) == (batch == 1)


def test_half_precision_peers_are_judged_by_their_precision():
    race = paper_cases.clip_race(2, "cpu", (ATTENDING, FLAT), ((2, 3, 4), (1, 3, 4)), ("reference",), torch.bfloat16)
    assert "top: cached's logits within" in race.gate()


@pytest.mark.parametrize("what", ["cached", "draw", "logprob"])
def test_the_gate_of_a_row_sees_what_is_wrong(monkeypatch, what):
    race = clips(1, ("reference",))
    if what == "cached":
        right = paper_cases.CachedPixelCNN.pixel
        monkeypatch.setattr(paper_cases.CachedPixelCNN, "pixel", lambda self, x: right(self, x) + 1e-3)
    else:
        from fastvid.kernels.pixelcnn_sampler import reference

        row = reference.Session.row

        def wrong(self, t, y):
            row(self, t, y)
            if what == "logprob":
                self.job.logprob[:, t, y] += 2.0
            elif self.job.given[0, t, y, 0] < 0:
                self.job.codes[:, t, y] = (self.job.codes[:, t, y] + 1) % 30

        monkeypatch.setattr(reference.Session, "row", wrong)
    with pytest.raises(GateError, match={"draw": "scores", "logprob": "log-prob", "cached": "cached has"}[what]):
        race.gate()


def test_a_large_stack_is_the_same_every_time_and_not_degenerate():
    one, two = (paper_cases.large_stack(ATTENDING) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    with torch.no_grad():
        logits = one(torch.randint(30, (1, 2, 5, 5)), torch.randn(1, 2, 5, 5, 4))
    assert logits.std(dim=-1).mean() > 0.5 and not any(p.requires_grad for p in one.parameters())


def test_the_published_sizes():
    stack, bottom = (paper_cases._empty_stack(preset(kind, "paper").stack, "meta") for kind in ("top", "bottom"))
    assert sum(p.numel() for p in stack.core_parameters()) // 10**6 == 418
    assert floors.pass_weights(stack) == pytest.approx(61.3e6, rel=0.01)
    assert floors.pass_weights(bottom) == pytest.approx(41.4e6, rel=0.01)
    # every tap but the dead ones of the first frames: what a whole forward multiplies for each code
    assert floors.row_weights(stack, 2) + floors.pass_weights(stack) == pytest.approx(418e6, rel=0.01)


def test_floors_count_what_is_there():
    assert floors.live([(0, 0, 0), (-1, 0, 0), (0, -1, 1)], (2, 4, 4)) == 1 + 1 / 2 + 9 / 16
    assert floors.mean_keys((2, 2, 2), axial=False) == 4.5 and floors.mean_keys((1, 1, 4), axial=True) == 2.5
    stack = GatedPixelStack(TINY)
    assert floors.row_weights(stack, 0) < floors.row_weights(stack, 1) < floors.row_weights(stack, 2)
    assert floors.cached_values(stack, (3, 3, 3), 5) == 0
    assert floors.cached_values(GatedPixelStack(ATTENDING), (3, 3, 3), 5) == 2 * 2 * 16 * 6
    positions, dense = 27, 2.0 * sum(p.numel() for p in stack.core_parameters() if p.ndim > 1)
    assert 0.2 < floors.operations(stack, (3, 3, 3)) / (positions * dense) < 0.9
    # one position sees nothing but itself: the layers' own tap, the 1x1s, the head
    C, own = 8, 2 * 8 * 16 + 16 * 16 + 4 * 16 + 8 * 8
    assert floors.operations(stack, (1, 1, 1)) == 2 * (2 * own + C * C + C * 30)


# ---- windows and anti-diagonals


@needs_native
def test_windows_of_a_model(tmp_path):
    from dataclasses import asdict

    from fastvid.data.video import write_video
    from fastvid.models import VideoPredictor, build

    torch.manual_seed(0)
    VideoPredictor(*(build(kind, asdict(preset(kind, "tiny"))) for kind in ("vqvae", "top", "bottom")),
                   size=(32, 32)).save(tmp_path / "model")  # fmt: skip
    write_video(tmp_path / "clip.mp4", torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8))
    opened = lambda: window_cases.fixed_point_race(str(tmp_path / "model"), tmp_path / "clip.mp4", (0, 4))  # noqa: E731
    measured = cases.measure(case(opened, {"sequential": 1.0}, ratio_of="passes"), 2)
    rows = {row["name"]: row for row in measured["contestants"]}
    assert measured["check"] == "ok", measured["check"]
    assert set(rows) == {"native", "sequential", "window 2", "window 4", "window 8", "window 16"}
    codes = 2 * (3 * 16 + 6 * 64)
    assert rows["sequential"]["passes"]["median"] == codes and rows["sequential"]["codes_per_pass"] == 1
    assert rows["window 4"]["passes"]["max"] < codes
    assert measured["ratio"]["sequential"] == codes / rows["native"]["passes"]["median"] > 1
    assert measured["ratio_of"] == "passes" and "ratio and goal are of evaluations; in time" in text_of(measured)


@needs_native
def test_anti_diagonals():
    config = GatedStackConfig(codes=30, channels=8, layers=4, kernel=3, time_kernel=1, condition_channels=4,
                              attention_every=2, heads=2, wavefront=True)  # fmt: skip
    measured = cases.measure(
        case(lambda: window_cases.wavefront_race(config, (1, 6, 8)), {"sequential": 2.0}, ratio_of="passes"), 2
    )
    assert measured["check"] == "ok", measured["check"]
    assert measured["ratio"]["sequential"] == 48 / (8 + 2 * 5) and "18 steps for 48 codes" in measured["checked"]


def test_windows_that_change_codes_are_seen(monkeypatch):
    def grid(change: int):
        codes = torch.zeros(1, 1, 2, 4, dtype=torch.int64)
        found = lambda window: SimpleNamespace(codes=codes + (window == 8) * change, passes=torch.ones(1, 1, 2))  # noqa: E731
        return SimpleNamespace(level="top", sample=lambda window=0: found(window))

    assert "top 1: 4" in window_cases._windows_agree([grid(0)])
    with pytest.raises(GateError, match="a window of 8 draws other codes"):
        window_cases._windows_agree([grid(1)])


def test_native_cases_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(window_cases, "native_missing", lambda: "not built")
    assert {found.name: found.missing() for found in cases.CASES if "wavefront" in found.name} == {
        "wavefront_axial": "not built", "wavefront_axial_1t": "not built"
    }  # fmt: skip
    monkeypatch.setattr(window_cases, "predict_missing", lambda *_: None)
    assert window_cases.fixed_point_missing() == "not built"


# ---- parts, passes, rates


def test_parts_of_a_job_are_added_up(monkeypatch):
    monkeypatch.setattr("timing.timed", lambda work, device: (0.5, work()))
    of = Contestant("two", lambda _: 3, scaled_from=2, whole=8, others=((lambda _: 5, 10.0),), passes=float)
    found = run_race(Race(lambda: "", int, [of]), 1)["two"]
    assert found.seconds == [0.5 * 4 + 0.5 * 10] and found.passes == [3 * 4 + 5 * 10]


def test_the_first_of_ours_that_can_run_is_compared():
    def race(*able: str) -> Race:
        rows = [Contestant(name, (lambda _: None) if name in able else None) for name in ("cuda", "triton", "peer")]
        return Race(lambda: "", int, rows)

    for able, ours in ((("cuda", "triton", "peer"), "cuda"), (("triton", "peer"), "triton"), (("peer",), "cuda")):
        measured = cases.measure(case(lambda able=able: race(*able), {"peer": None}, ours=("cuda", "triton")), 1)
        assert measured["ours"] == ours and (measured["ratio"]["peer"] is None) == (able == ("peer",))


def test_few_rounds_may_have_a_smaller_company():
    peer = Contestant("native", lambda _: None)
    small = Race(lambda: "", int, [peer])
    large = Race(lambda: "", int, [peer, Contestant("int8", lambda _: None)])
    both = case(lambda: large, {}, quick=lambda: small)
    assert [len(cases.measure(both, rounds)["contestants"]) for rounds in (3, cases.FULL_ROUNDS)] == [1, 2]


def test_reading_memory_has_a_rate(monkeypatch):
    monkeypatch.setattr(peak, "READ_BYTES", 1 << 20)
    rate, how = peak.read_rate(2)
    assert rate > 1e8 and how
    monkeypatch.setattr(peak, "_probe", lambda: None)
    assert peak.read_rate(1)[1] == "sums"


def test_streamed_bytes_are_part_of_a_floor(monkeypatch):
    monkeypatch.setattr(peak, "cpu_rate", lambda *_: (1e9, "guesses"))
    monkeypatch.setattr(peak, "read_rate", lambda *_: (1e6, "reads"))
    assert peak.floor(1e9, 5e6, "cpu", 1) == (1.0, "1 G operations at 1 G/s of guesses")
    assert peak.floor(1e9, 5e6, "cpu", 1, streamed=True)[0] == 5.0
