"""Sampling a gated PixelCNN one code at a time: the naive way, and the three-pass plan that gives the same codes.

A plan splits the training forward by what is known when:

    frame(t)           earlier frames' taps of every layer and the condition: dense work over a whole plane
    row(y)             the vertical stream of all layers for one row: it never looks at the row's own codes
    pixel(x)           the horizontal stream at one position: the taps to the left, attention, head

Every matrix product is batched over the samples, so that a sample's codes do not depend on its neighbours in the batch.
Source: Ramachandran et al. 2017, arXiv:1704.06001, for the caches; the split by frame is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid import ops
from fastvid.nn import CausalAttention, CausalConv, GatedPixelLayer, GatedPixelStack
from fastvid.nn.attention import coordinates

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


class SamplingPlan:
    """The caches and the three passes for one batch of samples.

    Call `frame(t)` for t = 0.., `row(y)` for y = 0.., then for every x `pixel(x)` (logits) and `put(x, codes)`.
    """

    def __init__(self, stack: GatedPixelStack, condition: Tensor):
        self.stack = stack
        B, T, H, W, _ = condition.shape
        c, r = stack.config.channels, stack.config.kernel // 2
        self.radius, self.shape, self.condition = r, (B, T, H, W), condition

        def plane(channels: int) -> Tensor:
            # zero borders stand for the padding, so that no slice needs a bounds check
            return condition.new_zeros(B, T, H + 2 * r, W + 2 * r, channels)

        self.codes = torch.zeros(B, T, H, W, dtype=torch.int64, device=condition.device)
        self.embedded = plane(c)
        self.input_vertical = _ConvPlan(stack.input_vertical, r)
        self.input_horizontal = _ConvPlan(stack.input_horizontal, r)
        self.layers = [_LayerPlan(layer, r, plane(c), plane(c), (B, T, H, W)) for layer in stack.layers]
        last = stack.config.channels
        self.head = [(m.weight.t().expand(B, last, -1), m.bias) for m in (stack.head[1], stack.head[3])]

    def frame(self, t: int) -> None:
        """Everything about frame t that earlier frames and the condition already decide."""
        self.t = t
        self.past_v = self.input_vertical.past(self.embedded, t)
        self.past_h = self.input_horizontal.past(self.embedded, t)
        for layer in self.layers:
            layer.frame(t, self.condition)

    def row(self, y: int) -> None:
        """The vertical stream of every layer for row y, and what it hands to the horizontal stream."""
        self.y = y
        self.row_h = _row_of(self.past_h, y)
        v = self.input_vertical.present_row(self.embedded, self.t, y, _row_of(self.past_v, y))  # [B, W, C]
        for layer in self.layers:
            v = layer.row(v, self.t, y)

    def pixel(self, x: int) -> Tensor:
        """Logits of the code at column x, all codes before it having been put. -> [B, K]."""
        h = self.input_horizontal.present_pixel(self.embedded, self.t, self.y, x, self.row_h[:, x : x + 1])  # [B, 1, C]
        for layer in self.layers:
            h = layer.pixel(h, self.t, self.y, x)
        for weight, bias in self.head:
            h = torch.baddbmm(bias, F.elu(h), weight)
        return h.squeeze(1)

    def put(self, x: int, codes: Tensor) -> None:
        """Record the codes drawn at column x. codes: [B] int64."""
        self.codes[:, self.t, self.y, x] = codes
        r = self.radius
        self.embedded[:, self.t, self.y + r, x + r] = self.stack.embed(codes)


class _ConvPlan:
    """One causal convolution split into the taps of earlier frames and those of the present one."""

    def __init__(self, conv: CausalConv, radius: int):
        self.r = radius
        past = [i for i, (dt, _, _) in enumerate(conv.taps) if dt < 0]
        present = [i for i, (dt, _, _) in enumerate(conv.taps) if dt == 0]
        self.past_taps = [conv.taps[i] for i in past]
        self.present_taps = [conv.taps[i] for i in present]
        self.past_weight = conv.weight[past].flatten(0, 1)  # [taps * Cin, Cout]
        self.present_weight = conv.weight[present].flatten(0, 1)
        self.bias = conv.bias
        # the present taps of a horizontal convolution are adjacent columns ending at this one
        self.left, self.right = self.present_taps[0][2], self.present_taps[-1][2] + 1

    def past(self, planes: Tensor, t: int) -> Tensor:
        """Bias plus the earlier frames' taps for the whole of frame t. planes [B, T, H+2r, W+2r, C] -> [B, H*W, Cout]."""
        B, _, height, width, _ = planes.shape
        H, W, r = height - 2 * self.r, width - 2 * self.r, self.r
        taps = [i for i, (dt, _, _) in enumerate(self.past_taps) if t + dt >= 0]
        if not taps:
            return self.bias.expand(B, H, W, -1)
        seen = torch.cat(
            [planes[:, t + dt, r + dy : r + dy + H, r + dx : r + dx + W] for dt, dy, dx in map(self.past_taps.__getitem__, taps)],
            dim=-1,
        )
        channels = planes.shape[-1]
        weight = torch.cat([self.past_weight[i * channels : (i + 1) * channels] for i in taps])
        return _affine(seen.flatten(1, 2), weight, self.bias).unflatten(1, (H, W))

    def present_row(self, planes: Tensor, t: int, y: int, past: Tensor) -> Tensor:
        """The whole convolution for row y, given its past part [B, W, Cout]. -> [B, W, Cout]."""
        W, r = past.shape[1], self.r
        seen = torch.cat([planes[:, t, y + r + dy, r + dx : r + dx + W] for _, dy, dx in self.present_taps], dim=-1)
        return _affine(seen, self.present_weight, past)

    def present_pixel(self, planes: Tensor, t: int, y: int, x: int, past: Tensor) -> Tensor:
        """The whole horizontal convolution at column x, given its past part [B, 1, Cout]. -> [B, 1, Cout]."""
        seen = planes[:, t, y + self.r, x + self.r + self.left : x + self.r + self.right]  # [B, taps, C]
        return _affine(seen.flatten(1).unsqueeze(1), self.present_weight, past)


@dataclass
class _LayerPlan:
    """Caches of one gated layer: both streams' inputs on every position so far, and the attention's keys and values."""

    layer: GatedPixelLayer
    radius: int
    v_planes: Tensor  # [B, T, H + 2r, W + 2r, C]
    h_planes: Tensor
    shape: tuple[int, int, int, int]
    attention: "_AttentionPlan | None" = field(init=False)

    def __post_init__(self):
        self.vertical = _ConvPlan(self.layer.vertical, self.radius)
        self.horizontal = _ConvPlan(self.layer.horizontal, self.radius)
        self.attention = _AttentionPlan(self.layer.attention, self.shape) if self.layer.attention else None

    def frame(self, t: int, condition: Tensor) -> None:
        conditioned = _affine(condition[:, t].flatten(1, 2), self.layer.condition.weight.t(), None)
        conditioned = conditioned.unflatten(1, condition.shape[2:4])  # [B, H, W, 2C]
        self.past_v = self.vertical.past(self.v_planes, t) + conditioned
        self.past_h = self.horizontal.past(self.h_planes, t) + conditioned

    def row(self, v: Tensor, t: int, y: int) -> Tensor:
        r, W = self.radius, v.shape[1]
        self.v_planes[:, t, y + r, r : r + W] = v
        pre_v = self.vertical.present_row(self.v_planes, t, y, self.past_v[:, y])  # [B, W, 2C]
        self.row_h = _affine(pre_v, self.layer.link.weight.t(), self.past_h[:, y])
        return v + ops.gate(pre_v)

    def pixel(self, h: Tensor, t: int, y: int, x: int) -> Tensor:
        self.h_planes[:, t, y + self.radius, x + self.radius] = h.squeeze(1)
        pre_h = self.horizontal.present_pixel(self.h_planes, t, y, x, self.row_h[:, x : x + 1])
        h = h + _affine(ops.gate(pre_h), self.layer.out.weight.t(), self.layer.out.bias)
        return h if self.attention is None else h + self.attention.pixel(h, t, y, x)


class _AttentionPlan:
    """Keys and values of every position so far; one query at a time."""

    def __init__(self, attention: CausalAttention, shape: tuple[int, int, int, int]):
        B, T, H, W = shape
        self.module, self.grid = attention, (T, H, W)
        C, A = attention.out.in_features, attention.heads
        where = coordinates(T, H, W).to(attention.out.weight).flatten(0, 2)  # [N, 3]
        self.position = attention.qkv.bias + where @ attention.qkv_position.weight.t()  # [N, 3C]
        self.keys = where.new_zeros(B, A, T * H * W, C // A)
        self.values = torch.zeros_like(self.keys)

    def pixel(self, h: Tensor, t: int, y: int, x: int) -> Tensor:
        _, H, W = self.grid
        n = (t * H + y) * W + x
        B, A, _, E = self.keys.shape
        q, k, v = _affine(h, self.module.qkv.weight.t(), self.position[n]).view(B, 3, A, E).unbind(1)  # [B, A, E]
        self.keys[:, :, n], self.values[:, :, n] = k, v
        # [B, A, 1, n + 1]
        scores = (q.unsqueeze(2) * E**-0.5) @ self.keys[:, :, : n + 1].transpose(2, 3)
        attended = torch.softmax(scores, dim=-1) @ self.values[:, :, : n + 1]  # [B, A, 1, E]
        return _affine(attended.view(B, 1, A * E), self.module.out.weight.t(), self.module.out.bias)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight + bias, one product per sample: [B, M, Cin], [Cin, Cout], broadcastable bias -> [B, M, Cout]."""
    batched = weight.expand(x.shape[0], -1, -1)
    return torch.bmm(x, batched) if bias is None else torch.baddbmm(bias, x, batched)


def _row_of(planes: Tensor, y: int) -> Tensor:
    return planes[:, y]


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
