"""Which configuration of a Triton kernel is fastest on this device: every one timed, the winner kept in tuned.json.

A room that can be tuned has in its triton_gpu.py `tunable`, the configurations to try with the default first, and
`bucket`, the key that sizes share. Sizes come from the room's cases.py, where the benchmark's are too; a bucket is
decided by its largest. A configuration whose result is not the default's is refused, however fast. The file is written
anew after every bucket, so that an interrupt costs one. What differs between rooms is in their jobs: see ROOMS.
"""

import importlib
import importlib.util
import json
import math
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

PRECISIONS = ("exact", "bf16")  # one for each kind of kernel
LEAST_WORK = 1 << 24  # products; below, a call is over before a configuration can matter
WARM_UP, RUNS = 3, 15
SCANNED = 4  # frames of a scan

Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Job:
    """One bucket of the lookup: the largest of its sizes, and the precision that stands for its kind of kernel.

    Every room's job has key, case, work and the four methods.
    """

    key: str
    case: Any
    precision: str

    @property
    def work(self) -> int:
        """Products of a call."""
        return self.case.N * self.case.K * self.case.D

    def make(self, device: str) -> tuple:
        """Fresh arguments of a call."""
        # rows in half precision where the products are: the bytes are part of the time
        return self.case.make(device, torch.float32 if self.precision == "exact" else torch.bfloat16)

    def configs(self, kernels: ModuleType, args: tuple) -> list[dict[str, int]]:
        """What to time, the default first."""
        return kernels.tunable(*args, self.precision)

    def run(self, kernels: ModuleType, args: tuple, config: dict[str, int]) -> Any:
        """One call."""
        return kernels.nearest_codebook(*args, True, self.precision, config=config)

    def judge(self, default: Any, result: Any, args: tuple) -> None:
        """Raise GateError unless a result is as good as the default's."""
        judge_against(default, result, *args, self.precision)


@dataclass(frozen=True)
class ConvJob:
    """One bucket of the gated convolution. kind: "gate" and "plain" forward, "grad_x", "weight"; see Job."""

    key: str
    case: Any
    kind: str
    dtype: torch.dtype

    @property
    def work(self) -> int:
        return self.case.work

    def make(self, device: str) -> tuple:
        """Positional arguments of the room's launcher."""
        x, weight, bias, taps, addend, residual, activation, origin, size, keep = self.case.make(device, self.dtype)
        flat, origin, size = [offset for tap in taps for offset in tap], [*origin], [*(size or x.shape[1:4])]
        grad = torch.randn(*self.case.outputs, weight.shape[2], device=device, dtype=self.dtype)
        if self.kind == "weight":
            return x, grad, len(taps), flat, origin
        if self.kind == "grad_x":
            back, start = [-offset for offset in flat], [-o for o in origin]
            return grad, weight.transpose(1, 2), None, back, None, None, "none", start, [*x.shape[1:4]], False
        return x, weight, bias, flat, addend, residual, activation, origin, size, keep

    def configs(self, kernels: ModuleType, args: tuple) -> list[dict[str, int]]:
        kind = "plain" if self.kind == "grad_x" else self.kind
        return kernels.tunable(kind, args[0], args[1].shape[-1])

    def run(self, kernels: ModuleType, args: tuple, config: dict[str, int]) -> tuple[Tensor, ...]:
        if self.kind == "weight":
            return (kernels.weight_gradient(*args, config),)
        return kernels.gated_causal_conv(*args, config)

    def judge(self, default: tuple[Tensor, ...], result: tuple[Tensor, ...], args: tuple) -> None:
        """Two sums of the same products in different orders."""
        grid, inputs = self.case.outputs, self.case.channels[self.kind == "grad_x"]
        near_enough(default, result, math.prod(grid) if self.kind == "weight" else len(self.case.taps) * inputs)


@dataclass(frozen=True)
class AttentionJob:
    """One bucket of attention inside boxes: a kind of kernel, forward or of the gradients; see Job."""

    key: str
    case: Any
    kind: str
    dtype: torch.dtype

    @property
    def work(self) -> int:
        return self.case.work

    @property
    def gradient(self) -> bool:
        return self.kind in ("box", "queries", "keys", "bias")

    def make(self, device: str) -> tuple:
        """Positional arguments of the room's launcher."""
        if self.gradient:
            return self.case.make_backward(device, self.dtype)
        q, k, v, _, box, mask, bias, _, _ = self.case.make(device, self.dtype)
        return q, k, v, bias, [*box], mask, q.shape[-1] ** -0.5, False

    def configs(self, kernels: ModuleType, args: tuple) -> list[dict[str, int]]:
        box = args[8 if self.gradient else 4]
        return next((fits for kind, _, fits in kernels.tunable(*args[:4], box, self.gradient) if kind == self.kind), [])

    def run(self, kernels: ModuleType, args: tuple, config: dict[str, int]) -> tuple[Tensor, ...]:
        if self.gradient:
            return kernels.axial_attention_backward(*args, {self.kind: config})
        return kernels.axial_attention(*args, config)

    def judge(self, default: tuple[Tensor, ...], result: tuple[Tensor, ...], args: tuple) -> None:
        """Sums of the same products in different orders; those of a box's keys, of a bias those of all its boxes."""
        n, m = self.case.scores
        boxes = math.prod(self.case.grid) // n
        near_enough(default, result, max(n, m) * (boxes if self.kind == "bias" else 1))


@dataclass(frozen=True)
class ScanJob:
    """One bucket of the convolutional GRU, timed over a few frames: its config serves both directions; see Job."""

    key: str
    case: Any
    dtype: torch.dtype

    @property
    def work(self) -> int:
        return self.case.work

    def make(self, device: str) -> tuple:
        """Positional arguments of the room's launcher; the first frame has no state before it and is no measure."""
        gates, hidden, *weights, steps, activation, keep = self.case.make(device, self.dtype)
        steps = min(steps, SCANNED)
        return gates[:, :steps], hidden, *weights, steps, activation, keep

    def configs(self, kernels: ModuleType, args: tuple) -> list[dict[str, int]]:
        return kernels.tunable(args[0][..., : self.case.channels])

    def run(self, kernels: ModuleType, args: tuple, config: dict[str, int]) -> tuple[Tensor, ...]:
        return kernels.conv_gru(*args, config)

    def judge(self, default: tuple[Tensor, ...], result: tuple[Tensor, ...], args: tuple) -> None:
        """Sums of the same products in different orders, frame upon frame."""
        near_enough(default, result, args[4] * args[2][0].numel())


def near_enough(default: tuple[Tensor, ...], result: tuple[Tensor, ...], terms: int) -> None:
    """Raise GateError unless both are sums of the same `terms` products, each rounded to its dtype."""
    for one, other in zip(default, result, strict=True):
        if one.numel():
            roundings = torch.finfo(one.dtype).eps + torch.finfo(torch.float32).eps * terms**0.5
            far = ((other - one).abs().max() / one.abs().max()).item() / roundings
            if not far <= ROUNDINGS:  # written so that NaN fails
                raise GateError(f"{far:.3g} roundings from the default's result")


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
    for room, jobs_of_room in ROOMS.items():
        cases, kernels = (importlib.import_module(f"fastvid.kernels.{room}.{part}") for part in ("cases", "triton_gpu"))
        jobs = jobs_of_room(cases, kernels)
        wrong += tune_room(kernels, jobs, torch.cuda.get_device_name(), "cuda", device_seconds, tell)
    return 1 if wrong else 0


def jobs_of(cases: ModuleType, kernels: ModuleType) -> list[Job]:
    """What to tune for the lookup, most work first."""
    sizes = [*cases.ALL, *getattr(cases, "LARGE", [])]
    return largest([Job(kernels.bucket(case.D, case.K, p), case, p) for case in sizes for p in PRECISIONS])


def conv_jobs(cases: ModuleType, kernels: ModuleType) -> list[ConvJob]:
    """What to tune for the gated convolution, most work first: forward and both large gradients."""
    jobs = []
    for case in [*cases.ALL, *cases.LARGE]:
        (Cin, Cout), forward = case.channels, "plain" if case.activation == "none" else "gate"
        for dtype in (torch.bfloat16, torch.float32):
            jobs += [
                ConvJob(kernels.bucket(forward, dtype, Cin, Cout), case, forward, dtype),
                ConvJob(kernels.bucket("plain", dtype, Cout, Cin), case, "grad_x", dtype),
                ConvJob(kernels.bucket("weight", dtype, Cin, Cout), case, "weight", dtype),
            ]
    return largest(jobs)


def attention_jobs(cases: ModuleType, kernels: ModuleType) -> list[AttentionJob]:
    """What to tune for attention inside boxes, most work first: each kernel that some size takes."""
    jobs = []
    for case in [*cases.ALL, *cases.LARGE]:
        for dtype in (torch.bfloat16, torch.float32):
            q, k, v, _, box, _, bias, _, _ = case.make("meta", dtype)
            for gradient in (False, True):
                for kind, key, _ in kernels.tunable(q, k, v, bias, [*box], gradient):
                    jobs.append(AttentionJob(key, case, kind, dtype))
    return largest(jobs)


def scan_jobs(cases: ModuleType, kernels: ModuleType) -> list[ScanJob]:
    """What to tune for the convolutional GRU, most work first."""
    jobs = []
    for case in [*cases.ALL, *cases.LARGE]:
        B, _, H, W = case.grid
        for dtype in (torch.bfloat16, torch.float32):
            jobs.append(ScanJob(kernels.bucket(dtype, B * H * W, case.channels), case, dtype))
    return largest(jobs)


ROOMS = {"nearest_codebook": jobs_of, "gated_causal_conv": conv_jobs, "axial_attention": attention_jobs,
         "conv_gru": scan_jobs}  # fmt: skip


def largest(jobs: list[Any]) -> list[Any]:
    """The largest job of each key that is worth it, most work first."""
    jobs = sorted((job for job in jobs if job.work >= LEAST_WORK), key=lambda job: job.work)
    return list({job.key: job for job in jobs}.values())[::-1]  # the last of a key wins


def tune_room(
    kernels: ModuleType, jobs: list[Job], name: str, device: str, timer: Timer, tell: Callable[[str], None]
) -> int:
    """Time every configuration of every job and write the winners to the room's tuned.json.

    name: the device's, the key in the file. Returns how many configurations gave a wrong result or none.
    """
    wrong = 0
    for job in jobs:
        found: list[tuple[float, dict[str, int]]] = []
        for config, seconds, why in timed(kernels, job, job.make(device), timer):
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
    kernels: ModuleType, job: Any, args: tuple, timer: Timer
) -> Iterator[tuple[dict[str, int], float, str | None]]:
    """Each configuration with its seconds, or with why it is refused."""
    default = None
    for config in job.configs(kernels, args):
        try:
            result = job.run(kernels, args, config)
            default = default or result
            job.judge(default, result, args)
        except GateError as error:
            yield config, float("nan"), str(error)
        except Exception as error:  # too large for the chip, or not to be compiled: the others are still to be tried
            yield config, float("nan"), f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
        else:
            yield config, timer(lambda config=config: job.run(kernels, args, config)), None


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
