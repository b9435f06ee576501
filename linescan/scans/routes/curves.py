"""Curves: the orders in which a grid of cells, or a set of points, can be visited.

A grid curve takes a grid, (H, W) or (T, H, W), and returns the flat row-major index of the cell visited at each step.
The keys of `hilbert_keys` and `zorder_keys` rank points with integer coordinates along the same curves.
"""

from typing import Callable

import numpy as np
from torch import Tensor

__all__ = ["CURVES", "hilbert_keys", "zorder_keys"]

Grid = tuple[int, ...]


def row(grid: Grid) -> np.ndarray:
    """Row after row, and in 3D frame after frame: the order in which tokens are stored."""
    return np.arange(np.prod(grid))


def col(grid: Grid) -> np.ndarray:
    """Column after column, each from the top down."""
    return row(grid).reshape(grid).swapaxes(-1, -2).ravel()


def snake(grid: Grid) -> np.ndarray:
    """Rows read to and fro (boustrophedon); in 3D the frames too, so that every step goes to a neighbour."""
    order = np.arange(grid[-1])
    for n in reversed(grid[:-1]):
        slabs = np.arange(n)[:, None] * order.size + order
        slabs[1::2] = slabs[1::2, ::-1]
        order = slabs.ravel()
    return order


def diagonal(grid: Grid) -> np.ndarray:
    """Antidiagonals r + c = 0, 1, ..., each from its top right down; in 3D the planes t + r + c."""
    plane = np.indices(grid).sum(0).ravel()
    return np.argsort(plane, kind="stable")


def zigzag(grid: Grid) -> np.ndarray:
    """Antidiagonals to and fro, the even ones upwards (MambaAD, arXiv 2404.06564; the order of JPEG, transposed)."""
    cell, plane = row(grid), np.indices(grid).sum(0).ravel()
    return np.lexsort((np.where(plane % 2, cell, -cell), plane))


def spiral(grid: Grid) -> np.ndarray:
    """Clockwise and inwards from the top left corner (MHS-VM, arXiv 2406.05992)."""
    rest, order = row(grid).reshape(grid), []
    while rest.size:
        order.append(rest[0])
        rest = np.rot90(rest[1:])
    return np.concatenate(order)


def zorder(grid: Grid) -> np.ndarray:
    """Z-order (Morton): the bits of row and column interleaved, the column's lowest.

    On a grid that is no power of two: the cells of the enclosing one, in its order.
    """
    bits = (max(grid) - 1).bit_length()
    return np.argsort(_interleave(list(np.indices(grid).reshape(len(grid), -1)), bits))


def hilbert(grid: Grid) -> np.ndarray:
    """Hilbert's curve, from the top left corner to the top right one of a square.

    On squares and cubes of side 2^n: Skilling's curve with the column as axis 0, the row as axis 1 and the frame as
    axis 2, which is MambaAD's. On any other grid: the generalised curve, which goes from neighbour to neighbour on
    every 2D grid and on every 3D grid with even sides (an odd side in 3D costs a few diagonal steps).
    """
    side = grid[-1]
    if len(set(grid)) == 1 and side & (side - 1) == 0:
        axes = np.indices(grid).reshape(len(grid), -1)[::-1]
        return np.argsort(_hilbert(list(axes), side.bit_length() - 1))
    steps = np.cumprod((1, *grid[:0:-1]))[::-1].tolist()
    sides = [(1, 0)] * (3 - len(grid)) + list(zip(grid, steps))
    # A path over an even number of cells ends on a cell of the other colour than it starts on: along the leading axis
    # that takes an even side. Ties go to the last axis, as on squares.
    even = np.prod(grid) % 2 == 0
    sides = sorted(reversed(sides), key=lambda s: (even and s[0] % 2 == 0, s[0]), reverse=True)
    order: list[int] = []
    first, second, third = sides
    _generalised_hilbert(0, first, second, third, order)
    return np.array(order)


def _generalised_hilbert(p: int, a: tuple, b: tuple, c: tuple, order: list[int]) -> None:
    """Appends a curve through the box at flat index p with sides a, b, c = (cells, index step); it ends at a's far end.

    Cerveny, "gilbert: space-filling curve for rectangular domains of arbitrary size", 2018: halve the longest side
    while the box is too long, else cut it into three (flat boxes) or five boxes that Hilbert's curve would visit.
    """
    (w, x), (h, y), (d, z) = a, b, c
    if 0 in (w, h, d):
        return
    if (w > 1) + (h > 1) + (d > 1) <= 1:
        n, step = max(a, b, c, key=lambda side: side[0])
        order.extend(p + i * step for i in range(n))
        return
    # Even halves wherever there is a choice, so that the boxes can meet at neighbouring cells.
    w2, h2, d2 = [n // 2 + (n > 2 and n // 2 % 2) for n in (w, h, d)]
    end = p + (w - 1) * x
    if 2 * w > 3 * h and 2 * w > 3 * d:
        boxes = [
            (p, (w2, x), b, c),
            (p + w2 * x, (w - w2, x), b, c),
        ]
    elif 3 * h > 4 * d:
        boxes = [
            (p, (h2, y), c, (w2, x)),
            (p + h2 * y, a, (h - h2, y), c),
            (end + (h2 - 1) * y, (h2, -y), c, (w - w2, -x)),
        ]
    elif 3 * d > 4 * h:
        boxes = [
            (p, (d2, z), (w2, x), b),
            (p + d2 * z, a, b, (d - d2, z)),
            (end + (d2 - 1) * z, (d2, -z), (w - w2, -x), b),
        ]
    else:
        boxes = [
            (p, (h2, y), (d2, z), (w2, x)),
            (p + h2 * y, c, (w2, x), (h - h2, y)),
            (p + (h2 - 1) * y + (d - 1) * z, a, (h2, -y), (d - d2, -z)),
            (end + h2 * y + (d - 1) * z, (d, -z), (w - w2, -x), (h - h2, y)),
            (end + (h2 - 1) * y, (h2, -y), (d2, z), (w - w2, -x)),
        ]
    for box in boxes:
        _generalised_hilbert(*box, order)


CURVES: dict[str, Callable[[Grid], np.ndarray]] = {
    curve.__name__: curve for curve in (row, col, snake, diagonal, zigzag, spiral, hilbert, zorder)
}


# The two functions below take integer arrays of numpy or torch alike: they use nothing but operators.


def _interleave(axes: list, bits: int):
    """Keys whose bits are those of the axes in turn, highest bits first, axis 0 before the others."""
    n = len(axes)
    key = axes[0] * 0
    for bit in range(bits):
        for i, x in enumerate(axes):
            key = key | (x >> bit & 1) << (bit * n + n - 1 - i)
    return key


def _hilbert(axes: list, bits: int):
    """Hilbert keys: Skilling, "Programming the Hilbert curve", AIP Conf. Proc. 707, 2004."""
    axes = list(axes)
    for bit in reversed(range(bits)):
        low = (1 << bit) - 1
        for i in range(len(axes)):
            one = -(axes[i] >> bit & 1)  # all ones where the bit is set
            swap = (axes[0] ^ axes[i]) & low & ~one
            axes[i] = axes[i] ^ swap
            axes[0] = axes[0] ^ (swap | low & one) if i else axes[0] ^ low & one
    key = _interleave(axes, bits)
    shift = 1
    while shift < bits * len(axes):  # from Gray code to binary
        key = key ^ key >> shift
        shift *= 2
    return key


def _keys(curve: Callable, coords: Tensor, bits: int) -> Tensor:
    if coords.is_floating_point() or coords.is_complex():
        raise ValueError(f"curve keys need integer coordinates (..., axes), got {coords.dtype}")
    axes = coords.shape[-1]
    if not 1 <= bits * axes <= 63:
        raise ValueError(f"{bits} bits on each of {axes} axes: a key holds 1 to 63 bits, so bits is 1 to {63 // axes}")
    return curve(list(coords.long().unbind(-1)), bits)


def hilbert_keys(coords: Tensor, bits: int) -> Tensor:
    """Place of integer points on Hilbert's curve: coords (..., n) in [0, 2**bits) -> (...) int64.

    Axis 0 is the one that Skilling's curve starts with; `hilbert` on a grid uses (column, row, frame). The orientation
    of the curve depends on `bits`: the order of points in a corner repeats when `bits` grows by n.

    Raises:
        ValueError: coordinates are not integers, or a key would not fit 63 bits.
    """
    return _keys(_hilbert, coords, bits)


def zorder_keys(coords: Tensor, bits: int) -> Tensor:
    """Place of integer points on the Z-order curve: coords (..., n) in [0, 2**bits) -> (...) int64.

    Axis 0 takes the highest bit of each group; `zorder` on a grid uses (frame, row, column).

    Raises:
        ValueError: coordinates are not integers, or a key would not fit 63 bits.
    """
    return _keys(_interleave, coords, bits)
