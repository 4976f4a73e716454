"""Sampling a gated PixelCNN one code at a time: the naive way, and the three-pass plan that gives the same codes.

A plan splits the training forward by what is known when:

    frame(t)           earlier frames' taps of every layer and the condition: dense work over a whole plane
    row(y)             the vertical stream of all layers for one row: it never looks at the row's own codes
    pixel(x)           the horizontal stream at one position: the taps to the left, attention, head

Every matrix product is batched over the samples, so that a sample's codes do not depend on its neighbours in the batch.
Source: Ramachandran et al. 2017, arXiv:1704.06001, for the caches; the split by frame is ours.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid import ops
from fastvid.nn import CausalAttention, CausalConv, GatedPixelLayer, GatedPixelStack
from fastvid.nn.attention import coordinates

NARROW = 256  # channels below which a position's products are too small to share between threads

Progress = Callable[[int], None]  # told how many codes of each sample have just been drawn


@dataclass(frozen=True)
class Noise:
    """Which random numbers a batch of samples draws: a pure function of these fields and the position.

    seed: 64-bit. samples: one identity per batch row. stream: which grid. first_step: latent time of the grid's t = 0.
    """

    seed: int
    samples: tuple[int, ...]
    stream: int = 0
    first_step: int = 0

    def row(self, t: int, y: int, width: int, classes: int, device: torch.device) -> Tensor:
        """Gumbel noise of one row of codes. -> [B, W, K] float32."""
        samples = torch.tensor(self.samples, device=device)
        return ops.gumbel_row(self.seed, samples, self.stream, self.first_step + t, y, width, classes)


@torch.no_grad()
def sample_naive(stack: GatedPixelStack, condition: Tensor, noise: Noise, temperature: float = 1.0) -> Tensor:
    """Codes by running the whole network again for every one of them: the definition of sampling.

    condition: [B, T, H, W, condition_channels]. Returns [B, T, H, W] int64. Raises ValueError as `sample` does.
    """
    B, T, H, W, _ = _check(stack, condition, noise)
    codes = torch.zeros(B, T, H, W, dtype=torch.int64, device=condition.device)
    for t in range(T):
        for y in range(H):
            gumbel = noise.row(t, y, W, stack.config.codes, condition.device)
            for x in range(W):
                logits = stack(codes, condition)[:, t, y, x]
                codes[:, t, y, x] = ops.draw(logits, gumbel[:, x], temperature)
    return codes


@torch.no_grad()
def sample(
    stack: GatedPixelStack, condition: Tensor, noise: Noise, temperature: float = 1.0, progress: Progress | None = None
) -> Tensor:
    """Codes by the three-pass plan: those of `sample_naive`, each layer's work done once per position.

    condition: [B, T, H, W, condition_channels], floating; one batch row per sample.
    noise:     Noise with B samples. temperature: > 0; 1 samples the model's own distribution.
    Returns:   [B, T, H, W] int64 in [0, K).
    Raises:    ValueError if the noise names another number of samples or the stack is in training mode with dropout.
    """
    B, T, H, W, _ = _check(stack, condition, noise)
    plan = SamplingPlan(stack, condition)
    with _threads_for(stack):
        for t in range(T):
            plan.frame(t)
            for y in range(H):
                plan.row(y)
                gumbel = noise.row(t, y, W, stack.config.codes, condition.device)
                for x in range(W):
                    plan.put(x, ops.draw(plan.pixel(x), gumbel[:, x], temperature))
                if progress:
                    progress(W)
    return plan.codes


@contextmanager
def _threads_for(stack: GatedPixelStack) -> Iterator[None]:
    """One CPU thread for a narrow stack: on a busy machine, handing out its small products costs more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if stack.config.channels < NARROW else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class SamplingPlan:
    """The caches and the three passes for one batch of samples.

    Call `frame(t)` for t = 0.., `row(y)` for y = 0.., then for every x `pixel(x)` (logits) and `put(x, codes)`.
    """

    def __init__(self, stack: GatedPixelStack, condition: Tensor):
        self.stack, self.condition = stack, condition
        self.grid = _Grid(*condition.shape[:4], stack.config.kernel // 2, condition)
        B, T, H, W = self.grid.shape
        self.codes = torch.zeros(B, T, H, W, dtype=torch.int64, device=condition.device)
        self.embedded = self.grid.plane(stack.config.channels)
        self.input_vertical = _ConvPlan(stack.input_vertical, self.embedded, self.grid)
        self.input_horizontal = _ConvPlan(stack.input_horizontal, self.embedded, self.grid)
        self.layers = [_LayerPlan(layer, self.grid) for layer in stack.layers]
        self.head = [_Affine(linear, B) for linear in (stack.head[1], stack.head[3])]

    def frame(self, t: int) -> None:
        """Everything about frame t that earlier frames and the condition already decide."""
        self.t = t
        self.input_vertical.frame(t)
        self.input_horizontal.frame(t)
        for layer in self.layers:
            layer.frame(t, self.condition)

    def row(self, y: int) -> None:
        """The vertical stream of every layer for row y, and what it hands to the horizontal stream."""
        self.y = y
        v = self.input_vertical.row(y)  # [B, W, C]
        self.input_horizontal.start_row(y, self.input_horizontal.past[:, y])
        for layer in self.layers:
            v = layer.row(v, y)

    def pixel(self, x: int) -> Tensor:
        """Logits of the code at column x, all codes before it having been put. -> [B, K]."""
        h = self.input_horizontal.pixel(x)  # [B, 1, C]
        for layer in self.layers:
            h = layer.pixel(h, x)
        for affine in self.head:
            h = affine(F.elu(h))
        return h.squeeze(1)

    def put(self, x: int, codes: Tensor) -> None:
        """Record the codes drawn at column x. codes: [B] int64."""
        self.codes[:, self.t, self.y, x] = codes
        r = self.grid.radius
        self.embedded[:, self.t, self.y + r, x + r] = F.embedding(codes, self.stack.embed.weight)


class _Grid:
    """The sizes all caches share. Planes carry zero borders, so that no slice of a tap needs a bounds check."""

    def __init__(self, B: int, T: int, H: int, W: int, radius: int, like: Tensor):
        self.shape, self.radius, self.like = (B, T, H, W), radius, like

    def plane(self, channels: int) -> Tensor:
        B, T, H, W = self.shape
        return self.like.new_zeros(B, T, H + 2 * self.radius, W + 2 * self.radius, channels)


class _Affine:
    """A linear map as one product per sample, so that rounding does not depend on the batch."""

    def __init__(self, linear: nn.Linear, batch: int):
        self.weight = linear.weight.t().expand(batch, -1, -1)  # [B, Cin, Cout]
        self.bias = linear.bias

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x @ weight + bias. [B, M, Cin] -> [B, M, Cout]; `bias` replaces the map's own."""
        bias = self.bias if bias is None else bias
        return torch.bmm(x, self.weight) if bias is None else torch.baddbmm(bias, x, self.weight)


class _ConvPlan:
    """One causal convolution over a cached plane: the taps of earlier frames apart from those of the present one."""

    def __init__(self, conv: CausalConv, plane: Tensor, grid: _Grid):
        self.grid, self.plane, self.bias = grid, plane, conv.bias
        past = [i for i, (dt, _, _) in enumerate(conv.taps) if dt < 0]
        present = [i for i, (dt, _, _) in enumerate(conv.taps) if dt == 0]
        self.past_taps = [conv.taps[i] for i in past]
        self.present_taps = [conv.taps[i] for i in present]
        self.past_weight = conv.weight[past]  # [taps, Cin, Cout]
        self.weight = conv.weight[present].flatten(0, 1).expand(grid.shape[0], -1, -1)  # [B, taps * Cin, Cout]

    def frame(self, t: int, addend: Tensor | None = None) -> None:
        """Bias, addend [B, H, W, Cout] and the earlier frames' taps for the whole of frame t."""
        B, _, H, W = self.grid.shape
        self.t, r = t, self.grid.radius
        live = [i for i, (dt, _, _) in enumerate(self.past_taps) if t + dt >= 0]
        self.past = self.bias.expand(B, H, W, -1) if addend is None else addend + self.bias
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


class _LayerPlan:
    """Caches of one gated layer: both streams' inputs on every position so far, and the attention's keys and values."""

    def __init__(self, layer: GatedPixelLayer, grid: _Grid):
        B, C = grid.shape[0], layer.out.in_features
        self.grid, self.v_plane, self.h_plane = grid, grid.plane(C), grid.plane(C)
        self.vertical = _ConvPlan(layer.vertical, self.v_plane, grid)
        self.horizontal = _ConvPlan(layer.horizontal, self.h_plane, grid)
        self.condition, self.link, self.out = (_Affine(m, B) for m in (layer.condition, layer.link, layer.out))
        self.attention = _AttentionPlan(layer.attention, grid) if layer.attention else None

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
        return v + ops.gate(pre_v)

    def pixel(self, h: Tensor, x: int) -> Tensor:
        self.h_row[x].copy_(h)
        h = h + self.out(ops.gate(self.horizontal.pixel(x)))
        return h if self.attention is None else h + self.attention.pixel(h, x)


class _AttentionPlan:
    """Keys and values of every position so far; one query at a time."""

    def __init__(self, attention: CausalAttention, grid: _Grid):
        B, T, H, W = grid.shape
        C, A = attention.out.in_features, attention.heads
        self.width, self.height, self.scale = W, H, (C // A) ** -0.5
        self.qkv, self.out = _Affine(attention.qkv, B), _Affine(attention.out, B)
        where = coordinates(T, H, W).to(attention.out.weight).flatten(0, 2)  # [N, 3]
        self.position = attention.qkv.bias + where @ attention.qkv_position.weight.t()  # [N, 3C]
        self.keys = where.new_zeros(B, A, C // A, T * H * W)
        self.values = where.new_zeros(B, A, T * H * W, C // A)

    def start_row(self, t: int, y: int) -> None:
        self.first = (t * self.height + y) * self.width

    def pixel(self, h: Tensor, x: int) -> Tensor:
        n = self.first + x
        B, A, E, _ = self.keys.shape
        q, k, v = self.qkv(h, bias=self.position[n]).view(B, 3, A, 1, E).unbind(1)  # [B, A, 1, E] each
        self.keys[..., n], self.values[:, :, n] = k.squeeze(2), v.squeeze(2)
        weights = torch.softmax((q * self.scale) @ self.keys[..., : n + 1], dim=-1)  # [B, A, 1, n + 1]
        return self.out((weights @ self.values[:, :, : n + 1]).view(B, 1, A * E))


def _check(stack: GatedPixelStack, condition: Tensor, noise: Noise) -> torch.Size:
    if condition.ndim != 5 or condition.shape[-1] != stack.config.condition_channels:
        raise ValueError(
            f"sample: `condition` must be [B, T, H, W, {stack.config.condition_channels}], got {list(condition.shape)}."
        )
    if condition.shape[0] != len(noise.samples):
        raise ValueError(f"sample: `noise` names {len(noise.samples)} samples for a batch of {condition.shape[0]}.")
    if stack.training and stack.config.dropout:
        raise ValueError("sample: the stack is in training mode, where dropout changes the codes; call .eval() first.")
    return condition.shape
