"""Two result files compared: what counts as a fallen ratio."""

import copy
import json

import against
import cases
import pytest
import run


def results(ratio: float, spread: float = 0.02, runs: int = 7) -> dict:
    """A result file with one case whose plan takes a second, give or take half the spread."""
    rows = [
        {"name": name, "median_s": median, "min_s": median * (1 - spread / 2), "max_s": median * (1 + spread / 2),
         "runs": runs, "peak_bytes": 0}
        for name, median in (("naive", ratio), ("plan", 1.0))
    ]  # fmt: skip
    case = {"case": "c", "size": "", "check": "ok", "contestants": rows, "ratio": {"naive": ratio}, "floor_s": None,
            "goal": {"naive": 75.0}, "ours": "plan", "threads": 1, "checked": ""}  # fmt: skip
    return {"schema": 1, "device": "d", "versions": {}, "cases": [case]}


@pytest.mark.parametrize(
    "new, old, fallen",
    [
        (results(100), results(100), 0), (results(500), results(100), 0),
        (results(91), results(100), 0), (results(85), results(100), 1),
        # half the range over root 7, four times: a noise of 0.38
        (results(85, 0.5), results(100, 0.5), 0), (results(60, 0.5), results(100, 0.5), 1),
    ],
)  # fmt: skip
def test_a_fall_is_more_than_ten_percent_beyond_the_noise(new, old, fallen):
    lines, compared, found = against.compare(new, old)
    assert (compared, found) == (1, fallen)
    assert lines[-1].endswith("FELL" if fallen else "held")


def test_noise():
    assert against.change_noise(results(1, 0.5)["cases"][0], results(1, 0.5)["cases"][0], "naive") == pytest.approx(
        2 * 0.5 / 7**0.5
    )
    assert against.median_noise({"median_s": 0.48, "min_s": 0.48, "max_s": 0.48, "runs": 0}) == 0


def test_what_cannot_be_compared_is_said():
    new, old = results(100), results(100)
    new["cases"][0]["ratio"] = {"naive": None}
    new["cases"][0]["contestants"][0] |= {"missing": "not installed", "median_s": None}
    assert against.compare(new, old) == (["c: naive: was 100x, now not measured (not installed)"], 0, 0)
    new["cases"][0] |= {"check": "missing: needs a CUDA device", "contestants": []}
    assert "needs a CUDA device" in against.compare(new, old)[0][0]
    new["cases"][0] |= {"check": "failed: wrong codes"}
    assert against.compare(new, old) == (["c: failed: wrong codes"], 1, 1)
    elsewhere = copy.deepcopy(old) | {"device": "another"}
    assert "another device (another)" in against.compare(old, elsewhere)[0][0]
    assert against.compare(old, {**old, "cases": []}) == ([], 0, 0)


@pytest.mark.parametrize("ratio, code", [(80, 1), (99, 0)])
def test_the_command_line_tells_by_its_exit_code(monkeypatch, tmp_path, capsys, ratio, code):
    (tmp_path / "old.json").write_text(json.dumps(results(100)))
    case = cases.Case("c", "", "plan", {"naive": 75.0}, open=lambda: None)
    monkeypatch.setattr(cases, "CASES", [case])
    monkeypatch.setattr(cases, "measure", lambda *_: results(ratio)["cases"][0])
    assert run.main(["--against", str(tmp_path / "old.json")]) == code
    assert f"1 ratios compared, {code} fell" in capsys.readouterr().out


def test_nothing_in_common_is_an_error(monkeypatch, tmp_path, capsys):
    (tmp_path / "old.json").write_text(json.dumps({**results(100), "cases": []}))
    monkeypatch.setattr(cases, "CASES", [cases.Case("c", "", "plan", {}, open=lambda: None, missing=lambda: "gone")])
    assert run.main(["--against", str(tmp_path / "old.json")]) == 2
    assert "no measured ratio in common" in capsys.readouterr().err
