"""The cached PixelCNN of fast-pixel-cnn, in torch: the peer that the sampling plan is measured against.

Nothing is computed twice that depends on a code: hidden states are kept, the vertical stack advances one row at a time,
the horizontal stack one pixel at a time. What the method does not have is a plan by frame: the taps of earlier frames
and the condition's 1x1 are part of each row's and each pixel's own product, as a convolution over a cache has them.

Each layer's share of a step is one matrix product over everything that it reads (taps, condition, vertical features),
which is faster than one product per source. Views are made once per row. Attention, which the method does not know, has
its keys and values cached, as transformers do.

Source: Ramachandran et al. 2017, arXiv:1704.06001, read for a network with a time axis.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid import ops
from fastvid.nn import GatedPixelStack
from fastvid.nn.attention import coordinates
from fastvid.sampling import Noise


@torch.no_grad()
def sample_cached(stack: GatedPixelStack, condition: Tensor, noise: Noise, temperature: float = 1.0) -> Tensor:
    """Codes by caches alone: those of fastvid.sampling.sample_naive.

    condition: [B, T, H, W, condition_channels], floating; noise names B samples; temperature > 0.
    Returns:   [B, T, H, W] int64. Raises ValueError for a stack with axial attention or active dropout.
    """
    cached = CachedPixelCNN(stack, condition)
    _, T, H, W, _ = condition.shape
    for t in range(T):
        for y in range(H):
            cached.row(t, y)
            gumbel = noise.row(t, y, W, stack.config.codes, condition.device)
            for x in range(W):
                cached.put(x, ops.draw(cached.pixel(x), gumbel[:, x], temperature))
    return cached.codes


class CachedPixelCNN:
    """Hidden states of every position so far. Call `row(t, y)`, then `pixel(x)` and `put(x, codes)` for every x.

    Rows are taken in raster order, or again; `fill(codes)` stands for all the rows before one.
    """

    def __init__(self, stack: GatedPixelStack, condition: Tensor):
        if any(layer.attention is not None and layer.attention.axial for layer in stack.layers):
            raise ValueError("CachedPixelCNN: axial attention is not cached; give a stack with wavefront=False.")
        if stack.training and stack.config.dropout:
            raise ValueError("CachedPixelCNN: the stack is in training mode, where dropout is active; call .eval().")
        B, T, H, W = condition.shape[:4]
        self.stack, self.condition, self.radius = stack, condition, stack.config.kernel // 2
        self.codes = torch.zeros(B, T, H, W, dtype=torch.int64, device=condition.device)
        self.embedded = self._plane(stack.config.channels)
        self.input_vertical = _Product(self, self.embedded, stack.input_vertical)
        self.input_horizontal = _Product(self, self.embedded, stack.input_horizontal)
        self.layers = [_CachedLayer(self, layer) for layer in stack.layers]
        self.head = [(linear.weight.t(), linear.bias) for linear in (stack.head[1], stack.head[3])]

    def row(self, t: int, y: int) -> None:
        """The vertical stack of row y of frame t, and the views that its pixels will read."""
        self.t, self.y, r, W = t, y, self.radius, self.condition.shape[3]
        v = self.input_vertical.whole_row(t, y)  # [B, W, C]
        self.input_horizontal.open_row(t, y)
        for layer in self.layers:
            v = layer.row(v, t, y, self.condition[:, t, y])
        self.embedded_row = self.embedded[:, t, y + r, r : r + W].unbind(1)

    def pixel(self, x: int) -> Tensor:
        """Logits of the code at column x. -> [B, K]."""
        h = self.input_horizontal.pixel(x)  # [B, C]
        for layer in self.layers:
            h = layer.pixel(h, x)
        for weight, bias in self.head:
            h = torch.addmm(bias, F.elu(h), weight)
        return h

    def put(self, x: int, codes: Tensor) -> None:
        """Record the codes drawn at column x. codes: [B] int64."""
        self.codes[:, self.t, self.y, x] = codes
        self.embedded_row[x].copy_(F.embedding(codes, self.stack.embed.weight))

    def fill(self, codes: Tensor) -> Tensor:
        """Take the hidden states of given codes from one run of the whole network. -> its logits [B, T, H, W, K]."""
        r, (_, _, H, W) = self.radius, codes.shape
        self.codes.copy_(codes)
        self.embedded[:, :, r : r + H, r : r + W] = self.stack.embed(codes)
        hooks = [own.watch(layer) for own, layer in zip(self.layers, self.stack.layers, strict=True)]
        try:
            return self.stack(codes, self.condition)
        finally:
            for hook in (hook for pair in hooks for hook in pair):
                hook.remove()

    def _plane(self, channels: int) -> Tensor:
        # zero borders, so that no tap needs a bounds check
        B, T, H, W = self.condition.shape[:4]
        return self.condition.new_zeros(B, T, H + 2 * self.radius, W + 2 * self.radius, channels)


class _CachedLayer:
    def __init__(self, net: CachedPixelCNN, layer):
        C = layer.out.in_features
        self.radius, self.v_plane, self.h_plane = net.radius, net._plane(C), net._plane(C)
        condition, link = layer.condition.weight.t(), layer.link.weight.t()
        self.vertical = _Product(net, self.v_plane, layer.vertical, condition)
        self.horizontal = _Product(net, self.h_plane, layer.horizontal, condition, link)
        self.out_weight, self.out_bias = layer.out.weight.t(), layer.out.bias
        self.attention = _CachedAttention(layer.attention, net.condition) if layer.attention else None

    def row(self, v: Tensor, t: int, y: int, condition: Tensor) -> Tensor:
        r, W = self.radius, v.shape[1]
        self.v_plane[:, t, y + r, r : r + W] = v
        pre_v = self.vertical.whole_row(t, y, condition)  # [B, W, 2C]
        self.h_row = self.h_plane[:, t, y + r, r : r + W].unbind(1)
        self.horizontal.open_row(t, y, condition, pre_v)
        if self.attention:
            self.attention.open_row(t, y)
        return v + ops.gate(pre_v)

    def pixel(self, h: Tensor, x: int) -> Tensor:
        self.h_row[x].copy_(h)
        h = torch.addmm(self.out_bias, ops.gate(self.horizontal.pixel(x)), self.out_weight).add_(h)
        return h if self.attention is None else self.attention.pixel(h, x).add_(h)

    def watch(self, layer) -> list:
        """Hooks that keep what a run of the network hands to this layer and to its attention."""

        def keep(_, inputs) -> None:
            r, (_, _, H, W, _) = self.radius, inputs[0].shape
            for plane, values in zip((self.v_plane, self.h_plane), inputs, strict=False):
                plane[:, :, r : r + H, r : r + W] = values

        hooks = [layer.register_forward_pre_hook(keep)]
        if self.attention:
            hooks.append(layer.attention.register_forward_pre_hook(lambda _, inputs: self.attention.fill(inputs[0])))
        return hooks


class _CachedAttention:
    """Keys and values of every position so far."""

    def __init__(self, attention, condition: Tensor):
        B, T, H, W = condition.shape[:4]
        C, A = attention.out.in_features, attention.heads
        self.height, self.width, self.heads, self.scale = H, W, A, (C // A) ** -0.5
        self.qkv = attention.qkv.weight.t()
        self.out_weight, self.out_bias = attention.out.weight.t(), attention.out.bias
        where = coordinates(T, H, W).to(condition).flatten(0, 2)  # [N, 3]
        self.position = torch.addmm(attention.qkv.bias, where, attention.qkv_position.weight.t())  # [N, 3C]
        self.keys = condition.new_zeros(B * A, C // A, T * H * W)  # so that scores run along memory
        self.values = condition.new_zeros(B * A, T * H * W, C // A)

    def open_row(self, t: int, y: int) -> None:
        self.first = (t * self.height + y) * self.width

    def pixel(self, h: Tensor, x: int) -> Tensor:
        """What the position at column x attends to. [B, C] -> [B, C]."""
        n, (B, C) = self.first + x, h.shape
        qkv = torch.addmm(self.position[n], h, self.qkv)  # [B, 3C]
        q, k, v = qkv.view(B, 3, self.heads, -1).transpose(0, 1).flatten(1, 2)  # [B A, E] each
        self.keys[:, :, n], self.values[:, n] = k, v
        scores = torch.bmm(q.unsqueeze(1), self.keys[:, :, : n + 1]).mul_(self.scale)  # [B A, 1, n + 1]
        seen = torch.bmm(torch.softmax(scores, dim=2), self.values[:, : n + 1])  # [B A, 1, E]
        return torch.addmm(self.out_bias, seen.view(B, C), self.out_weight)

    def fill(self, h: Tensor) -> None:
        """Keys and values of a whole grid. h: [B, T, H, W, C]."""
        qkv = (h.flatten(1, 3) @ self.qkv + self.position).unflatten(2, (3, self.heads, -1))  # [B, N, 3, A, E]
        _, k, v = (part.transpose(1, 2).flatten(0, 1) for part in qkv.unbind(2))  # [B A, N, E] each
        self.keys.copy_(k.transpose(1, 2))
        self.values.copy_(v)


class _Product:
    """A convolution over a cached plane and 1x1s over other inputs, as one matrix product per row or pixel."""

    def __init__(self, net: CachedPixelCNN, plane: Tensor, conv, *others: Tensor):
        self.plane, self.radius, self.width = plane, net.radius, net.condition.shape[3]
        self.bias = conv.bias
        self.runs = _runs(conv.taps)
        weight = [conv.weight.flatten(0, 1), *others]  # [inputs, Cout] in all
        # the first frames have no earlier ones: their taps, which come first, are left out rather than fed zeros
        whole, channels = torch.cat(weight), plane.shape[-1]
        dead = [sum(t + dt < 0 for dt, _, _ in conv.taps) for t in range(plane.shape[1])]
        self.weights = [whole[channels * n :] for n in dead]

    def open_row(self, t: int, y: int, *others: Tensor) -> None:
        """Views of what each pixel of row y reads. others: [B, W, inputs] each."""
        views = [run.unbind(1) for run in self._views(t, y)] + [other.unbind(1) for other in others]
        self.seen, self.weight = list(zip(*views, strict=True)), self.weights[t]

    def pixel(self, x: int) -> Tensor:
        """The product at column x. -> [B, Cout]."""
        return torch.addmm(self.bias, torch.cat(self.seen[x], dim=1), self.weight)

    def whole_row(self, t: int, y: int, *others: Tensor) -> Tensor:
        """The product at every column of row y. others: [B, W, inputs] each. -> [B, W, Cout]."""
        seen = torch.cat([*self._views(t, y), *others], dim=2)
        return torch.addmm(self.bias, seen.flatten(0, 1), self.weights[t]).unflatten(0, seen.shape[:2])

    def _views(self, t: int, y: int) -> list[Tensor]:
        """One view per run of adjacent columns, overlapping in memory. -> [B, W, columns * C] each."""
        views = []
        for dt, dy, dx, columns in self.runs:
            if t + dt >= 0:
                line = self.plane[:, t + dt, y + self.radius + dy, self.radius + dx :]  # [B, columns, C]
                size = (line.shape[0], self.width, columns * line.shape[2])
                views.append(line.as_strided(size, line.stride()))
        return views


def _runs(taps) -> list[tuple[int, int, int, int]]:
    """Taps as (dt, dy, first dx, how many): neighbours in a row lie side by side in memory."""
    runs: list[tuple[int, int, int, int]] = []
    for dt, dy, dx in taps:
        if runs and runs[-1][:2] == (dt, dy) and runs[-1][2] + runs[-1][3] == dx:
            runs[-1] = (*runs[-1][:3], runs[-1][3] + 1)
        else:
            runs.append((dt, dy, dx, 1))
    return runs
