"""What the persistent CUDA sampler leaves to others: the passes over frames and rows, and the layout of its weights.

The convolutions of both passes are the gated causal convolution, on the planes where they lie; the other products are
torch's (cuBLAS on a GPU), in float32 without TF32, batched over the samples.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fastvid.kernels.pixelcnn_sampler.packed import PANEL, WEIGHTS, Packed, Table, Tap, Unpacked
from fastvid.kernels.pixelcnn_sampler.session import Job
from torch import Tensor

STRIP = 8  # outputs that the kernel sums together: half a panel


class Streams(NamedTuple):
    """The weights of every CTA in the order in which it uses them.

    weights: uint8 [ctas, bytes]. scales: float32 [ctas, strips, 8], or None.
    tasks:   int32 [strips + 1, 4] on the CPU: offset in units of 16 bytes, taps, rows of a tap, CTAs that have such a
             strip; the last line is the end.
    """

    weights: Tensor
    tasks: Tensor
    scales: Tensor | None


def matrices(table: Table) -> Iterator[tuple[str, dict[str, int], int, int, int]]:
    """Name, section offsets, taps, rows of a tap and outputs of the matrices that every code needs, in order of use."""
    C, D = table.width, table.attention_width
    for i in range(table.layers):
        at = table.layer(i)
        yield "h_now", at, table.horizontal_now, C, 2 * C
        yield "out", at, 1, C, C
        if at["qkv"] >= 0:
            yield "qkv", at, 1, C, 3 * D
            yield "att_out", at, 1, D, C
    yield "head1", table.globals, 1, C, C
    yield "head2", table.globals, 1, C, table.codes


def most_strips(table: Table) -> int:
    """Strips of the largest matrix: more CTAs than that have nothing to multiply."""
    return max(2 * -(-outputs // PANEL) for *_, outputs in matrices(table))


def lay_out(packed: Packed, table: Table, ctas: int) -> Streams:
    """The packed weights that every code needs, dealt out to `ctas` CTAs strip by strip."""
    pieces, scales, tasks, offset = [], [], [], 0
    for name, at, taps, rows, outputs in matrices(table):
        strips = _strips(packed, table, at[name], taps * rows, outputs)
        owned = len(strips)
        pieces.append(_dealt(strips, ctas))
        if table.weights == "int8":
            scales.append(_dealt(_scales(packed, at[f"{name}_scale"], outputs), ctas).unflatten(1, (-1, STRIP)))
        for first in range(0, owned, ctas):
            tasks.append((offset // 16, taps, rows, min(ctas, owned - first)))
            offset += strips.shape[1]
    tasks.append((offset // 16, 0, 0, 0))
    return Streams(
        torch.cat(pieces, dim=1).contiguous(),
        torch.tensor(tasks, dtype=torch.int32),
        torch.cat(scales, dim=1).contiguous() if scales else None,
    )


def _strips(packed: Packed, table: Table, at: int, rows: int, outputs: int) -> Tensor:
    """[strips, bytes] uint8; see Float32, BFloat16 and Int8 of cuda_cta.h for what lies where."""
    stored, panels = WEIGHTS[table.weights], -(-outputs // PANEL)
    raw = packed.weights[at : at + panels * rows * PANEL * stored.itemsize]
    if stored == torch.bfloat16:
        strips = raw.view(torch.int32).view(panels, rows, 2, 4).permute(0, 2, 1, 3)
    else:
        halves = raw.view(stored).view(panels, rows, 2, 2, 4)  # [..., which eight of the panel, which four, lane]
        strips = halves.permute(0, 3, 2, 1, 4) if stored == torch.float32 else halves.permute(0, 3, 1, 2, 4)
    return strips.reshape(2 * panels, -1).view(torch.uint8)


def _scales(packed: Packed, at: int, outputs: int) -> Tensor:
    panels = -(-outputs // PANEL)
    scales = packed.weights[at : at + panels * PANEL * 4].view(torch.float32).view(panels, 2, 2, 4)
    return scales.transpose(1, 2).reshape(2 * panels, STRIP)


def _dealt(strips: Tensor, ctas: int) -> Tensor:
    """[strips, n] -> [ctas, rounds n]: strip i goes to CTA i modulo ctas."""
    padded = F.pad(strips, (0, 0, 0, -len(strips) % ctas))
    return padded.unflatten(0, (-1, ctas)).transpose(0, 1).flatten(1)


class Dense:
    """The passes over frames and rows. `row` leaves what the kernel needs in `start` and `base`.

    start:   [B, W, C], the input layer but for the present row's codes.
    base:    [L, B, W, 2C], the horizontal pre-gate features but for the present frame's taps.
    h_plane: [L, B, frames, H + 2r, W + 2r, C], every layer's input, which the kernel writes; frame t in slot t modulo
             frames; or None where no earlier frame is seen.

    convolve: a launcher of gated_causal_conv, which takes what its backends take.
    """

    def __init__(self, job: Job, convolve: Callable[..., tuple[Tensor, Tensor]]):
        self.job, self.table, self.convolve, self.at = job, job.table, convolve, None
        self.model = Unpacked(job.packed)
        (B, T, H, W), t = job.grid, job.table
        self.frames, r = min(T, t.frames_seen), t.radius
        for layer in self.model.layers:  # theirs is the kernel's work
            for name in ("h_now", "out", "qkv", "att_out"):
                layer.pop(name, None)
        new = job.condition.new_zeros
        plane = (t.layers, B, self.frames, H + 2 * r, W + 2 * r, t.width)
        self.v_plane = new(plane)
        self.h_plane = new(plane) if t.horizontal_past else None
        self.start, self.base = new(B, W, t.width), new(t.layers, B, W, 2 * t.width)
        self.past = new(2, t.layers, B, H, W, 2 * t.width)  # of the vertical and the horizontal stream

    @torch.no_grad()
    def row(self, t: int, y: int) -> None:
        """Everything about row y of frame t that its own codes do not decide."""
        with _without_tf32():
            if self.at != t:
                self.at = t
                self._frame(t)
            self._row(t, y)

    def _frame(self, t: int) -> None:
        taps, (H, W), r = self.table.taps, self.job.grid[2:], self.table.radius
        for i, layer in enumerate(self.model.layers):
            condition = _product(self.job.condition[:, t].flatten(1, 2), layer["cond"])
            condition = condition.unflatten(1, (1, H, W))  # [B, 1, H, W, 2C]
            for which, (letter, plane, group) in enumerate(
                (("v", self.v_plane, taps.vertical), ("h", self.h_plane, taps.horizontal))
            ):
                past, bias = [tap for tap in group if tap[0] < 0], layer[f"{letter}_bias"]
                live = [j for j, tap in enumerate(past) if t + tap[0] >= 0]
                if live:
                    weight = layer[f"{letter}_past"].unflatten(0, (len(past), -1))[live]
                    seen = self._slots(t, [past[j] for j in live])
                    found, _ = self.convolve(
                        plane[i], weight, bias, seen, condition, None, "none", [0, r, r], [1, H, W], False
                    )
                else:
                    found = condition + bias
                self.past[which, i] = found.squeeze(1)

    def _row(self, t: int, y: int) -> None:
        taps, r, W = self.table.taps, self.table.radius, self.job.grid[3]
        found = self.model.globals
        self.start.copy_(self._look_up(t, y, found["table_h"], found["bias_h"], taps.input_horizontal, earlier=True))
        v = self._look_up(t, y, found["table_v"], found["bias_v"], taps.input_vertical, earlier=False)
        now = self._slots(t, [tap for tap in taps.vertical if tap[0] == 0])
        for i, layer in enumerate(self.model.layers):
            self.v_plane[i, :, t % self.frames, y + r, r : r + W] = v
            weight, past = layer["v_now"].unflatten(0, (len(now) // 3, -1)), self.past[0, i, :, None, y : y + 1]
            v, pre = self.convolve(
                self.v_plane[i], weight, None, now, past, v[:, None, None], "gate", [0, r + y, r], [1, 1, W], True
            )
            v, pre = v[:, 0, 0], pre[:, 0, 0]  # [B, W, C], [B, W, 2C]
            self.base[i] = self.past[1, i, :, y] + _product(pre, layer["link"])

    def _slots(self, t: int, taps: list[Tap]) -> list[int]:
        """The taps of frame t with the slot that holds their frame in place of dt, in one flat list."""
        return [offset for dt, dy, dx in taps for offset in ((t + dt) % self.frames, dy, dx)]

    def _look_up(self, t: int, y: int, tables: Tensor, bias: Tensor, taps: tuple[Tap, ...], earlier: bool) -> Tensor:
        """An input convolution over row y; only taps of earlier frames if `earlier`. -> [B, W, C]."""
        codes, (B, _, H, W) = self.job.codes, self.job.grid
        found = bias.repeat(B, W, 1)
        for table, (dt, dy, dx) in zip(tables, taps, strict=True):
            if t + dt >= 0 and 0 <= y + dy < H and (dt < 0 or not earlier) and abs(dx) < W:
                first, last = max(0, -dx), min(W, W - dx)
                # a launch that gave up leaves codes open; that must not become a bad address before it is reported
                seen = codes[:, t + dt, y + dy, first + dx : last + dx].clamp_min(0)
                found[:, first:last] += F.embedding(seen, table)
        return found


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """[B, M, Kin] @ [Kin, N], a product for each sample, so that its rounding does not depend on the others."""
    return torch.bmm(x, weight.expand(len(x), -1, -1))


@contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
