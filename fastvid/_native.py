"""The native libraries, by ctypes: the one file that loads them, or remembers why not.

Everything fastvid does also works without them, through torch. FASTVID_NATIVE=off leaves them alone;
FASTVID_ISA=generic, v2, v3 or v4 makes the CPU library use a lower instruction set level than the processor's best.
FASTVID_THREADS=own gives it threads of its own; otherwise it works on those of the OpenMP runtime that torch brought.
"""

import ctypes
import functools
import os
import re
import sys
from pathlib import Path

ABI_VERSION = 7  # raised together with kernels/common/abi.cpp whenever a signature below changes

POINTER, SIZE, INT, TEXT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_char_p
FLOAT, DOUBLE = ctypes.c_float, ctypes.c_double

COMPILERS = {"cpu": "a C++20 compiler", "cuda": "the CUDA toolkit (nvcc) and a C++20 compiler"}

SIGNATURES = {
    "cpu": {
        "fastvid_abi_version": (INT, ()),
        "fastvid_cpu_isa": (TEXT, ()),
        "fastvid_cpu_best_isa": (TEXT, ()),
        "fastvid_cpu_use_isa": (INT, (TEXT,)),
        "fastvid_cpu_use_threads_of": (None, (POINTER, POINTER)),  # GOMP_parallel, omp_get_max_threads
        "fastvid_nearest_codebook": (
            INT,
            # x, x_type, stride_xn, codebook, N, K, D
            (POINTER, INT, SIZE, POINTER, SIZE, SIZE, SIZE,
             # indices, quantized, squared_distance, counts, sums, nonfinite, threads, screen, rescored
             POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, INT, INT, POINTER),
        ),
        "fastvid_update_codebook": (
            INT,
            # codebook, cluster_size, cluster_sum, counts, sums, K, D, decay, eps
            (POINTER, POINTER, POINTER, POINTER, POINTER, SIZE, SIZE, DOUBLE, FLOAT,
             # steps, dead_below, restart, restart_size, threads
             POINTER, FLOAT, POINTER, FLOAT, INT),
        ),
        # a SamplerJob of kernels/pixelcnn_sampler/cpu.h; t, y
        "fastvid_sampler_bytes": (SIZE, (POINTER,)),
        "fastvid_sampler_start": (INT, (POINTER,)),
        "fastvid_sampler_row": (INT, (POINTER, SIZE, SIZE)),
        "fastvid_sampler_frame": (INT, (POINTER, SIZE)),
        # samples, B, W, K, seed, stream, t, y, noise
        "fastvid_gumbel_row": (INT, (POINTER, SIZE, SIZE, SIZE, SIZE, SIZE, SIZE, SIZE, POINTER)),
        # a ConvCall, a GateCall, a WeightGradCall of kernels/gated_causal_conv/cpu.h
        "fastvid_gated_causal_conv": (INT, (POINTER,)),
        "fastvid_gate_backward": (INT, (POINTER,)),
        "fastvid_weight_gradient": (INT, (POINTER,)),
        # an AttentionCall, an AttentionGradCall, a SelfAttentionCall of kernels/axial_attention/cpu.h
        "fastvid_axial_attention": (INT, (POINTER,)),
        "fastvid_axial_attention_backward": (INT, (POINTER,)),
        "fastvid_axial_self_attention": (INT, (POINTER,)),
        "fastvid_image_conv": (INT, (POINTER,)),  # an ImageCall of kernels/image_conv/cpu.h
        # a NormCall, a NormGradCall of kernels/spectral_norm/cpu.h
        "fastvid_spectral_norm": (INT, (POINTER,)),
        "fastvid_spectral_norm_backward": (INT, (POINTER,)),
        # a GruCall, a GruGradCall of kernels/conv_gru/cpu.h
        "fastvid_conv_gru": (INT, (POINTER,)),
        "fastvid_conv_gru_backward": (INT, (POINTER,)),
        # a FrameNormCall, a FrameNormGradCall of kernels/conditional_batch_norm/cpu.h
        "fastvid_conditional_norm": (INT, (POINTER,)),
        "fastvid_conditional_norm_backward": (INT, (POINTER,)),
    },
    "cuda": {
        "fastvid_abi_version": (INT, ()),
        "fastvid_cuda_device": (INT, (POINTER, POINTER)),  # processors, shared_bytes
        "fastvid_cuda_error": (TEXT, (INT,)),
        # a Row of kernels/pixelcnn_sampler/cuda_row.h; its size in bytes; CUDA stream
        "fastvid_pixelcnn_row": (INT, (POINTER, SIZE, POINTER)),
    },
}  # fmt: skip


def load(name: str = "cpu") -> ctypes.CDLL | None:
    """The library `name` ("cpu", "cuda") with its functions typed, or None; why_not(name) then says why."""
    return _open(name)[0]


def why_not(name: str = "cpu") -> str | None:
    """Why load(name) gives None, in one line that says what to do; None when the library is there."""
    return _open(name)[1]


@functools.cache
def _open(name: str) -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("FASTVID_NATIVE", "").lower() in ("off", "0"):
        return None, "switched off by FASTVID_NATIVE; unset it to use the native library"
    path = _find(f"libfastvid_{name}.so")
    if path is None:
        return None, f"libfastvid_{name}.so was not built; install {COMPILERS[name]}, then run: pip install -e ."
    try:
        library = ctypes.CDLL(str(path))  # and not PyDLL: other Python threads run while a kernel does
        built = library.fastvid_abi_version()
        if built != ABI_VERSION:
            versions = f"has ABI {built}, this fastvid needs {ABI_VERSION}"
            return None, f"{path.name} {versions}; build it again: pip install -e ."
        _type_functions(library, SIGNATURES[name])
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded ({error}); build it again: pip install -e ."
    if name != "cpu":
        return library, None
    if wrong := _use_isa(library) or _use_threads(library):
        return None, wrong
    return library, None


def threads() -> str:
    """Whose threads the CPU library works on: the file name of an OpenMP runtime, or "own"."""
    runtime = _openmp() if os.environ.get("FASTVID_THREADS", "") != "own" else None
    return Path(runtime._name).name if runtime else "own"


def _use_threads(library: ctypes.CDLL) -> str | None:
    wanted = os.environ.get("FASTVID_THREADS", "")
    if wanted not in ("", "own"):
        return f"FASTVID_THREADS={wanted} is unknown; set it to own, or unset it to share torch's threads"
    runtime = None if wanted else _openmp()
    if runtime:
        entries = runtime.GOMP_parallel, runtime.omp_get_max_threads
        library.fastvid_cpu_use_threads_of(*(ctypes.cast(entry, POINTER) for entry in entries))
    return None


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that is loaded in this process, torch's where there are several; None where there is none."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in lines if re.search(r"/lib(gomp|omp|iomp5)\b[^/]*$", line)}
    for path in sorted(paths, key=lambda path: "/torch/" not in path):
        runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD)  # as it is already; not from wherever a name would lead
        if hasattr(runtime, "GOMP_parallel") and hasattr(runtime, "omp_get_max_threads"):
            return runtime
    return None


def _use_isa(library: ctypes.CDLL) -> str | None:
    wanted = os.environ.get("FASTVID_ISA", "")
    if not wanted:
        return None
    best = library.fastvid_cpu_best_isa().decode()
    outcome = library.fastvid_cpu_use_isa(wanted.encode())
    reasons = {0: None, 2: f"is above this processor's level, which is {best}"}
    reason = reasons.get(outcome, "is no level of this library; the levels are generic and, on x86-64, v2, v3 and v4")
    return reason and f"FASTVID_ISA={wanted} {reason}; unset it to use the best"


def _find(filename: str) -> Path | None:
    # an editable install spreads the package over two folders: sources in the checkout, built files in site-packages
    candidates = (Path(folder) / filename for folder in sys.modules["fastvid"].__path__)
    return next((path for path in candidates if path.is_file()), None)


def _type_functions(library: ctypes.CDLL, signatures: dict) -> None:
    for function, (result, arguments) in signatures.items():
        entry = getattr(library, function)
        entry.restype, entry.argtypes = result, arguments
