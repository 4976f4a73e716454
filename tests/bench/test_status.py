"""The status table: what it is made of, that it says what nobody verified, and that the README's is not stale."""

import json
from pathlib import Path

import pytest
import run
import status
import torch

from fastvid import laws, ops

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def entry(**changes) -> dict:
    given = {"op": "nearest_codebook", "backend": "cpu", "place": "cpu", "device": "CPU A", "date": "2026-01-02",
             "fastvid": "0.1.0", "laws": 5, "cases": 121}  # fmt: skip
    return given | changes


def results(*verified: dict, device: str = "CPU A") -> str:
    return json.dumps({"schema": 1, "device": device, "versions": {}, "cases": [], "verified": list(verified)})


def cells(table: str, op: str) -> dict[str, str]:
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return dict(zip(head, next(row for row in rows if row[0] == f"`{op}`"), strict=True))


def test_every_op_has_a_row_and_nothing_is_claimed():
    table = status.render([], {})
    for name in ops.OPS:
        row = cells(table, name)
        assert row["torch"] == "not verified" and "20" not in "".join(row.values())
        if "triton" in {backend.name for backend in ops.OPS[name].backends}:
            assert row["Triton, on a GPU"] == "has not run on a GPU" and row["Triton, compiled for"] == "not verified"
        has_cuda = "cuda" in {backend.name for backend in ops.OPS[name].backends}
        assert row["CUDA, on a GPU"] == ("has not run on a GPU" if has_cuda else "-")
    for name in ops.REFERENCE_ONLY:
        assert list(cells(table, name).values())[1:] == ["by its tests", *["-"] * 5]


def test_what_was_verified_is_dated_and_placed():
    verified = [
        entry(), entry(device="CPU B", date="2026-01-03"), entry(backend="triton", place="interpreter"),
        entry(backend="reference"), entry(backend="reference", place="cuda", device="GPU"),
    ]  # fmt: skip
    row = cells(status.render(verified, {"nearest_codebook": "sm_80, sm_90"}), "nearest_codebook")
    assert row["CPU, native"] == "2026-01-02, CPU A<br>2026-01-03, CPU B"
    assert row["torch"] == "2026-01-02, CPU A<br>2026-01-02, GPU" and row["Triton, compiled for"] == "sm_80, sm_90"
    assert row["Triton, interpreted"] == "2026-01-02, CPU A" and row["Triton, on a GPU"] == "has not run on a GPU"
    verified.append(entry(backend="triton", place="cuda", device="GPU"))
    assert cells(status.render(verified, {}), "nearest_codebook")["Triton, on a GPU"] == "2026-01-02, GPU"
    verified.append(entry(op="pixelcnn_sample", backend="cuda", place="cuda", device="GPU"))
    assert cells(status.render(verified, {}), "pixelcnn_sample")["CUDA, on a GPU"] == "2026-01-02, GPU"


def test_the_newest_of_all_files_counts(tmp_path):
    (tmp_path / "a.json").write_text(results(entry(date="2026-05-01"), entry(op="x")))
    (tmp_path / "b.json").write_text(results(entry(date="2026-01-01"), entry(date="2026-04-01", device="CPU B")))
    (tmp_path / "c.json").write_text(json.dumps({"schema": 1, "device": "d", "versions": {}, "cases": []}))
    found = {(one["op"], one["device"]): one["date"] for one in status.read_verified(tmp_path)}
    assert found.pop(("x", "CPU A")) == "2026-01-02"
    assert found == {("nearest_codebook", "CPU A"): "2026-05-01", ("nearest_codebook", "CPU B"): "2026-04-01"}


def test_compiled_for_are_chips_without_a_spill(tmp_path):
    room = tmp_path / "nearest_codebook"
    room.mkdir()
    good, spilt = {"registers": 64, "shared": 0, "blocks": 4}, {"registers": 255, "spill_stores": 8}
    kernels = {"a": {"sm_80": good, "sm_90": good, "gfx942": {"error": "no"}}, "b": {"sm_80": good, "sm_90": spilt}}
    (room / "static.json").write_text(json.dumps({"triton": "3", "kernels": kernels}))
    assert status.compiled(tmp_path) == {"nearest_codebook": "sm_80", "nearest_codebook_ema_": "sm_80"}
    assert status.compiled(tmp_path / "none") == {}


def test_write_and_check(tmp_path, capsys):
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    folder.mkdir()
    (folder / "a.json").write_text(results(entry()))
    asked = ["--readme", str(readme), "--results", str(folder)]
    readme.write_text("# no markers\n")
    assert status.main([*asked, "--check"]) == 2 and "must hold these two lines" in capsys.readouterr().err
    readme.write_text(f"# before\n\n{status.BEGIN}\nold\n{status.END}\n\nafter\n")
    assert status.main([*asked, "--check"]) == 1 and "stale" in capsys.readouterr().out
    assert status.main([*asked, "--write"]) == 0 and status.main([*asked, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("# before\n\n<!--") and text.endswith("-->\n\nafter\n") and "2026-01-02, CPU A" in text
    (folder / "a.json").write_text(results(entry(date="2026-02-02")))
    assert status.main([*asked, "--check"]) == 1


@pytest.mark.skipif(status.BEGIN not in README.read_text(encoding="utf-8"), reason="the README has no status table yet")
def test_the_readme_is_not_stale():
    assert status.main(["--check"]) == 0


def only_reference(monkeypatch):
    """The laws are asked of two sizes of one op's reference alone."""
    monkeypatch.setattr(status, "SHAPES", dict.fromkeys(status.SHAPES, {"shapes": 2, "repeats": 1}))
    subject = next(one for one in laws.subjects() if one.op == "nearest_codebook")
    monkeypatch.setattr(laws, "subjects", lambda: [subject])
    backends = [backend for backend in ops.nearest_codebook.backends if backend.name == "reference"]
    monkeypatch.setattr(ops.nearest_codebook, "backends", tuple(backends))
    monkeypatch.setattr(laws, "devices", lambda: ["cpu"])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(status, "_interpreted", lambda path: 0)


def test_verify_notes_what_held_and_takes_out_what_broke(tmp_path, monkeypatch, capsys):
    only_reference(monkeypatch)
    path = tmp_path / "r.json"
    assert status.main(["--verify", "--json", str(path)]) == 0
    (noted,) = run.read_results(path)["verified"]
    assert noted["op"] == "nearest_codebook" and noted["backend"] == "reference" and noted["place"] == "cpu"
    assert noted["device"] == run.cpu_name() and noted["laws"] == len(laws.LAWS) and len(noted["date"]) == 10
    honest = ops.nearest_codebook.backends[0].run
    wrong = ops._op.Backend("reference", lambda *a: honest(*a)._replace(nonfinite=torch.tensor(1)), ops._op.never)
    monkeypatch.setattr(ops.nearest_codebook, "backends", (wrong,))
    assert status.main(["--verify", "--json", str(path)]) == 1
    assert run.read_results(path)["verified"] == [] and "FAIL" in capsys.readouterr().out


def test_verify_tells_what_it_skips(tmp_path, monkeypatch, capsys):
    only_reference(monkeypatch)
    reason = "needs a CUDA tensor, got cpu"
    never = ops._op.Backend("triton", None, lambda *_: reason)
    monkeypatch.setattr(ops.nearest_codebook, "backends", (never, *ops.nearest_codebook.backends))
    assert status.main(["--verify", "--json", str(tmp_path / "r.json")]) == 0
    assert f"triton    cpu: {reason}" in capsys.readouterr().out


def test_notes_stay_when_cases_are_measured(tmp_path):
    path = tmp_path / "r.json"
    status.note(path, entry(), keep=True)
    status.note(path, entry(date="2026-03-03"), keep=True)
    fresh = run.new_results() | {"cases": [{"case": "a"}], "versions": {"torch": "another"}}
    run.write_results(fresh, path)
    found = run.read_results(path)
    assert [one["date"] for one in found["verified"]] == ["2026-03-03"] and found["cases"] == [{"case": "a"}]
    run.write_results(fresh | {"device": "another"}, path)
    assert "verified" not in run.read_results(path)
    with pytest.raises(run.BenchError, match="another device"):
        status.note(path, entry(), keep=True)


def test_wrong_command_lines(capsys):
    assert status.main(["--verify"]) == 2 and "--json" in capsys.readouterr().err
