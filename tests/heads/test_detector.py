"""Detectors of boxes in scans: each head finds what it was trained on; coding, targets, batches, wrong arguments."""

import math

import pytest
import torch

import linescan
from linescan.errors import InputError
from linescan.heads.points.box_heads import AnchorHead, CenterHead, Grid, TransFusionHead, draw_heat, heat_radius
from linescan.heads.points.detector import VoxelDetector, VoxelEncoder
from linescan.layers.boxes import Boxes, iou_3d

ANCHORS = [
    {"size": (3.0, 1.5, 1.5), "bottom": 0.0, "matched": 0.5, "unmatched": 0.35},
    {"size": (0.8, 0.8, 1.8), "bottom": 0.0, "matched": 0.4, "unmatched": 0.3},
]
NECK = {"depths": (1,), "strides": (1,), "widths": (32,), "scales": (1,), "out_widths": (32,)}
HEADS = {
    "anchor": {"head": "anchor", "head_args": {"anchors": ANCHORS}},
    "center": {"head": "center", "head_args": {"shared": 16, "with_iou": True, "rectify": (0.5, 0.5)}},
    "two": {"head": "center", "head_args": {"shared": 16, "groups": ((1,), (0,))}},
    "sparse": {"head": "center", "head_args": {"shared": 0, "sparse": True}},
    "transfusion": {
        "head": "transfusion",
        "head_args": {"proposals": 12, "dim": 32, "num_heads": 4, "hidden": 32, "small": (1,), "velocity": False,
                      "reach": 3},
    },
}  # fmt: skip


def tiny(name, **args):
    torch.manual_seed(0)
    backbone = {"dim": 16, "groups": (128,), "windows": ((4, 5, 5),), "scales": ((2, 2, 2),), "drop_path_rate": 0.0}
    if name == "sparse":
        backbone["flat_windows"] = (5,)
    args = {"num_classes": 2, "low": (0, -8, -0.5), "high": (16, 8, 3.5), "cells": (32, 32, 4), "backbone": backbone,
            "neck": NECK, **HEADS[name], **args}  # fmt: skip
    return VoxelDetector(**args)


def street(seed=0):
    """A ground with a long box and an upright one on it: points (N, 4), boxes (2, 7), classes."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    boxes = torch.tensor([[5.0, -3, 0.75, 3, 1.5, 1.5, 0.6], [11, 4, 0.9, 0.8, 0.8, 1.8, -0.4]])
    boxes[:, :2] += 2 * rand(2, 2) - 1
    parts = [torch.cat([16 * rand(300, 1), 16 * rand(300, 1) - 8, 0.05 * rand(300, 1)], 1)]
    for box in boxes:
        local = (rand(120, 3) - 0.5) * box[3:6]
        cos, sin = box[6].cos(), box[6].sin()
        turned = torch.stack([local[:, 0] * cos - local[:, 1] * sin, local[:, 0] * sin + local[:, 1] * cos], 1)
        parts.append(torch.cat([turned, local[:, 2:]], 1) + box[:3])
    points = torch.cat(parts)
    return torch.cat([points, rand(len(points), 1)], 1), boxes, torch.tensor([0, 1])


@pytest.mark.parametrize("name", ["anchor", "sparse", "transfusion"])
def test_finds_what_it_was_trained_on(name):
    model = tiny(name)
    scans = [street(0), street(1)]
    points = torch.cat([s[0] for s in scans])
    lengths = [len(s[0]) for s in scans]
    targets = [s[1:] for s in scans]
    optimiser = torch.optim.AdamW(model.parameters(), 8e-3)
    first = None
    for step in range(30):
        parts = model.losses(model(points, lengths), targets)
        optimiser.zero_grad()
        parts["loss"].backward()
        if step == 0:
            first = parts["loss"].item()
            assert not [n for n, p in model.named_parameters() if p.grad is None]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimiser.step()
    assert parts["loss"].item() < 0.4 * first
    for found, (boxes, labels) in zip(model.detect(points, lengths), targets):  # batch norms as in training
        for box, label in zip(boxes, labels):
            own = found[found.labels == label]
            assert iou_3d(own.boxes[:1], box[None]).item() > 0.3, (name, found.boxes, found.scores)
        assert (found.scores.diff() <= 0).all() or name in ("two", "sparse")


@pytest.mark.parametrize("name", ["anchor", "sparse", "transfusion"])
def test_a_scan_is_answered_as_if_it_were_alone(name):
    model = tiny(name).eval().double()
    scans = [street(2)[0].double(), street(3)[0][:500].double()]
    together = model.detect(torch.cat(scans), [len(s) for s in scans])
    padded = torch.nn.utils.rnn.pad_sequence(scans, batch_first=True, padding_value=3.0)
    for i, found in enumerate(together):
        for other in (model.detect(scans[i][None])[0], model.detect(padded, [len(s) for s in scans])[i]):
            torch.testing.assert_close(other.boxes, found.boxes)
            torch.testing.assert_close(other.scores, found.scores)


def test_half_precision_keeps_boxes_precise():
    model, (points, boxes, labels) = tiny("center"), street(4)
    with torch.autocast("cpu", torch.bfloat16):
        model.losses(model(points[None]), [(boxes, labels)])["loss"].backward()
        found = model.eval().detect(points[None])[0]
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert found.boxes.dtype == torch.float32 and len(found)
    assert not torch.equal(found.boxes[:, :2], found.boxes[:, :2].bfloat16().float())
    with torch.no_grad():
        assert len(model.bfloat16().detect(points[None])[0])  # points keep their precision: they say which voxel


def test_voxels_are_their_points_seen_from_their_mean_and_their_centre():
    torch.manual_seed(0)
    encoder = VoxelEncoder(4, 8, (0, -4, 1), (8, 4, 3), (4, 8, 2)).double().eval()
    points = torch.rand(40, 4).double() * torch.tensor([9, 9, 2.2, 1]) + torch.tensor([-0.5, -4.5, 0.9, 0])
    voxels = encoder(points[None])
    size, low = torch.tensor([2.0, 1, 1]), torch.tensor([0.0, -4, 1])
    cells: dict = {}
    for point in points:
        cells.setdefault(tuple(((point[:3] - low) / size).floor().int().tolist()), []).append(point)
    inside = {cell: rows for cell, rows in cells.items() if all(0 <= c < n for c, n in zip(cell, (4, 8, 2)))}
    found = {tuple(row[1:].flip(0).tolist()): x for row, x in zip(voxels.sites.coords, voxels.features)}
    assert found.keys() == inside.keys() and len(inside) < len(cells) and max(map(len, inside.values())) > 1
    for cell, rows in inside.items():
        rows = torch.stack(rows)
        centre = low + size * (torch.tensor(cell) + 0.5)
        x = torch.cat([rows, rows[:, :3] - rows[:, :3].mean(0), rows[:, :3] - centre], 1)
        x = encoder.norm1(encoder.linear1(x)).relu()
        x = torch.cat([x, x.amax(0).expand_as(x)], 1)
        torch.testing.assert_close(found[cell], encoder.norm2(encoder.linear2(x)).relu().amax(0))


@pytest.mark.parametrize("name", HEADS)
def test_scans_without_boxes_or_points_in_the_space(name):
    """Every parameter has its gradient, or the other processes of a training would wait for it."""
    model, here, away = tiny(name), street(0)[0], street(1)[0] + torch.tensor([100.0, 0, 0, 0])
    nothing = torch.zeros(0, 7), torch.zeros(0, dtype=torch.long)
    for scans in ([here, away], [away, away], [away[:0]], [here[:1]]):
        model.train().zero_grad()
        points, lengths = torch.cat(scans), [len(scan) for scan in scans]
        loss = model.losses(model(points, lengths), [nothing] * len(scans))["loss"]
        loss.backward()
        assert loss.isfinite() and not [n for n, p in model.named_parameters() if p.grad is None], name
        assert all(x.isfinite().all() for x in model.buffers() if x.is_floating_point())
        model.eval()
        assert len(model.detect(points, lengths)) == len(scans)


def test_anchors_code_and_target():
    grid = Grid((0.0, -8.0), (0.5, 0.5), (32, 32))
    head = AnchorHead(4, 2, grid, anchors=ANCHORS)
    like = torch.zeros(1, 4, 32, 32)
    anchors = head.make_anchors(like)
    assert anchors.shape == (32 * 32 * 4, 7)
    assert anchors[0].tolist() == pytest.approx([0, -8, 0.75, 3, 1.5, 1.5, 0])
    assert anchors[3].tolist() == pytest.approx([0, -8, 0.9, 0.8, 0.8, 1.8, 1.57])
    assert anchors[-1, :2].tolist() == [16, 8]
    boxes = torch.tensor([[5.1, -3.2, 0.7, 2.8, 1.6, 1.4, 0.2]]).repeat(len(anchors), 1)
    torch.testing.assert_close(
        head.decode_boxes(anchors, head.encode_boxes(anchors, boxes)), boxes, rtol=1e-4, atol=1e-4
    )
    label, row = head.assign(anchors, boxes[:1], torch.tensor([0]))
    hit = label == 0
    assert hit.any() and (row[hit] == 0).all()
    assert (torch.linalg.vector_norm(anchors[hit, :2] - boxes[0, :2], dim=1) < 1.5).all()
    assert (label.view(-1, 2, 2)[:, 1] == 2).all()  # the other class has no box
    far = torch.tensor([[5.1, -3.2, 0.7, 9.0, 0.2, 1.4, 0.2]])  # like no anchor: its best one is taken
    assert (head.assign(anchors, far, torch.tensor([0]))[0] == 0).sum() >= 1


def test_anchors_that_overlap_exactly_as_much_as_they_must_are_matched():
    rule = {"size": (4, 4, 1), "bottom": 0, "matched": 0.5, "unmatched": 0.25}
    head = AnchorHead(4, 1, Grid((0.0, 0.0), (1.0, 1.0), (1, 2)), anchors=[rule])
    anchors = torch.tensor([[0, 0, 0, 4, width, 1, 0] for width in (4, 2, 1, 0.5)])  # an IoU of 1, 1/2, 1/4 and 1/8
    assert head.assign(anchors, anchors[:1], torch.tensor([0]))[0].tolist() == [0, 0, -1, 1]
    beyond = anchors[:1] + torch.eye(7)[:1] * 99  # a box that no anchor meets is no anchor's
    assert head.assign(anchors, beyond, torch.tensor([0]))[0].tolist() == [1, 1, 1, 1]


def test_directions_tell_front_from_rear():
    grid = Grid((0.0, -8.0), (0.5, 0.5), (32, 32))
    head = AnchorHead(4, 2, grid, anchors=ANCHORS, score=0.5)
    anchors = head.make_anchors(torch.zeros(1, 4, 32, 32))
    for angle in (-3.0, -1.2, 0.1, 0.9, 2.4):
        box = torch.tensor([[5.0, -3, 0.75, 3, 1.5, 1.5, angle]])
        label, _ = head.assign(anchors, box, torch.tensor([0]))
        hit = (label == 0).nonzero()[0, 0]
        cls, ways = torch.full((1, len(anchors), 2), -9.0), torch.zeros(1, len(anchors), 2)
        cls[0, hit, 0] = 9
        codes = torch.zeros(1, len(anchors), 7)
        codes[0, hit] = head.encode_boxes(anchors[hit][None], box)[0]
        maps = {"cls": cls, "box": codes, "dir": ways}

        def raw():
            return {k: v.reshape(1, 32, 32, -1).movedim(-1, 1) for k, v in maps.items()}

        losses = []
        for way in (0, 1):
            ways.zero_()
            ways[..., way] = 5
            losses.append((head.losses(raw(), [(box, torch.tensor([0]))])["direction"].item(), way))
        ways.zero_()
        ways[..., min(losses)[1]] = 5
        (found,) = head.decode(raw())
        assert found.boxes[0, 6].item() == pytest.approx(angle, abs=1e-4)  # from -pi to pi


@pytest.mark.parametrize("angle", [-2.5, 0.3, 1.2, 3.0])
def test_what_has_no_loss_is_decoded_as_the_truth(angle):
    grid = Grid((0.0, -8.0), (0.5, 0.25), (8, 16))
    box = torch.tensor([[1.3, -6.1, 0.7, 3.9, 1.6, 1.4, angle, 2.0, -1.0]])
    head = CenterHead(4, 2, grid, shared=4, velocity=True, score=0.5, with_iou=True, rectify=(0.5, 0.25))
    maps = {"center": (0.6, 0.6), "center_z": (0.7,), "dim": [math.log(v) for v in (3.9, 1.6, 1.4)],
            "rot": (math.cos(angle), math.sin(angle)), "vel": (2.0, -1.0), "iou": (0.0,)}  # fmt: skip
    raw = {name: torch.tensor(values).view(1, -1, 1, 1).expand(1, -1, 16, 8) for name, values in maps.items()}
    raw["hm"] = torch.full((1, 2, 16, 8), -9.0)
    raw["hm"][0, 1, 7, 2] = 9.0  # row and column of the cell that holds the centre
    losses = head.losses([raw], [(box, torch.tensor([1]))])
    assert losses["box"] < 1e-4 and losses["heat"] < 0.05
    (found,) = head.decode([raw])
    torch.testing.assert_close(found.boxes, box, atol=1e-5, rtol=1e-5)
    assert found.labels.tolist() == [1]
    assert found.scores.item() == pytest.approx(0.5**0.25, abs=1e-3)  # likely to be there, with an IoU of one half

    other = TransFusionHead(4, 2, grid, proposals=3, dim=8, num_heads=2, hidden=8, small=(), reach=1)
    code = other.encode(box)
    said = dict(zip(other.parts, code.split(list(other.parts.values()), 1)))
    torch.testing.assert_close(other.boxes_of(said), box, atol=1e-5, rtol=1e-5)
    assert said["height"].item() == pytest.approx(1.4)  # the top: 0.7 + 1.4 / 2


def test_each_class_is_suppressed_by_itself_and_the_best_come_first():
    head = CenterHead(4, 2, Grid((0.0, 0.0), (1.0, 1.0), (8, 8)), iou=(0.2, 0.9))
    box = torch.tensor([0.0, 0, 0, 4, 4, 1, 0])
    boxes = torch.stack([box, box, box + torch.eye(7)[0], box, box + torch.eye(7)[0]])
    found = Boxes(boxes, torch.tensor([0.3, 0.5, 0.4, 0.6, 0.9]), torch.tensor([0, 0, 0, 1, 1]))
    kept = head.suppress(found)  # the first class's best; of the second both, whose IoU is 0.6
    assert kept.labels.tolist() == [1, 1, 0] and kept.scores.tolist() == pytest.approx([0.9, 0.6, 0.5])


def test_heat():
    cells = torch.stack(torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij"), -1).flatten(0, 1)
    heat = draw_heat(cells, torch.tensor([[4, 4], [5, 4]]), torch.tensor([2.0, 2.0]), torch.tensor([0, 0]), 2)
    assert (heat == 1).sum() == 2 and heat[:, 1].sum() == 0
    at = {tuple(c): h for c, h in zip(cells.tolist(), heat[:, 0].tolist())}
    assert at[4, 6] == pytest.approx(math.exp(-4 / (2 * (5 / 6) ** 2))) and at[4, 7] == 0
    # For sides of 10 and 6 the three of CornerNet's code are 14.63, 27.66 and 3.14.
    assert heat_radius(torch.tensor([10.0]), torch.tensor([6.0]), 0.5).item() == pytest.approx(3.1355, abs=1e-3)


def test_centres_beside_the_grid_and_names():
    grid = Grid((0.0, 0.0), (1.0, 1.0), (8, 8))
    head = CenterHead(4, 1, grid, shared=4, limits=(0, 0, -1, 4, 8, 1), score=0.0)
    raw = head(torch.randn(1, 4, 8, 8))
    assert set(raw[0]) == {"center", "center_z", "dim", "rot", "hm"}
    outside = torch.tensor([[20.0, 1, 0, 1, 1, 1, 0]]), torch.tensor([0])
    assert head.losses(raw, [outside])["box"] == 0
    assert (head.decode(raw)[0].boxes[:, 0] <= 4).all()


def test_wrong_arguments():
    with pytest.raises(InputError, match="4 voxels high"):
        tiny("anchor", cells=(32, 32, 8))
    with pytest.raises(InputError, match="4 divides"):
        tiny("anchor", cells=(30, 32, 4))
    with pytest.raises(InputError, match="head"):
        tiny("anchor", head="rpn")
    with pytest.raises(InputError, match=r"expects clouds \(B, N, 4\)"):
        tiny("anchor")(torch.zeros(2, 10, 3))
    with pytest.raises(InputError, match="no published|get the file"):
        linescan.create_model("lion_mamba_nuscenes", pretrained=True)
