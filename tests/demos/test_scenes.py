"""`make demo-dense` on a small scale: its scenes, its trainings with MMEngine's Runner, a kill -9 between them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.registry import DATASETS, init_default_scope  # noqa: E402
from mmengine.runner import find_latest_checkpoint  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402

from linescan.demos.killable import Training, read_log  # noqa: E402
from linescan.demos.render import CLASSES, read_pixels, write_scenes  # noqa: E402
from linescan.demos.scenes import TASKS, configure, demo_dense  # noqa: E402
from linescan.engine.digit_scenes import render  # noqa: E402
from linescan.engine.image_sets import Digits  # noqa: E402
from linescan.openmmlab.resumable import load_from_disk  # noqa: E402
from linescan.openmmlab.runner import train_config  # noqa: E402

SCENES = (16, 4)
ITERATIONS = 6


# -- scenes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder with a few scenes of both splits."""
    root = tmp_path_factory.mktemp("scenes")
    for split in ("train", "val"):
        write_scenes(root, split, SCENES[1])
    return root


def test_masks_boxes_and_classes_are_of_the_same_digits(scenes):
    coco = COCO(str(scenes / "train" / "instances.json"))
    assert [coco.cats[i]["name"] for i in sorted(coco.cats)] == list(CLASSES[1:])
    for image in coco.imgs.values():
        picture, classes = (read_pixels(scenes / "train" / kind / image["file_name"]) for kind in ("images", "masks"))
        assert picture.shape == (image["height"], image["width"], 3) and classes.shape == picture.shape[:2]
        annotations = coco.imgToAnns[image["id"]]
        assert 1 <= len(annotations) <= 4
        painted = np.zeros_like(classes)
        for annotation in annotations:
            mask = coco.annToMask(annotation).astype(bool)
            left, top, width, height = map(int, annotation["bbox"])
            inside = mask[top : top + height, left : left + width]
            assert mask.sum() == inside.sum() == annotation["area"] > 50
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            assert not painted[mask].any()
            painted[mask] = annotation["category_id"]
        assert np.array_equal(painted, classes)


def test_a_digit_stands_out_and_is_of_its_split():
    held_out, others = Digits(held_out=True), Digits(held_out=False)
    assert not {p.tobytes() for p in held_out.pixels} & {p.tobytes() for p in others.pixels}
    for seed in range(8):
        scene = render(others, np.random.default_rng(seed))
        written, grey = scene.semantic > 0, scene.image.mean(-1)
        assert grey[written].mean() > grey[~written].mean() + 40
        assert len(scene.labels) == len(scene.masks) == len(scene.boxes)


def test_scenes_depend_on_seed_and_number_alone(scenes, tmp_path):
    write_scenes(tmp_path, "val", 3)
    write_scenes(tmp_path / "other", "val", 1, seed=1)
    for kind in ("images", "masks"):
        for i in range(3):
            name = Path("val", kind, f"{i:05}.png")
            assert (tmp_path / name).read_bytes() == (scenes / name).read_bytes()
    first = [root / "images" / "00000.png" for root in (scenes / "val", scenes / "train", tmp_path / "other" / "val")]
    assert len({path.read_bytes() for path in first}) == 3


@pytest.mark.parametrize("task", TASKS)
def test_mmseg_and_mmdet_read_the_scenes(scenes, task):
    cfg = configure(TASKS[task], scenes)
    init_default_scope(cfg.default_scope)
    for split, loader in (("train", cfg.train_dataloader), ("val", cfg.val_dataloader)):
        dataset = DATASETS.build(loader.dataset)
        assert len(dataset) == SCENES[1]
        sample = dataset[2]["data_samples"]
        if task == "segmentation":
            assert np.array_equal(sample.gt_sem_seg.data[0], read_pixels(scenes / split / "masks" / "00002.png"))
            assert tuple(dataset.metainfo["classes"]) == CLASSES
        else:
            coco = COCO(str(scenes / split / "instances.json"))
            annotations = coco.imgToAnns[2]
            corners = [(x, y, x + w, y + h) for x, y, w, h in (a["bbox"] for a in annotations)]
            assert np.array_equal(sample.gt_instances.bboxes.tensor, corners)
            assert sample.gt_instances.labels.tolist() == [a["category_id"] - 1 for a in annotations]
            masks = np.stack([coco.annToMask(a) for a in annotations])
            assert np.array_equal(sample.gt_instances.masks.masks, masks)


# -- trainings --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_trains_judges_draws_and_survives_a_kill(tmp_path):
    out = tmp_path / "a folder, with spaces"
    metrics = demo_dense(out, ITERATIONS, SCENES)  # cut short
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert 0 <= metrics["segmentation"]["mIoU"] <= 100 and -1 <= metrics["detection"]["coco/bbox_mAP"] <= 1
    occurring = [value for value in metrics["segmentation"]["IoU"].values() if value is not None]
    assert np.mean(occurring) == pytest.approx(metrics["segmentation"]["mIoU"], abs=0.01)  # mmseg's is rounded
    for task, key in (("segmentation", "mIoU"), ("detection", "coco/bbox_mAP")):
        assert read_pixels(out / f"{task}.png").shape[1] > 1000
        rows = [row for run in read_log(out / task) for row in run]
        losses = [row["loss"] for row in rows if "loss" in row]
        assert np.isfinite(losses).all() and losses[-1] < losses[0]
        (logged,) = [row[key] for row in rows if key in row]
        assert logged == pytest.approx(metrics[task][key], abs=0.01)  # the last checkpoint is what was judged

    # It was killed and resumed, and took the steps of one that was not.
    stop = metrics["interruption"]
    assert ITERATIONS // 2 < stop["killed_at"] <= ITERATIONS
    assert stop["resumed_from"] <= stop["killed_at"] and len(read_log(out / "segmentation")) == 2
    assert stop["largest_difference"] in (0, None)  # None: killed right after a checkpoint

    train_config(out / "segmentation.py", tmp_path / "calm")
    ours = load_from_disk(find_latest_checkpoint(str(tmp_path / "calm")))["state_dict"]
    theirs = load_from_disk(find_latest_checkpoint(str(out / "segmentation")))["state_dict"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
def test_a_failed_training_names_its_log(scenes, tmp_path):
    cfg = configure(TASKS["segmentation"], scenes)
    cfg.model.backbone.model = "nonsense"
    training = Training(cfg, tmp_path / "run")
    training.start()
    training.process.join()
    with pytest.raises(RuntimeError, match="training.log says why"):
        training.poll()
    assert "nonsense" in training.log.read_text()
