"""Counter-based Gumbel noise and the draw: the definition, in plain torch. See README.md beside this file."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words per 128-bit counter. Words travel in int64 tensors that broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # a wrapped int64 product still holds the right 64 bits
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def gumbel_row(seed: int, samples: Tensor, stream: int, t: int, y: int, width: int, classes: int) -> Tensor:
    """Gumbel noise of one row of codes. samples [B] int64 -> [B, W, V] float32.

    Counter words: class // 4 + 2^16 stream; x + 2^16 y; t; sample. Key: the two halves of the 64-bit seed.
    """
    quads = torch.arange((classes + 3) // 4, device=samples.device)
    columns = torch.arange(width, device=samples.device)
    counter = (
        (quads + (stream << 16)).view(1, 1, -1),
        (columns + (y << 16)).view(1, -1, 1),
        torch.full((1, 1, 1), t, device=samples.device),
        samples.view(-1, 1, 1),
    )
    words = torch.stack(torch.broadcast_tensors(*philox(counter, (seed & _MASK, seed >> 32 & _MASK))), dim=-1)
    # 24 bits and a half keep u inside (0, 1); float64 logs round to the same float32 noise in any math library
    uniform = ((words >> 8).double() + 0.5) * 2.0**-24  # [B, W, V / 4, 4]
    return -torch.log(-torch.log(uniform)).flatten(-2)[..., :classes].float()


def draw(logits: Tensor, gumbel: Tensor, temperature: float) -> Tensor:
    """The class of the largest logit / temperature + noise; lowest index on ties. [..., V], [..., V] -> [...] int64."""
    return (logits.float() / temperature + gumbel).argmax(dim=-1)
