"""Log-linear attention in Triton, forward, on the chunks of `gla`; its backward is the chunked form's.

What every chunk adds to the state comes from `gla`. `merge` is the only walk along time: like a counter, it adds the
chunks up in buckets of 1, 2, 4... chunks, and writes those that each chunk reads. `outputs` weighs scores inside the
chunk by their level, and what queries read of each bucket by the bucket's.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...ops.log_linear import _full, _per_head
from ...visits import read
from .common import rows, visit
from .gla import Chunks, _load, _load_heads, _place, _segments, _store, merged


@triton.jit
def _merge(added, kept, entering, N, SIZE: tl.constexpr, BUCKETS: tl.constexpr, BLOCK: tl.constexpr):
    """entering (rows, N + 1, BUCKETS, SIZE): the buckets before each chunk and after the last, where not empty.

    Bucket b holds 2^b chunks, or is empty, by bit b of the number of chunks before.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bucket = tl.arange(0, BUCKETS)[:, None]
    buckets = tl.zeros((BUCKETS, BLOCK), tl.float32)
    for n in range(0, N + 1):
        out = entering + ((row * (N + 1) + n) * BUCKETS + bucket) * SIZE + at[None, :]
        full = (n >> bucket) & 1 == 1
        tl.store(out, buckets, mask=full & (at < SIZE)[None, :])
        more = n < N
        new = tl.load(added + (row * N + n) * SIZE + at, mask=(at < SIZE) & more, other=0.0)
        buckets *= tl.load(kept + row * N + n, mask=more, other=0.0)
        below = (1 << bucket) - 1  # as in adding 1 to n: the full buckets at the low end merge into the next one
        lower_full = n & below == below
        new += tl.sum(tl.where(lower_full & full, buckets, 0.0), 0)
        buckets = tl.where(lower_full, tl.where(full, 0.0, new[None, :]), buckets)


@triton.jit
def _weights(lam, b, r, head, at, real, level):
    """The weights of one level: (C, 1)."""
    start = lam.data + b * lam.batch + r * lam.route + head * lam.group + level
    return tl.load(start + at * lam.token, mask=real, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _outputs(
    q, k, v, g, lam, route, route_batch, entering, out, scale, N, H, K, S,
    SHARE: tl.constexpr, DX: tl.constexpr, DY: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BX: tl.constexpr, BY: tl.constexpr, BUCKETS: tl.constexpr, USED: tl.constexpr, WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Weighed scores @ v + what the decayed queries read of the buckets."""
    chunk, row, b, r, head = _place(N, H, K)
    i = tl.arange(0, C)
    table = None if route is None else route + b * route_batch + r * S
    token, read, written, _ = visit(table, chunk * C + i, S)
    columns = tl.program_id(1) * BY + tl.arange(0, BY)
    decay, before, _ = _segments(_load_heads(g, b, r, head, token, read), C)
    weights = tl.zeros((C, C), tl.float32)
    apart = i[:, None] ^ i[None, :]
    for level in tl.static_range(min(LEVELS + 1, WEIGHTS)):  # there may be no more than a short sequence needs
        here = apart == 0 if level == 0 else apart >> (level - 1) == 1
        weights += tl.where(here, _weights(lam, b, r, head, token, read, level), 0.0)
    scores = tl.zeros((C, C), tl.float32)
    result = tl.zeros((C, BY), tl.float32)
    for first in range(0, DX, BX):
        channels = first + tl.arange(0, BX)
        queries = scale * _load(q, b, r, head // SHARE, token, read, channels, DX)
        keys = _load(k, b, r, head // SHARE, token, read, channels, DX)
        scores += tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        queries *= tl.exp(before)
        for bucket in tl.static_range(USED):
            full = (chunk >> bucket) & 1 == 1
            at = entering + ((row * (N + 1) + chunk) * BUCKETS + bucket) * DX * DY
            at = at + channels[:, None] * DY + columns[None, :]
            mask = (channels < DX)[:, None] & (columns < DY)[None, :] & full
            state = tl.load(at, mask=mask, other=0.0)
            weight = _weights(lam, b, r, head, token, read & full, LEVELS + 1 + bucket)
            result += tl.dot(queries * weight, state, input_precision=PRECISION)
    values = _load(v, b, r, head, token, read, columns, DY)
    result += tl.dot(scores * decay * weights, values, input_precision=PRECISION)
    _store(out, b, r, head, token, written, columns, result, DY)


def _final_state(chunks: Chunks, entering: Tensor, levels: int) -> Tensor:
    """The buckets after the last step (B, K, levels, H, dk, dv): of whole chunks, and of what comes after them."""
    size, steps = chunks.size, chunks.steps
    whole = steps // size
    table = chunks.route
    if table is None:
        last = [x[:, :, whole * size :] for x in (chunks.k, chunks.v, chunks.g)]
    else:
        last = [read(x, table[..., whole * size :]) for x in (chunks.k, chunks.v, chunks.g)]
    k, v, g = (x.float().expand(chunks.batch, chunks.routes, *x.shape[2:]) for x in last)
    k = _per_head(k, chunks.heads)
    tail = F.pad(g[:, :, 1:], (0, 0, 0, 1)).flip(2).cumsum(2).flip(2)  # the gates after each step
    k, kept = k * tail.exp()[..., None], g.sum(2).exp()[..., None, None]
    state = k.new_zeros(chunks.batch, chunks.routes, levels, chunks.heads, chunks.dk, chunks.dv)
    shift = size.bit_length() - 1
    for bit, first in _full(steps):
        if bit < shift:
            here = slice(first - whole * size, first - whole * size + (1 << bit))
            state[:, :, bit] = torch.einsum("bkthd,bkthv->bkhdv", k[:, :, here], v[:, :, here])
        else:
            state[:, :, bit] = kept * entering[:, whole, bit - shift].view(*kept.shape[:3], chunks.dk, chunks.dv)
    return state


def forward(q, k, v, g, lam, scale, initial_state, position, route, merge) -> tuple[Tensor, Tensor]:
    chunks = Chunks(q, k, v, g, scale, None, route)
    added, kept = chunks.added()
    used = chunks.chunks.bit_length()
    buckets = triton.next_power_of_2(used)
    entering = torch.empty(
        chunks.rows, chunks.chunks + 1, buckets, chunks.dk * chunks.dv, dtype=torch.float32, device=v.device
    )
    block = min(256, triton.next_power_of_2(chunks.dk * chunks.dv))
    _merge[(chunks.rows, triton.cdiv(chunks.dk * chunks.dv, block))](
        added, kept, entering, chunks.chunks, SIZE=chunks.dk * chunks.dv, BUCKETS=buckets, BLOCK=block, num_warps=4
    )
    out = chunks.room(torch.float32 if merge else q.dtype)
    constants = {name: chunks.common[name] for name in ("SHARE", "DX", "DY", "C", "BX", "BY", "PRECISION")}
    _outputs[(chunks.rows * chunks.chunks, triton.cdiv(chunks.dv, chunks.by))](
        rows(q), rows(k), rows(v), rows(g), rows(lam), *chunks.table, entering, rows(out), chunks.scale,
        *chunks.counts, LEVELS=chunks.size.bit_length() - 1, BUCKETS=buckets, USED=(chunks.chunks - 1).bit_length(),
        WEIGHTS=lam.shape[-1], **constants, num_warps=8,
    )  # fmt: skip
    return merged(out, merge, q.dtype), _final_state(chunks, entering, lam.shape[-1])
