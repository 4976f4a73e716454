"""Small DVD-GANs with random weights, in folders, for tests of what uses them."""

from dataclasses import asdict
from pathlib import Path

import torch

from fastvid.checkpoint import save_folder
from fastvid.models import build, preset

NAMES = ("zero", "4", "a b/c")


def save_dvdgan(folder: Path, name: str = "tiny", **changes) -> Path:
    """A model folder; `changes` of the preset's config."""
    torch.manual_seed(0)
    config = asdict(preset("dvdgan", name)) | changes
    model = build("dvdgan", config)
    # a fresh norm's statistics are those of nothing: with others the outputs are not all one grey
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("running_var"):
            buffer.fill_(0.05)
    save_folder(folder, model.state_dict(), {"kind": "dvdgan", **config})
    return folder


def save_classed(folder: Path, **changes) -> Path:
    """One of three classes."""
    return save_dvdgan(folder, classes=len(NAMES), class_names=NAMES, **changes)
