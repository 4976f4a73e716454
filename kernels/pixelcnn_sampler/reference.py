"""Cached sampling of a gated PixelCNN in plain torch: the noise, the draw, and the three passes. See README.md.

A plan splits the training forward by what is known when:

    frame      earlier frames' taps of every layer and the condition: dense work over a whole plane
    row        the vertical stream of all layers for one row: it never looks at the row's own codes
    pixel      the horizontal stream at one position: the taps to the left, attention, head

Every matrix product is batched over the samples, so that a sample's codes do not depend on its neighbours in the batch.
Source: Ramachandran et al. 2017, arXiv:1704.06001, for the caches; the split by frame is ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from fastvid.kernels.pixelcnn_sampler.packed import Tap, Unpacked
from fastvid.kernels.pixelcnn_sampler.session import OPEN, Job
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
NARROW = 256  # channels below which a position's products are too small to share between threads


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words per 128-bit counter. Words travel in int64 tensors that broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # a wrapped int64 product still holds the right 64 bits
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def gumbel_row(seed: int, samples: Tensor, stream: int, t: int, y: int, width: int, classes: int) -> Tensor:
    """Gumbel noise of one row of codes. samples [B] int64 -> [B, W, V] float32.

    Counter words: class // 4 + 2^16 stream; x + 2^16 y; t; sample. Key: the two halves of the 64-bit seed.
    """
    quads = torch.arange((classes + 3) // 4, device=samples.device)
    columns = torch.arange(width, device=samples.device)
    counter = (
        (quads + (stream << 16)).view(1, 1, -1),
        (columns + (y << 16)).view(1, -1, 1),
        torch.full((1, 1, 1), t, device=samples.device),
        samples.view(-1, 1, 1),
    )
    words = torch.stack(torch.broadcast_tensors(*philox(counter, (seed & _MASK, seed >> 32 & _MASK))), dim=-1)
    # 24 bits and a half keep u inside (0, 1); float64 logs round to the same float32 noise in any math library
    uniform = ((words >> 8).double() + 0.5) * 2.0**-24  # [B, W, V / 4, 4]
    return -torch.log(-torch.log(uniform)).flatten(-2)[..., :classes].float()


def draw(logits: Tensor, gumbel: Tensor, temperature: float) -> Tensor:
    """The class of the largest logit / temperature + noise; lowest index on ties. [..., V], [..., V] -> [...] int64."""
    return (logits.float() / temperature + gumbel).argmax(dim=-1)


class Session:
    """The caches and the three passes for one job; `dtype` float64 makes it the truth that others are judged by."""

    def __init__(self, job: Job, dtype: torch.dtype = torch.float32):
        self.job, self.table, self.t = job, job.table, None
        model, taps = Unpacked(job.packed, dtype), job.table.taps
        self.condition = job.condition.to(dtype)
        self.grid = _Grid(*job.grid, job.table.radius, self.condition)
        self.input_vertical = _Lookups(
            model.globals["table_v"], model.globals["bias_v"], taps.input_vertical, job.codes
        )
        self.input_horizontal = _Lookups(
            model.globals["table_h"], model.globals["bias_h"], taps.input_horizontal, job.codes
        )
        self.layers = [_Layer(layer, job, self.grid) for layer in model.layers]
        self.head = [(model.globals[name], model.globals[f"{name}_bias"]) for name in ("head1", "head2")]
        self.head = [_Affine(weight, bias, self.grid.shape[0]) for weight, bias in self.head]

    @torch.no_grad()
    def row(self, t: int, y: int) -> None:
        """Draw row y of frame t, one position after the other; `window` and `order` are not used."""
        job, W = self.job, self.grid.shape[3]
        with _threads_for(job):
            gumbel = gumbel_row(*job.noise, job.first_step + t, y, W, self.table.codes)
            given = torch.full_like(job.codes[:, t, y], OPEN) if job.given is None else job.given[:, t, y]
            for x in range(W):
                self._put(t, y, x, self.logits(t, y, x), gumbel[:, x], given[:, x])
        job.passes[:, t, y] = W

    def logits(self, t: int, y: int, x: int) -> Tensor:
        """Logits [B, K] at a position, asked for in raster order, the codes before it being in `job.codes`."""
        if x == 0:
            if self.t != t:
                self._start_frame(t)
            self._start_row(y)
        return self._pixel(x)

    def _start_frame(self, t: int) -> None:
        """Everything about frame t that earlier frames and the condition already decide."""
        self.t = t
        for layer in self.layers:
            layer.frame(t, self.condition)

    def _start_row(self, y: int) -> None:
        """The vertical stream of every layer for row y, and what it hands to the horizontal stream."""
        self.y = y
        self.started = self.input_horizontal.row(self.t, y, present=False)  # [B, W, C]
        v = self.input_vertical.row(self.t, y, present=True)
        for layer in self.layers:
            v = layer.row(v, y)

    def _pixel(self, x: int) -> Tensor:
        """Logits of the code at column x, all codes before it having been put. -> [B, K]."""
        h = self.input_horizontal.add_left(self.started[:, x], self.t, self.y, x).unsqueeze(1)  # [B, 1, C]
        for layer in self.layers:
            h = layer.pixel(h, x)
        for affine in self.head:
            h = affine(F.elu(h))
        return h.squeeze(1)

    def _put(self, t: int, y: int, x: int, logits: Tensor, gumbel: Tensor, given: Tensor) -> None:
        job = self.job
        scores = (logits / job.temperature).float() + gumbel
        best, drawn = scores.max(dim=-1).values, scores.argmax(dim=-1)
        second = scores.scatter(1, drawn[:, None], -torch.inf).amax(dim=-1)
        codes = torch.where(given == OPEN, drawn, given)
        job.codes[:, t, y, x] = codes
        job.margin[:, t, y, x] = torch.where(given == OPEN, best - second, torch.inf)
        job.logprob[:, t, y, x] = torch.log_softmax(logits, dim=-1).gather(1, codes[:, None]).squeeze(1)


class _Grid:
    """The sizes all caches share. Planes carry zero borders, so that no slice of a tap needs a bounds check."""

    def __init__(self, B: int, T: int, H: int, W: int, radius: int, like: Tensor):
        self.shape, self.radius, self.like = (B, T, H, W), radius, like

    def plane(self, channels: int) -> Tensor:
        B, T, H, W = self.shape
        return self.like.new_zeros(B, T, H + 2 * self.radius, W + 2 * self.radius, channels)


class _Affine:
    """A linear map as one product per sample, so that rounding does not depend on the batch."""

    def __init__(self, weight: Tensor, bias: Tensor | None, batch: int):
        self.weight, self.bias = weight.expand(batch, -1, -1), bias  # [B, Cin, Cout]

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x @ weight + bias. [B, M, Cin] -> [B, M, Cout]; `bias` replaces the map's own."""
        bias = self.bias if bias is None else bias
        return torch.bmm(x, self.weight) if bias is None else torch.baddbmm(bias, x, self.weight)


class _Lookups:
    """An input convolution: its input is one of K embeddings, so every tap is a row of a table."""

    def __init__(self, tables: Tensor, bias: Tensor, taps: tuple[Tap, ...], codes: Tensor):
        self.bias, self.codes = bias, codes
        self.past = [pair for pair in zip(tables, taps, strict=True) if pair[1][0] < 0]
        self.now = [pair for pair in zip(tables, taps, strict=True) if pair[1][0] == 0]

    def row(self, t: int, y: int, present: bool) -> Tensor:
        """The convolution over row y; without the taps of the present frame if not `present`. -> [B, W, C]."""
        B, _, H, W = self.codes.shape
        found = self.bias.repeat(B, W, 1)
        for table, (dt, dy, dx) in self.past + (self.now if present else []):
            if t + dt >= 0 and 0 <= y + dy < H:
                first, last = max(0, -dx), min(W, W - dx)
                found[:, first:last] += F.embedding(self.codes[:, t + dt, y + dy, first + dx : last + dx], table)
        return found

    def add_left(self, found: Tensor, t: int, y: int, x: int) -> Tensor:
        """[B, C] with the taps to the left of column x in its row added."""
        for table, (_, _, dx) in self.now:
            if x + dx >= 0:
                found = found + F.embedding(self.codes[:, t, y, x + dx], table)
        return found


class _Conv:
    """One causal convolution over a cached plane: the taps of earlier frames apart from those of the present one."""

    def __init__(
        self, past: Tensor | None, now: Tensor, bias: Tensor, taps: tuple[Tap, ...], plane: Tensor, grid: _Grid
    ):
        self.grid, self.plane, self.bias = grid, plane, bias
        self.past_taps = [tap for tap in taps if tap[0] < 0]
        self.present_taps = [tap for tap in taps if tap[0] == 0]
        self.past_weight = None if past is None else past.unflatten(0, (len(self.past_taps), -1))  # [taps, Cin, Cout]
        self.weight = now.expand(grid.shape[0], -1, -1)  # [B, taps * Cin, Cout]

    def frame(self, t: int, addend: Tensor) -> None:
        """Bias, addend [B, H, W, Cout] and the earlier frames' taps for the whole of frame t."""
        B, _, H, W = self.grid.shape
        self.t, r = t, self.grid.radius
        live = [i for i, (dt, _, _) in enumerate(self.past_taps) if t + dt >= 0]
        self.past = addend + self.bias
        if live:
            views = [
                self.plane[:, t + dt, r + dy : r + dy + H, r + dx : r + dx + W]
                for dt, dy, dx in (self.past_taps[i] for i in live)
            ]
            seen, weight = torch.cat(views, dim=-1).flatten(1, 2), self.past_weight[live].flatten(0, 1)
            self.past = self.past + torch.bmm(seen, weight.expand(B, -1, -1)).unflatten(1, (H, W))

    def row(self, y: int) -> Tensor:
        """The whole convolution for row y. -> [B, W, Cout]."""
        W, r = self.grid.shape[3], self.grid.radius
        views = [self.plane[:, self.t, y + r + dy, r + dx : r + dx + W] for _, dy, dx in self.present_taps]
        return torch.baddbmm(self.past[:, y], torch.cat(views, dim=-1), self.weight)

    def start_row(self, y: int, addend: Tensor) -> None:
        """Make row y ready for `pixel`. addend: [B, W, Cout], all but the present taps."""
        # the present taps of a horizontal convolution are adjacent columns: in memory one run per position
        first, taps = self.present_taps[0][2], len(self.present_taps)
        line = self.plane[:, self.t, y + self.grid.radius, self.grid.radius + first :]  # [B, columns, C]
        B, W, C = line.shape[0], self.grid.shape[3], line.shape[2]
        runs = line.as_strided((B, W, taps * C), line.stride())
        # one view per column now is cheaper than three slices per column and layer later
        self.seen, self.addend = runs.split(1, dim=1), addend.split(1, dim=1)

    def pixel(self, x: int) -> Tensor:
        """The whole horizontal convolution at column x. -> [B, 1, Cout]."""
        return torch.baddbmm(self.addend[x], self.seen[x], self.weight)


class _Layer:
    """Caches of one gated layer: both streams' inputs on every position so far, and the attention's keys and values."""

    def __init__(self, weights: dict[str, Tensor], job: Job, grid: _Grid):
        B, C, taps = grid.shape[0], job.table.width, job.table.taps
        self.grid, self.v_plane, self.h_plane = grid, grid.plane(C), grid.plane(C)
        self.vertical, self.horizontal = (
            _Conv(weights.get(f"{s}_past"), weights[f"{s}_now"], weights[f"{s}_bias"], group, plane, grid)
            for s, group, plane in (("v", taps.vertical, self.v_plane), ("h", taps.horizontal, self.h_plane))
        )
        self.condition, self.link = (_Affine(weights[name], None, B) for name in ("cond", "link"))
        self.out = _Affine(weights["out"], weights["out_bias"], B)
        self.attention = _Attention(weights, job, grid) if "qkv" in weights else None

    def frame(self, t: int, condition: Tensor) -> None:
        self.t = t
        addend = self.condition(condition[:, t].flatten(1, 2)).unflatten(1, self.grid.shape[2:])  # [B, H, W, 2C]
        self.vertical.frame(t, addend)
        self.horizontal.frame(t, addend)

    def row(self, v: Tensor, y: int) -> Tensor:
        r, W = self.grid.radius, self.grid.shape[3]
        self.v_plane[:, self.t, y + r, r : r + W] = v
        self.h_row = self.h_plane[:, self.t, y + r, r : r + W].split(1, dim=1)  # W views of [B, 1, C]
        pre_v = self.vertical.row(y)  # [B, W, 2C]
        self.horizontal.start_row(y, self.link(pre_v, bias=self.horizontal.past[:, y]))
        if self.attention:
            self.attention.start_row(self.t, y)
        return v + gate(pre_v)

    def pixel(self, h: Tensor, x: int) -> Tensor:
        self.h_row[x].copy_(h)
        h = h + self.out(gate(self.horizontal.pixel(x)))
        return h if self.attention is None else h + self.attention.pixel(h, x)


class _Attention:
    """Keys and values of every position so far; one query at a time."""

    def __init__(self, weights: dict[str, Tensor], job: Job, grid: _Grid):
        B, T, H, W = grid.shape
        A, E = job.table.heads, job.table.head_stride
        self.shape, self.scale, self.axial = (T, H, W), job.table.head_width**-0.5, bool(job.table.wavefront)
        self.qkv, self.out = _Affine(weights["qkv"], None, B), _Affine(weights["att_out"], weights["att_bias"], B)
        axes = [torch.arange(n, dtype=torch.float32) / n - 0.5 for n in (T, H, W)]
        where = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).to(grid.like).flatten(0, 2)  # [N, 3]
        self.position = weights["qkv_bias"] + where @ weights["qkv_position"]  # [N, 3D]
        self.keys = where.new_zeros(B, A, E, T * H * W)
        self.values = where.new_zeros(B, A, T * H * W, E)

    def start_row(self, t: int, y: int) -> None:
        self.t, self.y = t, y

    def pixel(self, h: Tensor, x: int) -> Tensor:
        _, H, W = self.shape
        n = (self.t * H + self.y) * W + x
        B, A, E, _ = self.keys.shape
        q, k, v = self.qkv(h, bias=self.position[n]).view(B, 3, A, 1, E).unbind(1)  # [B, A, 1, E] each
        self.keys[..., n], self.values[:, :, n] = k.squeeze(2), v.squeeze(2)
        seen = self._seen(n, x)
        weights = torch.softmax((q * self.scale) @ self.keys[..., seen], dim=-1)  # [B, A, 1, positions seen]
        return self.out((weights @ self.values[:, :, seen]).view(B, 1, A * E))

    def _seen(self, n: int, x: int) -> slice | Tensor:
        """The positions that position n may look at, itself among them."""
        if not self.axial:
            return slice(n + 1)
        _, H, W = self.shape
        left = torch.arange(n - x, n + 1)
        above = torch.arange(self.t * H * W + x, n, W)
        before = torch.arange(n - self.t * H * W, n, H * W)
        return torch.cat([left, above, before]).to(self.keys.device)


def gate(pre: Tensor) -> Tensor:
    """tanh(a) * sigmoid(b), a and b the first and second half of the channels."""
    a, b = pre.chunk(2, dim=-1)
    return torch.tanh(a) * torch.sigmoid(b)


@contextmanager
def _threads_for(job: Job) -> Iterator[None]:
    """One CPU thread for a narrow stack: on a busy machine, handing out its small products costs more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if job.table.width < NARROW else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
