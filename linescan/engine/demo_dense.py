"""`make demo-dense`: digits found in scenes, pixel by pixel (UPerNet, mmseg) and box by box (Mask R-CNN, mmdet).

Both trainings are MMEngine's own, each in a process and on a core of its own. One is killed half-way, as by a power
cut, and resumed. What comes out is measured by mmseg's and pycocotools' metrics, and drawn.
"""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape

from .digit_scenes import CLASSES, read_pixels, write_scenes
from .files import atomic
from .openmmlab_runner import read_config
from .progress import progress_bar, say

__all__ = ["TASKS", "Training", "configure", "demo_dense", "evaluate", "read_log"]

TASKS = {"segmentation": "demo/vmamba_upernet_digits", "detection": "demo/vig_h_mask_rcnn_digits"}
"""The config of each task."""


def demo_dense(
    out: str | Path = "runs/demo-dense",
    iterations: int | None = None,
    scenes: tuple[int, int] = (4000, 200),
    seed: int = 0,
    threads: int = 1,
) -> dict:
    """Writes the scenes, trains both models, measures and draws them, all in the folder `out`.

    A demo that was there before is replaced.

    Args:
        out: where everything goes.
        iterations: of each training; by default as the configs say.
        scenes: how many to learn from, and how many to judge by.
        seed: another seed, other networks; the scenes stay.
        threads: of each of the two trainings.

    Returns:
        What metrics.json holds.

    Raises:
        InputError: the OpenMMLab packages are missing.
        RuntimeError: a training failed; its log is named.
    """
    out, started = Path(out), time.monotonic()
    data = out / "data"
    cfgs = {task: configure(name, data, iterations, seed) for task, name in TASKS.items()}
    for task in TASKS:
        shutil.rmtree(out / task, ignore_errors=True)
    say(f"{scenes[0]} scenes to learn from and {scenes[1]} to judge by are being written to {escape(str(data))}")
    for split, count in zip(("train", "val"), scenes):
        write_scenes(data, split, count)

    trainings = {task: Training(cfg, out / task, threads) for task, cfg in cfgs.items()}
    killed = trainings["segmentation"]
    killed.kill_at = killed.iterations // 2 + killed.cfg.default_hooks.checkpoint.interval // 2
    say("two trainings, side by side; their logs are " + " and ".join(escape(str(t.log)) for t in trainings.values()))
    run_side_by_side(trainings.values())

    metrics, found = {}, {}
    for task, training in trainings.items():
        metrics[task], found[task] = evaluate(training)
    metrics["segmentation"]["IoU"] = class_iou(data, found["segmentation"])
    metrics["interruption"] = {"killed_at": killed.killed_at, "resumed_from": killed.resumed_from, **killed.replayed()}
    used = os.times()
    metrics["seconds"] = {
        "all": time.monotonic() - started,
        "processor_of_trainings": used.children_user + used.children_system,
    }
    with atomic(out / "metrics.json") as file:
        file.write(json.dumps(metrics, indent=2).encode())

    from .demo_dense_pictures import draw

    for task, training in trainings.items():
        draw(task, out / f"{task}.png", data, training, metrics[task], found[task])
    tell(out, metrics, trainings)
    return metrics


def configure(name: str, data: str | Path, iterations: int | None = None, seed: int = 0):
    """The config `name` (an `mmengine.Config`), for the scenes in the folder `data`.

    Given `iterations`, the training is as short as that; its schedule, its log and its checkpoints shrink with it.

    Raises:
        InputError: the OpenMMLab packages are missing.
    """
    cfg = read_config(name)
    cfg.randomness.seed = seed
    for part in ("train", "val", "test"):
        cfg[f"{part}_dataloader"].dataset.data_root = str(data)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        if "ann_file" in evaluator:
            evaluator.ann_file = str(Path(data, "val", "instances.json"))
    if iterations:
        warmup, decay = cfg.param_scheduler
        warmup.end = decay.begin = iterations // 4
        decay.end = cfg.train_cfg.max_iters = cfg.train_cfg.val_interval = iterations
        hooks, often = cfg.default_hooks, max(iterations // 8, 1)
        hooks.logger.interval = hooks.checkpoint.interval = cfg.log_processor.window_size = often
    return cfg


def read_log(work_dir: str | Path) -> list[list[dict]]:
    """The rows that MMEngine logged, one list for each run in `work_dir`, in order."""
    runs = []
    for path in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        lines = path.read_text().split("\n")[:-1]  # what a kill cut short has no end of line
        runs.append([json.loads(line) for line in lines])
    return runs


# -- training ---------------------------------------------------------------------------------------------------------


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
    process: subprocess.Popen | None = field(default=None, repr=False)

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
        """Starts `linescan train --config`, which resumes from the newest checkpoint if there is one."""
        self.work_dir.mkdir(parents=True, exist_ok=True)
        self.cfg.dump(self.config)
        command = [sys.executable, "-m", "linescan", "train", "--config", str(self.config), "--resume"]
        command += ["--work-dir", str(self.work_dir)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(self.threads)}
            )

    def step(self) -> int:
        """The last iteration that is in the log."""
        return max((row["step"] for run in read_log(self.work_dir) for row in run if "loss" in row), default=0)

    def poll(self) -> bool:
        """Whether it is still running. Kills it and starts it again when the time has come.

        Raises:
            RuntimeError: the process has failed.
        """
        status = self.process.poll()
        if status:
            raise RuntimeError(f"the training of {self.config} failed; the end of {self.log} says why")
        if status is None and self.kill_at is not None and self.killed_at is None and self.step() > self.kill_at:
            self.stop()
            self.killed_at = self.step()
            self.resumed_from = int(self.checkpoint.stem.rpartition("_")[2])
            say(
                f"[bold]kill -9[/] of {escape(self.work_dir.name)} at iteration {self.killed_at}; "
                f"it goes on from its checkpoint of iteration {self.resumed_from}"
            )
            self.start()
            return True
        return status is None

    def stop(self) -> None:
        """Kills the process, if it is running."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def replayed(self) -> dict:
        """How the losses that were logged both before the kill and after the resumption compare."""
        runs = [{row["step"]: row["loss"] for row in run if "loss" in row} for run in read_log(self.work_dir)]
        first, second = runs if len(runs) == 2 else ({}, {})
        differences = [abs(first[step] - second[step]) for step in first.keys() & second.keys()]
        return {"replayed_losses": len(differences), "largest_difference": max(differences, default=None)}


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


# -- judging ----------------------------------------------------------------------------------------------------------


def evaluate(training: Training) -> tuple[dict, list]:
    """Judges the newest checkpoint by the metrics of its config, as MMEngine's `Runner.test` does.

    Returns:
        (metrics, predictions): mmseg's or pycocotools' numbers, and for each held-out scene the classes (H, W), or a
        dict of boxes (N, 4) as left, top, right, bottom, labels, scores and masks (N, H, W).
    """
    from mmengine.runner import Runner

    from .resumable import refuse_pickles

    refuse_pickles()
    cfg = copy.deepcopy(training.cfg)
    cfg.work_dir, cfg.load_from, cfg.log_level = str(training.work_dir / "test"), str(training.checkpoint), "ERROR"
    with open(training.log, "a") as log, redirect_stdout(log), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmseg's and mmdet's, about their own defaults
        runner = Runner.from_cfg(cfg)
        metrics = {key: float(value) for key, value in runner.test().items()}
    predictions = []
    with torch.inference_mode():
        for batch in runner.test_loop.dataloader:
            for sample in runner.model.test_step(batch):
                if "pred_sem_seg" in sample:
                    predictions.append(sample.pred_sem_seg.data[0].numpy().astype(np.uint8))
                else:
                    predictions.append({key: value.numpy() for key, value in sample.pred_instances.items()})
    return metrics, predictions


def class_iou(data: str | Path, predictions: list[np.ndarray]) -> dict[str, float | None]:
    """Intersection over union of each class in the held-out scenes, in per cent; None for one that does not occur."""
    paths = sorted(Path(data, "val", "masks").glob("*.png"))
    truth = np.stack([read_pixels(path) for path in paths]).ravel().astype(int)
    counts = np.bincount(truth * len(CLASSES) + np.stack(predictions).ravel(), minlength=len(CLASSES) ** 2)
    counts = counts.reshape(len(CLASSES), -1)
    common, either = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    return {name: 100 * int(a) / int(b) if b else None for name, a, b in zip(CLASSES, common, either)}


# -- telling ----------------------------------------------------------------------------------------------------------


def tell(out: Path, metrics: dict, trainings: dict[str, Training]) -> None:
    """The last lines on the terminal: numbers, places, and what to try next."""
    boxes, stop, seconds = metrics["detection"], metrics["interruption"], metrics["seconds"]
    say(
        f"\n[bold green]{metrics['segmentation']['mIoU']:.1f} % mIoU[/] (UPerNet) and "
        f"[bold green]{boxes['coco/bbox_mAP']:.3f} box AP[/], {boxes['coco/segm_mAP']:.3f} mask AP (Mask R-CNN), "
        f"after {seconds['all']:.0f} s"
    )
    if stop["replayed_losses"]:
        same = "the very same" if stop["largest_difference"] == 0 else f"within {stop['largest_difference']:.1e}"
        say(
            f"killed at iteration {stop['killed_at']}, resumed from {stop['resumed_from']}: "
            f"the losses that were run twice are {same}"
        )
    for name, what in (
        ("segmentation.png", "look at this first"),
        ("detection.png", "and at this"),
        ("metrics.json", "all numbers"),
        ("data/", "the scenes: pictures, mask PNGs, COCO json"),
        ("segmentation.py", "the config of the UPerNet; its logs and checkpoints are in segmentation/"),
        ("detection.py", "the config of the Mask R-CNN; its logs and checkpoints are in detection/"),
    ):
        say(f"  [bold]{escape(str(out / name))}[/]  {what}")
    command = "linescan" if shutil.which("linescan") else os.path.relpath(Path(sys.executable).parent / "linescan")
    say("What to try next:")
    for line in (
        *(
            f"{command} {verb} {out}/data/val/images --model {trainings[task].config} "
            f"--checkpoint {os.path.relpath(trainings[task].checkpoint)}"
            for verb, task in (("segment", "segmentation"), ("detect", "detection"))
        ),
        f"{command} train --config {trainings['segmentation'].config} --work-dir {out}/deeper "
        "--cfg-options 'model.backbone.depths=[1,1,4,1]'",
    ):
        say(f"  [cyan]{escape(line)}[/]")
