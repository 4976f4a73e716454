"""Fast latent video models: custom kernels, drop-in torch modules and complete models.

    model = fastvid.load("dino64")                          # a shipped name or a model folder
    future = model.predict(frames, n=12, samples=4, seed=0)  # [B, 4, 3, H, W] in [0, 1] -> [B, S, 12, 3, H, W]

Nothing heavy is imported here: each door below opens on first use, so that the command line answers at once.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

__version__ = "0.1.0"  # pyproject.toml says the same

# function -> the module of fastvid that holds it
_DOORS = {"accelerate": "swaps", "backend": "ops", "list_models": "models", "load": "models"}
_MODULES = ("data", "metrics", "models", "nn", "ops", "sampling")

__all__ = ["__version__", *_DOORS, *_MODULES]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"fastvid.{name}")
    if name in _DOORS:
        return getattr(importlib.import_module(f"fastvid.{_DOORS[name]}"), name)
    raise AttributeError(f"module 'fastvid' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _checkout_kernels() -> types.ModuleType | None:
    # A wheel holds the rooms as fastvid/kernels/. In a checkout they stand beside the package, and the marker files
    # tell that folder from a stranger's top-level `kernels` in site-packages.
    root = Path(__file__).resolve().parent.parent
    if not ((root / "CMakeLists.txt").is_file() and (root / "kernels" / "common").is_dir()):
        return None
    spec = importlib.machinery.ModuleSpec("fastvid.kernels", loader=None, is_package=True)
    spec.submodule_search_locations = [str(root / "kernels")]
    return importlib.util.module_from_spec(spec)


if (_beside := _checkout_kernels()) is not None:
    kernels = sys.modules["fastvid.kernels"] = _beside
