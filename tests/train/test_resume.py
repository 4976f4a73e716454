"""A run that was killed, interrupted or ran out of time goes on as if nothing had happened.

Fifty kills instead of two: python -m pytest -m long tests/train/test_resume.py
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from program import OPTIONS, make_task, options_of

from fastvid.checkpoint import load_folder, load_parts
from fastvid.errors import CheckpointError, UsageError
from fastvid.train import train

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, str(Path(__file__).with_name("program.py"))]


@pytest.fixture(autouse=True)
def one_thread():
    # as in the programs: another number of threads rounds differently
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def environment() -> dict:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}


def rows(out: Path) -> list[dict]:
    with open(out / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "clips_per_second"} for row in csv.DictReader(file)]


def assert_same_run(a: Path, b: Path):
    (parts_a, config_a), (parts_b, config_b) = load_parts(a / "checkpoint"), load_parts(b / "checkpoint")
    assert config_a == config_b
    assert parts_a.keys() == parts_b.keys() == {"model", "average", "optimizer"}
    for part, tensors in parts_a.items():
        assert tensors.keys() == parts_b[part].keys() and tensors
        for name, tensor in tensors.items():
            assert torch.equal(tensor, parts_b[part][name]), (part, name)
    for name, tensor in load_folder(a / "model")[0].items():
        assert torch.equal(tensor, load_folder(b / "model")[0][name]), name
    assert rows(a) == rows(b)


def killed_equals_unbroken(tmp_path: Path, kind: str, steps: int, kills: int, seed: int):
    train(make_task(kind), options_of(kind, steps), tmp_path / "whole")
    command = [*PROGRAM, str(tmp_path / "killed"), "--task", kind, "--steps", str(steps), "--kills", str(kills)]
    done = subprocess.run([*command, "--seed", str(seed)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["hits"] == kills
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert [int(row["step"]) for row in rows(tmp_path / "killed")] == list(range(1, steps + 1))


@pytest.mark.parametrize("kind", ["net", "vqvae"])
def test_killed_twice_equals_unbroken(tmp_path, kind):
    killed_equals_unbroken(tmp_path, kind, steps=24, kills=2, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["net", "vqvae", "gan"])
def test_killed_fifty_times_equals_unbroken(tmp_path, kind):
    killed_equals_unbroken(tmp_path, kind, steps=250, kills=50, seed=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step_and_says_how_to_go_on(tmp_path, number):
    out = tmp_path / "run"
    process = subprocess.Popen([*PROGRAM, str(out), "--steps", "1000000"], env=environment(), stderr=subprocess.PIPE)
    while not ((out / "log.csv").exists() and len(rows(out)) > 4):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    process.send_signal(number)
    process.send_signal(number)  # as under torchrun, which passes on what the terminal has sent already
    message = process.communicate()[1].decode()
    assert process.returncode == 130
    assert "--resume" in message.splitlines()[-1] and "Traceback" not in message
    step = load_parts(out / "checkpoint")[1]["step"]
    assert f"step {step} of 1000000" in message.splitlines()[-1]
    for path, resume in ((out, True), (tmp_path / "whole", False)):
        train(make_task("net"), replace(OPTIONS, steps=step + 7), path, resume)
    left, whole = (load_parts(path / "checkpoint") for path in (out, tmp_path / "whole"))
    assert all(torch.equal(t, whole[0][part][k]) for part, ts in left[0].items() for k, t in ts.items())


def test_time_runs_out_with_a_checkpoint(tmp_path):
    first = train(make_task("net"), replace(OPTIONS, minutes=1e-9), tmp_path / "a")
    assert (first.step, first.finished) == (1, False)
    assert load_folder(first.model)[1] == {"kind": "net"}
    last = train(make_task("net"), OPTIONS, tmp_path / "a", resume=True)
    assert (last.step, last.finished) == (OPTIONS.steps, True)
    train(make_task("net"), OPTIONS, tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_log_rows_after_the_checkpoint_are_dropped(tmp_path):
    out = tmp_path / "run"
    train(make_task("net"), replace(OPTIONS, steps=6), out)
    whole = rows(out)
    with open(out / "log.csv", "a") as file:
        # what a killed run leaves: rows beyond its checkpoint, the last one cut
        file.write("7,0.1,0.2,0.3,0.001,0,99\r\n8,0.1,0.2,0.3,0.001,0,99\r\n9,0.")
    train(make_task("net"), replace(OPTIONS, steps=8), out, resume=True)
    assert [int(row["step"]) for row in rows(out)] == list(range(1, 9))
    assert rows(out)[:6] == whole and rows(out)[6]["loss"] != "0.1"


def test_a_finished_run_that_goes_on_is_left_as_it_is(tmp_path):
    train(make_task("net"), OPTIONS, tmp_path / "a")
    before = load_parts(tmp_path / "a" / "checkpoint")[0]
    assert train(make_task("net"), OPTIONS, tmp_path / "a", resume=True).finished
    after = load_parts(tmp_path / "a" / "checkpoint")[0]
    assert all(torch.equal(t, after[part][name]) for part, ts in before.items() for name, t in ts.items())


def test_resume_needs_a_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="--resume: .* holds no checkpoint"):
        train(make_task("net"), OPTIONS, tmp_path / "none", resume=True)


def test_an_old_run_is_not_overwritten(tmp_path):
    train(make_task("net"), replace(OPTIONS, steps=2), tmp_path / "a")
    with pytest.raises(UsageError, match="continue it with --resume"):
        train(make_task("net"), OPTIONS, tmp_path / "a")


def test_a_strangers_folder_is_not_written_into(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        train(make_task("net"), OPTIONS, tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        train(make_task("net"), OPTIONS, tmp_path / "thesis.tex")


@pytest.mark.parametrize(("change", "words"), [
    ({"learning_rate": 1e-4}, "--learning-rate = 0.003, now it is 0.0001"),
    ({"seed": 1}, "--seed = 0, now it is 1"),
    ({"batch_size": 8}, "--batch-size"),
    ({"decay": "cosine"}, "--decay"),
])
def test_changed_options_are_refused(tmp_path, change, words):
    train(make_task("net"), replace(OPTIONS, steps=2), tmp_path / "a")
    with pytest.raises(UsageError, match=words):
        train(make_task("net"), replace(OPTIONS, **change), tmp_path / "a", resume=True)


def test_a_schedule_fixes_the_number_of_steps(tmp_path):
    options = replace(OPTIONS, decay="cosine", steps=4)
    train(make_task("net"), options, tmp_path / "a")
    with pytest.raises(UsageError, match="--steps = 4, now it is 5"):
        train(make_task("net"), replace(options, steps=5), tmp_path / "a", resume=True)


def test_other_data_or_another_model_are_refused(tmp_path):
    train(make_task("net"), replace(OPTIONS, steps=2), tmp_path / "a")
    task = make_task("net")
    task.fingerprint = {"data": "other noise"}
    with pytest.raises(UsageError, match="its data = noise, now it is other noise"):
        train(task, OPTIONS, tmp_path / "a", resume=True)


def test_a_damaged_checkpoint_is_one_error(tmp_path):
    train(make_task("net"), replace(OPTIONS, steps=2), tmp_path / "a")
    file = tmp_path / "a" / "checkpoint" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: damaged"):
        train(make_task("net"), OPTIONS, tmp_path / "a", resume=True)
