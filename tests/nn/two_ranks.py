"""Two processes train codebook layers on different rows; each prints what its state hashes to after every step."""

import hashlib
import sys

import torch
from torch import distributed

from fastvid.nn import VectorQuantize

OPTIONS = [
    {"kmeans_init": True, "threshold_ema_dead_code": 2},
    {"draw": "distance", "threshold_ema_dead_code": 0.5},
    {"heads": 2, "separate_codebook_per_head": True, "use_cosine_sim": True, "threshold_ema_dead_code": 2},
]


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for options in OPTIONS:
        torch.manual_seed(0)
        layer = VectorQuantize(8, 64, **options)
        torch.manual_seed(rank)
        for step in range(8):
            layer(torch.randn(0 if (step, rank) == (5, 1) else 40 + 10 * rank, 8) + 5 * (step > 4))
            state = b"".join(tensor.numpy().tobytes() for tensor in layer.state_dict().values())
            print(hashlib.sha256(state).hexdigest())
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
