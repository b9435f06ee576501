"""Drawings of routes. Needs matplotlib, which nothing else in `linescan.scans` does."""

import math
from os import PathLike
from typing import TYPE_CHECKING, Sequence

import numpy as np

from .curves import Grid
from .orders import Route, RouteLike, as_grid
from .spec import parse
from .tables import stored_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_routes"]

_INK, _PAPER = "#2b2d42", "#fdfdfb"
_PANEL = 2.9  # inches along a panel's longer side


def draw_routes(
    spec: RouteLike | Sequence[RouteLike],
    grid: Sequence[int] | str,
    path: str | PathLike | None = None,
    image: np.ndarray | None = None,
) -> "Figure":
    """Draws each route as a line that goes from dark to bright with time, from a circle to an arrow head.

    Steps to a neighbour are thick, jumps thin, and dotted where padding is visited on the way; class tokens are stars
    to the left of the grid. The frames of a 3D grid stand side by side, and jumps between them are arcs.

    Args:
        spec: routes, as `linescan.scans.routes.parse` takes them.
        grid: (H, W) or (T, H, W).
        path: where to save the drawing; the ending decides the format (png, pdf, svg).
        image: shown under the routes: (h, w, 3) or (h, w), or with one more axis in front for a frame each; uint8, or
            floats in [0, 1].

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: as `parse` and `table` do, or the image's shape is none of these.
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing routes needs matplotlib: pip install matplotlib") from error
    routes, grid = parse(spec), as_grid(grid)
    frames = grid[0] if len(grid) == 3 else 1
    images = _frames_of(image, frames)
    margin = 2.0 if any(route.stored for route in routes) else 0.1  # cells, for class tokens
    width, height = margin + frames * (grid[-1] + 1) - 1, grid[-2]
    scale = _PANEL / max(height, width / min(frames, 4))  # inches a cell
    # Panels share a page about as wide as it is high.
    panel_w, panel_h = max(width * scale, 1.6), height * scale + 0.55
    columns = min(len(routes), max(1, round(math.sqrt(len(routes) * 1.7 * panel_h / panel_w))))
    rows = -(-len(routes) // columns)
    columns = -(-len(routes) // rows)
    size = columns * (panel_w + 0.45) + 0.3, rows * panel_h + 0.75
    figure = Figure(figsize=(max(size[0], 3.4), size[1]), facecolor=_PAPER, dpi=160)
    axes = figure.subplots(rows, columns, squeeze=False)
    legend = 0.55 / size[1]
    figure.subplots_adjust(0.02, legend, 0.98, 1 - 0.42 / size[1], wspace=0.14, hspace=0.55 / (panel_h - 0.55))
    for axis in axes.flat[len(routes) :]:
        axis.set_axis_off()
    for axis, route in zip(axes.flat, routes):
        _draw(axis, route, grid, images, scale * 72, margin)
    _draw_legend(figure, legend, margin > 1)
    if path is not None:
        figure.savefig(path)
    return figure


def _frames_of(image: np.ndarray | None, frames: int) -> list:
    """The image to show under each frame, or nothing."""
    if image is None:
        return []
    image = np.asarray(image)
    one = image.ndim == 2 or image.ndim == 3 and image.shape[-1] in (3, 4)
    if not one and (image.ndim not in (3, 4) or len(image) != frames):
        raise ValueError(f"an image is (h, w, 3) or (h, w), or {frames} frames of these, got {image.shape}")
    return [image] * frames if one else list(image)


def _draw(axis, route: Route, grid: Grid, images: list, points: float, margin: float) -> None:
    """One panel; `points` is the size of a cell on paper, in points."""
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection
    from matplotlib.colors import ListedColormap

    order = route.order(grid)
    height, width = grid[-2:]
    frames = grid[0] if len(grid) == 3 else 1
    colour = ListedColormap(colormaps["viridis"](np.linspace(0, 0.95, 256)))

    # Where cells and then class tokens stand on paper: x grows to the right, y downwards.
    frame, row, col = np.indices((frames, height, width)).reshape(3, -1)
    cells = np.stack([frame * (width + 1) + col, row], 1)
    tokens = len(route.stored)
    middle = (height - 1) / 2 + 1.2 * (np.arange(tokens) - (tokens - 1) / 2)
    place = np.concatenate([cells, np.stack([np.full(tokens, -1.5), middle], 1)])

    steps = np.flatnonzero(order >= 0)
    visited = stored_cells(route, grid)[order[steps]]
    line = place[visited]
    time = steps / max(len(order) - 1, 1)
    when = np.empty(len(place))
    when[visited] = time
    for i, times in enumerate(when[: len(cells)].reshape(frames, height, width)):
        left = i * (width + 1) - 0.5
        extent = (left, left + width, height - 0.5, -0.5)
        if images:
            axis.imshow(images[i], extent=extent, cmap="gray", zorder=0)
            axis.imshow(np.full((1, 1, 4), (1, 1, 1, 0.25)), extent=extent, zorder=0)
            continue
        axis.imshow(times, extent=extent, cmap=colour, vmin=0, vmax=1, alpha=0.16, zorder=0)
        edges = [[(left + x, -0.5), (left + x, height - 0.5)] for x in range(width + 1)]
        edges += [[(left, y - 0.5), (left + width, y - 0.5)] for y in range(height + 1)]
        axis.add_collection(LineCollection(edges, colors=_PAPER, linewidths=min(1.2, points / 10), zorder=1))

    thick = float(np.clip(0.2 * points, 0.7, 4.5))
    reach = np.abs(np.diff(line, axis=0)).max(1, initial=0)
    near, far = reach < 1.5, reach > 1.5 * width if frames > 1 else np.False_
    padded = np.diff(steps) > 1
    segments = _arcs(line[:-1], line[1:]) if frames > 1 else np.stack([line[:-1], line[1:]], 1)
    if images:
        halo = dict(linewidths=thick + 1.4, colors="white", capstyle="round", alpha=0.8, zorder=2)
        axis.add_collection(LineCollection(segments[near], **halo))
    for chosen, style in (
        (far & ~padded, dict(linewidths=thick * 0.2, alpha=0.2)),
        (~near & ~far & ~padded, dict(linewidths=thick * 0.35, alpha=0.55)),
        (padded, dict(linewidths=thick * 0.5, linestyles=(0, (0.1, 2.2)))),
        (near & ~padded, dict(linewidths=thick)),
    ):
        coloured = dict(array=time[1:][chosen], cmap=colour, clim=(0, 1), capstyle="round", zorder=3)
        axis.add_collection(LineCollection(segments[chosen], **coloured, **style))
    if frames > 1:  # a cell that is only jumped to and from would not be seen
        axis.scatter(*line.T, c=time, cmap=colour, vmin=0, vmax=1, s=(1.5 * thick) ** 2, linewidths=0, zorder=4)

    size = float(np.clip(0.5 * points, 3.5, 10))
    mark = dict(linestyle="", markersize=size, markeredgecolor=_INK, markeredgewidth=0.9, zorder=5, clip_on=False)
    axis.plot(*place[len(cells) :].T, marker="*", markerfacecolor="#ffb703", **mark | dict(markersize=1.4 * size))
    start, end = line[0], line[-1]
    heading = end - line[-2] if len(line) > 1 else (1, 0)
    angle = math.degrees(math.atan2(-heading[1], heading[0])) - 90
    axis.plot(*start, marker="o", markerfacecolor="white", **mark)
    axis.plot(*end, marker=(3, 0, angle), markerfacecolor=colour(1.0), **mark)

    axis.set_xlim(-0.5 - margin, cells[:, 0].max() + 0.6)
    axis.set_ylim(height - 0.4, -0.6 if frames == 1 else -1.3)
    axis.set_aspect("equal")
    axis.set_axis_off()
    axis.set_title(route.spec, family="monospace", fontsize=8.5, color=_INK, pad=13)
    padding = len(order) - len(steps)
    count = f"{len(order)} steps" + (f", {padding} of them padding" if padding else "")
    axis.text(0.5, 1.0, count, transform=axis.transAxes, ha="center", va="bottom", fontsize=6.5, color="#8d99ae")


def _arcs(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Curves from points to points (n, 2), each (17, 2); level ones bend, so that rows of cells stay visible."""
    t = np.linspace(0, 1, 17)[:, None]
    jump = np.abs(end - start)[:, :1]
    bend = np.where(jump < 1.5, 0, 0.35 + 0.03 * jump)[:, None] * (0, 1)
    return start[:, None] * (1 - t) + end[:, None] * t - bend * 4 * t * (1 - t)


def _draw_legend(figure, height: float, tokens: bool) -> None:
    from matplotlib import colormaps

    width = 1.24 / figure.get_figwidth()
    axis = figure.add_axes((0.5 - width / 2, 0.4 * height, width, 0.1 * height))
    axis.imshow(colormaps["viridis"](np.linspace(0, 0.95, 256))[None], aspect="auto")
    axis.set_axis_off()
    label = dict(va="center", fontsize=7, color=_INK, transform=axis.transAxes)
    axis.text(-0.06, 0.5, "first", ha="right", **label)
    axis.text(1.06, 0.5, "last" + ("     ★ class token" if tokens else ""), ha="left", **label)
