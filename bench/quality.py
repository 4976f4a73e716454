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
COLUMNS = ("{model}", "repeat frame {given}", "codes by themselves", "reconstruction")
# row, figures of the columns; of several predictions the best and the mean
ROWS = {
    "PSNR, dB, best of {samples}": ("psnr_best", "psnr_repeat", "psnr_marginal", "psnr_reconstruction"),
    "PSNR, dB, mean of {samples}": ("psnr_mean", "psnr_repeat", "psnr_marginal", "psnr_reconstruction"),
    "SSIM, best of {samples}": ("ssim_best", "ssim_repeat", "ssim_marginal", "ssim_reconstruction"),
    "SSIM, mean of {samples}": ("ssim_mean", "ssim_repeat", "ssim_marginal", "ssim_reconstruction"),
    "LPIPS (alex), best of {samples}": ("lpips_best", "lpips_repeat", "lpips_marginal", "lpips_reconstruction"),
    "LPIPS (alex), mean of {samples}": ("lpips_mean", "lpips_repeat", "lpips_marginal", "lpips_reconstruction"),
    "FVD": ("fvd_model", "fvd_repeat", "fvd_marginal", "fvd_reconstruction"),
    "FVD*": ("fvd_star_model", "fvd_star_repeat", "fvd_star_marginal", None),
    "FID (I3D-400)": tuple(f"fid_i3d400_{who}" for who in ("model", "repeat", "marginal", "reconstruction")),
    "IS (I3D-400)": tuple(f"is_i3d400_{who}" for who in ("model", "repeat", "marginal", "reconstruction")),
}
NEEDED = {name for names in ROWS.values() for name in names if name} | {"psnr_rebuilt", "top_bits", "bottom_bits"}
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
        if missing := sorted(NEEDED - set(result["figures"])):
            raise BenchError(f"{file}: lacks {missing[0]}; run fastvid evaluate with all metrics.")
    return show(asked, "\n\n".join(map(render, results.values())), "quality", BEGIN, END)


def render(result: Result) -> str:
    """Two tables in Markdown, predictions and codes, and the protocol's main points."""
    figures, about = result["figures"], result["protocol"]
    words = {"model": f"`{result['model']}`", "given": about["given"], "samples": about["samples"]}
    lines = _table(
        (f"{result['model']}: {about['windows']} windows", *(column.format(**words) for column in COLUMNS)),
        [(row.format(**words), *(_cell(figures, name) for name in names)) for row, names in ROWS.items()],
    )
    free = {level: min(_free(figures, level), key=lambda figure: figure["value"]) for level in ("top", "bottom")}
    lines += ["", *_table(
        ("bits per code", *BITS_COLUMNS),
        [(level, _cell(figures, f"{level}_bits"), _cell(figures, f"{level}_copy_bits"), _text(free[level]))
         for level in ("top", "bottom")],
    )]  # fmt: skip
    lines += ["", f"Reconstruction of all frames: {_cell(figures, 'psnr_rebuilt')} dB. {about['data']}; "
              f"{about['windows']} windows, {about['chosen']}; {about['given']} frames given, {about['predicted']} "
              f"predicted; seed {about['seed']}; resize {about['resize']}; {about['warning']}."]  # fmt: skip
    return "\n".join(lines)


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
