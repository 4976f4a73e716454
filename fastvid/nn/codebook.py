"""The state of a codebook layer: lookup, moving averages, the start from a first batch, the rebirth of dead codes."""

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from fastvid import ops
from fastvid.nn.draw import distant_rows, distant_start, stratified_rows, uniform_rows


class Codebook(nn.Module):
    """S codebooks of K codes that follow, as moving averages, the rows they stand for. State is float32 whatever the
    module is cast to: in half precision a moving average stalls.

    dim, codebook_size, num_codebooks: D, K and S.
    decay, eps:      share of the old state kept per batch; Laplace smoothing of the counts.
    use_cosine_sim:  rows and codes have length 1.
    kmeans_iters:    k-means steps on the first batch; 0 for none.
    dead_below:      moving count under which a code is reborn at a row of the batch; 0 never.
    reborn_size:     its moving count then.
    draw:            "uniform" or "distance", how rows are drawn from a batch: see fastvid.nn.VectorQuantize.
    sync:            sum statistics over the processes of torch.distributed, if there are several.
    Source:          van den Oord et al. 2017, arXiv:1711.00937, appendix A.1. Names of the state as in
                     vector-quantize-pytorch.
    """

    def __init__(
        self, dim: int, codebook_size: int, num_codebooks: int = 1, *, decay: float = 0.8, eps: float = 1e-5,
        use_cosine_sim: bool = False, kmeans_iters: int = 0, dead_below: float = 0.0, reborn_size: float = 0.0,
        draw: str = "uniform", sync: bool = True,
    ):
        super().__init__()
        self.decay, self.eps, self.use_cosine_sim, self.kmeans_iters = decay, eps, use_cosine_sim, kmeans_iters
        self.dead_below, self.reborn_size, self.draw, self.sync = dead_below, reborn_size, draw, sync
        embed = torch.zeros(num_codebooks, codebook_size, dim)
        if not kmeans_iters:
            nn.init.kaiming_uniform_(embed)
        embed = self.transform_input(embed)
        self.register_buffer("initted", torch.tensor(not (kmeans_iters or draw == "distance")))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        self.register_buffer("embed", embed)
        self.dtype = embed.dtype  # of the codes that are given out: what the module was last cast to
        self._known = (None, 0)  # the tensor `initted`, and its version, that was last seen to be set

    def transform_input(self, rows: Tensor) -> Tensor:
        """Rows as they are compared with codes: of length 1 under cosine similarity. [..., D] -> [..., D]."""
        return F.normalize(rows, dim=-1, eps=1e-6) if self.use_cosine_sim else rows

    def forward(self, rows: list[Tensor], mask: Tensor | None = None, learn: bool = False) -> list[ops.Nearest]:
        """Look rows up in the codebooks as they are; then, to learn, move the codebooks.

        rows:    S tensors [M, D], floating, as `transform_input` leaves them.
        mask:    [M] bool, False for rows that are not to be learned from; None for none.
        Returns: what ops.nearest_codebook says of each; squared_distance is NaN for a masked or non-finite row.
        Raises:  ValueError if a codebook must start from a batch without a finite row.
        """
        if mask is not None:
            # the op leaves out rows that are not finite, so a mask needs neither a copy of the rest nor a wait
            rows = [torch.where(mask[:, None], part, torch.nan) for part in rows]
        # k-means starts at the first batch of any kind, as users of the popular layer expect
        if (self.kmeans_iters or (self.draw == "distance" and learn)) and not self._is_started():
            self._start(rows)
        near = [
            ops.nearest_codebook(part, self._comparable(codes), statistics=learn)
            for part, codes in zip(rows, self.embed, strict=True)
        ]
        if learn:
            self._follow(rows, near)
        return near

    def adopt(self, state: dict[str, Tensor], reborn_size: float) -> None:
        """Hold these very tensors from now on, in place of its own of the same names.

        state: embed, embed_avg, cluster_size, initted. A half precision tensor is kept as a float32 copy.
        """
        self.dtype, self.reborn_size = state["embed"].dtype, reborn_size
        for name in self._buffers:
            half = state[name].is_floating_point() and state[name].dtype.itemsize < 4
            self._buffers[name] = state[name].float() if half else state[name]

    def _comparable(self, codes: Tensor) -> Tensor:
        if not self.use_cosine_sim:
            return codes
        # among codes of length 1 the nearest is the most similar one; a code of length 0 would win too often
        empty = codes.square().sum(dim=1) < 0.5
        return codes + F.pad(4.0 * empty[:, None], (0, codes.shape[1] - 1))

    @torch.no_grad()
    def _follow(self, rows: list[Tensor], near: list[ops.Nearest]) -> None:
        restarts = self.dead_below > 0
        # Looking for dead codes costs nothing on the CPU, and the draws are then those of the popular layer. Elsewhere
        # a look waits for the device, so a row is drawn for every code and the op keeps those of the dead.
        look = (
            self.draw == "uniform" and self.embed.device.type == "cpu"
            and not torch.compiler.is_compiling() and not self._together()
        )  # fmt: skip
        for s, n in enumerate(near):
            drawn = self._draw_for_all(s, rows[s], n.squared_distance) if restarts and not look else None
            self._move(s, *self._over_processes(n.counts, n.sums), self.decay, drawn)
        if restarts and look:
            self._replace_dead(rows, near)

    def _move(self, s: int, counts: Tensor, sums: Tensor, decay: float, restart: Tensor | None = None) -> None:
        ops.nearest_codebook_ema_(
            self.embed[s], self.cluster_size[s], self.embed_avg[s], counts, sums, decay, self.eps,
            dead_below=self.dead_below, restart=restart, restart_size=self.reborn_size,
        )
        if self.use_cosine_sim:
            self.embed[s].copy_(self.transform_input(self.embed[s]))

    def _draw_for_all(self, s: int, rows: Tensor, far: Tensor) -> Tensor:
        """A row of the batch for each code, should it be dead. [M, D], [M] -> [K, D]."""
        codes = self.embed[s]
        if len(rows):
            draw = distant_rows if self.draw == "distance" else stratified_rows
            drawn = self.transform_input(draw(rows, far, len(codes)).to(codes.dtype))
            # even a batch without a finite row must not put a NaN into the codebook
            codes = torch.where(drawn.isfinite(), drawn, codes)
        return self._from_first(codes)

    def _replace_dead(self, rows: list[Tensor], near: list[ops.Nearest]) -> None:
        dead = self.cluster_size < self.dead_below  # [S, K]
        if not dead.any():
            return
        for s, (part, n) in enumerate(zip(rows, near, strict=True)):
            usable, places = part[~n.squared_distance.isnan()], dead[s].nonzero()[:, 0]
            if not len(usable):
                continue
            if len(places) > len(usable):
                # the others wait for a later batch: two codes at one row would be one code
                places = places[torch.randperm(len(places))[:len(usable)]].sort().values
            fresh = self.transform_input(uniform_rows(usable, len(places)).to(self.embed.dtype))
            # code, count and sum move together: a code revived alone would be averaged back to death at once
            self.embed[s, places] = fresh
            self.embed_avg[s, places] = fresh * self.reborn_size
            self.cluster_size[s, places] = self.reborn_size

    def _is_started(self) -> bool:
        if torch.compiler.is_compiling():
            return self._known[0] is not None or bool(self.initted)
        # to ask the device at every step would be to wait for it: ask when somebody has written the flag
        version = 0 if self.initted.is_inference() else self.initted._version
        if self._known[0] is not self.initted or self._known[1] != version:
            self._known = (self.initted, version) if bool(self.initted) else (None, 0)
        return self._known[0] is not None

    @torch.no_grad()
    def _start(self, rows: list[Tensor]) -> None:
        K = self.embed.shape[1]
        starts = []
        for part in rows:
            usable = part[part.isfinite().all(dim=1)].to(self.embed.dtype)
            if not len(usable):
                raise ValueError("VectorQuantize: the first batch has no finite row to start from; give it some data.")
            draw = distant_start if self.draw == "distance" else uniform_rows
            starts.append((usable, self._from_first(self.transform_input(draw(usable, K)))))
        for s, (usable, codes) in enumerate(starts):
            counts = codes.new_ones(K)
            for _ in range(self.kmeans_iters):
                codes, counts = self._kmeans_step(usable, codes)
            self._move(s, counts, codes * counts[:, None], decay=0.0)
        self.initted.fill_(True)
        self._is_started()  # compiled code only knows what was seen before

    def _kmeans_step(self, rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        near = ops.nearest_codebook(rows, self._comparable(codes))
        counts, sums = self._over_processes(near.counts, near.sums)
        means = self.transform_input(sums / counts.clamp(min=1)[:, None])
        return torch.where(counts[:, None] == 0, codes, means), counts

    def _together(self) -> bool:
        return (
            self.sync and distributed.is_available() and distributed.is_initialized()
            and distributed.get_world_size() > 1
        )  # fmt: skip

    def _over_processes(self, counts: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        if self._together():
            counts, sums = counts.clone(), sums.clone()
            distributed.all_reduce(counts)
            distributed.all_reduce(sums)
        return counts, sums

    def _from_first(self, drawn: Tensor) -> Tensor:
        if self._together():
            drawn = drawn.contiguous().clone()
            distributed.broadcast(drawn, src=0)
        return drawn

    def _apply(self, fn, recurse: bool = True):
        # casts go round the state and are only remembered; moves between devices do not
        self.dtype = fn(torch.zeros(0, dtype=self.dtype, device=self.embed.device)).dtype

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


def perplexity(indices: Tensor, codebook_size: int) -> Tensor:
    """How many codes a batch uses, as exp of the entropy of their frequencies: between 1 and `codebook_size`."""
    codes = indices.flatten()
    frequency = codes.new_zeros(codebook_size).scatter_add_(0, codes, torch.ones_like(codes)).double()
    frequency = frequency / frequency.sum()
    return torch.exp(torch.special.entr(frequency).sum()).float()
