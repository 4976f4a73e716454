"""The quality tables: made of the kept figures, and the README's are not stale."""

import json
from pathlib import Path

import pytest
import quality

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def figure(value: float, low: float | None = None, high: float | None = None) -> dict:
    return {"value": value, "unit": "", "n": 3, "low": low, "high": high}


@pytest.fixture
def result() -> dict:
    names = [name for names in quality.TABLES["predictor"][1].values() for name in names if name]
    names += [f"{level}_{kind}" for level in ("top", "bottom") for kind in ("bits", "copy_bits")]
    figures = {name: figure(round(i + 0.123, 3)) for i, name in enumerate(dict.fromkeys(names))}
    figures |= {"psnr_best": figure(29.66, 29.04, 30.3), "fvd_model": figure(123.4, 101.2, 150)}
    figures |= {"psnr_rebuilt": figure(32.66), "lpips_best": figure(0.0312, 0.03, 0.0321)}
    for level in ("top", "bottom"):
        figures |= {f"{level}_context_free_fitted_bits": figure(7.01), f"{level}_context_free_oracle_bits": figure(6.5)}
    about = {"windows": 3, "given": 4, "predicted": 12, "samples": 10, "resize": "tf1", "chosen": "spread", "seed": 0,
             "data": "folder toys", "warning": "3 clips for 400 features"}  # fmt: skip
    return {"model": "toy64", "protocol": about, "figures": figures}


def test_a_table_shows_every_contestant(result):
    rows = {line.split(" | ")[0].strip("| "): line for line in quality.render(result).splitlines() if "|" in line}
    assert "| 29.7 [29.0, 30.3] |" in rows["PSNR, dB, best of 10"]
    assert "| 0.031 [0.030, 0.032] |" in rows["LPIPS (alex), best of 10"]
    assert "| 123 [101, 150] |" in rows["FVD"] and rows["FVD*"].endswith("| - |")
    assert "`toy64` | repeat frame 4 | codes by themselves | reconstruction" in rows["toy64: 3 windows"]
    assert "folder toys; 3 windows, spread" in quality.render(result) and "3 clips for 400" in quality.render(result)
    assert rows["top"].endswith("| 6.50 |")  # the better of the context-free


@pytest.mark.parametrize("kind, head", [
    ("generator", "`toy64` | untrained | random pixels | training clips"),
    ("frame predictor", "`toy64` | repeat frame 4 | untrained | random pixels"),
])  # fmt: skip
def test_models_without_codes_have_one_table(result, kind, head):
    names = [name for names in quality.TABLES[kind][1].values() for name in names]
    figures = {name: figure(i + 0.5) for i, name in enumerate(dict.fromkeys(names))}
    about = result["protocol"] | {"frames": 12, "classes": "10, each as often as in the windows"}
    told = quality.render(result | {"kind": kind, "figures": figures, "protocol": about})
    assert head in told and "bits per code" not in told and "Reconstruction" not in told
    assert ("LPIPS (alex), best of 10" in told) == (kind == "frame predictor")
    assert ("classes: 10, each" in told) == (kind == "generator")


def test_the_tables_stand_between_their_markers(result, tmp_path, capsys):
    readme = tmp_path / "README.md"
    asked = ["--readme", str(readme), "--figures", str(tmp_path)]
    readme.write_text("no markers\n")
    assert quality.main([*asked, "--check"]) == 2 and "figures_<model>.json" in capsys.readouterr().err
    (tmp_path / "figures_toy64.json").write_text(json.dumps(result))
    assert quality.main([*asked, "--check"]) == 2 and "must hold these two lines" in capsys.readouterr().err
    cut = result | {"figures": {key: value for key, value in result["figures"].items() if key != "fvd_model"}}
    (tmp_path / "figures_toy64.json").write_text(json.dumps(cut))
    assert quality.main([*asked, "--check"]) == 2 and "lacks fvd_model" in capsys.readouterr().err
    (tmp_path / "figures_toy64.json").write_text(json.dumps(result))
    readme.write_text(f"before\n{quality.BEGIN}\nstale words\n{quality.END}\nafter\n")
    assert quality.main([*asked, "--check"]) == 1 and "stale" in capsys.readouterr().out
    assert quality.main([*asked, "--write"]) == 0 and quality.main([*asked, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale words" not in text


def test_the_readme_is_not_stale():
    assert quality.main(["--check"]) == 0


def test_every_shipped_model_has_its_figures():
    models = {path.parent.name for path in (ROOT / "fastvid/models/weights").glob("*/config.json")}
    assert {path.stem.removeprefix("figures_") for path in (ROOT / "examples").glob("figures_*.json")} == models
