"""What doctor and selftest tell a user about their machine."""

import pytest
import torch

from fastvid import laws, ops
from fastvid.cli import main
from fastvid.doctor import findings
from fastvid.ops._op import Backend, never


def test_doctor_tells_every_ops_backends(capsys):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in told
    for name, op in ops.OPS.items():
        assert f"\n{name}: [" in told
        for backend in op.backends:
            assert f"  {backend.name}:" in told
    served = sum(line.split()[-1:] == ["serves"] for line in told.splitlines())
    assert served == (len(ops.OPS) + 1) * len(laws.devices()), "one line serves for each op and for the reference ones"
    assert "native cpu library: " in told and "GPU: " in told and "dino64" in told


def test_doctor_says_why_there_is_no_native_library(monkeypatch):
    from fastvid import _native

    monkeypatch.setenv("FASTVID_NATIVE", "off")
    _native._open.cache_clear()
    try:
        assert any("library: none: switched off by FASTVID_NATIVE" in line for line in findings())
        assert "FASTVID_NATIVE=off" in findings()
    finally:
        monkeypatch.undo()
        _native._open.cache_clear()


def test_selftest_passes_here(capsys):
    assert main(["selftest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[:-1]]
    assert len(rows) == len(laws.devices()) * sum(len(op.backends) for op in ops.OPS.values())
    assert {row[0] for row in rows} <= {"pass", "skip"}
    assert all(len(row) > 5 for row in rows), "a skipped one gives its reason"
    tried = sum(row[0] == "pass" for row in rows)
    assert tried >= len(ops.OPS) and lines[-1] == f"{tried} of {tried} backends that can run here hold every law"


def test_an_unknown_backend_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("FASTVID_BACKEND", "gpu")
    assert main(["doctor"]) == 2
    told = capsys.readouterr().err
    assert told == "fastvid: FASTVID_BACKEND: unknown backend 'gpu'; known: triton, cuda, cpu, reference.\n"


@pytest.mark.parametrize("wrong", ["ValueError", "bits"])
def test_selftest_finds_a_broken_backend(wrong, monkeypatch, capsys):
    honest = ops.nearest_codebook.backends[-1].run

    def broken(*args):
        if wrong == "ValueError":
            raise ValueError("the card\nfell out")
        near = honest(*args)
        return near._replace(sums=near.sums * 1.001)

    monkeypatch.setattr(ops.nearest_codebook, "backends", (Backend("reference", broken, never),))
    assert main(["selftest"]) == 1
    told = capsys.readouterr().out
    assert "FAIL  nearest_codebook " in told and "named_sizes: " in told
    assert ("ValueError: the card fell out" in told) == (wrong == "ValueError")
