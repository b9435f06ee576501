"""Boxes from every cell of a few maps, without anchors: decoding, the assignment of targets to cells, the losses.

As YOLOv8 and YOLO-World have them. Assignment: Feng et al., "TOOD: Task-aligned One-stage Object Detection", ICCV 2021,
arXiv 2108.07755. Distances as distributions: Li et al., "Generalized Focal Loss", NeurIPS 2020, arXiv 2006.04388.
Overlap: Zheng et al., "Distance-IoU Loss", AAAI 2020, arXiv 1911.08287 (CIoU).
"""

from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, complete_box_iou, complete_box_iou_loss

from ...errors import InputError
from .mamba_yolo_world import Levels

__all__ = ["Cells", "Objects", "assign", "decode", "flat", "losses"]


class Cells(NamedTuple):
    """What the cells of all levels say, as one list of P cells.

    Attributes:
        logits: (B, P, n), of the n prompts.
        bins: (B, P, 4, bins), logits of the distances.
        boxes: (B, P, 4) left, top, right, bottom in pixels.
        centres: (P, 2) x, y of the cells' middles in pixels.
        strides: (P,) pixels from cell to cell.
    """

    logits: Tensor
    bins: Tensor
    boxes: Tensor
    centres: Tensor
    strides: Tensor


class Objects(NamedTuple):
    """What was found in an image, best first: (N, 4) left, top, right, bottom in pixels; (N,) scores; (N,) prompts."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def flat(levels: Levels, strides: Sequence[int]) -> Cells:
    """All cells of the levels, whose maps have these strides; in float32 at least."""
    centres, steps = [], []
    dtype = torch.promote_types(levels.logits[0].dtype, torch.float32)
    for stride, x in zip(strides, levels.logits):
        y, x = (torch.arange(side, device=x.device, dtype=dtype) for side in x.shape[-2:])
        y, x = torch.meshgrid((y + 0.5) * stride, (x + 0.5) * stride, indexing="ij")
        centres.append(torch.stack([x, y], -1).flatten(0, 1))
        steps.append(torch.full_like(centres[-1][:, 0], stride))
    place, step = torch.cat(centres), torch.cat(steps)

    def together(maps: Sequence[Tensor]) -> Tensor:
        return torch.cat([x.flatten(2) for x in maps], 2).mT.to(dtype)

    before, behind = (together(levels.distances) * step[:, None]).chunk(2, -1)
    boxes = torch.cat([place - before, place + behind], -1)
    return Cells(together(levels.logits), together(levels.bins).unflatten(-1, (4, -1)), boxes, place, step)


# -- decoding ---------------------------------------------------------------------------------------------------------


def decode(
    levels: Levels,
    strides: Sequence[int],
    score: float = 0.001,
    candidates: int = 30000,
    overlap: float = 0.7,
    most: int = 300,
) -> list[Objects]:
    """The objects in each image. A cell can show several prompts at once.

    Args:
        levels: of a detector.
        strides: of its maps.
        score: of an object, more than this.
        candidates: pairs of a cell and a prompt that are looked at, the best.
        overlap: boxes of one prompt that share more than this of their joint area are one object.
        most: objects of an image.
    """
    cells = flat(levels, strides)
    found = []
    for logits, boxes in zip(cells.logits, cells.boxes):
        scores = logits.sigmoid().flatten()
        pairs = (scores > score).nonzero().squeeze(1)
        pairs = pairs[scores[pairs].argsort(descending=True, stable=True)[:candidates]]
        boxes, labels, scores = boxes[pairs // logits.shape[1]], pairs % logits.shape[1], scores[pairs]
        kept = batched_nms(boxes, scores, labels, overlap)[:most]
        found.append(Objects(boxes[kept], scores[kept], labels[kept]))
    return found


# -- training ---------------------------------------------------------------------------------------------------------

SHARES = {"cls": 0.5, "bbox": 7.5, "dfl": 1.5 / 4}
"""Factors of the losses; that of distances is for the sum over four sides."""


@torch.no_grad()
def assign(
    scores: Tensor,
    boxes: Tensor,
    centres: Tensor,
    targets: Tensor,
    labels: Tensor,
    most: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> tuple[Tensor, Tensor]:
    """Which target each cell of an image is to show, and how well: the task-aligned assignment.

    A target goes to the `most` cells whose middle lies in it with the highest score^alpha overlap^beta; a cell that
    several would go to shows the target that its box overlaps most. The overlap is CIoU.

    Args:
        scores: (P, n) of the prompts.
        boxes: (P, 4) of the cells.
        centres: (P, 2), in the same unit.
        targets: (M, 4).
        labels: (M,) the prompts of the targets.

    Returns:
        (P,) the target of each cell or -1; (P,) the score that it should have, 0 without a target.
    """
    target = torch.full((len(centres),), -1, device=boxes.device)
    worth = boxes.new_zeros(len(centres))
    if not len(targets):
        return target, worth
    inside = torch.cat([centres - targets[:, None, :2], targets[:, None, 2:] - centres], -1).amin(-1) > 1e-9  # (M, P)
    overlaps = complete_box_iou(targets, boxes).clamp(0)
    alignment = scores[:, labels].mT ** alpha * overlaps**beta
    best = (alignment * inside).topk(min(most, len(centres)), 1).indices
    taken = torch.zeros_like(inside).scatter_(1, best, True) & inside
    owner = torch.where(taken.sum(0) > 1, overlaps.argmax(0), taken.int().argmax(0))
    shown = taken.any(0)
    taken = shown & (owner == torch.arange(len(targets), device=boxes.device)[:, None])
    alignment, overlaps = alignment * taken, overlaps * taken
    fair = alignment * overlaps.amax(1, keepdim=True) / (alignment.amax(1, keepdim=True) + 1e-9)
    return torch.where(shown, owner, target), fair.amax(0)


def losses(
    levels: Levels, strides: Sequence[int], targets: Sequence[tuple[Tensor, Tensor]], shares: dict[str, float] = SHARES
) -> dict[str, Tensor]:
    """`cls` (binary cross-entropy of every cell and prompt), `bbox` (CIoU) and `dfl` (distances), each with its factor.

    They are sums over the batch, divided by the sum of the scores that cells should have, and, as published, times the
    images of the batch.

    Args:
        levels: of a detector.
        strides: of its maps.
        targets: of each image the boxes (M, 4) that are there, in pixels, and their prompts (M,).

    Raises:
        InputError: a target's prompt is none of those that there are.
    """
    prompts = levels.logits[0].shape[1]
    for _, labels in targets:
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < prompts:
            raise InputError(f"a target is of one of {prompts} prompts, 0 to {prompts - 1}, not {int(labels.max())}")
    cells, bins = flat(levels, strides), levels.bins[0].shape[1] // 4
    scores = cells.logits.detach().sigmoid()
    wanted = torch.zeros_like(cells.logits)
    of_cell, to_cell, weights = [], [], []
    for i, (boxes, labels) in enumerate(targets):
        boxes = boxes.to(cells.boxes)
        target, worth = assign(scores[i], cells.boxes[i].detach(), cells.centres, boxes, labels)
        shown = (target >= 0).nonzero().squeeze(1)
        wanted[i, shown, labels[target[shown]]] = worth[shown]
        of_cell.append((torch.full_like(shown, i), shown))
        to_cell.append(boxes[target[shown]])
        weights.append(worth[shown])
    image, cell = (torch.cat(index) for index in zip(*of_cell))
    box, weight = torch.cat(to_cell), torch.cat(weights)
    total = wanted.sum().clamp_min(1)

    found = {"cls": F.binary_cross_entropy_with_logits(cells.logits, wanted, reduction="sum")}
    step = cells.strides[cell, None]
    overlap = complete_box_iou_loss(cells.boxes[image, cell] / step, box / step)
    found["bbox"] = (overlap * weight).sum()
    middle = cells.centres[cell]
    distances = (torch.cat([middle - box[:, :2], box[:, 2:] - middle], -1) / step).clamp(0, bins - 1 - 0.01)
    low = distances.long()
    above = distances - low
    shares_of_bins = cells.bins[image, cell].log_softmax(-1)
    near = [shares_of_bins.gather(-1, at.unsqueeze(-1)).squeeze(-1) for at in (low, low + 1)]
    found["dfl"] = -((near[0] * (1 - above) + near[1] * above).sum(-1) * weight).sum()
    return {name: shares[name] * loss * len(targets) / total for name, loss in found.items()}
