"""The whole of `fastvid predict` against real time: read a clip, load the model, predict, write the results."""

import contextlib
import importlib.util
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

from timing import Contestant, GateError, Race

ROOT = Path(__file__).resolve().parents[1]
MODEL, CLIP = "dino64", ROOT / "examples" / "dino.mp4"
FRAMES, FPS = 12, 25


def predict_missing(model: str = MODEL, clip: Path = CLIP) -> str | None:
    """Why the case cannot run here, in a few words; None where it can."""
    packages = {"PyAV": "av", "tqdm": "tqdm"}
    lacking = [name for name, module in packages.items() if importlib.util.find_spec(module) is None]
    if lacking:
        return f"{' and '.join(lacking)} not installed"
    from fastvid import list_models

    if model not in list_models() and not Path(model).is_dir():
        return f"model {model} not shipped"
    return None if clip.is_file() else f"clip {clip.name} not shipped"


def predict_race(model: str = MODEL, clip: Path = CLIP) -> Race:
    """One sample of 12 frames, from the file to the files, the model's loading included."""
    return Race(
        gate=lambda: _gate(model, clip),
        inputs=lambda number: number,  # the seed: every round draws other frames
        contestants=[
            Contestant("predict", lambda seed: _predict(model, clip, seed)),
            Contestant("playback", given=FRAMES / FPS),
        ],
    )


def _predict(model: str, clip: Path, seed: int, samples: int = 1) -> dict:
    with _folder() as out:
        return _predict_into(out, model, clip, seed, samples)


def _predict_into(out: Path, model: str, clip: Path, seed: int, samples: int) -> dict:
    from fastvid.predict import predict_clips

    with contextlib.redirect_stdout(io.StringIO()):
        (report,) = predict_clips([clip], model, frames=FRAMES, samples=samples, seed=seed, out=out)
    return report


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fastvid-bench-") as folder:
        yield Path(folder)


def _gate(model: str, clip: Path) -> str:
    """A sample is the same alone and in company, and its video holds the frames that were asked for."""
    from fastvid.data.video import read_video

    with _folder() as out:
        alone = _predict_into(out, model, clip, seed=0, samples=1)
        video, _ = read_video(out / alone["samples"][0]["file"])
    if video.shape[0] != 4 + FRAMES:
        raise GateError(f"the predicted video has {video.shape[0]} frames, not 4 given and {FRAMES} predicted ones")
    company = _predict(model, clip, seed=0, samples=2)
    if company["samples"][0]["frame_hash"] != alone["samples"][0]["frame_hash"]:
        raise GateError("the same seed gives other frames in company than alone")
    return f"{FRAMES} frames, the same alone and in company"
