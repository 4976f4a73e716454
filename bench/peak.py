"""What this machine can do at its best: the rates that floors are counted with, measured and never looked up.

A floor divides the operations or bytes that a job cannot do without by such a rate. On a CPU the rate is that of bare
multiply-adds in registers (peak.c): a library's matrix product may be slow on somebody else's processor. A job whose
answer is a choice may be screened in int16, so its rate is that of int16 where that is faster. On a GPU it is the best
of a few large bfloat16 matrix products for operations, and a copy within the device for bytes.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from timing import seconds_of

SOURCE = Path(__file__).with_name("peak.c")
STEPS = 2_000_000
PRODUCT_SIZES = (512, 1024, 2048)
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")


def cpu_rate(threads: int, narrow: bool = False) -> tuple[float, str]:
    """Operations a second on this many threads, and what was measured: multiply-adds of float32 (narrow: or of int16,
    if faster); without a compiler the best float32 matrix product."""
    probe = _probe()
    if probe is None:
        return max(_product_rate("cpu", size, "float32") for size in PRODUCT_SIZES), "float32 matrix product"
    kinds = {"float32 multiply-adds": probe.fma_steps} | ({"int16 multiply-adds": probe.madd_steps} if narrow else {})
    return max((max(_steps_rate(steps, threads) for _ in range(20)), what) for what, steps in kinds.items())


def floor(
    operations: float, bytes_moved: float, device: str, threads: int, narrow: bool = False
) -> tuple[float, str]:
    """Seconds that a job cannot do without on this machine, and how they were counted."""
    if device == "cpu":
        rate, what = cpu_rate(threads, narrow)
        return operations / rate, f"{operations / 1e9:.3g} G operations at {rate / 1e9:.3g} G/s of {what}"
    rate = max(_product_rate(device, size, "bfloat16") for size in (4096, 8192))
    bandwidth = _copy_rate(device)
    told = f"{operations / 1e9:.3g} G operations at {rate / 1e12:.3g} T/s of bfloat16 matrix product, "
    told += f"{bytes_moved / 1e6:.3g} MB at {bandwidth / 1e12:.3g} TB/s of copy"
    return max(operations / rate, bytes_moved / bandwidth), told


@functools.cache
def _probe() -> ctypes.CDLL | None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(prefix="fastvid-bench-") as folder:
        library = Path(folder) / "peak.so"
        told = subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(library)], capture_output=True, text=True)
        if told.returncode != 0:
            return None
        loaded = ctypes.CDLL(str(library))
    for steps in (loaded.fma_steps, loaded.madd_steps):
        steps.argtypes, steps.restype = (ctypes.c_long, ctypes.POINTER(ctypes.c_float)), ctypes.c_int
    return loaded


def _steps_rate(steps: Callable, threads: int) -> float:
    operations = steps(1, ctypes.byref(ctypes.c_float())) * STEPS
    crew = [threading.Thread(target=steps, args=(STEPS, ctypes.byref(ctypes.c_float()))) for _ in range(threads)]
    start = time.perf_counter()
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    return threads * operations / (time.perf_counter() - start)


def _product_rate(device: str, size: int, dtype: str) -> float:
    import torch

    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    seconds_of(lambda: a @ b, device)
    return 2.0 * size**3 / min(seconds_of(lambda: a @ b, device) for _ in range(20))


def _copy_rate(device: str) -> float:
    import torch

    source = torch.randn(1 << 28, device=device)  # 1 GiB: no cache holds it
    target = torch.empty_like(source)
    target.copy_(source)
    return 2.0 * source.nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(20))
