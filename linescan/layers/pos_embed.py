"""Position embeddings at other grid sizes, and rotary tables over a grid."""

from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["axial_rope", "grid_rope", "resample_pos_embed", "rotate_pairs", "sinusoid_table"]


def resample_pos_embed(
    pos_embed: Tensor,
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    class_rows: Sequence[int] = (),
    new_class_rows: Sequence[int] | None = None,
) -> Tensor:
    """Resizes a learned (1, L, D) table to another grid: bicubic, align_corners=False, in at least float32.

    Args:
        pos_embed: rows in sequence order: grid positions row-major, with class rows at `class_rows`.
        grid: (H, W) of the table.
        new_grid: (H', W') wanted.
        class_rows: indices of class-token rows in the table; they are carried over as they are.
        new_class_rows: their indices in the result (default: the same).

    Returns:
        (1, H' * W' + class rows, D). The very same tensor where nothing changes.
    """
    rows = list(class_rows)
    new_rows = rows if new_class_rows is None else list(new_class_rows)
    if tuple(grid) == tuple(new_grid) and rows == new_rows:
        return pos_embed
    length = pos_embed.shape[1]
    if length != grid[0] * grid[1] + len(rows):
        needed = f"{grid[0]}x{grid[1]} positions and {len(rows)} class rows"
        raise ValueError(f"position embedding has {length} rows, this grid needs {needed}")
    keep = [i for i in range(length) if i not in rows]
    table = pos_embed[:, keep].reshape(1, *grid, -1).permute(0, 3, 1, 2)
    compute = torch.promote_types(table.dtype, torch.float32)
    table = F.interpolate(table.to(compute), size=tuple(new_grid), mode="bicubic", align_corners=False)
    table = table.to(pos_embed.dtype).flatten(2).transpose(1, 2)
    for row, source in sorted(zip(new_rows, rows)):
        table = torch.cat([table[:, :row], pos_embed[:, source : source + 1], table[:, row:]], 1)
    return table


def grid_rope(grid: tuple[int, int], dim: int, native: int = 14, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Rotary tables (H * W, dim) of a grid: cosines and sines, float32.

    The first half of the channels turns with the row, the second with the column; each of the dim / 4 frequencies
    theta^(-2k / (dim / 2)) serves two neighbouring channels. Coordinates are scaled to a `native`-sized grid.
    """
    freqs = 1.0 / theta ** (torch.arange(0, dim // 2, 2, dtype=torch.float32) / (dim // 2))
    cos, sin = axial_rope(*(torch.arange(n, dtype=torch.float32) / n * native for n in grid), freqs)
    return cos.flatten(0, 1), sin.flatten(0, 1)


def axial_rope(rows: Tensor, columns: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables (H, W, 4 F) of a map, cosines and sines: the first half turns with the row, the second the column.

    Args:
        rows, columns: coordinates, (H,) and (W,).
        freqs: (F,); each serves two neighbouring channels, of either half.
    """
    size = len(rows), len(columns), -1
    angles = [torch.outer(x, freqs).repeat_interleave(2, -1) for x in (rows, columns)]
    (row_cos, row_sin), (col_cos, col_sin) = ((a.cos(), a.sin()) for a in angles)
    cos = torch.cat([row_cos[:, None].expand(size), col_cos[None].expand(size)], -1)
    return cos, torch.cat([row_sin[:, None].expand(size), col_sin[None].expand(size)], -1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of neighbouring channels (a, b) by its angle: (a cos - b sin, b cos + a sin)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], -1).flatten(-2) * sin


def sinusoid_table(length: int, dim: int) -> Tensor:
    """Fixed positions (1, length, dim), float32: sines on even, cosines on odd channels (arXiv 1706.03762, 3.5)."""
    channel = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]
