"""Two processes share a batch of three, two samples and one; each stores what it found."""

import sys

import torch
from torch import distributed, multiprocessing

from fastvid.nn import ConditionalBatchNorm


def main(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = ConditionalBatchNorm(5, 4, 2, relu=True, upsample=True, sync=True)
    x, condition = torch.randn(3, 5, 2, 4, 4), torch.randn(3, 4)
    mine = slice(0, 2) if rank == 0 else slice(2, 3)
    x = x[mine].clone().requires_grad_()
    out = layer(x, condition[mine])
    out.square().sum().backward()
    found = {"out": out.detach(), "grad_x": x.grad, "gain": layer.gain.weight.grad, "bias": layer.bias.weight.grad}
    torch.save(found | dict(layer.named_buffers()), f"{folder}/{rank}.pt")
    layer(torch.randn(2 * rank, 5, 2, 4, 4), torch.randn(2 * rank, 4)).sum().backward()  # one of them has nothing
    assert all(buffer.isfinite().all() for buffer in layer.buffers())
    distributed.destroy_process_group()


if __name__ == "__main__":
    # forked, so that torch is imported once
    multiprocessing.start_processes(main, sys.argv[1:], nprocs=2, start_method="fork")
