"""The selective scan in Triton: serial in time, parallel over samples, routes and channels.

A program is one warp. It owns a block of channels of one route of one sample, keeps their N states in registers as
float32, and walks through time T steps at a time: the rows of T steps are asked for at once (that many loads in flight
hide the latency of memory), then stepped through. So each of u, delta and z is read once and y written once, whatever
the route; B and C are read once for a block of channels rather than once a channel.

Exponentials go through the special function units, 16 a cycle of a multiprocessor. With 16 states a token and channel
thus takes a cycle at least: by arithmetic, 1.3 TB/s of bf16 u, delta and y on an H200, less than its memory gives. With
one state, memory is the limit. As the rest of a step goes through the same issue slots, it must be few instructions: A
comes multiplied by log2(e), B and C as float32 rows, states and parameters with the channels last, and tiles are laid
out (see below) so that no value moves between threads where the mathematics does not sum over them.

Where there are too few programs to fill the device, time is cut into chunks (`split`): every chunk is first scanned
from zero, for its last state and its summed step sizes; as a decay over steps is exp(A * their sum), a second, small
kernel makes from these the state that each chunk starts in; then all chunks run at once.

Step sizes of low rank (`delta_weight`) come from a matrix product before the scan, and from another before its
backward. Made in the kernel they would cost R multiply-adds more for each token and channel: with 16 states arithmetic
is the limit already, and with one state they would about double what a step issues, to save a third of what it reads.

The backward keeps the states at every T-th step, remakes those between in registers, and walks back. Sums over
channels (of B, C) are made within a program, stored, and added up in a fixed order: no atomics, the same bits always.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.selective_scan import narrow, widen
from ...visits import is_permutation, visited
from .common import TokenGradient, launch, load_row, place, rows, split, stack, store_row, unstack, visit

__all__ = ["backward", "forward"]

LOG2E = math.log2(math.e)
LN2 = tl.constexpr(math.log(2))


# -- pieces -----------------------------------------------------------------------------------------------------------
# A tile of states is (NR, DR, 32): every thread holds NR states of each of DR channels; of the 32 lanes of a warp, NL
# hold other states and 32 / NL other channels. What belongs to channels is (DR, 32), the same in all NL lanes that need
# it; what belongs to states is (NR, NL). Triton lays tiles out from the last axis on, and the last axis is the warp, so
# no value moves between threads but in the sums over lanes. For that to hold, loads must not be widened to several
# neighbours a thread: Triton is not told that `channels` and `width` are multiples of 16 (`do_not_specialize`).


@triton.jit
def _channels(NL: tl.constexpr, DR: tl.constexpr):
    lane = tl.arange(0, 32)
    if NL > 1:
        lane = lane % (32 // NL)
    return tl.arange(0, DR)[:, None] * (32 // NL) + lane[None, :]


@triton.jit
def _states(NL: tl.constexpr, NR: tl.constexpr):
    """A thread's states are neighbours, so it reads its part of B or C at once."""
    return tl.arange(0, NR)[:, None] + tl.arange(0, NL)[None, :] * NR


@triton.jit
def _tile(d, channels, NL: tl.constexpr, NR: tl.constexpr, N: tl.constexpr):
    """Places of channels `d` in an (N, D) matrix, as a tile, and which of them are states."""
    n = tl.arange(0, NR)[:, None, None] + (tl.arange(0, 32) // (32 // NL) * NR)[None, None, :]
    return n * channels + d[None, :, :], n < N


@triton.jit
def _raw(NR: tl.constexpr, DR: tl.constexpr):
    """Places of a tile's numbers in memory of its own."""
    register = tl.arange(0, NR)[:, None, None] * DR + tl.arange(0, DR)[None, :, None]
    return register * 32 + tl.arange(0, 32)[None, None, :]


@triton.jit
def _by_channel(x):
    """(DR, 32) to go with a tile."""
    return x[None, :, :]


@triton.jit
def _by_state(x):
    """(NR, NL) to go with a tile."""
    NR: tl.constexpr = x.shape[0]
    NL: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[:, :, None], (NR, NL, 32 // NL)), (NR, 1, 32))


@triton.jit
def _sum_states(x, NL: tl.constexpr):
    """A tile -> (DR, 32)."""
    x = tl.sum(x, 0)
    if NL > 1:
        DR: tl.constexpr = x.shape[0]
        x = tl.sum(tl.reshape(x, (DR, NL, 32 // NL)), 1, keep_dims=True)
        x = tl.reshape(tl.broadcast_to(x, (DR, NL, 32 // NL)), (DR, 32))
    return x


@triton.jit
def _sum_channels(x, NL: tl.constexpr):
    """A tile -> (NR, NL)."""
    x = tl.sum(x, 1)
    NR: tl.constexpr = x.shape[0]
    return tl.sum(tl.reshape(x, (NR, NL, 32 // NL)), 2)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to float32's accuracy: log1p(e) = 2 artanh(e / (2 + e)), a short series as e <= 1."""
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    q = s * s
    p = 1 / 15 + q * (1 / 17)
    p = 1 / 13 + q * p
    p = 1 / 11 + q * p
    p = 1 / 9 + q * p
    p = 1 / 7 + q * p
    p = 1 / 5 + q * p
    p = 1 / 3 + q * p
    return tl.maximum(x, 0) + 2 * s * (1 + q * p)


@triton.jit
def _step_size(raw, inside, SOFTPLUS: tl.constexpr):
    """Past the last step the size is 0, which leaves the state as it is; padding takes a step like any token."""
    step = _softplus(raw) if SOFTPLUS else raw
    return tl.where(inside, step, 0)


@triton.jit
def _load_states(x, at, token, read, real):
    """The rows of T steps of B or C, each (NR, NL). Where they are more than a few numbers, they are loaded one by one:
    at once they would lie across threads."""
    T: tl.constexpr = token.shape[0]
    if T * real.shape[0] * real.shape[1] < 32:
        return unstack(load_row(x, at, token, read & real))
    else:
        tokens = unstack(token)
        there = unstack(read)
        rows = ()
        for i in tl.static_range(T):
            rows = rows + (load_row(x, at, tokens[i], there[i] & real),)
        return rows


@triton.jit
def _where(block, blocks, width, NL: tl.constexpr, DR: tl.constexpr):
    """(group, channels, which of them exist) of the block-th block of channels."""
    group = block // blocks
    within = (block % blocks) * (DR * (32 // NL)) + _channels(NL, DR)
    return group.to(tl.int64), group * width + within, within < width


# -- kernels ----------------------------------------------------------------------------------------------------------
# Arguments that many share:
#     u, delta, B, C, z       Rows of the token inputs; z may be None
#     A (K, N, D) times log2(e); D, bias (K, D) or None
#     route                   the table's pointer or None, and the stride of its batch axis
#     start, end              (B, K, chunks, N, D) states before and after a chunk
#     saved                   (B, K, ceil(S / T), tiles of all blocks) states before every T-th step, as they lie in
#                             threads: places are constants then; `saved_size` numbers a T steps
#     sums                    (B, K, chunks, D) sums of a chunk's step sizes
#     S steps, K routes, D channels in groups of `width`, a group in `blocks` blocks; `chunks` chunks of `size` steps


@triton.jit(do_not_specialize=["channels", "width", "saved_size"])
def _scan(
    u, delta, B, C, z, A, D, bias, route, route_batch, start, end, saved, sums, y, total,
    S, routes, channels, groups, width, blocks, chunks, size, saved_size,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, MERGE: tl.constexpr, ADD: tl.constexpr,
    T: tl.constexpr, NR: tl.constexpr, NL: tl.constexpr, DR: tl.constexpr,
):  # fmt: skip
    """Forward. Writes those of y, end, saved and sums that are not None.

    With MERGE a program walks all routes and adds them up in `total` (float32, B, 1, L, D); the last one writes y. ADD:
    already the first adds, to the zeros in `total`, as not every route may write every token.
    """
    pid = tl.program_id(0)
    block = pid % (blocks * groups)
    pid = pid // (blocks * groups)
    chunk = pid % chunks
    pid = pid // chunks
    if MERGE:
        b = pid.to(tl.int64)
        first = 0
        last = routes
    else:
        b = (pid // routes).to(tl.int64)
        first = pid % routes
        last = first + 1
    g, d, real_d = _where(block, blocks, width, NL, DR)
    n = _states(NL, NR)
    real_n = n < N
    tile, real = _tile(d, channels, NL, NR, N)
    real &= _by_channel(real_d)

    if saved is not None:
        saved_at = saved + block * (NR * DR * 32) + _raw(NR, DR)

    for route_index in range(first, last):
        k = tl.cast(route_index, tl.int64)
        row = b * routes + k
        a = tl.load(A + k * N * channels + tile, mask=real, other=0)
        h = tl.zeros_like(a)
        if start is not None:
            h = tl.load(start + (row * chunks + chunk) * N * channels + tile, mask=real, other=0)
        shift = tl.zeros((DR, 32), tl.float32)
        if bias is not None:
            shift = tl.load(bias + k * channels + d, mask=real_d, other=0)
        if y is not None and D is not None:
            skip = tl.load(D + k * channels + d, mask=real_d, other=0)
        table = None if route is None else route + b * route_batch + k * S
        elapsed = tl.zeros((DR, 32), tl.float32)
        u_at = place(u, b, k, 0, d)
        delta_at = place(delta, b, k, 0, d)
        B_at = place(B, b, k, g, n)
        if y is not None:
            C_at = place(C, b, k, g, n)
            y_at = place(y, b, 0 if MERGE else k, 0, d)
            if z is not None:
                z_at = place(z, b, k, 0, d)
            if MERGE:
                total_at = place(total, b, 0, 0, d)

        for t in range(chunk * size, tl.minimum(S, (chunk + 1) * size), T):
            if saved is not None:
                tl.store(saved_at + (row * tl.cdiv(S, T) + t // T) * saved_size, h)
            # All loads of T steps first: none waits for another, nor for a store.
            token, read, keep, inside = visit(table, t + tl.arange(0, T)[:, None, None], S)
            step = _step_size(load_row(delta, delta_at, token, read & real_d) + shift, inside, SOFTPLUS)
            value = load_row(u, u_at, token, read & real_d)
            Bs = _load_states(B, B_at, token, read, real_n)
            if y is not None:
                Cs = _load_states(C, C_at, token, read, real_n)
                if z is not None:
                    gate = load_row(z, z_at, token, read & real_d)
                if MERGE:
                    before = load_row(total, total_at, token, keep & (ADD | (k > 0)) & real_d)
            if sums is not None:
                elapsed += tl.sum(step, 0)
            steps = unstack(step)
            inputs = unstack(step * value)
            outputs = ()
            for i in tl.static_range(T):
                h = tl.exp2(a * _by_channel(steps[i])) * h + _by_channel(inputs[i]) * _by_state(Bs[i])
                if y is not None:
                    outputs = outputs + (_sum_states(h * _by_state(Cs[i]), NL),)
            if y is not None:
                out = stack(outputs)
                if D is not None:
                    out += skip * value
                if z is not None:
                    out *= gate * tl.sigmoid(gate)
                if MERGE:
                    out += before
                    store_row(total, total_at, token, keep & (k < routes - 1) & real_d, out)
                    store_row(y, y_at, token, keep & (k == routes - 1) & real_d, out)
                else:
                    store_row(y, y_at, token, keep & real_d, out)

        if end is not None:
            tl.store(end + (row * chunks + chunk) * N * channels + tile, h, mask=real)
        if sums is not None:
            tl.store(sums + (row * chunks + chunk) * channels + d, elapsed, mask=real_d)
        if MERGE:
            tl.debug_barrier()  # what this route wrote to `total`, the next one reads, perhaps in another thread


@triton.jit(do_not_specialize=["channels"])
def _carry(
    states, sums, A, edge, out, routes, channels, blocks, chunks, N: tl.constexpr, REVERSE: tl.constexpr,
    NR: tl.constexpr, NL: tl.constexpr, DR: tl.constexpr,
):  # fmt: skip
    """Joins chunks: `states` (B, K, chunks, N, D) comes with what each adds, and goes with what enters each.

    In time order, or from the last chunk to the first (for gradients). edge: (B, K, N, D), what enters the first, None
    for zeros; out: likewise what leaves the last, or None.
    """
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    k = row % routes
    d = (pid % blocks) * (DR * (32 // NL)) + _channels(NL, DR)
    tile, real = _tile(d, channels, NL, NR, N)
    real &= _by_channel(d < channels)
    a = tl.load(A + k * N * channels + tile, mask=real, other=0)
    h = tl.zeros_like(a)
    if edge is not None:
        h = tl.load(edge + row * N * channels + tile, mask=real, other=0)
    for i in range(chunks):
        at = row * chunks + (chunks - 1 - i if REVERSE else i)
        added = tl.load(states + at * N * channels + tile, mask=real, other=0)
        elapsed = tl.load(sums + at * channels + d, mask=d < channels, other=0)
        tl.store(states + at * N * channels + tile, h, mask=real)
        h = tl.exp2(a * _by_channel(elapsed)) * h + added
    if out is not None:
        tl.store(out + row * N * channels + tile, h, mask=real)


@triton.jit(do_not_specialize=["channels", "width", "saved_size"])
def _adjoint(
    grad, delta, C, z, A, bias, route, route_batch, left,
    S, routes, channels, groups, width, blocks, chunks, size, saved_size,
    N: tl.constexpr, SOFTPLUS: tl.constexpr,
    T: tl.constexpr, NR: tl.constexpr, NL: tl.constexpr, DR: tl.constexpr,
):  # fmt: skip
    """left (B, K, chunks, N, D): gradient of the state before a chunk, from the chunk's own outputs."""
    pid = tl.program_id(0)
    block = pid % (blocks * groups)
    pid = pid // (blocks * groups)
    chunk = pid % chunks
    row = (pid // chunks).to(tl.int64)
    b = row // routes
    k = row % routes
    g, d, real_d = _where(block, blocks, width, NL, DR)
    n = _states(NL, NR)
    real_n = n < N
    tile, real = _tile(d, channels, NL, NR, N)
    real &= _by_channel(real_d)
    a = tl.load(A + k * N * channels + tile, mask=real, other=0)
    shift = tl.zeros((DR, 32), tl.float32)
    if bias is not None:
        shift = tl.load(bias + k * channels + d, mask=real_d, other=0)
    table = None if route is None else route + b * route_batch + k * S
    delta_at = place(delta, b, k, 0, d)
    grad_at = place(grad, b, k, 0, d)
    C_at = place(C, b, k, g, n)
    if z is not None:
        z_at = place(z, b, k, 0, d)
    h = tl.zeros_like(a)
    begin = chunk * size
    count = tl.cdiv(tl.minimum(S, begin + size) - begin, T)
    for j in range(count):
        t = begin + (count - 1 - j) * T
        token, read, keep, inside = visit(table, t + tl.arange(0, T)[:, None, None], S)
        raw = load_row(delta, delta_at, token, read & real_d) + shift
        steps = unstack(_step_size(raw, inside, SOFTPLUS))
        dy = load_row(grad, grad_at, token, keep & real_d)
        if z is not None:
            gate = load_row(z, z_at, token, read & real_d)
            dy *= gate * tl.sigmoid(gate)
        slopes = unstack(dy)
        Cs = _load_states(C, C_at, token, read, real_n)
        for i in tl.static_range(T):
            h += _by_channel(slopes[T - 1 - i]) * _by_state(Cs[T - 1 - i])
            h *= tl.exp2(a * _by_channel(steps[T - 1 - i]))
    tl.store(left + (row * chunks + chunk) * N * channels + tile, h, mask=real)


@triton.jit(do_not_specialize=["channels", "width", "saved_size"])
def _retreat(
    grad, u, delta, B, C, z, A, D, bias, route, route_batch, saved, right,
    du, ddelta, dB, dC, dz, share, dA, dD, dbias, dstart,
    S, routes, channels, groups, width, blocks, chunks, size, saved_size,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, BY_STEP: tl.constexpr,
    T: tl.constexpr, NR: tl.constexpr, NL: tl.constexpr, DR: tl.constexpr,
):  # fmt: skip
    """Backward, from `saved` and the gradient `right` (B, K, chunks, N, D) of the states after each chunk, or None.

    dB and dC: Rows of the first block's share, `share` elements to the next block's. dA (B, chunks, K, N, D), dD and
    dbias (B, chunks, K, D), dstart (B, K, N, D). BY_STEP: rows of the gradients count steps, not tokens.
    """
    pid = tl.program_id(0)
    block = pid % (blocks * groups)
    pid = pid // (blocks * groups)
    chunk = pid % chunks
    row = (pid // chunks).to(tl.int64)
    b = row // routes
    k = row % routes
    g, d, real_d = _where(block, blocks, width, NL, DR)
    n = _states(NL, NR)
    real_n = n < N
    tile, real = _tile(d, channels, NL, NR, N)
    real &= _by_channel(real_d)
    u_at = place(u, b, k, 0, d)
    delta_at = place(delta, b, k, 0, d)
    B_at = place(B, b, k, g, n)
    C_at = place(C, b, k, g, n)
    grad_at = place(grad, b, k, 0, d)
    du_at = place(du, b, k, 0, d)
    ddelta_at = place(ddelta, b, k, 0, d)
    own = (block % blocks).to(tl.int64) * share
    dB_at = place(dB, b, k, g, n) + own
    dC_at = place(dC, b, k, g, n) + own
    if z is not None:
        z_at = place(z, b, k, 0, d)
        dz_at = place(dz, b, k, 0, d)

    saved_at = saved + block * (NR * DR * 32) + _raw(NR, DR)
    a = tl.load(A + k * N * channels + tile, mask=real, other=0)
    slope_a = tl.zeros_like(a)
    slope_skip = tl.zeros((DR, 32), tl.float32)
    slope_bias = tl.zeros((DR, 32), tl.float32)
    shift = tl.zeros((DR, 32), tl.float32)
    skip = tl.zeros((DR, 32), tl.float32)
    if bias is not None:
        shift = tl.load(bias + k * channels + d, mask=real_d, other=0)
    if D is not None:
        skip = tl.load(D + k * channels + d, mask=real_d, other=0)
    table = None if route is None else route + b * route_batch + k * S
    adjoint = tl.zeros_like(a)  # gradient of the state after a step, from all later ones
    if right is not None:
        adjoint = tl.load(right + (row * chunks + chunk) * N * channels + tile, mask=real, other=0)
    begin = chunk * size
    count = tl.cdiv(tl.minimum(S, begin + size) - begin, T)
    for j in range(count):
        t = begin + (count - 1 - j) * T
        h = tl.load(saved_at + (row * tl.cdiv(S, T) + t // T) * saved_size)
        states = (h,)
        for i in tl.static_range(T):
            token, read, keep, inside = visit(table, t + i, S)
            step = _step_size(load_row(delta, delta_at, token, read & real_d) + shift, inside, SOFTPLUS)
            x = step * load_row(u, u_at, token, read & real_d)
            h = tl.exp2(a * _by_channel(step)) * h + _by_channel(x) * _by_state(load_row(B, B_at, token, read & real_n))
            states = states + (h,)
        # Rows are read again (from the first-level cache), as T steps of them and of states would not fit in registers.
        for i in tl.static_range(T):
            at = t + T - 1 - i
            token, read, keep, inside = visit(table, at, S)
            raw = load_row(delta, delta_at, token, read & real_d) + shift
            step = _step_size(raw, inside, SOFTPLUS)
            value = load_row(u, u_at, token, read & real_d)
            B_t = _by_state(load_row(B, B_at, token, read & real_n))
            C_t = _by_state(load_row(C, C_at, token, read & real_n))
            dy = load_row(grad, grad_at, token, keep & real_d)
            to = tl.cast(at, tl.int64) if BY_STEP else token
            after = states[T - i]
            if z is not None:
                gate = load_row(z, z_at, token, read & real_d)
                open = tl.sigmoid(gate)
                out = _sum_states(after * C_t, NL) + skip * value
                slope = dy * out * open * (1 + gate * (1 - open))
                store_row(dz, dz_at, to, read & real_d, slope)
                dy *= gate * open
            adjoint += _by_channel(dy) * C_t
            x = step * value
            slope = _sum_channels(_by_channel(dy) * after, NL)
            store_row(dC, dC_at, to, read & real_n, slope)
            slope = _sum_channels(_by_channel(x) * adjoint, NL)
            store_row(dB, dB_at, to, read & real_n, slope)
            dx = _sum_states(adjoint * B_t, NL)
            store_row(du, du_at, to, read & real_d, step * dx + skip * dy)
            adjoint *= tl.exp2(a * _by_channel(step))
            exponent = adjoint * states[T - 1 - i]  # gradient of step * A
            slope_a += exponent * _by_channel(step)
            dstep = _sum_states(exponent * a, NL) * LN2 + value * dx
            if SOFTPLUS:
                dstep *= tl.sigmoid(raw)
            dstep = tl.where(inside, dstep, 0)
            store_row(ddelta, ddelta_at, to, read & real_d, dstep)
            slope_bias += dstep
            slope_skip += dy * value

    at = (b * chunks + chunk) * routes + k
    tl.store(dA + at * N * channels + tile, slope_a, mask=real)
    if D is not None:
        tl.store(dD + at * channels + d, slope_skip, mask=real_d)
    if bias is not None:
        tl.store(dbias + at * channels + d, slope_bias, mask=real_d)
    if dstart is not None:
        tl.store(dstart + row * N * channels + tile, adjoint, mask=real & (chunk == 0))


# -- launching --------------------------------------------------------------------------------------------------------


class _Call:
    """A call's inputs as the kernels take them."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, route, merge):
        tokens = [x for x in (u, delta, B, C, z) if x is not None]
        self.batch, self.routes, self.length = visited(tokens, route)
        self.device, self.dtype = u.device, u.dtype
        self.channels, self.states = A.shape[1:]
        self.groups = B.shape[-2]
        self.width = self.channels // self.groups
        self.steps = self.length if route is None else route.shape[-1]
        self.route = None if route is None else route.contiguous()
        self.u, self.delta, self.z = map(rows, (u, delta, z))
        # B and C are small beside the rest, every block of channels reads them, and they tend to be slices of a wider
        # projection: in float32 rows of their own they load 16 bytes at a time and need no conversion.
        self.B, self.C = (rows(x.float().contiguous()) for x in (B, C))
        self.A = (A.float() * LOG2E).mT.contiguous()
        self.D, self.bias = (None if x is None else x.float().contiguous() for x in (D, delta_bias))
        self.initial = None if initial_state is None else initial_state.float().mT.contiguous()
        self.softplus = delta_softplus
        self.table = self.route, 0 if route is None or route.ndim == 2 else self.routes * self.steps

    def new(self, *shape: int, dtype=torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def new_states(self, chunks: int) -> Tensor:
        return self.new(self.batch, self.routes, chunks, self.states, self.channels)

    def plan(self, tile: dict[str, int], routes: int) -> "_Plan":
        return _Plan(self, tile, routes)


class _Plan:
    """How programs share a call out: tiles of channels, chunks of time."""

    def __init__(self, call: _Call, tile: dict[str, int], routes: int):
        self.call, self.tile = call, tile
        self.blocks = -(-call.width // _width(tile))
        across = call.batch * routes * call.groups * self.blocks
        self.chunks, self.size = split(across, call.steps, tile["T"], call.device)
        self.programs = across * self.chunks
        self.saved_size = call.groups * self.blocks * tile["NR"] * tile["DR"] * 32
        self.sizes = (
            call.steps, call.routes, call.channels, call.groups, call.width, self.blocks, self.chunks, self.size,
            self.saved_size,
        )  # fmt: skip

    def scan(self, start=None, end=None, saved=None, sums=None, y=None, total=None, merge=False, add=False):
        c = self.call
        launch(
            _scan, self.programs, c.u, c.delta, c.B, c.C, c.z, c.A, c.D, c.bias, *c.table,
            start, end, saved, sums, rows(y), rows(total), *self.sizes,
            N=c.states, SOFTPLUS=c.softplus, MERGE=merge, ADD=add, **self.tile,
        )  # fmt: skip

    def carry(self, states, sums, edge, out, reverse=False):
        c = self.call
        tile = {key: value for key, value in self.tile.items() if key != "T"}
        blocks = -(-c.channels // _width(tile))
        launch(
            _carry, c.batch * c.routes * blocks,
            states, sums, c.A, edge, out, c.routes, c.channels, blocks, self.chunks,
            N=c.states, REVERSE=reverse, **tile,
        )  # fmt: skip

    def starts(self, final=None) -> tuple[Tensor | None, Tensor | None]:
        """The states that the chunks start in, and the sums of their steps; fills `final`, the state after the last."""
        c = self.call
        if self.chunks == 1:
            return c.initial, None
        states, sums = c.new_states(self.chunks), c.new(c.batch, c.routes, self.chunks, c.channels)
        self.scan(end=states, sums=sums)
        self.carry(states, sums, c.initial, final)
        return states, sums


def _power(n: int) -> int:
    return triton.next_power_of_2(n)


def _width(tile: dict[str, int]) -> int:
    """Channels of a program."""
    return tile["DR"] * (32 // tile["NL"])


def forward_tile(states: int, width: int) -> dict[str, int]:
    """Up to 16 states of a channel in one thread, so that their sum y is additions alone.

    Two channels per thread, where there are enough, share the loads of B and C and the arithmetic of addresses. T so
    that loads fill the wait for memory.
    """
    n = _power(states)
    lanes = max(1, n // 16)
    return {"T": 16 if n <= 4 else 8, "NR": n // lanes, "NL": lanes, "DR": _channels_a_thread(lanes, width)}


def backward_tile(states: int, width: int) -> dict[str, int]:
    """Sums run over channels (for B and C) as well as over states, so both are spread over lanes.

    T + 1 tiles must fit in the 255 registers of a thread. `saved` takes 4 N / T bytes per token and channel for a
    while.
    """
    n = _power(states)
    lanes = 1 if n < 8 else max(2, n // 8)
    return {"T": 8 if n <= 4 else 4, "NR": n // lanes, "NL": lanes, "DR": _channels_a_thread(lanes, width)}


def _channels_a_thread(lanes: int, width: int) -> int:
    return 2 if width > 32 // lanes else 1


def forward(*args) -> tuple[Tensor, Tensor]:
    """`_selective_scan` in grid order, see `Implementation.forward`."""
    *inputs, route, merge = args
    call = _Call(*widen(*inputs), route=route, merge=merge)
    tile = forward_tile(call.states, call.width)
    every = route is None or is_permutation(call.route, call.length)  # all tokens are written, once a route
    new = call.new if every else lambda *shape, dtype=torch.float32: call.new(*shape, dtype=dtype).zero_()
    final = call.new_states(1)
    merge = merge and call.routes > 1
    if merge:
        plan = call.plan(tile, routes=1)
        if plan.chunks == 1:  # enough programs without the routes: each walks all of them and adds up
            total = new(call.batch, 1, call.length, call.channels)
            y = call.new(*total.shape, dtype=call.dtype) if every else total
            plan.scan(call.initial, final, y=y, total=total, merge=True, add=not every)
            return y[:, 0].to(call.dtype), final[:, :, 0].mT
    plan = call.plan(tile, call.routes)
    y = new(call.batch, call.routes, call.length, call.channels, dtype=torch.float32 if merge else call.dtype)
    start, _ = plan.starts(final)
    plan.scan(start, final if plan.chunks == 1 else None, y=y)
    if args[-1]:
        y = y.sum(1).to(call.dtype) if merge else y[:, 0]
    return y, final[:, :, 0].mT


def backward(grad_output: Tensor, grad_state: Tensor | None, *args) -> list[Tensor]:
    """Its gradients, see `Implementation.backward`."""
    *inputs, route, merge = args
    wide = widen(*inputs)
    u, delta, A, B, C, D, z, delta_bias, _, initial_state = wide
    call = _Call(*wide, route=route, merge=merge)
    plan = call.plan(backward_tile(call.states, call.width), call.routes)
    start, sums = plan.starts()
    saved = call.new(call.batch, call.routes, -(-call.steps // plan.tile["T"]), plan.saved_size)
    plan.scan(start, saved=saved)
    grad = rows(grad_output.unsqueeze(1) if merge else grad_output)
    right = None if grad_state is None else grad_state.float().mT.contiguous()
    if plan.chunks > 1:
        edge, right = right, call.new_states(plan.chunks)
        launch(
            _adjoint, plan.programs, grad, call.delta, call.C, call.z, call.A, call.bias, *call.table, right,
            *plan.sizes, N=call.states, SOFTPLUS=call.softplus, **plan.tile,
        )  # fmt: skip
        plan.carry(right, sums, edge, None, reverse=True)

    tokens = {"u": u, "delta": delta, "B": B, "C": C, "z": z}
    shares = {"B": plan.blocks, "C": plan.blocks}
    to = {
        key: TokenGradient(x, call.routes, call.route, shares.get(key, 1)) for key, x in tokens.items() if x is not None
    }
    dA = call.new(call.batch, plan.chunks, call.routes, call.states, call.channels)
    dD, dbias = (
        None if x is None else call.new(call.batch, plan.chunks, call.routes, call.channels) for x in (D, delta_bias)
    )
    dstart = None if initial_state is None else call.new(call.batch, call.routes, call.states, call.channels)
    launch(
        _retreat, plan.programs, grad, call.u, call.delta, call.B, call.C, call.z, call.A, call.D, call.bias,
        *call.table, saved, right, *(to[key].rows if key in to else None for key in ("u", "delta", "B", "C", "z")),
        to["B"].stride, dA, dD, dbias, dstart, *plan.sizes,
        N=call.states, SOFTPLUS=call.softplus, BY_STEP=to["u"].by_step, **plan.tile,
    )  # fmt: skip
    over = (0, 1)
    parameters = {
        "A": (A, dA.sum(over).mT),
        "D": (D, None if D is None else dD.sum(over)),
        "bias": (delta_bias, None if delta_bias is None else dbias.sum(over)),
        "start": (initial_state, None if initial_state is None else dstart.mT),
    }
    grads = {key: g.finish() for key, g in to.items()}
    grads |= {key: g.to(x.dtype) for key, (x, g) in parameters.items() if x is not None}
    order = ("u", "delta", "A", "B", "C", "D", "z", "bias", "start")
    return narrow([grads[key] for key in order if key in grads], *inputs)
