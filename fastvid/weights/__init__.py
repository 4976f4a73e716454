"""Published networks that metrics need: where they are kept, how they get there, and how one is told from another."""

from fastvid.weights.adding import Added, add, add_command, list_command
from fastvid.weights.kinds import KINDS, fingerprint, weights_folder
from fastvid.weights.store import Weights, load_weights

__all__ = [
    "KINDS", "Added", "Weights", "add", "add_command", "fingerprint", "list_command", "load_weights", "weights_folder",
]
