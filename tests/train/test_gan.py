"""The turns of a GAN: who moves when, by which loss, and what becomes of a step that goes wrong."""

import csv
from dataclasses import asdict, fields, replace

import pytest
import torch
from fake_tasks import toy_gan
from test_resume import assert_same_run

from fastvid.checkpoint import load_folder, load_parts
from fastvid.errors import FastvidError, UsageError
from fastvid.train import GANOptions, train
from fastvid.train.gan import EARLY, JUDGES, LONG, diversity

OPTIONS = GANOptions(
    steps=6, batch_size=4, generator_rate=0.01, discriminator_rate=0.02, ema_start=3, ema_decay=0.5,
    checkpoint_every=3, sample_every=0, log_every=1, seed=1,
)  # fmt: skip
KINDS = {"plain": {}, "classes": {"classes": 3}, "given": {"given": 4}}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(out, name: str = "log") -> list[dict]:
    with open(out / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def state(task) -> dict:
    return {name: tensor.clone() for name, tensor in task.model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_and_three_more_are_six(tmp_path, kind):
    train(toy_gan(OPTIONS, **KINDS[kind]), OPTIONS, tmp_path / "whole")
    train(toy_gan(OPTIONS, **KINDS[kind]), replace(OPTIONS, steps=3), tmp_path / "parts")
    train(toy_gan(OPTIONS, **KINDS[kind]), OPTIONS, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    norms = rows(tmp_path / "whole", "spectral_norms")
    assert norms == rows(tmp_path / "parts", "spectral_norms") and len(norms) == 6
    assert {"step", "generator.start", "spatial.head", "temporal.body"} <= norms[0].keys()
    assert all(float(value) > 0 for value in norms[5].values())


def test_the_log_says_how_the_game_goes(tmp_path):
    train(toy_gan(OPTIONS), OPTIONS, tmp_path / "run")
    for row in rows(tmp_path / "run"):
        each = [f"{what}_{name}" for what in ("loss_d", "score_real", "score_fake", "accuracy_real", "accuracy_fake")
                for name in JUDGES]
        assert {*each, "loss_g", "gradient_norm_d", "gradient_norm_g", "diversity", "clips_per_second"} < row.keys()
        assert float(row["loss_d"]) == pytest.approx(sum(float(row[f"loss_d_{name}"]) for name in JUDGES), rel=1e-5)
        assert float(row["learning_rate_generator"]) == 0.01 and float(row["learning_rate_discriminator"]) == 0.02


def test_each_turn_moves_its_player_alone_on_clips_of_its_own(tmp_path):
    task, before, moved, shown = toy_gan(OPTIONS), {}, [], []
    windows, turns = task.windows.batch_of, task.turns

    def batch_of(step, *rest, **more):
        shown.append(step)
        return windows(step, *rest, **more)

    def watched(turn):
        def loss(*args):
            moved.append({name for name, p in task.model.named_parameters() if not torch.equal(p, before[name])})
            before.update((name, p.detach().clone()) for name, p in task.model.named_parameters())
            made = turn.loss(*args)
            assert {name for name, p in task.model.named_parameters() if p.requires_grad} == set(
                next(player for player in task.players if player.name == turn.player).parameters
            )
            return made

        return turn._replace(loss=loss)

    task.windows.batch_of, task.turns = batch_of, tuple(map(watched, turns))
    before.update((name, p.detach().clone()) for name, p in task.model.named_parameters())
    train(task, replace(OPTIONS, steps=2), tmp_path / "run")
    judges, generator = ({name for name in before if name.startswith("generator.") == mine} for mine in (False, True))
    assert [turn.player for turn in turns] == ["discriminator", "discriminator", "generator"]
    assert not moved[0]
    for names, mine in zip(moved[1:], [judges, judges, generator, judges, judges], strict=True):
        assert names and names <= mine  # a score's own bias may feel nothing
    assert shown == [0, 1, 3, 4]  # the generator's turn asks for no clips


def test_noise_is_fresh_in_every_turn_and_shared_over_processes():
    task = toy_gan(replace(OPTIONS, batch_size=6), classes=2)
    draws = [task._draws(place, step, 0, 1) for step in range(2) for place in range(3)]
    assert len({one.z.sum().item() for one in draws}) == 6
    for one in draws:
        assert one.frames.shape == (2, 6, 2) and (one.frames[..., 0] < one.frames[..., 1]).all()
    halves = [task._draws(1, 0, rank, 2) for rank in (0, 1)]
    assert torch.equal(torch.cat([half.z for half in halves]), draws[1].z)
    assert torch.equal(torch.cat([half.label for half in halves]), draws[1].label)
    assert torch.equal(torch.cat([half.frames for half in halves], 1), draws[1].frames)


def test_the_hinge_losses_by_definition():
    task = toy_gan(OPTIONS, classes=3)
    scores = {"spatial": torch.tensor([0.5, 2.0, -1, 3, -2, 0.25, -0.5, 4]), "temporal": torch.linspace(-3, 3, 8)}
    seen = {}

    def stub(name):
        def forward(video, label=None, frames=None):
            seen[name] = video, label, frames
            return scores[name][: len(video)]

        return forward

    for name in JUDGES:
        getattr(task.model, name).forward = stub(name)
    loss, metrics = task.judge(0, 5, 0, 1)
    want = {name: ((1 - s[:4]).clamp(min=0).mean() + (1 + s[4:]).clamp(min=0).mean()) for name, s in scores.items()}
    assert loss.item() == pytest.approx(sum(want.values()).item())
    assert metrics["loss_d_spatial"].item() == pytest.approx(want["spatial"].item())
    assert metrics["accuracy_real_spatial"].item() == 0.75 and metrics["accuracy_fake_spatial"].item() == 0.5
    assert metrics["score_fake_temporal"].item() == pytest.approx(scores["temporal"][4:].mean().item())
    video, label, frames = seen["spatial"]
    clips, real = task.windows.batch_of(5 * 3, 4)
    torch.testing.assert_close(video[:4], real.movedim(-1, 1) / 127.5 - 1)
    assert torch.equal(label[:4], torch.tensor(clips) % 3) and frames.shape == (8, 2) and seen["temporal"][2] is None
    loss, _ = task.generate(2, 5, 0, 1)
    assert loss.item() == pytest.approx(-sum(s[:4].mean() for s in scores.values()).item())


def test_given_frames_are_shown_before_real_and_generated_ones():
    task, seen = toy_gan(OPTIONS, given=4), []
    task.model.temporal.forward = lambda video, label: seen.append(video) or video.mean((1, 2, 3, 4))
    task.judge(0, 2, 0, 1)
    real, made = seen[0].chunk(2)
    assert real.shape[2] == 8 and torch.equal(real[:, :, :4], made[:, :, :4]) and not torch.equal(real, made)


def poisoned(task, at: int, place: int, how: str):
    """The task with one turn of one step made NaN."""
    turns = list(task.turns)
    turn = turns[place]

    def loss(step, rank, world):
        value, metrics = turn.loss(step, rank, world)
        if step == at and how == "loss":
            value = value * float("inf")
        if step == at and how == "gradient":
            named = task.players[turn.player == "generator"].parameters
            value = value + torch.sqrt(next(iter(named.values())).sum() * 0)
        if step == at and how == "buffer":
            task.model.generator.norm.running_mean[1] = float("nan")
        return value, metrics

    turns[place] = turn._replace(loss=loss)
    task.turns = tuple(turns)
    return task


@pytest.mark.parametrize(("place", "how", "named"), [
    (0, "loss", "turn 1 of 3 (discriminator) the loss is"), (2, "loss", "turn 3 of 3 (generator) the loss is"),
    (1, "gradient", "turn 2 of 3 (discriminator) the gradient of spatial."),
    (2, "gradient", "turn 3 of 3 (generator) the gradient of generator."),
    (2, "buffer", "turn 3 of 3 (generator) the buffer generator.norm.running_mean"),
])
@pytest.mark.parametrize("at", [0, 2])
def test_a_step_with_a_bad_turn_is_taken_back_whole(tmp_path, capfd, at, place, how, named):
    options = replace(OPTIONS, steps=at + 1)
    result = train(poisoned(toy_gan(options), at, place, how), options, tmp_path / "bad")
    assert result.skipped == 1 and f"step {at + 1} skipped: in {named}" in capfd.readouterr().err
    clean = {}
    if at:
        train(toy_gan(options), replace(options, steps=at), tmp_path / "clean")
        clean = load_parts(tmp_path / "clean" / "checkpoint")[0]
    bad = load_parts(tmp_path / "bad" / "checkpoint")[0]
    start = state(toy_gan(options))
    for name, tensor in bad["model"].items():
        assert torch.equal(tensor, clean["model"][name] if at else start[name]), name
    assert all(torch.equal(t, clean["optimizer"][name]) for name, t in bad["optimizer"].items())
    assert bad["optimizer"].keys() == clean.get("optimizer", {}).keys()
    assert all(torch.equal(t, clean["average"][name]) for name, t in bad["average"].items() if at)


def test_a_run_goes_on_after_a_bad_first_step_and_gives_up_after_ten(tmp_path):
    task = poisoned(toy_gan(OPTIONS), 0, 1, "loss")
    train(task, OPTIONS, tmp_path / "run")
    log = rows(tmp_path / "run")
    assert [row["step"] for row in log] == ["2", "3", "4", "5", "6"] and log[-1]["skipped"] == "1"
    task = toy_gan(OPTIONS)
    for step in range(20):
        task = poisoned(task, step, 2, "loss")
    with pytest.raises(FastvidError, match="10 steps in a row were not finite, the last, 10, because in turn 3 of 3"):
        train(task, replace(OPTIONS, steps=20), tmp_path / "never")


def test_the_average_is_a_copy_first_and_then_follows(tmp_path):
    task = toy_gan(OPTIONS)
    early = train(task, replace(OPTIONS, steps=3), tmp_path / "run")
    tensors, config = load_folder(early.model)
    live = task.model.generator.state_dict()
    assert tensors.keys() == live.keys() and all(torch.equal(t, live[name]) for name, t in tensors.items())
    assert config == {"kind": "dvdgan", **asdict(task.model.generator.config)}
    late = toy_gan(OPTIONS)
    train(late, replace(OPTIONS, steps=4), tmp_path / "run", resume=True)
    now, live = load_folder(early.model)[0], late.model.generator.state_dict()
    weights = {name for name, _ in late.model.generator.named_parameters()}
    for name, tensor in now.items():
        torch.testing.assert_close(tensor, (tensors[name] + live[name]) / 2 if name in weights else live[name])


def test_fewer_turns_and_half_precision(tmp_path):
    options = replace(OPTIONS, discriminator_steps=1, precision="bfloat16", steps=2)
    task, kinds = toy_gan(options), []
    task.model.temporal.body.register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    train(task, options, tmp_path / "run")
    assert kinds == [torch.bfloat16] * 4
    assert {t.dtype for t in state(task).values() if t.is_floating_point()} == {torch.float32}
    with pytest.raises(UsageError, match="--precision = bfloat16, now it is float32"):
        train(toy_gan(OPTIONS), replace(options, precision="float32"), tmp_path / "run", resume=True)


def test_diversity_is_a_share_of_the_real_clips():
    real = torch.randn(6, 3, 4, 8, 8)
    assert diversity(torch.zeros_like(real), real) == 0
    assert diversity(2 * real, real).item() == pytest.approx(2)
    assert diversity(real + torch.ones(3, 4, 8, 8), real).item() == pytest.approx(1, rel=1e-5)


def test_warnings_of_a_lost_game_and_of_collapse():
    task, sure = toy_gan(OPTIONS), {"accuracy_fake_spatial": 1.0, "accuracy_fake_temporal": 0.995, "diversity": 0.5}
    assert [task.warn(step, sure) is None for step in (50, LONG, LONG + 49, LONG + 50)] == [True, True, True, False]
    assert task.warn(LONG + 100, sure | {"accuracy_fake_spatial": 0.9}) is None
    assert task.warn(LONG + 150, sure) is None  # it counts anew
    dull = sure | {"accuracy_fake_spatial": 0.5, "diversity": 0.09}
    assert task.warn(50, dull) is None and "collapsed" in task.warn(EARLY, dull)


@pytest.mark.parametrize("kind", KINDS)
def test_sheets_are_the_same_noise_every_time(kind):
    task = toy_gan(OPTIONS, **KINDS[kind])
    model = task.model.generator.eval()
    with torch.no_grad():
        sheet = task.sheet(model)
        assert torch.equal(sheet, task.sheet(model))
    count = {"plain": 8, "classes": 6, "given": 8}[kind]
    assert sheet.shape == (count * (96 + 5) + 1, (8 if kind == "given" else 4) * (96 + 5) + 1, 3)
    if kind == "given":
        clips = task.windows.batch(0, 4)
        for row in (0, 1):  # truth and prediction begin alike
            assert torch.equal(sheet[101 * row + 3 : 101 * row + 99 : 12, 3:99:12], clips[0, 0])


@pytest.mark.parametrize(("bad", "words"), [
    ({"generator_rate": 0.0}, "--generator-rate must be above 0"), ({"discriminator_rate": -1.0}, "--discriminator-r"),
    ({"ema_start": -1}, "--ema-start"), ({"discriminator_steps": 0}, "--discriminator-steps must be at least 1, got 0"),
    ({"precision": "half"}, "--precision must be float32 or bfloat16, got half"), ({"batch_size": 0}, "--batch-size"),
])
def test_options_are_checked(bad, words):
    with pytest.raises(UsageError, match=words):
        GANOptions(**bad)


def test_the_command_line_offers_the_same_options():
    from fastvid.cli.train import GANSettings

    assert {f.name: f.default for f in fields(GANSettings)} == {f.name: f.default for f in fields(GANOptions)}
