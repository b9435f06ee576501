"""Routes through free points: one table per sample, along space-filling curves or single coordinates."""

from typing import Sequence

import torch
from torch import Tensor

from ..visits import declare
from .curves import hilbert_keys, zorder_keys

__all__ = ["point_table"]

_POINT_CURVES = ("hilbert", "hilbert-trans", "zorder", "zorder-trans", "axis0", "axis1", "axis2")
_POINT_ALIASES = {"z": "zorder", "z-trans": "zorder-trans"}


def point_table(
    coords: Tensor,
    curve: str | Sequence[str] = "hilbert",
    bits: int = 10,
    cell: float | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    together: bool = True,
) -> Tensor:
    """Routes through free points, one table a sample: coords (B, N, 2 or 3) -> int32 (B, K, N).

    Points are rounded down to cells and visited in the cells' order on a curve; points of one cell in stored order.
    What is no point is not visited: in its place, padding steps end the route, backwards too.

    Args:
        coords: coordinates of any real dtype.
        curve: one or several (a comma-separated text or a sequence), each with "-" before it for its reverse:
            "hilbert", "zorder" (also "z"); "hilbert-trans", "zorder-trans" (also "z-trans") swap the first two axes, as
            Point Transformer V3 and PointMamba name them; "axis0", "axis1", "axis2" sort by one coordinate.
        bits: 2**bits cells along the longest side of each sample's bounding box; cells are squares or cubes.
        cell: PointMamba's rule instead: cells have this side, are numbered from each sample's lowest, and the curve is
            as deep as the largest number needs (at most 21 bits in 3D, 31 in 2D).
        lengths: number of leading rows of each sample that are points; None: all. A row with NaN is none.
        together: whether `cell` takes the largest number in the batch, as published, so that a sample's route can turn
            with its batch mates, or each sample's own.

    Raises:
        ValueError: the shape is wrong, or a curve is unknown (the message lists what exists).
    """
    if coords.ndim != 3 or coords.shape[-1] not in (2, 3):
        raise ValueError(f"point_table: coords are (B, N, 2) or (B, N, 3), got {tuple(coords.shape)}")
    axes = coords.shape[-1]
    coords = coords if coords.is_floating_point() else coords.double()
    known = _POINT_CURVES[: 4 + axes]
    absent = ~coords.isfinite().all(-1)
    if lengths is not None:
        ends = torch.as_tensor(lengths, device=coords.device)
        absent = absent | (torch.arange(coords.shape[1], device=coords.device) >= ends[:, None])
    cells, depth = _cells(coords, absent, bits, cell, together)
    orders = []
    for name in [n.strip() for n in curve.split(",")] if isinstance(curve, str) else curve:
        base = name.removeprefix("-")
        base = _POINT_ALIASES.get(base, base)
        if base not in known:
            raise ValueError(f"unknown point curve {name!r}; there are: {', '.join(known)}, and - before them")
        kind, _, swapped = base.partition("-")
        points = cells[..., [1, 0, 2][:axes]] if swapped else cells
        if kind == "hilbert":
            keys = _deep_hilbert_keys(points, depth) if depth is not None else hilbert_keys(points, bits)
        elif kind == "zorder":
            keys = zorder_keys(points, bits if depth is None else 63 // axes)
        else:
            keys = coords[..., int(kind[-1])]
        order = keys.argsort(dim=-1, stable=True)
        order = order.flip(-1) if name.startswith("-") else order
        # Behind the others, so that padding cannot touch a state that a point will read.
        last = absent.gather(-1, order).byte().argsort(dim=-1, stable=True)
        order = order.gather(-1, last)
        orders.append(order.masked_fill(absent.gather(-1, order), -1))
    return declare(torch.stack(orders, 1).int(), coords.shape[1])


def _cells(
    coords: Tensor, absent: Tensor, bits: int, cell: float | None, together: bool
) -> tuple[Tensor, Tensor | None]:
    """Integer cells of points, and with `cell` the bits that the largest takes, as a tensor (B or 1, 1)."""
    absent = absent[..., None]
    if not coords.shape[1]:
        return coords.long(), None
    if cell is not None:
        cells = torch.floor(coords / cell).masked_fill(absent, 0).long()
        cells = cells - cells.masked_fill(absent, 2**62).amin(1, keepdim=True)
        cells = cells.masked_fill(absent, 0)
        powers = 2 ** torch.arange(63 // coords.shape[-1], device=coords.device)
        largest = cells.amax() if together else cells.amax((1, 2))
        return cells, (largest.reshape(-1, 1) >= powers).sum(-1, keepdim=True)
    low = coords.masked_fill(absent, float("inf")).amin(1, keepdim=True)
    high = coords.masked_fill(absent, -float("inf")).amax(1, keepdim=True)
    side = (high - low).amax(-1, keepdim=True)
    side = torch.where(side > 0, side, torch.ones_like(side))
    place = ((coords - low) / side * 2**bits).masked_fill(absent, 0)
    return place.long().clamp(max=2**bits - 1), None


def _deep_hilbert_keys(points: Tensor, depth: Tensor) -> Tensor:
    """`hilbert_keys(points, depth)` for depths (B or 1, 1) that are a tensor: nothing waits for the device.

    A level of Skilling's curve at which all bits are zero only rolls the axes by one, so the deepest curve over axes
    rolled back gives the same keys.
    """
    axes = points.shape[-1]
    deepest = 63 // axes
    axis = (torch.arange(axes, device=points.device) + deepest - depth) % axes
    return hilbert_keys(points.gather(-1, axis[:, None].expand_as(points)), deepest)
