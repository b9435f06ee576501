"""Trainings of a demo, each in a process and on a core of its own."""

import sys
import time
from pathlib import Path
from typing import Mapping

import torch

from ..engine.metrics import read_metrics
from ..engine.processes import beginner, words_to
from ..engine.progress import progress_bar, say
from ..engine.recipe import Recipe
from ..engine.training import train

__all__ = ["rows_of", "train_all"]


def train_all(trainings: Mapping[Path, Recipe], together: int = 2) -> None:
    """Runs trainings, some at a time, each into its folder with a training.log. What was there before is replaced.

    Args:
        trainings: by folder; all of them with `steps`, or all by epochs.
        together: how many at a time.

    Raises:
        RuntimeError: a training failed; its log is named.
    """
    context, waiting, running = beginner(), dict(trainings), {}
    logs = ", ".join(str(out / "training.log") for out in trainings)
    say(f"{len(trainings)} trainings, {together} at a time; their logs: {logs}")
    for out in trainings:
        out.mkdir(parents=True, exist_ok=True)
        for old in ("state.pt", "metrics.csv", "training.log"):
            (out / old).unlink(missing_ok=True)
    done = dict.fromkeys(trainings, 0)
    try:
        with progress_bar("training", sum(recipe.steps or recipe.epochs for recipe in trainings.values())) as advance:
            while waiting or running:
                while waiting and len(running) < together:
                    out = next(iter(waiting))
                    running[out] = context.Process(target=_train, args=(waiting.pop(out), out), daemon=True)
                    running[out].start()
                time.sleep(0.2)
                for out, process in list(running.items()):
                    unit = "step" if trainings[out].steps else "epoch"
                    now = int(max((row[unit] for row in rows_of(out)), default=0))
                    advance(now - done[out])
                    done[out] = now
                    if not process.is_alive():
                        del running[out]
                        if process.exitcode:
                            raise RuntimeError(f"a training failed: see {out / 'training.log'}")
    finally:
        for process in running.values():
            process.kill()
            process.join()


def _train(recipe: Recipe, out: Path) -> None:
    """One training, in a process of its own, whose words go to a file."""
    words_to(out / "training.log")
    torch.set_num_threads(1)
    train(recipe, out, device="cpu", workers=0)
    sys.stdout.flush()


def rows_of(run: Path) -> list[dict]:
    """The rows of a run's metrics.csv so far."""
    path = run / "metrics.csv"
    return read_metrics(path) if path.exists() else []
