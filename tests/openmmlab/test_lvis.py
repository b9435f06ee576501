"""AP of LVIS with a fixed number of boxes for each class, against LVIS's own program."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")

from mmengine.structures import InstanceData  # noqa: E402

from linescan.openmmlab.lvis import LVISFixedAP, LVISImages  # noqa: E402

CLASSES, IMAGES = 7, 12


def write_data(path):
    """Images with some classes annotated, some known to be absent, some not fully annotated; what was found in them."""
    draw = np.random.default_rng(0)
    categories = [{"id": 3 * i + 1, "name": f"c{i}", "frequency": "rcf"[i % 3]} for i in range(CLASSES)]
    images, annotations, found = [], [], []
    for i in range(IMAGES):
        here = list(draw.choice(CLASSES, draw.integers(0, 4), replace=False))
        others = [c for c in range(CLASSES) if c not in here]
        absent = draw.choice(others, min(2, len(others)), replace=False)
        unsure = [c for c in here if draw.random() < 0.4]
        images.append({
            "id": 100 + i, "height": 200, "width": 200,
            "coco_url": f"http://images.cocodataset.org/val2017/{i}.jpg",
            "neg_category_ids": [int(3 * c + 1) for c in absent],
            "not_exhaustive_category_ids": [int(3 * c + 1) for c in unsure],
        })  # fmt: skip
        for c in here:
            for _ in range(draw.integers(1, 5)):
                box = [float(round(v, 1)) for v in (*draw.uniform(0, 120, 2), *draw.uniform(10, 80, 2))]
                annotations.append({"id": len(annotations) + 1, "image_id": 100 + i, "category_id": int(3 * c + 1),
                                    "bbox": box, "area": box[2] * box[3]})  # fmt: skip
    for image in images:
        boxes, scores, labels = [], [], []
        for one in annotations:
            if one["image_id"] == image["id"]:
                for _ in range(2):
                    x, y, w, h = one["bbox"]
                    boxes.append(np.array([x, y, x + w, y + h]) + draw.normal(0, 4, 4))
                    scores.append(round(draw.random(), 2))
                    labels.append((one["category_id"] - 1) // 3)
        for _ in range(15):
            x, y, w, h = *draw.uniform(0, 120, 2), *draw.uniform(10, 80, 2)
            boxes.append([x, y, x + w, y + h])
            scores.append(round(draw.random(), 2))
            labels.append(int(draw.integers(0, CLASSES)))
        tensors = {
            "bboxes": torch.tensor(np.array(boxes)),
            "scores": torch.tensor(scores),
            "labels": torch.tensor(labels),
        }
        found.append({"img_id": image["id"], "pred_instances": InstanceData(**tensors)})
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return found


def test_scores_are_those_of_lvis(tmp_path):
    """The numbers are of the package lvis 0.5.3, given the best 25 boxes of each class and no limit for images."""
    found = write_data(tmp_path / "lvis.json")
    metric = LVISFixedAP(str(tmp_path / "lvis.json"), most=25)
    metric.process(None, found)
    want = {
        "AP": 0.28956328689451905, "AP50": 0.5224972891819464, "AP75": 0.34656797820330565,
        "APr": 0.2959851552920859, "APc": 0.3817002775576099, "APf": 0.18779349363507783,
    }  # fmt: skip
    assert metric.compute_metrics(metric.results) == pytest.approx(want, rel=1e-12)


def test_images_are_named_by_their_address(tmp_path):
    write_data(tmp_path / "lvis.json")
    names = {"classes": [f"c{i}" for i in range(CLASSES)]}
    data = LVISImages(ann_file=str(tmp_path / "lvis.json"), data_prefix={"img": "coco"}, metainfo=names, test_mode=True)
    assert data[3]["img_path"] == "coco/val2017/3.jpg" and len(data) == IMAGES
    assert len(LVISImages.METAINFO["classes"]) == 1203
