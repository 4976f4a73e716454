"""The whole chain: four frames in, the next ones out, through the VQ-VAE and its two priors."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fastvid.checkpoint import has_folder, load_folder, save_folder
from fastvid.errors import CheckpointError, UsageError
from fastvid.models.bottom_prior import ABSENT, BottomPrior
from fastvid.models.hierarchical_vqvae import HierarchicalVQVAE
from fastvid.models.registry import build
from fastvid.models.top_prior import TopPrior
from fastvid.sampling import Noise, sample

GIVEN = 4  # frames conditioned on: one top step, two bottom slices
FRAMES_PER_STEP, SLICES_PER_STEP = 4, 2
TOP_STREAM, BOTTOM_STREAM = 0, 1
ROWS_AT_ONCE = 64  # samples that advance together; it bounds memory and never changes a code
SHIPPED = Path(__file__).with_name("weights")

Report = Callable[[str, int, int], None]  # stage, done, total


@dataclass
class Prediction:
    """Frames [B, S, n, 3, H, W] in [0, 1]; codes of each stretch of frames; wall-clock seconds and codes per stage."""

    frames: Tensor
    top: list[Tensor] = field(default_factory=list)  # each [B, S, steps + 1, H/8, W/8]
    bottom: list[Tensor] = field(default_factory=list)  # each [B, S, 2 (steps + 1), H/4, W/4]
    seconds: dict[str, float] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)


class VideoPredictor(nn.Module):
    """A hierarchical VQ-VAE with its top and bottom prior, and the frame size they were trained for.

    Source: Walker, Razavi, van den Oord 2021, arXiv:2103.01950.
    """

    def __init__(self, vqvae: HierarchicalVQVAE, top: TopPrior, bottom: BottomPrior, size: tuple[int, int] = (64, 64)):
        super().__init__()
        self.vqvae, self.top, self.bottom, self.size = vqvae, top, bottom, tuple(size)
        self.eval()

    def predict(
        self, frames: Tensor, n: int = 12, samples: int = 1, seed: int = 0, temperature: float = 1.0,
        progress: Report | None = None,
    ) -> Tensor:
        """The next frames of each clip, drawn `samples` times.

        frames:   [B, 4, 3, H, W] in [0, 1], H and W divisible by 8 (`size` is what the model was trained for).
        n:        frames to predict; beyond what one pass yields (12) the model slides on over its own output.
        seed:     with the sample's index it decides every draw; neither B, `samples` nor `n` changes a sample's frames.
        Returns:  [B, samples, n, 3, H, W] in [0, 1].
        Raises:   UsageError for another shape, n or samples below 1, or a temperature that is not positive.
        """
        return self.predict_codes(frames, n, samples, seed, temperature, progress).frames

    @torch.no_grad()
    def predict_codes(
        self, frames: Tensor, n: int = 12, samples: int = 1, seed: int = 0, temperature: float = 1.0,
        progress: Report | None = None,
    ) -> Prediction:
        """As `predict`, with the codes, the time and the number of codes of every stage."""
        _check(frames, n, samples, temperature)
        B, stretches = frames.shape[0], -(-n // (self.top.config.steps * FRAMES_PER_STEP))
        given = frames.repeat_interleave(samples, dim=0).transpose(1, 2)  # [B*S, 3, 4, H, W]
        identities = torch.arange(samples).repeat(B)
        result, parts = Prediction(frames), []
        clock = _Clock(result, progress)
        for stretch in range(stretches):
            chunks = [
                self._stretch(rows, tuple(ids.tolist()), stretch, seed, temperature, clock)
                for rows, ids in zip(given.split(ROWS_AT_ONCE), identities.split(ROWS_AT_ONCE), strict=True)
            ]
            video, top, bottom = (torch.cat(part) for part in zip(*chunks, strict=True))
            parts.append(video[:, :, GIVEN:])
            given = video[:, :, -GIVEN:]
            result.top.append(top.unflatten(0, (B, samples)))
            result.bottom.append(bottom.unflatten(0, (B, samples)))
        future = torch.cat(parts, dim=2)[:, :, :n].transpose(1, 2)  # [B*S, n, 3, H, W]
        result.frames = future.unflatten(0, (B, samples))
        return result

    def _stretch(
        self, given: Tensor, identities: tuple[int, ...], stretch: int, seed: int, temperature: float, clock: "_Clock"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pass over `steps` latent steps. given [R, 3, 4, H, W] -> video [R, 3, T, H, W], top and bottom codes."""
        steps = self.top.config.steps
        with clock("encode", len(identities), 0):
            given_top, given_bottom = _each(self.vqvae.encode, given)
        grid_top, grid_bottom = given_top[0, 0].numel(), given_bottom[0, 0].numel()
        with clock("top", len(identities), steps * grid_top) as advance:
            (condition,) = _each(lambda *codes: (self.top.condition(*codes),), given_top, given_bottom)
            noise = Noise(seed, identities, TOP_STREAM, stretch * steps)
            future = sample(self.top.stack, condition, noise, temperature, advance)
            top = torch.cat([given_top, future], dim=1)  # [R, steps + 1, H, W]
        slices = range(SLICES_PER_STEP, SLICES_PER_STEP * (steps + 1))
        with clock("bottom", len(identities), len(slices) * grid_bottom) as advance:
            bottom = top.new_full((len(identities), slices.stop, *given_bottom.shape[2:]), ABSENT)
            bottom[:, :SLICES_PER_STEP] = given_bottom
            (above,) = _each(lambda codes: (self.bottom.conditioning.above(codes),), top)
            for i in slices:
                noise = Noise(seed, identities, BOTTOM_STREAM, stretch * len(slices) + i)
                condition = self._condition_slice(i, above, bottom)
                bottom[:, i] = sample(self.bottom.stack, condition, noise, temperature, advance)[:, 0]
        with clock("decode", len(identities), 0):
            (video,) = _each(lambda *codes: (self.vqvae.decode(*codes),), top, bottom)
        return video, top, bottom

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


def load(name: str | Path) -> VideoPredictor:
    """A shipped model by name, or any model folder written by `VideoPredictor.save`, verified by its hashes.

    Raises UsageError for an unknown name and CheckpointError for a damaged folder.
    """
    path = model_folder(name)
    if not path.is_dir():
        raise UsageError(
            f"unknown model {str(name)!r}: neither a folder nor one of {', '.join(list_models()) or '(none shipped)'}."
        )
    tensors, config = load_folder(path)
    if config.get("kind") != "predictor":
        raise CheckpointError(f"{path}: wanted a predictor, got kind {config.get('kind')!r}; assemble one first.")
    parts = [build(kind, config[kind]) for kind in ("vqvae", "top", "bottom")]
    return _fill(VideoPredictor(*parts, size=config["size"]), tensors, path)


def model_folder(name: str | Path) -> Path:
    """The folder of a shipped model, or the path itself."""
    return SHIPPED / str(name) if str(name) in list_models() else Path(name)


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
    model = build(kind, {name: value for name, value in config.items() if name != "kind"})
    return _fill(model, tensors, folder), folder


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


def _check(frames: Tensor, n: int, samples: int, temperature: float) -> None:
    shape = list(frames.shape)
    if frames.ndim != 5 or shape[1:3] != [GIVEN, 3] or shape[0] < 1 or shape[3] % 8 or shape[4] % 8:
        raise UsageError(f"predict: `frames` must be [B, 4, 3, H, W] with H and W divisible by 8, got {shape}.")
    if n < 1 or samples < 1:
        raise UsageError(f"predict: frames to predict and samples must be at least 1, got {n} and {samples}.")
    if not temperature > 0:
        raise UsageError(f"predict: temperature must be positive, got {temperature}.")


class _Clock:
    """Adds a stage's wall-clock time to a Prediction and tells the caller how far it is."""

    def __init__(self, result: Prediction, report: Report | None):
        self.result, self.report = result, report

    def __call__(self, stage: str, rows: int, codes: int) -> "_Clock":
        self.stage, self.rows, self.total, self.done = stage, rows, rows * codes, 0
        return self

    def __enter__(self) -> Callable[[int], None]:
        self.start = time.perf_counter()
        return self.advance

    def __exit__(self, *_) -> None:
        spent = time.perf_counter() - self.start
        self.result.seconds[self.stage] = self.result.seconds.get(self.stage, 0.0) + spent
        self.result.codes[self.stage] = self.result.codes.get(self.stage, 0) + self.total

    def advance(self, codes: int) -> None:
        self.done += self.rows * codes
        if self.report:
            self.report(self.stage, self.done, self.total)
