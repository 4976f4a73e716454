"""What a run shows while it works, and how it hears that it should stop."""

import math
import signal
import sys
import threading
import time
from contextlib import contextmanager

import torch
from tqdm import tqdm

from fastvid.data.sheet import write_png
from fastvid.train.run import Run

HIDDEN = ("interrupt", "timeout", "skip", "whole")  # numbers of a step that are no measurements
SHOWN = 8  # numbers beside the progress bar


class Report:
    """Progress bar, log rows and sample sheets of the leading process."""

    def __init__(self, run: Run):
        self.run, self.sums, self.count, self.since = run, {}, 0, time.monotonic()
        self.names: list[str] = []
        self.warned: set[str] = set()
        self.bar = tqdm(
            total=run.options.steps, initial=run.step, unit="step", disable=not run.ranks.leads, dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def add(self, numbers: dict[str, float]) -> None:
        run = self.run
        shown = {k: v for k, v in numbers.items() if k not in HIDDEN}
        if run.ranks.leads:
            if numbers["whole"]:
                self.names = list(shown)
            if not numbers["skip"]:
                self.sums = {key: self.sums.get(key, 0.0) + value for key, value in shown.items()}
                self.count += 1
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in list(shown.items())[:SHOWN]}, refresh=False)
            self.bar.update()
            # a step that broke off before all its numbers were there does not say what the columns are
            if self.names and (run.step % run.options.log_every == 0 or run.step == run.options.steps):
                self._row()
            if run.options.sample_every and run.step % run.options.sample_every == 0:
                self._sheet()

    def _row(self) -> None:
        run, now = self.run, time.monotonic()
        means = {key: self.sums[key] / self.count if self.count else math.nan for key in self.names}
        run.logs["log"].add({
            "step": run.step, **means, **run.rates(), "skipped": run.skipped,
            "clips_per_second": self.count * run.options.batch_size / max(now - self.since, 1e-9),
        })
        self.sums, self.count, self.since = {}, 0, now
        if hasattr(run.task, "tables"):
            for name, row in run.task.tables().items():
                run.logs[name].add({"step": run.step, **row})
        if hasattr(run.task, "warn"):
            self._say(run.task.warn(run.step, means))

    def _say(self, warning: str | None) -> None:
        """A warning to the user, once a run of the program."""
        if warning is not None and warning not in self.warned:
            self.warned.add(warning)
            tqdm.write(f"step {self.run.step}: {warning}", file=sys.stderr)

    def _sheet(self) -> None:
        with torch.no_grad():
            sheet = self.run.task.sheet(self.run.average)
        if sheet is not None:
            folder = self.run.out / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            write_png(folder / f"step_{self.run.step:08d}.png", sheet)


@contextmanager
def stop_signals():
    """An event that SIGINT and SIGTERM set. A second Ctrl-C stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    first = None

    def handle(number, _):
        nonlocal first
        first = first or time.monotonic()
        # torchrun passes on the Ctrl-C that the terminal has already sent to everybody
        if number == signal.SIGINT and time.monotonic() - first > 1:
            raise KeyboardInterrupt
        stop.set()

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, action in old.items():
            signal.signal(number, action)
