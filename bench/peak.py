"""What this machine can do at its best: the rates that floors are counted with, measured and never looked up.

A floor divides the operations or bytes that a job cannot do without by such a rate. On a CPU the rate is that of bare
multiply-adds in registers (peak.c): a library's matrix product may be slow on somebody else's processor. A job whose
answer is a choice may be screened in int16, so its rate is that of int16 where that is faster. Bytes that no cache can
keep count at the rate of reading an array many times the size of the caches. On a GPU operations count at the rate of
the best of a few large bfloat16 matrix products, bytes at that of a copy within the device.
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
from typing import Any

from timing import seconds_of

SOURCE = Path(__file__).with_name("peak.c")
STEPS = 2_000_000
PRODUCT_SIZES = (512, 1024, 2048)
READ_BYTES = 1 << 28  # a thread's part of what is read: 256 MiB, several times any cache
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")


def cpu_rate(threads: int, narrow: bool = False) -> tuple[float, str]:
    """Operations a second on this many threads, and what was measured: multiply-adds of float32 (narrow: or of int16,
    if faster); without a compiler the best float32 matrix product."""
    probe = _probe()
    if probe is None:
        return max(_product_rate("cpu", size, "float32") for size in PRODUCT_SIZES), "float32 matrix product"
    kinds = {"float32 multiply-adds": probe.fma_steps} | ({"int16 multiply-adds": probe.madd_steps} if narrow else {})
    return max((max(_steps_rate(steps, threads) for _ in range(20)), what) for what, steps in kinds.items())


def read_rate(threads: int) -> tuple[float, str]:
    """Bytes a second that this many threads read from memory, each its own part, and what was measured."""
    import torch

    probe, parts = _probe(), [torch.ones(READ_BYTES // 4) for _ in range(threads)]
    if probe is None:
        return threads * READ_BYTES / min(_together([lambda: [part.sum() for part in parts]]) for _ in range(7)), "sums"
    sinks = [ctypes.c_float() for _ in parts]
    works = [
        functools.partial(probe.read_all, part.data_ptr(), READ_BYTES, ctypes.byref(sink))
        for part, sink in zip(parts, sinks, strict=True)
    ]
    return threads * READ_BYTES / min(_together(works) for _ in range(7)), "streaming reads"


def floor(
    operations: float, bytes_moved: float, device: str, threads: int, narrow: bool = False, streamed: bool = False
) -> tuple[float, str]:
    """Seconds that a job cannot do without on this machine, and how they were counted.

    streamed: on a CPU the bytes count too, as those of a job that no cache can hold.
    """
    if device == "cpu":
        rate, what = cpu_rate(threads, narrow)
        least, told = operations / rate, f"{operations / 1e9:.3g} G operations at {rate / 1e9:.3g} G/s of {what}"
        if not streamed:
            return least, told
        bandwidth, how = read_rate(threads)
        told += f", {bytes_moved / 1e9:.3g} GB at {bandwidth / 1e9:.3g} GB/s of {how}"
        return max(least, bytes_moved / bandwidth), told
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
    loaded.read_all.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.POINTER(ctypes.c_float))
    loaded.read_all.restype = None
    return loaded


def _steps_rate(steps: Callable, threads: int) -> float:
    operations = steps(1, ctypes.byref(ctypes.c_float())) * STEPS
    return threads * operations / _together([lambda: steps(STEPS, ctypes.byref(ctypes.c_float()))] * threads)


def _together(works: list[Callable[[], Any]]) -> float:
    """Seconds until all are done, each in a thread of its own."""
    crew = [threading.Thread(target=work) for work in works]
    start = time.perf_counter()
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    return time.perf_counter() - start


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
