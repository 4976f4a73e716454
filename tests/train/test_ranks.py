"""Two processes on the CPU: once under torchrun, else forked by the program, which imports torch once for both."""

import csv
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from program import OPTIONS, make_task, options_of
from test_resume import environment

from fastvid.checkpoint import load_parts
from fastvid.train import train

PROGRAM = str(Path(__file__).with_name("program.py"))


def torchrun(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
               "--master-port", str(port), PROGRAM, str(out), *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def two_processes(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, PROGRAM, str(out), "--ranks", "2", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def losses(out: Path, name: str = "loss") -> list[float]:
    with open(out / "log.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def test_codebooks_are_bit_identical_between_processes_at_every_step(tmp_path):
    done = torchrun(tmp_path / "run", "--task", "vqvae", "--steps", "20")
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"rank{r}.txt").read_text().splitlines() for r in (0, 1))
    assert first == second and len(first) == 20 and len(set(first)) == 20
    assert load_parts(tmp_path / "run" / "checkpoint")[1]["step"] == 20
    resumed = two_processes(tmp_path / "run", "--task", "vqvae", "--steps", "24", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    whole = two_processes(tmp_path / "whole", "--task", "vqvae", "--steps", "24")
    assert whole.returncode == 0, whole.stderr
    a, b = (load_parts(tmp_path / name / "checkpoint")[0] for name in ("run", "whole"))
    assert all(torch.equal(t, b[part][name]) for part, ts in a.items() for name, t in ts.items())


def test_two_processes_equal_one_with_the_same_global_batch(tmp_path):
    done = two_processes(tmp_path / "two", "--task", "lean", "--steps", "30")
    assert done.returncode == 0, done.stderr
    train(make_task("lean"), replace(OPTIONS, steps=30), tmp_path / "one")
    for rank in (0, 1):
        # a thread of the group that outlives it may abort the interpreter at its exit
        assert "gloo" not in (tmp_path / f"threads{rank}.txt").read_text()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_two_processes_play_one_game(tmp_path):
    """Noise, classes and clips are those of the whole batch, and so are the norms' moments: rounding alone differs."""
    done = two_processes(tmp_path / "two", "--task", "gan", "--steps", "12")
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"rank{r}.txt").read_text() for r in (0, 1))
    assert first == second and len(set(first.split())) == 3 * 12
    train(make_task("gan"), options_of("gan", 12), tmp_path / "one")
    for name in ("loss_d", "loss_g", "gradient_norm_d", "gradient_norm_g", "score_fake_temporal"):
        assert losses(tmp_path / "two", name) == pytest.approx(losses(tmp_path / "one", name), rel=1e-3, abs=1e-5)


def test_processes_that_drift_apart_are_stopped(tmp_path):
    """The net's running mean is not reduced over the processes, as a careless layer's would not be."""
    done = two_processes(tmp_path / "run", "--task", "net", "--steps", "20")
    assert done.returncode != 0
    assert "the processes drifted apart in mean" in done.stderr


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fastvid.train.ranks.Ranks.__init__", lambda self: self.__dict__.update(rank=0, world=3))
    with pytest.raises(ValueError, match="divisible by the 3 processes, got 4"):
        train(make_task("net"), OPTIONS, tmp_path / "run")
