"""LVIS for open-vocabulary detectors of mmdet's Runner: its images, and AP with a fixed number of boxes for each class.

Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation", CVPR 2019, arXiv 1908.03195. Dave et al.,
"Evaluating Large-Vocabulary Object Detectors: The Devil is in the Details", 2021, arXiv 2102.01066 (fixed AP).

No other package is needed: that of LVIS's authors does not run with the NumPy of these days.
"""

import json
from collections import defaultdict
from pathlib import PurePosixPath
from typing import NamedTuple, Sequence

import numpy as np
import torch
from mmdet.datasets import CocoDataset, LVISV1Dataset
from mmengine.evaluator import BaseMetric
from mmengine.registry import DATASETS, METRICS
from torchvision.ops import box_iou

__all__ = ["LVISFixedAP", "LVISImages", "matched"]

OVERLAPS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)


@DATASETS.register_module()
class LVISImages(CocoDataset):
    """LVIS v1 with its 1,203 classes; images are where their `coco_url` says, below COCO's folder: val2017/NAME.jpg."""

    METAINFO = {"classes": LVISV1Dataset.METAINFO["classes"], "palette": None}

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """As of `CocoDataset`."""
        image = raw_data_info["raw_img_info"]
        if "coco_url" in image:
            image["file_name"] = "/".join(PurePosixPath(image["coco_url"]).parts[-2:])
        return super().parse_data_info(raw_data_info)


class Hits(NamedTuple):
    """Boxes of one class in one image: (D,) scores, (T, D) whether each is right at each overlap, whether it counts."""

    scores: np.ndarray
    right: np.ndarray
    counted: np.ndarray


def matched(boxes: np.ndarray, scores: np.ndarray, truth: np.ndarray, exhaustive: bool) -> Hits:
    """Boxes (D, 4) of one class in one image against those that are there (G, 4), as COCO matches them.

    The best score chooses first, the free box that it overlaps most. Where not all objects of the class are annotated
    (`exhaustive` is false), boxes that are not right do not count.
    """
    order = np.argsort(-scores, kind="stable")
    overlaps = box_iou(*(torch.from_numpy(np.asarray(x, np.float64)) for x in (boxes[order], truth))).numpy()
    right = np.zeros((len(OVERLAPS), len(boxes)), bool)
    for t, least in enumerate(OVERLAPS if len(truth) else ()):
        free = overlaps.copy()
        for i in range(len(boxes)):
            best = len(truth) - 1 - free[i, ::-1].argmax()
            if free[i, best] >= least:
                right[t, i], free[:, best] = True, -1
    return Hits(scores[order], right, right | exhaustive)


def average_precisions(images: Sequence[Hits], objects: int) -> np.ndarray:
    """AP of one class at each overlap, (T,): the mean precision at 101 positions of recall."""
    if not images:
        return np.zeros(len(OVERLAPS))
    scores, right, counted = (np.concatenate(parts, -1) for parts in zip(*images))
    order = np.argsort(-scores, kind="stable")
    answers = []
    for is_right, counts in zip(right[:, order], counted[:, order]):
        hits, misses = np.cumsum(is_right), np.cumsum(counts & ~is_right)
        precision = hits / np.maximum(hits + misses, np.spacing(1))
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        places = np.searchsorted(hits / objects, RECALLS)
        answers.append(np.append(precision, 0.0)[places].mean())
    return np.array(answers)


@METRICS.register_module()
class LVISFixedAP(BaseMetric):
    """AP of LVIS, and of its rare, common and frequent classes (APr, APc, APf), in 0..1.

    Every class counts with its `most` best boxes of all images, and no image has a limit: let the detector give many
    (`test_cfg=dict(most=1000)`). A box counts only where it is known whether its class is in the image.

    Args:
        ann_file: of LVIS v1, such as lvis_v1_val.json or its part minival.
        most: boxes of a class.
        collect_device, prefix: of every metric.
    """

    default_prefix = "lvis"

    def __init__(self, ann_file: str, most: int = 10000, collect_device: str = "cpu", prefix: str | None = None):
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.most = most
        with open(ann_file) as file:
            content = json.load(file)
        self.categories = sorted(content["categories"], key=lambda one: one["id"])
        self.unsure = {one["id"]: set(one.get("not_exhaustive_category_ids", ())) for one in content["images"]}
        self.truth: dict[int, dict[int, list]] = defaultdict(lambda: defaultdict(list))  # by class and image
        for image in content["images"]:
            for category in image.get("neg_category_ids", ()):
                self.truth[category][image["id"]] = []
        for one in content["annotations"]:
            left, top, width, height = one["bbox"]
            self.truth[one["category_id"]][one["image_id"]].append([left, top, left + width, top + height])

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        """Keeps what was found."""
        for sample in data_samples:
            found = sample["pred_instances"]
            arrays = (found[name].cpu().numpy() for name in ("bboxes", "scores", "labels"))
            self.results.append((sample["img_id"], *arrays))

    def compute_metrics(self, results: list) -> dict[str, float]:
        """AP, AP50, AP75, APr, APc and APf; NaN where nothing is there to be found."""
        numbers = np.repeat([one[0] for one in results], [len(one[2]) for one in results])
        boxes, scores, labels = (np.concatenate([one[i] for one in results]) for i in (1, 2, 3))
        places = np.argsort(-scores, kind="stable")
        places = places[np.argsort(labels[places], kind="stable")]  # class by class, the best first
        borders = np.searchsorted(labels[places], np.arange(len(self.categories) + 1))
        rows, rarities = [], []
        for category, start, end in zip(self.categories, borders, borders[1:]):
            truth = self.truth.get(category["id"], {})
            objects = sum(map(len, truth.values()))
            if not objects:
                continue
            of_image = defaultdict(list)
            for place in places[start : min(end, start + self.most)]:
                if numbers[place] in truth:
                    of_image[numbers[place]].append(place)
            hits = []
            for image, these in sorted(of_image.items()):
                there = np.reshape(truth[image], (-1, 4))
                exhaustive = category["id"] not in self.unsure[image]
                hits.append(matched(boxes[these], scores[these], there, exhaustive))
            rows.append(average_precisions(hits, objects))
            rarities.append(category.get("frequency"))
        rows, rarities = np.reshape(rows, (-1, len(OVERLAPS))), np.array(rarities)
        wanted = {"AP": rows, "AP50": rows[:, :1], "AP75": rows[:, 5:6]}
        wanted |= {f"AP{letter}": rows[rarities == letter] for letter in "rcf"}
        return {name: float(part.mean()) if part.size else float("nan") for name, part in wanted.items()}
