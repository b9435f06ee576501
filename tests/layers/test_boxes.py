"""Boxes on the ground: overlaps against polygons that are clipped one edge after another, suppression, points."""

import math

import numpy as np
import pytest
import torch

from linescan.layers.boxes import Boxes, corners, iou_3d, iou_bev, limit_angle, nms, overlap_bev, points_in_boxes


def clipped_area(a, b):
    """Sutherland and Hodgman: the polygon of a, cut by each edge of b."""
    polygon = [np.array(p) for p in corners(a).tolist()]
    other = [np.array(p) for p in corners(b).tolist()]
    for start, end in zip(other, other[1:] + other[:1]):
        edge, kept = end - start, []
        side = [edge[0] * (p - start)[1] - edge[1] * (p - start)[0] for p in polygon]
        for i, p in enumerate(polygon):
            q, s, t = polygon[i - 1], side[i], side[i - 1]
            if (s >= 0) != (t >= 0):
                kept.append(q + (p - q) * t / (t - s))
            if s >= 0:
                kept.append(p)
        polygon = kept
        if not polygon:
            return 0.0
    x, y = np.array(polygon).T
    return float(0.5 * (x * np.roll(y, -1) - y * np.roll(x, -1)).sum())


def some_boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(count, 7, generator=generator, dtype=torch.float64)
    return torch.cat([4 * rows[:, :3], 0.3 + 3 * rows[:, 3:6], 7 * (rows[:, 6:] - 0.5)], 1)


def test_overlaps_are_those_of_clipped_polygons():
    a, b = some_boxes(25, 0), some_boxes(20, 1)
    want = torch.tensor([[clipped_area(x, y) for y in b] for x in a], dtype=torch.float64)
    torch.testing.assert_close(overlap_bev(a, b), want, atol=1e-9, rtol=1e-9)
    assert (want > 0).sum() > 100 and (want == 0).sum() > 20
    pairs = torch.tensor([(3, 4), (0, 0), (24, 19)])
    torch.testing.assert_close(overlap_bev(a, b, pairs), want[pairs[:, 0], pairs[:, 1]], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(overlap_bev(b, a).T, overlap_bev(a, b))
    area = a[:, 3:5].prod(1)[:, None] + b[:, 3:5].prod(1) - want
    torch.testing.assert_close(iou_bev(a, b), want / area)
    low = torch.maximum((a[:, 2] - a[:, 5] / 2)[:, None], b[:, 2] - b[:, 5] / 2)
    high = torch.minimum((a[:, 2] + a[:, 5] / 2)[:, None], b[:, 2] + b[:, 5] / 2)
    both = want * (high - low).clamp_min(0)
    volume = a[:, 3:6].prod(1)[:, None] + b[:, 3:6].prod(1) - both
    torch.testing.assert_close(iou_3d(a, b), both / volume)
    torch.testing.assert_close(iou_3d(a, b, pairs), iou_3d(a, b)[pairs[:, 0], pairs[:, 1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overlaps_of_boxes_that_touch_hold_or_equal_each_other(dtype):
    box = torch.tensor([[70.0, -39.0, 0, 3.9, 1.6, 1.5, 0.3]], dtype=dtype)
    turned = box + torch.tensor([0, 0, 0, 0, 0, 0, math.pi], dtype=dtype)
    inner = box * torch.tensor([1, 1, 1, 0.5, 0.5, 1, 1], dtype=dtype)
    assert iou_bev(box, box).item() == pytest.approx(1, abs=1e-6)
    assert iou_bev(box, turned).item() == pytest.approx(1, abs=1e-6)
    assert iou_bev(box, inner).item() == pytest.approx(0.25, abs=1e-6)
    side = torch.tensor([[0, 0, 0, 2.0, 2, 1, 0], [2, 0, 0, 2, 2, 1, 0], [0, 0, 1, 2, 2, 1, 0]], dtype=dtype)
    assert overlap_bev(side[:1], side[1:2]).item() == pytest.approx(0, abs=1e-9)
    assert iou_3d(side[:1], side[2:]).item() == 0 and iou_bev(side[:1], side[2:]).item() == pytest.approx(1)
    assert overlap_bev(box[:0], box).shape == (0, 1) and nms(box[:0], box[:0, 0], 0.1).shape == (0,)


def test_suppression_is_greedy():
    boxes, scores = some_boxes(60, 2), torch.rand(60, generator=torch.Generator().manual_seed(3))
    ious, kept = iou_bev(boxes, boxes), []
    for i in scores.argsort(descending=True).tolist():
        if all(ious[i, j] <= 0.2 for j in kept):
            kept.append(i)
    assert nms(boxes, scores, 0.2).tolist() == kept and 5 < len(kept) < 50
    half = torch.tensor([[0.0, 0, 0, 3, 1, 1, 0], [1, 0, 0, 3, 1, 1, 0]])  # that share exactly that
    assert nms(half, scores[:2], 0.5).tolist() == scores[:2].argsort(descending=True).tolist()
    assert nms(boxes, scores, 0.2, most=3).tolist() == kept[:3]
    assert nms(boxes, scores, 1.0, most_before=10).tolist() == scores.argsort(descending=True)[:10].tolist()
    assert set(nms(boxes, scores, 0.2, most_before=10).tolist()) <= set(scores.topk(10).indices.tolist())


def test_points_angles_and_rows():
    box = torch.tensor([[1.0, 2, 3, 4, 2, 1, math.pi / 2]])
    points = torch.tensor([[1.0, 3.9, 3.4], [1, 4.1, 3], [1.9, 2, 3], [2.1, 2, 3], [1, 2, 3.6], [1, 2, 3.5]])
    assert points_in_boxes(points, box).tolist() == [[True, False, True, False, False, True]]
    angle = torch.tensor([0.0, 3.2, -3.2, 9.0])
    assert ((limit_angle(angle) >= -math.pi) & (limit_angle(angle) < math.pi)).all()
    torch.testing.assert_close(limit_angle(angle).sin(), angle.sin())
    assert (limit_angle(angle, 0.0, math.pi) >= 0).all() and (limit_angle(angle, 0.0, math.pi) < math.pi).all()
    found = Boxes(box.repeat(3, 1), torch.tensor([0.1, 0.5, 0.3]), torch.tensor([0, 1, 2]))
    assert found[found.scores > 0.2].labels.tolist() == [1, 2]
