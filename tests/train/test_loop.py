"""What one step does: non-finite numbers, averages, schedules, log and sheets."""

import csv
import math
from dataclasses import MISSING, fields, replace

import pytest
import torch
from fake_tasks import Net, NetTask

from fastvid.checkpoint import load_folder, load_parts
from fastvid.errors import FastvidError, UsageError
from fastvid.train import TrainOptions, train
from fastvid.train.loop import follow

OPTIONS = TrainOptions(
    steps=12, batch_size=8, warmup=0, decay="none", checkpoint_every=100, sample_every=0, log_every=1
)


def rows(out) -> list[dict]:
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("how", "named"), [
    ("input", "the loss is nan"), ("loss", "the loss is inf"), ("gradient", "the gradient of last.weight"),
    ("buffer", "the buffer mean"),
])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, capfd, how, named):
    """Step 5 is poisoned. Up to it the run equals a clean one, in it nothing moves, after it all stays finite."""
    result = train(NetTask(poison={5: how}), replace(OPTIONS, steps=6), tmp_path / "bad")
    assert result.skipped == 1
    assert f"step 6 skipped: {named}" in capfd.readouterr().err
    train(NetTask(), replace(OPTIONS, steps=5), tmp_path / "clean")
    bad, clean = (load_parts(tmp_path / name / "checkpoint")[0] for name in ("bad", "clean"))
    assert all(torch.equal(t, clean[part][name]) for part, ts in bad.items() for name, t in ts.items())
    assert rows(tmp_path / "bad")[5]["skipped"] == "1"


def test_poison_everywhere_never_reaches_a_checkpoint(tmp_path):
    poison = {step: ("input", "loss", "gradient", "buffer")[step % 4] for step in range(60) if step % 10}
    result = train(NetTask(poison=poison), replace(OPTIONS, steps=60), tmp_path / "run")
    assert result.skipped == len(poison) == 54
    for tensors in load_parts(tmp_path / "run" / "checkpoint")[0].values():
        assert all(t.isfinite().all() for t in tensors.values())


def test_ten_in_a_row_stop_the_run(tmp_path):
    poison = dict.fromkeys(range(3, 100), "loss")
    with pytest.raises(FastvidError, match="10 steps in a row were not finite, the last, 13, because the loss is inf"):
        train(NetTask(poison=poison), replace(OPTIONS, steps=100), tmp_path / "run")


def test_nine_in_a_row_do_not(tmp_path):
    poison = dict.fromkeys([*range(0, 9), *range(10, 19)], "loss")
    assert train(NetTask(poison=poison), replace(OPTIONS, steps=20), tmp_path / "run").skipped == 18


def test_the_count_of_skipped_steps_survives_a_resume(tmp_path):
    poison = dict.fromkeys(range(3, 100), "loss")
    train(NetTask(poison=poison), replace(OPTIONS, steps=8), tmp_path / "run")
    with pytest.raises(FastvidError, match="the last, 13,"):
        train(NetTask(poison=poison), replace(OPTIONS, steps=100), tmp_path / "run", resume=True)


def test_it_learns_and_the_model_folder_holds_the_average(tmp_path):
    task = NetTask(batch_size=64)
    options = replace(OPTIONS, steps=300, batch_size=64, learning_rate=1e-2, ema_decay=0.9)
    result = train(task, options, tmp_path / "run")
    losses = [float(row["loss"]) for row in rows(tmp_path / "run")]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    tensors, config = load_folder(result.model)
    parts = load_parts(tmp_path / "run" / "checkpoint")[0]
    assert config == {"kind": "net"}
    assert all(torch.equal(t, parts["average"][name]) for name, t in tensors.items())
    assert all(torch.equal(t, parts["model"][name]) for name, t in task.model.state_dict().items())
    assert torch.equal(tensors["mean"], parts["model"]["mean"])  # buffers are copied
    assert not torch.equal(tensors["first.weight"], parts["model"]["first.weight"])


def test_the_average_follows_by_definition():
    average, model = Net(), Net()
    want = 0.75 * average.first.weight + 0.25 * model.first.weight
    model.mean.fill_(3)
    follow(average.requires_grad_(False), model, 0.75)
    torch.testing.assert_close(average.first.weight, want)
    assert (average.mean == 3).all()


def test_a_long_gradient_is_cut(tmp_path):
    """With weights that only feel the direction (Adam's first step), the cut shows in the second moment."""
    train(NetTask(), replace(OPTIONS, steps=1, clip_norm=1e-3), tmp_path / "run")
    moments = load_parts(tmp_path / "run" / "checkpoint")[0]["optimizer"]
    first = [t for name, t in moments.items() if name.startswith("exp_avg/")]
    norm = math.sqrt(sum(float(t.square().sum()) for t in first)) / 0.1  # exp_avg = (1 - 0.9) gradient
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert float(rows(tmp_path / "run")[0]["gradient_norm"]) > 1e-2


def test_the_learning_rate_rises_and_falls():
    options = TrainOptions(steps=100, warmup=10, learning_rate=1.0)
    rates = [options.rate_at(step, options.learning_rate) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and max(rates) == rates[10] and 0 < rates[99] < 1e-3
    assert rates[50] == pytest.approx(0.5)
    assert replace(options, decay="none").rate_at(99, 1.0) == 1.0


def test_the_average_forgets_the_start_first():
    options = TrainOptions(ema_decay=0.99)
    assert options.ema_at(0) == 0.1 and options.ema_at(10_000) == 0.99


@pytest.mark.parametrize(("bad", "words"), [
    ({"steps": 0}, "--steps must be at least 1, got 0"), ({"batch_size": 0}, "--batch-size"),
    ({"learning_rate": 0.0}, "--learning-rate must be above 0"), ({"learning_rate": float("nan")}, "--learning-rate"),
    ({"warmup": -1}, "--warmup"), ({"decay": "linear"}, "--decay must be cosine or none, got linear"),
    ({"ema_decay": 1.0}, "--ema-decay"), ({"minutes": -1.0}, "--minutes"), ({"threads": 0}, "--threads"),
    ({"checkpoint_every": 0}, "--checkpoint-every"), ({"log_every": 0}, "--log-every"),
    ({"clip_norm": -1.0}, "--clip-norm"),
])
def test_options_are_checked(bad, words):
    with pytest.raises(UsageError, match=words):
        TrainOptions(**bad)


def test_the_command_line_offers_the_same_options():
    from fastvid.cli.train import TrainSettings

    def listed(cls):
        return {f.name: None if f.default is MISSING else f.default for f in fields(cls)}

    assert listed(TrainSettings) == listed(TrainOptions)


def test_log_rows_are_means_over_the_steps_since_the_last(tmp_path):
    train(NetTask(poison={2: "loss"}), replace(OPTIONS, steps=4), tmp_path / "fine")
    train(NetTask(poison={2: "loss"}), replace(OPTIONS, steps=4, log_every=4), tmp_path / "coarse")
    fine = [float(row["loss"]) for row in rows(tmp_path / "fine")]
    assert math.isnan(fine[2])
    (row,) = rows(tmp_path / "coarse")
    assert float(row["loss"]) == pytest.approx((fine[0] + fine[1] + fine[3]) / 3, rel=1e-5)
    assert list(row) == ["step", "loss", "twice", "gradient_norm", "learning_rate", "skipped", "clips_per_second"]


def test_sheets_and_the_callers_random_state(tmp_path):
    task = NetTask()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train(task, replace(OPTIONS, sample_every=5), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)
    sheets = sorted((tmp_path / "run" / "samples").iterdir())
    assert [p.name for p in sheets] == ["step_00000005.png", "step_00000010.png"] and task.sheets == 2
    train(NetTask(), OPTIONS, tmp_path / "none")
    with_sheets, without = (load_folder(tmp_path / name / "model")[0] for name in ("run", "none"))
    assert all(torch.equal(t, without[name]) for name, t in with_sheets.items())
