"""Vector quantisation with a codebook that follows the data by moving averages."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvid import ops
from fastvid.nn.codebook import Codebook
from fastvid.nn.options import VECTOR_QUANTIZE, VECTOR_QUANTIZE_FORWARD, refuse
from fastvid.nn.through import past_quantizer


class LossBreakdown(NamedTuple):
    """The parts of the loss before their weights; only the commitment is ever other than 0 here."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class VectorQuantize(nn.Module):
    """Replaces every row by its nearest code; the codebook is the moving average of the rows it stands for.

    Takes the place of vector-quantize-pytorch's layer: its words, its returns, its numbers, its state dict. The options
    that it does not take are listed in fastvid.nn.options, each with what to do instead. A row that holds a NaN or an
    infinity gets code 0 and never moves a codebook.

    dim, codebook_size: width of the input, and K. codebook_dim: D, of each head; projections lead there and back if
                        heads * D is not `dim`.
    decay, eps:         share of the old state kept per batch; Laplace smoothing of the counts. State is float32.
    kmeans_init:        the first batch starts the codebook by `kmeans_iters` steps of k-means.
    use_cosine_sim:     rows and codes are compared at length 1.
    threshold_ema_dead_code: a code whose moving count falls below becomes a row of the batch, and its count this.
    channel_last, accept_image_fmap, accept_3d_fmap: [B, ..., dim], or [B, dim, N] / [B, dim, H, W] / [B, dim, T, H, W].
    commitment_weight:  of the returned loss. freeze_codebook: look up, never learn.
    rotation_trick:     how the gradient passes; None is True where dim > 1, False straight through.
    sync_codebook:      sum statistics over the processes of torch.distributed; None where there are several.
    draw:               ours. "uniform" draws rows as the popular layer does. "distance" draws them in proportion to
                        their squared distance from the nearest code, starts from the first training batch (and k-means,
                        if asked for), and gives a reborn code a count of at least 1. On the CPU uniform draws are the
                        popular layer's own, seed for seed; on other devices, in compiled code and in distributed
                        training they are as fair, but made without waiting for the device.
    Raises:             NotImplementedError for an option that is not taken, TypeError for an unknown one.
    Source:             van den Oord et al. 2017, arXiv:1711.00937; Razavi et al. 2019, arXiv:1906.00446; Fifty et al.
                        2024, arXiv:2410.06424, for the rotation.
    """

    def __init__(
        self, dim: int, codebook_size: int, codebook_dim: int | None = None, heads: int = 1,
        separate_codebook_per_head: bool = False, decay: float = 0.8, eps: float = 1e-5,
        freeze_codebook: bool = False, kmeans_init: bool = False, kmeans_iters: int = 10, sync_kmeans: bool = True,
        use_cosine_sim: bool = False, layernorm_after_project_in: bool = False, threshold_ema_dead_code: float = 0,
        channel_last: bool = True, accept_image_fmap: bool = False, accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0, *, rotation_trick: bool | None = None, sync_codebook: bool | None = None,
        return_zeros_for_masked_padding: bool = True, route_gradients_to_input: bool = True, draw: str = "uniform",
        **others,
    ):
        super().__init__()
        refuse("VectorQuantize", VECTOR_QUANTIZE, others | {"sync_kmeans": sync_kmeans})
        if draw not in ("uniform", "distance"):
            raise ValueError(f"VectorQuantize: `draw` must be 'uniform' or 'distance', got {draw!r}.")
        self.dim, self.codebook_size, self.heads = dim, codebook_size, heads
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.separate_codebook_per_head, self.freeze_codebook = separate_codebook_per_head, freeze_codebook
        self.channel_last, self.accept_image_fmap = channel_last, accept_image_fmap
        self.accept_3d_fmap, self.commitment_weight = accept_3d_fmap, commitment_weight
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.route_gradients_to_input = route_gradients_to_input
        inner = self.codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in = self.project_out = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, inner)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
            self.project_out = nn.Linear(inner, dim)
        dead_below = threshold_ema_dead_code
        self._codebook = Codebook(
            self.codebook_dim, codebook_size, heads if separate_codebook_per_head else 1, decay=decay, eps=eps,
            use_cosine_sim=use_cosine_sim, kmeans_iters=kmeans_iters if kmeans_init else 0, dead_below=dead_below,
            reborn_size=max(1.0, dead_below) if draw == "distance" else dead_below, draw=draw,
            sync=sync_codebook is not False,
        )  # fmt: skip

    def forward(
        self, x: Tensor, indices: None = None, mask: Tensor | None = None, lens: Tensor | None = None,
        topk: None = None, sample_codebook_temp: None = None, freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False, codebook_transform_fn: None = None, ema_update_weight: None = None,
        accum_ema_update: bool = False, ema_update: bool | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantise; in training mode the codebook moves afterwards, and gradients and a loss exist.

        x:       [B, dim] or [B, ..., dim], or channels first as the options say; floating.
        mask:    [B, ...] bool, False for padding; or lens: [B] integers, how many of [B, N, dim] are not padding.
        freeze_codebook: overrides the layer's option for this call.
        Returns: quantized like x; indices int64 [B, ...], with an axis for the heads, if several, at the end, -1 where
                 masked; loss, scalar float32, 0 in evaluation; and a LossBreakdown if asked for.
        Raises:  ValueError for shapes that do not fit, NotImplementedError for an argument that is not taken.
        """
        refuse("VectorQuantize.forward", VECTOR_QUANTIZE_FORWARD, {
            "indices": indices, "topk": topk, "sample_codebook_temp": sample_codebook_temp,
            "codebook_transform_fn": codebook_transform_fn, "ema_update_weight": ema_update_weight,
            "accum_ema_update": accum_ema_update, "ema_update": ema_update,
        })  # fmt: skip
        tokens, grid = self._tokens(x)  # [B, N, dim]
        mask = _mask_of(mask, lens, tokens, grid)  # [B, N]
        row_mask = None if mask is None else self._repeat_for_heads(mask)
        rows = self._rows(self.project_in(tokens), x.dtype, row_mask)
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        near = self._codebook([part.detach() for part in rows], row_mask, self.training and not frozen)
        codes, distances = self._past(rows, near, x.requires_grad and self.route_gradients_to_input)
        quantized, indices = self._as_tokens(codes, near, tokens, mask)
        zero = torch.zeros((), device=x.device)
        priced = self.training and self.commitment_weight > 0
        commitment = self._commitment(codes, distances, tokens, row_mask) if priced else zero
        loss = commitment * self.commitment_weight
        if self.training and torch.is_grad_enabled() and not loss.requires_grad:
            loss.requires_grad_()  # so that a loss without anything trained before it can still be called backward
        out = (self._unflatten(quantized, grid), indices.unflatten(1, grid) if grid else indices[:, 0], loss)
        return (*out, LossBreakdown(commitment, zero, zero, zero)) if return_loss_breakdown else out

    @property
    def codebook(self) -> Tensor:
        """The codes, [K, D], or [A, K, D] if every head has its own."""
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self._codebook.embed.copy_(codes if self.separate_codebook_per_head else codes[None])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes of indices as `forward` returned them (not masked ones).

        indices: [B, ...] int64 in [0, K), heads last.
        Returns: [B, ..., heads * D], channels first if the layer is; heads that share a codebook keep their axis, as in
                 the popular layer. In the dtype that the module was last cast to.
        """
        codes = self._codebook.embed.to(self._codebook.dtype)
        if not self.separate_codebook_per_head:
            codes = codes[0][indices]
        else:
            codes = codes[torch.arange(self.heads, device=indices.device), indices].flatten(-2)
        return codes.movedim(-1, 1) if self._channels_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What evaluation would return as quantized for these indices, up to the channels' place. As above."""
        return self.project_out(self.get_codes_from_indices(indices))

    @property
    def _channels_first(self) -> bool:
        return not self.channel_last or self.accept_image_fmap or self.accept_3d_fmap

    def _tokens(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        """[B, N, dim] and the shape that N was."""
        shapes = {4: "[B, D, H, W]", 5: "[B, D, T, H, W]", None: "[B, ..., D]" if self.channel_last else "[B, D, ...]"}
        wanted = 4 if self.accept_image_fmap else 5 if self.accept_3d_fmap else None
        channels = x.movedim(1, -1) if self._channels_first and x.ndim > 2 else x  # [B, ..., dim]
        if x.ndim < 2 or (wanted and x.ndim != wanted) or channels.shape[-1] != self.dim:
            raise ValueError(
                f"VectorQuantize: `x` must be {shapes[wanted]} with D = {self.dim}, got {list(x.shape)}; "
                "`channel_last`, `accept_image_fmap` and `accept_3d_fmap` say where D is."
            )
        grid = channels.shape[1:-1]
        return channels.flatten(1, -2) if grid else x[:, None], grid

    def _rows(self, inner: Tensor, dtype: torch.dtype, mask: Tensor | None) -> list[Tensor]:
        """What each codebook sees: one list entry a codebook, [M, D]. [B, N, heads * D] -> S times [M, D]."""
        # under autocast a projection is in half precision; codes are compared in the input's, or in float32 at most
        inner = inner.to(torch.float32 if dtype == torch.float64 else dtype)
        split = self._codebook.transform_input(inner.unflatten(2, (self.heads, self.codebook_dim)))  # [B, N, A, D]
        if self.separate_codebook_per_head:
            rows = [head.flatten(0, 1) for head in split.unbind(2)]
        else:
            rows = [split.transpose(1, 2).flatten(0, 2)]
        # not even a NaN in the padding may reach a gradient
        return rows if mask is None else [torch.where(mask[:, None], part, 0) for part in rows]

    def _repeat_for_heads(self, tokens: Tensor) -> Tensor:
        """[B, N, ...] -> [M, ...], a token's value for each row of a codebook that comes of it."""
        heads = 1 if self.separate_codebook_per_head else self.heads
        return tokens[:, None].expand(-1, heads, *tokens.shape[1:]).flatten(0, 2)

    def _heads_last(self, parts: list[Tensor], B: int, N: int) -> Tensor:
        """The inverse of `_rows`: S times [M, ...] -> [B, N, A, ...]."""
        if self.separate_codebook_per_head:
            return torch.stack(parts, dim=1).unflatten(0, (B, N))
        return parts[0].unflatten(0, (B, self.heads, N)).transpose(1, 2)

    def _past(
        self, rows: list[Tensor], near: list[ops.Nearest], routed: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Codes S times [M, D] and squared distances S times [M], with the gradients that training wants."""
        codes, distances = [n.quantized for n in near], [n.squared_distance for n in near]
        if not (self.training and torch.is_grad_enabled() and rows[0].requires_grad):
            return codes, distances
        past = [past_quantizer(*parts, self.rotation_trick) for parts in zip(rows, codes, distances, strict=True)]
        return [code for code, _ in past] if routed else codes, [distance for _, distance in past]

    def _commitment(
        self, codes: list[Tensor], distances: list[Tensor], tokens: Tensor, mask: Tensor | None
    ) -> Tensor:
        D = self.codebook_dim
        if mask is None:
            return sum(part.mean() for part in distances) / (len(distances) * D)
        if D == self.dim and (self.has_projections or self._codebook.use_cosine_sim):
            # the popular layer, given a mask, compares with its input as it came
            wanted = self._repeat_for_heads(tokens).float()
            distances = [(code.detach().float() - wanted).square().sum(dim=1) for code in codes]
        total = sum(torch.where(mask, part, 0).sum() for part in distances)
        return total / (mask.sum() * len(distances) * D)

    def _as_tokens(
        self, codes: list[Tensor], near: list[ops.Nearest], tokens: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Quantized [B, N, dim], and indices [B, N], or [B, N, A] for several heads."""
        quantized = self.project_out(self._heads_last(codes, *tokens.shape[:2]).flatten(2).to(tokens.dtype))
        indices = self._heads_last([n.indices for n in near], *tokens.shape[:2])
        if mask is not None:
            padding = torch.zeros_like(tokens) if self.return_zeros_for_masked_padding else tokens
            quantized = torch.where(mask[..., None], quantized, padding)
            indices = torch.where(mask[..., None], indices, -1)
        return quantized, indices if self.heads > 1 else indices[..., 0]

    def _unflatten(self, quantized: Tensor, grid: torch.Size) -> Tensor:
        if not grid:
            return quantized[:, 0]
        quantized = quantized.unflatten(1, grid)
        return quantized.movedim(-1, 1) if self._channels_first else quantized


def _mask_of(mask: Tensor | None, lens: Tensor | None, tokens: Tensor, grid: torch.Size) -> Tensor | None:
    """The mask as [B, N] bool."""
    if lens is not None:
        if mask is not None or len(grid) != 1:
            raise ValueError("VectorQuantize: `lens` is for one axis of tokens and without `mask`; give `mask` alone.")
        return torch.arange(tokens.shape[1], device=tokens.device) < lens[:, None]
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.shape != (len(tokens), *grid) or not grid:
        raise ValueError(
            f"VectorQuantize: `mask` must be bool {[len(tokens), *grid]}, True where a token counts, "
            f"got {mask.dtype} {list(mask.shape)}."
        )
    return mask.flatten(1)
