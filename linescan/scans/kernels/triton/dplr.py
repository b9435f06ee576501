"""Diagonal plus low rank in Triton: `dplr` (and what is made of it, `rwkv7` among others), and the delta rules.

What a token's `a` reads of the state is one row, u, and b writes it back: S = diag(e^g) S + b u^T + k v^T. A route is
cut into chunks, and the rows that a chunk reads solve a triangular system (the WY form). So there are

    solve      u = fixed + by_state @ S of each chunk, S being the state that enters it; all chunks at once
    walk       the only walk along time: from the state to u, and from u to the next state, chunk by chunk
    outputs    what queries read of keys with values v and of b with values u, and of the state that enters

The backward is the same with time reversed. There q writes the outputs' gradient, a writes the gradient of u, and b
reads it, with the same triangular matrix transposed: `solve`, `walk` and `outputs` (for dv) run again, and `gradients`
gives all else. Only the inputs are saved. No kernel adds to memory that another program writes.

In a delta rule b is -k, so that u comes off v (`writer` is None then), and a reads the state after the decay (not
LATE). The inverse of the triangular matrix is made by halving: the square between two halves is a product with the
inverses of both, as exact as substitution. Decays and precision are those of `gla`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...visits import is_permutation, visited
from .common import TokenGradient, rows, visits
from .gla import (
    _across,
    _corner,
    _grow,
    _load,
    _load_heads,
    _place,
    _power,
    _running,
    _segments,
    _store,
    _store_heads,
    merged,
    per_route,
)

CHUNK = 32  # steps that one program takes; a power of two, at least 16
WIDTH = 16  # key channels at a time, except in `walk`, which holds all of them
DEPTH = 32  # value channels at a time; half as many in `walk`


# -- inside a chunk ---------------------------------------------------------------------------------------------------


@triton.jit
def _gates(g, b, r, head, token, read, channels, DX: tl.constexpr, SCALAR: tl.constexpr):
    """Gates of a chunk, (C, channels) or one a head (C, 1)."""
    if SCALAR:
        return _load_heads(g, b, r, head, token, read)
    else:
        return _load(g, b, r, head, token, read, channels, DX)


@triton.jit
def _sums(g, C: tl.constexpr, LEVELS: tl.constexpr):
    """Gates (C, D) summed before each step, after each step, and all of them (1, D)."""
    before, after, total = tl.zeros_like(g), tl.zeros_like(g), g
    for level in tl.static_range(LEVELS):
        before, after, total = _grow(before, after, total, C, g.shape[1], 1 << level)
    return before, after, total


@triton.jit
def _buffer(x, row, chunk, N, channels, D: tl.constexpr, C: tl.constexpr):
    """Places and mask of channels in x (rows, N, C, D)."""
    i = tl.arange(0, C)
    return x + ((row * N + chunk) * C + i[:, None]) * D + channels[None, :], (i >= 0)[:, None] & (channels < D)[None, :]


@triton.jit
def _state(x, row, chunk, N, channels, columns, DX: tl.constexpr, DY: tl.constexpr):
    """Places and mask in states (rows, N, DX, DY)."""
    at = x + (row * N + chunk) * DX * DY + channels[:, None] * DY + columns[None, :]
    return at, (channels < DX)[:, None] & (columns < DY)[None, :]


@triton.jit
def _inverse(lower, C: tl.constexpr, LEVELS: tl.constexpr):
    """(I - the strictly lower part of `lower`)^-1, from blocks of one step to the whole chunk."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    inverse = tl.where(i == j, 1.0, 0.0)
    for level in tl.static_range(LEVELS):
        square = tl.where(_corner(C, 1 << level), lower, 0.0)
        square = tl.dot(tl.dot(inverse, square, input_precision="tf32x3"), inverse, input_precision="tf32x3")
        inverse += square
    return inverse


# -- kernels ----------------------------------------------------------------------------------------------------------
# Arguments that many share:
#     q, a, k, writer, g    Rows of the token inputs; writer: b, or None where that is -k
#     y                 Rows of the values, or for what is reversed of the outputs' gradient
#     by_state          (rows, N, C, DX) float32
#     found             (rows, N, C, DY) float32: what `a` reads, or REVERSED its gradient
#     states            (rows, N, DX, DY) float32: the state that enters each chunk, REVERSED: the gradient that leaves


@triton.jit
def _solve(
    q, a, k, writer, y, g, route, route_batch, by_state, found, scale, N, H, K, S,
    DX: tl.constexpr, DY: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
    SCALAR: tl.constexpr, LATE: tl.constexpr, REVERSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What is found in a chunk that a state enters is `found` + `by_state` @ that state."""
    chunk, row, b, r, head, step = _place(N, H, K, C)
    i = tl.arange(0, C)
    token, read, written, _ = visits(route, route_batch, b, r, step, S)
    lower = tl.zeros((C, C), tl.float32)  # what `a` reads of b
    inner = tl.zeros((C, C), tl.float32)  # what `a` reads of keys; REVERSED: what q reads of b
    for first in range(0, DX, BX):
        channels = first + tl.arange(0, BX)
        gates = _gates(g, b, r, head, token, read, channels, DX, SCALAR)
        asks = _load(a, b, r, head, token, read, channels, DX)
        keys = _load(k if writer is None else writer, b, r, head, token, read, channels, DX)
        if REVERSED:
            queries = scale * _load(q, b, r, head, token, read, channels, DX)
            inner += tl.where(i[:, None] == i[None, :], tl.sum(queries * keys, 1)[:, None], 0.0)
        elif writer is not None:
            others = _load(k, b, r, head, token, read, channels, DX)
        if SCALAR:
            lower += tl.dot(asks, tl.trans(keys), input_precision=PRECISION)
            if REVERSED:
                square = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
                inner += tl.where(i[:, None] == i[None, :], 0.0, square)
        else:
            if REVERSED:
                queries *= tl.exp(gates)
            if not LATE:
                asks *= tl.exp(gates)
            before, after, total = tl.zeros_like(gates), tl.zeros_like(gates), gates
            for level in tl.static_range(LEVELS):
                factor = _across(before, after, C, 1 << level)
                corner = _corner(C, 1 << level)
                square = tl.dot(asks * factor, tl.trans(keys * factor), input_precision=PRECISION)
                lower += tl.where(corner, square, 0.0)
                if REVERSED:
                    square = tl.dot(queries * factor, tl.trans(keys * factor), input_precision=PRECISION)
                    inner += tl.where(corner, square, 0.0)
                elif writer is not None:
                    square = tl.dot(asks * factor, tl.trans(others * factor), input_precision=PRECISION)
                    inner += tl.where(corner, square, 0.0)
                before, after, total = _grow(before, after, total, C, BX, 1 << level)
    if SCALAR:
        decay, _, _ = _segments(_load_heads(g, b, r, head, token, read), C)
        lower *= tl.where(i[:, None] > i[None, :], decay, 0.0)
        inner *= decay
    if writer is None:
        if not REVERSED:
            inner = lower
        else:
            inner = -inner
        lower = -lower
    inverse = _inverse(lower, C, LEVELS)
    if REVERSED:
        inverse, inner = tl.trans(inverse), tl.trans(inner)
    inner = tl.dot(inverse, inner, input_precision=PRECISION)
    for first in range(0, DY, BY):
        columns = first + tl.arange(0, BY)
        values = _load(y, b, r, head, token, written if REVERSED else read, columns, DY)
        at, mask = _buffer(found, row, chunk, N, columns, DY, C)
        tl.store(at, tl.dot(inner, values, input_precision=PRECISION), mask=mask)
    for first in range(0, DX, BX):
        channels = first + tl.arange(0, BX)
        gates = _gates(g, b, r, head, token, read, channels, DX, SCALAR)
        before, after, total = _sums(gates, C, LEVELS)
        if REVERSED:
            reads = _load(k if writer is None else writer, b, r, head, token, read, channels, DX) * tl.exp(after)
            if writer is None:
                reads = -reads
        else:
            reads = _load(a, b, r, head, token, read, channels, DX)
            reads *= tl.exp(before if LATE else before + gates)
        at, mask = _buffer(by_state, row, chunk, N, channels, DX, C)
        tl.store(at, tl.dot(inverse, reads, input_precision=PRECISION), mask=mask)


@triton.jit
def _walk(
    x, other, y, g, route, route_batch, by_state, found, states, edge, last, scale, N, H, K, S,
    DX: tl.constexpr, DY: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
    SCALAR: tl.constexpr, LATE: tl.constexpr, REVERSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunk by chunk, completes `found` and writes `states`. x is what y is written with, other what `found` is.

    edge: (rows, DX, DY), the state that enters the first chunk, or None; last: the one after the last.
    """
    row = tl.program_id(0).to(tl.int64)
    b, r, head = row // (H * K), row // H % K, row % H
    channels = tl.arange(0, BX)
    columns = tl.program_id(1) * BY + tl.arange(0, BY)
    state = tl.zeros((BX, BY), tl.float32)
    if edge is not None:
        begin, there = _state(edge, row, 0, 1, channels, columns, DX, DY)
        state = tl.load(begin, mask=there, other=0.0).to(tl.float32)
    for n in range(0, N):
        chunk = N - 1 - n if REVERSED else n
        at, mask = _state(states, row, chunk, N, channels, columns, DX, DY)
        tl.store(at, state, mask=mask)
        token, read, written, _ = visits(route, route_batch, b, r, chunk * C + tl.arange(0, C), S)
        at, mask = _buffer(by_state, row, chunk, N, channels, DX, C)
        reads = tl.load(at, mask=mask, other=0.0)
        at, mask = _buffer(found, row, chunk, N, columns, DY, C)
        rest = tl.load(at, mask=mask, other=0.0) + tl.dot(reads, state, input_precision=PRECISION)
        tl.store(at, rest, mask=mask)
        values = _load(y, b, r, head, token, written if REVERSED else read, columns, DY)
        gates = _gates(g, b, r, head, token, read, channels, DX, SCALAR)
        before, after, total = _sums(gates, C, LEVELS)
        keys = scale * _load(x, b, r, head, token, read, channels, DX)
        keys *= tl.exp(before + gates if REVERSED else after)
        state *= tl.exp(tl.trans(total))
        if other is None:
            state += tl.dot(tl.trans(keys), values - rest, input_precision=PRECISION)
        else:
            others = _load(other, b, r, head, token, read, channels, DX)
            if REVERSED:
                others *= tl.exp(before if LATE else before + gates)
            else:
                others *= tl.exp(after)
            state += tl.dot(tl.trans(keys), values, input_precision=PRECISION)
            state += tl.dot(tl.trans(others), rest, input_precision=PRECISION)
    end, there = _state(last, row, 0, 1, channels, columns, DX, DY)
    tl.store(end, state, mask=there)


@triton.jit
def _outputs(
    q, a, k, writer, y, g, route, route_batch, states, found, out, scale, N, H, K, S,
    DX: tl.constexpr, DY: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
    SCALAR: tl.constexpr, LATE: tl.constexpr, REVERSED: tl.constexpr, BY_STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What queries read of keys and of b; REVERSED: what keys read of queries and of `a`."""
    chunk, row, b, r, head, step = _place(N, H, K, C)
    i = tl.arange(0, C)
    token, read, written, _ = visits(route, route_batch, b, r, step, S)
    columns = tl.program_id(1) * BY + tl.arange(0, BY)
    diagonal = i[:, None] == i[None, :]
    scores = tl.zeros((C, C), tl.float32)
    second = tl.zeros((C, C), tl.float32)
    result = tl.zeros((C, BY), tl.float32)
    for first in range(0, DX, BX):
        channels = first + tl.arange(0, BX)
        gates = _gates(g, b, r, head, token, read, channels, DX, SCALAR)
        queries = scale * _load(q, b, r, head, token, read, channels, DX)
        keys = _load(k, b, r, head, token, read, channels, DX)
        scores += tl.where(diagonal, tl.sum(queries * keys, 1)[:, None], 0.0)
        if REVERSED:
            others = _load(a, b, r, head, token, read, channels, DX)
            if not LATE and not SCALAR:
                others *= tl.exp(gates)
        elif writer is not None:
            others = _load(writer, b, r, head, token, read, channels, DX)
            second += tl.where(diagonal, tl.sum(queries * others, 1)[:, None], 0.0)
        before, after, total = tl.zeros_like(gates), tl.zeros_like(gates), gates
        if SCALAR:
            before, after, total = _sums(gates, C, LEVELS)
            square = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            scores += tl.where(diagonal, 0.0, square)
            if REVERSED:
                second += tl.dot(others, tl.trans(keys), input_precision=PRECISION)
            queries *= tl.exp(gates)
        else:
            queries *= tl.exp(gates)
            for level in tl.static_range(LEVELS):
                factor = _across(before, after, C, 1 << level)
                corner = _corner(C, 1 << level)
                square = tl.dot(queries * factor, tl.trans(keys * factor), input_precision=PRECISION)
                scores += tl.where(corner, square, 0.0)
                if REVERSED:
                    square = tl.dot(others * factor, tl.trans(keys * factor), input_precision=PRECISION)
                    second += tl.where(corner, square, 0.0)
                elif writer is not None:
                    square = tl.dot(queries * factor, tl.trans(others * factor), input_precision=PRECISION)
                    second += tl.where(corner, square, 0.0)
                before, after, total = _grow(before, after, total, C, BX, 1 << level)
        at, mask = _state(states, row, chunk, N, channels, columns, DX, DY)
        entered = tl.load(at, mask=mask, other=0.0)
        reader = keys * tl.exp(after) if REVERSED else queries * tl.exp(before)
        result += tl.dot(reader, entered, input_precision=PRECISION)
    if SCALAR:
        decay, _, _ = _segments(_load_heads(g, b, r, head, token, read), C)
        scores *= decay
        second *= tl.where(i[:, None] > i[None, :], decay, 0.0)
    values = _load(y, b, r, head, token, written if REVERSED else read, columns, DY)
    at, mask = _buffer(found, row, chunk, N, columns, DY, C)
    rest = tl.load(at, mask=mask, other=0.0)
    if REVERSED:
        scores, second = tl.trans(scores), tl.trans(second)
    if REVERSED or writer is not None:
        result += tl.dot(second, rest, input_precision=PRECISION)
    else:
        values -= rest
    result += tl.dot(scores, values, input_precision=PRECISION)
    place = step.to(tl.int64) if BY_STEP else token
    _store(out, b, r, head, place, read if REVERSED else written, columns, result, DY)


@triton.jit
def _gradients(
    q, a, k, writer, v, grad, g, route, route_batch, states, grad_states, found, grad_found,
    dq, da, dk, dwriter, dg, scale, N, H, K, S, parts,
    DX: tl.constexpr, DY: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
    SCALAR: tl.constexpr, LATE: tl.constexpr, BY_STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of queries, `a`, keys, b (if it is not -k) and gates, for BX channels."""
    chunk, row, b, r, head, step = _place(N, H, K, C)
    i = tl.arange(0, C)
    token, read, written, _ = visits(route, route_batch, b, r, step, S)
    channels = tl.program_id(1) * BX + tl.arange(0, BX)
    qk, ak = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)  # gradients of scores
    qb, ab = qk, qk
    of_query, of_ask = tl.zeros((C, BX), tl.float32), tl.zeros((C, BX), tl.float32)  # through the state that entered
    of_key, of_writer = of_query, of_query  # through the state that leaves
    through = tl.zeros((BX,), tl.float32)  # from the one state to the other, before the decay
    for first in range(0, DY, BY):
        columns = first + tl.arange(0, BY)
        values = _load(v, b, r, head, token, read, columns, DY)
        grads = _load(grad, b, r, head, token, written, columns, DY)
        at, mask = _buffer(found, row, chunk, N, columns, DY, C)
        rest = tl.load(at, mask=mask, other=0.0)
        at, mask = _buffer(grad_found, row, chunk, N, columns, DY, C)
        of_rest = tl.load(at, mask=mask, other=0.0)
        at, mask = _state(states, row, chunk, N, channels, columns, DX, DY)
        entered = tl.load(at, mask=mask, other=0.0)
        at, mask = _state(grad_states, row, chunk, N, channels, columns, DX, DY)
        leaving = tl.load(at, mask=mask, other=0.0)
        if writer is None:
            values -= rest
        else:
            qb += tl.dot(grads, tl.trans(rest), input_precision=PRECISION)
            ab += tl.dot(of_rest, tl.trans(rest), input_precision=PRECISION)
            of_writer += tl.dot(rest, tl.trans(leaving), input_precision=PRECISION)
        qk += tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        ak += tl.dot(of_rest, tl.trans(values), input_precision=PRECISION)
        of_query += tl.dot(grads, tl.trans(entered), input_precision=PRECISION)
        of_ask += tl.dot(of_rest, tl.trans(entered), input_precision=PRECISION)
        of_key += tl.dot(values, tl.trans(leaving), input_precision=PRECISION)
        through += tl.sum(entered * leaving, 1)

    queries = scale * _load(q, b, r, head, token, read, channels, DX)
    asks = _load(a, b, r, head, token, read, channels, DX)
    keys = _load(k, b, r, head, token, read, channels, DX)
    gates = _gates(g, b, r, head, token, read, channels, DX, SCALAR)
    diagonal = i[:, None] == i[None, :]
    own_key = tl.sum(tl.where(diagonal, qk, 0.0), 1)[:, None]
    if writer is not None:
        others = _load(writer, b, r, head, token, read, channels, DX)
        own_writer = tl.sum(tl.where(diagonal, qb, 0.0), 1)[:, None]
    inner_query, inner_ask = tl.zeros((C, BX), tl.float32), tl.zeros((C, BX), tl.float32)
    inner_key, inner_writer = inner_query, inner_query
    if SCALAR:
        before, after, total = _sums(gates, C, LEVELS)
        decay, _, _ = _segments(gates, C)
        decay = tl.where(diagonal, 0.0, decay)
        qk *= decay
        ak *= decay
        inner_query += tl.dot(qk, keys, input_precision=PRECISION)
        inner_ask += tl.dot(ak, keys, input_precision=PRECISION)
        inner_key += tl.dot(tl.trans(qk), queries, input_precision=PRECISION)
        inner_key += tl.dot(tl.trans(ak), asks, input_precision=PRECISION)
    else:
        before, after, total = tl.zeros_like(gates), tl.zeros_like(gates), gates
        here = tl.exp(gates)
        early = asks if LATE else asks * here
        for level in tl.static_range(LEVELS):
            factor = _across(before, after, C, 1 << level)
            corner = _corner(C, 1 << level)
            of_qk, of_ak = tl.where(corner, qk, 0.0), tl.where(corner, ak, 0.0)
            inner_query += factor * tl.dot(of_qk, keys * factor, input_precision=PRECISION)
            inner_ask += factor * tl.dot(of_ak, keys * factor, input_precision=PRECISION)
            square = tl.dot(tl.trans(of_qk), queries * here * factor, input_precision=PRECISION)
            square += tl.dot(tl.trans(of_ak), early * factor, input_precision=PRECISION)
            inner_key += factor * square
            if writer is not None:
                of_qb, of_ab = tl.where(corner, qb, 0.0), tl.where(corner, ab, 0.0)
                inner_query += factor * tl.dot(of_qb, others * factor, input_precision=PRECISION)
                inner_ask += factor * tl.dot(of_ab, others * factor, input_precision=PRECISION)
                square = tl.dot(tl.trans(of_qb), queries * here * factor, input_precision=PRECISION)
                square += tl.dot(tl.trans(of_ab), early * factor, input_precision=PRECISION)
                inner_writer += factor * square
            before, after, total = _grow(before, after, total, C, BX, 1 << level)
        inner_query *= here
        if not LATE:
            inner_ask *= here
    inner_query += of_query * tl.exp(before + gates)
    inner_ask += of_ask * tl.exp(before if LATE else before + gates)
    of_key *= tl.exp(after)

    # As in gla: what reads grows with the gates up to it, what is read inside the chunk falls with those up to it, and
    # what is written to the state that leaves grows with those after it. The diagonal has no gate: it comes later.
    of_ask_gate = asks * inner_ask
    up = queries * inner_query + of_ask_gate
    down, late = keys * inner_key, keys * of_key
    if writer is not None:
        of_writer *= tl.exp(after)
        down += others * inner_writer
        late += others * of_writer
    all_of_it = tl.exp(total) * through[None, :]
    if SCALAR:
        up, down, late = tl.sum(up, 1)[:, None], tl.sum(down, 1)[:, None], tl.sum(late, 1)[:, None]
        all_of_it = tl.sum(all_of_it, 1)[:, None]
    of_gate = _running(up - down, True) + (_running(late) - late) + all_of_it
    if LATE:
        of_gate -= of_ask_gate
    inner_query += own_key * keys
    if writer is not None:
        inner_query += own_writer * others
    place = step.to(tl.int64) if BY_STEP else token
    if SCALAR:  # every block of channels has a share of what a head has one number of
        _store_heads(dg, tl.program_id(1).to(tl.int64) * parts, b, r, head, place, read, of_gate)
    else:
        _store(dg, b, r, head, place, read, channels, of_gate, DX)
    _store(dq, b, r, head, place, read, channels, scale * inner_query, DX)
    _store(da, b, r, head, place, read, channels, inner_ask, DX)
    _store(dk, b, r, head, place, read, channels, inner_key + of_key + own_key * queries, DX)
    if writer is not None:
        _store(dwriter, b, r, head, place, read, channels, inner_writer + of_writer + own_writer * queries, DX)


# -- on the host ------------------------------------------------------------------------------------------------------


class LowRank:
    """One call: its inputs as the kernels take them, and the launches.

    Args:
        q, k, a: (B, K or 1, L, H, dk).
        v: (B, K or 1, L, H, dv).
        b: as a, or None for -k.
        g: (B, K or 1, L, H, dk), or one gate a head (B, K or 1, L, H).
        scale: of the queries.
        initial_state: (B, K, H, dk, dv) or None.
        route: table or None.
        late: `a` reads the state before the token's own decay.
    """

    def __init__(self, q, k, v, a, b, g, scale, initial_state, route, late: bool):
        self.q, self.k, self.v, self.a, self.b, self.g = q, k, v, a, b, g
        self.initial = None if initial_state is None else initial_state.contiguous()
        self.route = None if route is None else route.contiguous()
        tokens = [x for x in (q, k, v, a, b, g) if x is not None]
        self.batch, self.routes, self.length = visited(tokens, route)
        self.heads, self.dk, self.dv = v.shape[3], q.shape[4], v.shape[4]
        self.steps = self.length if route is None else route.shape[-1]
        # `walk` holds all key channels of a chunk: half as many steps of wide heads fit any GPU's shared memory.
        self.size = min(CHUNK if self.dk <= 64 else max(16, CHUNK // 2), _power(self.steps))
        self.chunks = triton.cdiv(self.steps, self.size)
        self.rows = self.batch * self.routes * self.heads
        self.scalar = g.ndim == 4
        self.scale = float(scale)
        self.table = self.route, 0 if route is None or route.ndim == 2 else self.route.stride(0)
        self.counts = self.chunks, self.heads, self.routes, self.steps
        self.bx, self.by = min(WIDTH, _power(self.dk)), min(DEPTH, _power(self.dv))
        self.common = dict(
            DX=self.dk, DY=self.dv, C=self.size, LEVELS=self.size.bit_length() - 1, SCALAR=self.scalar, LATE=late,
            PRECISION="tf32x3" if torch.float32 in (q.dtype, v.dtype) else "tf32",
        )  # fmt: skip
        # The halving of channel gates holds many tiles at once: eight warps and no loads ahead of their turn, so that
        # they stay in registers.
        self.inside = dict(
            BX=self.bx, BY=self.by, **dict(num_warps=4) if self.scalar else dict(num_warps=8, num_stages=1)
        )
        self.tokens = rows(q), rows(a), rows(k), rows(b)

    def _new(self, *shape) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.v.device)

    def _walk(self, first: Tensor | None, grad: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What `a` reads, the states that enter chunks and the last one; with `grad`, the gradients of those."""
        by_state = self._new(self.rows, self.chunks, self.size, self.dk)
        found = self._new(self.rows, self.chunks, self.size, self.dv)
        states = self._new(self.rows, self.chunks, self.dk, self.dv)
        last = self._new(self.batch, self.routes, self.heads, self.dk, self.dv)
        back = dict(REVERSED=grad is not None)
        y, g = rows(self.v if grad is None else grad), rows(self.g)
        _solve[(self.rows * self.chunks,)](
            *self.tokens, y, g, *self.table, by_state, found, self.scale, *self.counts,
            **self.common, **self.inside, **back,
        )  # fmt: skip
        writes = (self.k, self.b, 1.0) if grad is None else (self.q, self.a, self.scale)
        width = max(16, DEPTH // 2)
        _walk[(self.rows, triton.cdiv(self.dv, width))](
            rows(writes[0]), rows(writes[1]), y, g, *self.table, by_state, found, states,
            None if first is None else first.contiguous(), last, writes[2], *self.counts,
            **self.common, BX=_power(self.dk), BY=width, num_warps=4, **back,
        )  # fmt: skip
        return found, states, last

    def _outputs(self, y: Tensor, states: Tensor, found: Tensor, out, by_step: bool, reverse: bool) -> None:
        _outputs[(self.rows * self.chunks, triton.cdiv(self.dv, self.by))](
            *self.tokens, rows(y), rows(self.g), *self.table, states, found, out, self.scale, *self.counts,
            **self.common, **self.inside, REVERSED=reverse, BY_STEP=by_step,
        )  # fmt: skip

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(outputs (B, K, L, H, dv) of that dtype, zero where no step writes; final state)."""
        found, states, last = self._walk(self.initial)
        shape = self.batch, self.routes, self.length, self.heads, self.dv
        whole = self.route is None or is_permutation(self.route, self.length)
        out = (torch.empty if whole else torch.zeros)(shape, dtype=dtype, device=self.v.device)
        self._outputs(self.v, states, found, rows(out), False, False)
        return out, last

    def backward(self, grad: Tensor, grad_state: Tensor | None) -> dict[str, Tensor | None]:
        """Gradients by name, of the outputs' gradient (B, K or 1, L, H, dv)."""
        found, states, _ = self._walk(self.initial)
        grad_found, grad_states, of_initial = self._walk(grad_state, grad)
        parts = triton.cdiv(self.dk, self.bx)
        named = dict(q=self.q, a=self.a, k=self.k, b=self.b, v=self.v)
        to = {name: TokenGradient(x, self.routes, self.route) for name, x in named.items() if x is not None}
        to["g"] = TokenGradient(self.g, self.routes, self.route, parts if self.scalar else 1)
        by_step = to["v"].by_step
        self._outputs(grad, grad_states, grad_found, to["v"].rows, by_step, True)
        places = [to[name].rows if name in to else None for name in ("q", "a", "k", "b", "g")]
        _gradients[(self.rows * self.chunks, parts)](
            *self.tokens, rows(self.v), rows(grad), rows(self.g), *self.table,
            states, grad_states, found, grad_found, *places, self.scale, *self.counts, to["g"].stride,
            **self.common, **self.inside, BY_STEP=by_step,
        )  # fmt: skip
        return {name: x.finish() for name, x in to.items()} | {"initial_state": of_initial}


class Rule(torch.autograd.Function):
    """`LowRank` of a delta rule, as a function that plain torch can stand around.

    Takes (q, k, v, a, g, initial_state), tokens in time order, b being -k; returns outputs (B, K, S, H, dv) in float32
    and the final state.
    """

    @staticmethod
    def _low_rank(q, k, v, a, g, initial_state) -> LowRank:
        return LowRank(q, k, v, a, None, g, 1.0, initial_state, None, late=False)

    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return Rule._low_rank(*tensors).forward(torch.float32)

    @staticmethod
    def backward(ctx, grad, grad_state):
        grads = Rule._low_rank(*ctx.saved_tensors).backward(grad, grad_state)
        named = zip(("q", "k", "v", "a", "g", "initial_state"), ctx.saved_tensors)
        return tuple(grads[name].to(x.dtype) for name, x in named)


def forward(*args) -> tuple[Tensor, Tensor]:
    *inputs, merge = args
    q = inputs[0]
    output, state = LowRank(*inputs, late=True).forward(torch.float32 if merge else q.dtype)
    return merged(output, merge, q.dtype), state


def backward(grad_output, grad_state, *args) -> list[Tensor]:
    *inputs, merge = args
    q, k, v, a, b, g, _, initial_state, _ = inputs
    grads = LowRank(*inputs, late=True).backward(per_route(grad_output, merge), grad_state)
    given = dict(q=q, k=k, v=v, a=a, b=b, g=g, initial_state=initial_state)
    return [grads[name].to(x.dtype) for name, x in given.items() if x is not None]
