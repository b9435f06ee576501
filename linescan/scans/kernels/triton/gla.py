"""Gated linear attention and its relatives in Triton: `gla`, `simple_gla`, `ssd`, and (from `wkv`) `wkv6`.

A route is cut into chunks of `CHUNK` steps, and every kernel takes all chunks of all routes, heads and samples at once:

    states      what each chunk adds to the state (dk, dv), from its keys and values: one matrix product
    carry       the only walk along time: state = decay * state + added, elementwise, chunk by chunk, in place
    outputs     scores inside the chunk times values, plus queries times the state that enters the chunk

Backwards the same three run with the roles of (k, v) and (q, output gradient) exchanged and time reversed: `states` and
`carry` give the gradient R of the state that leaves each chunk, `outputs` (transposed) gives dv, and `gradients` gives
dq, dk and the gates'. Only the inputs are saved; states are computed again. No kernel adds to memory that another
program writes, so results are the same in every run.

Scores under a gate a channel come by halving, as in `linescan.scans.gla.decayed_scores`: across the boundary between
two halves, the decay is a factor of the query times a factor of the key. Gates are only ever added: no exponent is
positive, and a gate of -inf is as good as any other.

All arithmetic is float32. Products run on tensor cores: in three TF32 parts for float32 inputs, which keeps float32's
digits; in one TF32 part under half precision, which has more digits than the inputs and the range of float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...gla import _gla, _simple_gla
from .common import Steps, add_visits, fits, start, tokens, visit

CHUNK = 64  # steps that one program takes; a power of two, at least 16
WIDTH = 32  # key channels at a time
DEPTH = 64  # value channels at a time


# -- inside a chunk ---------------------------------------------------------------------------------------------------


@triton.jit
def _place(N, H, K):
    """(chunk, row, sample, route, head) of this program; a row is (sample, route, head) as one index."""
    chunk, row = tl.program_id(0) % N, tl.program_id(0) // N
    return chunk, row, row // (H * K), row // H % K, row % H


@triton.jit
def _load(x, b, k, head, at, read, channels, D: tl.constexpr):
    """Rows `at` of a head of x (pointer, strides of sample, route and token) in float32, zeros where not `read`."""
    rows = start(x, b, k) + head * D + at.to(tl.int64)[:, None] * x[3] + channels[None, :]
    return tl.load(rows, mask=read[:, None] & (channels < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _load_scalars(x, b, k, head, at, read):
    """The same for one number a head: (C, 1)."""
    return tl.load(start(x, b, k) + head + at.to(tl.int64) * x[3], mask=read, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _corner(C: tl.constexpr, SIZE: tl.constexpr):
    """Where, in blocks of two halves of SIZE, a query of the right half meets a key of the left one: (C, C) bools."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (i // (2 * SIZE) == j // (2 * SIZE)) & (i // SIZE % 2 == 1) & (j // SIZE % 2 == 0)


@triton.jit
def _grow(before, after, total, C: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr):
    """Gates summed inside blocks of SIZE -> inside blocks of 2 SIZE.

    before, after (C, D): from the block's start to a token, and from after it to the block's end. total (C / SIZE, D).
    """
    PAIRS: tl.constexpr = C // (2 * SIZE)
    right = tl.arange(0, 2)[None, :, None]
    halves = tl.reshape(total, (PAIRS, 2, D))
    of_left, of_right = tl.sum(tl.where(right == 0, halves, 0.0), 1), tl.sum(tl.where(right == 1, halves, 0.0), 1)
    left_sum, right_sum = of_left[:, None, None, :], of_right[:, None, None, :]
    right = right[:, :, :, None]
    before = tl.reshape(before, (PAIRS, 2, SIZE, D)) + tl.where(right == 1, left_sum, 0.0)
    after = tl.reshape(after, (PAIRS, 2, SIZE, D)) + tl.where(right == 0, right_sum, 0.0)
    return tl.reshape(before, (C, D)), tl.reshape(after, (C, D)), of_left + of_right


@triton.jit
def _across(before, after, C: tl.constexpr, SIZE: tl.constexpr):
    """The decay between each token and the boundary of its two halves of SIZE: (C, D) factors in [0, 1]."""
    right = tl.arange(0, C)[:, None] // SIZE % 2 == 1
    return tl.exp(tl.where(right, before, after))


@triton.jit
def _segments(g, C: tl.constexpr):
    """Gates of a head (C, 1) -> the decay from each step to each later one (C, C), 0 where it is not later; and the sums
    from the chunk's start to each step and from after it to the end, (C, 1)."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    sums = tl.cumsum(tl.where(i > j, g, 0.0), 0)
    last = tl.sum(tl.where(i > j, g, 0.0), 0)
    return tl.where(i >= j, tl.exp(sums), 0.0), tl.cumsum(g, 0), tl.reshape(last, (C, 1))


@triton.jit
def _states(
    x, y, g, weight, route, added, kept, scale, N, H, K, S,
    SHARE: tl.constexpr, DX: tl.constexpr, DY: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
    SCALAR: tl.constexpr, LATE: tl.constexpr, REVERSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """added (rows, N, DX, DY): the sum of decayed x y^T of every chunk; kept (rows, N, DX or 1): its decay of a state.

    x decays to the chunk's end, or REVERSED to its start (in which case y is an output's gradient).
    """
    chunk, row, b, k, head = _place(N, H, K)
    i = tl.arange(0, C)
    step = chunk * C + i
    token, read, written = visit(route, b, k, step, S)
    channels = tl.program_id(1) * BX + tl.arange(0, BX)
    columns = tl.program_id(2) * BY + tl.arange(0, BY)
    values = _load(y, b, k, head, token, written if REVERSED else read, columns, DY)
    keys = scale * _load(x, b, k, head // SHARE, token, read, channels, DX)

    # The sums leave out the token itself (but for the query of an inclusive gate): gates one step on or back.
    SHIFT: tl.constexpr = (-1 if LATE else 0) if REVERSED else 1
    inside = (i + SHIFT >= 0) & (i + SHIFT < C)
    if SCALAR:
        if weight[0] is not None:
            if not REVERSED:
                keys *= _load_scalars(weight, b, k, head, step, step < S)
        gates = _load_scalars(g, b, k, head, step, step < S)
        shifted = _load_scalars(g, b, k, head, step + SHIFT, inside & (step + SHIFT < S))
    else:
        gates = _load(g, b, k, head, token, read, channels, DX)
        if SHIFT == 0:
            shifted = gates
        else:
            near, near_read, _ = visit(route, b, k, step + SHIFT, S)
            shifted = _load(g, b, k, head, near, near_read & inside, channels, DX)
    keys *= tl.exp(tl.cumsum(shifted, 0, reverse=not REVERSED))

    out = added + (row.to(tl.int64) * N + chunk) * DX * DY + channels[:, None] * DY + columns[None, :]
    mask = (channels < DX)[:, None] & (columns < DY)[None, :]
    tl.store(out, tl.dot(tl.trans(keys), values, input_precision=PRECISION), mask=mask)
    if tl.program_id(2) == 0:
        total = tl.exp(tl.sum(gates, 0))
        if SCALAR:
            one = tl.arange(0, 1)
            tl.store(kept + row.to(tl.int64) * N + chunk + one, total, mask=(tl.program_id(1) == 0) & (one == 0))
        else:
            tl.store(kept + (row.to(tl.int64) * N + chunk) * DX + channels, total, mask=channels < DX)


@triton.jit
def _carry(
    states, kept, first, last, N,
    DX: tl.constexpr, DY: tl.constexpr, BLOCK: tl.constexpr, SCALAR: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """In place, states (rows, N, DX, DY): from what every chunk adds to the state that enters it (REVERSED: leaves it)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < DX * DY
    state = tl.zeros((BLOCK,), tl.float32)
    if first is not None:
        state = tl.load(first + row * DX * DY + at, mask=mask, other=0.0).to(tl.float32)
    for n in range(0, N):
        chunk = row * N + (N - 1 - n if REVERSED else n)
        here = states + chunk * DX * DY + at
        decay = tl.load(kept + chunk) if SCALAR else tl.load(kept + chunk * DX + at // DY, mask=mask, other=0.0)
        added = tl.load(here, mask=mask, other=0.0)
        tl.store(here, state, mask=mask)
        state = decay * state + added
    tl.store(last + row * DX * DY + at, state, mask=mask)


@triton.jit
def _outputs(
    q, k, y, g, bonus, weight, route, states, out, scale, N, H, K, S,
    SHARE: tl.constexpr, DX: tl.constexpr, DY: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BX: tl.constexpr, BY: tl.constexpr,
    SCALAR: tl.constexpr, LATE: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores @ y + (decayed q) @ states; TRANSPOSED: scores^T @ y + (decayed k) @ states."""
    chunk, row, b, r, head = _place(N, H, K)
    i = tl.arange(0, C)
    step = chunk * C + i
    token, read, written = visit(route, b, r, step, S)
    columns = tl.program_id(1) * BY + tl.arange(0, BY)
    scores = tl.zeros((C, C), tl.float32)
    result = tl.zeros((C, BY), tl.float32)
    if SCALAR:
        decay, before, after = _segments(_load_scalars(g, b, r, head, step, step < S), C)
    for first in range(0, DX, BX):
        channels = first + tl.arange(0, BX)
        queries = scale * _load(q, b, r, head // SHARE, token, read, channels, DX)
        keys = _load(k, b, r, head // SHARE, token, read, channels, DX)
        if SCALAR:
            if weight[0] is not None:
                keys *= _load_scalars(weight, b, r, head, step, step < S)
            scores += tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        else:
            total = _load(g, b, r, head, token, read, channels, DX)
            before = tl.zeros((C, BX), tl.float32) if LATE else total
            after = tl.zeros((C, BX), tl.float32)
            own = queries * keys
            if LATE:
                own *= tl.load(bonus + (r * H + head) * DX + channels, mask=channels < DX, other=0.0)[None, :]
            scores += tl.where(i[:, None] == i[None, :], tl.sum(own, 1)[:, None], 0.0)
            for level in tl.static_range(LEVELS):
                factor = _across(before, after, C, 1 << level)
                square = tl.dot(queries * factor, tl.trans(keys * factor), input_precision=PRECISION)
                scores += tl.where(_corner(C, 1 << level), square, 0.0)
                before, after, total = _grow(before, after, total, C, BX, 1 << level)
        entered = tl.load(
            states + (row.to(tl.int64) * N + chunk) * DX * DY + channels[:, None] * DY + columns[None, :],
            mask=(channels < DX)[:, None] & (columns < DY)[None, :],
            other=0.0,
        )
        reader = keys * tl.exp(after) if TRANSPOSED else queries * tl.exp(before)
        result += tl.dot(reader, entered, input_precision=PRECISION)
    if SCALAR:
        scores *= decay
    values = _load(y, b, r, head, token, written if TRANSPOSED else read, columns, DY)
    if TRANSPOSED:
        scores = tl.trans(scores)
    result += tl.dot(scores, values, input_precision=PRECISION)
    _store(out, b, r, head, token, step, read if TRANSPOSED else written, columns, result, DY)


@triton.jit
def _store(x, b, k, head, token, step, mask, channels, value, D: tl.constexpr):
    """Writes rows of a head to x (pointer, strides, whether rows are steps rather than tokens)."""
    at = tl.where(x[4] == 1, step, token).to(tl.int64)
    rows = start(x, b, k) + head * D + at[:, None] * x[3] + channels[None, :]
    tl.store(rows, value, mask=mask[:, None] & (channels < D)[None, :])


@triton.jit
def _gradients(
    q, k, v, g, bonus, weight, grad, route, states, grad_states,
    dq, dk, dg, dbonus, dweight, scale, N, H, K, S,
    SHARE: tl.constexpr, DX: tl.constexpr, DY: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BX: tl.constexpr, BY: tl.constexpr, SCALAR: tl.constexpr, LATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of queries, keys, gates, and where there are any, of bonus and weights; for BX channels."""
    chunk, row, b, r, head = _place(N, H, K)
    i = tl.arange(0, C)
    step = chunk * C + i
    token, read, written = visit(route, b, r, step, S)
    channels = tl.program_id(1) * BX + tl.arange(0, BX)
    dscores = tl.zeros((C, C), tl.float32)
    of_query = tl.zeros((C, BX), tl.float32)  # through the state that entered
    of_key = tl.zeros((C, BX), tl.float32)  # through the state that leaves
    through = tl.zeros((BX,), tl.float32)  # from the one state to the other, before the decay
    for first in range(0, DY, BY):
        columns = first + tl.arange(0, BY)
        values = _load(v, b, r, head, token, read, columns, DY)
        grads = _load(grad, b, r, head, token, written, columns, DY)
        at = (row.to(tl.int64) * N + chunk) * DX * DY + channels[:, None] * DY + columns[None, :]
        mask = (channels < DX)[:, None] & (columns < DY)[None, :]
        entered, leaving = tl.load(states + at, mask=mask, other=0.0), tl.load(grad_states + at, mask=mask, other=0.0)
        dscores += tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        of_query += tl.dot(grads, tl.trans(entered), input_precision=PRECISION)
        of_key += tl.dot(values, tl.trans(leaving), input_precision=PRECISION)
        through += tl.sum(entered * leaving, 1)

    queries = scale * _load(q, b, r, head // SHARE, token, read, channels, DX)
    raw_keys = _load(k, b, r, head // SHARE, token, read, channels, DX)
    keys = raw_keys
    diagonal = i[:, None] == i[None, :]
    own = tl.sum(tl.where(diagonal, dscores, 0.0), 1)[:, None]
    if SCALAR:
        if weight[0] is not None:
            keys = raw_keys * _load_scalars(weight, b, r, head, step, step < S)
        total = _load_scalars(g, b, r, head, step, step < S)
        decay, before, after = _segments(total, C)
        total = tl.sum(total, 0)[None, :]
        decayed = tl.where(diagonal, 0.0, dscores * decay)
        inner_query = tl.dot(decayed, keys, input_precision=PRECISION)
        inner_key = tl.dot(tl.trans(decayed), queries, input_precision=PRECISION)
    else:
        total = _load(g, b, r, head, token, read, channels, DX)
        before = tl.zeros((C, BX), tl.float32) if LATE else total
        after = tl.zeros((C, BX), tl.float32)
        inner_query, inner_key = tl.zeros((C, BX), tl.float32), tl.zeros((C, BX), tl.float32)
        for level in tl.static_range(LEVELS):
            factor = _across(before, after, C, 1 << level)
            corner = tl.where(_corner(C, 1 << level), dscores, 0.0)
            inner_query += factor * tl.dot(corner, keys * factor, input_precision=PRECISION)
            inner_key += factor * tl.dot(tl.trans(corner), queries * factor, input_precision=PRECISION)
            before, after, total = _grow(before, after, total, C, BX, 1 << level)
    of_query *= tl.exp(before)
    of_key *= tl.exp(after)

    # A score and a query's share of the state grow with exp of the gates up to the query; a score falls with those up
    # to the key, and the key's share of the state grows with those after it. The diagonal has no gate: it comes later.
    up, down, late = queries * (inner_query + of_query), keys * inner_key, keys * of_key
    all_of_it = tl.exp(total) * through[None, :]
    if SCALAR:
        up, down, late = tl.sum(up, 1)[:, None], tl.sum(down, 1)[:, None], tl.sum(late, 1)[:, None]
        all_of_it = tl.sum(all_of_it, 1)[:, None]
    of_gate = tl.cumsum(up - down, 0, reverse=True) + (tl.cumsum(late, 0) - late) + all_of_it
    if LATE:
        of_gate -= up
        factor = tl.load(bonus + (r * H + head) * DX + channels, mask=channels < DX, other=0.0)[None, :]
        of_bonus = tl.sum(own * queries * keys, 0)
        tl.store(dbonus + (row.to(tl.int64) * N + chunk) * DX + channels, of_bonus, mask=channels < DX)
        own *= factor
    of_query += inner_query + own * keys
    of_key += inner_key + own * queries
    if SCALAR:
        # Every block of channels has a part of these: an axis of its own, to be summed.
        at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) // N + row) * S + step[:, None]
        tl.store(dg + at, of_gate, mask=(step < S)[:, None])
        if weight[0] is not None:
            tl.store(dweight + at, tl.sum(of_key * raw_keys, 1)[:, None], mask=(step < S)[:, None])
            of_key *= _load_scalars(weight, b, r, head, step, step < S)
    else:
        _store(dg, b, r, head, token, step, read, channels, of_gate, DX)
    _store(dq, b, r, head, token, step, read, channels, scale * of_query, DX)
    _store(dk, b, r, head, token, step, read, channels, of_key, DX)
