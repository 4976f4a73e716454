"""pixelcnn_sample by Triton: a session of launches, one CUDA graph for every row, and what is compiled ahead of time.

The graph holds the launches of one row: what a kernel must know of where the row is lies in `place` on the device, so
that the same graph serves every row and nobody waits for the host. Which kernels serve, and every tile, follows from
the model and the width of the grid, never from the batch: a sample's bits do not depend on its neighbours.
None of this has run on a GPU yet; the kernels have run in Triton's interpreter and through the compilers of six chips.
"""

import contextlib
from dataclasses import replace
from typing import Any

import torch
import triton
from fastvid.kernels.common.variant import Variant
from fastvid.kernels.pixelcnn_sampler import triton_line as line
from fastvid.kernels.pixelcnn_sampler import triton_pass as row
from fastvid.kernels.pixelcnn_sampler.packed import ABSENT, Packed, Table
from fastvid.kernels.pixelcnn_sampler.session import Job
from fastvid.kernels.pixelcnn_sampler.triton_sizes import Sizes
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
STORAGE = (torch.float32, torch.int32, torch.int8)  # how the kernels read float32, pairs of bfloat16, int8
MAX_CODES, MAX_WIDTH = 16384, 4096
PROGRAMS = 264  # two for each multiprocessor of a large chip: more samples than that share a program


def why_not(weights: Tensor, table: Tensor, condition: Tensor, *_: Any) -> str | None:
    """What these kernels cannot do about such arguments, in a few words; None where they serve."""
    known = Table(table)
    if known.codes > MAX_CODES or known.width > MAX_WIDTH:
        return f"takes up to {MAX_CODES} codes and {MAX_WIDTH} channels, got {known.codes} and {known.width}"
    if not _adjacent(known):
        return "needs a horizontal stream whose present taps are the columns next to each other on the left"
    if not (condition.is_cuda or INTERPRETED):
        return f"needs a CUDA tensor, got {condition.device.type}"
    return None


def _adjacent(table: Table) -> bool:
    now = [[tap for tap in group if tap[0] == 0] for group in (table.taps.horizontal, table.taps.input_horizontal)]
    r = table.horizontal_now - 1
    return now == [[(0, 0, dx) for dx in range(-r, 1)], [(0, 0, dx) for dx in range(-r, 0)]]


class Model:
    """The packed weights on the device as the kernels take them."""

    def __init__(self, packed: Packed, table: Table):
        weights = packed.weights.contiguous()
        weights = weights if weights.data_ptr() % 64 == 0 else weights.clone()  # wide loads need aligned sections
        self.w, self.f = weights.view(STORAGE[table.weight_type]), weights.view(torch.float32)
        self.words, self.table = packed.table.to(weights.device), table

    def matrix(self, at: dict[str, int], name: str) -> tuple[Tensor, Tensor]:
        """A matrix and the scales of its columns (anything where it has none)."""
        scales = self.f if at[f"{name}_scale"] == ABSENT else self.floats(at, f"{name}_scale")
        return self.w[at[name] // self.w.itemsize :], scales

    def floats(self, at: dict[str, int], name: str) -> Tensor:
        return self.f[at[name] // 4 :]


class Session:
    """The caches of one job on its device, and the launches of a row; positions are drawn one by one in raster order.

    single: whether one program draws a row of a sample; None leaves it to the model's size.
    """

    def __init__(self, job: Job, single: bool | None = None):
        B, T, H, W = job.grid
        self.job, self.sizes, self.device = job, Sizes.of(job.table, T, H, W, single), job.condition.device
        self.model = Model(job.packed, job.table)
        self.layers = [job.table.layer(i) for i in range(job.table.layers)]
        self.attended = [i for i, at in enumerate(self.layers) if at["qkv"] != ABSENT]
        self.condition, self.samples = job.condition.contiguous(), job.samples.to(self.device).contiguous()
        self.given = None if job.given is None else job.given.contiguous()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.ready = False  # a row has been launched, so that every kernel is compiled
        self._allocate(job.condition.new_empty)

    def _allocate(self, new) -> None:
        (B, T, H, W), s, L = self.job.grid, self.sizes, len(self.layers)
        self.place = new(8, dtype=torch.int32)
        self.v = new(max(1, L), s.frames, B, H, W, s.S)
        self.h = new(L if s.frames > 1 else 0, s.frames, B, H, W, s.S)
        self.base, self.pre = new(L, 2, B * W, 2 * s.C), new(L, B * W, 2 * s.C)
        self.rows, self.start = new(L + 1, B, W, s.S), new(B, W, s.S)
        self.gated, self.hidden, self.logits = new(B, s.S), new(B, s.S), new(B, s.logits)
        self.noise = new(B, W, s.codes)
        look = s.attention()
        kept = torch.bfloat16 if s.kind else torch.float32
        self.cache = new(len(self.attended), 2, B, s.A, T * H * W, s.E, dtype=kept)
        self.query, self.part = new(B, s.D), new(B, s.A, look["CHUNKS"], s.E)
        self.peak = new(B, s.A, look["CHUNKS"], 2)

    def row(self, t: int, y: int) -> None:
        """Draw row y of frame t. Nobody waits: what is drawn is there when the stream comes to it."""
        job = self.job
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            words = t, y, job.seed, job.seed >> 32, job.first_step + t
            row._place_kernel[1,](self.place, *map(_word, words), num_warps=1)
            if self.ready and self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
                self._replay()
            else:
                self.launch()
            self.ready = True
            job.passes[:, t, y].fill_(job.grid[3])

    def _replay(self) -> None:
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # a stream of this device: the default one for captures belongs to the device that was current first
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.launch()
        self.graph.replay()

    def launch(self) -> None:
        """Every launch of the row that `place` names, on the current stream."""
        self._before()
        if self.sizes.single:
            self._line()
        else:
            for x in range(self.job.grid[3]):
                self._position(x)
        if self.h.numel():
            (B, _, H, W), s = self.job.grid, self.sizes
            row._keep_kernel[B * W, len(self.layers)](
                self.place, self.rows, self.h, B, H, W, S=s.S, FRAMES=s.frames,
                BLOCK_S=triton.next_power_of_2(s.S), num_warps=4,
            )  # fmt: skip

    # ---- before the first code of a row

    def _before(self) -> None:
        (B, T, H, W), s, m, L = self.job.grid, self.sizes, self.model, len(self.layers)
        grid = triton.cdiv(s.C // 8, s.tile()["PANELS"]), triton.cdiv(B * W, s.tile()["BLOCK_M"])
        tile = s.tile() | {"num_warps": 4, "num_stages": s.stages}
        first, (vertical, horizontal) = m.table.first_layer, self._taps()[2:]
        row._noise_kernel[B * W, triton.cdiv(s.codes, 512)](
            self.place, self.samples, self.noise, W, self.job.stream, CODES=s.codes, QUADS=128, num_warps=4
        )
        self._start()
        if L:
            row._past_kernel[(*grid, 2 * L)](
                m.w, m.f, m.words, self.place, self.condition, self.v, self.h, self.base, B, T, H, W, first,
                *vertical[:2], *horizontal[:2], **s.channels(), FRAMES=s.frames, CONDITION=s.condition, **tile,
            )  # fmt: skip
        for i in range(L):
            row._row_kernel[grid](
                m.w, m.f, m.words, self.place, self.v, self.base, self.pre, i, L, B, H, W, first,
                vertical[0] + 3 * vertical[1], vertical[2], **s.channels(), FRAMES=s.frames, **tile,
            )  # fmt: skip
        if L:
            row._link_kernel[(*grid, L)](
                m.w, m.f, m.words, self.pre, self.base, B, W, first, C=s.C, **tile
            )  # fmt: skip

    def _taps(self) -> list[tuple[int, int, int]]:
        """For each kind of convolution: the word of its first tap, taps of earlier frames, of the present one."""
        t, found = self.model.table, []
        at = t.first_tap
        for name in ("input_vertical", "input_horizontal", "vertical", "horizontal"):
            past, now = getattr(t, f"{name}_past"), getattr(t, f"{name}_now")
            found.append((at, past, now))
            at += 3 * (past + now)
        return found

    def _start(self) -> None:
        (B, T, H, W), s, m = self.job.grid, self.sizes, self.model
        at, (vertical, horizontal) = m.table.globals, self._taps()[:2]
        row._start_kernel[B * W, 2](
            m.words, self.place, self.job.codes, m.floats(at, "table_v"), m.floats(at, "bias_v"),
            m.floats(at, "table_h"), m.floats(at, "bias_h"), self.v, self.start, self.rows, B, T, H, W,
            vertical[0], vertical[1] + vertical[2], *horizontal[:2],
            CODES=s.codes, S=s.S, FRAMES=s.frames, BLOCK_S=triton.next_power_of_2(s.S), num_warps=2,
        )  # fmt: skip

    # ---- one code after the other, by one program

    def _line(self) -> None:
        (B, T, H, W), s, m, job = self.job.grid, self.sizes, self.model, self.job
        look = s.attention()
        line._line_kernel[B,](
            m.w, m.f, m.words, self.place, self.rows, self.base, self.gated, self.query, self.cache, self.part,
            self.peak, self.hidden, self.logits, self.noise, self._given(), job.codes, job.logprob, job.margin,
            self._table_h(), self.start, B, T, H, W, len(self.layers), m.table.first_layer, m.table.first_global,
            float(job.temperature), self._scale(), C=s.C, A=s.A, E=s.E, **_without(look, "CHUNKS"), **s.panels(s.C),
            **s.draw(self.given is not None), num_warps=8, num_stages=1,
        )  # fmt: skip

    def _given(self) -> Tensor:
        return self.job.codes if self.given is None else self.given

    def _table_h(self) -> Tensor:
        """The rows of the input layer's table for the taps of the row itself."""
        t = self.model.table
        return self.model.floats(t.globals, "table_h")[t.input_horizontal_past * t.codes * t.stride :]

    def _scale(self) -> float:
        return max(1, self.model.table.head_width) ** -0.5

    # ---- one code after the other, by many programs

    def _position(self, x: int) -> None:
        (B, T, H, W), s, m, job = self.job.grid, self.sizes, self.model, self.job
        for i, at in enumerate(self.layers):
            tile = s.panels(s.C)
            line._gate_kernel[_grid(s.C // 8, tile, B)](
                self.rows[i], self.base[i, 1], *m.matrix(at, "h_now"), self.gated, x, B, W,
                _group(s.C // 8, tile, B), **s.channels(), TAPS=s.taps, **tile, num_warps=_warps(tile),
            )  # fmt: skip
            old, new = self.rows[i, :, x], self.rows[i + 1, :, x]
            self._plain(at, "out", self.gated, old, new, s.C, False)
            if i in self.attended:
                self._attend(i, x)
        at = m.table.globals
        self._plain(at, "head1", self.rows[-1, :, x], None, self.hidden, s.C, True)
        self._plain(at, "head2", self.hidden, None, self.logits, s.codes, True)
        line._draw_kernel[B,](
            self.place, self.logits, self.noise, self._given(), job.codes, job.logprob, job.margin, self._table_h(),
            self.start, self.rows, x, T, H, W, float(job.temperature), **s.draw(self.given is not None), num_warps=4,
        )  # fmt: skip

    def _plain(
        self, at: dict[str, int], name: str, x: Tensor, old: Tensor | None, new: Tensor, N: int, elu: bool
    ) -> None:
        m, K, B = self.model, self.sizes.C, self.job.grid[0]
        tile, added = self.sizes.panels(K), new if old is None else old
        line._plain_kernel[_grid(triton.cdiv(N, 16), tile, B)](
            x, *m.matrix(at, name), m.floats(at, f"{name}_bias"), added, new, x.stride(0), added.stride(0),
            new.stride(0), B, _group(triton.cdiv(N, 16), tile, B),
            K=K, N=N, ELU=elu, ADD=old is not None, **tile, num_warps=_warps(tile),
        )  # fmt: skip

    def _attend(self, i: int, x: int) -> None:
        (B, T, H, W), s, m, at = self.job.grid, self.sizes, self.model, self.layers[i]
        look, heads = s.attention(), {"A": s.A, "E": s.E}
        cache, h = self.cache[self.attended.index(i)], self.rows[i + 1]
        tile, wanted = s.panels(s.C), triton.cdiv(3 * s.D, 16)
        line._query_kernel[_grid(wanted, tile, B)](
            self.place, h, *m.matrix(at, "qkv"), m.floats(at, "qkv_bias"), m.floats(at, "qkv_position"), self.query,
            cache, x, B, T, H, W, _group(wanted, tile, B), **s.channels(), **heads, **tile, num_warps=_warps(tile),
        )  # fmt: skip
        line._look_kernel[look["CHUNKS"], B * s.A](
            self.place, self.query, cache, self.part, self.peak, x, B, T, H, W, self._scale(),
            **heads, **_without(look, "BLOCK_A"), num_warps=4,
        )  # fmt: skip
        tile, wanted = _without(s.panels(s.C), "BLOCK_K"), triton.cdiv(s.C, 16)
        line._attended_kernel[_grid(wanted, tile, B)](
            self.place, self.part, self.peak, *m.matrix(at, "att_out"), m.floats(at, "att_bias"), h, x, B, H, W,
            _group(wanted, tile, B), **s.channels(), **heads, **_without(look, "KEYS"), **tile, num_warps=8,
        )  # fmt: skip


def _without(constants: dict[str, int], *names: str) -> dict[str, int]:
    return {name: value for name, value in constants.items() if name not in names}


def _word(value: int) -> int:
    """The low 32 bits as a signed number."""
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _warps(tile: dict[str, int]) -> int:
    return 8 if tile["PANELS"] * tile["BLOCK_K"] >= 256 else 4


def _group(panels: int, tile: dict[str, int], B: int) -> int:
    """Samples that a program takes one after another: each reads the weights again, from the nearest cache."""
    return triton.cdiv(B, max(1, min(B, PROGRAMS // triton.cdiv(panels, tile["PANELS"]))))


def _grid(panels: int, tile: dict[str, int], B: int) -> tuple[int, int]:
    return triton.cdiv(panels, tile["PANELS"]), triton.cdiv(B, _group(panels, tile, B))


# ---- ahead of time

_TYPES = {
    "table_ptr": "*i64:16", "place_ptr": "*i32:16", "codes_ptr": "*i64:16", "given_ptr": "*i64:16",
    "samples_ptr": "*i64:16", "stride_x": "i32:16", "stride_old": "i32:16", "stride_new": "i32:16",
    "temperature": "fp32", "scale": "fp32",
}  # fmt: skip
_WORDS = ("*fp32:16", "*i32:16", "*i8:16")  # of weights
_NVIDIA, _AMD = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120"), ("gfx942",)
# name -> a model on a grid: narrow ones in float32 and in bfloat16, the paper's priors, 8 bits
SHIPPED = {
    "narrow_fp32": Sizes(48, 48, 512, 64, 3, 2, 0, 4, 16, False, 192, True),
    "narrow_bf16": Sizes(96, 96, 512, 96, 1, 2, 1, 4, 24, True, 192, True),
    "wide_fp32": Sizes(192, 192, 512, 192, 3, 2, 0, 4, 48, False, 768, False),
    "top_bf16": Sizes(512, 512, 512, 512, 3, 2, 1, 8, 64, False, 3072, False),
    "bottom_bf16": Sizes(512, 512, 512, 1024, 1, 3, 1, 8, 64, False, 4096, False),
    "top_int8": Sizes(512, 512, 512, 512, 3, 2, 2, 8, 64, False, 3072, False),
}
ROWS = "wide_fp32", "top_bf16", "bottom_bf16", "top_int8"  # narrow ones have the tile of wide ones


def _variant(kernel, name: str, s: Sizes, constants: dict[str, Any], warps: int, stages: int = 1) -> Variant:
    """Of tensors as a session makes them; pointers that are not named point to float32."""
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = _TYPES | {"w_ptr": _WORDS[s.kind], "cache_ptr": "*bf16:16" if s.kind else "*fp32:16"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {key: types.get(key, "*fp32:16" if key.endswith("_ptr") else "i32") for key in kernel.arg_names}
    precision = ("ieee", "bf16", "bf16")[s.kind] if "BLOCK_M" in constants else None
    # 32 rows are half of what the largest chips' newest instructions take: tensor cores, but not necessarily those
    name = f"{kernel.__name__.strip('_').removesuffix('_kernel')}_{name}_w{warps}_s{stages}"
    return Variant(kernel, name, signature, constants, warps, stages, False, precision)


def variants() -> list[Variant]:
    """Every kernel as the paper's top prior launches it, and what other models make larger; each once."""
    made = []
    for name, s in SHIPPED.items():
        if name in ROWS:
            made += _of_rows(name, s)
        if s.single:
            constants = s.channels() | {"A": s.A, "E": s.E} | s.attention() | s.panels(s.C) | s.draw(True)
            made.append(_variant(line._line_kernel, name, s, constants, 8)._replace(targets=_NVIDIA))
            made += [v._replace(targets=_AMD) for v in _of_positions(name, replace(s, single=False))]
        else:
            made += _of_positions(name, s)
    s = SHIPPED["top_bf16"]
    constants = s.draw(True) | {"FRAMES": s.frames, "QUADS": 128}
    made += [
        _variant(kernel, "512", s, constants, warps)
        for kernel, warps in (
            (row._place_kernel, 1), (row._start_kernel, 2), (row._noise_kernel, 4), (row._keep_kernel, 4),
            (line._draw_kernel, 4),
        )
    ]  # fmt: skip
    once = {str((v.kernel, v.signature, v.constants, v.num_warps, v.targets)): v for v in reversed(made)}
    return list(reversed(once.values()))


def _of_rows(name: str, s: Sizes) -> list[Variant]:
    constants = s.channels() | {"FRAMES": s.frames, "CONDITION": s.condition} | s.tile()
    kernels = row._past_kernel, row._row_kernel, row._link_kernel
    return [_variant(kernel, name, s, constants, 4, s.stages) for kernel in kernels]


def _of_positions(name: str, s: Sizes) -> list[Variant]:
    sizes = s.channels() | {"TAPS": s.taps, "A": s.A, "E": s.E}
    tile, look = sizes | s.panels(s.C), s.attention()
    plain = {"out": (s.C, False, True), "head": (s.codes, True, False)}
    made = [
        _variant(line._gate_kernel, name, s, tile, _warps(tile)),
        _variant(line._attended_kernel, name, s, tile | look, 8),
    ]
    if name != "top_bf16":
        return made
    return [
        *made,
        *(
            _variant(line._plain_kernel, f"{kind}_{name}", s, tile | {"K": s.C, "N": N, "ELU": elu, "ADD": add},
                     _warps(tile)) for kind, (N, elu, add) in plain.items()
        ),
        _variant(line._query_kernel, name, s, tile, _warps(tile)),
        _variant(line._look_kernel, name, s, sizes | look, 4),
    ]  # fmt: skip
