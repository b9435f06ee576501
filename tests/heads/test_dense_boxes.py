"""Boxes from cells: which cell shows which target, and losses that lead to the targets."""

import pytest
import torch
from torchvision.ops import box_iou, complete_box_iou

from linescan.errors import InputError
from linescan.heads.detection.dense_boxes import assign, decode, flat, losses
from linescan.heads.detection.mamba_yolo_world import Levels

STRIDES = (8, 16, 32)
SIZES = (8, 4, 2)


def levels(prompts=3, batch=1, spread=0.0):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, n, size, size) for n in (prompts, 64) for size in SIZES]
    maps = [(spread * torch.randn(*shape, generator=generator)).requires_grad_() for shape in shapes]
    return Levels(maps[:3], maps[3:])


def test_targets_go_to_the_cells_that_fit_them_best():
    cells = flat(levels(spread=1.0), STRIDES)
    scores, boxes = cells.logits[0].sigmoid(), cells.boxes[0].detach()
    targets, labels = torch.tensor([[4.0, 4, 40, 40], [20, 20, 60, 60], [0, 0, 3, 3]]), torch.tensor([0, 2, 1])
    target, worth = assign(scores, boxes, cells.centres, targets, labels)
    overlaps = complete_box_iou(targets, boxes).clamp(0)
    fit, taken = torch.zeros(3, len(boxes)), torch.zeros(3, len(boxes), dtype=torch.bool)
    for m, (box, label) in enumerate(zip(targets, labels)):
        for p, (x, y) in enumerate(cells.centres.tolist()):
            fit[m, p] = scores[p, label] ** 0.5 * overlaps[m, p] ** 6
            taken[m, p] = bool(box[0] < x < box[2] and box[1] < y < box[3])
        chosen = torch.where(taken[m], fit[m], -1.0).topk(10).indices
        taken[m] &= torch.zeros(len(boxes), dtype=torch.bool).scatter(0, chosen, True)
    for p in range(len(boxes)):
        if taken[:, p].sum() > 1:
            taken[:, p] = torch.arange(3) == overlaps[:, p].argmax()
    for p in range(len(boxes)):
        assert int(target[p]) == (int(taken[:, p].int().argmax()) if taken[:, p].any() else -1)
    for m in range(2):
        mine = target == m
        assert 0 < mine.sum() <= 10
        best = overlaps[m, mine].amax()
        torch.testing.assert_close(worth[mine].amax(), best, rtol=1e-2, atol=0)  # the best cell is worth its overlap
        expected = fit[m, mine] / (fit[m, mine].amax() + 1e-9) * best
        torch.testing.assert_close(worth[mine], expected, rtol=1e-4, atol=1e-6)
    assert not (target == 2).any() and (worth[target < 0] == 0).all()  # no cell has its middle in a box that small
    none = assign(scores, boxes, cells.centres, targets[:0], labels[:0])
    assert (none[0] == -1).all() and (none[1] == 0).all()


def test_losses_lead_to_the_targets():
    found = levels(batch=3)
    boxes = torch.tensor([[4.0, 6, 30, 28], [30.0, 20, 62, 60]])
    targets = [(boxes, torch.tensor([2, 0])), (boxes[:1], torch.tensor([1])), (boxes[:0], torch.tensor([], dtype=int))]
    optimizer, first = torch.optim.Adam([*found.logits, *found.bins], 0.2), None
    for _ in range(150):
        parts = losses(found, STRIDES, targets)
        first = first or {name: loss.item() for name, loss in parts.items()}
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
    assert set(parts) == {"cls", "bbox", "dfl"}
    assert parts["bbox"] < 0.05 * first["bbox"] and parts["cls"] < 0.2 * first["cls"]
    objects = decode(found, STRIDES, score=0.5)
    for (wanted, labels), one in zip(targets, objects):
        assert sorted(one.labels.tolist()) == sorted(labels.tolist())
        for box, label in zip(wanted, labels):
            assert box_iou(one.boxes[one.labels == label], box[None]) > 0.9


def test_an_image_without_objects_trains_the_scores_alone():
    found = levels()
    parts = losses(found, STRIDES, [(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))])
    assert parts["bbox"] == 0 and parts["dfl"] == 0 and parts["cls"] > 0
    sum(parts.values()).backward()
    assert all(x.grad is not None for x in (*found.logits, *found.bins))
    for wrong in (3, -1):
        with pytest.raises(InputError, match="one of 3 prompts"):
            losses(found, STRIDES, [(torch.tensor([[4.0, 4, 20, 20]]), torch.tensor([wrong]))])


def test_sums_over_the_batch_are_divided_by_what_is_shown():
    """Two times the same image: every loss twice, for the sum of scores doubles, and so does the number of images."""
    once = levels(spread=1.0)
    box = flat(once, STRIDES).boxes[0, [9, 60, 70]].detach(), torch.tensor([1, 0, 2])  # what some cells say
    twice = Levels(*([torch.cat([x, x]) for x in maps] for maps in once))
    for name, loss in losses(once, STRIDES, [box]).items():
        torch.testing.assert_close(losses(twice, STRIDES, [box, box])[name], 2 * loss)
