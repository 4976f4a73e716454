"""What every test gets: fixed seeds, poisoned memory, a device to run on, and a reason where one is missing."""

import os
import random

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
