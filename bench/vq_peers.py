"""Everybody who can look up nearest codes, most of them with the codebook's moving average, as contestants of vq_cases.

A way keeps its state of the codebook as it likes and makes it anew for every round, untimed. What it does not do (faiss
has no statistics, the k-means kernels no quantized rows) it is not charged for, so that a ratio never flatters ours.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvid import ops

DECAY, EPS = 0.99, 1e-5
PACKAGES = {"vector-quantize-pytorch": "vector_quantize_pytorch", "faiss": "faiss", "flash-kmeans": "flash_kmeans",
            "flashlib": "flashlib"}  # fmt: skip


class Step(NamedTuple):
    """What one run decided; None for what a way does not do."""

    indices: Tensor  # [N]
    counts: Tensor | None = None  # [K]
    sums: Tensor | None = None  # [K, D]
    codebook: Tensor | None = None  # [K, D], after the step


@dataclass(frozen=True)
class Way:
    """state(x, codebook): made anew per round. run(x, state): what is timed. read(result, state): what it decided.

    precision: of the products that its choices rest on: "float32", "tf32" or "bfloat16".
    """

    name: str
    state: Callable[[Tensor, Tensor], Any]
    run: Callable[[Tensor, Any], Any]
    read: Callable[[Any, Any], Step]
    precision: str = "float32"


def not_installed(name: str) -> str | None:
    """Why the peer of this name cannot run, None where its package is there."""
    package = PACKAGES.get(name)
    found = package is None or importlib.util.find_spec(package) is not None
    return None if found else f"{name} is not installed"


def fastvid_way(statistics: bool = True, precision: str = "exact", name: str = "fastvid") -> Way:
    """The op, and with statistics the update of the codebook, by the backend that a user gets."""

    def run(x: Tensor, state: tuple[Tensor, ...]):
        near = ops.nearest_codebook(x, state[0], statistics=statistics, precision=precision)
        if statistics:
            ops.nearest_codebook_ema_(*state, near.counts, near.sums, DECAY, EPS)
        return near

    def read(near, state) -> Step:
        return Step(near.indices, near.counts, near.sums, state[0]) if statistics else Step(near.indices)

    products = {"exact": "float32", "tf32": "tf32", "bf16": "bfloat16"}[precision]
    return Way(name, lambda x, codebook: fresh_state(codebook), run, read, products)


def fresh_state(codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The moving averages of a codebook that has seen one row per code: e, N = 1, m = e."""
    return codebook.clone(), codebook.new_ones(codebook.shape[0]), codebook.clone()


def layer_way() -> Way:
    """fastvid's layer in training mode."""
    from fastvid.nn import VectorQuantize

    return _layer("fastvid layer", VectorQuantize)


def layer_peer() -> Way:
    """vector-quantize-pytorch's layer in training mode."""
    from vector_quantize_pytorch import VectorQuantize

    return _layer("vector-quantize-pytorch", VectorQuantize)


def _layer(name: str, kind: type) -> Way:
    """A layer with the popular one's words and state; rows that ask for no gradient spare it the way back's work."""

    def state(x: Tensor, codebook: Tensor):
        layer = kind(dim=codebook.shape[1], codebook_size=codebook.shape[0], decay=DECAY, eps=EPS)
        layer = layer.to(codebook.device).train()
        layer._codebook.embed.copy_(codebook)
        layer._codebook.embed_avg.copy_(codebook)
        layer._codebook.cluster_size.fill_(1)
        return layer

    def read(out, layer) -> Step:
        return Step(out[1].flatten(), codebook=layer._codebook.embed[0])

    return Way(name, state, lambda x, layer: layer(x[None]), read)


def torch_peer(rows: int, statistics: bool = True, half: bool = False, compiled: bool = False) -> Way:
    """Plain torch that keeps the scores of only `rows` rows at a time. half: products of bfloat16, sums in float32."""

    def run(x: Tensor, state: tuple[Tensor, ...]):
        codebook = state[0]
        indices = (_choices_in_place if x.device.type == "cpu" else _choices)(x, codebook, rows, half)
        quantized = codebook.to(x.dtype)[indices]  # before the codebook moves
        if not statistics:
            return indices, quantized
        counts = _counts(indices, codebook.shape[0])
        sums = torch.zeros_like(codebook).index_add_(0, indices, x.float())
        move_(*state, counts, sums)
        return indices, quantized, counts, sums

    def read(out, state) -> Step:
        return Step(out[0], out[2], out[3], state[0]) if statistics else Step(out[0])

    return Way(
        "torch.compile" if compiled else "torch", lambda x, codebook: fresh_state(codebook),
        torch.compile(run) if compiled else run, read, "bfloat16" if half else "float32",
    )  # fmt: skip


def _counts(indices: Tensor, K: int) -> Tensor:
    if indices.device.type == "cpu":
        return torch.bincount(indices, minlength=K)
    # bincount would wait for the device, and break a compiled graph in two
    return indices.new_zeros(K).scatter_add_(0, indices, torch.ones_like(indices))


def _choices(x: Tensor, codebook: Tensor, rows: int, half: bool) -> Tensor:
    half_norms = codebook.square().sum(dim=1) / 2  # [K]
    codes = codebook.to(x.dtype) if half else codebook
    chosen = []
    for part in x.split(rows):
        if half:
            scores = half_norms - torch.mm(part, codes.T, out_dtype=torch.float32)  # [rows, K]
        else:
            scores = torch.addmm(half_norms, part.float(), codes.T, alpha=-1)
        chosen.append(scores.argmin(dim=1))
    return torch.cat(chosen)


def _choices_in_place(x: Tensor, codebook: Tensor, rows: int, half: bool) -> Tensor:
    """The same into one buffer of scores: on a CPU fresh memory for each chunk costs more than half the time again."""
    if half:
        raise NotImplementedError("products of bfloat16 with sums in float32 are for GPUs")
    half_norms = codebook.square().sum(dim=1) / 2  # [K]
    buffer, indices = x.new_empty(min(rows, len(x)), len(codebook)), x.new_empty(len(x), dtype=torch.int64)
    for part, chosen in zip(x.split(rows), indices.split(rows), strict=True):
        torch.argmin(torch.addmm(half_norms, part, codebook.T, alpha=-1, out=buffer[: len(part)]), 1, out=chosen)
    return indices


def move_(codebook: Tensor, size: Tensor, total: Tensor, counts: Tensor, sums: Tensor) -> None:
    """The moving average in torch's own words; float64 tensors make it the truth of the gate."""
    size.lerp_(counts.to(size.dtype), 1 - DECAY)
    total.lerp_(sums, 1 - DECAY)
    seen = size.sum()
    smoothed = (size + EPS) / (seen + EPS * size.numel()) * seen
    codebook.copy_(total / smoothed[:, None])


def faiss_peer() -> Way:
    """faiss on a CPU: the exhaustive search alone, its index made beforehand."""
    import faiss

    def state(x: Tensor, codebook: Tensor):
        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatL2(codebook.shape[1])
        index.add(codebook.numpy())
        return index

    def read(out, index) -> Step:
        return Step(torch.from_numpy(out[1]).flatten())

    return Way("faiss", state, lambda x, index: index.search(x.numpy(), 1), read)


def kmeans_peer(name: str, statistics: bool = True) -> Way:
    """One step of flash-kmeans or flashlib: their assignment, and with statistics their update and the moving average.

    They take codes in the rows' dtype. Norms of the rows, which flash-kmeans wants, are made beforehand.
    """
    if name == "flash-kmeans":
        assign = importlib.import_module("flash_kmeans.assign_euclid_triton").euclid_assign_triton
        update = importlib.import_module("flash_kmeans").triton_centroid_update_sorted_euclid
    else:
        kmeans = importlib.import_module("flashlib.primitives.kmeans")
        assign, update = kmeans.euclid_assign_triton, kmeans.triton_centroid_update_sorted_euclid

    def state(x: Tensor, codebook: Tensor):
        norms = (x.float().square().sum(dim=1)[None],) if name == "flash-kmeans" else ()
        return fresh_state(codebook), norms

    def run(x: Tensor, given):
        state, norms = given
        K, D = state[0].shape
        codes = state[0].to(x.dtype)[None]
        indices = assign(x[None], codes, *norms)  # [1, N] int32
        if not statistics:
            return (indices,)
        sums, counts = x.new_zeros(1, K, D, dtype=torch.float32), x.new_zeros(1, K, dtype=torch.int32)
        update(x[None], indices, codes, centroid_sums=sums, centroid_cnts=counts, calculate_new=False)
        move_(*state, counts[0], sums[0])
        return indices, counts, sums

    def read(out, given) -> Step:
        indices = out[0][0].long()
        return Step(indices, out[1][0].long(), out[2][0], given[0][0]) if statistics else Step(indices)

    return Way(name, state, run, read, "bfloat16")
