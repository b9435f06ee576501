"""Trainings of a demo in processes of their own, which can be killed and resumed."""

import json
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.processes import beginner, words_to
from ..engine.progress import progress_bar, say

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

__all__ = ["Training", "read_log", "run_side_by_side"]


def read_log(work_dir: str | Path) -> list[list[dict]]:
    """The rows that MMEngine logged, one list for each run in `work_dir`, in order."""
    runs = []
    for path in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        lines = path.read_text().split("\n")[:-1]  # what a kill cut short has no end of line
        runs.append([json.loads(line) for line in lines])
    return runs


@dataclass
class Training:
    """A training in another process, which may be killed once.

    Attributes:
        cfg: its `mmengine.Config`, which is written to `config`, beside the folder `work_dir`.
        work_dir: where MMEngine's logs and checkpoints go.
        threads: that the process computes with.
        kill_at: kill it (SIGKILL) as soon as it has logged an iteration beyond this one, then start it again.
        killed_at, resumed_from: the iterations where that happened.
    """

    cfg: Any
    work_dir: Path
    threads: int = 1
    kill_at: int | None = None
    killed_at: int | None = None
    resumed_from: int | None = None
    process: "BaseProcess | None" = field(default=None, repr=False)

    @property
    def config(self) -> Path:
        return self.work_dir.with_name(f"{self.work_dir.name}.py")

    @property
    def iterations(self) -> int:
        return self.cfg.train_cfg.max_iters

    @property
    def log(self) -> Path:
        return self.work_dir / "training.log"

    @property
    def checkpoint(self) -> Path:
        """The newest one."""
        return Path((self.work_dir / "last_checkpoint").read_text())

    def start(self) -> None:
        """Starts `train_config`, which resumes from the newest checkpoint if there is one."""
        self.work_dir.mkdir(parents=True, exist_ok=True)
        self.cfg.dump(self.config)
        self.process = beginner().Process(target=_train, args=(self.config, self.work_dir, self.log, self.threads))
        self.process.start()

    def step(self) -> int:
        """The last iteration that is in the log."""
        return max((row["step"] for run in read_log(self.work_dir) for row in run if "loss" in row), default=0)

    def poll(self) -> bool:
        """Whether it is still running. Kills it and starts it again when the time has come.

        Raises:
            RuntimeError: the process has failed.
        """
        status = self.process.exitcode
        if status:
            raise RuntimeError(f"the training of {self.config} failed; the end of {self.log} says why")
        if status is None and self.kill_at is not None and self.killed_at is None and self.step() > self.kill_at:
            self.stop()
            self.killed_at = self.step()
            self.resumed_from = int(self.checkpoint.stem.rpartition("_")[2])
            say(
                ("kill -9", "bold"),
                f" of {self.work_dir.name} at iteration {self.killed_at}; "
                f"it goes on from its checkpoint of iteration {self.resumed_from}",
            )
            self.start()
            return True
        return status is None

    def stop(self) -> None:
        """Kills the process, if it is running."""
        if self.process and self.process.is_alive():
            self.process.kill()
            self.process.join()

    def replayed(self) -> dict:
        """How the losses that were logged both before the kill and after the resumption compare."""
        runs = [{row["step"]: row["loss"] for row in run if "loss" in row} for run in read_log(self.work_dir)]
        first, second = runs if len(runs) == 2 else ({}, {})
        differences = [abs(first[step] - second[step]) for step in first.keys() & second.keys()]
        return {"replayed_losses": len(differences), "largest_difference": max(differences, default=None)}


def _train(config: Path, work_dir: Path, log: Path, threads: int) -> None:
    """What the process does; its words go to a file."""
    import torch

    from ..openmmlab.runner import train_config

    words_to(log)
    torch.set_num_threads(threads)
    train_config(config, work_dir, resume=True)
    sys.stdout.flush()


def run_side_by_side(trainings) -> None:
    """Runs all of them to their ends; none outlives an error, Ctrl-C, or the end of this process by SIGTERM."""
    trainings = list(trainings)
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for training in trainings:
            training.start()
        with progress_bar("training", sum(t.iterations for t in trainings)) as advance:
            seen = 0
            while any([training.poll() for training in trainings]):
                time.sleep(0.3)
                now = sum(training.step() for training in trainings)
                advance(now - seen)
                seen = now
    finally:
        signal.signal(signal.SIGTERM, previous)
        for training in trainings:
            training.stop()
