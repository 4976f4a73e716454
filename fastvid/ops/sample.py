"""Counter-based noise, categorical draws, and the sampling of whole grids of codes from a gated PixelCNN."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastvid.kernels.pixelcnn_sampler import packed, reference, session
from fastvid.kernels.pixelcnn_sampler.packed import Packed, Taps
from fastvid.kernels.pixelcnn_sampler.session import OPEN, Sampled
from fastvid.ops import _cpu_noise, _cpu_sampler, _cuda_sampler
from fastvid.ops._op import Backend, lazy, never, op, triton

ORDERS = ("auto", "raster", "wavefront")
TRITON = "pixelcnn_sampler.triton_gpu"
# beyond this a position's weights come from memory, not from a cache, and half the bytes take half the time
HALVED_ABOVE = 8 << 20


@op(
    "(int seed, Tensor samples, int stream, int t, int y, int width, int classes) -> Tensor",
    backends=[
        Backend("cpu", _cpu_noise.gumbel_row, _cpu_noise.why_not),
        Backend("reference", lambda *args: (reference.gumbel_row(*args),), never),
    ],
    fake=lambda seed, samples, stream, t, y, width, classes: (
        samples.new_empty(len(samples), width, classes, dtype=torch.float32),
    ),
    result=Tensor,
)
def gumbel_row(seed: int, samples: Tensor, stream: int, t: int, y: int, width: int, classes: int) -> Tensor:
    """Gumbel noise for one row of codes, a pure function of its arguments.

    seed:    in [-2^63, 2^63). samples: [B] int64 in [0, 2^32), the identity of each sample, not its place in the batch.
    stream:  which grid of codes, in [0, 2^15). t, y: latent step in [0, 2^32) and row in [0, 2^15).
    Returns: [B, W, V] float32, standard Gumbel.
    Raises:  ValueError if a counter does not fit its field.
    Source:  Salmon et al. 2011 (Philox4x32-10), doi:10.1145/2063384.2063405.
    """
    if not (0 <= stream < 1 << 15 and 0 <= y < 1 << 15 and 0 <= t < 1 << 32):
        raise ValueError(f"gumbel_row: `stream`, `y` must lie in [0, 2^15), `t` in [0, 2^32), got {stream, y, t}.")
    if not (0 < width <= 1 << 15 and 0 < classes <= 1 << 18):
        raise ValueError(f"gumbel_row: at most 2^15 columns and 2^18 classes, got {width} and {classes}.")
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"gumbel_row: `seed` must lie in [-2^63, 2^63), got {seed}; take it modulo 2^64.")


def draw(logits: Tensor, gumbel: Tensor, temperature: float = 1.0) -> Tensor:
    """A categorical draw: the largest logit / temperature + noise.

    logits, gumbel: [..., V], floating; compared in float32.
    Returns:        [...] int64; ties go to the lowest class.
    Raises:         ValueError for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"draw: `temperature` must be positive, got {temperature}.")
    return reference.draw(logits, gumbel, temperature)


def pack_pixelcnn(
    state: dict[str, Tensor], taps: list[tuple], heads: int, wavefront: bool = False, weights: str = "auto"
) -> Packed:
    """A gated PixelCNN's tensors in the layout that every sampler reads.

    state:     state dict of a fastvid.nn.GatedPixelStack, floating, on one device; widths are padded to 8 channels.
    taps:      of its input vertical, input horizontal, vertical and horizontal convolutions, earlier frames' first.
    heads:     of its attention. wavefront: as in GatedStackConfig.
    weights:   "float32", "bfloat16", "int8" (a scale per output), or "auto": float32 where the weights that every code
               needs take at most 8 MB, bfloat16 above.
    Returns:   Packed(weights uint8 [bytes], table int64 [words] on the CPU).
    Raises:    ValueError for other weights or for taps that look ahead.
    """
    groups = Taps(*map(tuple, taps))
    if any(tap >= (0, 0, 0) for tap in (*groups.input_vertical, *groups.input_horizontal)):
        raise ValueError("pack_pixelcnn: an input convolution sees its own code or a later one; check its `taps`.")
    if any(tap > (0, 0, 0) for tap in groups.horizontal) or any(tap[:2] > (0, 0) for tap in groups.vertical):
        raise ValueError("pack_pixelcnn: a layer's convolution looks ahead; check its `taps`.")
    if weights == "auto":
        weights = "bfloat16" if packed.position_bytes(state, groups) > HALVED_ABOVE else "float32"
    return packed.pack(state, groups, heads, wavefront, weights)


def pixelcnn_session(weights: Tensor, table: Tensor, condition: Tensor) -> reference.Session:
    """The caches of the torch sampler for one batch, to be stepped from outside.

    weights, table: of `pack_pixelcnn`. condition: [B, T, H, W, condition_channels] float32.
    Returns:   a session: `logits(t, y, x)` [B, K] in raster order, the codes before having been written to `job.codes`.
    """
    samples = torch.arange(len(condition), device=condition.device)
    job = session.Job(Packed(weights, table), condition, samples, 0, 0, 0, 1.0, 1, "raster", None, None)
    return reference.Session(job)


def _fake(weights: Tensor, table: Tensor, condition: Tensor, *_) -> tuple[Tensor, ...]:
    new, grid = condition.new_empty, condition.shape[:4]
    return new(grid), new(grid), new(grid, dtype=torch.int64), new(grid[:3], dtype=torch.int64)


def _by(make_session: Callable) -> Callable[..., tuple[Tensor, ...]]:
    return functools.partial(session.run, make_session)


@op(
    "(Tensor weights, Tensor table, Tensor condition, Tensor samples, int seed=0, int stream=0, int first_step=0,"
    " float temperature=1.0, int window=0, str order='auto', Tensor? given=None, Tensor? draft=None)"
    " -> (Tensor logprob, Tensor margin, Tensor codes, Tensor passes)",
    backends=[
        Backend("cuda", _by(_cuda_sampler.Session), _cuda_sampler.why_not, _cuda_sampler.unasked),
        triton(_by(lazy(TRITON, "Session")), lazy(TRITON, "why_not")),
        Backend("cpu", _by(_cpu_sampler.Session), _cpu_sampler.why_not),
        Backend("reference", _by(reference.Session), never),
    ],
    fake=_fake,
    result=Sampled,
)
def pixelcnn_sample(
    weights: Tensor, table: Tensor, condition: Tensor, samples: Tensor, seed: int = 0, stream: int = 0,
    first_step: int = 0, temperature: float = 1.0, window: int = 0, order: str = "auto", given: Tensor | None = None,
    draft: Tensor | None = None,
) -> Sampled:  # fmt: skip
    """A grid of codes drawn one after the other from a packed gated PixelCNN, caches and noise included.

    weights, table: of `pack_pixelcnn`, the weights on the device of the condition.
    condition:   [B, T, H, W, condition_channels] float32. samples: [B] int64 in [0, 2^32), an identity for each sample.
    seed, stream, first_step: with sample and position they decide the noise, as in `gumbel_row`; t counts from
                 first_step.
    temperature: > 0. The code drawn is the best of logit / temperature + noise, the lowest index on ties.
    window:      codes of a row that are evaluated at once and drawn again until they agree; 1 is one by one, 0 leaves
                 it to the backend. order: "raster", "wavefront" (along anti-diagonals; for models packed as such) or
                 "auto". draft [B, T, H, W] int64: first guess of the codes, for windows. All three are about speed:
                 what is drawn depends on none of them, nor on the other samples or the number of threads.
    given:       [B, T, H, W] int64: codes that stand, and -1 where one is to be drawn.
    Returns:     Sampled(logprob [B, T, H, W], margin [B, T, H, W], codes [B, T, H, W] int64, passes [B, T, H] int64):
                 the log-probability in nats of each code at temperature 1; by how much the best score beat the second
                 (infinity for given codes); how often each row's networks were evaluated, or for a wavefront, in the
                 first entry of a frame, the number of its steps. With window 0 passes may differ from run to run.
    Raises:      ValueError for shapes, dtypes or devices that do not fit, codes outside [0, K), a temperature that is
                 not positive, an unknown order, or a wavefront of a model that has none.
    Source:      Ramachandran et al. 2017, arXiv:1704.06001 (caches); Song et al. 2021, arXiv:2002.03629, and Wiggers
                 and Hoogeboom 2020, arXiv:2002.09928 (windows).
    """
    known = packed.Table(table)
    if weights.dtype != torch.uint8 or weights.device != condition.device:
        raise ValueError(
            f"pixelcnn_sample: `weights` must be the packed bytes on the condition's device {condition.device}, got "
            f"{weights.dtype} on {weights.device}; pack the model there."
        )
    if condition.ndim != 5 or condition.dtype != torch.float32 or condition.shape[-1] != known.condition_channels:
        raise ValueError(
            f"pixelcnn_sample: `condition` must be [B, T, H, W, {known.condition_channels}] float32, got "
            f"{list(condition.shape)} {condition.dtype}."
        )
    if samples.shape != condition.shape[:1] or samples.dtype != torch.int64:
        raise ValueError(
            f"pixelcnn_sample: `samples` must be [{len(condition)}] int64, got {list(samples.shape)} {samples.dtype}."
        )
    if not temperature > 0:
        raise ValueError(f"pixelcnn_sample: `temperature` must be positive, got {temperature}.")
    if window < 0 or order not in ORDERS:
        raise ValueError(
            f"pixelcnn_sample: `window` must be at least 0 and `order` one of {', '.join(ORDERS)}, got {window} and "
            f"{order!r}."
        )
    if order == "wavefront" and not known.wavefront:
        raise ValueError("pixelcnn_sample: this model sees too much for a wavefront; train one with wavefront=True.")
    _check_codes("given", given, condition, known.codes)
    _check_codes("draft", draft, condition, known.codes)


def _check_codes(name: str, codes: Tensor | None, condition: Tensor, classes: int) -> None:
    if codes is None:
        return
    if codes.shape != condition.shape[:4] or codes.dtype != torch.int64 or codes.device != condition.device:
        raise ValueError(
            f"pixelcnn_sample: `{name}` must be {list(condition.shape[:4])} int64 on {condition.device}, got "
            f"{list(codes.shape)} {codes.dtype} on {codes.device}."
        )
    if codes.numel() and not OPEN <= int(codes.min()) <= int(codes.max()) < classes:
        raise ValueError(
            f"pixelcnn_sample: `{name}` must lie in [0, {classes}), -1 where open, got {int(codes.min())} to "
            f"{int(codes.max())}."
        )
