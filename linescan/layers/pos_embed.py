"""Position embeddings at other grid sizes, and rotary tables over a grid."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scans.kernels import cpu
from ..scans.recurrence import is_plain, wants_gradient
from .tracing import opaque

__all__ = [
    "axial_rope",
    "grid_rope",
    "resample_frames",
    "resample_pos_embed",
    "resample_volume",
    "rotate_pairs",
    "sinusoid_2d",
    "sinusoid_table",
]


@opaque
def resample_pos_embed(table: Tensor, grid: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """A learned table (1, H, W, D) at another grid (H', W'): by `mode`, align_corners=False, in at least float32.

    (timm's `resample_abs_pos_embed_nhwc` computes in float32 alone.) The very same tensor where nothing changes.
    """
    if tuple(table.shape[1:3]) == tuple(grid):
        return table
    compute = torch.promote_types(table.dtype, torch.float32)
    new = F.interpolate(table.to(compute).permute(0, 3, 1, 2), tuple(grid), mode=mode, align_corners=False)
    return new.permute(0, 2, 3, 1).to(table.dtype)


@opaque
def resample_frames(table: Tensor, frames: int) -> Tensor:
    """A temporal table (1, T, D) at another number of frames: linear, align_corners=False, in at least float32."""
    if table.shape[1] == frames:
        return table
    compute = torch.promote_types(table.dtype, torch.float32)
    return F.interpolate(table.to(compute).mT, frames, mode="linear", align_corners=False).mT.to(table.dtype)


@opaque
def resample_volume(table: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """A table (1, T, H, W, D) at another grid: frame by frame as `resample_pos_embed`, then as `resample_frames`."""
    frames, *size = grid
    if tuple(table.shape[1:4]) == tuple(grid):
        return table
    new = resample_pos_embed(table[0], tuple(size))
    return resample_frames(new.flatten(1)[None], frames).view(1, *grid, table.shape[-1])


@opaque
def grid_rope(
    grid: tuple[int, int], dim: int, like: Tensor | None = None, native: int = 14, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Rotary tables (H * W, dim) of a grid: cosines and sines, float32, or of a tensor's device and dtype.

    The first half of the channels turns with the row, the second with the column; each of the dim / 4 frequencies
    theta^(-2k / (dim / 2)) serves two neighbouring channels. Coordinates are scaled to a `native`-sized grid.
    """
    freqs = 1.0 / theta ** (torch.arange(0, dim // 2, 2, dtype=torch.float32) / (dim // 2))
    rows, columns = (torch.arange(n, dtype=torch.float32) / n * native for n in grid)
    tables = axial_rope(rows, columns, freqs)
    return tuple(t.flatten(0, 1) if like is None else t.flatten(0, 1).to(like) for t in tables)


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


@opaque
def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of neighbouring channels (a, b) by its angle: (a cos - b sin, b cos + a sin).

    Both channels of a pair have the same angle in the tables. On a CPU a kernel does it or, where there is a gradient,
    one pass over a + bi, where there is no graph to be made.
    """
    plain = is_plain((x, cos, sin))
    if plain and not wants_gradient((x, cos, sin)):
        turned = cpu.rotate(x, cos, sin)
        if turned is not None:
            return turned
    pairs = x.unflatten(-1, (-1, 2))
    if plain and x.is_cpu and x.dtype == cos.dtype == sin.dtype == torch.float32:
        if pairs.stride(-1) != 1 or any(n % 2 for n in (*pairs.stride()[:-1], pairs.storage_offset())):
            pairs = pairs.contiguous()
        turn = torch.complex(cos[..., ::2], sin[..., ::2])
        return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)
    a, b = pairs.unbind(-1)
    return x * cos + torch.stack([-b, a], -1).flatten(-2) * sin


def sinusoid_table(length: int, dim: int) -> Tensor:
    """Fixed positions (1, length, dim), float32: sines on even, cosines on odd channels (arXiv 1706.03762, 3.5)."""
    channel = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


def sinusoid_2d(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed positions (1, H, W, dim): the first half of the channels by column, the second by row, sines first."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [place[..., None] * frequencies for place in (columns, rows)]
    return torch.cat([table for angle in angles for table in (angle.sin(), angle.cos())], -1)[None].float()
