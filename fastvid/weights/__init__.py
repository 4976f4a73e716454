"""Published networks that metrics need: where they are kept, how they get there, and how one is told from another."""

from fastvid.weights.kinds import KINDS, fingerprint, weights_folder
from fastvid.weights.store import Weights, load_weights

__all__ = ["KINDS", "Weights", "fingerprint", "load_weights", "weights_folder"]
