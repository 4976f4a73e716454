"""The native library: it is there after an install with a compiler, and every way of lacking it has a reason."""

import ctypes
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvid
from fastvid import _native

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
LEVELS = ["generic", "v2", "v3", "v4"]  # in rising order
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler, this machine has none")


def installed() -> bool:
    try:
        return importlib.metadata.version("fastvid-torch") == fastvid.__version__
    except importlib.metadata.PackageNotFoundError:
        return False


def build(source: str | Path, folder: Path) -> Path:
    """One source, as text or as a file, compiled into the library that fastvid looks for, in `folder`."""
    if isinstance(source, str):
        (folder / "source.cpp").write_text(source)
        source = folder / "source.cpp"
    library = folder / "libfastvid_cpu.so"
    subprocess.run([COMPILER, "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder in which alone fastvid looks for its library, with nothing remembered before or after."""
    monkeypatch.setattr(fastvid, "__path__", [str(tmp_path)])
    monkeypatch.delenv("FASTVID_NATIVE", raising=False)
    _native._open.cache_clear()
    yield tmp_path
    _native._open.cache_clear()


@pytest.mark.skipif(not installed(), reason="needs an installed fastvid, this is a bare checkout")
@needs_compiler
def test_an_install_with_a_compiler_has_the_library():
    assert _native.why_not() is None
    assert isinstance(_native.load(), ctypes.CDLL)


@needs_compiler
def test_another_abi_is_a_reason(folder):
    build(f'extern "C" int fastvid_abi_version() {{ return {_native.ABI_VERSION + 1}; }}\n', folder)
    assert _native.load() is None
    assert f"has ABI {_native.ABI_VERSION + 1}, this fastvid needs {_native.ABI_VERSION}" in _native.why_not()


@needs_compiler
def test_a_missing_function_is_a_reason(folder):
    build(f'extern "C" int fastvid_abi_version() {{ return {_native.ABI_VERSION}; }}\n', folder)
    assert _native.load() is None
    assert "fastvid_cpu_isa" in _native.why_not()


def test_no_library_is_a_reason(folder):
    assert _native.load() is None
    assert "was not built" in _native.why_not()


def test_a_damaged_library_is_a_reason(folder):
    (folder / "libfastvid_cpu.so").write_bytes(b"\x7fELF, or so it says")
    assert _native.load() is None
    assert "cannot be loaded" in _native.why_not()


def test_switched_off():
    asked = "from fastvid import _native; print(_native.load(), _native.why_not())"
    environment = {"FASTVID_NATIVE": "off", "PYTHONPATH": str(Path(fastvid.__file__).parents[1])}
    told = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.startswith("None switched off by FASTVID_NATIVE")


@pytest.fixture
def library() -> ctypes.CDLL:
    """The library of this installation, back at the processor's best level afterwards."""
    library = _native.load()
    if library is None:
        pytest.skip(f"needs the native library: {_native.why_not()}")
    yield library
    library.fastvid_cpu_use_isa(library.fastvid_cpu_best_isa())


def python(script: str, **environment: str) -> str:
    """What a fresh Python with these environment variables prints."""
    paths = {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path(fastvid.__file__).parents[1])}
    environment = {**os.environ, **paths, **environment}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    return told.stdout.strip()


def test_other_python_threads_run_while_a_kernel_does(library):
    assert isinstance(library, ctypes.CDLL) and not isinstance(library, ctypes.PyDLL)


def test_the_best_level_is_the_default(library):
    best = library.fastvid_cpu_best_isa()
    assert best.decode() in LEVELS
    asked = "from fastvid import _native; print(_native.load().fastvid_cpu_isa().decode())"
    assert python(asked, FASTVID_ISA="") == best.decode()


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_can_be_forced_or_says_why_not(library, level):
    asked = """
from fastvid import _native
library = _native.load()
print(library.fastvid_cpu_isa().decode() if library else _native.why_not())
"""
    told = python(asked, FASTVID_ISA=level)
    best = library.fastvid_cpu_best_isa().decode()
    if LEVELS.index(level) <= LEVELS.index(best):
        assert told == level
    elif best == "generic":  # another processor family, whose library has one level
        assert f"FASTVID_ISA={level} is no level of this library" in told
    else:
        assert f"FASTVID_ISA={level} is above this processor's level, which is {best}" in told


def test_an_unknown_level_is_a_reason(library):
    told = python("from fastvid import _native; print(_native.load(), _native.why_not())", FASTVID_ISA="v9")
    assert told.startswith("None FASTVID_ISA=v9 is no level of this library")


def test_levels_change_while_running(library):
    best = library.fastvid_cpu_best_isa()
    assert library.fastvid_cpu_use_isa(b"generic") == 0 and library.fastvid_cpu_isa() == b"generic"
    assert library.fastvid_cpu_use_isa(b"nonsense") == 1 and library.fastvid_cpu_isa() == b"generic"
    assert library.fastvid_cpu_use_isa(best) == 0 and library.fastvid_cpu_isa() == best


def test_bad_arguments_have_an_outcome_and_no_crash(library):
    assert library.fastvid_nearest_codebook(*(None, 0, 1, None, 0, 0, 4), *[None] * 6, 1, 0, None) == 2  # K = 0
    assert library.fastvid_nearest_codebook(*(None, 7, 1, None, 0, 1, 4), *[None] * 6, 1, 0, None) == 2  # dtype 7


def test_the_thread_pool_works_in_a_forked_child(library):
    told = python("""
import os
import torch
from fastvid.ops import _cpu
x, codebook = torch.randn(3000, 8), torch.randn(40, 8)
before = _cpu.nearest_codebook(x, codebook)
child = os.fork()
if child == 0:
    after = _cpu.nearest_codebook(x, codebook)
    os._exit(0 if all(torch.equal(a, b) for a, b in zip(before, after)) else 3)
_, status = os.waitpid(child, 0)
again = _cpu.nearest_codebook(x, codebook)
print(os.waitstatus_to_exitcode(status), all(torch.equal(a, b) for a, b in zip(before, again)))
""")
    assert told == "0 True"


WHOSE_THREADS = """
import torch
from fastvid import _native
from fastvid.ops import _cpu
generator = torch.Generator().manual_seed(0)
near = _cpu.nearest_codebook(torch.randn(3000, 8, generator=generator), torch.randn(40, 8, generator=generator))
print(_native.threads(), float(near[4].sum()).hex(), int(near[0].sum()))
"""


def test_the_kernels_work_on_torchs_threads_or_on_their_own(library):
    shared, *bits = python(WHOSE_THREADS, FASTVID_THREADS="").split()
    own, *same = python(WHOSE_THREADS, FASTVID_THREADS="own").split()
    assert bits == same and own == "own"
    if "OpenMP" in torch.__config__.parallel_info():
        assert re.search("lib(gomp|omp|iomp5)", shared)


def test_unknown_threads_are_a_reason(library):
    asked = "from fastvid import _native; print(_native.load(), _native.why_not())"
    assert python(asked, FASTVID_THREADS="mine").startswith("None FASTVID_THREADS=mine is unknown")


def test_python_threads_may_call_at_once(library):
    told = python("""
import threading
import torch
from fastvid.ops import _cpu
inputs = [(torch.randn(2000, 8), torch.randn(50, 8)) for _ in range(4)]
alone = [_cpu.nearest_codebook(*one) for one in inputs]
start, wrong = threading.Barrier(4), []
def work(i):
    start.wait()
    for _ in range(30):
        if not all(torch.equal(a, b) for a, b in zip(alone[i], _cpu.nearest_codebook(*inputs[i]))):
            wrong.append(i)
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(wrong)
""")
    assert told == "[]"
