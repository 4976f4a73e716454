"""Which configuration of a Triton kernel is fastest on this device: every one timed, the winner kept in tuned.json.

A room that can be tuned has in its triton_gpu.py `tunable(x, codebook, precision)`, the configurations to try with the
default first, and `bucket(D, K, precision)`, the key that sizes share. Sizes come from the room's cases.py, where the
benchmark's are too; a bucket is decided by its largest. A configuration whose result is not the default's is refused,
however fast. The file is written anew after every bucket, so that an interrupt costs one.
"""

import importlib
import importlib.util
import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from timing import GateError
from torch import Tensor
from vq_cases import ROUNDING, ROUNDINGS, judge
from vq_peers import Step

ROOMS = ("nearest_codebook",)
PRECISIONS = ("exact", "bf16")  # one for each kind of kernel
LEAST_WORK = 1 << 24  # products; below, a call is over before a configuration can matter
WARM_UP, RUNS = 3, 15

Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Job:
    """One bucket: the largest of its sizes, and the precision that stands for its kind of kernel."""

    key: str
    case: Any
    precision: str

    @property
    def work(self) -> int:
        """Products of a call."""
        return self.case.N * self.case.K * self.case.D


def cannot_tune() -> str | None:
    """Why there is nothing to tune on this machine; None where there is."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run: pip install triton"
    return None


def tune(tell: Callable[[str], None]) -> int:
    """Tune every room for this device. Returns the exit code: 1 if a configuration gave a wrong result."""
    if reason := cannot_tune():
        tell(f"tune: nothing to tune on this machine: {reason}.")
        return 0
    wrong = 0
    for room in ROOMS:
        cases, kernels = (importlib.import_module(f"fastvid.kernels.{room}.{part}") for part in ("cases", "triton_gpu"))
        jobs = jobs_of(cases, kernels)
        wrong += tune_room(kernels, jobs, torch.cuda.get_device_name(), "cuda", device_seconds, tell)
    return 1 if wrong else 0


def jobs_of(cases: ModuleType, kernels: ModuleType) -> list[Job]:
    """What to tune for a room, most work first."""
    sizes = [*cases.ALL, *getattr(cases, "LARGE", [])]
    jobs = [Job(kernels.bucket(case.D, case.K, p), case, p) for case in sizes for p in PRECISIONS]
    jobs = sorted((job for job in jobs if job.work >= LEAST_WORK), key=lambda job: job.work)
    return list({job.key: job for job in jobs}.values())[::-1]  # the last of a key wins: the largest


def tune_room(
    kernels: ModuleType, jobs: list[Job], name: str, device: str, timer: Timer, tell: Callable[[str], None]
) -> int:
    """Time every configuration of every job and write the winners to the room's tuned.json.

    name: the device's, the key in the file. Returns how many configurations gave a wrong result or none.
    """
    wrong = 0
    for job in jobs:
        # rows in half precision where the products are: the bytes are part of the time
        x, codebook = job.case.make(device, torch.float32 if job.precision == "exact" else torch.bfloat16)
        found: list[tuple[float, dict[str, int]]] = []
        for config, seconds, why in timed(kernels, x, codebook, job.precision, timer):
            if why:
                wrong += 1
                tell(f"tune: {job.key}: {config}: refused: {why}")
            else:
                found.append((seconds, config))
        if not found:
            continue
        best, config = min(found, key=lambda one: one[0])
        tell(f"tune: {job.key} ({job.case}): {config}: {best * 1e6:.1f} us, default {found[0][0] * 1e6:.1f} us")
        keep(kernels.TUNED, name, job.key, config)
    return wrong


def timed(
    kernels: ModuleType, x: Tensor, codebook: Tensor, precision: str, timer: Timer
) -> Iterator[tuple[dict[str, int], float, str | None]]:
    """Each configuration with its seconds, or with why it is refused."""
    default = None
    for config in kernels.tunable(x, codebook, precision):
        try:
            result = kernels.nearest_codebook(x, codebook, True, precision, config=config)
            default = default or result
            judge_against(default, result, x, codebook, precision)
        except GateError as error:
            yield config, float("nan"), str(error)
        except Exception as error:  # too large for the chip, or not to be compiled: the others are still to be tried
            yield config, float("nan"), f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
        else:
            run = lambda config=config: kernels.nearest_codebook(x, codebook, True, precision, config=config)  # noqa: E731
            yield config, timer(run), None


def judge_against(default: tuple[Tensor, ...], result: tuple[Tensor, ...], x: Tensor, codebook: Tensor, precision: str):
    """Raise GateError unless a result is as good as the default's: choices as near, statistics those of its choices."""
    indices, quantized, distance, counts, sums = result[:5]
    rounding = ROUNDING["float32" if precision == "exact" else "bfloat16"]
    scale = (x.float().norm(dim=1) + codebook.norm(dim=1).max()).square()  # [N]
    farther = ((distance - default[2]) / scale).max().item() / rounding
    if not farther <= ROUNDINGS:
        raise GateError(f"chose a code {farther:.3g} roundings beyond the default's")
    if not torch.equal(quantized, codebook[indices].to(x.dtype)):
        raise GateError("quantized rows are not its choices")
    judge("it", Step(indices, counts, sums), x, codebook)


def device_seconds(run: Callable[[], Any]) -> float:
    """Median seconds of a call on the GPU, by its own clock."""
    for _ in range(WARM_UP):
        run()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks) * 1e-3


def keep(path: Path, name: str, key: str, config: dict[str, int]) -> None:
    """Put one configuration into a room's tuned.json: written beside it, then renamed."""
    tuned = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    tuned.setdefault(name, {})[key] = config
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(tuned, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(new, path)
