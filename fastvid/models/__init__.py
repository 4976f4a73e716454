"""Complete models, one file each, and their presets."""

from fastvid.models.bottom_prior import BottomPrior, BottomPriorConfig
from fastvid.models.hierarchical_vqvae import HierarchicalVQVAE, VQVAEConfig, VQVAEOutput
from fastvid.models.predictor import (
    Prediction,
    Stretch,
    VideoPredictor,
    assemble,
    frame_size,
    list_models,
    load,
    load_part,
)
from fastvid.models.registry import KINDS, PRESETS, build, preset
from fastvid.models.stages import Stage, Stages
from fastvid.models.top_prior import TopPrior, TopPriorConfig

__all__ = [
    "KINDS", "PRESETS", "BottomPrior", "BottomPriorConfig", "HierarchicalVQVAE", "Prediction", "Stage", "Stages",
    "Stretch", "TopPrior", "TopPriorConfig", "VQVAEConfig", "VQVAEOutput", "VideoPredictor", "assemble", "build",
    "frame_size", "list_models", "load", "load_part", "preset",
]  # fmt: skip
