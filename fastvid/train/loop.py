"""The training loop: each step is a pure function of (seed, step, rank), so a continued run equals an unbroken one."""

import hashlib
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastvid.errors import FastvidError, UsageError
from fastvid.train.options import RunOptions
from fastvid.train.ranks import Ranks
from fastvid.train.report import Report, stop_signals
from fastvid.train.run import Run, Task, check_run
from fastvid.train.turns import Mover, Turn

PATIENCE = 10  # skipped steps in a row that end a run


class TrainResult(NamedTuple):
    """Where a run stands: steps done, steps skipped for non-finite numbers, whether all steps are done, the model."""

    step: int
    skipped: int
    finished: bool
    model: Path


def train(task: Task, options: RunOptions, out: str | Path, resume: bool = False) -> TrainResult:
    """Train `task.model` and leave a run folder; in every process of a torchrun alike.

    out:     the run folder, new unless `resume`.
    resume:  continue from its checkpoint; the result is bit-identical to a run that was never broken.
    Returns: TrainResult; `finished` is False when `options.minutes` ended the run.
    Raises:  UsageError for a folder or options that do not fit, CheckpointError for a damaged checkpoint, FastvidError
             after 10 non-finite steps in a row, SystemExit(130) after SIGINT or SIGTERM, with a checkpoint.
    """
    out = Path(out)
    check_run(out, resume)
    ranks = Ranks()
    if options.batch_size % ranks.world:
        raise UsageError(f"--batch-size must be divisible by the {ranks.world} processes, got {options.batch_size}.")
    options.set_threads()
    run = Run(task, options, out, ranks)
    with torch.random.fork_rng():
        run.load() if resume else run.begin()
        ending = _steps(run)
    if ending == "interrupt":
        if ranks.leads:
            print(f"Stopped at step {run.step} of {options.steps}; to go on, repeat the command with --resume.",
                  file=sys.stderr)
        raise SystemExit(130)
    return TrainResult(run.step, run.skipped, run.step >= options.steps, out / "model")


def _steps(run: Run) -> str:
    """Run until the end, a signal or the time limit; returns "done", "interrupt" or "timeout"."""
    options, deadline = run.options, math.inf
    if options.minutes is not None:
        deadline = time.monotonic() + 60 * options.minutes
    report = Report(run)
    with stop_signals() as stop, report:
        ending = "done"
        while run.step < options.steps and ending == "done":
            flags = {"interrupt": lambda: stop.is_set(), "timeout": lambda: time.monotonic() >= deadline}
            numbers = _step(run, flags)
            report.add(numbers)
            ending = next((name for name in flags if numbers[name] > 0), "done")
            if run.step % options.checkpoint_every == 0:
                run.save()
        run.save()
    return ending


def _step(run: Run, flags: dict) -> dict[str, float]:
    """One step, which is every turn of it, or nothing at all if a number is not finite."""
    torch.manual_seed(_seed(run.options.seed, run.step, run.ranks.rank))
    before = {name: value.clone() for name, value in run.buffers.items()}
    played: list[dict[str, float]] = []
    for place, turn in enumerate(run.turns):
        numbers, culprit = _play(run, place, turn, {} if place else flags)
        played.append(numbers)
        if culprit is not None:
            break
    if culprit is None:
        follow(run.average, run.averaged, run.options.ema_at(run.step))
        run.streak = 0
        for mover in run.movers.values():
            mover.forget()
    else:
        _skip(run, before, culprit)
    run.step += 1
    whole = len(played) == len(run.turns)
    return _together(played) | {"skip": float(culprit is not None), "whole": float(whole)}


def _together(played: list[dict[str, float]]) -> dict[str, float]:
    """The numbers of all turns; means where turns have numbers of the same name."""
    names = dict.fromkeys(name for numbers in played for name in numbers)
    found = {name: [numbers[name] for numbers in played if name in numbers] for name in names}
    return {name: values[0] if len(values) == 1 else sum(values) / len(values) for name, values in found.items()}


def _play(run: Run, place: int, turn: Turn, flags: dict) -> tuple[dict[str, float], str | None]:
    """One turn: its numbers and, where it moved nothing, why."""
    mover = run.movers[turn.player]
    if len(run.movers) > 1:
        # no gradients for those whose turn it is not
        for name, p in run.named.items():
            p.requires_grad_(name in mover.named)
    mover.optimizer.zero_grad()
    loss, metrics = turn.loss(run.step, run.ranks.rank, run.ranks.world)
    loss.backward()
    values = torch.stack([torch.as_tensor(v).detach().float().to(loss.device) for v in (loss, *metrics.values())])
    total = f"loss{turn.suffix}"
    numbers = dict(zip([total, *metrics], values.tolist(), strict=True))
    gradients = _gradients(mover, run.ranks.world)
    numbers = run.ranks.average(gradients, numbers | {name: float(flag()) for name, flag in flags.items()})
    norm = torch.nn.utils.get_total_norm(gradients)
    culprit = _not_finite(run, mover, numbers[total], norm)
    if culprit is None:
        if place + 1 < len(run.turns) and not mover.kept:
            mover.keep()  # a later turn may still fail
        mover.move(norm, run.options.rate_at(run.step, mover.player.learning_rate))
        if len(run.movers) > 1:
            mover.optimizer.zero_grad()  # the others' turns need the memory
    elif len(run.turns) > 1:
        culprit = f"in turn {place + 1} of {len(run.turns)} ({turn.player}) {culprit}"
    return numbers | {f"gradient_norm{turn.suffix}": float(norm)}, culprit


def _gradients(mover: Mover, world: int) -> list[Tensor]:
    if world > 1:
        # every process must bring the same tensors to the all-reduce
        for p in mover.named.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return [p.grad for p in mover.named.values() if p.grad is not None]


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, keep: float) -> None:
    """Move averaged weights towards a model's; buffers such as codebooks are copied, not averaged.

    average, model: two modules of one architecture.
    keep:           share of the old average, in [0, 1].
    Raises:         ValueError if the modules differ in their number of tensors.
    """
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - keep)
    for old, new in zip(average.buffers(), model.buffers(), strict=True):
        old.copy_(new)


def _not_finite(run: Run, mover: Mover, loss: float, norm: Tensor) -> str | None:
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if bool(torch.isfinite(norm)):
        return _bad_buffer(run)
    named = (name for name, p in mover.named.items() if p.grad is not None and not torch.isfinite(p.grad).all())
    return f"the gradient of {next(named, 'all weights together')} is not finite"


def _bad_buffer(run: Run) -> str | None:
    floating = {name: b for name, b in run.buffers.items() if b.is_floating_point()}
    if bool(torch.isfinite(torch.nn.utils.get_total_norm(floating.values()))):
        return None  # one look at the device in place of one a buffer
    named = (name for name, b in floating.items() if not torch.isfinite(b).all())
    return next((f"the buffer {name} is not finite" for name in named), None)


@torch.no_grad()
def _skip(run: Run, before: dict[str, Tensor], culprit: str) -> None:
    # the forward pass has already moved the codebooks, and earlier turns their players
    for name, old in before.items():
        run.buffers[name].copy_(old)
    for mover in run.movers.values():
        mover.take_back()
    run.skipped += 1
    run.streak += 1
    if run.ranks.leads:
        tqdm.write(f"step {run.step + 1} skipped: {culprit} ({run.skipped} skipped so far)", file=sys.stderr)
    if run.streak >= PATIENCE:
        raise FastvidError(
            f"{PATIENCE} steps in a row were not finite, the last, {run.step + 1}, because {culprit}; "
            f"lower the learning rate or look at the data. The last checkpoint is of step {run.saved}."
        )


def _seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8], "little", signed=True)
