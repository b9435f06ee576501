"""Drawing clouds of points: as an image from several sides, and as a page that turns under the mouse.

Both colour points by class, by a value, by colours of their own or, without any of these, by height; both draw boxes.
The image needs nothing but NumPy and Pillow; the page is one HTML file that loads nothing else.
"""

import base64
import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .draw import INK, PAPER, Colour, _palette, _percent, _tag, _typeset, _with_legend

__all__ = ["PointView", "draw_points", "points_page"]

GREY = (150, 152, 158)  # points of no class
LARGEST_PAGE = 400_000
"""Points that a page holds; of more, as many are drawn at random."""

# Dark to bright, of even steps to the eye: between these anchors of viridis colours are mixed.
_SCALE = np.array(
    [(68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
     (170, 220, 50), (253, 231, 37)]
)  # fmt: skip

# Each view: its name, and the eye's turn about the z axis and its height, in radians. The page has the same.
_VIEWS = ("oblique", 0.65, 0.5), ("top", 0.0, np.pi / 2), ("front", 0.0, 0.0), ("side", np.pi / 2, 0.0)
# Between the corners of a box; the last one shows where its front is.
_EDGES = (0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7), (8, 9)


@dataclass
class PointView:
    """What is to be seen of a cloud.

    Attributes:
        points: (N, 3).
        labels: (N,) class of each point; what is no index of `classes` is grey.
        classes: the names.
        palette: a colour a class; default: `default_palette`.
        values: (N,) number of each point, where it has no class.
        value_name: what the numbers are.
        colours: (N, 3) bytes, where points have neither.
        boxes: (M, 7) centre x y z, length, width, height, and angle about the z axis from x to y in radians.
        box_labels: (M,) class of each box.
        box_scores: (M,) from 0 to 1.
        up: the axis that points upwards, "z", or "y" as in most models of single objects; boxes need "z".
        title: a line of words.

    Raises:
        ValueError: a shape does not fit the points, there are fewer colours than classes, or no such axis.
    """

    points: np.ndarray
    labels: np.ndarray | None = None
    classes: Sequence[str] = ()
    palette: Sequence[Colour] | None = None
    values: np.ndarray | None = None
    value_name: str = ""
    colours: np.ndarray | None = None
    boxes: np.ndarray | None = None
    box_labels: np.ndarray | None = None
    box_scores: np.ndarray | None = None
    up: str = "z"
    title: str = ""

    def __post_init__(self):
        self.points = np.asarray(self.points, np.float64)
        if self.points.ndim != 2 or self.points.shape[1] != 3:
            raise ValueError(f"points are (N, 3), got {self.points.shape}")
        for name, shape in (
            ("labels", (len(self.points),)),
            ("values", (len(self.points),)),
            ("colours", self.points.shape),
        ):
            given = getattr(self, name)
            if given is not None and np.shape(given) != shape:
                raise ValueError(f"{name} of {len(self.points)} points are {shape}, got {np.shape(given)}")
        self.boxes = np.zeros((0, 7)) if self.boxes is None else np.asarray(self.boxes, np.float64).reshape(-1, 7)
        for name in ("box_labels", "box_scores"):
            if (given := getattr(self, name)) is None:
                continue
            if np.shape(given) != (len(self.boxes),):
                raise ValueError(f"{name} of {len(self.boxes)} boxes are ({len(self.boxes)},), got {np.shape(given)}")
            setattr(self, name, np.asarray(given))
        if self.up not in ("y", "z") or self.up == "y" and len(self.boxes):
            raise ValueError(f"up is z, or y where there are no boxes, got {self.up!r}")
        self.palette = _palette(self.palette, self.classes)
        if self.up == "y":
            self.points = self.points[:, [0, 2, 1]] * (1, -1, 1)
        keep = np.isfinite(self.points).all(1)
        self.points = self.points[keep]
        for name in ("labels", "values", "colours"):
            if getattr(self, name) is not None:
                setattr(self, name, np.asarray(getattr(self, name))[keep])

    def paint(self) -> tuple[np.ndarray, list[tuple[Colour, str]]]:
        """The colour of every point, (N, 3) bytes, and the legend: colours and words."""
        if self.labels is not None:
            known = (self.labels >= 0) & (self.labels < len(self.palette))
            table = np.array([*self.palette, GREY], np.uint8)
            counts = np.bincount(self.labels[known].astype(np.int64), minlength=len(self.classes))
            shown = [i for i in np.argsort(-counts, kind="stable")[: len(self.classes)] if counts[i]]
            share = {i: _percent(counts[i] / len(self.points)) for i in shown}
            return table[np.where(known, self.labels, -1).astype(np.int64)], [
                (self.palette[i], f"{self.classes[i]} · {share[i]}") for i in shown
            ]
        boxes = [] if self.box_labels is None else np.bincount(self.box_labels[self.box_labels >= 0]).tolist()
        boxes = [(self.palette[i], f"{self.classes[i]} ×{n}") for i, n in enumerate(boxes[: len(self.classes)]) if n]
        if self.values is None and self.colours is not None:
            return np.asarray(self.colours, np.uint8), boxes
        values = self.points[:, 2] if self.values is None else np.asarray(self.values, np.float64)
        name = ("height" if self.up == "z" else "y") if self.values is None else self.value_name
        finite = values[np.isfinite(values)]
        low, high = np.percentile(finite, (1, 99)) if len(finite) else (0, 1)
        share = np.nan_to_num((values - low) / ((high - low) or 1)).clip(0, 1)
        stops = np.linspace(0, 1, 5)
        digits = 2 - int(np.floor(np.log10((high - low) or 1)))
        words = [f"{round(low + stop * (high - low), digits) + 0:g}" for stop in stops]
        words[0] = f"{name} {words[0]}".strip()
        return _on_scale(share), [(tuple(map(int, c)), word) for c, word in zip(_on_scale(stops), words)] + boxes

    def box_colour(self, i: int) -> Colour:
        """The colour of box i."""
        label = -1 if self.box_labels is None else int(self.box_labels[i])
        return tuple(self.palette[label]) if 0 <= label < len(self.palette) else (214, 40, 60)

    def box_name(self, i: int) -> str:
        """What is written at box i."""
        label = -1 if self.box_labels is None else int(self.box_labels[i])
        words = [self.classes[label]] if 0 <= label < len(self.classes) else []
        return " ".join(words + ([] if self.box_scores is None else [f"{self.box_scores[i]:.2f}"]))

    def corners(self) -> np.ndarray:
        """(M, 10, 3): the corners of each box, the lower four first; its centre and its front's, at the bottom."""
        signs = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)])
        flat = np.concatenate((np.tile(signs, (2, 1)), [(0, 0), (1, 0)])) / 2  # along length and width
        height = np.array([-1] * 4 + [1] * 4 + [-1] * 2) / 2
        x = flat[:, 0] * self.boxes[:, 3:4]
        y = flat[:, 1] * self.boxes[:, 4:5]
        cos, sin = np.cos(self.boxes[:, 6:7]), np.sin(self.boxes[:, 6:7])
        turned = np.stack((x * cos - y * sin, x * sin + y * cos, height * self.boxes[:, 5:6]), -1)
        return turned + self.boxes[:, None, :3]


def _on_scale(share: np.ndarray) -> np.ndarray:
    place = share * (len(_SCALE) - 1)
    return (
        np.stack([np.interp(place, range(len(_SCALE)), channel) for channel in _SCALE.T], -1).round().astype(np.uint8)
    )


# -- the image --------------------------------------------------------------------------------------------------------


def draw_points(view: PointView, size: int = 1200) -> Image.Image:
    """A cloud from four sides, with a legend: obliquely, from the top, the front and the side.

    Each part has its own scale, which a bar shows in the points' unit. Points far from all others may lie outside.
    Edges in depth are shaded, so that shapes stand out in any colours. Boxes are named in the view from the top.

    Args:
        view: what is to be seen.
        size: width in pixels. The height depends on the cloud, and is at most the same but for title and legend.

    Returns:
        An RGB image.
    """
    side = max(size // 2, 100)
    colours, entries = view.paint()
    panels = [_Panel(view, *which, side) for which in _VIEWS]
    heights = [max(panel.height for panel in panels[row : row + 2]) for row in (0, 2)]
    font, (title,) = _typeset([view.title], max(side // 24, 12))
    top = 2 * font.size if title else 0
    sheet = Image.new("RGB", (2 * side, top + sum(heights)), PAPER)
    ImageDraw.Draw(sheet).text((side // 40, font.size // 2), title, INK, font)
    for i, panel in enumerate(panels):
        sheet.paste(panel.draw(colours, heights[i // 2]), (i % 2 * side, top + i // 2 * heights[0]))
    return _with_legend(sheet, entries, None)


class _Panel:
    """One view of a cloud.

    Attributes:
        height: in pixels, that it needs.
    """

    def __init__(self, view: PointView, name: str, turn: float, tilt: float, width: int):
        self.view, self.name, self.width = view, name, width
        right = np.array([np.cos(turn), np.sin(turn), 0])
        up = np.array([-np.sin(turn) * np.sin(tilt), np.cos(turn) * np.sin(tilt), np.cos(tilt)])
        axes = np.stack((right, up, np.cross(right, up)))  # the last one towards the eye
        self.seen, self.corners = view.points @ axes.T, view.corners() @ axes.T
        low, high = np.zeros(2), np.ones(2)
        if len(self.seen):
            flat = self.seen[:, :2]
            low, high = flat.min(0), flat.max(0)
            inner = np.percentile(flat, (0.5, 99.5), axis=0)
            if ((high - low) > 1.6 * (inner[1] - inner[0])).any():
                low, high = inner
        if len(self.corners):
            flat = self.corners[..., :2].reshape(-1, 2)
            low, high = (
                (np.minimum(low, flat.min(0)), np.maximum(high, flat.max(0)))
                if len(self.seen)
                else (flat.min(0), flat.max(0))
            )
        self.middle, self.extent = (low + high) / 2, np.maximum(high - low, 1e-9)
        self.margin = max(width // 12, 24)
        needed = self.extent[1] / self.extent[0] * (width - self.margin) + 2 * self.margin
        self.height = int(np.clip(needed, width // 4, width))

    def draw(self, colours: np.ndarray, height: int) -> Image.Image:
        """The view at this height; drawn at twice its size, for smooth edges."""
        room = np.array([self.width - self.margin, height - 2 * self.margin])
        scale = 2 * (room / self.extent).min()

        def place(points: np.ndarray) -> np.ndarray:
            """Pixels from the upper left corner."""
            return (points[..., :2] - self.middle) * scale * (1, -1) + (self.width, height)

        area = np.prod(np.minimum(self.extent * scale, 2 * room))
        pixels = _splat(place(self.seen), self.seen[:, 2] * scale, colours, (2 * height, 2 * self.width), area)
        image, view = Image.fromarray(pixels), self.view
        pen = ImageDraw.Draw(image)
        for i, box in enumerate(place(self.corners)):
            for a, b in _EDGES:
                pen.line((*box[a], *box[b]), view.box_colour(i), max(self.width // 150, 2))
        image = image.resize((self.width, height), Image.Resampling.BOX)
        pen = ImageDraw.Draw(image)
        names = [view.box_name(i) for i in range(len(view.boxes))]
        size = max(self.width // 40, 11)
        font, (caption, *names) = _typeset([self.name, *names], size)
        if self.name == "top":
            for i in range(len(names)) if view.box_scores is None else np.argsort(view.box_scores, kind="stable"):
                if names[i]:  # the best ones last: on top
                    _tag(pen, image.size, place(self.corners[i, :8]).min(0) / 2, names[i], view.box_colour(i), font)
        longest = 0.4 * self.width * 2 / scale
        length = 10.0 ** np.floor(np.log10(longest))
        length *= next(step for step in (5, 2, 1) if step * length <= longest)
        x, y = self.width - size, height - size
        pen.line((x - length * scale / 2, y, x, y), INK, 2)
        pen.text((x, y - 3), f"{length:g}", INK, font, anchor="rs")
        pen.text((size, y), caption, INK, font, anchor="ls")
        return image


def _splat(
    place: np.ndarray, depth: np.ndarray, colours: np.ndarray, shape: tuple[int, int], area: float
) -> np.ndarray:
    """(H, W, 3) bytes: every point as a disc, the nearest (the largest `depth`) on top; together they fill `area`."""
    height, width = shape
    picture = np.full((height * width, 3), PAPER, np.float32)
    near = np.full(height * width, -np.inf)
    corner = np.floor(place.clip(-1e6, 1e6)).astype(np.int64)
    inside = ((corner > -9) & (corner < (width + 9, height + 9))).all(1)
    order = np.flatnonzero(inside)[np.argsort(depth[inside], kind="stable")]  # of several in a pixel the last remains
    corner, depth, colours = corner[order], depth[order], colours[order]
    radius = float(np.clip(np.sqrt(2.5 * area / max(len(order), 1) / np.pi), 1.0, 5.0))
    reach = int(radius)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            if dx * dx + dy * dy > radius * radius:
                continue
            x, y = corner[:, 0] + dx, corner[:, 1] + dy
            there = np.flatnonzero((x >= 0) & (x < width) & (y >= 0) & (y < height))
            cell = y[there] * width + x[there]
            nearer = depth[there] > near[cell]
            cell, who = cell[nearer], there[nearer]
            near[cell] = depth[who]
            picture[cell] = colours[who]
    picture *= _shade(near.reshape(shape)).reshape(-1, 1)
    return picture.reshape(height, width, 3).clip(0, 255).astype(np.uint8)


def _shade(near: np.ndarray) -> np.ndarray:
    """Darker where neighbouring pixels are nearer to the eye: eye-dome lighting (Boucheny, 2009)."""
    padded = np.pad(near, 3, constant_values=-np.inf)
    (height, width), total = near.shape, np.zeros(near.shape)
    with np.errstate(invalid="ignore"):
        for distance in (1, 3):
            for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)):
                y, x = 3 + distance * dy, 3 + distance * dx
                step = padded[y : y + height, x : x + width] - near
                total += np.nan_to_num(step, nan=0, posinf=0, neginf=0).clip(0, 40)
    return np.exp(-0.0035 * total)


# -- the page ---------------------------------------------------------------------------------------------------------


def points_page(view: PointView, limit: int = LARGEST_PAGE, seed: int = 0) -> str:
    """An HTML page with the cloud in it, to be turned, moved and enlarged; classes can be hidden. It loads nothing.

    Args:
        view: what is to be seen.
        limit: most points that the page holds; of more, as many are drawn at random, and the page says so.
        seed: of that draw.
    """
    total = len(view.points)
    colours, entries = view.paint()
    keep = np.arange(total)
    if total > limit:
        keep = np.sort(np.random.default_rng(seed).choice(total, limit, replace=False))
    points = view.points[keep]
    middle, extent = np.zeros(3), 1.0
    if len(points):
        low, high = points.min(0), points.max(0)
        middle, extent = (low + high) / 2, max((high - low).max() / 2, 1e-9)
    places = ((points - middle) / extent * 32767).round().astype("<i2")
    labels = np.full(len(points), 255, np.uint8)
    classes = []
    if view.labels is not None:
        words = dict((tuple(colour), word) for colour, word in entries)
        for i in np.unique(view.labels[(view.labels >= 0) & (view.labels < len(view.classes))]).astype(int).tolist():
            labels[view.labels[keep] == i] = min(len(classes), 254)
            classes.append([words.get(tuple(view.palette[i]), view.classes[i]), list(view.palette[i])])
        entries = []
    edges = np.array(_EDGES)
    corners = (view.corners() - middle) / extent
    data = {
        "title": view.title,
        "note": f"{len(points):,} of {total:,} points" if len(points) < total else f"{total:,} points",
        "places": base64.b64encode(places.tobytes()).decode(),
        "colours": base64.b64encode(np.ascontiguousarray(colours[keep])).decode(),
        "labels": base64.b64encode(labels.tobytes()).decode(),
        "classes": classes,
        "legend": [[word, list(colour)] for colour, word in entries],
        "boxes": [
            {
                "lines": corners[i][edges].reshape(-1).round(6).tolist(),
                "top": corners[i, 4:8].mean(0).round(6).tolist(),
                "colour": list(view.box_colour(i)),
                "name": view.box_name(i),
            }
            for i in range(len(corners))
        ],
    }
    page = Path(__file__).with_name("points_page.html").read_text("utf-8")
    content = json.dumps(data).replace("<", "\\u003c")  # nothing in it can end the script
    return page.replace("TITLE", html.escape(view.title or "Points"), 1).replace('"DATA"', content, 1)
