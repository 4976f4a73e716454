"""The native CPU sampler: a job becomes a structure of pointers and sizes, a row or a frame one call."""

import ctypes

import torch
from torch import Tensor

from fastvid import _native
from fastvid.kernels.pixelcnn_sampler.packed import Table
from fastvid.kernels.pixelcnn_sampler.session import Job

MOST_TAPS, MOST_LAYERS, MOST_HEAD_WIDTH = 128, 4096, 1024  # of kernels/pixelcnn_sampler/cpu_model.h
_REASONS = {1: "found no memory", 2: "refused its arguments"}  # enum Outcome of kernels/common/types.h


class _Job(ctypes.Structure):
    """struct SamplerJob of kernels/pixelcnn_sampler/cpu.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "table", "condition", "samples", "given", "draft")),
        *((name, ctypes.c_void_p) for name in ("codes", "logprob", "margin", "passes", "state")),
        *((name, ctypes.c_int64) for name in ("state_bytes", "words", "B", "T", "H", "W")),
        *((name, ctypes.c_int64) for name in ("seed", "stream", "first_step")),
        ("temperature", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("window", "wavefront", "threads")),
    ]


def why_not(weights: Tensor, table: Tensor, condition: Tensor, *_) -> str | None:
    """Why the native sampler cannot serve these arguments of pixelcnn_sample, in a few words; None when it can."""
    if condition.device.type != "cpu":
        return f"takes tensors on the CPU, got {condition.device}"
    known = Table(table)
    taps = max(known.vertical_past, known.vertical_now, known.horizontal_past, known.horizontal_now)
    if taps > MOST_TAPS or known.layers > MOST_LAYERS or known.head_stride > MOST_HEAD_WIDTH:
        return f"holds {MOST_TAPS} taps a convolution, {MOST_LAYERS} layers and heads of {MOST_HEAD_WIDTH} at most"
    return _native.why_not("cpu")


class Session:
    """The caches of one job in native memory, and the calls that draw its rows or frames, on torch's thread count.

    job:    a Job of kernels/pixelcnn_sampler/session.py, whose results are written in place.
    Raises: ValueError for a model or a job beyond what the kernel can hold; MemoryError when there is no memory for
            the caches.
    """

    def __init__(self, job: Job):
        self._library = _native.load("cpu")
        # packed bytes may start anywhere in their storage, the kernel reads whole cache lines
        self._inputs = [_aligned(job.packed.weights), job.packed.table.contiguous(), job.condition.contiguous()]
        self._inputs += [None if x is None else x.contiguous() for x in (job.samples, job.given, job.draft)]
        self._results = [job.codes, job.logprob, job.margin, job.passes]
        pointers = [None if x is None else x.data_ptr() for x in self._inputs + self._results]
        self._job = _Job(
            *pointers, None, 0, job.packed.table.numel(), *job.grid, _signed(job.seed), job.stream, job.first_step,
            job.temperature, job.window, job.wavefront, torch.get_num_threads(),
        )  # fmt: skip
        wanted = self._library.fastvid_sampler_bytes(ctypes.byref(self._job))
        if wanted < 0:
            raise ValueError(f"pixelcnn_sample: beyond the native kernel, see {_MODEL}; pass backend='reference'.")
        self._state = _memory(wanted, job)
        self._job.state, self._job.state_bytes = self._state.data_ptr(), wanted
        self._check(self._library.fastvid_sampler_start(ctypes.byref(self._job)))

    def row(self, t: int, y: int) -> None:
        """Draw row y of frame t."""
        self._check(self._library.fastvid_sampler_row(ctypes.byref(self._job), t, y))

    def frame(self, t: int) -> None:
        """Draw frame t along its anti-diagonals."""
        self._check(self._library.fastvid_sampler_frame(ctypes.byref(self._job), t))

    def _check(self, outcome: int) -> None:
        if outcome:
            raise RuntimeError(f"pixelcnn_sample: the native kernel {_REASONS[outcome]}; report this.")


_MODEL = "kernels/pixelcnn_sampler/cpu_model.h"


def _aligned(weights: Tensor) -> Tensor:
    weights = weights.contiguous()
    return weights if weights.data_ptr() % 64 == 0 else weights.clone()


def _memory(size: int, job: Job) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:
        raise MemoryError(
            f"pixelcnn_sample: no memory for {size >> 20} MB of caches of a grid {list(job.grid)}; draw fewer samples."
        ) from error


def _signed(seed: int) -> int:
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
