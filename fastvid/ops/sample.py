"""Counter-based noise and categorical draws that do not depend on order, batch or window."""

from torch import Tensor

from fastvid.kernels.pixelcnn_sampler import reference


def gumbel_row(seed: int, samples: Tensor, stream: int, t: int, y: int, width: int, classes: int) -> Tensor:
    """Gumbel noise for one row of codes, a pure function of its arguments.

    seed:    64-bit integer. samples: [B] int64 in [0, 2^32), the identity of each sample, not its place in the batch.
    stream:  which grid of codes, in [0, 2^15). t, y: latent step in [0, 2^32) and row in [0, 2^15).
    Returns: [B, W, V] float32, standard Gumbel.
    Raises:  ValueError if a counter does not fit its field.
    Source:  Salmon et al. 2011 (Philox4x32-10), doi:10.1145/2063384.2063405.
    """
    if not (0 <= stream < 1 << 15 and 0 <= y < 1 << 15 and 0 <= t < 1 << 32):
        raise ValueError(f"gumbel_row: `stream`, `y` must lie in [0, 2^15), `t` in [0, 2^32), got {stream, y, t}.")
    if not (0 < width <= 1 << 15 and 0 < classes <= 1 << 18):
        raise ValueError(f"gumbel_row: at most 2^15 columns and 2^18 classes, got {width} and {classes}.")
    return reference.gumbel_row(seed, samples, stream, t, y, width, classes)


def draw(logits: Tensor, gumbel: Tensor, temperature: float = 1.0) -> Tensor:
    """A categorical draw: the largest logit / temperature + noise.

    logits, gumbel: [..., V], floating; compared in float32.
    Returns:        [...] int64; ties go to the lowest class.
    Raises:         ValueError for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"draw: `temperature` must be positive, got {temperature}.")
    return reference.draw(logits, gumbel, temperature)
