"""The native library: it is there after an install with a compiler, and every way of lacking it has a reason."""

import ctypes
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastvid
from fastvid import _native

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
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
def test_the_sources_have_the_loaders_abi(folder):
    build(ROOT / "kernels" / "common" / "abi.cpp", folder)
    library = _native.load()
    assert _native.why_not() is None
    assert library.fastvid_abi_version() == _native.ABI_VERSION
    assert library.fastvid_cpu_isa() in (b"x86-64-v4", b"x86-64-v3", b"x86-64-v2", b"generic")


@needs_compiler
def test_another_abi_is_a_reason(folder):
    build(f'extern "C" int fastvid_abi_version() {{ return {_native.ABI_VERSION + 1}; }}\n'
          'extern "C" const char* fastvid_cpu_isa() { return "generic"; }\n', folder)  # fmt: skip
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
