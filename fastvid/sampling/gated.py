"""Sampling a gated PixelCNN one code at a time: the naive way, and from packed weights with caches, the same codes."""

import weakref

import torch
from torch import Tensor

from fastvid import ops
from fastvid.nn import GatedPixelStack
from fastvid.ops import Packed, Progress, Sampled
from fastvid.sampling.noise import Noise

_packed: "weakref.WeakKeyDictionary[GatedPixelStack, dict]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def sample_naive(stack: GatedPixelStack, condition: Tensor, noise: Noise, temperature: float = 1.0) -> Tensor:
    """Codes by running the whole network again for every one of them: the definition of sampling.

    condition: [B, T, H, W, condition_channels]. Returns [B, T, H, W] int64. Raises ValueError as `sample` does.
    """
    B, T, H, W, _ = _check(stack, condition, noise)
    codes = torch.zeros(B, T, H, W, dtype=torch.int64, device=condition.device)
    for t in range(T):
        for y in range(H):
            gumbel = noise.row(t, y, W, stack.config.codes, condition.device)
            for x in range(W):
                logits = stack(codes, condition)[:, t, y, x]
                codes[:, t, y, x] = ops.draw(logits, gumbel[:, x], temperature)
    return codes


def sample(
    stack: GatedPixelStack, condition: Tensor, noise: Noise, temperature: float = 1.0, progress: Progress | None = None,
    **options,
) -> Tensor:
    """Codes by the fastest sampler that serves: those of `sample_naive`, near ties apart.

    condition, noise, temperature, progress, options: as `sample_grid`, whose errors these are too.
    Returns: [B, T, H, W] int64 in [0, K).
    """
    return sample_grid(stack, condition, noise, temperature, progress, **options).codes


@torch.no_grad()
def sample_grid(
    stack: GatedPixelStack, condition: Tensor, noise: Noise, temperature: float = 1.0, progress: Progress | None = None,
    *, weights: str = "auto", window: int = 0, order: str = "auto", given: Tensor | None = None,
    draft: Tensor | None = None, backend: str | None = None,
) -> Sampled:
    """A grid of codes from packed weights, each layer's work done once per position.

    condition:   [B, T, H, W, condition_channels], floating; one batch row per sample.
    noise:       Noise with B samples. temperature: > 0; 1 samples the model's own distribution.
    weights:     "float32": the codes of `sample_naive`, near ties apart (Sampled.near_ties counts them). "bfloat16" and
                 "int8" store the weights in 2 and 1 bytes, which samples a slightly different model. "auto" is float32
                 where the weights that every code needs fit a processor's cache, and bfloat16 above 8 MB of them.
    window, order, given, draft: see fastvid.ops.pixelcnn_sample; none changes what is drawn, but for the codes given.
    backend:     who samples; None takes the first that can.
    Returns:     Sampled(logprob, margin, codes, passes).
    Raises:      ValueError if the noise names another number of samples, the stack is in training mode with dropout
                 or in float64, or an option is none of those above.
    """
    _check(stack, condition, noise)
    packed = pack_stack(stack, weights)
    samples = torch.tensor(noise.samples, dtype=torch.int64, device=condition.device)
    arguments = (
        *packed, condition.float().contiguous(), samples, noise.seed, noise.stream, noise.first_step,
        float(temperature), window, order, given, draft,
    )  # fmt: skip
    return Sampled(*ops.pixelcnn_sample.bind(*arguments, backend=backend)(*arguments, progress=progress))


def code_loglikelihood(
    stack: GatedPixelStack, codes: Tensor, condition: Tensor, weights: str = "auto", backend: str | None = None
) -> Tensor:
    """Log-probability of every code given the ones before it, in nats, by the sampler's own arithmetic.

    codes:   [B, T, H, W] int64 in [0, K). condition: [B, T, H, W, condition_channels].
    weights: and backend as in `sample_grid`, whose errors these are too.
    Returns: [B, T, H, W] float32.
    """
    noise = Noise(0, tuple(range(len(codes))))
    return sample_grid(stack, condition, noise, weights=weights, given=codes, backend=backend).logprob


def pack_stack(stack: GatedPixelStack, weights: str = "auto") -> Packed:
    """A stack in the layout of the samplers; remembered until one of its tensors changes.

    weights: "float32", "bfloat16", "int8", or "auto" as in `sample_grid`.
    Returns: Packed(weights uint8 [bytes], table int64 [words]).
    Raises:  ValueError for other weights or a float64 stack.
    """
    state = stack.state_dict(keep_vars=True)
    if state["embed.weight"].dtype == torch.float64:
        raise ValueError("sample: the samplers compute in float32, the stack is float64; call .float() first.")
    # versions do not tell of a change through .data; norms cost no more than the first row that is drawn
    norms = torch.stack(torch._foreach_norm([p.detach() for p in state.values()])).tolist()
    stamp = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in state.values()), tuple(norms)
    kept = _packed.setdefault(stack, {})
    if kept.get("stamp") != stamp:
        kept.clear()
        kept["stamp"] = stamp
    if weights not in kept:
        taps = [stack.input_vertical.taps, stack.input_horizontal.taps]
        taps += [stack.layers[0].vertical.taps, stack.layers[0].horizontal.taps] if len(stack.layers) else [(), ()]
        config = stack.config
        kept[weights] = ops.pack_pixelcnn(state, taps, config.heads, config.wavefront, weights)
    return kept[weights]


def _check(stack: GatedPixelStack, condition: Tensor, noise: Noise) -> torch.Size:
    if condition.ndim != 5 or condition.shape[-1] != stack.config.condition_channels:
        raise ValueError(
            f"sample: `condition` must be [B, T, H, W, {stack.config.condition_channels}], got {list(condition.shape)}."
        )
    if condition.shape[0] != len(noise.samples):
        raise ValueError(f"sample: `noise` names {len(noise.samples)} samples for a batch of {condition.shape[0]}.")
    if stack.training and stack.config.dropout:
        raise ValueError("sample: the stack is in training mode, where dropout changes the codes; call .eval() first.")
    return condition.shape
