"""How good the shipped models are: the README's quality tables, made of what `fastvid evaluate --json` wrote.

    python bench/quality.py               print the tables
    python bench/quality.py --write       put them between the markers in README.md
    python bench/quality.py --check       exit 1 if README.md says something else

The figures of a shipped model are kept in examples/figures_<model>.json. Exit codes: 0; 1 for a stale README; 2 as
bench/run.py.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from run import ROOT, BenchError, answer
from status import show

BEGIN, END = "<!-- quality: written by bench/quality.py -->", "<!-- end of quality -->"
BEST_OF = ("best", "mean")  # of several predictions


def _likeness(*beside: str) -> dict[str, tuple[str | None, ...]]:
    return {
        f"{head}, {which} of {{samples}}": tuple(f"{name}_{who}" for who in (which, *beside))
        for head, name in (("PSNR, dB", "psnr"), ("SSIM", "ssim"), ("LPIPS (alex)", "lpips")) for which in BEST_OF
    }  # fmt: skip


def _distances(*of: str) -> dict[str, tuple[str | None, ...]]:
    names = (("FVD", "fvd"), ("FID (I3D-400)", "fid_i3d400"), ("IS (I3D-400)", "is_i3d400"))
    return {head: tuple(f"{name}_{who}" for who in of) for head, name in names}


CODED = ("repeat", "marginal", "reconstruction")
STAR = {"FVD*": ("fvd_star_model", "fvd_star_repeat", "fvd_star_marginal", None)}
OF_CODED = _distances("model", *CODED)
# by the kind of model: the heads of its columns, and of every row its head and the figures of the columns
TABLES = {
    "predictor": (
        ("{model}", "repeat frame {given}", "codes by themselves", "reconstruction"),
        _likeness(*CODED) | {"FVD": OF_CODED["FVD"]} | STAR | OF_CODED,
    ),
    "frame predictor": (
        ("{model}", "repeat frame {given}", "untrained", "random pixels"),
        _likeness("repeat", "untrained", "noise") | _distances("model", "repeat", "untrained", "noise"),
    ),
    "generator": (
        ("{model}", "untrained", "random pixels", "training clips"),
        _distances("model", "untrained", "noise", "train"),
    ),
}
CODES = ("psnr_rebuilt", "top_bits", "bottom_bits")
BITS_COLUMNS = ("prior", "same code as a step ago, error rate fitted", "best context-free")

Result = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench/quality.py", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into the README")
    parser.add_argument("--check", action="store_true", help="exit 1 if the README's tables are stale")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="in place of README.md")
    parser.add_argument("--figures", type=Path, default=ROOT / "examples", metavar="DIR", help="in place of examples")
    return answer("quality", parser.parse_args(arguments), _run)


def _run(asked: argparse.Namespace) -> int:
    files = sorted(asked.figures.glob("figures_*.json"), reverse=True)
    if not files:
        raise BenchError(f"{asked.figures}: wanted figures_<model>.json, got none; fastvid evaluate --json makes one.")
    results = {file: json.loads(file.read_text(encoding="utf-8")) for file in files}
    for file, result in results.items():
        if missing := sorted(_needed(result) - set(result["figures"])):
            raise BenchError(f"{file}: lacks {missing[0]}; run fastvid evaluate with all metrics.")
    return show(asked, "\n\n".join(map(render, results.values())), "quality", BEGIN, END)


def _kind(result: Result) -> str:
    return result.get("kind", "predictor")


def _needed(result: Result) -> set[str]:
    named = {name for names in TABLES[_kind(result)][1].values() for name in names if name}
    return named | set(CODES) if _kind(result) == "predictor" else named


def render(result: Result) -> str:
    """A table in Markdown, of codes too where the model has them, and the protocol's main points."""
    figures, about, kind = result["figures"], result["protocol"], _kind(result)
    words = {"model": f"`{result['model']}`", "given": about.get("given"), "samples": about.get("samples")}
    columns, rows = TABLES[kind]
    lines = _table(
        (f"{result['model']}: {about['windows']} windows", *(column.format(**words) for column in columns)),
        [(row.format(**words), *(_cell(figures, name) for name in names)) for row, names in rows.items()],
    )
    ending = f"seed {about['seed']}; resize {about['resize']}; {about['warning']}."
    if kind == "generator":
        return "\n".join([*lines, "", f"{about['data']}; {about['windows']} windows, {about['chosen']}, of "
                          f"{about['frames']} frames; classes: {about['classes']}; {ending}"])  # fmt: skip
    rebuilt = ""
    if kind == "predictor":
        lines += ["", *_bits(figures)]
        rebuilt = f"Reconstruction of all frames: {_cell(figures, 'psnr_rebuilt')} dB. "
    lines += ["", f"{rebuilt}{about['data']}; {about['windows']} windows, {about['chosen']}; {about['given']} frames "
              f"given, {about['predicted']} predicted; {ending}"]  # fmt: skip
    return "\n".join(lines)


def _bits(figures: dict) -> list[str]:
    free = {level: min(_free(figures, level), key=lambda figure: figure["value"]) for level in ("top", "bottom")}
    return _table(
        ("bits per code", *BITS_COLUMNS),
        [(level, _cell(figures, f"{level}_bits"), _cell(figures, f"{level}_copy_bits"), _text(free[level]))
         for level in ("top", "bottom")],
    )  # fmt: skip


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def _free(figures: dict, level: str) -> list[dict]:
    return [figures[f"{level}_context_free_{kind}_bits"] for kind in ("fitted", "oracle")]


def _cell(figures: dict, name: str | None) -> str:
    return "-" if name is None else _text(figures[name])


def _text(figure: dict) -> str:
    value, low, high = (figure[key] for key in ("value", "low", "high"))
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    interval = "" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f}{interval}"


if __name__ == "__main__":
    sys.exit(main())
