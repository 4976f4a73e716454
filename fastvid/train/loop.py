"""The training loop: each step is a pure function of (seed, step, rank), so a continued run equals an unbroken one.

A run is a folder: log.csv, samples/, checkpoint/ (weights, averaged weights, optimizer, step) and model/ (the averaged
weights, ready to load).
"""

import copy
import hashlib
import math
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastvid.checkpoint import has_folder, load_parts, save_folder
from fastvid.data.sheet import write_png
from fastvid.errors import CheckpointError, FastvidError, UsageError
from fastvid.train.log import CsvLog
from fastvid.train.options import TrainOptions
from fastvid.train.ranks import Ranks, state_of

PATIENCE = 10  # skipped steps in a row that end a run
RUN_NAMES = {"log.csv", "log.csv.tmp", "samples", "latents", "model", "checkpoint"}


class Task(Protocol):
    """What is trained: a model, its loss and what to show of it.

    config:      of the model folder, {"kind": ..., sizes}.
    fingerprint: JSON values that must be the same when a run is continued (data, model).
    """

    model: nn.Module
    config: dict
    fingerprint: dict

    def loss(self, step: int, rank: int, world: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and metrics of this process's share of step `step`; draws its own batch."""

    def sheet(self, model: nn.Module) -> Tensor | None:
        """uint8 [H, W, 3] that shows what `model` can do, or None if there is nothing to show."""


class TrainResult(NamedTuple):
    """Where a run stands: steps done, steps skipped for non-finite numbers, whether all steps are done, the model."""

    step: int
    skipped: int
    finished: bool
    model: Path


def train(task: Task, options: TrainOptions, out: str | Path, resume: bool = False) -> TrainResult:
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
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    run = _Run(task, options, out, ranks)
    with torch.random.fork_rng():
        run.load() if resume else run.begin()
        ending = _steps(run)
    if ending == "interrupt":
        if ranks.leads:
            print(f"Stopped at step {run.step} of {options.steps}; to go on, repeat the command with --resume.",
                  file=sys.stderr)
        raise SystemExit(130)
    return TrainResult(run.step, run.skipped, run.step >= options.steps, out / "model")


def check_run(out: Path, resume: bool) -> None:
    """Refuse a run folder that does not fit, before anything dear happens.

    out, resume: as in `train`.
    Raises:      UsageError.
    """
    begun = has_folder(out / "checkpoint")
    if resume and not begun:
        raise UsageError(f"--resume: {out} holds no checkpoint; check --out, or leave --resume out to start there.")
    if begun and not resume:
        raise UsageError(f"{out} already holds a run; continue it with --resume or choose another --out.")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out must be a folder, {out} is a file.")
    foreign = {p.name for p in out.iterdir()} - RUN_NAMES if out.is_dir() else set()
    foreign = sorted(name for name in foreign if not name.startswith("."))
    if foreign and not begun:
        raise UsageError(f"--out must be a new or empty folder, {out} holds {foreign[0]}; choose another.")


class _Run:
    """Everything that a step changes, and its way to the disk and back."""

    def __init__(self, task: Task, options: TrainOptions, out: Path, ranks: Ranks):
        self.task, self.options, self.out, self.ranks = task, options, out, ranks
        self.model = task.model.train()
        ranks.spread(state_of(self.model))
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.named.values(), lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
        )
        kept = self.model.state_dict().keys()
        self.buffers = {name: b for name, b in self.model.named_buffers() if name in kept}
        self.step = self.skipped = self.streak = 0
        self.saved = None

    def begin(self) -> None:
        self.ranks.wait()
        self.save()
        self.log = CsvLog(self.out / "log.csv") if self.ranks.leads else None

    def save(self) -> None:
        """Write the checkpoint and, once anything is learnt, the model folder."""
        if self.saved == self.step:
            return
        self.ranks.check_equal(self.model.state_dict(), self.step)
        if self.ranks.leads:
            config = {"step": self.step, "skipped": self.skipped, "streak": self.streak, **self._identity()}
            parts = {"average": self.average.state_dict(), "optimizer": self._moments()}
            save_folder(self.out / "checkpoint", self.model.state_dict(), config, parts=parts)
            self.save_model()
        self.saved = self.step

    def save_model(self) -> None:
        if self.step > 0:
            save_folder(self.out / "model", self.average.state_dict(), self.task.config)

    def load(self) -> None:
        path = self.out / "checkpoint"
        parts, config = load_parts(path)
        self._compare(config)
        try:
            self.model.load_state_dict(parts["model"])
            self.average.load_state_dict(parts["average"])
            self._set_moments(parts["optimizer"])
            self.step, self.skipped, self.streak = (int(config[key]) for key in ("step", "skipped", "streak"))
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: does not fit this run: {str(error).splitlines()[0]}") from error
        self.saved = self.step
        self.ranks.wait()
        if self.ranks.leads:
            self.log = CsvLog(self.out / "log.csv", after=self.step)
            self.save_model()
        else:
            self.log = None

    def _identity(self) -> dict:
        return {"options": self.options.fixed(), "all_options": asdict(self.options), "task": self.task.fingerprint}

    def _compare(self, config: dict) -> None:
        now = self._identity()
        for part, what in (("options", "--{}"), ("task", "its {}")):
            old, new = config.get(part, {}), now[part]
            for key in sorted(old.keys() | new.keys()):
                if old.get(key) != new.get(key):
                    raise UsageError(
                        f"--resume: {self.out} was trained with {what.format(key.replace('_', '-'))} = {old.get(key)}, "
                        f"now it is {new.get(key)}; give the old value, or start anew in another --out."
                    )

    def _moments(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        return {f"{key}/{name}": value for name, p in self.named.items() for key, value in state[p].items()}

    def _set_moments(self, moments: dict[str, Tensor]) -> None:
        expected = {f"{key}/{name}" for name in self.named for key in ("step", "exp_avg", "exp_avg_sq")}
        if moments and set(moments) != expected:
            raise KeyError("the optimizer's tensors have other names")
        for full, value in moments.items():
            key, name = full.split("/", 1)
            parameter = self.named[name]
            if key != "step" and value.shape != parameter.shape:
                raise ValueError(f"the optimizer's {full} has another shape")
            self.optimizer.state[parameter][key] = value.to(parameter.device)


def _steps(run: _Run) -> str:
    """Run until the end, a signal or the time limit; returns "done", "interrupt" or "timeout"."""
    options, deadline = run.options, math.inf
    if options.minutes is not None:
        deadline = time.monotonic() + 60 * options.minutes
    report = _Report(run)
    with _signals() as stop, report:
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


def _step(run: _Run, flags: dict) -> dict[str, float]:
    """One optimizer step, or none of it if a number is not finite."""
    torch.manual_seed(_seed(run.options.seed, run.step, run.ranks.rank))
    before = {name: value.clone() for name, value in run.buffers.items()}
    run.optimizer.zero_grad()
    loss, metrics = run.task.loss(run.step, run.ranks.rank, run.ranks.world)
    loss.backward()
    values = torch.stack([torch.as_tensor(v).detach().float().to(loss.device) for v in (loss, *metrics.values())])
    numbers = dict(zip(["loss", *metrics], values.tolist(), strict=True))
    gradients = _gradients(run)
    numbers = run.ranks.average(gradients, numbers | {name: float(flag()) for name, flag in flags.items()})
    norm = torch.nn.utils.get_total_norm(gradients)
    culprit = _not_finite(run, numbers["loss"], norm)
    if culprit is None:
        _apply(run, norm)
        run.streak = 0
    else:
        _skip(run, before, culprit)
    run.step += 1
    return numbers | {"gradient_norm": float(norm), "skip": float(culprit is not None)}


def _gradients(run: _Run) -> list[Tensor]:
    if run.ranks.world > 1:
        # every process must bring the same tensors to the all-reduce
        for p in run.named.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return [p.grad for p in run.named.values() if p.grad is not None]


def _apply(run: _Run, norm: Tensor) -> None:
    options = run.options
    torch.nn.utils.clip_grads_with_norm_(list(run.named.values()), options.clip_norm, norm)
    for group in run.optimizer.param_groups:
        group["lr"] = options.rate_at(run.step)
    run.optimizer.step()
    follow(run.average, run.model, options.ema_at(run.step))


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


def _not_finite(run: _Run, loss: float, norm: Tensor) -> str | None:
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if bool(torch.isfinite(norm)):
        return _bad_buffer(run)
    named = (name for name, p in run.named.items() if p.grad is not None and not torch.isfinite(p.grad).all())
    return f"the gradient of {next(named, 'all weights together')} is not finite"


def _bad_buffer(run: _Run) -> str | None:
    named = (name for name, b in run.buffers.items() if b.is_floating_point() and not torch.isfinite(b).all())
    return next((f"the buffer {name} is not finite" for name in named), None)


@torch.no_grad()
def _skip(run: _Run, before: dict[str, Tensor], culprit: str) -> None:
    # the forward pass has already moved the codebooks
    for name, old in before.items():
        run.buffers[name].copy_(old)
    run.skipped += 1
    run.streak += 1
    if run.ranks.leads:
        tqdm.write(f"step {run.step + 1} skipped: {culprit} ({run.skipped} skipped so far)", file=sys.stderr)
    if run.streak >= PATIENCE:
        raise FastvidError(
            f"{PATIENCE} steps in a row were not finite, the last, {run.step + 1}, because {culprit}; "
            f"lower --learning-rate or look at the data. The last checkpoint is of step {run.saved}."
        )


class _Report:
    """Progress bar, log rows and sample sheets of the leading process."""

    def __init__(self, run: _Run):
        self.run, self.sums, self.count, self.since = run, {}, 0, time.monotonic()
        self.bar = tqdm(
            total=run.options.steps, initial=run.step, unit="step", disable=not run.ranks.leads, dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )

    def __enter__(self) -> "_Report":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def add(self, numbers: dict[str, float]) -> None:
        run = self.run
        shown = {k: v for k, v in numbers.items() if k not in ("interrupt", "timeout", "skip")}
        if run.ranks.leads:
            if not numbers["skip"]:
                self.sums = {key: self.sums.get(key, 0.0) + value for key, value in shown.items()}
                self.count += 1
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)
            self.bar.update()
            if run.step % run.options.log_every == 0 or run.step == run.options.steps:
                self._row(shown)
            if run.options.sample_every and run.step % run.options.sample_every == 0:
                self._sheet()

    def _row(self, names: dict) -> None:
        run, now = self.run, time.monotonic()
        means = {key: self.sums[key] / self.count if self.count else math.nan for key in names}
        run.log.add({
            "step": run.step, **means, "learning_rate": run.options.rate_at(run.step - 1), "skipped": run.skipped,
            "clips_per_second": self.count * run.options.batch_size / max(now - self.since, 1e-9),
        })
        self.sums, self.count, self.since = {}, 0, now

    def _sheet(self) -> None:
        with torch.no_grad():
            sheet = self.run.task.sheet(self.run.average)
        if sheet is not None:
            folder = self.run.out / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            write_png(folder / f"step_{self.run.step:08d}.png", sheet)


@contextmanager
def _signals():
    """An event that SIGINT and SIGTERM set. A second SIGINT stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number, _):
        stop.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, action in old.items():
            signal.signal(number, action)


def _seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8], "little", signed=True)
