"""Boxes that stand on the ground: overlaps, suppression, and the points in them. Plain torch, in float64 inside.

A box is (x, y, z, length, width, height, angle): its centre, its sides along x, y and z before it is turned, and
the turn about the z axis from x to y, in radians. More columns (velocities) are passed by.
"""

from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor

__all__ = ["Boxes", "corners", "iou_3d", "iou_bev", "limit_angle", "nms", "overlap_bev", "points_in_boxes"]

_PAIRS = 1 << 18  # pairs of boxes whose overlap is computed at a time


@dataclass(frozen=True)
class Boxes:
    """What was found in a cloud.

    Attributes:
        boxes: (N, 7), or (N, 9) with velocities along x and y.
        scores: (N,) from 0 to 1.
        labels: (N,) int64 classes.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index) -> "Boxes":
        """Some of the boxes, by an index of tensors."""
        return Boxes(self.boxes[index], self.scores[index], self.labels[index])

    @classmethod
    def cat(cls, parts: Sequence["Boxes"]) -> "Boxes":
        """All boxes of several."""
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("boxes", "scores", "labels")))

    def cpu(self) -> "Boxes":
        """The same in main memory."""
        return Boxes(self.boxes.cpu(), self.scores.cpu(), self.labels.cpu())


def limit_angle(angle: Tensor, offset: float = 0.5, period: float = 2 * torch.pi) -> Tensor:
    """Angles moved by whole periods into [-offset, 1 - offset) periods."""
    return angle - torch.floor(angle / period + offset) * period


def corners(boxes: Tensor) -> Tensor:
    """The corners of boxes (..., 7) as seen from above, (..., 4, 2), counter-clockwise."""
    signs = boxes.new_tensor([(1, 1), (-1, 1), (-1, -1), (1, -1)]) / 2
    x, y = (signs * boxes[..., None, 3:5]).unbind(-1)
    cos, sin = boxes[..., 6:7].cos(), boxes[..., 6:7].sin()
    return torch.stack((x * cos - y * sin, x * sin + y * cos), -1) + boxes[..., None, :2]


def _overlap_of_pairs(a: Tensor, b: Tensor) -> Tensor:
    """The area that a and b (P, 7) of each pair share, seen from above: (P,) float64.

    The corners of the common polygon are those of one box in the other, and where edges cross.
    """
    a, b = a[:, :7].double(), b[:, :7].double()
    origin = a[:, :2].clone()
    a, b = (torch.cat([x[:, :2] - origin, x[:, 2:]], 1) for x in (a, b))
    p, q = corners(a), corners(b)
    d, e = p.roll(-1, 1) - p, q.roll(-1, 1) - q  # along the edges

    def cross(u: Tensor, v: Tensor) -> Tensor:
        return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]

    between = q[:, None] - p[:, :, None]  # (P, 4, 4, 2)
    turned = cross(d[:, :, None], e[:, None])
    parallel = turned.abs() < 1e-12
    safe = torch.where(parallel, 1.0, turned)
    s, t = cross(between, e[:, None]) / safe, cross(between, d[:, :, None]) / safe
    crosses = ~parallel & (s >= 0) & (s <= 1) & (t >= 0) & (t <= 1)
    crossings = p[:, :, None] + s[..., None] * d[:, :, None]

    def inside(points: Tensor, boxes: Tensor) -> Tensor:
        away = points - boxes[:, None, :2]
        cos, sin = boxes[:, None, 6].cos(), boxes[:, None, 6].sin()
        x, y = away[..., 0] * cos + away[..., 1] * sin, away[..., 1] * cos - away[..., 0] * sin
        edge = boxes[:, None, 3:5] / 2 * (1 + 1e-9) + 1e-12
        return (x.abs() <= edge[..., 0]) & (y.abs() <= edge[..., 1])

    points = torch.cat([crossings.flatten(1, 2), p, q], 1)
    there = torch.cat([crosses.flatten(1), inside(p, b), inside(q, a)], 1)
    count = there.sum(1, keepdim=True)
    centre = (points * there[..., None]).sum(1, keepdim=True) / count[..., None].clamp_min(1)
    points = points - centre
    angle = torch.atan2(points[..., 1], points[..., 0]).masked_fill(~there, float("inf"))
    order = angle.argsort(1)
    points = points.gather(1, order[..., None].expand_as(points))
    rest = torch.arange(points.shape[1], device=points.device) >= count
    points = torch.where(rest[..., None], points[:, :1], points)  # the first again: adds no area
    area = cross(points, points.roll(-1, 1)).sum(1) / 2
    return area.clamp_min(0).masked_fill(count[:, 0] < 3, 0)


def _near(a: Tensor, b: Tensor) -> Tensor:
    """Pairs of boxes (N, 7) and (M, 7) whose circles touch, (P, 2)."""
    pairs, step = [], max(1, (1 << 22) // max(len(b), 1))
    reach = [torch.linalg.vector_norm(x[:, 3:5].double(), dim=1) / 2 for x in (a, b)]
    for i in range(0, len(a), step):
        part = slice(i, i + step)
        distance = torch.linalg.vector_norm(a[part, None, :2].double() - b[None, :, :2].double(), dim=-1)
        pairs.append((distance <= reach[0][part, None] + reach[1]).nonzero() + torch.tensor([i, 0], device=a.device))
    return torch.cat(pairs) if pairs else torch.zeros(0, 2, dtype=torch.long, device=a.device)


def overlap_bev(a: Tensor, b: Tensor, pairs: Tensor | None = None) -> Tensor:
    """The area that boxes share, seen from above.

    Args:
        a, b: (N, 7) and (M, 7).
        pairs: (P, 2) int64: only these rows of a and b.

    Returns:
        (N, M), or (P,), in float64.
    """
    wanted = _near(a, b) if pairs is None else pairs
    parts = [_overlap_of_pairs(a[part[:, 0]], b[part[:, 1]]) for part in wanted.split(_PAIRS)]
    areas = torch.cat(parts) if parts else a.new_zeros(0, dtype=torch.float64)
    if pairs is not None:
        return areas
    return areas.new_zeros(len(a), len(b)).index_put((wanted[:, 0], wanted[:, 1]), areas)


def _union(shared: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return shared / (a + b - shared).clamp_min(1e-8)


def iou_bev(a: Tensor, b: Tensor, pairs: Tensor | None = None) -> Tensor:
    """Intersection over union of boxes seen from above; arguments and shape as of `overlap_bev`, in a's dtype."""
    areas = [x[:, 3:5].double().prod(1) for x in (a, b)]
    areas = [areas[0][:, None], areas[1]] if pairs is None else [area[i] for area, i in zip(areas, pairs.unbind(1))]
    return _union(overlap_bev(a, b, pairs), *areas).to(a.dtype)


def iou_3d(a: Tensor, b: Tensor, pairs: Tensor | None = None) -> Tensor:
    """Intersection over union of volumes; arguments and shape as of `overlap_bev`, in a's dtype."""
    volumes = [x[:, 3:6].double().prod(1) for x in (a, b)]
    ends = [x[:, 2:3].double() + x[:, 5:6].double() / 2 * x.new_tensor([-1, 1]).double() for x in (a, b)]
    if pairs is None:
        volumes, ends = [volumes[0][:, None], volumes[1]], [ends[0][:, None], ends[1]]
    else:
        volumes, ends = ([x[i] for x, i in zip(y, pairs.unbind(1))] for y in (volumes, ends))
    height = torch.minimum(ends[0][..., 1], ends[1][..., 1]) - torch.maximum(ends[0][..., 0], ends[1][..., 0])
    return _union(overlap_bev(a, b, pairs) * height.clamp_min(0), *volumes).to(a.dtype)


@torch.no_grad()
def nms(boxes: Tensor, scores: Tensor, threshold: float, most_before: int = 4096, most: int = 500) -> Tensor:
    """Which boxes are left when those that share too much, seen from above, with a better one are taken away.

    Args:
        boxes: (N, 7).
        scores: (N,).
        threshold: of the IoU from which on a box is taken away.
        most_before: so many of the best are looked at.
        most: so many are left.

    Returns:
        Their rows, (K,) int64, the best first.
    """
    order = scores.sort(descending=True, stable=True).indices[:most_before]
    best = boxes[order]
    pairs = _near(best, best)
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    pairs = pairs[iou_bev(best, best, pairs) > threshold].cpu()
    worse = pairs[:, 1].split(pairs[:, 0].bincount(minlength=len(best)).tolist())
    gone, kept = torch.zeros(len(best), dtype=torch.bool), []
    for i in range(len(best)):
        if not gone[i]:
            kept.append(i)
            gone[worse[i]] = True
            if len(kept) == most:
                break
    return order[torch.tensor(kept, dtype=torch.long, device=order.device)]


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points (N, 3 or more) are in boxes (M, 7): (M, N) bool."""
    found = []
    for box in boxes:
        away = points[:, :3] - box[:3]
        x = away[:, 0] * box[6].cos() + away[:, 1] * box[6].sin()
        y = away[:, 1] * box[6].cos() - away[:, 0] * box[6].sin()
        found.append((torch.stack((x, y, away[:, 2]), 1).abs() <= box[3:6] / 2).all(1))
    return torch.stack(found) if found else torch.zeros(0, len(points), dtype=torch.bool, device=points.device)
