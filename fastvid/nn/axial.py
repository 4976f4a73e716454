"""Axial attention as other packages have it: along each axis of a grid, the results summed or one after the other."""

import math

from torch import Tensor, nn

from fastvid.nn.projected import Projection, self_attention


class SelfAttention(nn.Module):
    """Multi-head attention over a sequence: what one axis of AxialAttention holds.

    dim, heads: C and A. dim_heads: the width of a head, C / A by default.
    Parameters: to_q [A E, C] and to_kv [2 A E, C], keys first, without biases; to_out [C, A E] with one.
    Raises:     ValueError if A does not divide C and `dim_heads` is None.
    Source:     axial-attention 0.6.1, whose layer of this name has the same parameters.
    """

    def __init__(self, dim: int, heads: int, dim_heads: int | None = None):
        super().__init__()
        if dim_heads is None and (heads < 1 or dim % heads):
            raise ValueError(
                f"SelfAttention: `heads` must divide `dim`, got {heads} and {dim}; pass `dim_heads` for another width."
            )
        self.heads, self.dim_heads = heads, dim // heads if dim_heads is None else dim_heads
        hidden = self.heads * self.dim_heads
        self.to_q = nn.Linear(dim, hidden, bias=False)
        self.to_kv = nn.Linear(dim, 2 * hidden, bias=False)
        self.to_out = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> the same shape."""
        return self.along(x[:, None, None], 3)[:, 0, 0]

    def along(self, grid: Tensor, axis: int) -> Tensor:
        """[B, T, H, W, C] -> the same shape, contiguous: attention along axis 1, 2 or 3."""
        return self_attention(grid, [self.projection()], [axis], self.heads, bias=self.to_out.bias)

    def projection(self) -> Projection:
        """The weights of queries, keys, values and of the way out."""
        return self.to_q.weight, *self.to_kv.weight.chunk(2), self.to_out.weight


class PreNorm(nn.Module):
    """Layer norm before attention, with the parameters of axial-attention's layer of this name.

    dim: C. fn: a SelfAttention.
    """

    def __init__(self, dim: int, fn: SelfAttention):
        super().__init__()
        self.fn, self.norm = fn, nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> the same shape."""
        return self.fn(self.norm(x))

    def along(self, grid: Tensor, axis: int) -> Tensor:
        """[B, T, H, W, C] -> the same shape, contiguous: attention along axis 1, 2 or 3."""
        return self.fn.along(self.norm(grid), axis)


class AxisAttention(nn.Module):
    """Attention along one axis of a tensor, all others being batch; nothing is permuted in memory for it.

    axis:      of the input, not the first. channel_axis: where its C channels are.
    fn:        SelfAttention or PreNorm: what attends. The parameters are those of axial-attention's PermuteToFrom.
    """

    def __init__(self, axis: int, channel_axis: int, fn: SelfAttention | PreNorm):
        super().__init__()
        self.axis, self.channel_axis, self.fn = axis, channel_axis, fn

    def forward(self, x: Tensor) -> Tensor:
        """[B, ..., C, ...] -> the same shape, contiguous."""
        last = x.movedim(self.channel_axis, -1)  # [B, ..., C]
        grid, axis = _grid(last, self.axis - (self.axis > self.channel_axis))
        return self.fn.along(grid, axis).view(last.shape).movedim(-1, self.channel_axis).contiguous()

    def extra_repr(self) -> str:
        """Which axes, for printing."""
        return f"axis={self.axis}, channel_axis={self.channel_axis}"


class AxialAttention(nn.Module):
    """Attention along every axis of a grid, with parameters of its own for each: axial-attention's layer.

    dim:            C, the width of the input. heads: A. dim_heads: the width of a head, C / A by default.
    num_dimensions: of the grid; dim_index: where in the input its channels are, -1 or 1 as a rule.
    sum_axial_out:  True adds the results of all axes up, False hands each axis' result to the next.
    Parameters:     axial_attentions.<i>.fn.to_q, .to_kv and .to_out, named, shaped and drawn as the package's, so that
                    state dicts load both ways. Up to three axes are computed in one pass; more, one by one.
    Raises:         ValueError if A does not divide C and `dim_heads` is None, or there is no axis `dim_index` for
                    channels.
    Source:         Ho et al. 2019, arXiv:1912.12180; the words are those of axial-attention 0.6.1.
    """

    def __init__(
        self, dim: int, num_dimensions: int = 2, heads: int = 8, dim_heads: int | None = None, dim_index: int = -1,
        sum_axial_out: bool = True,
    ):  # fmt: skip
        super().__init__()
        total = num_dimensions + 2
        self.dim, self.total_dimensions, self.sum_axial_out = dim, total, sum_axial_out
        self.dim_index = dim_index if dim_index > 0 else dim_index + total
        if num_dimensions < 1 or not 0 < self.dim_index < total:
            raise ValueError(
                f"AxialAttention: `dim_index` must be an axis after the first of the {total} that `num_dimensions` = "
                f"{num_dimensions} makes, got {dim_index}; -1 has channels last."
            )
        self.axial_attentions = nn.ModuleList(
            AxisAttention(axis, self.dim_index, SelfAttention(dim, heads, dim_heads))
            for axis in range(1, total) if axis != self.dim_index
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Attention along all axes.

        x:       [B, ..., C, ...], C at `dim_index`, any strides.
        Returns: the same shape, contiguous; `dim_index` -1 needs no copy for that.
        Raises:  ValueError for another number of axes or channels.
        """
        if x.ndim != self.total_dimensions or x.shape[self.dim_index] != self.dim:
            raise ValueError(
                f"AxialAttention: the input must have {self.total_dimensions} axes and {self.dim} channels at axis "
                f"{self.dim_index}, got {list(x.shape)}."
            )
        if self.sum_axial_out:
            return self._summed(x)
        for along in self.axial_attentions:
            x = along(x)
        return x

    def _summed(self, x: Tensor) -> Tensor:
        if self.total_dimensions > 5:
            return sum(along(x) for along in self.axial_attentions)
        last = x.movedim(self.dim_index, -1)  # [B, ..., C]
        held = [along.fn for along in self.axial_attentions]
        axes = [_grid(last, axis)[1] for axis in range(1, last.ndim - 1)]
        bias = sum(fn.to_out.bias for fn in held)
        out = self_attention(_grid(last, 1)[0], [fn.projection() for fn in held], axes, held[0].heads, bias=bias)
        return out.view(last.shape).movedim(-1, self.dim_index).contiguous()


class AxialBlock(nn.Module):
    """VideoGPT's axial attention: the sum of attention along W, H and T, each with projections of its own.

    dim, heads: C and A; the heads are C / A wide.
    Parameters: attn_w, attn_h and attn_t, each w_qs, w_ks, w_vs [C, C] without biases and fc [C, C] with one, named and
                shaped as VideoGPT's, so that its state dicts load.
    Raises:     ValueError if A does not divide C.
    Source:     Yan et al. 2021, arXiv:2104.10157; the layer of this name in the authors' code.
    """

    def __init__(self, dim: int, heads: int = 2):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"AxialBlock: `heads` must divide `dim`, got {heads} and {dim}.")
        self.dim, self.heads = dim, heads
        self.attn_w, self.attn_h, self.attn_t = (_Projections(dim) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Attention along the three axes.

        x:       [B, C, T, H, W], as VideoGPT's convolutions have it; any strides.
        Returns: the same shape, channels last in memory.
        Raises:  ValueError for another number of axes or channels.
        """
        if x.ndim != 5 or x.shape[1] != self.dim:
            raise ValueError(f"AxialBlock: the input must be [B, {self.dim}, T, H, W], got {list(x.shape)}.")
        parts = (self.attn_w, self.attn_h, self.attn_t)
        projections = [(part.w_qs.weight, part.w_ks.weight, part.w_vs.weight, part.fc.weight) for part in parts]
        bias = sum(part.fc.bias for part in parts)
        return self_attention(x.movedim(1, -1), projections, (3, 2, 1), self.heads, bias=bias).movedim(-1, 1)


class _Projections(nn.Module):
    """The projections of one axis as VideoGPT names and draws them; AxialBlock computes with them."""

    def __init__(self, dim: int):
        super().__init__()
        self.w_qs, self.w_ks, self.w_vs = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.fc = nn.Linear(dim, dim)
        for layer in (self.w_qs, self.w_ks, self.w_vs, self.fc):
            nn.init.normal_(layer.weight, std=dim**-0.5)


def _grid(x: Tensor, axis: int) -> tuple[Tensor, int]:
    """[B, ..., C] as [B, T, H, W, C], and where the axis is there; a view wherever memory allows one."""
    if x.ndim <= 5:
        lacking = 5 - x.ndim
        return x[(slice(None), *(None,) * lacking)], axis + lacking
    before, after = math.prod(x.shape[1:axis]), math.prod(x.shape[axis + 1 : -1])
    return x.reshape(x.shape[0], before, x.shape[axis], after, x.shape[-1]), 2
