"""What the kernels' machine code says, without a GPU: every Triton kernel, every shipped configuration, six chips.

    python bench/static.py                            compile and hold against kernels/<room>/static.json
    python bench/static.py --table                    the same, and print what was read
    python bench/static.py --room nearest_codebook    these rooms alone; --target sm_90: these chips alone
    python bench/static.py --changed                  a room whose report is of these very sources: one chip alone
    python bench/static.py --write                    write the reports, where no guard forbids it

A kernel is whatever the `variants()` of a `kernels/*/triton_gpu.py` names. Compiled code is kept in out/static/, so
that only what changed is compiled again. Terms: machine_code.py.

Guards that always hold: no spill and no local memory; shared memory, threads and registers that the chip has; tensor
cores where they are wanted, none on full float32. Guards against the report, where it was written by the same triton:
registers (10% more), share of 128-bit loads (one point less), resident blocks. The report names exactly what is there.
Exit codes: 0; 1 with one line for each fall; 2 for a wrong command line or a machine that cannot compile.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from machine_code import CHIPS, Chip, Reading, disassemble, read_amd, read_nvidia, read_sass, sources_hash, table

ROOT = Path(__file__).resolve().parents[1]
MORE_REGISTERS, LESS_WIDE = 1.10, 1.0  # a factor; percent points
SOURCE, REPORT, SAMPLE = "triton_gpu.py", "static.json", "sm_90"

Readings = dict[str, dict[str, Reading]]  # variant -> chip -> reading
Spec = dict[str, Any]  # what a variant asks for: name, matrix, precision, targets


class Compiled(NamedTuple):
    """A kernel's reading; on NVIDIA without its instructions, as long as its code awaits the disassembler."""

    reading: Reading
    cubin: bytes = b""
    arch: str = ""
    tools: Path = Path()


class StaticError(Exception):
    """Something that the caller can put right; told in one line."""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    asked = _parser().parse_args(arguments)
    try:
        return _run(asked)
    except StaticError as error:
        print(f"static: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench/static.py", description=__doc__.splitlines()[0])
    parser.add_argument("--room", nargs="+", metavar="NAME", help="only these rooms")
    parser.add_argument("--target", nargs="+", metavar="CHIP", choices=list(CHIPS), help=f"only of {', '.join(CHIPS)}")
    parser.add_argument("--changed", action="store_true", help=f"rooms as their reports know them: of {SAMPLE} alone")
    parser.add_argument("--write", action="store_true", help="write the reports")
    parser.add_argument("--table", action="store_true", help="print every reading")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="compilers at once (default 2)")
    parser.add_argument("--kernels", type=Path, default=ROOT / "kernels", metavar="DIR", help="folder of the rooms")
    return parser


def _run(asked: argparse.Namespace) -> int:
    if asked.write and (asked.target or asked.changed):
        raise StaticError("--write needs every chip; leave --target and --changed out")
    rooms = _rooms(asked.kernels, asked.room)
    _prepare()
    found, count, version = [], 0, importlib.metadata.version("triton")
    for targets, some in _shares(rooms, asked, version).items():
        told, compiled = _hold(some, list(targets), version, asked)
        found, count = found + told, count + compiled
    print("\n".join([*found, f"static: {count} kernels compiled by triton {version}, {len(found)} falls"]))
    return 1 if found else 0


def _shares(rooms: dict[str, Path], asked: argparse.Namespace, version: str) -> dict[tuple[str, ...], dict[str, Path]]:
    """Rooms by the chips that they are compiled for: a report says what would come out of the sources it is of."""
    shares: dict[tuple[str, ...], dict[str, Path]] = {}
    for room, source in rooms.items():
        report = _report_of(source) if asked.changed else None
        same = report is not None and (report.get("sources"), report["triton"]) == (sources_hash(source), version)
        shares.setdefault(tuple(asked.target or ([SAMPLE] if same else CHIPS)), {})[room] = source
    return shares


def _report_of(source: Path) -> dict[str, Any] | None:
    return read_report(source.with_name(REPORT)) if source.with_name(REPORT).exists() else None


def _hold(
    rooms: dict[str, Path], targets: list[str], version: str, asked: argparse.Namespace
) -> tuple[list[str], int]:
    """Compiles some rooms and holds them against their reports, or writes these. Returns falls and kernels."""
    _, specs, readings = measure(rooms, targets, asked.jobs)
    found = []
    for room, source in rooms.items():
        report = _report_of(source)
        if asked.table:
            print(table(room, specs[room], readings[room]))
        if not asked.write:
            found += [f"{room}: {line}" for line in compare(specs[room], readings[room], report, version, targets)]
            if report and report["triton"] != version:
                print(f"{room}: triton {version} here, {report['triton']} in the report: only the guards that always "
                      "hold are held")  # fmt: skip
        elif lines := [line for spec in specs[room] for line in absolute_falls(spec, readings[room][spec["name"]])]:
            found += [f"{room}: {line}; not written" for line in lines]
        else:
            write_report(source.with_name(REPORT), version, readings[room], sources_hash(source))
    return found, sum(len(chips) for variants in readings.values() for chips in variants.values())


def _rooms(kernels: Path, only: list[str] | None) -> dict[str, Path]:
    """Room -> its Triton source."""
    rooms = {path.parent.name: path for path in sorted(kernels.glob(f"*/{SOURCE}"))}
    unknown = sorted(set(only or rooms) - set(rooms))
    if unknown or not rooms:
        raise StaticError(f"no {SOURCE} in {' '.join(unknown) or kernels}; there is one in: {' '.join(rooms) or '-'}")
    return {name: path for name, path in rooms.items() if not only or name in only}


def _prepare() -> None:
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise StaticError("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    if importlib.util.find_spec("triton") is None:
        raise StaticError("triton is not installed, and nothing else can compile the kernels: pip install triton")
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "out" / "static"))
    if importlib.util.find_spec("fastvid") is None:
        sys.path.insert(0, str(ROOT))  # the compilers inherit it


# ---- compiling: everything that imports triton happens in processes of its own


def measure(
    rooms: dict[str, Path], targets: list[str], jobs: int
) -> tuple[str, dict[str, list[Spec]], dict[str, Readings]]:
    """Compiles every variant of every room for every target that it is shipped for.

    rooms: name -> path of its Triton source. targets: names of CHIPS. jobs: processes.
    Returns: triton's version; room -> what its variants ask for; room -> readings. What does not compile has the
    reading {"error": why}.
    Raises: StaticError where a source cannot be imported or its variants contradict each other.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        try:
            version = pool.submit(_version).result()
            specs = {room: pool.submit(_specs, path).result() for room, path in rooms.items()}
        except Exception as error:
            raise StaticError(f"{error!r} while reading the variants") from error
        wanted = [(room, spec["name"], target) for room in rooms for spec in specs[room] for target in targets
                  if target in (spec["targets"] or CHIPS)]  # fmt: skip
        # products without tensor cores are unrolled and take the compiler longest
        wanted.sort(key=lambda job: next(spec["matrix"] for spec in specs[job[0]] if spec["name"] == job[1]))
        futures = {job: _submitted(pool, rooms[job[0]], *job[1:]) for job in wanted}
        results = {job: _result(future) for job, future in futures.items()}
    for job, result in results.items():
        if result is None:  # a compiler died; alone, each job shows whether it was the one
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                alone = _result(pool.submit(_compiled, rooms[job[0]], *job[1:]))
            results[job] = alone or Compiled({"error": "the compiler crashed"})
    read_codes(list(results.values()), jobs)
    readings: dict[str, Readings] = {room: {spec["name"]: {} for spec in specs[room]} for room in rooms}
    for (room, name, target), result in results.items():
        readings[room][name][target] = result.reading
    return version, specs, readings


def _submitted(pool: ProcessPoolExecutor, *job: Any) -> Future | None:
    try:
        return pool.submit(_compiled, *job)
    except BrokenProcessPool:
        return None


def _result(future: Future | None) -> Compiled | None:
    try:
        return future.result() if future else None
    except BrokenProcessPool:
        return None


def read_codes(compiled: list[Compiled], jobs: int) -> None:
    """Completes the readings of NVIDIA's code, all of one architecture by one process."""
    batches: dict[tuple[str, Path], list[Compiled]] = {}
    for one in compiled:
        if one.cubin:
            batches.setdefault((one.arch, one.tools), []).append(one)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda of: _read_batch(batches[of], *of), batches))


def _read_batch(batch: list[Compiled], arch: str, tools: Path) -> None:
    try:
        for one, listing in zip(batch, disassemble([one.cubin for one in batch], arch, tools), strict=True):
            one.reading.update(read_sass(listing))
    except ValueError as error:
        if len(batch) == 1:
            batch[0].reading.clear()
            batch[0].reading["error"] = _one_line(error)
            return
        for one in batch:  # alone, each shows whether it was the one
            _read_batch([one], arch, tools)


def _version() -> str:
    import triton

    return triton.__version__


def _variants(source: Path) -> dict[str, Any]:
    """Variant name -> Variant, of a source imported once per process under the name that its room gives it."""
    name = f"fastvid.kernels.{source.parent.name}.{source.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, source)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    variants = sys.modules[name].variants()
    names = [variant.name for variant in variants]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{source}: variants() must name each variant once, got {names}")
    return dict(zip(names, variants, strict=True))


def _specs(source: Path) -> list[Spec]:
    fields = ("name", "matrix", "precision", "targets")
    specs = [{field: getattr(variant, field) for field in fields} for variant in _variants(source).values()]
    unknown = {target for spec in specs for target in spec["targets"]} - set(CHIPS)
    if unknown:
        raise ValueError(f"{source}: variants() names targets {sorted(unknown)}; known are {list(CHIPS)}")
    return specs


def _compiled(source: Path, name: str, target: str) -> Compiled:
    """Compiles one variant for one chip and reads what needs no disassembly; runs in a process of its own."""
    from triton import compile, knobs

    variant, chip = _variants(source)[name], CHIPS[target]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # on failure triton prints the whole kernel
            compiled = compile(*_compiler_input(variant, chip))
        told = compiled.metadata
        if chip.backend == "hip":
            return Compiled(read_amd(chip, compiled.asm["amdgcn"], told.shared))
        tools = Path(knobs.nvidia.nvdisasm.path).parent
        columns = getattr(told, "tmem_size", 0) or 0
        cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
        reading = read_nvidia(chip, cubin, ptx, told.name, told.shared, columns, tools)
        return Compiled(reading, cubin, re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1], tools)
    except Exception as error:  # whatever it is belongs to this variant on this chip: the others go on
        return Compiled({"error": _one_line(error)})


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[-1].strip()[:200]}"


def _compiler_input(variant: Any, chip: Chip) -> tuple[Any, Any, dict[str, int]]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    if list(variant.signature) != names:
        raise ValueError(f"the signature names {list(variant.signature)}, the kernel's arguments are {names}")
    kinds = variant.signature.values()
    types = {name: kind.removesuffix(":16") for name, kind in variant.signature.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds) if kind.endswith(":16")}
    source = ASTSource(variant.kernel, types, variant.constants, aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return source, GPUTarget(chip.backend, chip.arch, chip.warp_size), options


# ---- guards


def compare(
    specs: list[Spec], readings: Readings, report: dict[str, Any] | None, version: str, targets: list[str]
) -> list[str]:
    """One line for each fall of a room: what is against the guards, worse than recorded, or not as listed.

    report: None where there is none yet. version: triton's here. targets: those that were compiled for; the rest of the
    report is left alone.
    """
    found = [line for spec in specs for line in absolute_falls(spec, readings[spec["name"]])]
    if report is None:
        return [*found, f"no {REPORT}; write it with --write"]
    recorded = report["kernels"]
    for name in sorted({*readings, *recorded}):
        here, there = readings.get(name, {}), recorded.get(name, {})
        new = [target for target in here if target not in there]
        gone = [target for target in there if target not in here and (target in targets or name not in readings)]
        found += [f"{name} {target}: not in the report; write it with --write" for target in new]
        found += [f"{name} {target}: in the report, but not shipped any more" for target in gone]
        if report["triton"] == version:
            both = [target for target in here if target in there]
            found += [f"{name} {target}: {line}" for target in both for line in worse(here[target], there[target])]
    return found


def absolute_falls(spec: Spec, chips: dict[str, Reading]) -> list[str]:
    """What no report can excuse, one line each."""
    lines = {target: _forbidden(spec, CHIPS[target], reading) for target, reading in chips.items()}
    return [f"{spec['name']} {target}: {line}" for target in lines for line in lines[target]]


def _forbidden(spec: Spec, chip: Chip, reading: Reading) -> list[str]:
    if "error" in reading:
        return [reading["error"]]
    found = []
    if spilled := {key: reading[key] for key in ("stack", "spill_stores", "spill_loads") if key in reading}:
        found.append(f"spills or uses local memory: {', '.join(f'{key} {n} bytes' for key, n in spilled.items())}")
    if reading["shared"] > chip.shared_block:
        found.append(f"{reading['shared']} bytes of shared memory, the chip gives a block {chip.shared_block}")
    elif not reading["blocks"]:
        found.append(f"cannot start: {reading['registers']} registers per thread are too many for its threads")
    kinds = reading.get("matrix", {})
    if spec["matrix"] and not any(re.match(rf"{chip.matrix}(\.|$)", kind) for kind in kinds):
        found.append(f"must run on tensor cores ({chip.matrix}), has {' '.join(kinds) or 'no matrix instruction'}")
    if spec["precision"] == "ieee":
        # AMD's matrix cores have a form that multiplies in full float32
        if reduced := [kind for kind in kinds if kind not in ("MFMA.F32", "MFMA.F64")]:
            found.append(f"asked for IEEE float32, has {' '.join(reduced)}")
    elif spec["precision"] and (types := {kind.partition(".")[2].lstrip("X") for kind in kinds} - {""}):
        wanted = {"fp16": "F16", "bf16": "BF16", "tf32": "F32" if chip.backend == "hip" else "TF32"}[spec["precision"]]
        if wanted not in types:
            found.append(f"asked for {spec['precision']}, has {' '.join(kinds)}")
    return found


def worse(reading: Reading, recorded: Reading) -> list[str]:
    """What fell against the recorded reading of the same kernel and chip, one line each."""
    if "error" in reading:
        return []
    found = []
    if reading["registers"] > MORE_REGISTERS * recorded["registers"]:
        found.append(f"{reading['registers']} registers, recorded {recorded['registers']}")
    if reading.get("wide", 100) < recorded.get("wide", 100) - LESS_WIDE:
        found.append(f"{reading['wide']}% of the loads are 128 bits wide, recorded {recorded.get('wide', 100)}%")
    if reading["blocks"] < recorded["blocks"]:
        found.append(f"{reading['blocks']} resident blocks, recorded {recorded['blocks']}")
    return found


# ---- the report


def read_report(path: Path) -> dict[str, Any]:
    """{"triton": version, "sources": hash, "kernels": {variant: {chip: reading}}}; older ones lack the hash.

    Raises: StaticError where the file is not such a report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        report["triton"], report["kernels"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StaticError(f"{path} is not a report ({error!r}); write it again with --write") from error
    return report


def write_report(path: Path, version: str, readings: Readings, sources: str) -> None:
    """Writes a report with one line for each kernel and chip, in a stable order."""
    rows = []
    for name in sorted(readings):
        chips = [f'   "{target}": {json.dumps(readings[name][target])}' for target in CHIPS if target in readings[name]]
        rows.append(f'  "{name}": {{\n' + ",\n".join(chips) + "\n  }")
    head = f'"triton": "{version}",\n "sources": "{sources}"'
    text = f'{{\n {head},\n "kernels": {{\n' + ",\n".join(rows) + "\n }\n}\n"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
