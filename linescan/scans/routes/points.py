"""Routes through free points: one table per sample, along space-filling curves or single coordinates."""

from typing import Sequence

import torch
from torch import Tensor

from .curves import hilbert_keys, zorder_keys

__all__ = ["point_table"]

_POINT_CURVES = ("hilbert", "hilbert-trans", "zorder", "zorder-trans", "axis0", "axis1", "axis2")
_POINT_ALIASES = {"z": "zorder", "z-trans": "zorder-trans"}


def point_table(
    coords: Tensor, curve: str | Sequence[str] = "hilbert", bits: int = 10, cell: float | None = None
) -> Tensor:
    """Routes through free points, one table a sample: coords (B, N, 2 or 3) -> int32 (B, K, N).

    Points are rounded down to cells and visited in the cells' order on a curve; points of one cell in stored order.

    Args:
        coords: coordinates of any real dtype.
        curve: one or several (a comma-separated text or a sequence), each with "-" before it for its reverse:
            "hilbert", "zorder" (also "z"); "hilbert-trans", "zorder-trans" (also "z-trans") swap the first two axes, as
            Point Transformer V3 and PointMamba name them; "axis0", "axis1", "axis2" sort by one coordinate.
        bits: 2**bits cells along the longest side of each sample's bounding box; cells are squares or cubes.
        cell: PointMamba's rule instead: cells have this side, are numbered from each sample's lowest, and the curve is
            as deep as the largest number in the batch needs (at most 21 bits in 3D, 31 in 2D).

    Raises:
        ValueError: the shape is wrong, or a curve is unknown (the message lists what exists).
    """
    if coords.ndim != 3 or coords.shape[-1] not in (2, 3):
        raise ValueError(f"point_table: coords are (B, N, 2) or (B, N, 3), got {tuple(coords.shape)}")
    axes = coords.shape[-1]
    known = _POINT_CURVES[: 4 + axes]
    cells, depth = _cells(coords, bits, cell)
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
        orders.append(order.flip(-1) if name.startswith("-") else order)
    return torch.stack(orders, 1).int()


def _cells(coords: Tensor, bits: int, cell: float | None) -> tuple[Tensor, Tensor | None]:
    """Integer cells of points, and with `cell` the bits that the largest takes, as a tensor."""
    if cell is not None:
        cells = torch.floor(coords / cell).long()
        cells = cells - cells.amin(1, keepdim=True)
        powers = 2 ** torch.arange(63 // coords.shape[-1], device=coords.device)
        return cells, (cells.amax() >= powers).sum()
    low, high = coords.amin(1, keepdim=True), coords.amax(1, keepdim=True)
    side = (high - low).amax(-1, keepdim=True)
    side = torch.where(side > 0, side, torch.ones_like(side))
    return ((coords - low) / side * 2**bits).long().clamp(max=2**bits - 1), None


def _deep_hilbert_keys(points: Tensor, depth: Tensor) -> Tensor:
    """`hilbert_keys(points, depth)` for a depth that is a tensor: nothing waits for the device.

    A level of Skilling's curve at which all bits are zero only rolls the axes by one, so the deepest curve over axes
    rolled back gives the same keys.
    """
    axes = points.shape[-1]
    deepest = 63 // axes
    axis = (torch.arange(axes, device=points.device) + deepest - depth) % axes
    return hilbert_keys(points.index_select(-1, axis), deepest)
