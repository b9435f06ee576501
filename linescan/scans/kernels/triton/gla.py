"""Gated linear attention and its relatives in Triton: `gla`, `simple_gla`, `ssd`, and (from `wkv`) `wkv6`.

A route is cut into chunks of `CHUNK` steps, and every kernel takes all chunks of all routes, heads and samples at once:

    states      what each chunk adds to the state (dk, dv), from its keys and values: one matrix product
    carry       the only walk along time: state = decay * state + added, elementwise, chunk by chunk, in place
    outputs     scores inside the chunk times values, plus queries times the state that enters the chunk

Backwards the same three run with the roles of (k, v) and (q, output gradient) exchanged and time reversed: `states` and
`carry` give the gradient R of the state that leaves each chunk, `outputs` (transposed) gives dv, and `gradients` gives
dq, dk and the gates'. Only the inputs are saved; states are computed again. No kernel adds to memory that another
program writes, so results are the same in every run.

Scores under a gate a channel come by halving, as in `linescan.scans.chunks.decayed_scores`: across the boundary between
two halves, the decay is a factor of the query times a factor of the key. Gates are only ever added: no exponent is
positive, and a gate of -inf is as good as any other.

All arithmetic is float32. Products run on tensor cores: in three TF32 parts for float32 inputs, which keeps float32's
digits; in one TF32 part under half precision, which has more digits than the inputs and the range of float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...visits import is_permutation, visited
from .common import TokenGradient, rows, visits

CHUNK = 64  # steps that one program takes, half as many in float32; a power of two, at least 32
WIDTH = 32  # key channels at a time
DEPTH = 64  # value channels at a time


# -- inside a chunk ---------------------------------------------------------------------------------------------------


@triton.jit
def _place(N, H, K, C: tl.constexpr):
    """(chunk, row, sample, route, head, steps) of this program; a row is (sample, route, head) as one index."""
    chunk = tl.program_id(0) % N
    row = (tl.program_id(0) // N).to(tl.int64)
    return chunk, row, row // (H * K), row // H % K, row % H, chunk * C + tl.arange(0, C)


@triton.jit
def _load(x, b, k, head, at, real, channels, D: tl.constexpr):
    """Rows `at` of a head of x, a Rows, as (C, channels) in float32; zeros where not `real`."""
    start = x.data + b * x.batch + k * x.route + head * x.group
    mask = real[:, None] & (channels < D)[None, :]
    return tl.load(start + at[:, None] * x.token + channels[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(x, b, k, head, at, real, channels, value, D: tl.constexpr):
    start = x.data + b * x.batch + k * x.route + head * x.group
    mask = real[:, None] & (channels < D)[None, :]
    tl.store(start + at[:, None] * x.token + channels[None, :], value.to(x.data.dtype.element_ty), mask=mask)


@triton.jit
def _load_heads(x, b, k, head, at, real):
    """Numbers of a head, x with the heads as channels: (C, 1)."""
    start = x.data + b * x.batch + k * x.route + head
    return tl.load(start + at * x.token, mask=real, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _store_heads(x, part, b, k, head, at, real, value):
    start = x.data + part + b * x.batch + k * x.route + head
    tl.store(start + at[:, None] * x.token, value.to(x.data.dtype.element_ty), mask=real[:, None])


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
def _running(x, REVERSE: tl.constexpr = False):
    """Sums of x (C, D) up to and with each row, or from it on."""
    if x.shape[1] == 1:
        return tl.cumsum(tl.sum(x, 1), 0, reverse=REVERSE)[:, None]
    else:
        return tl.cumsum(x, 0, reverse=REVERSE)


@triton.jit
def _segments(g, C: tl.constexpr):
    """Gates of a head (C, 1) -> the decays from each step to each later one (C, C), 1 to itself and 0 to earlier ones;
    and the sums of gates from the chunk's start to each step and from after it to the end, (C, 1)."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    sums = tl.cumsum(tl.where(i > j, g, 0.0), 0)
    last = tl.sum(tl.where(i > j, g, 0.0), 0)
    return tl.where(i >= j, tl.exp(sums), 0.0), _running(g), tl.reshape(last, (C, 1))


@triton.jit
def _states(
    x, y, g, weight, route, route_batch, added, kept, scale, N, H, K, S,
    SHARE: tl.constexpr, DX: tl.constexpr, DY: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
    SCALAR: tl.constexpr, STEPWISE: tl.constexpr, LATE: tl.constexpr, REVERSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """added (rows, N, DX, DY): the sum of decayed x y^T of every chunk; kept (rows, N, DX or 1): its decay of a state.

    x decays to the chunk's end, or REVERSED to its start (in which case y is an output's gradient).
    """
    chunk, row, b, k, head, step = _place(N, H, K, C)
    i = tl.arange(0, C)
    token, read, written, inside = visits(route, route_batch, b, k, step, S)
    channels = tl.program_id(1) * BX + tl.arange(0, BX)
    columns = tl.program_id(2) * BY + tl.arange(0, BY)
    values = _load(y, b, k, head, token, written if REVERSED else read, columns, DY)
    keys = scale * _load(x, b, k, head // SHARE, token, read, channels, DX)

    # The sums leave out the token itself (but for the query of an inclusive gate): gates one step on or back.
    SHIFT: tl.constexpr = (-1 if LATE else 0) if REVERSED else 1
    here = (i + SHIFT >= 0) & (i + SHIFT < C)
    near_step = tl.maximum(step + SHIFT, 0)
    near, near_read, _, near_inside = visits(route, route_batch, b, k, near_step, S)
    if SCALAR:
        if weight is not None and not REVERSED:
            keys *= _load_heads(weight, b, k, head, step, inside)
        if STEPWISE:
            gates = _load_heads(g, b, k, head, step, inside)
            shifted = _load_heads(g, b, k, head, near_step, near_inside & here)
        else:
            gates = _load_heads(g, b, k, head, token, read)
            shifted = _load_heads(g, b, k, head, near, near_read & here)
    else:
        gates = _load(g, b, k, head, token, read, channels, DX)
        shifted = _load(g, b, k, head, near, near_read & here, channels, DX)
    keys *= tl.exp(_running(shifted, not REVERSED))

    out = added + (row * N + chunk) * DX * DY + channels[:, None] * DY + columns[None, :]
    mask = (channels < DX)[:, None] & (columns < DY)[None, :]
    tl.store(out, tl.dot(tl.trans(keys), values, input_precision=PRECISION), mask=mask)
    if tl.program_id(2) == 0:
        total = tl.exp(tl.sum(gates, 0))
        if SCALAR:
            tl.store(kept + row * N + chunk, tl.sum(total, 0))  # the same from every block of channels
        else:
            tl.store(kept + (row * N + chunk) * DX + channels, total, mask=channels < DX)


@triton.jit
def _carry(
    states, kept, first, last, N,
    DX: tl.constexpr, DY: tl.constexpr, BLOCK: tl.constexpr, SCALAR: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """In place, states (rows, N, DX, DY): from what a chunk adds to the state that enters it (or REVERSED: leaves)."""
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
    q, k, y, g, bonus, weight, route, route_batch, states, out, scale, N, H, K, S,
    SHARE: tl.constexpr, DX: tl.constexpr, DY: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BX: tl.constexpr, BY: tl.constexpr, SCALAR: tl.constexpr, STEPWISE: tl.constexpr, LATE: tl.constexpr,
    TRANSPOSED: tl.constexpr, BY_STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores @ y + (decayed q) @ states; TRANSPOSED: scores^T @ y + (decayed k) @ states."""
    chunk, row, b, r, head, step = _place(N, H, K, C)
    i = tl.arange(0, C)
    token, read, written, inside = visits(route, route_batch, b, r, step, S)
    columns = tl.program_id(1) * BY + tl.arange(0, BY)
    scores = tl.zeros((C, C), tl.float32)
    result = tl.zeros((C, BY), tl.float32)
    if SCALAR:
        gates = _load_heads(g, b, r, head, step if STEPWISE else token, inside if STEPWISE else read)
        decay, before, after = _segments(gates, C)
    for first in range(0, DX, BX):
        channels = first + tl.arange(0, BX)
        queries = scale * _load(q, b, r, head // SHARE, token, read, channels, DX)
        keys = _load(k, b, r, head // SHARE, token, read, channels, DX)
        if SCALAR:
            if weight is not None:
                keys *= _load_heads(weight, b, r, head, step, inside)
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
            states + (row * N + chunk) * DX * DY + channels[:, None] * DY + columns[None, :],
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
    _store(out, b, r, head, step if BY_STEP else token, read if TRANSPOSED else written, columns, result, DY)


@triton.jit
def _gradients(
    q, k, v, g, bonus, weight, grad, route, route_batch, states, grad_states,
    dq, dk, dg, dbonus, dweight, scale, N, H, K, S, parts,
    SHARE: tl.constexpr, DX: tl.constexpr, DY: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BX: tl.constexpr, BY: tl.constexpr, SCALAR: tl.constexpr, STEPWISE: tl.constexpr, LATE: tl.constexpr,
    BY_STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of queries, keys, gates, and where there are any, of bonus and weights; for BX channels."""
    chunk, row, b, r, head, step = _place(N, H, K, C)
    i = tl.arange(0, C)
    token, read, written, inside = visits(route, route_batch, b, r, step, S)
    channels = tl.program_id(1) * BX + tl.arange(0, BX)
    dscores = tl.zeros((C, C), tl.float32)
    of_query = tl.zeros((C, BX), tl.float32)  # through the state that entered
    of_key = tl.zeros((C, BX), tl.float32)  # through the state that leaves
    through = tl.zeros((BX,), tl.float32)  # from the one state to the other, before the decay
    for first in range(0, DY, BY):
        columns = first + tl.arange(0, BY)
        values = _load(v, b, r, head, token, read, columns, DY)
        grads = _load(grad, b, r, head, token, written, columns, DY)
        at = (row * N + chunk) * DX * DY + channels[:, None] * DY + columns[None, :]
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
        if weight is not None:
            keys = raw_keys * _load_heads(weight, b, r, head, step, inside)
        total = _load_heads(g, b, r, head, step if STEPWISE else token, inside if STEPWISE else read)
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
    of_gate = _running(up - down, True) + (_running(late) - late) + all_of_it
    if LATE:
        of_gate -= up
        factor = tl.load(bonus + (r * H + head) * DX + channels, mask=channels < DX, other=0.0)[None, :]
        of_bonus = tl.sum(own * queries * keys, 0)
        tl.store(dbonus + (row * N + chunk) * DX + channels, of_bonus, mask=channels < DX)
        own *= factor
    of_query += inner_query + own * keys
    of_key += inner_key + own * queries
    place = step.to(tl.int64) if BY_STEP else token
    if SCALAR:
        # Every block of channels has a share of what a head has one number of.
        part = tl.program_id(1).to(tl.int64) * parts
        at = step if STEPWISE else place
        _store_heads(dg, part, b, r, head, at, inside if STEPWISE else read, of_gate)
        if weight is not None:
            _store_heads(dweight, part, b, r, head, step, inside, tl.sum(of_key * raw_keys, 1)[:, None])
            of_key *= _load_heads(weight, b, r, head, step, inside)
    else:
        _store(dg, b, r, head, place, read, channels, of_gate, DX)
    _store(dq, b, r, head, place, read, channels, scale * of_query, DX)
    _store(dk, b, r, head, place, read, channels, of_key, DX)


# -- on the host ------------------------------------------------------------------------------------------------------


def _power(size: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(size))


class Chunks:
    """One call: its inputs as the kernels take them, and the launches.

    Args:
        q, k: (B, K or 1, L, G, dk), shared by neighbouring heads where G < H.
        v: (B, K or 1, L, H, dv).
        g: (B, K or 1, L, H, dk), or one gate a head (B, K or 1, L, H).
        scale: of the queries.
        initial_state: (B, K, H, dk, dv) or None.
        route: table or None.
        bonus: (K, H, dk) float32, with which a query reads the state before its own token (WKV of RWKV-6), or None.
        weight: of the keys (B, K, S, H) float32, or None.
        stepwise: g is (B, K, S, H), in time order, as `weight` always is.
    """

    def __init__(self, q, k, v, g, scale, initial_state, route, bonus=None, weight=None, stepwise=False):
        self.q, self.k, self.v, self.g, self.bonus, self.weight = q, k, v, g, bonus, weight
        self.initial = None if initial_state is None else initial_state.contiguous()
        self.route = None if route is None else route.contiguous()
        self.batch, self.routes, self.length = visited((q, k, v, g), route)
        self.heads, self.dk, self.dv = v.shape[3], q.shape[4], v.shape[4]
        self.steps = self.length if route is None else route.shape[-1]
        exact = torch.float32 in (q.dtype, k.dtype, v.dtype)
        # Three-part products take three times the registers; and float32 tokens twice the traffic, as do then states.
        self.size = min(max(CHUNK // 2, 16) if exact else CHUNK, _power(self.steps))
        self.chunks = triton.cdiv(self.steps, self.size)
        self.rows = self.batch * self.routes * self.heads
        self.bx, self.by = min(WIDTH, _power(self.dk)), min(DEPTH, _power(self.dv))
        self.scalar = g.ndim == 4
        self.scale = float(scale)
        route_batch = 0 if route is None or route.ndim == 2 else self.route.stride(0)
        self.table = self.route, route_batch
        self.counts = self.chunks, self.heads, self.routes, self.steps
        precision = "tf32x3" if exact else "tf32"
        self.common = dict(
            SHARE=self.heads // q.shape[3], DX=self.dk, DY=self.dv, C=self.size, BX=self.bx, BY=self.by,
            SCALAR=self.scalar, STEPWISE=stepwise, LATE=bonus is not None, PRECISION=precision,
        )  # fmt: skip
        # The halving of channel gates holds many tiles at once: eight warps, so that they stay in registers.
        self.inside = dict(LEVELS=self.size.bit_length() - 1, num_warps=4 if self.scalar else 8)
        self.stepwise = stepwise

    def _new(self, *shape, dtype=torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.v.device)

    def _grid(self, *widths) -> tuple[int, ...]:
        return (self.rows * self.chunks, *widths)

    @property
    def _blocks(self) -> tuple[int, int]:
        return triton.cdiv(self.dk, self.bx), triton.cdiv(self.dv, self.by)

    def added(self, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What each chunk adds to the state (rows, N, dk, dv), or with `grad` to its gradient, and its decay of one."""
        states = self._new(self.rows, self.chunks, self.dk, self.dv)
        kept = self._new(self.rows, self.chunks, 1 if self.scalar else self.dk)
        x, y, scale = (self.k, self.v, 1.0) if grad is None else (self.q, grad, self.scale)
        _states[self._grid(*self._blocks)](
            rows(x), rows(y), rows(self.g), rows(self.weight), *self.table, states, kept, scale, *self.counts,
            **self.common, REVERSED=grad is not None, num_warps=4,
        )  # fmt: skip
        return states, kept

    def _states(self, first: Tensor | None, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The state that enters every chunk and the last one; with `grad`, gradients of what leaves, and the first."""
        states, kept = self.added(grad)
        last = self._new(self.batch, self.routes, self.heads, self.dk, self.dv)
        block = min(256, _power(self.dk * self.dv))
        _carry[(self.rows, triton.cdiv(self.dk * self.dv, block))](
            states, kept, None if first is None else first.contiguous(), last, self.chunks,
            DX=self.dk, DY=self.dv, BLOCK=block, SCALAR=self.scalar, REVERSED=grad is not None, num_warps=2,
        )  # fmt: skip
        return states, last

    def _outputs(self, y: Tensor, states: Tensor, out, by_step: bool, transposed: bool) -> None:
        _outputs[self._grid(self._blocks[1])](
            rows(self.q), rows(self.k), rows(y), rows(self.g), self.bonus, rows(self.weight), *self.table, states, out,
            self.scale, *self.counts, **self.common, **self.inside, TRANSPOSED=transposed, BY_STEP=by_step,
        )  # fmt: skip

    def room(self, dtype: torch.dtype) -> Tensor:
        """Room for outputs (B, K, L, H, dv), zero where no step writes."""
        shape = self.batch, self.routes, self.length, self.heads, self.dv
        whole = self.route is None or is_permutation(self.route, self.length)
        return (torch.empty if whole else torch.zeros)(shape, dtype=dtype, device=self.v.device)

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(outputs (B, K, L, H, dv) of that dtype, zero where no step writes; final state)."""
        states, last = self._states(self.initial)
        out = self.room(dtype)
        self._outputs(self.v, states, rows(out), False, False)
        return out, last

    def gradient_room(self, x: Tensor) -> TokenGradient:
        """Room for the gradient of q or k, one for each head."""
        if self.common["SHARE"] > 1:
            x = x.new_empty(1, dtype=torch.float32).expand(*x.shape[:3], self.heads, self.dk)
        return TokenGradient(x, self.routes, self.route)

    def per_group(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of x, q or k, from that of every head."""
        return grad.unflatten(3, (x.shape[3], -1)).sum(4).to(x.dtype) if self.common["SHARE"] > 1 else grad

    def backward(self, grad: Tensor, grad_state: Tensor | None) -> dict[str, Tensor]:
        """Gradients by name, of the outputs' gradient (B, K or 1, L, H, dv)."""
        states, _ = self._states(self.initial)
        grad_states, of_initial = self._states(grad_state, grad)
        parts = self._blocks[0]
        dq, dk = self.gradient_room(self.q), self.gradient_room(self.k)
        dv = TokenGradient(self.v, self.routes, self.route)
        dg = TokenGradient(self.g, self.routes, None if self.stepwise else self.route, parts if self.scalar else 1)
        dweight = None if self.weight is None else TokenGradient(self.weight, self.routes, None, parts)
        dbonus = None if self.bonus is None else self._new(self.batch, self.routes, self.heads, self.chunks, self.dk)
        self._outputs(grad, grad_states, dv.rows, dv.by_step, True)
        _gradients[self._grid(parts)](
            rows(self.q), rows(self.k), rows(self.v), rows(self.g), self.bonus, rows(self.weight), rows(grad),
            *self.table, states, grad_states, dq.rows, dk.rows, dg.rows, dbonus,
            None if dweight is None else dweight.rows, self.scale, *self.counts, dg.stride,
            **self.common, **self.inside, BY_STEP=dq.by_step,
        )  # fmt: skip
        return dict(
            q=self.per_group(dq.finish(), self.q),
            k=self.per_group(dk.finish(), self.k),
            v=dv.finish(),
            g=dg.finish(),
            initial_state=of_initial,
            bonus=None if dbonus is None else dbonus.sum((0, 3)),
            weight=None if dweight is None else dweight.finish(),
        )


class Scan(torch.autograd.Function):
    """`Chunks`, one number a head and step, as a function that plain torch can stand around.

    Takes arguments of `Chunks`, (q, k, v, g, weight, initial_state, scale, route) with g and weight in time order, and
    returns the outputs (B, K, L, H, dv), in grid order and float32, and the final state.
    """

    @staticmethod
    def _chunks(q, k, v, g, weight, initial_state, scale, route) -> Chunks:
        return Chunks(q, k, v, g, scale, initial_state, route, weight=weight, stepwise=True)

    @staticmethod
    def forward(ctx, *args):
        *tensors, ctx.scale, route = args
        ctx.save_for_backward(*tensors, route)
        return Scan._chunks(*args).forward(torch.float32)

    @staticmethod
    def backward(ctx, grad, grad_state):
        *tensors, route = ctx.saved_tensors
        grads = Scan._chunks(*tensors, ctx.scale, route).backward(grad, grad_state)
        named = zip(("q", "k", "v", "g", "weight", "initial_state"), tensors)
        return *(None if x is None else grads[name].to(x.dtype) for name, x in named), None, None


# -- implementations --------------------------------------------------------------------------------------------------


def merged(output: Tensor, merge: bool, dtype: torch.dtype) -> Tensor:
    return (output.sum(1) if merge else output).to(dtype)


def per_route(grad: Tensor, merge: bool) -> Tensor:
    """The outputs' gradient with a route axis; with `merge`, one that all routes share."""
    return grad.unsqueeze(1) if merge else grad


def forward(*args):
    *inputs, route, merge = args
    q = inputs[0]
    output, state = Chunks(*inputs, route).forward(torch.float32 if merge else q.dtype)
    return merged(output, merge, q.dtype), state


def backward(grad_output, grad_state, *args):
    *inputs, route, merge = args
    initial_state = inputs[-1]
    grads = Chunks(*inputs, route).backward(per_route(grad_output, merge), grad_state)
    tokens = [grads[name] for name in ("q", "k", "v", "g")]
    return tokens if initial_state is None else [*tokens, grads["initial_state"].to(initial_state.dtype)]
