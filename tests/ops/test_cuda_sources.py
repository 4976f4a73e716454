"""CUDA sources, compiled without a GPU: no warning, no spill."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastvid import _native

ROOT = Path(__file__).resolve().parents[2]
TRITON = importlib.util.find_spec("triton")
CUOBJDUMP = TRITON and Path(TRITON.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, which is not installed")
SOURCES = [pytest.param(path, id=path.parent.name) for path in sorted((ROOT / "kernels").glob("*/cuda.cu"))]


def compile_cuda(source: Path, arch: str, folder: Path) -> subprocess.CompletedProcess:
    # -arch=sm_90a would compile for the plain compute_90 as well, which lacks what the "a" stands for
    only = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    options = ["-std=c++17", "-O3", "-fmad=false", "-DFASTVID_ABI_VERSION=0", "-Xptxas=-v", "-cubin"]
    command = ["nvcc", *options, only, f"-I{ROOT / 'kernels'}", str(source), "-o", str(folder / "out.cubin")]
    return subprocess.run(command, capture_output=True, text=True)


def built_usage(arch: str) -> list[tuple[str, str]]:
    """Bytes of stack and local memory of every kernel that the library holds for a chip; none where there is no library
    of the present sources."""
    library = _native._find("libfastvid_cuda.so")
    sources = [path for path in (ROOT / "kernels").glob("*/cuda*") if path.suffix in (".cu", ".h")]
    if not (CUOBJDUMP and library) or library.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        return []
    command = [CUOBJDUMP, "--dump-resource-usage", library]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    codes = [part for part in told.split("Fatbin elf code:") if re.search(rf"^arch = sm_{arch}$", part, re.MULTILINE)]
    return re.findall(r"STACK:(\d+) .*?LOCAL:(\d+)", "".join(codes))


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("source", SOURCES)
def test_cuda_sources_compile_without_spills(source, arch, tmp_path):
    if arch == "90a" and (usage := built_usage(arch)):  # the build has compiled for it already
        assert set(usage) == {("0", "0")}
        return
    told = compile_cuda(source, arch, tmp_path)
    assert told.returncode == 0 and "warning" not in told.stderr, told.stderr
    kernels = re.findall(rf"Compiling entry function '\w+' for 'sm_{arch}'", told.stderr)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", told.stderr)
    assert kernels and len(spills) >= len(kernels) and set(spills) == {("0", "0", "0")}, told.stderr


@needs_nvcc
def test_a_cuda_source_for_hopper_alone_is_refused_on_ampere(tmp_path):
    source = tmp_path / "cuda.cu"
    fence = 'asm volatile("wgmma.fence.sync.aligned;");'
    source.write_text(f'extern "C" __global__ void scale(float* x) {{ {fence} x[threadIdx.x] *= 2; }}\n')
    assert compile_cuda(source, "90a", tmp_path).returncode == 0
    assert compile_cuda(source, "80", tmp_path).returncode != 0
