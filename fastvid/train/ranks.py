"""The processes of one run: who am I, one all-reduce a step, and proof that nobody drifted away."""

import hashlib
import os
from collections.abc import Iterable
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module

import torch
from torch import Tensor, distributed, nn

from fastvid.errors import FastvidError


class Ranks:
    """This process among the processes of a run; a run of one needs no torch.distributed."""

    def __init__(self):
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.world = distributed.get_world_size() if together else 1

    @property
    def leads(self) -> bool:
        """Whether this process writes, reports and draws."""
        return self.rank == 0

    def average(self, gradients: list[Tensor], numbers: dict[str, float]) -> dict[str, float]:
        """Average gradients (in place) and numbers over the processes in one all-reduce.

        gradients: any shapes, the same list on every process.
        numbers:   the same keys on every process.
        Returns:   the averaged numbers, identical everywhere.
        """
        if self.world == 1:
            return numbers
        # one vector for both: every process then takes the same decisions from the same bits
        tail = torch.tensor(list(numbers.values()), dtype=torch.float32)
        flat = torch.cat([g.reshape(-1).float() for g in gradients] + [tail.to(gradients[0].device)])
        distributed.all_reduce(flat)
        flat /= self.world
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start:start + gradient.numel()].view_as(gradient))
            start += gradient.numel()
        return dict(zip(numbers, flat[start:].tolist(), strict=True))

    @torch.no_grad()
    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values, in place."""
        if self.world > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def check_equal(self, tensors: dict[str, Tensor], step: int) -> None:
        """Stop the run if any tensor (codebooks included) differs by one bit between processes.

        Raises: FastvidError naming the tensors.
        """
        if self.world == 1:
            return
        mine = {name: _digest(t) for name, t in tensors.items()}
        everyone = self.gather(mine)
        apart = sorted(name for name in mine if len({other[name] for other in everyone}) > 1)
        if apart:
            raise FastvidError(f"step {step}: the processes drifted apart in {', '.join(apart[:5])}; restart the run.")

    def gather(self, mine: object) -> list:
        """What every process holds, in the order of their ranks, on each of them; it is pickled on its way."""
        if self.world == 1:
            return [mine]
        everyone: list = [None] * self.world
        distributed.all_gather_object(everyone, mine)
        return everyone

    def wait(self) -> None:
        """Let the slower processes catch up."""
        if self.world > 1:
            distributed.barrier()


@contextmanager
def process_group(backend: str | None = None):
    """The process group that torchrun announces in the environment: NCCL on GPUs, else gloo. None without torchrun.

    backend: "gloo" for work on the CPU, whatever GPUs there are; None decides as said.
    """
    mine = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized()
    if mine:
        # its functions' defaults keep whatever group exists when it is first imported (the optimizer does so); a group
        # kept like that outlives destroy_process_group, and its threads may then abort the interpreter's exit
        import_module("torch.distributed.nn")
        cuda = torch.cuda.is_available() and backend != "gloo"
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # the first process may encode a whole data set while the others wait
        distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12))
    try:
        yield Ranks()
    finally:
        if mine:
            distributed.destroy_process_group()


def state_of(model: nn.Module) -> list[Tensor]:
    """Every parameter and buffer of a model, in a fixed order."""
    return [*model.parameters(), *model.buffers()]


def _digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(memoryview(flat.numpy())).digest()
