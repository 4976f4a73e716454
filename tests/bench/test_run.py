"""The benchmark's contract: its JSON, its gates, and that what is missing is said. No test looks at a time."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import cases
import predict_cases
import pytest
import run
import sampling_cases
import torch
from report import text_of, times
from timing import Contestant, GateError, Race, peak_growth, run_race, seconds_of, threads

from fastvid.models import VideoPredictor, build, preset
from fastvid.nn import GatedPixelStack, GatedStackConfig

ROOT = Path(__file__).resolve().parents[2]
CONTESTANT = {"name", "median_s", "min_s", "max_s", "runs", "peak_bytes", "extra_bytes"}
CASE = {"case", "size", "check", "contestants", "ratio", "floor_s", "goal"}


def tiny_race(device: str = "cpu") -> Race:
    config = GatedStackConfig(
        codes=30, channels=8, layers=2, kernel=3, time_kernel=3, condition_channels=4, attention_every=0
    )
    torch.manual_seed(0)
    return sampling_cases.sampling_race(device, GatedPixelStack(config).eval().to(device), (2, 3, 5))


def tiny_case(**changes) -> cases.Case:
    given = {"name": "tiny", "size": "2x3x5 codes", "ours": "plan", "goal": {"naive": 75.0, "cached": None}}
    return cases.Case(**{**given, "open": tiny_race, **changes})


def with_missing_peer() -> Race:
    race = tiny_race()
    absent = Contestant("faiss", missing="faiss-cpu is not installed")
    return Race(race.gate, race.inputs, [*race.contestants, absent], race.floor)


@pytest.fixture
def only(monkeypatch):
    """Makes the command line know these cases and no others."""
    return lambda *known: monkeypatch.setattr(cases, "CASES", list(known))


def test_json_of_a_quick_run(tmp_path, only, capsys):
    only(tiny_case(open=with_missing_peer, goal={"naive": 75.0, "cached": None, "faiss": 1.0}),
         tiny_case(name="later", missing=lambda: "needs a CUDA device"))  # fmt: skip
    path = tmp_path / "results.json"
    assert run.main(["--quick", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert results["schema"] == 1 and results["device"] == run.device_name()
    assert {"fastvid", "torch", "python"} <= set(results["versions"])
    measured, later = results["cases"]
    assert measured.keys() >= CASE and later.keys() >= CASE
    rows = {row["name"]: row for row in measured["contestants"]}
    assert set(rows) == {"naive", "cached", "plan", "native", "sequential", "faiss"}
    assert all(row.keys() >= CONTESTANT for row in rows.values())
    for name in ("naive", "cached", "plan"):
        assert rows[name]["runs"] == 3 and 0 < rows[name]["min_s"] <= rows[name]["median_s"] <= rows[name]["max_s"]
        assert rows[name]["peak_bytes"] is None or rows[name]["peak_bytes"] >= 0
    assert rows["naive"]["scaled_from"] == 8 and "scaled_from" not in rows["plan"]
    assert rows["faiss"]["missing"] == "faiss-cpu is not installed" and rows["faiss"]["median_s"] is None
    for peer in ("naive", "cached"):
        assert measured["ratio"][peer] == pytest.approx(rows[peer]["median_s"] / rows["plan"]["median_s"])
    assert measured["ratio"]["faiss"] is None and measured["goal"] == {"naive": 75.0, "cached": None, "faiss": 1.0}
    assert measured["check"] == "ok" and measured["floor_s"] > 0 and measured["threads"] == torch.get_num_threads()
    assert later["check"] == "missing: needs a CUDA device" and later["ratio"] == {"naive": None, "cached": None}
    told = capsys.readouterr().out
    assert "missing: faiss-cpu is not installed" in told and "missing: needs a CUDA device" in told


def test_a_failed_gate_is_no_result(only, tmp_path, capsys):
    def gate():
        raise GateError("plan does not draw the naive codes")

    only(tiny_case(open=lambda: Race(gate, tiny_race().inputs, tiny_race().contestants)))
    assert run.main(["--quick", "--json", str(tmp_path / "r.json")]) == 1
    (case,) = run.read_results(tmp_path / "r.json")["cases"]
    assert case["check"].startswith("failed: plan") and case["ratio"]["naive"] is None and case["contestants"] == []
    assert "failed: plan does not draw the naive codes" in capsys.readouterr().out


def test_contestants_take_turns_on_shared_fresh_inputs():
    seen = []
    contestants = [Contestant(name, lambda given, name=name: seen.append((name, given))) for name in "AB"]
    contestants.append(Contestant("absent", missing="gone"))
    times = run_race(Race(lambda: "", lambda number: number * 10, contestants), rounds=3)
    assert seen == [(name, number * 10) for number in range(4) for name in "AB"]  # the first for memory, not timed
    assert set(times) == {"A", "B"} and len(times["A"].seconds) == 3


def test_times_are_scaled_up(monkeypatch):
    monkeypatch.setattr("timing.timed", lambda work, device: (0.5, None))
    half = Contestant("half", lambda _: None, scaled_from=8, whole=3072)
    assert run_race(Race(lambda: "", int, [half]), 1)["half"].seconds == [0.5 * 384]


def test_peak_memory_is_seen():
    peak, extra = peak_growth(lambda: [torch.ones(16 << 20)])
    if peak is None:
        pytest.skip("this system cannot restart the resident peak")
    assert 60 << 20 < peak < 120 << 20 and extra == max(0, peak - (64 << 20))
    peak, extra = peak_growth(lambda: torch.ones(16 << 20).sum())
    assert 60 << 20 < extra <= peak
    assert peak_growth(lambda: None)[0] < 8 << 20


def test_threads_are_set_and_put_back():
    found = torch.get_num_threads()
    with threads(found + 1) as count:
        assert count == torch.get_num_threads() == found + 1
    assert torch.get_num_threads() == found
    assert tiny_case().one_thread().threads == 1 and seconds_of(lambda: None) >= 0


def test_a_file_grows_by_the_cases_of_another_run(only, tmp_path):
    path = tmp_path / "r.json"
    only(tiny_case(name="a", missing=lambda: "x"), tiny_case(name="b", missing=lambda: "y"))
    for name in "ab":
        assert run.main(["--case", name, "--json", str(path)]) == 0
    assert [case["case"] for case in run.read_results(path)["cases"]] == ["a", "b"]
    path.write_text(json.dumps({**run.read_results(path), "device": "another"}))
    assert run.main(["--case", "b", "--json", str(path)]) == 0
    assert [case["case"] for case in run.read_results(path)["cases"]] == ["b"]


def test_a_folder_names_the_file_itself(only, tmp_path):
    only(tiny_case(missing=lambda: "x"))
    assert run.main(["--json", f"{tmp_path}/new/"]) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"{run.slug(run.device_name())}.json"]
    assert (times(1720.4), times(1.2345), times(0.131)) == ("1,720x", "1.23x", "0.131x")
    assert run.slug("AMD EPYC (7), 2 cores") == "amd-epyc-7-2-cores"


def test_reports(only, tmp_path):
    only(tiny_case(open=with_missing_peer, size="<b>", goal={"naive": 75.0, "faiss": 1.0}),
         tiny_case(name="later", missing=lambda: "gone"))  # fmt: skip
    told = run.main(["--quick", "--html", str(tmp_path / "r.html"), "--plot", str(tmp_path / "r.png")])
    assert told == 0 and (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "r.html").read_text()
    assert "&lt;b&gt;" in page and "<b>" not in page and "missing: gone" in page
    assert len(re.findall(r"<i style", page)) >= 3 and "faiss-cpu is not installed" in page


def test_a_plot_without_matplotlib(only, monkeypatch, capsys, tmp_path):
    only(tiny_case())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    assert run.main(["--plot", str(tmp_path / "r.png")]) == 2
    assert "needs matplotlib" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    parts = [build(kind, asdict(preset(kind, "tiny"))) for kind in ("vqvae", "top", "bottom")]
    VideoPredictor(*parts, size=(32, 32)).save(folder)
    return folder


@pytest.fixture
def clip(tmp_path) -> Path:
    from fastvid.data.video import write_video

    write_video(tmp_path / "clip.mp4", torch.randint(256, (6, 40, 48, 3), dtype=torch.uint8))
    return tmp_path / "clip.mp4"


def test_predict_against_playback(model, clip, capsys):
    case = tiny_case(
        ours="predict", goal={"playback": 1.0}, open=lambda: predict_cases.predict_race(str(model), clip)
    )
    measured = cases.measure(case, 3)
    predict, playback = measured["contestants"]
    assert measured["check"] == "ok" and predict["runs"] == 3
    assert playback["median_s"] == 0.48 and playback["given"] and playback["runs"] == 0
    assert measured["ratio"] == {"playback": pytest.approx(0.48 / predict["median_s"])}
    assert "a given time" in text_of(measured) and capsys.readouterr().out == ""


def test_predict_says_what_is_missing(model, clip, monkeypatch):
    assert predict_cases.predict_missing(str(model), clip) is None
    assert predict_cases.predict_missing("nonsense", clip) == "model nonsense not shipped"
    assert predict_cases.predict_missing(str(model), clip.with_name("no.mp4")) == "clip no.mp4 not shipped"
    monkeypatch.setattr(predict_cases.importlib.util, "find_spec", lambda name: None)
    assert predict_cases.predict_missing(str(model), clip) == "PyAV and tqdm not installed"


def test_wrong_command_lines(only, tmp_path, capsys):
    only(tiny_case())
    for arguments, told in (
        (["--case", "nonsense"], "unknown case nonsense; known: tiny"),
        (["--against", str(tmp_path / "no.json")], "cannot be read as results"),
    ):
        assert run.main(arguments) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
    (tmp_path / "old.json").write_text('{"schema": 0}')
    assert run.main(["--json", str(tmp_path / "old.json")]) == 2
    assert run.main(["--json", str(tmp_path / "old.json" / "r.json")]) == 2


def script(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """A command of bench/ in a process of its own, as a user starts it."""
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable, **environment}
    )


def test_the_list_from_a_bare_checkout():
    told = script(sys.executable, "bench/run.py", "--list", PYTHONPATH="")
    assert told.returncode == 0, told.stderr
    listed = {line.split()[0]: line for line in told.stdout.splitlines()}
    assert {"sample_cpu_small", "sample_cpu_small_1t", "predict_demo_cpu", "sample_gpu_small"} <= set(listed)
    assert torch.cuda.is_available() or "needs a CUDA device" in listed["sample_gpu_small"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_there_is_nothing_to_tune(capsys):
    assert run.main(["--tune"]) == 0
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "nothing to tune" in told


def test_nothing_heavy_is_needed():
    probe = "import sys; sys.modules.update(av=None, tyro=None, tqdm=None); sys.path.insert(0, 'bench'); import run; "
    told = script(sys.executable, "-c", probe + "sys.exit(run.main(['--list']))", PYTHONPATH=str(ROOT))
    assert told.returncode == 0 and "missing: PyAV and tqdm not installed" in told.stdout, told.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_the_gpu_script_says_that_there_is_no_gpu():
    told = script("bash", "bench/gpu.sh")
    assert told.returncode == 3 and "no CUDA device was found" in told.stdout.splitlines()[-1]
