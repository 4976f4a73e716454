"""Features of clips under I3D, computed once: a cache keyed by the pixels, the extractor and the resize."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvid.metrics import i3d as network
from fastvid.weights import Weights

POOLED, LOGITS = 1024, 400
VERSION = 1  # of how features are computed; a cache of another version is not read


class Features(NamedTuple):
    """Of n clips: pooled [n, 1024] and logits [n, 400], float32."""

    pooled: Tensor
    logits: Tensor


def default_cache() -> Path:
    """Where features are kept unless told otherwise. Raises nothing."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvid" / "features"


class Extractor:
    """I3D with its weights, which remembers what it has seen.

    weights: of an I3D. resize: "tf1" or "torch". cache: folder, or None to remember nothing.
    A file that cannot be read or written costs time, never a figure: features are computed again.
    """

    def __init__(self, weights: Weights, resize: str, cache: Path | None):
        self.weights, self.resize = weights, resize
        self.folder = None if cache is None else cache / f"v{VERSION}-{weights.fingerprint[:16]}-{resize}"
        self.network = network.I3D.from_tensors(weights.tensors)

    def __call__(self, clips: Tensor) -> Features:
        """Features of uint8 clips [n, T, H, W, 3]."""
        files = [self._file(clip) for clip in clips]
        rows = [_read(file) for file in files]
        missing = [i for i, row in enumerate(rows) if row is None]
        if missing:
            video = clips[missing].float().div(255).movedim(-1, 1)  # [m, 3, T, H, W]
            made = network.features(self.network, video, self.resize)
            for i, row in zip(missing, torch.cat([made.pooled, made.logits], dim=1), strict=True):
                rows[i] = row
                _write(files[i], row)
        return Features(*torch.stack(rows).split([POOLED, LOGITS], dim=1))

    def _file(self, clip: Tensor) -> Path | None:
        if self.folder is None:
            return None
        pixels = clip.contiguous().numpy()
        digest = hashlib.sha256(repr(pixels.shape).encode())
        digest.update(memoryview(pixels))
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.features"


def _read(file: Path | None) -> Tensor | None:
    """The row that was kept, if it is there and whole: its sha256 stands behind it."""
    try:
        data = b"" if file is None else file.read_bytes()
    except OSError:
        return None
    body, seal = data[:-32], data[-32:]
    if len(body) != 4 * (POOLED + LOGITS) or hashlib.sha256(body).digest() != seal:
        return None
    return torch.from_numpy(np.frombuffer(body, np.float32).copy())


def _write(file: Path | None, row: Tensor) -> None:
    if file is None:
        return
    body = row.float().contiguous().numpy().tobytes()
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(body + hashlib.sha256(body).digest())
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
