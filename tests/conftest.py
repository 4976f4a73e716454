"""What every test gets: fixed seeds, poisoned memory, a device to run on, and a reason where one is missing."""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))  # tests side by side share the processors

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels then run on the CPU

from fastvid.testing import poisoned_memory

with torch.device("meta"):
    torch.empty(0)  # torch remembers its constructors at the first use of a device context: before they are wrapped

sys.path.append(str(Path(__file__).parent))  # for the modules that tests of several folders share

SEED = 20240131


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, this machine has none"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """Each device a test should hold on; the CUDA one is skipped, with the reason, where there is none."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeds():
    """The same random numbers for a test whether it runs alone or among others."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def poison():
    """Uninitialised memory is poisoned in every test."""
    with poisoned_memory():
        yield


# Published weights that the project may not ship; they lie beside the checkout where its tests are run in earnest
WEIGHTS = Path(os.environ.get("FASTVID_TEST_WEIGHTS") or Path(__file__).resolve().parents[2] / "shared" / "weights")


def _published(name: str) -> Path:
    if not (WEIGHTS / name).is_file():
        absent = f"{name} is not in {WEIGHTS}; FASTVID_TEST_WEIGHTS names the folder that holds it"
        pytest.fail(absent) if os.environ.get("CI") else pytest.skip(absent)
    return WEIGHTS / name


@pytest.fixture(scope="session")
def i3d_weights() -> Path:
    """The I3D behind FVD."""
    return _published("i3d_kinetics400.safetensors")


@pytest.fixture(scope="session")
def lpips_alex_weights() -> Path:
    """AlexNet and the heads of LPIPS."""
    return _published("lpips_alexnet.safetensors")
