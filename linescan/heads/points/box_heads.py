"""Heads that find boxes on a map of the ground: by anchors, centres or proposals. Their losses, and how they decode.

- `AnchorHead`: SECOND's (Yan et al., Sensors 2018), with a class of directions.
- `CenterHead`: CenterPoint's (Yin et al., arXiv 2006.11275), on maps, or on sparse voxels as in VoxelNeXt (Chen et al.,
  arXiv 2303.11301).
- `TransFusionHead`: TransFusion's (Bai et al., arXiv 2203.11496), whose proposals read the map around them.

Written after the papers and what LION's configurations (github.com/happinesslz/LION, Apache-2.0) say of OpenPCDet's
heads. All give a raw answer of a batch, from which `decode` makes boxes (`linescan.layers.boxes.Boxes`) and `losses` a
table with "loss".
"""

import math
from typing import Mapping, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...extras import require
from ...layers.boxes import Boxes, iou_3d, limit_angle, nms
from ...layers.norm import LayerNorm, RowNorm
from ...layers.sparse import SparseTensor, SubmanifoldConv

__all__ = ["HEADS", "AnchorHead", "BoxHead", "CenterHead", "Grid", "TransFusionHead", "in_float32"]

Targets = Sequence[tuple[Tensor, Tensor]]
"""Of each sample the boxes that are there, (M, 7) or (M, 9), and their classes (M,)."""


class Grid(NamedTuple):
    """The cells of a head's map, x first.

    Attributes:
        low: the corner, in the points' unit.
        size: of a cell.
        cells: how many there are.
    """

    low: tuple[float, float]
    size: tuple[float, float]
    cells: tuple[int, int]

    def place(self, xy: Tensor) -> Tensor:
        """Coordinates (..., 2) in cells."""
        return (xy - xy.new_tensor(self.low)) / xy.new_tensor(self.size)

    def point(self, place: Tensor) -> Tensor:
        """The inverse of `place`."""
        return place * place.new_tensor(self.size) + place.new_tensor(self.low)


class BoxHead(nn.Module):
    """Base of all heads.

    Args:
        in_chans: channels of the map.
        num_classes: how many.
        grid: the map's cells.
        score: boxes below it are left out.
        iou: of the suppression, for all classes together, or one for each.
        most_before, most: of `nms`.
    """

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        grid: Grid,
        score: float = 0.1,
        iou: float | Sequence[float] = 0.01,
        most_before: int = 4096,
        most: int = 500,
    ):
        super().__init__()
        self.num_classes, self.grid = num_classes, grid
        self.score, self.iou, self.most_before, self.most = score, iou, most_before, most

    def decode(self, raw) -> list[Boxes]:
        """The boxes of each sample, best first, with classes as the targets have them."""
        raise NotImplementedError

    def losses(self, raw, targets: Targets) -> dict[str, Tensor]:
        """What is to be minimised as "loss", and its parts."""
        raise NotImplementedError

    def suppress(self, found: Boxes) -> Boxes:
        """Without the boxes that share too much with better ones."""
        if isinstance(self.iou, (int, float)):
            return found[nms(found.boxes, found.scores, self.iou, self.most_before, self.most)]
        kept = []
        for label, iou in enumerate(self.iou):
            rows = (found.labels == label).nonzero()[:, 0]
            own = found[rows]
            kept.append(rows[nms(own.boxes, own.scores, iou, self.most_before, self.most)])
        best = torch.cat(kept)
        return found[best[found.scores[best].argsort(descending=True, stable=True)]]


def in_float32(raw):
    """Raw answers of a head in float32 at least: half precision would place boxes a quarter of a metre off."""
    if isinstance(raw, Tensor):
        return raw.float() if raw.dtype in (torch.float16, torch.bfloat16) else raw
    if isinstance(raw, dict):
        return {name: in_float32(x) for name, x in raw.items()}
    return [in_float32(x) for x in raw] if isinstance(raw, (list, tuple)) else raw


def focal_loss(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of each logit against 0 or 1 (Lin et al., arXiv 1708.02002)."""
    p = logits.sigmoid()
    wrong = torch.where(target > 0, 1 - p, p)
    weight = torch.where(target > 0, alpha, 1 - alpha)
    return weight * wrong**gamma * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def heat_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss against a heat map with peaks of 1, a mean over the peaks (Law and Deng, arXiv 1808.01244)."""
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    peak = target == 1
    each = torch.where(peak, p.log() * (1 - p) ** 2, (1 - p).log() * p**2 * (1 - target) ** 4)
    return -each.sum() / peak.sum().clamp_min(1)


def heat_radius(length: Tensor, width: Tensor, overlap: float = 0.1) -> Tensor:
    """How far, in cells, heat reaches around a box (arXiv 1808.01244).

    That is meant to be how far its corners can move so that this IoU is left. The authors' code, which all detectors
    took over, does not divide the roots by the first coefficient.
    """
    total, area = length + width, length * width

    def root(a: float, b: Tensor, c: Tensor) -> Tensor:
        return (b + (b * b - 4 * a * c).clamp_min(0).sqrt()) / 2

    return torch.stack(
        [
            root(1, total, area * (1 - overlap) / (1 + overlap)),
            root(4, 2 * total, (1 - overlap) * area),
            root(4 * overlap, -2 * overlap * total, (overlap - 1) * area),
        ]
    ).amin(0)


def map_cells(rows: int, columns: int, device: torch.device) -> Tensor:
    """The cells (row, column) of a map in stored order, (rows columns, 2)."""
    numbers = (torch.arange(n, device=device) for n in (rows, columns))
    return torch.stack(torch.meshgrid(*numbers, indexing="ij"), -1).flatten(0, 1)


def draw_heat(cells: Tensor, peaks: Tensor, radius: Tensor, labels: Tensor, classes: int) -> Tensor:
    """A heat map over cells (P, 2), a channel a class: a Gaussian around each peak (M, 2), cut off at its radius."""
    heat = cells.new_zeros(len(cells), classes, dtype=radius.dtype)
    for peak, reach, label in zip(peaks, radius, labels):
        away = (cells - peak).to(radius.dtype)
        value = torch.exp(-away.square().sum(1) / (2 * ((2 * reach + 1) / 6) ** 2))
        value = value.masked_fill((away.abs() > reach).any(1), 0)
        heat[:, label] = torch.maximum(heat[:, label], value)
    return heat


def radii(boxes: Tensor, grid: Grid) -> Tensor:
    """Radii of the heat of boxes (M, 7), whole cells, at least 2."""
    length, width = (boxes[:, 3:5] / boxes.new_tensor(grid.size)).unbind(1)
    return heat_radius(length, width).floor().clamp_min(2)


def in_grid(boxes: Tensor, labels: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The boxes that have a size and whose centre lies in the grid."""
    place = grid.place(boxes[:, :2])
    there = ((place >= 0) & (place < place.new_tensor(grid.cells))).all(1) & (boxes[:, 3:6] > 0).all(1)
    return boxes[there], labels[there]


# -- anchors -----------------------------------------------------------------------------------------------------------


class AnchorHead(BoxHead):
    """Boxes as what they are more than anchors of each class, which stand at every cell in two directions.

    Args:
        anchors: for each class its "size" (length, width, height), the z of its "bottom", and the IoUs from which on an
            anchor is "matched", and below which it is "unmatched".
        args, kwargs: of `BoxHead`.
    """

    def __init__(self, *args, anchors: Sequence[Mapping], **kwargs):
        super().__init__(*args, **kwargs)
        in_chans = args[0]
        self.anchors = list(anchors)
        each = 2 * len(self.anchors)
        self.conv_cls = nn.Conv2d(in_chans, each * self.num_classes, 1)
        self.conv_box = nn.Conv2d(in_chans, each * 7, 1)
        self.conv_dir_cls = nn.Conv2d(in_chans, each * 2, 1)
        nn.init.constant_(self.conv_cls.bias, -math.log(99))  # all classes are rare
        nn.init.normal_(self.conv_box.weight, std=0.001)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """A map (B, C, Y, X) -> maps of classes, boxes and directions, the anchors of a cell along the channels."""
        return {"cls": self.conv_cls(x), "box": self.conv_box(x), "dir": self.conv_dir_cls(x)}

    def make_anchors(self, like: Tensor) -> Tensor:
        """Anchors of a map (B, C, Y, X): (Y X 2 classes, 7), from one border of the grid to the other."""
        rows, columns = like.shape[-2:]
        ends = [(low, low + size * n) for low, size, n in zip(self.grid.low, self.grid.size, self.grid.cells)]
        x, y = (torch.linspace(*end, n, dtype=torch.float64) for end, n in zip(ends, (columns, rows)))
        y, x = torch.meshgrid(y, x, indexing="ij")
        kinds = []
        for anchor in self.anchors:
            length, width, height = anchor["size"]
            kinds += [(anchor["bottom"] + height / 2, length, width, height, angle) for angle in (0, 1.57)]
        kinds = torch.tensor(kinds, dtype=torch.float64).expand(rows, columns, -1, -1)
        place = torch.stack((x, y), -1)[:, :, None].expand(-1, -1, kinds.shape[2], -1)
        return torch.cat((place, kinds), -1).reshape(-1, 7).to(like)

    @staticmethod
    def flat(x: Tensor, each: int) -> Tensor:
        """Maps (B, anchors of a cell * each, Y, X) -> (B, all anchors, each)."""
        return x.movedim(1, -1).reshape(len(x), -1, each)

    def decode(self, raw: dict[str, Tensor]) -> list[Boxes]:
        anchors = self.make_anchors(raw["box"])
        results = []
        for scores, codes, ways in zip(
            self.flat(raw["cls"], self.num_classes).sigmoid(), self.flat(raw["box"], 7), self.flat(raw["dir"], 2)
        ):
            best, labels = scores.max(-1)
            keep = (best > self.score).nonzero()[:, 0]
            best, labels = best[keep], labels[keep]
            boxes = self.decode_boxes(anchors[keep], codes[keep])
            # The regression does not tell front from rear: the class of the direction does.
            half = limit_angle(boxes[:, 6:] - DIRECTION, 0, math.pi) + DIRECTION
            turned = half + math.pi * ways[keep].argmax(-1, keepdim=True)
            found = Boxes(torch.cat([boxes[:, :6], limit_angle(turned)], 1), best, labels)
            results.append(self.suppress(found))
        return results

    @staticmethod
    def decode_boxes(anchors: Tensor, codes: Tensor) -> Tensor:
        """Boxes of what they are more than anchors; (N, 7) each."""
        diagonal = torch.linalg.vector_norm(anchors[:, 3:5], dim=1, keepdim=True)
        reach = torch.cat([diagonal, diagonal, anchors[:, 5:6]], 1)
        centre = codes[:, :3] * reach + anchors[:, :3]
        return torch.cat([centre, codes[:, 3:6].exp() * anchors[:, 3:6], codes[:, 6:] + anchors[:, 6:]], 1)

    @staticmethod
    def encode_boxes(anchors: Tensor, boxes: Tensor) -> Tensor:
        """The inverse of `decode_boxes`."""
        diagonal = torch.linalg.vector_norm(anchors[:, 3:5], dim=1, keepdim=True)
        reach = torch.cat([diagonal, diagonal, anchors[:, 5:6]], 1)
        more = (boxes[:, :3] - anchors[:, :3]) / reach
        return torch.cat([more, (boxes[:, 3:6] / anchors[:, 3:6]).log(), boxes[:, 6:7] - anchors[:, 6:]], 1)

    def assign(self, anchors: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of each anchor the class that it is to find, `num_classes` for none, -1 for any; and the row of its box."""
        kinds = len(self.anchors)
        found = torch.full((len(anchors),), -1, device=anchors.device).view(-1, kinds, 2)
        row = torch.zeros_like(found)
        anchors = anchors.view(-1, kinds, 2, 7)
        for kind, rule in enumerate(self.anchors):
            own = (labels == kind).nonzero()[:, 0]
            if not len(own):
                found[:, kind] = self.num_classes
                continue
            ious = flat_iou(anchors[:, kind].flatten(0, 1), boxes[own])
            most, which = ious.max(1)
            best = ious.amax(0)
            forced = ((ious == best) & (best > 0)).any(1)  # the best anchors of every box
            label = torch.full_like(which, -1)
            label[most < rule["unmatched"]] = self.num_classes
            label[(most >= rule["matched"]) | forced] = kind
            found[:, kind], row[:, kind] = label.view(-1, 2), own[which].view(-1, 2)
        return found.flatten(), row.flatten()

    def losses(self, raw: dict[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        anchors = self.make_anchors(raw["box"])
        total = {"class": [], "box": [], "direction": []}
        for scores, codes, ways, (boxes, labels) in zip(
            self.flat(raw["cls"], self.num_classes), self.flat(raw["box"], 7), self.flat(raw["dir"], 2), targets
        ):
            label, row = self.assign(anchors, boxes, labels)
            counted, hit = label >= 0, (label >= 0) & (label < self.num_classes)
            count = hit.sum().clamp_min(1)
            wanted = F.one_hot(label[counted], self.num_classes + 1)[:, :-1].to(scores)
            total["class"].append(focal_loss(scores[counted], wanted).sum() / count)
            mine, own = anchors[hit], boxes[row[hit]] if len(boxes) else boxes.new_zeros(0, 7)
            code, want = codes[hit], self.encode_boxes(anchors[hit], own)
            # sin(a - b) = sin a cos b - cos a sin b, whose factors each get half of the gradient
            turn, aim = code[:, 6:].sin() * want[:, 6:].cos(), code[:, 6:].cos() * want[:, 6:].sin()
            each = F.smooth_l1_loss(
                torch.cat([code[:, :6], turn], 1), torch.cat([want[:, :6], aim], 1), reduction="sum", beta=1 / 9
            )
            total["box"].append(2 * each / count)
            front = limit_angle(want[:, 6] + mine[:, 6] - DIRECTION, 0) >= math.pi
            total["direction"].append(0.2 * F.cross_entropy(ways[hit], front.long(), reduction="sum") / count)
        parts = {name: torch.stack(values).mean() for name, values in total.items()}
        return {"loss": sum(parts.values()), **parts}


DIRECTION = 0.78539  # where the half turns begin that the classes of directions are


def flat_iou(anchors: Tensor, boxes: Tensor) -> Tensor:
    """IoU (A, M) as seen from above of boxes turned to their nearest axis."""

    def ends(x: Tensor) -> tuple[Tensor, Tensor]:
        along = limit_angle(x[:, 6], 0.5, math.pi).abs() < math.pi / 4
        side = torch.where(along[:, None], x[:, 3:5], x[:, [4, 3]]) / 2
        return x[:, :2] - side, x[:, :2] + side

    (low, high), (own_low, own_high) = ends(anchors), ends(boxes)
    shared = torch.minimum(high[:, None], own_high) - torch.maximum(low[:, None], own_low)
    shared = shared.clamp_min(0).prod(-1)
    areas = (high - low).prod(-1)[:, None] + (own_high - own_low).prod(-1)
    return shared / (areas - shared).clamp_min(1e-6)


# -- centres -----------------------------------------------------------------------------------------------------------


class CenterHead(BoxHead):
    """Boxes by their centres: peaks of a heat map for each class, and what a box is at the cell of its centre.

    Args:
        in_chans, num_classes, grid: of `BoxHead`.
        groups: classes that share a head of their own; by default one for all.
        shared: channels of a convolution before all heads; 0 for none.
        sparse: whether it reads voxels on the ground (`SparseTensor`) and not a map.
        velocity: whether boxes have velocities.
        with_iou: whether the IoU of each box with the truth is estimated; scores become score^(1-a) IoU^a.
        rectify: a for each class.
        bias: of the convolutions before a norm.
        eps: of the norms.
        weight: of the losses of boxes.
        limits: corners of the space in which centres are kept; None for any.
        most_peaks: peaks of each head that become boxes.
        args: of `BoxHead`.
    """

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        grid: Grid,
        groups: Sequence[Sequence[int]] | None = None,
        shared: int = 64,
        sparse: bool = False,
        velocity: bool = False,
        with_iou: bool = False,
        rectify: Sequence[float] = (),
        bias: bool = False,
        eps: float = 1e-3,
        weight: float = 2.0,
        limits: Sequence[float] | None = None,
        most_peaks: int = 500,
        **args,
    ):
        super().__init__(in_chans, num_classes, grid, **args)
        self.groups = [tuple(g) for g in groups or (range(num_classes),)]
        self.sparse, self.rectify, self.weight = sparse, tuple(rectify), weight
        self.limits, self.most_peaks = limits, most_peaks
        self.parts = {"center": 2, "center_z": 1, "dim": 3, "rot": 2} | ({"vel": 2} if velocity else {})
        norm = {"eps": eps, "momentum": 0.01 if eps != 1e-5 else 0.1}

        def block(chans: int) -> list[nn.Module]:
            if sparse:
                return [SubmanifoldConv(chans, chans, axes=2), RowNorm(chans, **norm), nn.ReLU()]
            return [nn.Conv2d(chans, chans, 3, 1, 1, bias=bias), nn.BatchNorm2d(chans, **norm), nn.ReLU()]

        def last(chans: int, out: int) -> nn.Module:
            return SubmanifoldConv(chans, out, 1, bias=True, axes=2) if sparse else nn.Conv2d(chans, out, 3, 1, 1)

        self.shared = None
        if shared:
            conv = nn.Conv2d(in_chans, shared, 3, 1, 1, bias=bias)
            self.shared = nn.Sequential(conv, nn.BatchNorm2d(shared, **norm), nn.ReLU())
        chans = shared or in_chans
        self.heads = nn.ModuleList()
        for group in self.groups:
            outs = self.parts | ({"iou": 1} if with_iou else {}) | {"hm": len(group)}
            self.heads.append(
                nn.ModuleDict({k: nn.Sequential(nn.Sequential(*block(chans)), last(chans, n)) for k, n in outs.items()})
            )
        for name, layer in ((name, part[-1]) for head in self.heads for name, part in head.items()):
            if not sparse and name != "hm":
                nn.init.kaiming_normal_(layer.weight)
            nn.init.constant_(layer.bias, -2.19 if name == "hm" else 0.0)

    def forward(self, x: Tensor | SparseTensor) -> list[dict]:
        """A map (B, C, Y, X), or voxels (b, y, x) -> of each head its maps, or features of voxels, by name.

        Of voxels, "sites" says where they stand.
        """
        if not self.sparse:
            x = x if self.shared is None else self.shared(x)
            return [{name: part(x) for name, part in head.items()} for head in self.heads]
        found = []
        for head in self.heads:
            own = {}
            for name, ((conv, norm, act), last) in head.items():
                y = conv(x)
                own[name] = last(y.replace(act(norm(y.features)))).features
            found.append(own | {"sites": x.sites})
        return found

    def samples(self, raw: dict) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Of each sample its cells (P, 2), x first, and the rows (P, channels) that a head gave for them."""
        if self.sparse:
            sites = raw["sites"]
            rows = [(sites.coords[:, 0] == b).nonzero()[:, 0] for b in range(sites.batch_size)]
            maps = {name: x for name, x in raw.items() if name != "sites"}
            return [(sites.coords[own][:, [2, 1]], {name: x[own] for name, x in maps.items()}) for own in rows]
        height, width = raw["hm"].shape[-2:]
        cells = map_cells(height, width, raw["hm"].device).flip(1)
        flat = {name: maps.flatten(2).mT for name, maps in raw.items()}
        return [(cells, {name: maps[b] for name, maps in flat.items()}) for b in range(len(raw["hm"]))]

    def boxes_of(self, cells: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Boxes (P, 7 or 9) of rows at cells (P, 2)."""
        xy = self.grid.point(cells + rows["center"])
        cos, sin = rows["rot"].split(1, 1)
        parts = [xy, rows["center_z"], rows["dim"].exp(), torch.atan2(sin, cos)]
        return torch.cat(parts + ([rows["vel"]] if "vel" in rows else []), 1)

    def decode(self, raw: list[dict]) -> list[Boxes]:
        found: list[list[Boxes]] = []
        for head, group in zip(raw, self.groups):
            classes = torch.tensor(group, device=head["hm"].device)
            for b, (cells, rows) in enumerate(self.samples(head)):
                heat = rows["hm"].sigmoid().flatten()
                scores, place = heat.topk(min(self.most_peaks, len(heat)))
                keep = scores > self.score
                scores, place = scores[keep], place[keep]
                row, label = place // len(group), classes[place % len(group)]
                own = {name: x[row] for name, x in rows.items()}
                boxes = self.boxes_of(cells[row], own)
                if "iou" in own:
                    power = scores.new_tensor(self.rectify)[label]
                    scores = scores ** (1 - power) * ((own["iou"][:, 0] + 1) / 2).clamp(0, 1) ** power
                boxes_found = Boxes(boxes, scores, label)
                if self.limits is not None:
                    low, high = boxes.new_tensor(self.limits).chunk(2)
                    boxes_found = boxes_found[((boxes[:, :3] >= low) & (boxes[:, :3] <= high)).all(1)]
                found += [[]] if len(found) <= b else []
                found[b].append(self.suppress(boxes_found))
        return [Boxes.cat(own) for own in found]

    def losses(self, raw: list[dict], targets: Targets) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {"heat": [], "box": [], "iou": []}
        for head, group in zip(raw, self.groups):
            classes = torch.full((self.num_classes,), -1, device=head["hm"].device)
            classes[list(group)] = torch.arange(len(group), device=classes.device)
            logits, heats, errors, ious = [], [], [], []
            for (cells, rows), (boxes, labels) in zip(self.samples(head), targets):
                logits.append(rows["hm"])
                own = classes[labels] >= 0
                boxes, labels = in_grid(boxes[own], classes[labels[own]], self.grid)
                if not len(cells) or not len(boxes):
                    heats.append(torch.zeros_like(rows["hm"]))
                    errors.append(self.nothing(rows))
                    continue
                place = self.grid.place(boxes[:, :2])
                at = torch.cdist(place, cells + 0.5).argmin(1)  # the cell that holds it, or the nearest voxel
                heats.append(draw_heat(cells, cells[at], radii(boxes, self.grid), labels, len(group)))
                turn = boxes[:, 6:7]
                want = [place - cells[at], boxes[:, 2:3], boxes[:, 3:6].log(), turn.cos(), turn.sin(), boxes[:, 7:9]]
                found = {name: x[at] for name, x in rows.items()}
                got = torch.cat([found[name] for name in self.parts], 1)
                errors.append((got - torch.cat(want, 1)[:, : got.shape[1]]).abs())
                if "iou" in found:
                    pairs = torch.arange(len(boxes), device=boxes.device)[:, None].expand(-1, 2)
                    true = iou_3d(self.boxes_of(cells[at], found).detach(), boxes, pairs)
                    ious.append((found["iou"][:, 0] - (2 * true - 1)).abs())
            parts["heat"].append(heat_loss(torch.cat(logits), torch.cat(heats)))
            parts["box"].append(self.weight * torch.cat(errors).sum(1).mean() if sum(map(len, errors)) else 0)
            if "iou" in head:
                parts["iou"].append(torch.cat(ious).mean() if ious else 0 * head["iou"].sum())
        parts = {name: sum(values) for name, values in parts.items() if values}
        return {"loss": sum(parts.values()), **parts}

    def nothing(self, rows: Mapping[str, Tensor]) -> Tensor:
        """One row without an error, so that every parameter has a gradient."""
        return sum(0 * rows[name].sum() for name in self.parts).reshape(1, 1).expand(1, sum(self.parts.values()))


# -- proposals ---------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention whose keys and values are projected once and gathered for each query.

    Args:
        dim: channels.
        num_heads: heads.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)

    def forward(self, query: Tensor, tokens: Tensor, index: Tensor, absent: Tensor) -> Tensor:
        """Queries (B, P, C) read tokens (B, L, C): each those of its row in index (B, P, K) that are not absent."""
        dim = query.shape[-1]
        heads = self.num_heads, dim // self.num_heads
        weight, bias = self.in_proj.weight, self.in_proj.bias
        q = F.linear(query, weight[:dim], bias[:dim]).unflatten(-1, heads)
        both = F.linear(tokens, weight[dim:], bias[dim:])
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        outputs = []
        for part in torch.arange(query.shape[1], device=query.device).split(32):  # keys of a query are many
            k, v = both[rows[..., None], index[:, part]].unflatten(-1, (2, *heads)).unbind(3)
            scores = torch.einsum("bphd,bpkhd->bphk", q[:, part], k) * heads[1] ** -0.5
            scores = scores.masked_fill(absent[:, part, None], float("-inf")).softmax(-1)
            outputs.append(torch.einsum("bphk,bpkhd->bphd", scores, v).flatten(2))
        return self.out_proj(torch.cat(outputs, 1))


class PlaceMLP(nn.Sequential):
    """Places (..., 2) in cells -> (..., dim)."""

    def __init__(self, dim: int):
        super().__init__(nn.Linear(2, dim), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, place: Tensor) -> Tensor:
        return super().forward(place.flatten(0, -2)).unflatten(0, place.shape[:-1])


class TransFusionHead(BoxHead):
    """Peaks of a heat map as proposals, which read the map around them and say what box is there.

    A proposal reads the cells of a square of 41 around its own, by their numbers on the map: at a border of y the
    square goes on in the next row, as published. In its batch norms the published model sees the place of a cell as
    often as it is read, this one once.

    Args:
        in_chans, num_classes, grid: of `BoxHead`.
        proposals: how many of a sample.
        dim, num_heads, hidden: of the attention and its MLP.
        small: classes whose every cell may be a peak, not only the largest of its 3 x 3; each is suppressed by itself.
        small_iou: of that suppression; other classes are not suppressed, their proposals being peaks.
        velocity: whether boxes have velocities.
        rectify: a in score^(1-a) IoU^a.
        limits: corners of the space in which centres are kept.
        args: of `BoxHead`.
    """

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        grid: Grid,
        proposals: int = 200,
        dim: int = 128,
        num_heads: int = 8,
        hidden: int = 256,
        small: Sequence[int] = (8, 9),
        small_iou: float = 0.175,
        velocity: bool = True,
        rectify: float = 0.5,
        limits: Sequence[float] | None = None,
        reach: int = 20,
        **args,
    ):
        super().__init__(in_chans, num_classes, grid, **{"score": 0.0, "most_before": 1000, "most": 100, **args})
        self.proposals, self.small, self.small_iou, self.rectify = proposals, tuple(small), small_iou, rectify
        self.limits, self.reach = limits, reach
        self.shared = nn.Conv2d(in_chans, dim, 3, 1, 1)
        self.heat = nn.Sequential(
            nn.Conv2d(dim, dim, 3, 1, 1), nn.BatchNorm2d(dim), nn.ReLU(), nn.Conv2d(dim, num_classes, 3, 1, 1)
        )
        self.class_encoding = nn.Linear(num_classes, dim)
        self.self_attn, self.cross_attn = Attention(dim, num_heads), Attention(dim, num_heads)
        self.query_place, self.key_place = PlaceMLP(dim), PlaceMLP(dim)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2, self.norm3 = (LayerNorm(dim) for _ in range(3))
        self.parts = {"center": 2, "height": 1, "dim": 3, "rot": 2} | ({"vel": 2} if velocity else {})
        outs = self.parts | {"iou": 1, "heatmap": num_classes}
        self.predict = nn.ModuleDict(
            {k: nn.Sequential(nn.Linear(dim, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, n))
             for k, n in outs.items()}
        )  # fmt: skip
        for last in (self.heat[-1], self.predict["heatmap"][-1]):  # type: ignore[index]
            nn.init.constant_(last.bias, -2.19)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """A map (B, C, Y, X) -> by name what the proposals say (B, P, channels), and of each its "label" (B, P).

        Also "dense_heatmap" (B, classes, X, Y) and "query_heatmap_score" (B, P, classes), the heat at the proposals.
        """
        x = self.shared(x.mT)  # (B, dim, X, Y)
        batch, _, across, down = x.shape
        heat = self.heat(x)
        peaks = self.peaks(heat.detach().sigmoid()).flatten(2)
        count = min(self.proposals, peaks[0].numel())
        best = peaks.flatten(1).sort(descending=True, stable=True).indices[:, :count]
        label, cell = best // (across * down), best % (across * down)
        tokens = x.flatten(2).mT
        places = map_cells(across, down, x.device).to(x) + 0.5
        each = torch.arange(batch, device=x.device)[:, None]
        query = tokens[each, cell] + self.class_encoding(F.one_hot(label, self.num_classes).to(x))
        at = self.query_place(places[cell])
        itself = torch.arange(count, device=x.device)[None, :, None].expand(batch, -1, 1)
        own = query + at
        query = self.norm1(query + self.self_attn(own, own, itself, torch.zeros_like(itself, dtype=torch.bool)))
        steps = torch.arange(-self.reach, self.reach + 1, device=x.device)
        index = cell[..., None] + (steps[:, None] * down + steps).flatten()
        absent = (index < 0) | (index >= across * down)
        index = index.clamp(0, across * down - 1)
        query = self.norm2(query + self.cross_attn(query + at, tokens + self.key_place(places), index, absent))
        query = self.norm3(query + self.linear2(F.relu(self.linear1(query))))
        flat = query.flatten(0, 1)
        raw = {name: part(flat).unflatten(0, (batch, count)) for name, part in self.predict.items()}
        raw["center"] = raw["center"] + places[cell]
        heat_there = peaks.mT[each, cell]
        return raw | {"query_heatmap_score": heat_there, "dense_heatmap": heat, "label": label}

    def peaks(self, heat: Tensor) -> Tensor:
        """The heat (B, classes, X, Y) where it is the largest of its 3 x 3, and 0 elsewhere and at the border."""
        most = F.pad(F.max_pool2d(heat, 3, 1), (1, 1, 1, 1))
        if small := [c for c in self.small if c < self.num_classes]:
            most[:, small] = heat[:, small]
        return heat * (heat == most)

    def boxes_of(self, raw: Mapping[str, Tensor]) -> Tensor:
        """Boxes (..., 7 or 9) of what proposals say."""
        size = raw["dim"].exp()
        sin, cos = raw["rot"].split(1, -1)
        z = raw["height"] - size[..., 2:] / 2
        parts = [self.grid.point(raw["center"]), z, size, torch.atan2(sin, cos)]
        return torch.cat(parts + ([raw["vel"]] if "vel" in raw else []), -1)

    def encode(self, boxes: Tensor) -> Tensor:
        """What proposals are to say of boxes (M, 7 or 9), in the order of `parts`."""
        top, turn = boxes[:, 2:3] + boxes[:, 5:6] / 2, boxes[:, 6:7]
        parts = [self.grid.place(boxes[:, :2]), top, boxes[:, 3:6].log(), turn.sin(), turn.cos(), boxes[:, 7:9]]
        return torch.cat(parts, 1)[:, : sum(self.parts.values())]

    def decode(self, raw: dict[str, Tensor]) -> list[Boxes]:
        own = F.one_hot(raw["label"], self.num_classes)
        scores, labels = (raw["heatmap"].sigmoid() * raw["query_heatmap_score"] * own).max(-1)
        iou = ((raw["iou"][..., 0] + 1) / 2).clamp(0, 1)
        boxes, results = self.boxes_of(raw), []
        for box, score, label, likely in zip(boxes, scores, labels, iou):
            keep = score > self.score
            if self.limits is not None:
                low, high = box.new_tensor(self.limits).chunk(2)
                keep = keep & ((box[:, :3] >= low) & (box[:, :3] <= high)).all(1)
            score = score ** (1 - self.rectify) * likely**self.rectify
            found = Boxes(box, score, label)[keep]
            alone = torch.ones_like(found.labels, dtype=torch.bool)
            for c in self.small:
                rows = (found.labels == c).nonzero()[:, 0]
                left = nms(found.boxes[rows], found.scores[rows], self.small_iou, self.most_before, self.most)
                alone[rows] = False
                alone[rows[left]] = True
            found = found[alone]
            results.append(found[found.scores.argsort(descending=True, stable=True)])
        return results

    @torch.no_grad()
    def assign(self, raw: Mapping[str, Tensor], b: int, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Proposals of sample b and the boxes that they are to be, one for one, for the least cost altogether."""
        require("scipy", "points")
        from scipy.optimize import linear_sum_assignment

        found = self.boxes_of({name: raw[name][b] for name in self.parts})
        p = raw["heatmap"][b].sigmoid()
        missed = -(p + 1e-12).log() * 0.25 * (1 - p) ** 2
        wrong = -(1 - p + 1e-12).log() * 0.75 * p**2
        extent = found.new_tensor([n * size for n, size in zip(self.grid.cells, self.grid.size)])
        away = torch.cdist(found[:, :2] / extent, boxes[:, :2] / extent, p=1)
        cost = 0.15 * (missed - wrong)[:, labels] + 0.25 * away - 0.25 * iou_3d(found, boxes)
        rows, columns = linear_sum_assignment(torch.nan_to_num(cost, 1e6, 1e6, -1e6).cpu().numpy())
        return torch.from_numpy(rows).to(boxes.device), torch.from_numpy(columns).to(boxes.device)

    def losses(self, raw: dict[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        heat = raw["dense_heatmap"]
        cells = map_cells(heat.shape[-2], heat.shape[-1], heat.device)
        wanted, classes, errors, ious = [], torch.zeros_like(raw["heatmap"]), [], []
        said = torch.cat([raw[name] for name in self.parts], -1)
        weight = said.new_tensor([1.0] * 8 + [0.2] * 2)[: said.shape[-1]]
        for b, (boxes, labels) in enumerate(targets):
            boxes, labels = in_grid(boxes, labels, self.grid)
            peak = self.grid.place(boxes[:, :2]).long()
            wanted.append(draw_heat(cells, peak, radii(boxes, self.grid), labels, self.num_classes).mT)
            rows, columns = self.assign(raw, b, boxes, labels)
            classes[b, rows, labels[columns]] = 1
            errors.append((said[b, rows] - self.encode(boxes[columns])).abs() * weight)
            found = self.boxes_of({name: raw[name][b] for name in self.parts}).detach()
            true = iou_3d(found, boxes, torch.stack((rows, columns), 1))
            ious.append((raw["iou"][b, rows, 0] - (2 * true - 1)).abs())
        count = max(sum(map(len, errors)), 1)
        parts = {
            "heat": heat_loss(heat.flatten(2), torch.stack(wanted)),
            "class": focal_loss(raw["heatmap"], classes).sum() / count,
            "box": 0.25 * (torch.cat(errors).sum() + 0 * said.sum()) / count,
            "iou": 0.5 * (torch.cat(ious).sum() + 0 * raw["iou"].sum()) / count,
        }
        return {"loss": sum(parts.values()), **parts}


HEADS: dict[str, type[BoxHead]] = {"anchor": AnchorHead, "center": CenterHead, "transfusion": TransFusionHead}
"""By name."""
