"""What works on what: the README's status table, made of bench/results/*.json and kernels/*/static.json, never by hand.

    python bench/status.py                                    print the table
    python bench/status.py --write                            put it between the markers in README.md
    python bench/status.py --check                            exit 1 if README.md says something else
    python bench/status.py --verify --json bench/results/     hold the laws of every op and backend that can run here,
                                                              and note what held them, and when

`verified` in a result file has one entry per op, backend and place ("cpu", "cuda", or "interpreter" for Triton's on a
CPU): `op`, `backend`, `place`, `device` (its name), `date`, `fastvid` (the version), `laws` and `cases` (how many of
each). What breaks a law loses its entry. Exit codes: 0; 1 for a broken law or a stale table; 2 as bench/run.py.
"""

import argparse
import datetime
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from run import ROOT, BenchError, answer, cpu_name, device_name, new_results, read_results, result_file, write_file

BEGIN, END = "<!-- status: written by bench/status.py -->", "<!-- end of status -->"
# on a GPU new shapes may have to be compiled
SHAPES = {"cpu": {"shapes": 100, "repeats": 5}, "cuda": {"shapes": 30, "repeats": 20}, "interpreter": {"shapes": 10}}
SAME = ("op", "backend", "place", "device")  # what tells entries apart
COLUMNS = ("op", "torch", "CPU, native", "Triton, interpreted", "Triton, compiled for", "Triton, on a GPU",
           "CUDA, on a GPU")  # fmt: skip

Entry = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    return answer("status", _parser().parse_args(arguments), _run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench/status.py", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    parser.add_argument("--check", action="store_true", help="exit 1 if the README's table is stale")
    parser.add_argument("--verify", action="store_true", help="hold the laws here; needs --json")
    parser.add_argument("--json", metavar="FILE", help="where --verify notes what held; a folder names the file itself")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="in place of README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="DIR",
                        help="in place of bench/results")  # fmt: skip
    return parser


def _run(asked: argparse.Namespace) -> int:
    if asked.verify:
        if not asked.json:
            raise BenchError("--verify needs --json FILE, where to note what held; a folder names the file itself.")
        return verify(result_file(asked.json))
    table = render(read_verified(asked.results), compiled(ROOT / "kernels"))
    return show(asked, table, "status", BEGIN, END)


def show(asked: argparse.Namespace, table: str, program: str, begin: str, end: str) -> int:
    """Print a table, or, by --write and --check, put it between two lines of the README, or compare. The exit code."""
    if not (asked.write or asked.check):
        print(table)
        return 0
    text = asked.readme.read_text(encoding="utf-8")
    new = placed(text, table, begin, end)
    if asked.write:
        asked.readme.write_text(new, encoding="utf-8")
    elif new != text:
        print(f"{program}: {asked.readme.name} is stale; run: python bench/{program}.py --write")
        return 1
    return 0


# ---- the table


def read_verified(folder: Path) -> list[Entry]:
    """The entries of all result files; where several tell of one op, backend, place and device, the newest."""
    entries = [entry for path in sorted(folder.glob("*.json")) for entry in read_results(path).get("verified", [])]
    newest = {tuple(entry[key] for key in SAME): entry for entry in sorted(entries, key=lambda entry: entry["date"])}
    return list(newest.values())


def compiled(kernels: Path) -> dict[str, str]:
    """Op -> the chips that all its room's Triton kernels compile for without a spill, as bench/static.py recorded."""
    from fastvid import laws

    told = {}
    for room in laws.ROOMS:
        path = kernels / room / "static.json"
        if path.is_file():
            report = json.loads(path.read_text(encoding="utf-8"))["kernels"]
            chips = {chip: [readings[chip] for readings in report.values() if chip in readings]
                     for readings in report.values() for chip in readings}  # fmt: skip
            sound = [chip for chip, readings in chips.items() if all(map(_sound, readings))]
            subjects = importlib.import_module(f"fastvid.kernels.{room}.cases").SUBJECTS
            told |= {subject.op: ", ".join(sound) for subject in subjects}
    return told


def _sound(reading: dict[str, Any]) -> bool:
    return not {"error", "stack", "spill_stores", "spill_loads"} & set(reading)


def render(verified: list[Entry], chips: dict[str, str]) -> str:
    """The table in Markdown. An op without a backend has a dash there; what nobody verified is said to be so."""
    from fastvid import ops

    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for name, op in ops.OPS.items():
        has = {backend.name for backend in op.backends}
        cells = [_verified(verified, name, "reference", "not verified")]
        cells.append(_verified(verified, name, "cpu", "not verified") if "cpu" in has else "-")
        if "triton" in has:
            cells.append(_verified(verified, name, "triton", "not verified", "interpreter"))
            cells.append(chips.get(name) or "not verified")
            cells.append(_verified(verified, name, "triton", "has not run on a GPU", "cuda"))
        else:
            cells += ["-"] * 3
        cells.append(_verified(verified, name, "cuda", "has not run on a GPU", "cuda") if "cuda" in has else "-")
        rows.append((f"`{name}`", *cells))
    rows += [(f"`{name}`", "by its tests", *["-"] * (len(COLUMNS) - 2)) for name in ops.REFERENCE_ONLY]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _verified(verified: list[Entry], op: str, backend: str, otherwise: str, place: str | None = None) -> str:
    told = [f"{entry['date']}, {entry['device']}" for entry in verified
            if (entry["op"], entry["backend"]) == (op, backend) and place in (None, entry["place"])]  # fmt: skip
    return "<br>".join(sorted(told)) or otherwise


def placed(text: str, table: str, begin: str, end: str) -> str:
    """A README with the table between its markers. Raises BenchError where it lacks them."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise BenchError(f"the README must hold these two lines once, in this order: {begin} and {end}")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


# ---- verifying


def verify(path: Path) -> int:
    """Hold every law with every backend that can run here, Triton's in the interpreter where there is no GPU.

    Returns 1 if a law was broken, else 0.
    """
    from fastvid import laws

    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    code = 0
    for place in ["interpreter"] if interpreted else laws.devices():
        for subject, backend in _served(place):
            entry, broken = hold(subject, backend, place)
            told = [f"{'FAIL' if broken else 'pass'}  {subject.op:22} {backend:9} {place}", *broken]
            print("\n      ".join(told), flush=True)
            note(path, entry, keep=not broken)
            code = 1 if broken else code
    if not interpreted and "cuda" not in laws.devices():
        code = _interpreted(path) or code
    return code


def _interpreted(path: Path) -> int:
    """The same in a process of its own: triton reads the variable once, when it is imported."""
    again = [sys.executable, __file__, "--verify", "--json", str(path)]
    return subprocess.run(again, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode


def _served(place: str) -> Iterator[tuple[Any, str]]:
    """What to try in a place, op by op. The interpreter is there for Triton; others are the same without it."""
    from fastvid import laws, ops

    device = "cuda" if place == "cuda" else "cpu"
    for subject in laws.subjects():
        for backend in ops.OPS[subject.op].backends:
            if place == "interpreter" and backend.name != "triton":
                continue
            if reason := laws.why_not(subject, backend.name, device):
                print(f"skip  {subject.op:22} {backend.name:9} {place}: {reason}", flush=True)
            else:
                yield subject, backend.name


def hold(subject: Any, backend: str, place: str) -> tuple[Entry, list[str]]:
    """The entry of one backend of one op in one place, and which laws it broke."""
    import fastvid
    from fastvid import laws

    asked = SHAPES[place] | (laws.interpreted(subject.op) if place == "interpreter" else {})
    bench = laws.Bench(subject, backend, "cuda" if place == "cuda" else "cpu", **asked)
    broken = [f"{law}: {' '.join(reason.split())}" for law, reason in laws.hold(bench) if reason]
    entry = {"op": subject.op, "backend": backend, "place": place}
    entry["device"] = device_name() if place == "cuda" else cpu_name()
    entry |= {"date": datetime.date.today().isoformat(), "fastvid": fastvid.__version__, "laws": len(laws.LAWS)}
    return entry | {"cases": len(bench.cases) * len(subject.dtypes) + bench.shapes}, broken


def note(path: Path, entry: Entry, keep: bool) -> None:
    """Put an entry into a result file in place of an older one of its kind; with keep=False only take that out."""
    results = read_results(path) if path.is_file() else new_results()
    if results["device"] != device_name():
        raise BenchError(f"{path}: tells of another device ({results['device']}); choose another file.")
    others = [one for one in results.get("verified", []) if any(one[key] != entry[key] for key in SAME)]
    write_file(results | {"verified": [*others, entry] if keep else others}, path)


if __name__ == "__main__":
    sys.exit(main())
