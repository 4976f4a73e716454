"""What a compiled kernel tells without running: registers, memory, spills, instructions, and how many fit on a chip.

NVIDIA code is read with the cuobjdump and nvdisasm that come inside the triton package, AMD code from the assembly that
triton keeps. A reading is a plain dict, as it stands in the report `kernels/<room>/static.json`:

    registers     per thread; on AMD vector and accumulation registers together
    shared        bytes per block, static and dynamic
    blocks        of this kernel that one multiprocessor (on AMD: one compute unit) can hold at once; 0: it cannot start
    warps         those blocks in warps (wavefronts)
    wide          percent of the load instructions from global memory that move 128 bits a thread, or whole tiles
    loads         {bits a thread: load instructions}; "tile" for bulk and tensor copies
    matrix        {kind: instructions}, with the input type where the instruction names it: {"HGMMA.TF32": 8}
    instructions  all of them; no-operations apart
    agprs, sgprs, waves    on AMD: accumulation and scalar registers, wavefronts that one SIMD holds
    stack, spill_stores, spill_loads    bytes of local (AMD: scratch) memory per thread; left out where zero
"""

import hashlib
import itertools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

Reading = dict[str, Any]


class Chip(NamedTuple):
    """What one multiprocessor (compute unit) holds. Shared memory in bytes; `arch` as triton names it."""

    name: str
    arch: int | str
    warps: int
    blocks: int
    shared: int
    shared_block: int
    matrix: str
    backend: str = "cuda"
    warp_size: int = 32


# NVIDIA: CUDA C++ Programming Guide 13.0, "Compute Capabilities", technical specifications per compute capability (the
# tests hold this arithmetic against NVIDIA's own cuda_occupancy.h); NVIDIA's GeForce-class Blackwell is 12.0.
# AMD: "AMD Instinct MI300 ISA Reference Guide" 2025, and the occupancy limits of LLVM's AMDGPU backend.
CHIPS = {
    chip.name: chip
    for chip in (
        #     target    arch      warps blocks shared      per block  matrix instructions
        Chip("sm_80",   80,       64,   32,    164 * 1024, 163 * 1024, "HMMA"),
        Chip("sm_86",   86,       48,   16,    100 * 1024,  99 * 1024, "HMMA"),
        Chip("sm_90",   90,       64,   32,    228 * 1024, 227 * 1024, "HGMMA"),
        Chip("sm_100",  100,      64,   32,    228 * 1024, 227 * 1024, "UTC[A-Z]*MMA"),
        Chip("sm_120",  120,      48,   24,    100 * 1024,  99 * 1024, "HMMA"),
        Chip("gfx942",  "gfx942", 32,   32,     64 * 1024,  64 * 1024, "MFMA", "hip", 64),
    )
}  # fmt: skip

RESERVED = 1024  # bytes of shared memory that CUDA keeps for itself in every block, from compute capability 8.0
REGISTERS, PARTITIONS = 65536, 4
TENSOR_COLUMNS = 512  # of tensor memory per multiprocessor, 10.0
VECTOR_REGISTERS, SIMDS = 512, 4


def resident_blocks(chip: Chip, threads: int, registers: int, shared: int, tensor_columns: int = 0) -> int:
    """How many blocks one multiprocessor or compute unit holds at once; 0 where not even one can start.

    threads: per block. registers: per thread. shared: bytes per block, without what CUDA reserves. tensor_columns: of
    tensor memory per block.
    Source: the limits of registers, shared memory and warps in NVIDIA's cuda_occupancy.h; for AMD, LLVM's
    AMDGPUBaseInfo.cpp.
    """
    warps = -(-threads // chip.warp_size)
    if threads > 1024 or shared > chip.shared_block:
        return 0
    if chip.backend == "hip":
        lds = _round_up(shared, 512)
        barriers = 16 if warps > 1 else chip.blocks
        return min(_amd_waves(registers) * SIMDS // warps, chip.shared // lds if lds else chip.blocks, barriers)
    per_warp = _round_up(registers * chip.warp_size, 256)
    if per_warp * _round_up(warps, PARTITIONS) > REGISTERS:
        return 0
    by_registers = REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps
    by_shared = chip.shared // _round_up(shared + RESERVED, 128)
    by_tensor_memory = TENSOR_COLUMNS // tensor_columns if tensor_columns else chip.blocks
    return min(by_registers, by_shared, by_tensor_memory, chip.warps // warps, chip.blocks)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _amd_waves(registers: int) -> int:
    """Wavefronts that the register file of one SIMD holds."""
    return min(8, VECTOR_REGISTERS // max(8, _round_up(registers, 8)))


def read_nvidia(
    chip: Chip, cubin: bytes, ptx: str, name: str, shared: int, tensor_columns: int, tools: Path
) -> Reading:
    """Reading of one cubin, its instructions apart: those of many cubins are read at once, by `disassemble`.

    ptx: tells the threads per block, which warp specialisation raises above those that were asked for.
    shared: bytes of dynamic shared memory at launch. tools: the folder of cuobjdump and nvdisasm.
    Raises: ValueError where cuobjdump prints something that is not understood.
    """
    usage = _told(tools / "cuobjdump", "--dump-resource-usage", cubin)
    found = re.search(rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    threads = re.search(r"\.reqntid (\d+)", ptx)
    if not found or not threads:
        raise ValueError(f"no resource usage of {name} in the output of cuobjdump, or no .reqntid in the PTX")
    registers, stack, fixed, local = map(int, found.groups())
    # from 9.0 on the assembler counts the reserved bytes as static shared memory
    shared += max(0, fixed - RESERVED) if chip.arch >= 90 else fixed
    blocks = resident_blocks(chip, int(threads[1]), registers, shared, tensor_columns)
    reading = {"registers": registers, "shared": shared, "blocks": blocks, "warps": blocks * int(threads[1]) // 32}
    return reading | _present(stack=stack + local)


def disassemble(cubins: list[bytes], arch: str, tools: Path) -> list[str]:
    """The disassembly of each cubin's code, by one call for all: nvdisasm takes longer to start than to read them.

    arch: of all of them, as their PTX has it ("sm_90a").
    Raises: ValueError where nvdisasm does not print each instruction on a line of its own.
    """
    codes = [machine_code_of(cubin) for cubin in cubins]
    told = _told(tools / "nvdisasm", "--binary", arch.replace("sm_", "SM"), b"".join(codes))
    lines = iter(INSTRUCTION.findall(told))
    listings = ["\n".join(itertools.islice(lines, len(code) // INSTRUCTION_BYTES)) for code in codes]
    if len(INSTRUCTION.findall(told)) * INSTRUCTION_BYTES != sum(map(len, codes)):
        raise ValueError(f"{sum(map(len, codes))} bytes of code are not {len(INSTRUCTION.findall(told))} instructions")
    return listings


def machine_code_of(cubin: bytes) -> bytes:
    """The instructions of a cubin, which is a little-endian 64-bit ELF file.

    Raises: ValueError where it is not.
    """
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"a cubin is a little-endian 64-bit ELF file, this starts with {cubin[:6]!r}")
    start, size, count = *struct.unpack_from("<Q", cubin, 0x28), *struct.unpack_from("<HH", cubin, 0x3A)
    sections = [struct.unpack_from("<4xIQ8xQQ", cubin, start + i * size) for i in range(count)]
    return b"".join(cubin[at : at + length] for kind, flags, at, length in sections
                    if kind == ELF_CONTENTS and flags & ELF_EXECUTABLE)  # fmt: skip


def _told(tool: Path, option: str, *given: str | bytes) -> str:
    """What a tool prints of the bytes that are given last."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(given[-1])
        file.flush()
        told = subprocess.run([tool, option, *given[:-1], file.name], capture_output=True, text=True)
    if told.returncode:
        raise ValueError(f"{tool.name} exit code {told.returncode}: {told.stderr.strip()[:200]}")
    return told.stdout


# sh_type and sh_flags of sections that hold instructions, and the size of one from compute capability 7.0 on
ELF_CONTENTS, ELF_EXECUTABLE, INSTRUCTION_BYTES = 1, 4, 16
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/.*$", re.MULTILINE)
SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)", re.MULTILINE)
AMDGCN = re.compile(r"^\t([a-z]\w+)", re.MULTILINE)


def read_sass(code: str) -> Reading:
    """Instruction counts of a disassembly by nvdisasm.

    Raises: ValueError where no instruction is found.
    """
    counts = Counter(SASS.findall(code))
    counts.pop("NOP", None)
    if not counts:
        raise ValueError("no instructions in the output of nvdisasm")
    loads, matrix, spills = Counter(), Counter(), Counter()
    for opcode, count in counts.items():
        base, *words = opcode.split(".")
        if base in ("LD", "LDG", "LDGSTS"):
            loads[str(_bits(words))] += count
        elif base in ("UTMALDG", "UBLKCP"):
            loads["tile"] += count
        elif base in ("LDL", "STL"):
            spills["spill_loads" if base == "LDL" else "spill_stores"] += count * _bits(words) // 8
        elif base.endswith("MMA"):
            matrix[_kind(base, words)] += count
    return _instructions(counts, loads, matrix) | _present(**spills)


def _bits(words: list[str]) -> int:
    """Width of one thread's memory access, from the suffixes of its instruction."""
    return next((int(digits[1]) for word in words if (digits := re.fullmatch(r"[US]?(8|16|64|128|256)", word))), 32)


def _kind(base: str, words: list[str]) -> str:
    # tcgen05 reads the input type from a descriptor; Ampere's and Hopper's half-precision form is the unnamed one
    if base.startswith("UTC") or not base.startswith("H"):
        return base
    return f"{base}.{next((word for word in words if word in ('TF32', 'BF16')), 'F16')}"


def read_amd(chip: Chip, assembly: str, shared: int) -> Reading:
    """Reading of the assembly of one AMD kernel. shared: bytes of LDS at launch.

    Raises: ValueError where its metadata is incomplete.
    """
    told = {key: int(value) for key, value in re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    try:
        registers, threads = told["vgpr_count"], told["max_flat_workgroup_size"]
        shared += told["group_segment_fixed_size"]
        spilled = {"stack": told["private_segment_fixed_size"],
                   "spill_stores": 4 * (told["vgpr_spill_count"] + told["sgpr_spill_count"])}  # fmt: skip
        scalars = {"agprs": told["agpr_count"], "sgprs": told["sgpr_count"], "waves": _amd_waves(registers)}
    except KeyError as error:
        raise ValueError(f"no .{error.args[0]} in the metadata of the AMD assembly") from None
    blocks = resident_blocks(chip, threads, registers, shared)
    reading = {"registers": registers, "shared": shared, "blocks": blocks, "warps": blocks * threads // chip.warp_size}
    return reading | scalars | read_amdgcn(assembly) | _present(**spilled)


def read_amdgcn(assembly: str) -> Reading:
    """Instruction counts of AMD assembly.

    Raises: ValueError where no instruction is found.
    """
    counts = Counter(AMDGCN.findall(assembly.partition("\t.section\t.rodata")[0]))
    counts.pop("s_nop", None)
    if not counts:
        raise ValueError("no instructions in the AMD assembly")
    loads, matrix = Counter(), Counter()
    for opcode, count in counts.items():
        if load := re.fullmatch(r"(?:global|buffer|flat)_load_(?:lds_)?(\w+)", opcode):
            loads[str(_amd_bits(load[1]))] += count
        elif product := re.fullmatch(r"v_s?mfma[ci]?_\w+x\d+_(?:\d+b_)?(\w+)", opcode):
            matrix[f"MFMA.{product[1].removesuffix('_1k').upper()}"] += count
    return _instructions(counts, loads, matrix)


def _amd_bits(suffix: str) -> int:
    words = re.match(r"dword(?:x(\d))?", suffix)
    return 32 * int(words[1] or 1) if words else 8 if "byte" in suffix else 16


def _instructions(counts: Counter, loads: Counter, matrix: Counter) -> Reading:
    wide = sum(count for width, count in loads.items() if width == "tile" or int(width) >= 128)
    share = {"wide": round(100 * wide / loads.total(), 1)} if loads else {}
    tables = {"loads": dict(sorted(loads.items())), "matrix": dict(sorted(matrix.items()))}
    return {"instructions": counts.total(), **share, **{name: table for name, table in tables.items() if table}}


def _present(**values: int) -> Reading:
    return {name: value for name, value in values.items() if value}


def sources_hash(source: Path) -> str:
    """Of everything that decides what is read of a room's kernels, the compiler apart. source: its triton_gpu.py."""
    readers = [Path(__file__).with_name(name) for name in ("machine_code.py", "static.py")]
    paths = [*sorted(source.parent.glob("*.py")), *sorted(source.parent.parent.glob("common/*.py")), *readers]
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()[:16]


def table(room: str, specs: list[dict[str, Any]], readings: dict[str, dict[str, Reading]]) -> str:
    """The readings of a room as a Markdown table."""
    head = ["kernel", "chip", "registers", "shared", "blocks", "warps", "128-bit", "matrix", "spilled", "instructions"]
    rows = [head, ["---"] * len(head)]
    for spec in specs:
        for target, reading in readings[spec["name"]].items():
            rows.append([spec["name"], target, *(_cells(CHIPS[target], reading))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f"\n{room}\n", *(f"| {line} |" for line in lines), ""])


def _cells(chip: Chip, reading: Reading) -> list[str]:
    if "error" in reading:
        return [reading["error"], *[""] * 7]
    wide = f"{reading['wide']:.0f}%" if "wide" in reading else "-"
    kinds = " ".join(f"{count} {kind}" for kind, count in reading.get("matrix", {}).items())
    spilled = reading.get("spill_stores", 0) or reading.get("stack", 0)
    return [str(reading["registers"]), f"{reading['shared'] / 1024:.1f} KB", str(reading["blocks"]),
            f"{reading['warps']} of {chip.warps}", wide, kinds or "-", f"{spilled} B" if spilled else "-",
            str(reading["instructions"])]  # fmt: skip
