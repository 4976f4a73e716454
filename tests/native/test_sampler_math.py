"""The arithmetic of the native sampler, without the library around it: one small program per instruction set level."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
X86 = platform.machine().lower() in ("x86_64", "amd64")
# levels beyond generic by what torch calls the processor, each with those below it
RUNNABLE = {"AVX512": ["v2", "v3", "v4"], "AVX2": ["v2", "v3"], "DEFAULT": ["v2"]}
LEVELS = ["generic", *(RUNNABLE.get(torch.backends.cpu.get_cpu_capability(), []) if X86 else [])]


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler, this machine has none")
@pytest.mark.parametrize("level", LEVELS)
def test_arithmetic_of_the_native_sampler(level, tmp_path):
    program = tmp_path / "sampler_math"
    options = ["-DFASTVID_GENERIC"] if level == "generic" else [f"-march=x86-64-{level}"]
    command = [COMPILER, "-std=c++20", "-O2", "-Wno-psabi", "-ffp-contract=off", *options, f"-DFASTVID_LEVEL={level}",
               f"-I{ROOT / 'kernels'}", str(ROOT / "tests/native/sampler_math.cpp"), "-o", str(program)]  # fmt: skip
    subprocess.run(command, check=True)
    told = subprocess.run([program], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout
    assert "noise: 0 of 2^24 differ" in told.stdout
