"""spectral_norm and its gradient by Triton: a launch for each pass, over all weights, and what is compiled ahead."""

import contextlib
import functools
from itertools import accumulate

import torch
import triton
import triton.language as tl
from fastvid.kernels.common.variant import Variant
from fastvid.kernels.spectral_norm import triton_kernels as kernels
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MAX_ELEMENTS = 2**31
TILE = {"BLOCK_R": 16, "BLOCK_C": 256}  # rows of a weight that a program goes along
UNEVEN = {"BLOCK_R": 16, "BLOCK_C": 128}  # half as wide, as masks of single elements would spill on gfx942
RUN, VECTOR = 4096, 1024  # elements at a time: of a weight, of a vector
WARPS = 4


def why_not(weights: list[Tensor], u: list[Tensor], v: list[Tensor], *_) -> str | None:
    """What these kernels cannot do about such arguments, in a few words; None where they serve."""
    if not weights:
        return "needs a weight"
    if weights[0].dtype not in KINDS or any(weight.dtype != weights[0].dtype for weight in weights):
        told = ", ".join(sorted({str(weight.dtype) for weight in weights}))
        return f"takes weights that are all float32, all bfloat16 or all float16, got {told}"
    if sum(weight.numel() for weight in weights) >= MAX_ELEMENTS or not all(weight.numel() for weight in weights):
        return f"takes weights with elements, up to {MAX_ELEMENTS} together"
    if not (weights[0].is_cuda or INTERPRETED):
        return f"needs a CUDA tensor, got {weights[0].device.type}"
    return None


def why_not_backward(grads: list[Tensor], weights: list[Tensor], *_) -> str | None:
    """What the kernels of the gradient cannot do about such arguments; None where they serve."""
    if any(grad.dtype != weight.dtype for grad, weight in zip(grads, weights, strict=True)):
        return "takes gradients of their weights' dtype"
    return why_not(weights, [], [])


def _on(x: Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.lru_cache(64)
def _cut(sizes: tuple[tuple[int, int], ...], even: tuple[bool, ...], device: torch.device):
    """Pieces and runs of the weights of one evenness, [count, 2] each: the weight, and which of its own."""
    made = {}
    for kind in set(even):
        chosen = [i for i, is_even in enumerate(even) if is_even == kind]
        pieces = [(i, k) for i in chosen for k in range(triton.cdiv(sizes[i][0], TILE["BLOCK_R"]))]
        runs = [(i, k) for i in chosen for k in range(triton.cdiv(sizes[i][0] * sizes[i][1], RUN))]
        made[kind] = tuple(torch.tensor(some, dtype=torch.int64, device=device) for some in (pieces, runs))
    return made


def _before(counts: list[int]) -> list[int]:
    """How many there are in all before each."""
    return [0, *accumulate(counts)][:-1]


class _Launch:
    """The table of a call, its scratch, and what is gone over.

    pointers: of each weight the tensors of the table's first columns, None for what nobody reads.
    """

    def __init__(self, pointers: list[tuple[Tensor | None, ...]], sizes: list[tuple[int, int]], sums: bool):
        first = pointers[0][0]
        pieces = [triton.cdiv(rows, TILE["BLOCK_R"]) for rows, _ in sizes]
        runs = [triton.cdiv(rows * cols, RUN) for rows, cols in sizes]
        wide = [count * cols for count, (_, cols) in zip(pieces, sizes, strict=True)]
        columns = (_before(pieces), pieces, _before([rows for rows, _ in sizes]), _before(wide), _before(runs), runs)
        at = [[0 if tensor is None else tensor.data_ptr() for tensor in some] for some in pointers]
        table = [(*a, *size, *rest) for a, size, *rest in zip(at, sizes, *columns, strict=True)]
        self.table = torch.tensor(table, dtype=torch.int64).to(first.device)
        even = tuple(all(p % 16 == 0 for p in a) and cols % 8 == 0 for a, (_, cols) in zip(at, sizes, strict=True))
        self.shares = _cut(tuple(sizes), even, first.device)
        self.kind, self.device = KINDS[first.dtype], first.device
        fresh = lambda count, dtype=torch.float32: torch.empty(count, dtype=dtype, device=first.device)  # noqa: E731
        self.products = fresh(sum(rows for rows, _ in sizes))
        self.scales, self.sums = fresh(sum(pieces) if sums else 0), fresh(sum(wide) if sums else 0)
        self.run_products = fresh(sum(runs), torch.float64)

    def sweep(self, first: bool, sums: bool) -> None:
        for even, (pieces, _) in self.shares.items():
            kernels._sweep_kernel[len(pieces),](
                self.table, pieces, self.products, self.scales, self.sums, KIND=self.kind, FIRST=first, WITH_SUMS=sums,
                EVEN=even, **(TILE if even else UNEVEN), num_warps=WARPS, num_stages=2,
            )  # fmt: skip

    def runs(self, kernel, *args: Tensor) -> None:
        for even, (_, runs) in self.shares.items():
            kernel[len(runs),](
                self.table, runs, *args, KIND=self.kind, EVEN=even, BLOCK=RUN, num_warps=WARPS, num_stages=1
            )


def _matrix(weight: Tensor, dim: int) -> Tensor:
    return weight if dim == 0 and weight.is_contiguous() else weight.movedim(dim, 0).contiguous()


def _sizes(weights: list[Tensor], dims: list[int]) -> list[tuple[int, int]]:
    rows = [weight.shape[dim] for weight, dim in zip(weights, dims, strict=True)]
    return [(count, weight.numel() // count) for weight, count in zip(weights, rows, strict=True)]


def spectral_norm(
    weights: list[Tensor], u: list[Tensor], v: list[Tensor], iterations: int, eps: float, dims: list[int]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """The launcher: arguments and results as of the reference.

    Raises: NotImplementedError with the reason of `why_not`.
    """
    if reason := why_not(weights, u, v):
        raise NotImplementedError(f"spectral_norm: triton {reason}.")
    out = [torch.empty_like(weight) for weight in weights]
    u, v = ([one.contiguous() for one in ones] for ones in (u, v))
    left, right = ([torch.empty_like(one) for one in ones] if iterations else [] for ones in (u, v))
    sources = [w if w.stride() == to.stride() else torch.empty_like(to).copy_(w)
               for w, to in zip(weights, out, strict=True)]  # fmt: skip
    matrices = [_matrix(weight, dim) for weight, dim in zip(weights, dims, strict=True)]
    new = (left, right) if iterations else ([None] * len(u),) * 2
    sigma = u[0].new_empty(len(weights))
    with _on(sigma):
        launch = _Launch(list(zip(matrices, sources, out, u, v, *new, strict=True)), _sizes(weights, dims),
                         sums=iterations > 0)  # fmt: skip
        if not iterations:
            launch.sweep(True, False)
            kernels._weigh_kernel[len(weights),](
                launch.table, launch.products, sigma, BLOCK=VECTOR, num_warps=WARPS, num_stages=1
            )
        for k in range(iterations):
            launch.sweep(k == 0, True)
            kernels._conclude_kernel[len(weights),](
                launch.table, launch.products, launch.scales, launch.sums, sigma, eps, BLOCK=VECTOR, num_warps=WARPS,
                num_stages=1,
            )  # fmt: skip
        launch.runs(kernels._divide_kernel, sigma)
    return out, left, right, sigma


def spectral_norm_backward(
    grads: list[Tensor], weights: list[Tensor], u: list[Tensor], v: list[Tensor], sigma: Tensor, dims: list[int]
) -> tuple[list[Tensor]]:
    """The launcher of the gradients. Raises: NotImplementedError with the reason of `why_not_backward`."""
    if reason := why_not_backward(grads, weights):
        raise NotImplementedError(f"spectral_norm_backward: triton {reason}.")
    matrices, given = ([_matrix(t, d) for t, d in zip(some, dims, strict=True)] for some in (weights, grads))
    made = [torch.empty_like(matrix) for matrix in matrices]
    none, u, v = [None] * len(u), [one.contiguous() for one in u], [one.contiguous() for one in v]
    with _on(sigma):
        launch = _Launch(list(zip(matrices, given, made, u, v, none, none, strict=True)), _sizes(weights, dims), False)
        launch.runs(kernels._product_kernel, launch.run_products)
        for even, (pieces, _) in launch.shares.items():
            kernels._move_kernel[len(pieces),](
                launch.table, pieces, launch.run_products, sigma.contiguous(), KIND=launch.kind, EVEN=even,
                **(TILE if even else UNEVEN), BLOCK=VECTOR, num_warps=WARPS, num_stages=2,
            )  # fmt: skip
    done = zip(weights, matrices, made, dims, strict=True)
    return ([to if m is w else torch.empty_like(w).copy_(to.movedim(0, d)) for w, m, to, d in done],)


# ---- ahead of time

_LONGS = ("table_ptr", "pieces_ptr", "runs_ptr")


def _variant(kernel, name: str, constants: dict, double: tuple[str, ...] = (), stages: int = 1) -> Variant:
    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument == "eps":
            return "fp32"
        return "*i64:16" if argument in _LONGS else "*fp64:16" if argument in double else "*fp32:16"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    return Variant(kernel, f"{name}_w{WARPS}_s{stages}", signature, constants, WARPS, stages, False, None)


def variants() -> list[Variant]:
    """Every kernel for float32 and bfloat16 weights with columns that 8 divides, and the sweep for others too."""
    tile = f"{TILE['BLOCK_R']}x{TILE['BLOCK_C']}"
    made = []
    for name, kind in (("fp32", tl.float32), ("bf16", tl.bfloat16)):
        even, run, double = {"KIND": kind, "EVEN": True}, {"BLOCK": RUN}, ("products_ptr",)
        step = even | TILE | {"FIRST": True, "WITH_SUMS": True}
        made += [
            _variant(kernels._sweep_kernel, f"sweep_{name}_{tile}", step, stages=2),
            _variant(kernels._sweep_kernel, f"sweep_uneven_{name}", step | {"EVEN": False} | UNEVEN, stages=2),
            _variant(kernels._divide_kernel, f"divide_{name}_{RUN}", even | run),
            _variant(kernels._product_kernel, f"product_{name}_{RUN}", even | run, double),
            _variant(kernels._move_kernel, f"move_{name}_{tile}", even | TILE | {"BLOCK": VECTOR}, double, 2),
        ]  # fmt: skip
    vector = {"BLOCK": VECTOR}
    return [*made, _variant(kernels._weigh_kernel, f"weigh_{VECTOR}", vector),
            _variant(kernels._conclude_kernel, f"conclude_{VECTOR}", vector)]  # fmt: skip
