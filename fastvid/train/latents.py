"""The codes of every training window, made once by a trained autoencoder and kept beside the run."""

import hashlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastvid.checkpoint import has_folder, load_folder, read_config, save_folder
from fastvid.errors import CheckpointError, DataError, VideoError
from fastvid.models.predictor import GIVEN

MAX_BAD_SHARE = 0.05


class Latents(NamedTuple):
    """Codes of N windows of 16 frames, int16 in store, int64 once taken; and what identifies them.

    given_top [N, 1, h, w], given_bottom [N, 2, 2h, 2w]: the first 4 frames encoded alone, as at sampling time.
    top [N, 4, h, w], bottom [N, 8, 2h, 2w]:             the whole window encoded.
    """

    given_top: Tensor
    given_bottom: Tensor
    top: Tensor
    bottom: Tensor
    key: str

    def take(self, rows: Tensor) -> "Latents":
        """The windows `rows` [B] as int64."""
        return Latents(*(codes[rows].long() for codes in self[:4]), self.key)

    def to(self, device: torch.device | str) -> "Latents":
        """The same on a device."""
        return Latents(*(codes.to(device) for codes in self[:4]), self.key)


def load_latents(folder: str | Path, vqvae: nn.Module, windows, identity: dict, every: int = 4,
                 batch_size: int = 16) -> Latents:
    """Codes from the cache in `folder`, or made now and kept there; a cache of another model or data is made anew.

    vqvae:    the trained autoencoder. windows: a ClipWindows (anything with its `windows` and `at`).
    identity: JSON values that identify the weights and the clips; with `every` they are the cache's key.
    every:    frames between the starts of two windows of a clip.
    Returns:  Latents on the CPU.
    Raises:   DataError if the data hold no window, CheckpointError if the cache cannot be written.
    """
    key = latents_key(identity, every)
    if has_folder(folder):
        found = _read(Path(folder), key)
        if found is not None:
            return found
    latents = encode_windows(vqvae, windows, key, every, batch_size)
    save_folder(folder, dict(zip(Latents._fields, latents[:4], strict=False)), {"kind": "latents", "key": key})
    return latents


def latents_key(identity: dict, every: int) -> str:
    """sha256 (hex) of what decides the codes. Raises TypeError for values that JSON does not know."""
    return hashlib.sha256(json.dumps({"every": every, **identity}, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def encode_windows(vqvae: nn.Module, windows, key: str, every: int = 4, batch_size: int = 16) -> Latents:
    """Encode every window of the data, whole and its first 4 frames alone.

    Arguments as for `load_latents`; key: goes into the result. A clip that cannot be decoded is named and left out.
    Returns: Latents on the CPU.
    Raises:  DataError if there is no window, or more than 5 in 100 clips cannot be decoded.
    """
    places = windows.windows(every=every)
    if not places:
        raise DataError("the data hold no window of 16 frames; give longer clips.")
    was_training = vqvae.training
    vqvae.eval()
    parts, bad = [], {}
    count = len({clip for clip, _ in places})
    with tqdm(total=len(places), unit="window", desc="encoding", mininterval=1) as bar:
        for start in range(0, len(places), batch_size):
            chosen = places[start:start + batch_size]
            clips = _read_windows(windows, chosen, bad)
            if len(bad) > MAX_BAD_SHARE * count:
                raise DataError(f"{len(bad)} clips cannot be decoded, the last: {list(bad.values())[-1]}")
            if clips:
                parts.append(_encode(vqvae, torch.stack(clips)))
            bar.update(len(chosen))
    vqvae.train(was_training)
    return Latents(*(torch.cat(codes) for codes in zip(*parts, strict=True)), key)


def _read_windows(windows, places: list[tuple[int, int]], bad: dict[int, VideoError]) -> list[Tensor]:
    clips = []
    for clip, start in places:
        if clip in bad:
            continue
        try:
            clips.append(windows.at(clip, start))
        except VideoError as error:
            bad[clip] = error
            tqdm.write(f"clip left out: {error}", file=sys.stderr)
    return clips


def _encode(vqvae: nn.Module, clips: Tensor) -> list[Tensor]:
    device = next(vqvae.parameters()).device
    video = as_model_input(clips, device)
    return [codes.to("cpu", torch.int16) for codes in (*vqvae.encode(video[:, :, :GIVEN]), *vqvae.encode(video))]


def as_model_input(clips: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, 3, T, H, W] in [0, 1], channels last in memory. Raises nothing."""
    return clips.to(device).float().div_(255).movedim(-1, 1)


def _read(folder: Path, key: str) -> Latents | None:
    """The cache if it is whole and of this key; says on stderr why it is not used."""
    try:
        if read_config(folder).get("key") != key:
            print(f"{folder}: made with another model or data; encoding again.", file=sys.stderr)
            return None
        tensors, _ = load_folder(folder)
        return Latents(*(tensors[name] for name in Latents._fields[:4]), key)
    except (CheckpointError, KeyError) as error:
        print(f"{error} Encoding again.", file=sys.stderr)
        return None
