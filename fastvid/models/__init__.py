"""Complete models, one file each (DVD-GAN in three), and their presets."""

from fastvid.models.bottom_prior import BottomPrior, BottomPriorConfig
from fastvid.models.dvd_config import DVDGANConfig
from fastvid.models.dvd_gan import DVDGANGenerator, DVDGANPredictor, SpatialDiscriminator, TemporalDiscriminator
from fastvid.models.hierarchical_vqvae import HierarchicalVQVAE, VQVAEConfig, VQVAEOutput
from fastvid.models.predictor import (
    About,
    Prediction,
    Stretch,
    VideoPredictor,
    about,
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
    "KINDS", "PRESETS", "About", "BottomPrior", "BottomPriorConfig", "DVDGANConfig", "DVDGANGenerator",
    "DVDGANPredictor", "HierarchicalVQVAE", "Prediction", "SpatialDiscriminator", "Stage", "Stages", "Stretch",
    "TemporalDiscriminator", "TopPrior", "TopPriorConfig", "VQVAEConfig", "VQVAEOutput", "VideoPredictor", "about",
    "assemble", "build", "frame_size", "list_models", "load", "load_part", "preset",
]  # fmt: skip
