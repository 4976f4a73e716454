"""One small training in a process of its own, so that tests can kill it, interrupt it or run two of it together."""

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import threading
import time
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import torch
from fake_tasks import NetTask, Windows, toy_gan

from fastvid import models
from fastvid.checkpoint import has_folder
from fastvid.train import GANOptions, TrainOptions, VQVAETask, train
from fastvid.train.ranks import process_group

OPTIONS = TrainOptions(
    steps=40, batch_size=4, learning_rate=3e-3, warmup=5, decay="none", checkpoint_every=5, sample_every=0, log_every=1
)

GAN_OPTIONS = GANOptions(
    steps=40, batch_size=4, generator_rate=3e-3, discriminator_rate=3e-3, ema_start=10, checkpoint_every=5,
    sample_every=0, log_every=1,
)  # fmt: skip


def options_of(kind: str, steps: int):
    return replace(GAN_OPTIONS if kind == "gan" else OPTIONS, steps=steps)


def make_task(kind: str, world: int = 1):
    """The task of a run: "vqvae" (tiny, with codebooks that start, move and restart), "gan" (toy networks), "net", or
    "lean" (no buffer)."""
    if kind == "gan":
        return toy_gan(GAN_OPTIONS, sync=world > 1, classes=3)
    if kind != "vqvae":
        return NetTask(batch_size=4, lean=kind == "lean")
    torch.manual_seed(0)
    config = replace(models.preset("vqvae", "tiny"), dead_below=0.05)
    model = models.build("vqvae", asdict(config)).to(memory_format=torch.channels_last_3d)
    return VQVAETask(model, Windows(), OPTIONS.batch_size, {"clips": "noise"})


def wrap(task, around) -> None:
    """Let `around(loss)` stand in for the task's loss, or for those of all its turns."""
    if hasattr(task, "turns"):
        task.turns = tuple(turn._replace(loss=around(turn.loss)) for turn in task.turns)
    else:
        task.loss = around(task.loss)


def dies_at(task, step: int, delay: float):
    """The task, in a process that is killed `delay` seconds after a step from `step` on begins, wherever it then is."""
    fuse = []

    def kill():
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def around(loss):
        def wrapped(now: int, *rest):
            if now >= step and not fuse:
                fuse.append(threading.Thread(target=kill, daemon=True))
                fuse[0].start()
            return loss(now, *rest)

        return wrapped

    wrap(task, around)
    return task


def watched(task, out: Path, rank: int):
    """The task, noting the hash of all buffers before each step, or turn, in out/../rank<r>.txt."""
    notes = out.parent / f"rank{rank}.txt"

    def around(loss):
        def wrapped(*args):
            digest = hashlib.sha256(b"".join(b.numpy().tobytes() for b in task.model.buffers())).hexdigest()
            with open(notes, "a") as file:
                file.write(f"{digest}\n")
            return loss(*args)

        return wrapped

    wrap(task, around)
    return task


def killed_run(out: Path, kind: str, steps: int, kills: int, seed: int) -> int:
    """Train with `kills` kills at random steps and moments, going on after each; returns the kills."""
    import_module("torch._dynamo")  # two seconds in every child, if the optimizer is left to do it
    dice, hits = random.Random(seed), 0
    victims = sorted(dice.sample(range(steps - 5), kills))
    for step in [*victims, None]:
        child = os.fork()
        if child == 0:
            task = make_task(kind)
            if step is not None:
                task = dies_at(task, step, dice.random() * 0.05)
            train(task, options_of(kind, steps), out, resume=has_folder(out / "checkpoint"))
            if step is not None:
                os.kill(os.getpid(), signal.SIGKILL)  # the run was over sooner
            os._exit(0)
        dice.random()  # so that the parent's dice move on as the child's did
        status = os.waitpid(child, 0)[1]
        hits += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
            raise SystemExit(f"a continued run failed with {os.WEXITSTATUS(status)}")
    return hits


def become_ranks(world: int) -> None:
    """Return in `world` forked processes, each with what torchrun would announce to it."""
    import_module("torch._dynamo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    os._exit(int(any(statuses)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", default="net")
    parser.add_argument("--steps", type=int, default=OPTIONS.steps)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--ranks", type=int, default=0, help="processes to become, without torchrun")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.ranks:
        become_ranks(args.ranks)
    if args.kills:
        print(json.dumps({"hits": killed_run(args.out, args.task, args.steps, args.kills, args.seed)}))
        return
    with process_group() as ranks:
        task = make_task(args.task, ranks.world)
        task = watched(task, args.out, ranks.rank) if ranks.world > 1 else task
        train(task, options_of(args.task, args.steps), args.out, args.resume)
    if ranks.world > 1:
        threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
        (args.out.parent / f"threads{ranks.rank}.txt").write_text("\n".join(threads))


if __name__ == "__main__":
    main()
