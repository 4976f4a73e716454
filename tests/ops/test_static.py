"""The machine code of the kernels, read without a GPU: guards catch what they are for, and the shipped kernels pass.

Kernels are compiled in processes of their own, so that nothing here depends on whether triton interprets in this one.
"""

import argparse
import copy
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
if str(BENCH) not in sys.path:
    sys.path.insert(0, str(BENCH))  # bench/ is a folder of scripts, not a package
machine_code, static = (importlib.import_module(name) for name in ("machine_code", "static"))
CHIPS = machine_code.CHIPS

TRITON = importlib.util.find_spec("triton")
needs_triton = pytest.mark.skipif(TRITON is None, reason="needs triton, which is not installed")


def nvidia_folder(name: str) -> Path:
    return Path(TRITON.origin).parent / "backends" / "nvidia" / name


def run_static(*arguments: str, cache: Path | None = None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)} if cache else {}
    command = [sys.executable, str(BENCH / "static.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


# ---- the shipped kernels


def due(kernels: Path, version: str) -> list[str]:
    """The rooms that have to be compiled: those whose report is of other sources or of another compiler, and one of the
    rest, whose kernels would come out as their reports say. Which one changes with what is reported."""
    rooms = static._rooms(kernels, None)
    shares = static._shares(rooms, argparse.Namespace(changed=True, target=None), version)
    same = sorted(shares.get((static.SAMPLE,), {}))
    reports = b"".join(rooms[room].with_name(static.REPORT).read_bytes() for room in same)
    return sorted(set(rooms) - set(same)) + ([same[zlib.crc32(reports) % len(same)]] if same else [])


@needs_triton
def test_shipped_kernels():
    # for every chip where a source is newer than its report, else for one
    told = run_static("--changed", "--room", *due(ROOT / "kernels", importlib.metadata.version("triton")))
    assert told.returncode == 0, told.stdout + told.stderr


def test_rooms_that_changed_are_compiled_and_one_that_did_not(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        source = tmp_path / name / "triton_gpu.py"
        source.write_text(f"name = {name!r}")
        static.write_report(source.with_name("static.json"), "3.7.1", {}, static.sources_hash(source))
    assert len(due(tmp_path, "3.7.1")) == 1 and due(tmp_path, "3.8.0") == ["a", "b", "c"]
    (tmp_path / "b" / "triton_gpu.py").write_text("name = None")
    assert due(tmp_path, "3.7.1")[0] == "b" and len(due(tmp_path, "3.7.1")) == 2
    (tmp_path / "c" / "static.json").unlink()
    assert due(tmp_path, "3.7.1") == ["b", "c", "a"]


@needs_triton
@pytest.mark.slow
def test_shipped_kernels_for_every_chip():
    told = run_static()
    assert told.returncode == 0, told.stdout + told.stderr


def test_a_report_is_believed_of_its_own_sources_alone(tmp_path):
    (tmp_path / "common").mkdir()
    source = tmp_path / "room" / "triton_gpu.py"
    source.parent.mkdir()
    source.write_text("one = 1")
    rooms, asked = {"room": source}, argparse.Namespace(changed=True, target=None)
    report = source.with_name("static.json")
    assert static._shares(rooms, asked, "3.7.1") == {tuple(static.CHIPS): rooms}, "there is no report"
    static.write_report(report, "3.7.1", {}, static.sources_hash(source))
    assert static._shares(rooms, asked, "3.7.1") == {("sm_90",): rooms}
    assert static._shares(rooms, asked, "3.8.0") == {tuple(static.CHIPS): rooms}, "another compiler"
    source.write_text("one = 2")
    assert static._shares(rooms, asked, "3.7.1") == {tuple(static.CHIPS): rooms}, "another source"
    (tmp_path / "common" / "variant.py").write_text("")
    static.write_report(report, "3.7.1", {}, static.sources_hash(source))
    (tmp_path / "common" / "variant.py").write_text("new = True")
    assert static._shares(rooms, asked, "3.7.1") == {tuple(static.CHIPS): rooms}, "another source of all rooms"


# ---- toy kernels, compiled for real


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> tuple[Path, str]:
    """A folder with the rooms `good` and `bad` and what --write said of them; compiled code is in its cache/."""
    folder = tmp_path_factory.mktemp("static")
    toy = Path(__file__).with_name("static_toy.py").read_text(encoding="utf-8")
    for room, ending in (("good", "GOOD"), ("bad", "BAD")):
        (folder / room).mkdir()
        (folder / room / "triton_gpu.py").write_text(toy.replace("return GOOD", f"return {ending}"), encoding="utf-8")
    told = run_static("--kernels", str(folder), "--write", "--table", cache=folder / "cache")
    assert told.returncode == 1, told.stdout + told.stderr
    return folder, told.stdout


@pytest.fixture(scope="module")
def report(toys) -> dict:
    return static.read_report(toys[0] / "good" / "static.json")


@needs_triton
@pytest.mark.parametrize(
    "fall",
    [
        r"spills sm_80: spills or uses local memory: stack \d+ bytes, spill_stores \d+ bytes, spill_loads \d+ bytes",
        r"greedy sm_86: 135168 bytes of shared memory, the chip gives a block 101376",
        r"greedy sm_120: 135168 bytes of shared memory",
        r"forced-ieee sm_90: must run on tensor cores \(HGMMA\), has no matrix instruction",
        r"too-small sm_90: must run on tensor cores \(HGMMA\), has HMMA.F16",
        r"secret-tf32 sm_80: asked for IEEE float32, has HMMA.TF32",
        r"secret-tf32 sm_90: asked for IEEE float32, has HGMMA.TF32",
        r"secret-tf32 sm_100: asked for IEEE float32, has UTCHMMA",
        r"secret-tf32 gfx942: asked for IEEE float32, has MFMA.XF32",
        r"untrue sm_80: asked for fp16, has HMMA.BF16",
        r"broken sm_80: CompilationError: .*power of 2",
    ],
)
def test_a_bad_kernel_falls(toys, fall):
    assert re.search(rf"^bad: {fall}.*; not written$", toys[1], re.MULTILINE), toys[1]


@needs_triton
def test_only_bad_kernels_fall(toys):
    folder, text = toys
    falls = {line.split()[1] for line in text.splitlines() if line.endswith("; not written")}
    assert falls == {"spills", "greedy", "forced-ieee", "secret-tf32", "too-small", "untrue", "broken"}
    assert not re.search(r"^bad: greedy sm_80", text, re.MULTILINE)  # 132 KB are no trouble there
    assert not (folder / "bad" / "static.json").exists()


@needs_triton
def test_the_report_holds_what_the_machine_code_says(report):
    half, copied = report["kernels"]["half"], report["kernels"]["copy"]
    assert list(half) == list(report["kernels"]["tf32"]) == list(CHIPS)
    kinds = {target: next(iter(reading["matrix"])) for target, reading in half.items()}
    assert kinds == {"sm_80": "HMMA.F16", "sm_86": "HMMA.F16", "sm_90": "HGMMA.F16", "sm_100": "UTCHMMA",
                     "sm_120": "HMMA.F16", "gfx942": "MFMA.F16"}  # fmt: skip
    # the x tile (128 x 64) and two stages of the codes (64 x 64) in fp16, as wgmma reads all three from shared memory
    assert half["sm_90"]["shared"] == 2 * (128 + 2 * 64) * 64
    assert list(copied) == ["sm_80", "gfx942"]
    for reading in copied.values():  # 1024 floats by 128 threads: two loads of 128 bits; on AMD by 256: one
        assert reading["wide"] == 100.0 and set(reading["loads"]) == {"128"} and "matrix" not in reading
    assert copied["sm_80"]["loads"] == {"128": 2} and copied["gfx942"]["loads"] == {"128": 1}


@needs_triton
def test_loads_without_alignment_are_narrow(toys):
    rows = re.findall(r"^\| (narrow|copy) +\| (?:sm_80|gfx942) .*?\| +(\d+)% ", toys[1], re.MULTILINE)
    assert sorted(rows) == [("copy", "100")] * 2 + [("narrow", "0")] * 2


@needs_triton
def test_what_was_written_is_held(toys, report):
    folder, _ = toys
    arguments = ["--kernels", str(folder), "--room", "good"]
    told = run_static(*arguments, "--target", "sm_80", "gfx942", cache=folder / "cache")
    assert told.returncode == 0 and told.stdout.endswith("0 falls\n"), told.stdout + told.stderr
    path = folder / "good" / "static.json"
    written = path.read_text(encoding="utf-8")
    try:
        doctored = copy.deepcopy(report)
        doctored["kernels"]["half"]["sm_90"]["blocks"] += 1
        del doctored["kernels"]["copy"]["sm_80"]
        path.write_text(json.dumps(doctored), encoding="utf-8")
        told = run_static(*arguments, "--target", "sm_80", "sm_90", cache=folder / "cache")
    finally:
        path.write_text(written, encoding="utf-8")
    falls = ["good: copy sm_80: not in the report", "good: half sm_90: 4 resident blocks, recorded 5"]
    assert told.returncode == 1 and told.stdout.count("good: ") == 2, told.stdout
    assert all(fall in told.stdout for fall in falls)


@needs_triton
def test_spilled_bytes_are_those_that_the_assembler_tells(toys, tmp_path):
    seen = 0
    for cubin in (toys[0] / "cache").glob("*/*.cubin"):
        usage = [nvidia_folder("bin") / "cuobjdump", "--dump-resource-usage", cubin]
        if " STACK:0 " in subprocess.run(usage, capture_output=True, text=True, check=True).stdout:
            continue
        ptx = cubin.with_suffix(".ptx").read_text(encoding="utf-8")
        arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
        ptxas = nvidia_folder("bin") / ("ptxas-blackwell" if arch.startswith("sm_1") else "ptxas")
        assemble = [ptxas, "-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={arch}", "-o", tmp_path / "again"]
        told = subprocess.run([*assemble, cubin.with_suffix(".ptx")], capture_output=True, text=True, check=True).stderr
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", told).groups()
        )
        again, chip, tools = (tmp_path / "again").read_bytes(), CHIPS[arch.rstrip("a")], nvidia_folder("bin")
        assert machine_code.read_nvidia(chip, again, ptx, cubin.stem, 0, 0, tools)["stack"] == stack
        spilled = machine_code.read_sass(machine_code.disassemble([again], arch, tools)[0])
        assert (spilled["spill_stores"], spilled["spill_loads"]) == (stores, loads)
        seen += 1
    assert seen >= 1


@needs_triton
def test_code_of_many_cubins_is_read_as_the_disassembler_reads_each(toys):
    cubins = sorted((toys[0] / "cache").glob("*/*.cubin"))
    arches = {cubin: re.search(r"^\.target (\w+)", cubin.with_suffix(".ptx").read_text(), re.MULTILINE)[1]
              for cubin in cubins}  # fmt: skip
    for arch in sorted(set(arches.values())):
        mine = [cubin for cubin in cubins if arches[cubin] == arch]
        listings = machine_code.disassemble([cubin.read_bytes() for cubin in mine], arch, nvidia_folder("bin"))
        assert len(listings) == len(mine) > 1
        told = subprocess.run([nvidia_folder("bin") / "nvdisasm", "-c", mine[-1]], capture_output=True, text=True)
        assert machine_code.read_sass(listings[-1]) == machine_code.read_sass(told.stdout)


@needs_triton
def test_code_that_the_disassembler_refuses_takes_only_its_own_kernel_along(toys):
    good = next((toys[0] / "cache").glob("*/_copy*.cubin"))
    arch = re.search(r"^\.target (\w+)", good.with_suffix(".ptx").read_text(), re.MULTILINE)[1]
    code = machine_code.machine_code_of(good.read_bytes())
    broken = good.read_bytes().replace(code, b"\xff" * len(code))
    batch = [static.Compiled({"registers": 8}, cubin, arch, nvidia_folder("bin"))
             for cubin in (good.read_bytes(), broken, b"text")]  # fmt: skip
    static.read_codes(batch, jobs=1)
    assert batch[0].reading["loads"] == {"128": 2} and batch[0].reading["registers"] == 8
    assert "Unrecognized operation" in batch[1].reading["error"] and "ELF" in batch[2].reading["error"]


@needs_triton
def test_waves_on_amd_are_those_that_the_compiler_tells(toys):
    assemblies = [path.read_text(encoding="utf-8") for path in (toys[0] / "cache").glob("*/*.amdgcn")]
    assert len(assemblies) >= 5
    for assembly in assemblies:
        told = int(re.search(r"^; Occupancy: (\d+)$", assembly, re.MULTILINE)[1])
        assert machine_code.read_amd(CHIPS["gfx942"], assembly, 0)["waves"] == told


OCCUPANCY = """
#include <cstdio>
#include <climits>
#include <cstring>
#include "cuda_occupancy.h"
int main() {
  cudaOccDeviceProp chip; cudaOccFuncAttributes kernel; cudaOccDeviceState state; cudaOccResult result;
  int warps; long shared_sm, shared_block, shared; int threads;
  state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
  chip.maxThreadsPerBlock = 1024; chip.warpSize = 32; chip.numSms = 1; chip.sharedMemPerBlock = 48 << 10;
  chip.regsPerBlock = chip.regsPerMultiprocessor = 65536; chip.reservedSharedMemPerBlock = 1024;
  kernel.maxThreadsPerBlock = 1024; kernel.numBlockBarriers = 1; kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  while (scanf("%d %d %d %ld %ld %d %d %ld", &chip.computeMajor, &chip.computeMinor, &warps, &shared_sm, &shared_block,
               &threads, &kernel.numRegs, &shared) == 8) {
    chip.maxThreadsPerMultiprocessor = warps * 32;
    chip.sharedMemPerMultiprocessor = shared_sm; chip.sharedMemPerBlockOptin = shared_block;
    kernel.maxDynamicSharedSizeBytes = shared;
    memset(&result, 0, sizeof result);
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &chip, &kernel, &state, threads, shared)) return 1;
    printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


@needs_triton
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_resident_blocks_are_those_of_nvidias_own_arithmetic(tmp_path):
    (tmp_path / "occupancy.cpp").write_text(OCCUPANCY, encoding="utf-8")
    build = ["g++", "-w", f"-I{nvidia_folder('include')}", tmp_path / "occupancy.cpp", "-o", tmp_path / "occupancy"]
    subprocess.run(build, check=True)
    chips = [chip for chip in CHIPS.values() if chip.backend == "cuda"]
    asked = [(chip, threads, registers, shared) for chip in chips for threads in (32, 96, 128, 256, 384, 512, 1024)
             for registers in (16, 33, 64, 96, 128, 129, 168, 255)
             for shared in (0, 1, 16384, 34816, 65552, chip.shared_block, chip.shared_block + 1)]  # fmt: skip
    lines = [" ".join(map(str, (*divmod(c.arch, 10), c.warps, c.shared, c.shared_block, threads, registers, shared)))
             for c, threads, registers, shared in asked]  # fmt: skip
    told = subprocess.run([tmp_path / "occupancy"], input="\n".join(lines), capture_output=True, text=True, check=True)
    wanted = [int(line) for line in told.stdout.split()]
    assert len(wanted) == len(asked) and {0, 1, 16, 24, 32} <= set(wanted)
    assert [machine_code.resident_blocks(*question) for question in asked] == wanted


def test_tensor_memory_and_lds_limit_the_resident_blocks():
    assert machine_code.resident_blocks(CHIPS["sm_100"], 128, 32, 0, tensor_columns=256) == 2
    assert machine_code.resident_blocks(CHIPS["gfx942"], 256, 128, 33 * 1024) == 1
    assert machine_code.resident_blocks(CHIPS["gfx942"], 256, 128, 16 * 1024) == 4
    assert machine_code.resident_blocks(CHIPS["gfx942"], 256, 128, 65 * 1024) == 0


# ---- reading and comparing


def test_sass_is_read_by_the_suffixes_of_its_instructions():
    lines = ["LDG.E.LTC128B.CONSTANT R1, [R2]", "@!P0 LDG.E.128 R4, [R2.64]", "LDG.E.U16 R1, [R2]", "NOP",
             "@UP0 UTMALDG.2D [UR8], [UR4]", "LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64]", "LDL.LU.64 R2, [R1]",
             "@P3 STL [R1+0x4], R9", "QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR4]", "UTCHMMA gdesc[UR4]",
             "HMMA.16816.F32.BF16 R4, R8"]  # fmt: skip
    code = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    assert machine_code.read_sass(f"toy:\n.text.toy:\n{code}\n.L_x_0:\n") == {
        "instructions": 10, "wide": 60.0, "loads": {"128": 2, "16": 1, "32": 1, "tile": 1},
        "matrix": {"HMMA.BF16": 1, "QGMMA": 1, "UTCHMMA": 1}, "spill_loads": 8, "spill_stores": 4,
    }  # fmt: skip


@pytest.mark.parametrize("read", [machine_code.read_sass, machine_code.read_amdgcn])
def test_output_that_is_not_understood_is_no_reading(read):
    with pytest.raises(ValueError, match="no instructions"):
        read("nothing here\n")


READING = {"registers": 100, "shared": 1024, "blocks": 4, "warps": 16, "instructions": 50, "wide": 90.0,
           "loads": {"128": 9, "32": 1}}  # fmt: skip
SPEC = {"name": "a", "matrix": False, "precision": None, "targets": ()}


def compared(here: dict, there: dict, version: str = "3.7.1", targets=("sm_80", "sm_90")) -> list[str]:
    specs = [SPEC | {"name": name} for name in here]
    return static.compare(specs, here, {"triton": "3.7.1", "kernels": there}, version, list(targets))


@pytest.mark.parametrize(
    "change, fall",
    [
        ({}, None), ({"registers": 110}, None), ({"registers": 111}, "111 registers, recorded 100"),
        ({"blocks": 5, "registers": 10, "wide": 100.0}, None), ({"blocks": 3}, "3 resident blocks, recorded 4"),
        ({"wide": 89.0}, None), ({"wide": 88.9}, "88.9% of the loads are 128 bits wide, recorded 90.0%"),
        ({"instructions": 500}, None),
    ],
)  # fmt: skip
def test_what_counts_as_worse(change, fall):
    found = compared({"a": {"sm_80": READING | change}}, {"a": {"sm_80": READING}})
    assert found == ([f"a sm_80: {fall}"] if fall else [])


def test_another_triton_holds_only_the_guards_that_always_hold():
    worse = READING | {"registers": 200, "blocks": 1, "wide": 0.0}
    assert len(compared({"a": {"sm_80": worse}}, {"a": {"sm_80": READING}})) == 3
    assert compared({"a": {"sm_80": worse}}, {"a": {"sm_80": READING}}, "3.6.0") == []
    spilled = compared({"a": {"sm_80": worse | {"stack": 8}}}, {"a": {"sm_80": READING}}, "3.6.0")
    assert spilled == ["a sm_80: spills or uses local memory: stack 8 bytes"]


def test_the_report_names_exactly_what_is_there():
    one, two = {"sm_80": READING}, {"sm_80": READING, "sm_90": READING}
    assert compared({"a": two}, {"a": two}) == []
    assert compared({"a": two}, {"a": one}) == ["a sm_90: not in the report; write it with --write"]
    assert compared({"a": one}, {"a": two}) == ["a sm_90: in the report, but not shipped any more"]
    assert compared({"a": one}, {"a": two}, targets=["sm_80"]) == []
    assert compared({"a": one}, {"a": one, "b": one}) == ["b sm_80: in the report, but not shipped any more"]
    assert compared({"a": one, "b": one}, {"a": one}) == ["b sm_80: not in the report; write it with --write"]
    assert static.compare([SPEC], {"a": one}, None, "3.7.1", ["sm_80"]) == ["no static.json; write it with --write"]


def test_a_kernel_that_cannot_start_falls():
    reading = READING | {"blocks": 0, "registers": 255}
    assert "cannot start: 255 registers" in static.absolute_falls(SPEC, {"sm_80": reading})[0]
