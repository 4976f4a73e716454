"""What fastvid buys on this machine: every case timed against its peers, after a check that all do the same job.

    python bench/run.py                                   every case that can run here
    python bench/run.py --case sample_cpu_small --quick   one case, 3 rounds in place of 7
    python bench/run.py --json bench/results/             written to a file named after the device
    python bench/run.py --against old.json                exit 1 where a ratio fell by more than 10% beyond the noise
    python bench/run.py --tune                            the fastest configuration of each Triton kernel: tune.py

Contestants take turns (A B C A B C) on the same fresh inputs; the ratio of medians is the figure. Timed is the fastvid
that is installed, or else the checkout that this file is in. Cases: cases.py; noise: against.py.

A JSON file that exists keeps the cases that this run does not measure, if device and versions are the same.
Exit codes: 0; 1 for a fallen ratio or a failed check; 2 for a wrong command line or an unreadable file.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCHEMA = 1
QUICK_ROUNDS = 3
PACKAGES = ("torch", "triton", "numpy", "av", "vector-quantize-pytorch", "axial-attention", "faiss-cpu", "natten")
ROOT = Path(__file__).resolve().parents[1]


class BenchError(Exception):
    """Something that the caller can put right; told in one line."""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    return answer("bench", _parser().parse_args(arguments), _run)


def answer(name: str, asked: argparse.Namespace, work: Callable[[argparse.Namespace], int]) -> int:
    """What a command line asked for, by the fastvid that is installed or this checkout's; a BenchError is one line."""
    if importlib.util.find_spec("fastvid") is None:
        sys.path.insert(0, str(ROOT))
    try:
        return work(asked)
    except BenchError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="name the cases and whether they can run here")
    parser.add_argument("--case", nargs="+", metavar="NAME", help="only these cases")
    parser.add_argument("--json", metavar="FILE", help="write the results; a folder names the file itself")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with earlier results")
    parser.add_argument("--tune", action="store_true", help="tune the kernels for this device")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds, some cases smaller")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG of the ratios; needs matplotlib")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with all tables")
    return parser


def _run(asked: argparse.Namespace) -> int:
    from cases import CASES, FULL_ROUNDS

    cases = _chosen(CASES, asked.case)
    if asked.list:
        for case in cases:
            against = f"{' or '.join(case.preferred)} against {', '.join(case.goal)}"
            print(f"{case.name:24} {case.size}; {against}{_note(case.missing())}")
        return 0
    if asked.tune:
        from tune import tune

        return tune(lambda line: print(line, flush=True))
    if asked.plot and importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib; install it with: pip install 'fastvid-torch[bench]'.")
    old = read_results(asked.against) if asked.against else None
    results = run_cases(cases, QUICK_ROUNDS if asked.quick else FULL_ROUNDS, asked.json and result_file(asked.json))
    _write_reports(results, asked)
    failed = any(case["check"].startswith("failed") for case in results["cases"])
    return 1 if failed else 0 if old is None else _against(results, old)


def _chosen(cases: list, names: list[str] | None) -> list:
    known = {case.name: case for case in cases}
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise BenchError(f"unknown case {', '.join(unknown)}; known: {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(names)] if names else cases


def result_file(asked: str) -> Path:
    """Where results go; what stands in the way is found before anything is measured."""
    path = Path(asked)
    if path.is_dir() or asked.endswith("/"):
        path = path / f"{slug(device_name())}.json"
    if path.is_file():
        read_results(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"--json {asked}: cannot be written to ({error.strerror}); choose another file.") from error
    return path


def _note(missing: str | None) -> str:
    return f" [missing: {missing}]" if missing else ""


def run_cases(cases: list, rounds: int, path: Path | None = None) -> dict[str, Any]:
    """Measure cases and print each; the file grows by each case that is done, so that an interrupt costs only one.

    Returns what was measured now, in the form of a result file.
    """
    from cases import measure
    from report import text_of

    results = new_results()
    told = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    print(f"{results['device']}; {told}\nfastvid is {importlib.util.find_spec('fastvid').origin}", flush=True)
    for case in cases:
        results["cases"].append(measure(case, rounds, _teller(case.name)))
        print("\n" + text_of(results["cases"][-1]), flush=True)
        if path is not None:
            write_results(results, path)
    return results


def new_results() -> dict[str, Any]:
    """A result file of this device and these versions, without results."""
    return {"schema": SCHEMA, "device": device_name(), "versions": versions(), "cases": []}


def _teller(name: str):
    """Progress on a terminal; nothing in a log."""
    if not sys.stderr.isatty():
        return lambda _: None
    return lambda stage: print(f"\r\033[K{name}: {stage}\r", end="", file=sys.stderr, flush=True)


def device_name() -> str:
    """The GPU's name, or the processor's."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()


def cpu_name() -> str:
    """The processor's name with its number of cores."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        model = found.group(1).strip() if found else model
    return f"{model}, {os.cpu_count()} cores"


def slug(name: str) -> str:
    """A name as a file's: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str]:
    """What was timed and what stood beside it; packages that are not installed are left out."""
    import fastvid

    found = {"fastvid": fastvid.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_results(path: Path) -> dict[str, Any]:
    """A result file. Raises BenchError if it is none of ours."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{path}: cannot be read as results ({error}).") from error
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise BenchError(f"{path}: wanted results of schema {SCHEMA}; measure them again with --json.")
    return results


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write what was measured into a file: its other cases are kept if they are comparable, what was verified on the
    same device in any case."""
    cases, kept = {case["case"]: case for case in results["cases"]}, {}
    if path.is_file():
        old = read_results(path)
        if (old["device"], old["versions"]) == (results["device"], results["versions"]):
            cases = {case["case"]: case for case in old["cases"]} | cases
        elif old["cases"]:
            print(f"{path}: its results, of another device or other versions, are replaced")
        if old["device"] == results["device"] and "verified" in old:
            kept = {"verified": old["verified"]}
    write_file(results | {"cases": list(cases.values())} | kept, path)


def write_file(results: dict[str, Any], path: Path) -> None:
    """Write a result file beside its place, then put it there."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def _write_reports(results: dict[str, Any], asked: argparse.Namespace) -> None:
    from report import write_html, write_plot

    for path, write in ((asked.plot, write_plot), (asked.html, write_html)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(results, path)


def _against(results: dict[str, Any], old: dict[str, Any]) -> int:
    from against import compare

    lines, compared, fallen = compare(results, old)
    print("\n".join([*lines, f"against: {compared} ratios compared, {fallen} fell"]))
    if not compared:
        raise BenchError("--against: the two have no measured ratio in common, so nothing was compared.")
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
