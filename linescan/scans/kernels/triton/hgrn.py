"""Elementwise gated sums (`hgrn`, `rg_lru`) in Triton: serial in time, parallel over samples, routes and channels.

A program walks T steps at a time: their rows are asked for at once, which hides the latency of memory, then stepped
through. So each of x and g is read once and the output written once. Where programs are few, time is cut in chunks
(`split`): every chunk is scanned from zero first, then `carry` makes the states that enter the chunks.

The backward keeps the state before every T-th step, remakes those between in registers, and walks back.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...visits import is_permutation, visited
from .common import TokenGradient, channels_of, launch, load_row, place, rows, split, store_row, visit
from .gla import merged, per_route

T = 8  # steps at a time
LANES = 64  # channels of a program, two a thread


# -- kernels ----------------------------------------------------------------------------------------------------------
# Arguments that many share:
#     x, g, grad        Rows of inputs, log decays and the outputs' gradient
#     route, route_batch    the table's pointer or None, and the stride of its batch axis
#     states, gates     (B, K, chunks, D) float32: what enters or leaves a chunk, and the sum of its log decays
#     saved             (B, K, ceil(S / T), D) float32: states before every T-th step
#     S steps, K routes, D channels; `chunks` chunks of `size` steps


@triton.jit
def _scan(
    x, g, route, route_batch, start, end, gates, saved, out, S, K, D, chunks, size,
    T: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Forward. Writes those of end, gates, saved and out that are not None."""
    chunk, b, k, channels, real = channels_of(chunks, K, D, LANES)
    row = b * K + k
    table = None if route is None else route + b * route_batch + k * S
    x_at, g_at = place(x, b, k, 0, channels), place(g, b, k, 0, channels)
    total = tl.zeros((LANES,), tl.float32)
    h = total
    if start is not None:
        h = tl.load(start + (row * chunks + chunk) * D + channels, mask=real, other=0)
    if out is not None:
        out_at = place(out, b, k, 0, channels)
    for t in range(chunk * size, tl.minimum(S, (chunk + 1) * size), T):
        if saved is not None:
            tl.store(saved + (row * tl.cdiv(S, T) + t // T) * D + channels, h, mask=real)
        tokens = ()
        kept = ()
        inputs = ()
        decays = ()
        for i in tl.static_range(T):  # all loads of T steps first
            token, read, keep, _ = visit(table, t + i, S)
            tokens = tokens + (token,)
            kept = kept + (keep,)
            inputs = inputs + (load_row(x, x_at, token, read & real),)
            decays = decays + (load_row(g, g_at, token, read & real),)
        for i in tl.static_range(T):
            h = tl.exp(decays[i]) * h + inputs[i]
            if gates is not None:
                total += decays[i]
            if out is not None:
                store_row(out, out_at, tokens[i], kept[i] & real, h)
    if end is not None:
        tl.store(end + (row * chunks + chunk) * D + channels, h, mask=real)
    if gates is not None:
        tl.store(gates + (row * chunks + chunk) * D + channels, total, mask=real)


@triton.jit
def _carry(states, gates, edge, out, K, D, chunks, LANES: tl.constexpr, REVERSED: tl.constexpr):
    """In place, `states`: from what each chunk adds to what enters it (REVERSED: from behind, for gradients).

    edge: (B, K, D), what enters the first, None for zeros; out: likewise what leaves the last, or None.
    """
    _, b, k, channels, real = channels_of(1, K, D, LANES)
    row = b * K + k
    h = tl.zeros((LANES,), tl.float32)
    if edge is not None:
        h = tl.load(edge + row * D + channels, mask=real, other=0)
    for i in range(chunks):
        at = (row * chunks + (chunks - 1 - i if REVERSED else i)) * D + channels
        added, decay = tl.load(states + at, mask=real, other=0), tl.load(gates + at, mask=real, other=0)
        tl.store(states + at, h, mask=real)
        h = tl.exp(decay) * h + added
    if out is not None:
        tl.store(out + row * D + channels, h, mask=real)


@triton.jit
def _retreat(
    grad, x, g, route, route_batch, saved, right, left, dx, dg, S, K, D, chunks, size,
    BY_STEP: tl.constexpr, T: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Backward, from the gradients `right` of the states after each chunk, or None, to those before it, `left`.

    dx and dg are written where `saved` is given. BY_STEP: their rows count steps, not tokens.
    """
    chunk, b, k, channels, real = channels_of(chunks, K, D, LANES)
    row = b * K + k
    table = None if route is None else route + b * route_batch + k * S
    grad_at, g_at = place(grad, b, k, 0, channels), place(g, b, k, 0, channels)
    if saved is not None:
        x_at = place(x, b, k, 0, channels)
        dx_at, dg_at = place(dx, b, k, 0, channels), place(dg, b, k, 0, channels)
    adjoint = tl.zeros((LANES,), tl.float32)
    if right is not None:
        adjoint = tl.load(right + (row * chunks + chunk) * D + channels, mask=real, other=0)
    begin = chunk * size
    count = tl.cdiv(tl.minimum(S, begin + size) - begin, T)
    for j in range(count):
        t = begin + (count - 1 - j) * T
        tokens = ()
        there = ()
        decays = ()
        grads = ()
        states = ()
        if saved is not None:
            h = tl.load(saved + (row * tl.cdiv(S, T) + t // T) * D + channels, mask=real, other=0)
        for i in tl.static_range(T):
            token, read, keep, _ = visit(table, t + i, S)
            tokens = tokens + (token,)
            there = there + (read,)
            decays = decays + (tl.exp(load_row(g, g_at, token, read & real)),)
            grads = grads + (load_row(grad, grad_at, token, keep & real),)
            if saved is not None:
                states = states + (decays[i] * h,)  # decayed, and before the input
                h = states[i] + load_row(x, x_at, token, read & real)
        for i in tl.static_range(T):
            adjoint += grads[T - 1 - i]
            if saved is not None:
                at = tl.cast(t + T - 1 - i, tl.int64) if BY_STEP else tokens[T - 1 - i]
                store_row(dx, dx_at, at, there[T - 1 - i] & real, adjoint)
                store_row(dg, dg_at, at, there[T - 1 - i] & real, adjoint * states[T - 1 - i])
            adjoint *= decays[T - 1 - i]
    if left is not None:
        tl.store(left + (row * chunks + chunk) * D + channels, adjoint, mask=real)


# -- on the host ------------------------------------------------------------------------------------------------------


class _Call:
    """One call: its inputs as the kernels take them, and how programs share it out."""

    def __init__(self, x, g, initial_state, route):
        self.x, self.g = x, g
        self.batch, self.routes, self.length = visited((x, g), route)
        self.route = None if route is None else route.contiguous()
        self.table = self.route, 0 if route is None or route.ndim == 2 else self.route.stride(0)
        self.steps, self.channels = self.length if route is None else route.shape[-1], x.shape[-1]
        self.initial = None if initial_state is None else initial_state.float().contiguous()
        self.across = self.batch * self.routes * triton.cdiv(self.channels, LANES)
        self.chunks, self.size = split(self.across, self.steps, T, x.device)
        self.counts = self.steps, self.routes, self.channels, self.chunks, self.size

    def new(self, *places: int) -> Tensor:
        return torch.empty(self.batch, self.routes, *places, self.channels, dtype=torch.float32, device=self.x.device)

    def scan(self, start=None, end=None, gates=None, saved=None, out=None) -> None:
        inputs = rows(self.x), rows(self.g), *self.table, start, end, gates, saved, rows(out)
        launch(_scan, self.across * self.chunks, *inputs, *self.counts, T=T, LANES=LANES)

    def carry(self, states, gates, edge, out, reverse: bool) -> None:
        counts = self.routes, self.channels, self.chunks
        launch(_carry, self.across, states, gates, edge, out, *counts, LANES=LANES, REVERSED=reverse)

    def starts(self, final=None) -> tuple[Tensor | None, Tensor | None]:
        """The states that the chunks start in and the sums of their gates; fills `final`, the state after the last."""
        if self.chunks == 1:
            return self.initial, None
        states, gates = self.new(self.chunks), self.new(self.chunks)
        self.scan(end=states, gates=gates)
        self.carry(states, gates, self.initial, final, False)
        return states, gates

    def retreat(self, grad, saved, right, left, dx=None, dg=None) -> None:
        inputs = rows(grad), rows(self.x), rows(self.g), *self.table, saved, right, left
        places = (None, None) if dx is None else (dx.rows, dg.rows)
        by_step = dx is not None and dx.by_step
        constants = dict(BY_STEP=by_step, T=T, LANES=LANES)
        launch(_retreat, self.across * self.chunks, *inputs, *places, *self.counts, **constants)


def forward(x, g, initial_state, route, merge) -> tuple[Tensor, Tensor]:
    call = _Call(x, g, initial_state, route)
    whole = route is None or is_permutation(call.route, call.length)
    shape = call.batch, call.routes, call.length, call.channels
    out = (torch.empty if whole else torch.zeros)(shape, dtype=torch.float32 if merge else x.dtype, device=x.device)
    final = call.new()
    start, _ = call.starts(final)
    call.scan(start, final if call.chunks == 1 else None, out=out)
    return merged(out, merge, x.dtype), final


def backward(grad_output, grad_state, x, g, initial_state, route, merge) -> list[Tensor]:
    call, grad = _Call(x, g, initial_state, route), per_route(grad_output, merge)
    start, gates = call.starts()
    saved = call.new(triton.cdiv(call.steps, T))
    call.scan(start, saved=saved)
    right = None if grad_state is None else grad_state.float().contiguous()
    of_initial = None if initial_state is None else call.new()
    if call.chunks > 1:
        edge, right = right, call.new(call.chunks)
        call.retreat(grad, None, None, right)
        call.carry(right, gates, edge, of_initial, True)
    dx, dg = (TokenGradient(t, call.routes, call.route) for t in (x, g))
    call.retreat(grad, saved, right, of_initial if call.chunks == 1 else None, dx, dg)
    found = [dx.finish(), dg.finish()]
    return found if initial_state is None else [*found, of_initial.to(initial_state.dtype)]
