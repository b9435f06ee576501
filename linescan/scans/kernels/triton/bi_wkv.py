"""WKV in Triton: Bi-WKV (Vision-RWKV), a sum over the past and one over the future of every token; and WKV of RWKV-4
(`wkv4`), which is the past alone.

Time is cut into tiles of a few steps, and the kernels take all tiles of all routes and channels at once:

    totals    the sum of each tile, as the past of what follows and as the future of what comes before
    carry     the only walk along time: from totals to the sums that enter each tile from either side, in place
    read      walks a tile backwards, keeping the future of each of its steps in registers, then forwards with the past

A sum is (x, y, top): two parts, relative to e^top with top the largest exponent in it, so no exponential overflows.

The backward is of the same form. With Z_t the denominator of token t and o_t its output, the gradients of numerator and
denominator are go_t / Z_t and -go_t o_t / Z_t, so what key and value of token j get are sums to both sides over t with
the keys -log Z_t and the parts go_t and -go_t o_t. Outputs and log Z are computed again. The decay's gradient takes,
at every step, the past of the one kind times the future of the other: all pairs of tokens that the step stands between.
With the past alone (CAUSAL) outputs read sums of one side, and gradients those of the other. All kernels are linear in
time, and no program adds to what another one writes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...visits import is_permutation, visited
from .common import TokenGradient, channels_of, load_row, place, rows, store_row, visit
from .gla import merged, per_route

TILE = 16  # steps whose sums stay in registers
TILE_BACKWARD = 8  # as many registers go to half as many steps of sums and adjoints
LANES = 32  # channels of a program, which is one warp
EMPTY = tl.constexpr(-1e38)  # the top of a sum without terms


# -- kernels ----------------------------------------------------------------------------------------------------------
# Arguments that many share:
#     k, v, grad        Rows of keys, values and the outputs' gradient
#     w, u              (K, D) float32
#     again             (2, B, K, S, D) float32: outputs and log denominators in time order, or None
#     sums, adjoints    (B, K, tiles, 6, D) float32: (x, y, top) of the past, then of the future; CAUSAL: (B, K, tiles,
#                       3, D), sums of the past and adjoints of the future
#     table, batch      the route's pointer or None, and the stride of its batch axis


@triton.jit
def _add(x, y, top, key, new_x, new_y, w):
    """A sum one token later: decayed by e^-w, and with that token in it."""
    new = tl.maximum(top - w, key)
    keep, add = tl.exp(top - w - new), tl.exp(key - new)
    return keep * x + add * new_x, keep * y + add * new_y, new


@triton.jit
def _token(k, v, table, b, r, step, S, channels, real):
    """(key, value, 1) of a step; padding has key 0, and what comes after the last step the weight of nothing."""
    token, is_token, _, inside = visit(table, step, S)
    key = load_row(k, place(k, b, r, 0, channels), token, real & is_token)
    value = load_row(v, place(v, b, r, 0, channels), token, real & is_token)
    return tl.where(inside, key, EMPTY), value


@triton.jit
def _adjoint(grad, again, half, table, b, r, row, step, S, D, channels, real):
    """The same of a step in the backward: (-log Z, go, -go o)."""
    token, _, written, inside = visit(table, step, S)
    go = load_row(grad, place(grad, b, r, 0, channels), token, real & written)
    at = again + (row * S + step) * D + channels
    output = tl.load(at, mask=real & inside, other=0.0)
    log_z = tl.load(at + half, mask=real & inside, other=0.0)
    return tl.where(inside, -log_z, EMPTY), go, -go * output


@triton.jit
def _sum_at(sums, row, tiles, tile, side, D, channels, real, CAUSAL: tl.constexpr):
    at = sums + (row * tiles + tile) * (3 if CAUSAL else 6) * D + 3 * side * D + channels
    return (
        tl.load(at, mask=real, other=0.0),
        tl.load(at + D, mask=real, other=0.0),
        tl.load(at + 2 * D, mask=real, other=EMPTY),
    )


@triton.jit
def _put_sum(sums, row, tiles, tile, side, D, channels, real, x, y, top, CAUSAL: tl.constexpr):
    at = sums + (row * tiles + tile) * (3 if CAUSAL else 6) * D + 3 * side * D + channels
    tl.store(at, x, mask=real)
    tl.store(at + D, y, mask=real)
    tl.store(at + 2 * D, top, mask=real)


@triton.jit
def _totals(
    k, v, grad, again, half, w, route, route_batch, sums, S, K, D, tiles,
    TILE: tl.constexpr, LANES: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Of the tokens, or with `grad` of their adjoints."""
    tile, b, r, channels, real = channels_of(tiles, K, D, LANES)
    row = b * K + r
    table = None if route is None else route + b * route_batch + r * S
    decay = tl.load(w + r * D + channels, mask=real, other=0.0)
    zero = tl.zeros((LANES,), tl.float32)
    past_x, past_y, past_top = zero, zero, zero + EMPTY
    next_x, next_y, next_top = zero, zero, zero + EMPTY
    for i in tl.static_range(TILE):
        step = tile * TILE + i
        if grad is None:
            key, x = _token(k, v, table, b, r, step, S, channels, real)
            y = zero + 1
        else:
            key, x, y = _adjoint(grad, again, half, table, b, r, row, step, S, D, channels, real)
        if not CAUSAL or grad is None:
            past_x, past_y, past_top = _add(past_x, past_y, past_top, key, x, y, tl.where(step < S, decay, 0.0))
        if not CAUSAL or grad is not None:
            next_x, next_y, next_top = _add(next_x, next_y, next_top, key - i * decay, x, y, 0.0)
    if not CAUSAL or grad is None:
        _put_sum(sums, row, tiles, tile, 0, D, channels, real, past_x, past_y, past_top, CAUSAL)
    if not CAUSAL or grad is not None:
        side = 0 if CAUSAL else 1
        _put_sum(sums, row, tiles, tile, side, D, channels, real, next_x, next_y, next_top, CAUSAL)


@triton.jit
def _carry(
    sums, first, last, w, S, K, D, tiles,
    TILE: tl.constexpr, LANES: tl.constexpr, CAUSAL: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """From what each tile holds to what enters it: the past from before, or for odd programs the future from behind;
    CAUSAL: only the one, or REVERSED the other, from the sum `first` on, with what comes after all tiles in `last`.

    first, last: (B, K, 3, D) or None.
    """
    side = tl.program_id(1)
    _, b, r, channels, real = channels_of(1, K, D, LANES)
    row = b * K + r
    decay = tl.load(w + r * D + channels, mask=real, other=0.0)
    x, y = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    top = x + EMPTY
    if first is not None:
        x, y, top = _sum_at(first, row, 1, 0, 0, D, channels, real, True)
    for n in range(0, tiles):
        tile = tl.where((side == 0) and not REVERSED, n, tiles - 1 - n)
        tile_x, tile_y, tile_top = _sum_at(sums, row, tiles, tile, side, D, channels, real, CAUSAL)
        _put_sum(sums, row, tiles, tile, side, D, channels, real, x, y, top, CAUSAL)
        decayed = top - tl.minimum(TILE, S - tile * TILE) * decay
        new = tl.maximum(decayed, tile_top)
        keep, add = tl.exp(decayed - new), tl.exp(tile_top - new)
        x, y, top = keep * x + add * tile_x, keep * y + add * tile_y, new
    if last is not None:
        _put_sum(last, row, 1, 0, 0, D, channels, real, x, y, top, True)


@triton.jit
def _read(
    k, v, w, u, route, route_batch, sums, out, again, half, S, K, D, tiles,
    TILE: tl.constexpr, LANES: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Writes those of out and again that are not None."""
    tile, b, r, channels, real = channels_of(tiles, K, D, LANES)
    row = b * K + r
    table = None if route is None else route + b * route_batch + r * S
    decay = tl.load(w + r * D + channels, mask=real, other=0.0)
    bonus = tl.load(u + r * D + channels, mask=real, other=0.0)

    tokens = ()  # both walks need them
    futures = ()
    if not CAUSAL:
        for i in tl.static_range(TILE):
            tokens = tokens + (_token(k, v, table, b, r, tile * TILE + i, S, channels, real),)
        x, y, top = _sum_at(sums, row, tiles, tile, 1, D, channels, real, CAUSAL)
        for i in tl.static_range(TILE):
            futures = ((x, y, top),) + futures
            key, value = tokens[TILE - 1 - i]
            x, y, top = _add(x, y, top, key, value, 1.0, decay)

    x, y, top = _sum_at(sums, row, tiles, tile, 0, D, channels, real, CAUSAL)
    for i in tl.static_range(TILE):
        step = tile * TILE + i
        if CAUSAL:
            key, value = _token(k, v, table, b, r, step, S, channels, real)
        else:
            key, value = tokens[i]
        most = tl.maximum(top, key + bonus)
        if not CAUSAL:
            next_x, next_y, next_top = futures[i]
            most = tl.maximum(most, next_top)
        before, own = tl.exp(top - most), tl.exp(key + bonus - most)
        den, num = before * y + own, before * x + own * value
        if not CAUSAL:
            after = tl.exp(next_top - most)
            den, num = den + after * next_y, num + after * next_x
        output = num / den
        token, _, written, inside = visit(table, step, S)
        if out is not None:
            store_row(out, place(out, b, r, 0, channels), token, real & written, output)
        if again is not None:
            at = again + (row * S + step) * D + channels
            tl.store(at, output, mask=real & inside)
            tl.store(at + half, most + tl.log(den), mask=real & inside)
        x, y, top = _add(x, y, top, key, value, 1.0, decay)


@triton.jit
def _gradients(
    k, v, grad, again, half, w, u, route, route_batch, sums, adjoints, dk, dv, dw, du, S, K, D, tiles,
    BY_STEP: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dw and du (B, K, tiles, D) hold the share of every tile."""
    tile, b, r, channels, real = channels_of(tiles, K, D, LANES)
    row = b * K + r
    table = None if route is None else route + b * route_batch + r * S
    decay = tl.load(w + r * D + channels, mask=real, other=0.0)
    bonus = tl.load(u + r * D + channels, mask=real, other=0.0)

    FUTURE: tl.constexpr = 0 if CAUSAL else 1  # the side where a row of adjoints has it
    of_x, of_y, of_top = _sum_at(adjoints, row, tiles, tile, FUTURE, D, channels, real, CAUSAL)
    if not CAUSAL:
        x, y, top = _sum_at(sums, row, tiles, tile, 1, D, channels, real, CAUSAL)
    tokens = ()  # both walks need them
    of_tokens = ()
    for i in tl.static_range(TILE):
        step = tile * TILE + i
        tokens = tokens + (_token(k, v, table, b, r, step, S, channels, real),)
        of_tokens = of_tokens + (_adjoint(grad, again, half, table, b, r, row, step, S, D, channels, real),)
    futures = ()
    for i in tl.static_range(TILE):
        step = tile * TILE + TILE - 1 - i
        if CAUSAL:
            futures = ((of_x, of_y, of_top),) + futures
        else:
            futures = ((of_x, of_y, of_top, x, y, top),) + futures
            key, value = tokens[TILE - 1 - i]
            x, y, top = _add(x, y, top, key, value, 1.0, decay)
        key, go, other = of_tokens[TILE - 1 - i]
        of_x, of_y, of_top = _add(of_x, of_y, of_top, key, go, other, tl.where(step < S, decay, 0.0))

    x, y, top = _sum_at(sums, row, tiles, tile, 0, D, channels, real, CAUSAL)
    if not CAUSAL:
        of_x, of_y, of_top = _sum_at(adjoints, row, tiles, tile, 0, D, channels, real, CAUSAL)
    of_decay, of_bonus = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    for i in tl.static_range(TILE):
        step = tile * TILE + i
        of_next_x, of_next_y, of_next_top = futures[i][0], futures[i][1], futures[i][2]
        key, value = tokens[i]
        log_weight, go, other = of_tokens[i]
        after, own = tl.exp(key + of_next_top), tl.exp(key + bonus + log_weight)
        of_value = after * of_next_x + own * go
        through = after * of_next_y + own * other  # the denominators
        passed = tl.exp(top + of_next_top - decay) * (x * of_next_x + y * of_next_y)
        if not CAUSAL:
            next_x, next_y, next_top = futures[i][3], futures[i][4], futures[i][5]
            before = tl.exp(key + of_top)
            of_value += before * of_x
            through += before * of_y
            passed += tl.exp(next_top + of_top - decay) * (next_x * of_x + next_y * of_y)
        of_bonus += own * (value * go + other)
        of_decay -= tl.where(step < S, passed, 0.0)
        token, is_token, _, _ = visit(table, step, S)
        at = tl.cast(step, tl.int64) if BY_STEP else token
        store_row(dk, place(dk, b, r, 0, channels), at, real & is_token, value * of_value + through)
        store_row(dv, place(dv, b, r, 0, channels), at, real & is_token, of_value)
        x, y, top = _add(x, y, top, key, value, 1.0, decay)
        if not CAUSAL:
            of_x, of_y, of_top = _add(of_x, of_y, of_top, log_weight, go, other, decay)
    tl.store(dw + (row * tiles + tile) * D + channels, of_decay, mask=real)
    tl.store(du + (row * tiles + tile) * D + channels, of_bonus, mask=real)


# -- on the host ------------------------------------------------------------------------------------------------------


class Tiles:
    """One call of Bi-WKV, or `causal` of WKV: its inputs as the kernels take them, and the launches.

    Sums that enter and leave a call are (B, K, 3, D): x, y, top.
    """

    def __init__(self, k, v, w, u, route, tile: int, causal: bool = False):
        self.k, self.v, self.w, self.u = k, v, w.float().contiguous(), u.float().contiguous()
        self.batch, self.routes, self.length = visited((k, v), route)
        self.route = None if route is None else route.contiguous()
        self.table = self.route, 0 if route is None or route.ndim == 2 else self.route.stride(0)
        self.steps, self.channels = self.length if route is None else route.shape[-1], k.shape[-1]
        self.tiles = triton.cdiv(self.steps, tile)
        self.counts = self.steps, self.routes, self.channels, self.tiles
        self.programs = self.batch * self.routes * triton.cdiv(self.channels, LANES)
        self.sides = 1 if causal else 2
        self.common = dict(TILE=tile, LANES=LANES, CAUSAL=causal, num_warps=1)

    def _new(self, *shape) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.k.device)

    def _sums(self, first=None, grad=None, again=None, half=0) -> tuple[Tensor, Tensor | None]:
        """What enters every tile from its sides; and causal, what leaves the last one."""
        sums = self._new(self.batch, self.routes, self.tiles, 3 * self.sides, self.channels)
        last = self._new(self.batch, self.routes, 3, self.channels) if self.sides == 1 else None
        _totals[(self.programs * self.tiles,)](
            rows(self.k), rows(self.v), rows(grad), again, half, self.w, *self.table, sums, *self.counts, **self.common
        )
        reverse = self.sides == 1 and grad is not None
        _carry[(self.programs, self.sides)](sums, first, last, self.w, *self.counts, REVERSED=reverse, **self.common)
        return sums, last

    def _read(self, sums, out, again, half) -> None:
        _read[(self.programs * self.tiles,)](
            rows(self.k), rows(self.v), self.w, self.u, *self.table, sums, rows(out), again, half, *self.counts,
            **self.common,
        )  # fmt: skip

    def forward(self, dtype: torch.dtype, first: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Outputs (B, K, L, D), zero where no step writes; and causal, the sum after the last step."""
        whole = self.route is None or is_permutation(self.route, self.length)
        shape = self.batch, self.routes, self.length, self.channels
        out = (torch.empty if whole else torch.zeros)(shape, dtype=dtype, device=self.k.device)
        sums, last = self._sums(first)
        self._read(sums, out, None, 0)
        return out, last

    def backward(self, grad: Tensor, first: Tensor | None = None, grad_last: Tensor | None = None) -> tuple:
        """Gradients of k, v, w, u; and causal, the adjoints that arrive before the first step, and the gradient of the
        last top that is none of the terms' (None without `grad_last`).

        first: the sum before the first step. grad_last: the gradient of the sum after the last one.
        """
        sums, last = self._sums(first)
        again = self._new(2, self.batch, self.routes, self.steps, self.channels)
        half = again.stride(0)
        self._read(sums, None, again, half)
        behind = of_top = None
        if grad_last is not None:  # relative to e^-top, gradients of the parts are adjoints behind the last step
            (x, y, top), (of_x, of_y, of_top) = last.unbind(2), grad_last.unbind(2)
            behind, of_top = torch.stack((of_x, of_y, -top), 2), of_top - of_x * x - of_y * y
        adjoints, ahead = self._sums(behind, grad, again, half)
        dk, dv = (TokenGradient(x, self.routes, self.route) for x in (self.k, self.v))
        dw, du = (self._new(self.batch, self.routes, self.tiles, self.channels) for _ in range(2))
        _gradients[(self.programs * self.tiles,)](
            rows(self.k), rows(self.v), rows(grad), again, half, self.w, self.u, *self.table, sums, adjoints,
            dk.rows, dv.rows, dw, du, *self.counts, BY_STEP=dk.by_step, **self.common,
        )  # fmt: skip
        return dk.finish(), dv.finish(), dw.sum((0, 2)), du.sum((0, 2)), ahead, of_top


def forward(k, v, w, u, route, merge):
    output, _ = Tiles(k, v, w, u, route, TILE).forward(torch.float32 if merge else k.dtype)
    return merged(output, merge, k.dtype), None


def backward(grad_output, grad_state, k, v, w, u, route, merge):
    dk, dv, dw, du, *_ = Tiles(k, v, w, u, route, TILE_BACKWARD).backward(per_route(grad_output, merge))
    return [dk, dv, dw.to(w.dtype), du.to(u.dtype)]
