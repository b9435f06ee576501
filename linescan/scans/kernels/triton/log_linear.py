"""Log-linear attention in Triton, on the chunks of `gla`.

What every chunk adds to the state comes from `gla`. `merge` is the only walk along time: like a counter, it adds the
chunks up in buckets of 1, 2, 4... chunks, and writes those that each chunk reads. `outputs` weighs scores inside the
chunk by their level, and what queries read of each bucket by the bucket's.

Backwards, `asked` gives what each chunk's reading means for the buckets, `part` walks back and takes their gradients
apart, to those of what each chunk added, `outputs` (transposed) gives dv, and `gradients` all else. Only the inputs are
saved.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...ops.log_linear import _full, _per_head
from ...visits import read
from .common import TokenGradient, in_time, rows, visits
from .gla import (
    Chunks,
    _load,
    _load_heads,
    _place,
    _running,
    _segments,
    _store,
    _store_heads,
    merged,
    per_route,
)


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
def _bucket(x, row, n, bucket, channels, columns, BUCKETS: tl.constexpr, DX: tl.constexpr, DY: tl.constexpr):
    """Places and mask of a bucket in x (..., BUCKETS, DX, DY), of which a row has n chunks before this one."""
    at = x + ((row + n) * BUCKETS + bucket) * DX * DY + channels[:, None] * DY + columns[None, :]
    return at, (channels < DX)[:, None] & (columns < DY)[None, :]


@triton.jit
def _outputs(
    q, k, y, g, lam, route, route_batch, states, out, scale, N, H, K, S,
    SHARE: tl.constexpr, DX: tl.constexpr, DY: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BX: tl.constexpr, BY: tl.constexpr, BUCKETS: tl.constexpr, USED: tl.constexpr, WEIGHTS: tl.constexpr,
    TRANSPOSED: tl.constexpr, BY_STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weighed scores @ y + what the decayed queries read of the buckets; TRANSPOSED: and the keys, of the gradients of
    what chunks add, (rows, N, DX, DY)."""
    chunk, row, b, r, head, step = _place(N, H, K, C)
    i = tl.arange(0, C)
    token, read, written, _ = visits(route, route_batch, b, r, step, S)
    columns = tl.program_id(1) * BY + tl.arange(0, BY)
    decay, before, after = _segments(_load_heads(g, b, r, head, token, read), C)
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
        if TRANSPOSED:
            at, mask = _bucket(states, row * N, chunk, 0, channels, columns, 1, DX, DY)
            state = tl.load(at, mask=mask, other=0.0)
            result += tl.dot(keys * tl.exp(after), state, input_precision=PRECISION)
        else:
            queries *= tl.exp(before)
            for bucket in tl.static_range(USED):
                full = (chunk >> bucket) & 1 == 1
                at, mask = _bucket(states, row * (N + 1), chunk, bucket, channels, columns, BUCKETS, DX, DY)
                state = tl.load(at, mask=mask & full, other=0.0)
                weight = _weights(lam, b, r, head, token, read & full, LEVELS + 1 + bucket)
                result += tl.dot(queries * weight, state, input_precision=PRECISION)
    values = _load(y, b, r, head, token, written if TRANSPOSED else read, columns, DY)
    scores *= decay * weights
    if TRANSPOSED:
        scores = tl.trans(scores)
    result += tl.dot(scores, values, input_precision=PRECISION)
    _store(out, b, r, head, step if BY_STEP else token, read if TRANSPOSED else written, columns, result, DY)


@triton.jit
def _asked(
    q, g, lam, grad, route, route_batch, asked, scale, N, H, K, S,
    SHARE: tl.constexpr, DX: tl.constexpr, DY: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BX: tl.constexpr, BY: tl.constexpr, BUCKETS: tl.constexpr, USED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """asked (rows, N, BUCKETS, DX, DY): the gradients of the buckets before each chunk, where not empty, through it."""
    chunk, row, b, r, head, step = _place(N, H, K, C)
    token, read, written, _ = visits(route, route_batch, b, r, step, S)
    channels = tl.program_id(1) * BX + tl.arange(0, BX)
    columns = tl.program_id(2) * BY + tl.arange(0, BY)
    grads = _load(grad, b, r, head, token, written, columns, DY)
    queries = scale * _load(q, b, r, head // SHARE, token, read, channels, DX)
    queries *= tl.exp(_running(_load_heads(g, b, r, head, token, read)))
    for bucket in tl.static_range(USED):
        full = (chunk >> bucket) & 1 == 1
        weight = _weights(lam, b, r, head, token, read & full, LEVELS + 1 + bucket)
        at, mask = _bucket(asked, row * N, chunk, bucket, channels, columns, BUCKETS, DX, DY)
        tl.store(at, tl.dot(tl.trans(queries * weight), grads, input_precision=PRECISION), mask=mask & full)


@triton.jit
def _part(
    asked, kept, entering, edge, leaving, through, N, whole,
    SIZE: tl.constexpr, BUCKETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`merge` backwards: leaving (rows, N, SIZE), the gradient of what each chunk adds; and through (rows, N, blocks),
    the product of the buckets that enter with the gradients of their decayed selves, a share of it.

    edge: gradients of the buckets before chunk `whole`, (rows, BUCKETS, SIZE), or None.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bucket = tl.arange(0, BUCKETS)[:, None]
    real = (at < SIZE)[None, :]
    buckets = tl.zeros((BUCKETS, BLOCK), tl.float32)
    for back in range(0, N + 1):
        n = N - back
        full = ((n >> bucket) & 1 == 1) & real
        if n < N:
            below = (1 << bucket) - 1
            lower_full = n & below == below
            new = tl.sum(tl.where(lower_full & ((n >> bucket) & 1 == 0), buckets, 0.0), 0)
            tl.store(leaving + (row * N + n) * SIZE + at, new, mask=at < SIZE)
            buckets = tl.where(full, tl.where(lower_full, new[None, :], buckets), 0.0)
            before = entering + ((row * (N + 1) + n) * BUCKETS + bucket) * SIZE + at[None, :]
            share = tl.sum(tl.sum(buckets * tl.load(before, mask=full, other=0.0), 1), 0)
            tl.store(through + (row * N + n) * tl.num_programs(1) + tl.program_id(1), share)
            reading = asked + ((row * N + n) * BUCKETS + bucket) * SIZE + at[None, :]
            buckets = tl.load(kept + row * N + n) * buckets + tl.load(reading, mask=full, other=0.0)
        if edge is not None:
            if n == whole:
                last = edge + (row * BUCKETS + bucket) * SIZE + at[None, :]
                buckets += tl.load(last, mask=full, other=0.0)


@triton.jit
def _gradients(
    q, k, v, g, lam, grad, route, route_batch, entering, leaving, through,
    dq, dk, dg, dlam, scale, N, H, K, S, parts, lam_parts,
    SHARE: tl.constexpr, DX: tl.constexpr, DY: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BX: tl.constexpr, BY: tl.constexpr, BUCKETS: tl.constexpr, USED: tl.constexpr, WEIGHTS: tl.constexpr,
    BY_STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of queries and keys, and shares of those of gates and weights, for BX channels."""
    chunk, row, b, r, head, step = _place(N, H, K, C)
    i = tl.arange(0, C)
    token, read, written, _ = visits(route, route_batch, b, r, step, S)
    place = step.to(tl.int64) if BY_STEP else token
    part = tl.program_id(1)
    channels = part * BX + tl.arange(0, BX)
    dscores = tl.zeros((C, C), tl.float32)
    of_key = tl.zeros((C, BX), tl.float32)  # through what the chunk adds
    for first in range(0, DY, BY):
        columns = first + tl.arange(0, BY)
        values = _load(v, b, r, head, token, read, columns, DY)
        grads = _load(grad, b, r, head, token, written, columns, DY)
        at, mask = _bucket(leaving, row * N, chunk, 0, channels, columns, 1, DX, DY)
        of_added = tl.load(at, mask=mask, other=0.0)
        dscores += tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        of_key += tl.dot(values, tl.trans(of_added), input_precision=PRECISION)

    queries = scale * _load(q, b, r, head // SHARE, token, read, channels, DX)
    keys = _load(k, b, r, head // SHARE, token, read, channels, DX)
    gates = _load_heads(g, b, r, head, token, read)
    decay, before, after = _segments(gates, C)
    dscores *= decay
    shares = dscores * tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    weights = tl.zeros((C, C), tl.float32)
    of_query = tl.zeros((C, BX), tl.float32)  # through the buckets
    apart = i[:, None] ^ i[None, :]
    for level in tl.static_range(WEIGHTS):
        of_weight = tl.zeros((C, 1), tl.float32)
        if level <= LEVELS:
            here = apart == 0 if level == 0 else apart >> (level - 1) == 1
            weights += tl.where(here, _weights(lam, b, r, head, token, read, level), 0.0)
            of_weight += tl.sum(tl.where(here, shares, 0.0), 1)[:, None]
        elif level - LEVELS - 1 < USED:
            full = (chunk >> (level - LEVELS - 1)) & 1 == 1
            here = tl.zeros((C, BX), tl.float32)
            for first in range(0, DY, BY):
                columns = first + tl.arange(0, BY)
                grads = _load(grad, b, r, head, token, written & full, columns, DY)
                at, mask = _bucket(
                    entering, row * (N + 1), chunk, level - LEVELS - 1, channels, columns, BUCKETS, DX, DY
                )
                state = tl.load(at, mask=mask & full, other=0.0)
                here += tl.dot(grads, tl.trans(state), input_precision=PRECISION)
            here *= tl.exp(before)
            of_query += here * _weights(lam, b, r, head, token, read & full, level)
            of_weight += tl.sum(here * queries, 1)[:, None]
        start = dlam.data + part.to(tl.int64) * lam_parts + b * dlam.batch + r * dlam.route + head * dlam.group
        out = start + level + place[:, None] * dlam.token
        tl.store(out, of_weight.to(dlam.data.dtype.element_ty), mask=read[:, None])

    # As in gla; the diagonal has no gate.
    dscores *= weights
    diagonal = i[:, None] == i[None, :]
    own = tl.sum(tl.where(diagonal, dscores, 0.0), 1)[:, None]
    dscores = tl.where(diagonal, 0.0, dscores)
    of_query += tl.dot(dscores, keys, input_precision=PRECISION)
    inner_key = tl.dot(tl.trans(dscores), queries, input_precision=PRECISION)
    of_key *= tl.exp(after)
    up = tl.sum(queries * of_query, 1)[:, None]
    down, late = tl.sum(keys * inner_key, 1)[:, None], tl.sum(keys * of_key, 1)[:, None]
    of_gate = _running(up - down, True) + (_running(late) - late)
    if part == 0:
        of_gate += tl.exp(tl.sum(gates, 0))[None, :] * tl.load(through + row * N + chunk)
    _store_heads(dg, part.to(tl.int64) * parts, b, r, head, place, read, of_gate)
    _store(dq, b, r, head, place, read, channels, scale * (of_query + own * keys), DX)
    _store(dk, b, r, head, place, read, channels, inner_key + of_key + own * queries, DX)


# -- on the host ------------------------------------------------------------------------------------------------------


class Buckets(Chunks):
    """One call: its inputs as the kernels take them, and the launches. Arguments as of `Chunks`.

    Args:
        lam: weights (B, K or 1, L, H, levels).
    """

    def __init__(self, q, k, v, g, lam, scale, route):
        super().__init__(q, k, v, g, scale, None, route)
        self.lam = lam
        self.used = (self.chunks - 1).bit_length()  # buckets that a chunk reads
        self.buckets = triton.next_power_of_2(self.chunks.bit_length())
        names = "SHARE", "DX", "DY", "C", "BX", "BY", "PRECISION"
        self.constants = {name: self.common[name] for name in names}
        self.constants |= dict(LEVELS=self.size.bit_length() - 1, BUCKETS=self.buckets, USED=self.used, num_warps=8)
        self.whole = self.steps // self.size  # chunks that are full

    def _walk(self) -> tuple[dict, tuple[int, int]]:
        """Constants and grid of the walks along time."""
        size = self.dk * self.dv
        block = min(256, triton.next_power_of_2(size))
        grid = self.rows, triton.cdiv(size, block)
        return dict(SIZE=size, BUCKETS=self.buckets, BLOCK=block, num_warps=4), grid

    def entering(self) -> tuple[Tensor, Tensor]:
        """The buckets before each chunk and after the last (rows, N + 1, BUCKETS, dk * dv); what chunks keep of one."""
        added, kept = self.added()
        entering = self._new(self.rows, self.chunks + 1, self.buckets, self.dk * self.dv)
        constants, grid = self._walk()
        _merge[grid](added, kept, entering, self.chunks, **constants)
        return entering, kept

    def _outputs(self, y: Tensor, states: Tensor, out, by_step: bool, transposed: bool) -> None:
        _outputs[self._grid(self._blocks[1])](
            rows(self.q), rows(self.k), rows(y), rows(self.g), rows(self.lam), *self.table, states, out, self.scale,
            *self.counts, WEIGHTS=self.lam.shape[-1], TRANSPOSED=transposed, BY_STEP=by_step, **self.constants,
        )  # fmt: skip

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(outputs (B, K, L, H, dv) of that dtype, zero where no step writes; final state)."""
        entering, _ = self.entering()
        out = self.room(dtype)
        self._outputs(self.v, entering, rows(out), False, False)
        table = None if self.route is None else self.route[..., self.whole * self.size :]
        tokens = (self.k, self.v, self.g)
        k, v, g = (x[:, :, self.whole * self.size :] if table is None else read(x, table) for x in tokens)
        return out, self.final_state(k, v, g, entering[:, self.whole])

    def final_state(self, k: Tensor, v: Tensor, g: Tensor, entering: Tensor) -> Tensor:
        """The buckets after the last step (B, K, levels, H, dk, dv): of whole chunks, and of what comes after them.

        Args:
            k, v, g: of the steps after the last whole chunk.
            entering: the buckets before those (rows, BUCKETS, dk * dv).
        """
        k, v, g = (x.float().expand(self.batch, self.routes, *x.shape[2:]) for x in (k, v, g))
        k = _per_head(k, self.heads)
        tail = F.pad(g[:, :, 1:], (0, 0, 0, 1)).flip(2).cumsum(2).flip(2)  # the gates after each step
        k, kept = k * tail.exp()[..., None], g.sum(2).exp()[..., None, None]
        state = k.new_zeros(self.batch, self.routes, self.lam.shape[-1], self.heads, self.dk, self.dv)
        shift, first_step = self.size.bit_length() - 1, self.whole * self.size
        for bit, first in _full(self.steps):
            if bit < shift:
                here = slice(first - first_step, first - first_step + (1 << bit))
                state[:, :, bit] = torch.einsum("bkthd,bkthv->bkhdv", k[:, :, here], v[:, :, here])
            else:
                state[:, :, bit] = kept * entering[:, bit - shift].view(*kept.shape[:3], self.dk, self.dv)
        return state

    def _of_final_state(self, grad: Tensor, entering: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the inputs by name, and of the buckets that enter `final_state`."""
        inputs = [x.detach().requires_grad_() for x in (self.k, self.v, self.g, entering[:, self.whole])]
        with torch.enable_grad():
            k, v, g = (in_time(x, self.route)[:, :, self.whole * self.size :] for x in inputs[:3])
            state = self.final_state(k, v, g, inputs[3])
        *of_tokens, edge = torch.autograd.grad(state, inputs, grad, allow_unused=True, materialize_grads=True)
        return dict(zip(("k", "v", "g"), of_tokens)), edge

    def backward(self, grad: Tensor, grad_state: Tensor | None) -> dict[str, Tensor]:
        """Gradients by name, of the outputs' gradient (B, K or 1, L, H, dv)."""
        entering, kept = self.entering()
        more, edge = ({}, None) if grad_state is None else self._of_final_state(grad_state, entering)
        asked = self._new(self.rows, self.chunks, self.buckets, self.dk, self.dv)
        _asked[self._grid(*self._blocks)](
            rows(self.q), rows(self.g), rows(self.lam), rows(grad), *self.table, asked, self.scale, *self.counts,
            **self.constants,
        )  # fmt: skip
        leaving = self._new(self.rows, self.chunks, self.dk, self.dv)
        constants, grid = self._walk()
        through = self._new(self.rows, self.chunks, grid[1])
        _part[grid](asked, kept, entering, edge, leaving, through, self.chunks, self.whole, **constants)
        parts = self._blocks[0]
        dq, dk = self.gradient_room(self.q), self.gradient_room(self.k)
        dv = TokenGradient(self.v, self.routes, self.route)
        dg, dlam = (TokenGradient(x, self.routes, self.route, parts) for x in (self.g, self.lam))
        self._outputs(grad, leaving, dv.rows, dv.by_step, True)
        _gradients[self._grid(parts)](
            rows(self.q), rows(self.k), rows(self.v), rows(self.g), rows(self.lam), rows(grad), *self.table,
            entering, leaving, through.sum(-1), dq.rows, dk.rows, dg.rows, dlam.rows, self.scale, *self.counts,
            dg.stride, dlam.stride, WEIGHTS=self.lam.shape[-1], BY_STEP=dq.by_step, **self.constants,
        )  # fmt: skip
        found = dict(
            q=self.per_group(dq.finish(), self.q),
            k=self.per_group(dk.finish(), self.k),
            v=dv.finish(),
            g=dg.finish(),
            lam=dlam.finish(),
        )
        return {name: x + more[name] if name in more else x for name, x in found.items()}


def forward(q, k, v, g, lam, scale, initial_state, position, route, merge) -> tuple[Tensor, Tensor]:
    output, state = Buckets(q, k, v, g, lam, scale, route).forward(torch.float32 if merge else q.dtype)
    return merged(output, merge, q.dtype), state


def backward(grad_output, grad_state, q, k, v, g, lam, scale, initial_state, position, route, merge) -> list[Tensor]:
    grads = Buckets(q, k, v, g, lam, scale, route).backward(per_route(grad_output, merge), grad_state)
    found = [grads[name] for name in ("q", "k", "v", "g", "lam")]
    return found if initial_state is None else [*found, torch.zeros_like(initial_state)]
