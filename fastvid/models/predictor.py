"""The whole chain: four frames in, the next ones out, through the VQ-VAE and its two priors."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.checkpoint import has_folder, load_folder, read_config, save_folder
from fastvid.errors import CheckpointError, UsageError
from fastvid.models.bottom_prior import ABSENT, BottomPrior
from fastvid.models.hierarchical_vqvae import HierarchicalVQVAE
from fastvid.models.registry import rebuild
from fastvid.models.stages import Ledger, Report, Stages
from fastvid.models.top_prior import TopPrior
from fastvid.nn import GatedPixelStack
from fastvid.sampling import Noise, code_loglikelihood, pack_stack, sample_grid

GIVEN = 4  # frames conditioned on: one top step, two bottom slices
FRAMES_PER_STEP, SLICES_PER_STEP = 4, 2
TOP_STREAM, BOTTOM_STREAM = 0, 1
ROWS_AT_ONCE = 64  # samples that advance together; it bounds memory and never changes a code
WEIGHTS = ("auto", "float32", "bfloat16", "int8")  # how the priors' weights may be stored for sampling
Samples = int | range | list[range]  # how many, or of which numbers, in every clip alike or each its own
SHIPPED = Path(__file__).with_name("weights")


@dataclass
class Stretch:
    """What one pass over the model predicts of every sample, and what its stages cost.

    frames: [B, S, m, 3, H, W] in [0, 1], m at most 12. top: [B, S, steps + 1, H/8, W/8] and bottom:
    [B, S, 2 (steps + 1), H/4, W/4] int64, codes of the four frames before and of those predicted; None where a model
    draws none.
    """

    frames: Tensor
    top: Tensor | None
    bottom: Tensor | None
    stages: Stages


@dataclass
class Prediction:
    """Frames [B, S, n, 3, H, W] in [0, 1]; the codes of each stretch of frames; the stages' costs."""

    frames: Tensor
    top: list[Tensor] = field(default_factory=list)  # each [B, S, steps + 1, H/8, W/8]
    bottom: list[Tensor] = field(default_factory=list)  # each [B, S, 2 (steps + 1), H/4, W/4]
    stages: Stages = field(default_factory=Stages)


@dataclass(frozen=True)
class _Run:
    """What all stretches of a prediction have in common."""

    seed: int
    temperature: float
    weights: str
    compare: bool
    ledger: Ledger


class VideoPredictor(nn.Module):
    """A hierarchical VQ-VAE with its top and bottom prior, and the frame size they were trained for.

    Source: Walker, Razavi, van den Oord 2021, arXiv:2103.01950.
    """

    def __init__(self, vqvae: HierarchicalVQVAE, top: TopPrior, bottom: BottomPrior, size: tuple[int, int] = (64, 64)):
        super().__init__()
        self.vqvae, self.top, self.bottom, self.size = vqvae, top, bottom, tuple(size)
        self.eval()

    def predict(
        self, frames: Tensor, n: int = 12, samples: Samples = 1, seed: int = 0, temperature: float = 1.0,
        progress: Report | None = None, weights: str = "auto",
    ) -> Tensor:
        """The next frames of each clip, drawn `samples` times.

        frames:   [B, 4, 3, H, W] in [0, 1], H and W divisible by 8 (`size` is what the model was trained for).
        n:        frames to predict; beyond what one pass yields (12) the model slides on over its own output.
        samples:  how many futures of each clip, or, as a range, those of these numbers: 3 is range(3). Equal numbers
                  have equal noise, in every clip; a list has a range for each clip, all of one length.
        seed:     with the sample's number it decides every draw; B, `samples` and `n` change no sample's frames.
        progress: told the stage, the codes drawn so far and the codes of the whole run, after every row of codes.
        weights:  of the priors while sampling: "float32", or the smaller "bfloat16" and "int8", which sample a slightly
                  different model; "auto" as in fastvid.sampling.sample_grid.
        Returns:  [B, S, n, 3, H, W] in [0, 1].
        Raises:   UsageError for another shape, n or samples below 1, a temperature that is not positive, or other
                  weights.
        """
        return self.predict_codes(frames, n, samples, seed, temperature, progress, weights).frames

    def predict_codes(
        self, frames: Tensor, n: int = 12, samples: Samples = 1, seed: int = 0, temperature: float = 1.0,
        progress: Report | None = None, weights: str = "auto",
    ) -> Prediction:
        """As `predict`, with the codes of every stretch and the cost of every stage."""
        result, parts = Prediction(frames), []
        for stretch in self.predict_stream(frames, n, samples, seed, temperature, progress, weights):
            parts.append(stretch.frames)
            result.top.append(stretch.top)
            result.bottom.append(stretch.bottom)
            result.stages.add(stretch.stages)
        result.frames = torch.cat(parts, dim=2)
        return result

    @torch.no_grad()
    def predict_stream(
        self, frames: Tensor, n: int = 12, samples: Samples = 1, seed: int = 0, temperature: float = 1.0,
        progress: Report | None = None, weights: str = "auto", compare: bool = False,
    ) -> Iterator[Stretch]:
        """As `predict`, stretch after stretch: each is yielded before the next one is begun, and none is kept.

        compare:  also judge the drawn codes by float32 weights: Stage.drift, for one more evaluation of every row.
        Yields:   Stretch; their frames follow one another, n in all.
        """
        _check(frames, n, samples, temperature, weights)
        (B, *_, H, W), steps = frames.shape, self.top.config.steps
        ranges = samples if isinstance(samples, list) else [range(samples) if isinstance(samples, int) else samples] * B
        numbers, S = [number for one in ranges for number in one], len(ranges[0])  # of all B * S samples
        stretches = -(-n // (steps * FRAMES_PER_STEP))
        per_row = steps * (H // 8 * (W // 8) + SLICES_PER_STEP * (H // 4) * (W // 4))
        run = _Run(seed, temperature, weights, compare, Ledger(B * S * stretches * per_row, progress))
        with run.ledger.timed("pack"):
            for stack in (self.top.stack, self.bottom.stack):
                pack_stack(stack, weights)
        given = frames.transpose(1, 2)  # [B, 3, 4, H, W]
        owner = torch.arange(B).repeat_interleave(S)  # the row of `given` that each sample goes on from
        for number in range(stretches):
            video, top, bottom = self._stretch(given, owner, numbers, number, run)
            given, owner = video[:, :, -GIVEN:].clone(), torch.arange(B * S)
            left = n - number * steps * FRAMES_PER_STEP
            future = video[:, :, GIVEN : GIVEN + left].transpose(1, 2)  # [B*S, m, 3, H, W]
            rows = (part.unflatten(0, (B, S)) for part in (future, top, bottom))
            yield Stretch(*rows, run.ledger.turn())
            del video, top, bottom, future, rows  # the caller's now: they must not outlive his use of them

    def _stretch(self, given: Tensor, owner: Tensor, numbers: list[int], stretch: int, run: _Run) -> tuple[Tensor, ...]:
        """One pass over `steps` latent steps of all samples. -> video [B*S, 3, T, H, W], top and bottom codes."""
        timed, chunks = run.ledger.timed, []
        for rows in torch.arange(len(owner)).split(ROWS_AT_ONCE):
            identities = tuple(numbers[row] for row in rows.tolist())
            # samples of one clip share what is given: it is encoded once
            sources, own = owner[rows].unique(return_inverse=True)
            with timed("encode"):
                codes = _each(self.vqvae.encode, given[sources])
            top = self._draw_top(*codes, own, identities, stretch, run)
            bottom = self._draw_bottom(top, codes[1][own], identities, stretch, run)
            with timed("decode"):
                (video,) = _each(lambda *levels: (self.vqvae.decode(*levels),), top, bottom)
            chunks.append((video, top, bottom))
        return tuple(torch.cat(part) for part in zip(*chunks, strict=True))

    def _draw_top(
        self, top: Tensor, bottom: Tensor, own: Tensor, identities: tuple[int, ...], stretch: int, run: _Run
    ) -> Tensor:
        """Top codes of a stretch. top [G, 1, H, W], bottom [G, 2, 2H, 2W], own [R] -> [R, steps + 1, H, W]."""
        steps = self.top.config.steps
        with run.ledger.timed("top"):
            (condition,) = _each(lambda *codes: (self.top.condition(*codes),), top, bottom)
        noise = Noise(run.seed, identities, TOP_STREAM, stretch * steps)
        return torch.cat([top[own], _draw("top", self.top.stack, condition[own], noise, run)], dim=1)

    def _draw_bottom(self, top: Tensor, given: Tensor, identities: tuple[int, ...], stretch: int, run: _Run) -> Tensor:
        """Bottom codes of a stretch. top [R, steps + 1, H, W], given [R, 2, 2H, 2W] -> [R, 2 (steps + 1), 2H, 2W]."""
        slices = range(SLICES_PER_STEP, SLICES_PER_STEP * top.shape[1])
        with run.ledger.timed("bottom"):
            bottom = F.pad(given, (0, 0, 0, 0, 0, len(slices)), value=ABSENT)
            (above,) = _each(lambda codes: (self.bottom.conditioning.above(codes),), top)
        for i in slices:
            with run.ledger.timed("bottom"):
                condition = self._condition_slice(i, above, bottom)
            noise = Noise(run.seed, identities, BOTTOM_STREAM, stretch * len(slices) + i)
            bottom[:, i] = _draw("bottom", self.bottom.stack, condition, noise, run)[:, 0]
        return bottom

    def _condition_slice(self, i: int, above: Tensor, bottom: Tensor) -> Tensor:
        window = bottom_window(bottom, i, self.bottom.config.window)
        index = torch.full((len(bottom),), i, device=bottom.device)
        (condition,) = _each(lambda *inputs: (self.bottom.conditioning(*inputs),), index, above, window)
        return condition

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a model folder. `dtype` float16 halves it: the parameters are rounded, the codebooks are not."""
        buffers = dict(self.named_buffers())
        tensors = {name: t if name in buffers else t.to(dtype) for name, t in self.state_dict().items()}
        config = {"kind": "predictor", "size": list(self.size)}
        config |= {part: asdict(getattr(self, part).config) for part in ("vqvae", "top", "bottom")}
        save_folder(Path(path), tensors, config)


def bottom_window(bottom: Tensor, index: int, length: int) -> Tensor:
    """The `length` slices before `index`, -1 where there is none. [B, slices, H, W] -> [B, length, H, W]."""
    seen = bottom[:, max(0, index - length) : index]
    missing = length - seen.shape[1]
    absent = bottom.new_full((bottom.shape[0], missing, *bottom.shape[2:]), ABSENT)
    return torch.cat([absent, seen], dim=1)


def list_models() -> list[str]:
    """Names of the models that come with fastvid."""
    return sorted(p.parent.name for p in SHIPPED.glob("*/config.json"))


class About(NamedTuple):
    """What a model is, known without its weights.

    kind:  "predictor" (VideoPredictor) or "dvdgan". size: (H, W) of its frames, in pixels.
    given: frames that it goes on from; 0 where it makes clips from nothing.
    """

    kind: str
    size: tuple[int, int]
    given: int


def about(name: str | Path) -> About:
    """What a model folder holds, without its weights. Raises as `load`."""
    path = _known_folder(name)
    return _about(read_config(path), path)


def load(name: str | Path) -> nn.Module:
    """A shipped model by name, or any model folder or run folder of a training, verified by its hashes.

    Returns: VideoPredictor, DVDGANGenerator or DVDGANPredictor, for inference, by what the folder says of itself.
    Raises:  UsageError for an unknown name and CheckpointError for a damaged folder or a part of a predictor.
    """
    path = _known_folder(name)
    tensors, config = load_folder(path)
    known = _about(config, path)
    stored = sum(tensor.numel() for tensor in tensors.values())
    if known.kind != "predictor":
        return _fill(rebuild(known.kind, _without_kind(config), stored, path), tensors, path)
    parts = [rebuild(kind, config.get(kind), stored, path) for kind in ("vqvae", "top", "bottom")]
    return _fill(VideoPredictor(*parts, size=known.size), tensors, path)


def frame_size(name: str | Path) -> tuple[int, int]:
    """(H, W) of the frames that a model was trained on, in pixels, without its weights. Raises as `load`."""
    return about(name).size


def _known_folder(name: str | Path) -> Path:
    path = model_folder(name)
    if not path.is_dir():
        raise UsageError(
            f"unknown model {str(name)!r}: neither a folder nor one of {', '.join(list_models()) or '(none shipped)'}."
        )
    return path


def _about(config: dict, path: Path) -> About:
    kind = config.get("kind")
    if kind == "predictor":
        return About(kind, _size_of(config, path), GIVEN)
    if kind != "dvdgan":
        raise CheckpointError(f"{path}: wanted a predictor, got kind {kind!r}; assemble one first.")
    side, given = config.get("size"), config.get("given")
    if type(side) is not int or type(given) is not int or side < 1 or given < 0:
        raise CheckpointError(f"{path}: wanted whole numbers size and given in its config, got {side!r}, {given!r}.")
    return About(kind, (side, side), given)


def _size_of(config: dict, path: Path) -> tuple[int, int]:
    size = config.get("size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 and n % 8 == 0 for n in size):
        raise CheckpointError(f"{path}: wanted a size [H, W] in multiples of 8 in its config, got {size!r:.80}.")
    return tuple(size)


def model_folder(name: str | Path) -> Path:
    """The folder of a shipped model, the model folder inside a training's run folder, or the path itself."""
    if str(name) in list_models():
        return SHIPPED / str(name)
    inside = Path(name) / "model"
    return inside if not has_folder(name) and has_folder(inside) else Path(name)


def assemble(
    vqvae: str | Path, top: str | Path, bottom: str | Path, size: tuple[int, int] = (64, 64)
) -> VideoPredictor:
    """A predictor from three trained parts, each a run folder of `fastvid train` or its model folder.

    size:   (H, W) of the frames that they were trained on, in pixels.
    Raises: CheckpointError for a folder that is damaged or of another kind, UsageError if the parts' codes differ.
    """
    parts = [load_part(kind, path)[0] for kind, path in (("vqvae", vqvae), ("top", top), ("bottom", bottom))]
    codes = [parts[0].config.codes, parts[1].config.stack.codes, parts[2].config.stack.codes]
    if len(set(codes)) > 1:
        raise UsageError(f"assemble: the three parts must have the same number of codes, got {codes}.")
    return VideoPredictor(*parts, size=size)


def load_part(kind: str, path: str | Path) -> tuple[nn.Module, Path]:
    """A trained part and the model folder it came from.

    kind:   vqvae, top or bottom. path: a run folder of `fastvid train`, or its model folder.
    Raises: CheckpointError for a folder that is damaged, of another kind, or whose weights do not fit its config.
    """
    folder = Path(path) / "model" if has_folder(Path(path) / "model") else Path(path)
    tensors, config = load_folder(folder)
    if config.get("kind") != kind:
        raise CheckpointError(f"{folder}: wanted a {kind}, it is of kind {config.get('kind')!r}; give its run folder.")
    stored = sum(tensor.numel() for tensor in tensors.values())
    return _fill(rebuild(kind, _without_kind(config), stored, folder), tensors, folder), folder


def _without_kind(config: dict) -> dict:
    return {name: value for name, value in config.items() if name != "kind"}


def _fill(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> nn.Module:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: weights do not fit the config: {str(error).splitlines()[-1]}") from error
    return model.eval()


def _each(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Run a dense network one batch row at a time: its rounding may depend on the batch, ours must not."""
    rows = [function(*(x[i : i + 1] for x in inputs)) for i in range(inputs[0].shape[0])]
    return tuple(torch.cat(part) for part in zip(*rows, strict=True))


def _draw(stage: str, stack: GatedPixelStack, condition: Tensor, noise: Noise, run: _Run) -> Tensor:
    """Codes of one grid, [R, T, H, W], written down in the run's ledger."""
    with run.ledger.timed(stage):
        # a draft of the slice or step before costs 1 to 3% more passes than the sampler's own first guess
        told = run.ledger.teller(stage, len(condition))
        drawn = sample_grid(stack, condition, noise, run.temperature, told, weights=run.weights)
    exact = code_loglikelihood(stack, drawn.codes, condition, "float32") if run.compare else None
    run.ledger.drew(stage, drawn, run.temperature, exact)
    return drawn.codes


def _check(frames: Tensor, n: int, samples: Samples, temperature: float, weights: str) -> None:
    shape = list(frames.shape)
    if frames.ndim != 5 or shape[1:3] != [GIVEN, 3] or shape[0] < 1 or shape[3] % 8 or shape[4] % 8:
        raise UsageError(f"predict: `frames` must be [B, 4, 3, H, W] with H and W divisible by 8, got {shape}.")
    counts = {len(one) for one in samples} if isinstance(samples, list) else {
        samples if isinstance(samples, int) else len(samples)
    }
    if n < 1 or min(counts, default=0) < 1:
        raise UsageError(f"predict: frames to predict and samples must be at least 1, got {n} and {samples}.")
    if isinstance(samples, list) and (len(counts) > 1 or len(samples) != shape[0]):
        raise UsageError(f"predict: a list of samples is {shape[0]} ranges of one length, one a clip, got {samples}.")
    if not temperature > 0:
        raise UsageError(f"predict: temperature must be positive, got {temperature}.")
    if weights not in WEIGHTS:
        raise UsageError(f"predict: weights must be one of {', '.join(WEIGHTS)}, got {weights!r}.")
