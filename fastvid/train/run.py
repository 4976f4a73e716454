"""A run: everything that a step changes, and its way to the disk and back.

The folder holds log.csv (and a task's own tables), samples/, checkpoint/ (weights, averaged weights, optimizers, step)
and model/ (the averaged weights, ready to load).
"""

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from fastvid.checkpoint import has_folder, load_parts, save_folder
from fastvid.errors import CheckpointError, UsageError
from fastvid.train.log import CsvLog
from fastvid.train.options import FREE_ON_RESUME, RunOptions
from fastvid.train.ranks import Ranks, state_of
from fastvid.train.turns import Mover, Player, Turn

TABLES = ("log", "spectral_norms")
_FILES = {f"{name}.csv{end}" for name in TABLES for end in ("", ".tmp")}
RUN_NAMES = {"samples", "latents", "model", "checkpoint", *_FILES}


class Task(Protocol):
    """What is trained: a model, its loss and what to show of it.

    config:      of the model folder, {"kind": ..., sizes}.
    fingerprint: JSON values that must be the same when a run is continued (data, model).

    A task may have more, as DVDGANTask does: `players` and `turns` (of `fastvid.train.turns`) in place of one player
    that moves the whole model by `loss`; `averaged`, the part of the model that is averaged and becomes the model
    folder; `tables()`, {name of TABLES: {column: number}} beside each row of the log; `warn(step, row)`, a line of
    text for the user, or None, after each row.
    """

    model: nn.Module
    config: dict
    fingerprint: dict

    def loss(self, step: int, rank: int, world: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and metrics of this process's share of step `step`; draws its own batch."""

    def sheet(self, model: nn.Module) -> Tensor | None:
        """uint8 [H, W, 3] that shows what `model` can do, or None if there is nothing to show."""


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


class Run:
    """Model, averaged weights, optimizer and counters of one process; begun anew or loaded from its checkpoint."""

    def __init__(self, task: Task, options: RunOptions, out: Path, ranks: Ranks):
        self.task, self.options, self.out, self.ranks = task, options, out, ranks
        self.model = task.model.train()
        ranks.spread(state_of(self.model))
        self.averaged = getattr(task, "averaged", self.model)
        self.average = copy.deepcopy(self.averaged).eval().requires_grad_(False)
        players = getattr(task, "players", None) or [self._only_player()]
        self.movers = {player.name: Mover(player) for player in players}
        self.turns = getattr(task, "turns", None) or (Turn("", task.loss),)
        self.named = {name: p for mover in self.movers.values() for name, p in mover.named.items()}
        kept = self.model.state_dict().keys()
        self.buffers = {name: b for name, b in self.model.named_buffers() if name in kept}
        self.step = self.skipped = self.streak = 0
        self.saved = None

    def _only_player(self) -> Player:
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        options = self.options
        return Player(
            "", named, options.learning_rate, weight_decay=options.weight_decay, clip_norm=options.clip_norm
        )  # fmt: skip

    def begin(self) -> None:
        self.ranks.wait()
        self.save()
        self._open_tables(0)

    def _open_tables(self, after: int) -> None:
        self.logs = {name: CsvLog(self.out / f"{name}.csv", after) for name in TABLES} if self.ranks.leads else {}

    def rates(self) -> dict[str, float]:
        """The learning rates of the step just done, under the names that they have in the log."""
        return {
            f"learning_rate{'_' * bool(name)}{name}": self.options.rate_at(self.step - 1, mover.player.learning_rate)
            for name, mover in self.movers.items()
        }

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
        self._open_tables(self.step)
        if self.ranks.leads:
            self.save_model()

    def _identity(self) -> dict:
        return {"options": self.options.fixed(), "all_options": asdict(self.options), "task": self.task.fingerprint}

    def _compare(self, config: dict) -> None:
        now = self._identity()
        for part, what in (("options", "--{}"), ("task", "its {}")):
            old, new = config.get(part, {}), now[part]
            # what is free now may have been fixed when the run began
            for key in sorted((old.keys() | new.keys()) - set(FREE_ON_RESUME)):
                if old.get(key) != new.get(key):
                    raise UsageError(
                        f"--resume: {self.out} was trained with {what.format(key.replace('_', '-'))} = {old.get(key)}, "
                        f"now it is {new.get(key)}; give the old value, or start anew in another --out."
                    )

    def _moments(self) -> dict[str, Tensor]:
        return {name: tensor for mover in self.movers.values() for name, tensor in mover.moments().items()}

    def _set_moments(self, moments: dict[str, Tensor]) -> None:
        owners = {name: mover for mover in self.movers.values() for name in mover.named}
        shares: dict[str, dict[str, Tensor]] = {name: {} for name in self.movers}
        for full, tensor in moments.items():
            shares[owners[full.split("/", 1)[1]].player.name][full] = tensor
        for name, mover in self.movers.items():
            mover.set_moments(shares[name])
