"""What is here to work with: versions, native libraries, GPUs, and every op's backends with their reasons."""

import importlib.metadata
import os
import platform

import torch

from fastvid import __version__, _native, laws, ops
from fastvid.models import list_models

PACKAGES = ("torch", "triton", "numpy", "safetensors", "av", "tqdm", "tyro")
VARIABLES = ("FASTVID_BACKEND", "FASTVID_NATIVE", "FASTVID_ISA", "FASTVID_THREADS", "TRITON_INTERPRET")


def findings() -> list[str]:
    """Lines for a person: what was found, and for every op who serves on each device and why the others do not."""
    lines = [
        f"fastvid {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"packages: {', '.join(f'{name} {_version(name)}' for name in PACKAGES)}",
        f"threads: {torch.get_num_threads()} of {os.cpu_count()} processors; native kernels share those of {_shared()}",
        *(f"native {name} library: {_library(name)}" for name in _native.SIGNATURES),
        *(f"GPU: {gpu}" for gpu in _gpus()),
        f"models: {', '.join(list_models()) or 'none'}",
        *(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ),
    ]
    for device in laws.devices():
        lines += ["", f"ops on {device}, asked with a small case:"]
        lines += [_explained(subject, device) for subject in laws.subjects()]
        lines += [f"{', '.join(ops.REFERENCE_ONLY)}\n  reference: serves"]
    return lines


def _shared() -> str:
    whose = _native.threads()
    return "nobody" if whose == "own" else whose


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


def _library(name: str) -> str:
    library = _native.load(name)
    if library is None:
        return f"none: {_native.why_not(name)}"
    isa = ""
    if name == "cpu":
        runs, best = library.fastvid_cpu_isa().decode(), library.fastvid_cpu_best_isa().decode()
        isa = f", runs the level {runs} (this processor's best is {best})"
    return f"{library._name}, ABI {_native.ABI_VERSION}{isa}"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return [f"none that torch {torch.__version__} can use"]
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{c.name}, compute capability {c.major}.{c.minor}, {c.total_memory / 2**30:.0f} GiB" for c in cards]


def _explained(subject, device: str) -> str:
    return ops.OPS[subject.op].explain(*subject.make(subject.cases[0], device, subject.dtypes[0]))
