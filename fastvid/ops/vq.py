"""Nearest-codebook lookup and the exponential moving average of its codebook."""

import torch
from torch import Tensor

from fastvid.kernels.nearest_codebook import reference
from fastvid.kernels.nearest_codebook.reference import Nearest
from fastvid.ops import _cpu
from fastvid.ops._op import Backend, lazy, never, op, triton

PRECISIONS = ("exact", "tf32", "bf16")
TRITON = "nearest_codebook.triton_gpu"


def _fake(x: Tensor, codebook: Tensor, statistics: bool = True, precision: str = "exact") -> tuple[Tensor, ...]:
    N, (K, D), wide = x.shape[0], codebook.shape, reference.wide_dtype(x, codebook)
    codes = K if statistics else 0
    return (
        x.new_empty(N, dtype=torch.int64), x.new_empty(N, D), x.new_empty(N, dtype=wide),
        x.new_empty(codes, dtype=torch.int64), x.new_empty(codes, D, dtype=wide), x.new_empty((), dtype=torch.int64),
    )  # fmt: skip


def _keep_for_backward(ctx, inputs, output) -> None:
    x, codebook, *_ = inputs
    quantized, indices, distance, counts, _, nonfinite = output
    # quantized and not the codebook: in training that has moved on before the gradient is asked for
    ctx.save_for_backward(x, quantized, indices, distance)
    ctx.codes, ctx.codebook_dtype = codebook.shape[0], codebook.dtype
    ctx.mark_non_differentiable(indices, counts, nonfinite)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_quantized, _indices, grad_distance, _counts, grad_sums, _nonfinite):
    """Of the outputs as functions of x and the codebook where the choice of codes stays as it is."""
    x, quantized, indices, distance = ctx.saved_tensors
    finite = ~distance.isnan()[:, None]
    to_x, to_codes = [], []  # the parts of each row's gradient, and of what its code's is the sum of
    if grad_distance is not None:
        away = 2 * (x.to(distance.dtype) - quantized.to(distance.dtype)) * grad_distance[:, None]  # [N, D]
        away = torch.where(finite, away, 0)
        to_x.append(away)
        to_codes.append(-away)
    if grad_sums is not None and len(grad_sums):
        to_x.append(torch.where(finite, grad_sums[indices], 0))
    if grad_quantized is not None:
        to_codes.append(grad_quantized.to(distance.dtype))
    grad_x = sum(to_x).to(x.dtype) if to_x and ctx.needs_input_grad[0] else None
    grad_codebook = None
    if to_codes and ctx.needs_input_grad[1]:
        grad_codebook = distance.new_zeros(ctx.codes, x.shape[1]).index_add(0, indices, sum(to_codes))
        grad_codebook = grad_codebook.to(ctx.codebook_dtype)
    return grad_x, grad_codebook, None, None


@op(
    # a floating output comes first, because torch's opcheck adds outputs up onto the first one
    "(Tensor x, Tensor codebook, bool statistics=True, str precision='exact') -> (Tensor quantized,"
    " Tensor indices, Tensor squared_distance, Tensor counts, Tensor sums, Tensor nonfinite)",
    backends=[
        triton(lazy(TRITON, "nearest_codebook"), lazy(TRITON, "why_not")),
        Backend("cpu", _cpu.nearest_codebook, _cpu.why_not),
        Backend("reference", reference.nearest_codebook, never),
    ],
    fake=_fake,
    result=Nearest,
    backward=_backward,
    setup_context=_keep_for_backward,
)
def nearest_codebook(x: Tensor, codebook: Tensor, statistics: bool = True, precision: str = "exact") -> Nearest:
    """The nearest code of every row, and what the codebook's moving average needs of the batch, in one read of x.

    x, codebook: [N, D] and [K, D], floating, any strides. Distances and sums are float32, float64 if either input is.
    statistics:  False leaves counts and sums out (they come back as [0] and [0, D]) and pays nothing for them.
    precision:   the least that will do for the choice of a code, "exact", "tf32" or "bf16"; a backend may do better.
                 Exact means that a chosen code is farther than the nearest by no more than float32 rounding explains.
    Returns:     Nearest(indices [N] int64, quantized [N, D] in x's dtype, squared_distance [N], counts [K] int64,
                 sums [K, D], nonfinite [] int64). Ties go to the lowest index. A row that holds a NaN or an infinity
                 gets index 0 and distance NaN, stays out of counts and sums, and is counted in nonfinite.
                 Differentiable as it stands: squared_distance and sums in x, squared_distance and quantized in the
                 codebook. For straight-through see fastvid.nn.VectorQuantize.
    Raises:      ValueError if the widths D differ, the codebook is empty, an input is not floating, they are on
                 different devices, or the precision is unknown.
    Source:      van den Oord et al. 2017, arXiv:1711.00937, eq. 1 and appendix A.1.
    """
    if codebook.ndim != 2 or x.ndim != 2 or x.shape[1] != codebook.shape[1] or 0 in codebook.shape:
        raise ValueError(
            f"nearest_codebook: `x` must be [N, D] and `codebook` [K, D] with K, D > 0, "
            f"got {list(x.shape)} and {list(codebook.shape)}; pass rows of the codebook's width."
        )
    if not (x.is_floating_point() and codebook.is_floating_point()):
        raise ValueError(
            f"nearest_codebook: `x` and `codebook` must be floating, got {x.dtype} and {codebook.dtype}; "
            "convert them with .float()."
        )
    if x.device != codebook.device:
        raise ValueError(
            f"nearest_codebook: `x` is on {x.device} and `codebook` on {codebook.device}; move one with .to()."
        )
    if precision not in PRECISIONS:
        raise ValueError(f"nearest_codebook: `precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}.")


def _not_triton_ema(codebook: Tensor, *others) -> str | None:
    return None if codebook.dtype == torch.float32 else "takes float32 only"


@op(
    "(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) cluster_sum, Tensor counts, Tensor sums,"
    " float decay=0.99, float eps=1e-5, Tensor(d!)? steps=None,"
    " float dead_below=0.0, Tensor? restart=None, float restart_size=1.0) -> ()",
    backends=[
        triton(lazy(TRITON, "nearest_codebook_ema_"), _not_triton_ema),
        Backend("cpu", _cpu.nearest_codebook_ema_, _cpu.why_not_update),
        Backend("reference", reference.nearest_codebook_ema_, never),
    ],
    fake=lambda *_: None,
)
def nearest_codebook_ema_(
    codebook: Tensor, cluster_size: Tensor, cluster_sum: Tensor, counts: Tensor, sums: Tensor,
    decay: float = 0.99, eps: float = 1e-5, steps: Tensor | None = None,
    dead_below: float = 0.0, restart: Tensor | None = None, restart_size: float = 1.0,
) -> None:
    """Move a codebook towards one batch's statistics: N, m <- moving averages, e <- m / smoothed N, all in place.

    codebook, cluster_sum: [K, D]; cluster_size: [K]; all of one dtype, float32 or float64, whatever the module's.
    counts, sums: [K] and [K, D] of this batch (all-reduced by the caller when training is distributed). A code whose
                  sums are not finite keeps its state.
    decay, eps:   share of the old state kept, in [0, 1); Laplace smoothing of the counts.
    steps:        [] int64, the updates so far, counted on here: for averages that started from zero, which are then
                  read through their bias 1 - decay^steps. None where they started from a first codebook.
    dead_below, restart, restart_size: codes whose N falls below are reborn: e = restart [K, D], a row for each code,
                  N = restart_size and m = e N together. No restart without rows. Nothing waits for the device.
    Raises:       ValueError for shapes that do not fit, a state in half precision or a decay outside [0, 1).
    Source:       van den Oord et al. 2017, arXiv:1711.00937, appendix A.1; Kingma and Ba 2015, arXiv:1412.6980, for
                  the bias; Razavi et al. 2019, arXiv:1906.00446, for the restart.
    """
    state = (codebook, cluster_size, cluster_sum)
    if codebook.dtype not in (torch.float32, torch.float64) or len({tensor.dtype for tensor in state}) > 1:
        raise ValueError(
            f"nearest_codebook_ema_: the state must be all float32 or all float64, got "
            f"{', '.join(str(tensor.dtype) for tensor in state)}; in half precision it stalls: use .float()."
        )
    K, D = codebook.shape
    shapes = [list(tensor.shape) for tensor in (cluster_size, counts, cluster_sum, sums)]
    if shapes != [[K], [K], [K, D], [K, D]]:
        raise ValueError(
            f"nearest_codebook_ema_: for a codebook {[K, D]} `cluster_size` and `counts` must be {[K]}, `cluster_sum` "
            f"and `sums` {[K, D]}, got {', '.join(map(str, shapes))}."
        )
    if restart is not None and restart.shape != (K, D):
        raise ValueError(
            f"nearest_codebook_ema_: `restart` must hold a row for each code, {[K, D]}, got {list(restart.shape)}."
        )
    if not 0 <= decay < 1:
        raise ValueError(f"nearest_codebook_ema_: `decay` must lie in [0, 1), got {decay}.")
