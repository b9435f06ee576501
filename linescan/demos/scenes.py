"""`make demo-dense`: digits found in scenes, pixel by pixel (UPerNet, mmseg) and box by box (Mask R-CNN, mmdet).

Both trainings are MMEngine's own, each in a process and on a core of its own. One is killed half-way, as by a power
cut, and resumed. What comes out is measured by mmseg's and pycocotools' metrics, and drawn.
"""

import copy
import json
import os
import shutil
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from ..engine.atomic import atomic
from ..engine.progress import say
from ..openmmlab.runner import read_config
from .killable import Training, run_side_by_side
from .render import CLASSES, read_pixels, write_scenes
from .telling import tell_commands, tell_files

__all__ = ["TASKS", "configure", "demo_dense", "evaluate"]

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
        scenes: how many to train on, and how many to score by.
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
    say(f"{scenes[0]} scenes to train on and {scenes[1]} to score by are being written to {data}")
    for split, count in zip(("train", "val"), scenes):
        write_scenes(data, split, count)

    trainings = {task: Training(cfg, out / task, threads) for task, cfg in cfgs.items()}
    killed = trainings["segmentation"]
    killed.kill_at = killed.iterations // 2 + killed.cfg.default_hooks.checkpoint.interval // 2
    say("two trainings, side by side; their logs are " + " and ".join(str(t.log) for t in trainings.values()))
    run_side_by_side(trainings.values())

    metrics, found = {}, {}
    for task, training in trainings.items():
        metrics[task], found[task] = evaluate(training)
    metrics["segmentation"]["IoU"] = class_iou(data, found["segmentation"])
    metrics["interruption"] = {"killed_at": killed.killed_at, "resumed_from": killed.resumed_from, **killed.replayed()}
    metrics["seconds"] = time.monotonic() - started
    with atomic(out / "metrics.json") as file:
        file.write(json.dumps(metrics, indent=2).encode())

    from .scenes_page import draw

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


# -- training ---------------------------------------------------------------------------------------------------------


# -- judging ----------------------------------------------------------------------------------------------------------


def evaluate(training: Training) -> tuple[dict, list]:
    """Judges the newest checkpoint by the metrics of its config, as MMEngine's `Runner.test` does.

    Returns:
        (metrics, predictions): mmseg's or pycocotools' numbers, and for each held-out scene the classes (H, W), or a
        dict of boxes (N, 4) as left, top, right, bottom, labels, scores and masks (N, H, W).
    """
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    from ..openmmlab.resumable import refuse_pickles

    predictions = []

    class Keep(Hook):
        """What is judged is kept."""

        def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=()):
            for sample in outputs:
                if "pred_sem_seg" in sample:
                    predictions.append(sample.pred_sem_seg.data[0].numpy().astype(np.uint8))
                else:
                    predictions.append({key: value.numpy() for key, value in sample.pred_instances.items()})

    refuse_pickles()
    cfg = copy.deepcopy(training.cfg)
    cfg.work_dir, cfg.load_from, cfg.log_level = str(training.work_dir / "test"), str(training.checkpoint), "ERROR"
    with open(training.log, "a") as log, redirect_stdout(log), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmseg's and mmdet's, about their own defaults
        runner = Runner.from_cfg(cfg)
        runner.register_hook(Keep())
        metrics = {key: float(value) for key, value in runner.test().items()}
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
    boxes, stop = metrics["detection"], metrics["interruption"]
    say()
    say(
        (f"{metrics['segmentation']['mIoU']:.1f} % mIoU", "bold green"),
        " (UPerNet) and ",
        (f"{boxes['coco/bbox_mAP']:.3f} box AP", "bold green"),
        f", {boxes['coco/segm_mAP']:.3f} mask AP (Mask R-CNN), after {metrics['seconds']:.0f} s",
    )
    if stop["replayed_losses"]:
        same = "the very same" if stop["largest_difference"] == 0 else f"within {stop['largest_difference']:.1e}"
        say(
            f"killed at iteration {stop['killed_at']}, resumed from {stop['resumed_from']}: "
            f"the losses that were run twice are {same}"
        )
    tell_files(
        out,
        {
            "segmentation.png": "start with this one",
            "detection.png": "and at this",
            "metrics.json": "all numbers",
            "data/": "the scenes: images, mask PNGs, COCO json",
            "segmentation.py": "the config of the UPerNet; its logs and checkpoints are in segmentation/",
            "detection.py": "the config of the Mask R-CNN; its logs and checkpoints are in detection/",
        },
    )
    tell_commands(
        (
            *(
                f"{verb} {out}/data/val/images --model {trainings[task].config} "
                f"--checkpoint {os.path.relpath(trainings[task].checkpoint)}"
                for verb, task in (("segment", "segmentation"), ("detect", "detection"))
            ),
            f"train --config {trainings['segmentation'].config} --work-dir {out}/deeper "
            "--cfg-options 'model.backbone.depths=[1,1,4,1]'",
        )
    )
