"""bench/ is a folder of scripts, not a package: its files are imported by their own names."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"

if str(BENCH) not in sys.path:
    sys.path.insert(0, str(BENCH))


@pytest.fixture(autouse=True)
def uncollected(monkeypatch):
    """No garbage is collected before each run that is timed: in a test process that takes longer than the runs."""
    monkeypatch.setattr("timing.gc", SimpleNamespace(collect=lambda: None))
