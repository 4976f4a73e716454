"""Block-local attention: the layer of video transformers that attends inside the blocks of a grid."""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvid import ops
from fastvid.nn.projected import zeros_as

Block = tuple[int, int, int]  # extents along T, H, W


class BlockCache(NamedTuple):
    """What BlockLocalAttention.step remembers: written for the positions so far, n of a block in raster order."""

    keys: Tensor  # [B, T / bt, H / bh, W / bw, n, A, E]
    values: Tensor  # [B, T / bt, H / bh, W / bw, n, A, E]
    bias: Tensor  # [A, n, n], what distances add to the scores


class BlockLocalAttention(nn.Module):
    """Attention inside non-overlapping blocks of a video grid, with a learned bias for every distance, and an MLP.

    x + to_out(attention(norm(x))), then y + mlp(y); the scores of a query and a key are q k E ** -0.5 plus the sum of
    three learned numbers, one each for their distances along T, H and W.

    dim, heads, dim_head: C, A and E. block: (bt, bh, bw), which must divide the grid.
    causal:     within a block a position sees itself and earlier ones in raster order; `step` then takes a grid
                run by run.
    mlp:        whether the second part is there: layer norm, C to C, ReLU, C to C.
    Parameters: norm, to_qkv [3 A E, C] and to_out [C, A E] without biases; distance_t, _h, _w [A, 2 b - 1], zero at
                first, the middle entry that of distance 0 and later ones for keys that lie further on; mlp.
    State dict: one of the Latent Video Transformer's layer (mha.*, ffn.*, d*_bank) is also loaded.
    Raises:     ValueError for a block that is not three extents from 1.
    Source:     Weissenborn et al. 2020, arXiv:1906.02634, section 3.1; Rakhimov et al. 2020, arXiv:2006.10704.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, block: Block, causal: bool = False, mlp: bool = True):
        super().__init__()
        if len(block) != 3 or min(block) < 1:
            raise ValueError(f"BlockLocalAttention: `block` must be (bt, bh, bw), each from 1, got {block!r}.")
        self.dim, self.heads, self.dim_head, self.block, self.causal = dim, heads, dim_head, tuple(block), causal
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.distance_t, self.distance_h, self.distance_w = (
            nn.Parameter(torch.zeros(heads, 2 * extent - 1)) for extent in self.block
        )
        layers = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(*layers) if mlp else None
        for weight in (*self.to_qkv.weight.detach().chunk(3), self.to_out.weight):
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Attention inside the blocks, and the MLP.

        x:       [B, C, T, H, W], any strides.
        Returns: the same shape, channels last in memory.
        Raises:  ValueError for another number of axes or channels, or a grid that does not divide into blocks.
        """
        if x.ndim != 5 or x.shape[1] != self.dim:
            raise ValueError(f"BlockLocalAttention: the input must be [B, {self.dim}, T, H, W], got {list(x.shape)}.")
        _blocks(x.shape[2:], self.block)
        x = x.movedim(1, -1).contiguous()  # [B, T, H, W, C]
        mask = "causal" if self.causal else "none"
        attended = ops.axial_attention(self._qkv(x), box=self.block, mask=mask, bias=self.bias()).out
        return self._rest(x, attended).movedim(-1, 1)

    def bias(self) -> Tensor:
        """What is added to the scores inside a block. -> [A, n, n], n positions in raster order."""
        return ops.relative_bias((self.distance_t, self.distance_h, self.distance_w), self.block)

    def new_cache(self, batch: int, shape: tuple[int, int, int]) -> BlockCache:
        """An empty cache for `step`, with the bias of these weights. batch: B; shape: T, H, W of the whole grid.

        Raises: ValueError unless causal, or if the grid does not divide into blocks.
        """
        if not self.causal:
            raise ValueError("BlockLocalAttention: a step needs a layer made with causal=True.")
        size = batch, *_blocks(shape, self.block), prod(self.block), self.heads, self.dim_head
        keys, values = (zeros_as(self.to_qkv.weight, *size) for _ in range(2))
        return BlockCache(keys, values, self.bias().detach())

    @torch.no_grad()
    def step(self, x: Tensor, cache: BlockCache, position: Block) -> Tensor:
        """What forward gives at a run of positions of one row, from those and the cache, to which it adds them.

        x:        [B, n, C], for the positions (t, y, x), ..., (t, y, x + n - 1) of one block; all of the block's before
                  them in raster order have been stepped through.
        cache:    made by new_cache, under the same autocast. position: (t, y, x).
        Returns:  [B, n, C]; without gradients.
        Raises:   ValueError for a run that leaves its block's row, or another batch than the cache's.
        """
        (i, t), (j, y), (k, start) = (divmod(p, extent) for p, extent in zip(position, self.block, strict=True))
        (B, *cells), n, (_, bh, bw) = cache.keys.shape[:4], x.shape[1], self.block
        inside = all(0 <= cell < count for cell, count in zip((i, j, k), cells, strict=True))
        if tuple(x.shape) != (B, n, self.dim) or not inside or not 1 <= n <= bw - start:
            grid = tuple(cell * extent for cell, extent in zip(cells, self.block, strict=True))
            wanted = f"[{B}, n, {self.dim}] within a row of a block {self.block} of the grid {grid}"
            raise ValueError(f"BlockLocalAttention.step: `x` must be {wanted}, got {list(x.shape)} at {position}.")
        first = (t * bh + y) * bw + start
        run, so_far = slice(first, first + n), slice(first + n)
        x = x[:, None, None]  # [B, 1, 1, n, C]
        q, *new = self._qkv(x).unbind(-3)  # [B, 1, 1, n, A, E] each
        held = [kept[:, i, j, k] for kept in cache[:2]]  # [B, positions, A, E] each
        for kept, run_of in zip(held, new, strict=True):
            kept[:, run] = run_of[:, 0, 0]
        keys, values = (kept[:, None, None, so_far] for kept in held)
        attended = ops.axial_attention(q, keys, values, axis=3, mask="causal", bias=cache.bias[:, run, so_far]).out
        return self._rest(x, attended)[:, 0, 0]

    def _qkv(self, x: Tensor) -> Tensor:
        """[B, T, H, W, C] -> [B, T, H, W, 3, A, E]"""
        return self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, self.dim_head))

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [B, T, H, W, C], attended [B, T, H, W, A, E] -> what the layer puts out, as x."""
        x = x + self.to_out(attended.flatten(-2))
        return x if self.mlp is None else x + self.mlp(x)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.dim}, heads={self.heads}, dim_head={self.dim_head}, block={self.block}, causal={self.causal}"

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if f"{prefix}mha.w_q" in state_dict:
            _from_latent_video_transformer(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _blocks(grid: tuple[int, ...], block: Block) -> Block:
    """How many blocks there are along T, H and W."""
    if any(extent % b for extent, b in zip(grid, block, strict=True)):
        told = f"the grid {tuple(grid)} must divide into blocks {tuple(block)}; crop or pad it"
        raise ValueError(f"BlockLocalAttention: {told}.")
    return tuple(extent // b for extent, b in zip(grid, block, strict=True))


def _from_latent_video_transformer(state: dict[str, Tensor], prefix: str) -> None:
    """Renames the entries of one of its layers, and turns them as ours lie, in place."""
    qkv = [state.pop(f"{prefix}mha.w_{name}").transpose(1, 2).flatten(0, 1) for name in "qkv"]  # [A * E, C] each
    state[f"{prefix}to_qkv.weight"] = torch.cat(qkv)
    state[f"{prefix}to_out.weight"] = state.pop(f"{prefix}mha.proj.weight")
    for axis in "thw":
        # there a later entry is for a key that lies further back
        state[f"{prefix}distance_{axis}"] = state.pop(f"{prefix}d{axis}_bank").flip(1)
        state.pop(f"{prefix}d{axis}", None)
    state.pop(f"{prefix}mask", None)
    parts = {"mha.layer_norm.": "norm."} | {f"ffn.{i}.": f"mlp.{i}." for i in range(4)}
    for theirs, ours in parts.items():
        for name in ("weight", "bias"):
            if f"{prefix}{theirs}{name}" in state:
                state[f"{prefix}{ours}{name}"] = state.pop(f"{prefix}{theirs}{name}")
