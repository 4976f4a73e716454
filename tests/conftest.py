"""What every test gets: fixed seeds, poisoned memory, a device to run on, and a reason where one is missing."""

import functools
import os
import random

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels then run on the CPU

with torch.device("meta"):
    torch.empty(0)  # torch remembers its constructors at the first use of a device context: before they are wrapped

SEED = 20240131
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill fresh memory with values that no computation survives unnoticed: NaN, or the largest integer."""
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype in _INTEGERS else tensor


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised memory is poisoned, so that an output element nobody wrote fails loudly instead of by chance."""
    places = [(torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty", "new_empty_strided"))]
    for owner, names in places:
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate):
    @functools.wraps(allocate)
    def allocate_poisoned(*args, **kwargs):
        out = kwargs.get("out")  # a caller's own tensor is not fresh memory
        return poison(allocate(*args, **kwargs)) if out is None else allocate(*args, **kwargs)

    return allocate_poisoned
