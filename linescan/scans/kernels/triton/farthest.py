"""Farthest point sampling in Triton: one program a cloud, which keeps for each point how far the nearest sample is.

Steps are serial, and each reads all points: of a plain torch loop nine launches a step remain none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["farthest"]

BLOCK = 4096  # points side by side


@triton.jit
def _farthest(points, far, first, chosen, N, count, BLOCK: tl.constexpr):
    """points (B, 3, N); far (B, N) squared distances to the nearest sample, -1 of what is none; chosen (B, count)."""
    b = tl.program_id(0).to(tl.int64)
    x, y, z = points + 3 * b * N, points + (3 * b + 1) * N, points + (3 * b + 2) * N
    far += b * N
    start = tl.load(first + b)
    last = start
    tl.store(chosen + b * count, start)
    for i in range(1, count):
        px, py, pz = tl.load(x + last), tl.load(y + last), tl.load(z + last)
        best = tl.full((BLOCK,), -1, far.dtype.element_ty)
        row = tl.full((BLOCK,), 0, tl.int32)
        for begin in range(0, N, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            there = at < N
            dx = tl.load(x + at, mask=there, other=0) - px
            dy = tl.load(y + at, mask=there, other=0) - py
            dz = tl.load(z + at, mask=there, other=0) - pz
            distance = dx * dx
            distance += dy * dy
            distance += dz * dz
            kept = tl.minimum(tl.load(far + at, mask=there, other=-1), distance)
            tl.store(far + at, kept, mask=there)  # each of these is read again by the thread that wrote it
            better = kept > best  # the lower row stays where both are as far
            best = tl.where(better, kept, best)
            row = tl.where(better, at, row)
        most = tl.max(best, 0)
        lowest = tl.min(tl.where(best == most, row, N), 0)
        last = tl.where(most < 0, start, lowest.to(tl.int64))
        tl.store(chosen + b * count + i, last)


def farthest(points: Tensor, live: Tensor, first: Tensor, count: int, limit: float) -> Tensor:
    """Arguments and result as of `linescan.layers.points._farthest_loop`."""
    batch, length, _ = points.shape
    far = torch.where(live, limit, -1.0).to(points.dtype)
    chosen = first.new_empty(batch, count)
    axes = points.transpose(1, 2).contiguous()
    block = min(BLOCK, triton.next_power_of_2(length))
    # No fused multiply-adds: the distances are those of torch.
    _farthest[(batch,)](
        axes,
        far,
        first,
        chosen,
        length,
        count,
        BLOCK=block,
        num_warps=max(1, min(8, block // 128)),
        enable_fp_fusion=False,
    )
    return chosen
