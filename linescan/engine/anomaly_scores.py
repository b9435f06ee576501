"""How well scores tell anomalies from what is normal: of images, and of pixels.

By scikit-learn (the extra `anomaly`), and as published results on MVTec-AD and VisA are computed.
"""

import numpy as np

__all__ = ["best_f1_in_steps", "ranking", "region_overlap"]


def ranking(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float, float]:
    """AUROC, average precision, and the highest F1 at any threshold.

    Args:
        labels: (N,), 1 for an anomaly; both kinds occur.
        scores: (N,), higher for anomalies.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

    precision, recall, _ = precision_recall_curve(labels, scores)
    best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    return float(roc_auc_score(labels, scores)), float(average_precision_score(labels, scores)), float(best)


def best_f1_in_steps(labels: np.ndarray, scores: np.ndarray, step: float = 0.05) -> float:
    """The highest F1 at thresholds of 0, 0.05, ..., 1 between the lowest and the highest score, as it is published.

    Args:
        labels: any shape, 1 for an anomaly.
        scores: of that shape.
    """
    shares, labels = scores - scores.min(), labels.astype(bool)
    shares = shares / (shares.max() or 1)
    best, eps = 0.0, 1e-8
    for threshold in np.arange(0, 1 + 1e-3, step):
        found = shares > threshold
        right = np.count_nonzero(found & labels)
        precision = right / (np.count_nonzero(found) + eps)
        recall = right / (np.count_nonzero(labels) + eps)
        best = max(best, 2 * precision * recall / (precision + recall + eps))
    return float(best)


def region_overlap(masks: np.ndarray, maps: np.ndarray, steps: int = 200, limit: float = 0.3) -> float:
    """AUPRO: the area under the mean share that is found of each region, over the share of false alarms up to a limit.

    At 200 equidistant thresholds, as it is published; regions are connected by sides or corners, and all of them count
    alike. Bergmann et al., "MVTec AD -- A Comprehensive Real-World Dataset for Unsupervised Anomaly Detection", CVPR
    2019.

    Args:
        masks: (N, H, W), 1 where there is a defect.
        maps: (N, H, W), higher where one is suspected.
        steps: thresholds between the lowest and the highest value.
        limit: of the share of normal pixels that are above a threshold.
    """
    from scipy.ndimage import label
    from sklearn.metrics import auc

    maps, masks = maps.astype(np.float64), masks.astype(bool)
    low, high = maps.min(), maps.max()
    if low == high:
        return 0.0
    thresholds = np.arange(low, high, (high - low) / steps)

    def above(values: np.ndarray) -> np.ndarray:
        """How many of the values are above each threshold."""
        passed = np.bincount(np.searchsorted(thresholds, values), minlength=len(thresholds) + 1)
        return len(values) - passed.cumsum()[:-1]

    found, regions = np.zeros(len(thresholds)), 0
    for mask, values in zip(masks, maps):
        numbers, count = label(mask, np.ones((3, 3)))
        regions += count
        for number in range(1, count + 1):
            region = values[numbers == number]
            found += above(region) / len(region)
    normal = maps[~masks]
    alarms = above(normal) / len(normal)
    kept = alarms < limit
    overlaps, alarms = (found / regions)[kept], alarms[kept] - alarms[kept].min()
    return float(auc(alarms / alarms.max(), overlaps)) if alarms.max() > 0 else float(overlaps.max())
