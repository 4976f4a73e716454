"""The `cuda` backend of pixelcnn_sample: one launch of a persistent kernel draws a row of codes for all samples."""

import ctypes

import torch
from torch import Tensor

from fastvid import _native
from fastvid.kernels.pixelcnn_sampler.cuda_rows import Dense, lay_out, most_strips
from fastvid.kernels.pixelcnn_sampler.packed import Table
from fastvid.kernels.pixelcnn_sampler.session import Job
from fastvid.ops.conv import gated_causal_conv

CHUNK = 256  # keys that one CTA attends to; part of what decides the rounding
PATIENCE = 2.0  # seconds after which a launch that still waits gives up; a row takes milliseconds
SUMMARY = 6  # numbers that a strip of classes says about a draw
MOST_THREADS = 256

_SIZES = (
    "B T H W K C L A E taps weight_type axial t y ctas threads chunk tag patience seed stream step code_stride"
    " plane_layer plane_sample task_count weight_bytes resident_tasks resident_bytes shared_bytes"
)
_POINTERS = (
    "samples weights tasks host_tasks attention strip_scale start table table_stride base out_bias qkv_bias"
    " qkv_position att_bias head_bias cache plane given codes logprob margin streams gated attended qkv parts hidden"
    " summaries trouble"
)


class Row(ctypes.Structure):
    """What a launch is given: Row of kernels/pixelcnn_sampler/cuda_row.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES.split()),
        ("temperature", ctypes.c_double),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int64 if name == "table_stride" else ctypes.c_void_p) for name in _POINTERS.split()),
    ]


def why_not(weights: Tensor, table: Tensor, condition: Tensor, *_) -> str | None:
    """Why the kernel cannot serve these arguments of pixelcnn_sample, None where it can."""
    if not condition.is_cuda:
        return f"needs CUDA tensors, got {condition.device.type}"
    if torch.cuda.get_device_capability(condition.device) < (8, 0):
        return "needs compute capability 8.0 or newer"
    return _lacking(Table(table)) or _native.why_not("cuda")


def unasked(*_) -> str:
    """Why the kernel serves only when it is asked for."""
    return "has not been verified on a GPU; ask for it with backend='cuda'"


def _convolve(*args) -> tuple[Tensor, Tensor]:
    return gated_causal_conv.best(*args).run(*args)


def _lacking(table: Table) -> str | None:
    taps, now = table.taps, range(1 - table.horizontal_now, 1)
    layers = tuple((0, 0, dx) for dx in now)
    if not table.layers or taps.horizontal[table.horizontal_past :] != layers:
        return "takes layers whose horizontal taps of the present frame are neighbours, the last one the code itself"
    if taps.input_horizontal[table.input_horizontal_past :] != layers[:-1]:
        return "takes an input layer that sees as many codes to the left as the other layers"
    return None


class Session:
    """Caches and exchange buffers of one job; `row` draws a row of it.

    library, ctas, chunk: for tests: another library with the kernel's interface, and other ways to divide the work.
    Raises RuntimeError where a launch fails or a row was given up.
    """

    def __init__(self, job: Job, library: ctypes.CDLL | None = None, ctas: int = 0, chunk: int = CHUNK):
        self.job, self.launches = job, 0
        self.library = library or _native.load("cuda")
        self.kept: dict[str, Tensor] = {}  # what the kernel reads and writes, by the field that points to it
        with torch.cuda.device(job.condition.device) if job.condition.is_cuda else torch.device("cpu"):
            processors, shared = ctypes.c_int64(), ctypes.c_int64()
            self._check(self.library.fastvid_cuda_device(ctypes.byref(processors), ctypes.byref(shared)))
        self.ctas = ctas or min(processors.value, max(most_strips(job.table), len(job.samples) * job.table.heads))
        self.dense = Dense(job, _convolve)
        self.fields = Row(**self._sizes(chunk))
        self._give_weights()
        self._give_caches(chunk)
        for name, tensor in self.kept.items():
            setattr(self.fields, name, tensor.data_ptr())

    @torch.no_grad()
    def row(self, t: int, y: int) -> None:
        """Draw row y of frame t, one code after the other; `window`, `order` and `draft` are not used."""
        job, fields, (_, _, H, W) = self.job, self.fields, self.job.grid
        self.dense.row(t, y)
        if (self.launches + 1) * W >= 1 << 32:  # tags have 32 bits
            self._forget()
        fields.t, fields.y, fields.step, fields.tag = t, y, job.first_step + t, self.launches * W
        at = (t * H + y) * W
        results = {"codes": job.codes, "logprob": job.logprob, "margin": job.margin, "given": self.given}
        for name, tensor in results.items():
            setattr(fields, name, None if tensor is None else tensor.data_ptr() + at * tensor.element_size())
        if self.dense.h_plane is not None:
            r, plane = job.table.radius, self.dense.h_plane
            fields.plane = plane[0, 0, t % self.dense.frames, y + r, r:].data_ptr()
        self.launches += 1
        self._launch()
        job.passes[:, t, y] = W
        if (y + 1 == H or not job.condition.is_cuda) and self.trouble.item():  # waits for the device: once a frame
            self._forget()
            raise RuntimeError(
                f"pixelcnn_sample: the cuda kernel waited {fields.patience / 1e9:g} s in vain in frame {t}, up to row "
                f"{y}; ask for another backend and report it."
            )

    def _launch(self) -> None:
        stream = None
        if self.job.condition.is_cuda:
            stream = torch.cuda.current_stream(self.job.condition.device).cuda_stream
        with torch.cuda.device(self.job.condition.device) if stream is not None else torch.device("cpu"):
            self._check(self.library.fastvid_pixelcnn_row(ctypes.byref(self.fields), ctypes.sizeof(Row), stream))

    def _check(self, outcome: int) -> None:
        if outcome:
            told = self.library.fastvid_cuda_error(outcome).decode()
            raise RuntimeError(f"pixelcnn_sample: the cuda kernel was not started: {told}; ask for another backend.")

    def _forget(self) -> None:
        """As before the first launch: no packet is there."""
        self.launches = 0
        self.trouble.zero_()
        for buffer in self.exchange.values():
            buffer.zero_()

    def _sizes(self, chunk: int) -> dict[str, int | float]:
        job, t, (B, T, H, W) = self.job, self.job.table, self.job.grid
        # the threads divide the sums, so that they may depend on the model and on nothing else
        threads = min(MOST_THREADS, max(128, -(-t.width // 32) * 32))
        return {
            "B": B, "T": T, "H": H, "W": W, "K": t.codes, "C": t.width, "L": t.layers, "A": t.heads, "E": t.head_stride,
            "taps": t.horizontal_now, "weight_type": t.weight_type, "axial": t.wavefront, "ctas": self.ctas,
            "threads": threads, "chunk": chunk, "patience": int(PATIENCE * 1e9), "stream": job.stream,
            "seed": ctypes.c_int64(job.seed).value, "code_stride": T * H * W, "temperature": job.temperature,
            "scale": t.head_width**-0.5 if t.heads else 1.0,
        }  # fmt: skip

    def _give_weights(self) -> None:
        job, t, model, device = self.job, self.job.table, self.dense.model, self.job.condition.device
        streams = lay_out(job.packed, t, self.ctas)
        self.host_tasks, layers = streams.tasks, [t.layer(i) for i in range(t.layers)]
        attended = [i for i, at in enumerate(layers) if at["qkv"] >= 0]
        numbers = [attended.index(i) if i in attended else -1 for i in range(t.layers)]
        self.attentions = len(attended)
        self.kept |= {
            "samples": job.samples.to(device), "weights": streams.weights, "tasks": streams.tasks.to(device),
            "attention": torch.tensor(numbers, device=device), "start": self.dense.start, "base": self.dense.base,
            "table": model.globals["table_h"][t.input_horizontal_past :].contiguous(),
            "out_bias": torch.stack([layer["out_bias"] for layer in model.layers]),
            "head_bias": torch.cat([model.globals["head1_bias"], model.globals["head2_bias"]]),
        }  # fmt: skip
        if attended:
            for name in ("qkv_bias", "qkv_position", "att_bias"):
                self.kept[name] = torch.stack([model.layers[i][name] for i in attended])
        if streams.scales is not None:
            self.kept["strip_scale"] = streams.scales
        self.fields.table_stride, self.fields.host_tasks = t.width, streams.tasks.data_ptr()
        self.fields.task_count, self.fields.weight_bytes = len(streams.tasks) - 1, streams.weights.shape[1]

    def _give_caches(self, chunk: int) -> None:
        job, t, (B, T, H, W) = self.job, self.job.table, self.job.grid
        C, D, A, n = t.width, t.attention_width, t.heads, self.attentions
        keys = T + H + W if t.wavefront else T * H * W
        sizes = {
            "streams": (t.layers + 1, B, t.horizontal_now, C), "gated": (t.layers, B, C), "attended": (n, B, C),
            "qkv": (n, B, W, 3 * D), "parts": (n, B, A, -(-keys // chunk), t.head_stride + 2), "hidden": (B, C),
            "summaries": (W, B, SUMMARY, 2 * -(-t.codes // 16)),
        }  # fmt: skip
        new = job.condition.new_zeros
        self.exchange = {name: new(size, dtype=torch.int64) for name, size in sizes.items()}
        self.trouble = new(1, dtype=torch.int32)
        cached = torch.float32 if t.weights == "float32" else torch.bfloat16
        self.kept |= {"cache": new((n, B, 2, D, T * H * W), dtype=cached), "trouble": self.trouble, **self.exchange}
        self.given = None if job.given is None else job.given.contiguous()
        if self.dense.h_plane is not None:
            self.fields.plane_layer, self.fields.plane_sample = self.dense.h_plane.stride()[:2]
