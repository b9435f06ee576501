"""Scores of change detection, from a table of pixels: rows are what was found, columns what is there; 0 is "unchanged".

The SCD task's (Yang et al., "Asymmetric Siamese Networks for Semantic Change Detection in Aerial Images", IEEE TGRS
2021, arXiv 2010.05687), which count both dates' pixels in one table.
"""

import math

import torch
from torch import Tensor

from .mask_sets import IGNORED

__all__ = ["confusion", "kappa_of", "semantic_scores", "two_class_scores"]


def confusion(found: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How many pixels of each class were found to be of each: (classes, classes), int64, rows are `found`.

    Args:
        found, labels: classes of pixels, of one shape; those whose label is `IGNORED` are not counted.
        classes: how many there are.
    """
    known = labels != IGNORED
    pairs = classes * found[known].long() + labels[known].long()
    return torch.bincount(pairs.flatten(), minlength=classes**2).view(classes, classes)


def kappa_of(table: Tensor, eps: float = 0.0) -> Tensor:
    """Cohen's kappa: agreement beyond chance, (po - pe) / (1 - pe + eps).

    Args:
        table: (C, C), of pixels or of shares of them.
        eps: added to 1 - pe; without it a table that is empty, or whose agreement is all by chance, has 0.
    """
    total = table.sum().clamp_min(eps)
    agreed = table.diagonal().sum() / total
    by_chance = table.sum(1) @ table.sum(0) / total**2
    if not eps and (not total or by_chance == 1):
        return total * 0
    return (agreed - by_chance) / (1 - by_chance + eps)


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole else float("nan")


def two_class_scores(table: Tensor) -> dict[str, float]:
    """`oa`, `f1` and `iou` of the changed pixels, and `miou`, of a table (2, 2); NaN where nothing is to be found."""
    table = table.double()
    (kept, missed), (alarms, hits) = table
    iou = _ratio(hits, hits + missed + alarms)
    return {
        "oa": _ratio(kept + hits, table.sum()),
        "f1": _ratio(2 * hits, 2 * hits + missed + alarms),
        "iou": iou,
        "miou": (iou + _ratio(kept, kept + missed + alarms)) / 2,
    }


def semantic_scores(table: Tensor) -> dict[str, float]:
    """Scores of a table (C, C) of both dates; NaN where nothing has changed or is found to.

    `oa`: the share of pixels that are right. `f_scd`: the harmonic mean of precision and recall of changed pixels whose
    class is right. `miou`: the mean IoU of unchanged and of changed pixels, whatever their class. `sek`: kappa without
    the pixels that are rightly unchanged, times exp(IoU of the changed - 1).
    """
    table = table.double()
    changed = table[1:, 1:]
    two = torch.stack([table[0, 0], table[0, 1:].sum(), table[1:, 0].sum(), changed.sum()]).view(2, 2)
    plain = two_class_scores(two)
    right = changed.diagonal().sum()
    without = table.clone()
    without[0, 0] = 0
    return {
        "oa": _ratio(table.diagonal().sum(), table.sum()),
        "f_scd": _ratio(2 * right, table[1:].sum() + table[:, 1:].sum()),
        "miou": plain["miou"],
        "sek": float(kappa_of(without)) * math.exp(plain["iou"] - 1),
    }
