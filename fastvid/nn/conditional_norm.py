"""Class-conditional batch normalisation of video, with statistics of its own for every frame."""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, distributed, nn

from fastvid import ops


class _Here(threading.local):
    frozen = False


_here = _Here()  # and not a ContextVar, which torch.compile cannot read


class ConditionalBatchNorm(nn.Module):
    """Batch normalisation whose gain and bias depend on a condition, and whose statistics are each frame's own.

    channels, condition, frames: C, the width D of the condition, and T; all at least 1.
    eps, momentum: as in torch's batch normalisation; momentum None: running statistics are plain averages.
    relu, upsample: followed by a ReLU, then by bilinear enlargement to twice the size, in the same pass.
    sync:    statistics are those of all processes' batches where a process group is initialised; one that has no
             samples joins in.
    Raises:  ValueError for sizes below 1, at the forward for shapes that do not fit, and in training for a single value
             per channel and frame.
    Source:  Clark et al. 2019, arXiv:1907.06571 (per frame); Brock et al. 2018, arXiv:1809.11096 (gain 1 + W u).
    """

    def __init__(
        self, channels: int, condition: int, frames: int, eps: float = 1e-5, momentum: float | None = 0.1,
        relu: bool = False, upsample: bool = False, sync: bool = False,
    ):  # fmt: skip
        super().__init__()
        if min(channels, condition, frames) < 1:
            raise ValueError(
                f"ConditionalBatchNorm: `channels`, `condition` and `frames` must be at least 1, got {channels}, "
                f"{condition} and {frames}; without a condition use torch's BatchNorm."
            )
        self.channels, self.condition, self.frames = channels, condition, frames
        self.eps, self.momentum, self.relu, self.upsample, self.sync = eps, momentum, relu, upsample, sync
        self.gain, self.bias = (nn.Linear(condition, channels, bias=False) for _ in range(2))
        self.register_buffer("running_mean", torch.zeros(frames, channels))
        self.register_buffer("running_var", torch.ones(frames, channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def extra_repr(self) -> str:
        """As torch's layers tell of themselves."""
        told = f"{self.channels}, condition={self.condition}, frames={self.frames}, eps={self.eps}, "
        return told + f"momentum={self.momentum}, relu={self.relu}, upsample={self.upsample}, sync={self.sync}"

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[B, C, T, H, W] and [B, D] -> [B, C, T, H, W], or [B, C, T, 2H, 2W]; channels last in memory."""
        self._check(x, condition)
        x = x.movedim(1, -1)  # [B, T, H, W, C]
        scale = 1 + self.gain(condition), self.bias(condition)  # [B, C]
        options = self.eps, self.relu, self.upsample
        if not self.training:
            out = ops.conditional_norm(x, self.running_mean, self.running_var, *scale, *options)
        elif self._synced():
            mean, var, count = _global_moments(x)
            out = ops.conditional_norm(x, mean, var, *scale, *options)
            self._track(mean, var, count)
        else:
            out, mean, var = ops.conditional_batch_norm(x, *scale, *options)
            self._track(mean, var, x.shape[0] * x.shape[2] * x.shape[3])
        return out.movedim(-1, 1)

    def reset_running_stats(self) -> None:
        """Forget the running statistics: mean 0, variance 1."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def _synced(self) -> bool:
        return self.sync and _processes() > 1

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
        if _here.frozen:
            return
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased = var * (count / (count - 1))  # [T, C]
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            running += (value - running) * share

    def _check(self, x: Tensor, condition: Tensor) -> None:
        C, T, D = self.channels, self.frames, self.condition
        if x.ndim != 5 or x.shape[1:3] != (C, T) or condition.shape != (len(x), D):
            raise ValueError(
                f"ConditionalBatchNorm: `x` must be [B, {C}, {T}, H, W] and `condition` [B, {D}], "
                f"got {list(x.shape)} and {list(condition.shape)}."
            )
        if self.training and not self._synced() and x.shape[0] * x.shape[3] * x.shape[4] < 2:
            raise ValueError(
                "ConditionalBatchNorm: training takes more than one value per channel and frame, got "
                f"{list(x.shape)}; pass a larger batch, or call .eval()."
            )


@contextlib.contextmanager
def frozen_statistics() -> Iterator[None]:
    """Running statistics stay as they are while inside, whatever is normalised in training mode.

    For work that is done twice: torch.utils.checkpoint(..., context_fn=lambda: (nullcontext(), frozen_statistics())).
    """
    before, _here.frozen = _here.frozen, True
    try:
        yield
    finally:
        _here.frozen = before


@contextlib.contextmanager
def standing_statistics(module: nn.Module) -> Iterator[None]:
    """Running statistics of every ConditionalBatchNorm in `module` are made anew of the batches it sees while inside.

    They start empty and are plain averages over those batches, each of equal weight; mode and momentum are as before
    afterwards. Run some batches under torch.no_grad() inside, then sample in eval mode.

    Source: Brock et al. 2018, arXiv:1809.11096, section 3.1 and appendix: standing statistics for sampling.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, ConditionalBatchNorm)]
    before = [(layer.momentum, layer.training) for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum, layer.training = None, True
    try:
        yield
    finally:
        for layer, (momentum, training) in zip(layers, before, strict=True):
            layer.momentum, layer.training = momentum, training


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class _SumOfAll(torch.autograd.Function):
    """The sum over all processes, of which each one's gradient is the sum of everybody's."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        total = value.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _SumOfAll.apply(grad)


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean, var [T, C] and the count [] of all processes' x [B, T, H, W, C], whatever each one's B."""
    mean, var = ops.frame_moments(x)
    count = mean.new_full((1,), x.shape[0] * x.shape[2] * x.shape[3])
    total = _SumOfAll.apply(torch.cat([(mean * count).flatten(), count]))
    count_of_all = total[-1]
    mean_of_all = (total[:-1] / count_of_all).view_as(mean)
    var_of_all = _SumOfAll.apply((var + (mean - mean_of_all).square()) * count) / count_of_all
    return mean_of_all, var_of_all, count_of_all.detach()
