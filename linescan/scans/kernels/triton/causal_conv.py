"""The causal depthwise convolution along a route in Triton, with bias and SiLU.

Nothing is serial here: a program is one warp that takes T steps of a block of channels, reads their rows and the W - 1
before them (kept in registers, each read once), and writes T outputs. The same rows serve the backward, which remakes
the outputs before SiLU. Memory is the limit; rows read twice, by neighbours in time, come from the second-level cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...visits import is_permutation, visited
from .common import TokenGradient, launch, load_row, place, rows, store_row, visit

__all__ = ["backward", "forward"]

FORWARD_STEPS, BACKWARD_STEPS = 16, 8


@triton.jit
def _where(S, routes, channels, T: tl.constexpr, BLOCK: tl.constexpr):
    """(first step, sample, route, (sample, route), channels, which of them exist, chunk of time) of a program."""
    blocks = tl.cdiv(channels, BLOCK)
    pid = tl.program_id(0)
    d = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    pid = pid // blocks
    chunks = tl.cdiv(S, T)
    row = (pid // chunks).to(tl.int64)
    return (pid % chunks) * T, row // routes, row % routes, row, d, d < channels, pid % chunks


@triton.jit
def _input(x, at, table, initial, t, S, real_d, W: tl.constexpr):
    """The input of step t: before the first step stands `initial` (a pointer to (W - 1, D) for these channels)."""
    token, read, keep, inside = visit(table, tl.maximum(t, 0), S)
    value = load_row(x, at, token, real_d & read & (t >= 0))
    if initial is not None:
        earlier = (t < 0) & (t + W - 1 >= 0)
        value += tl.load(initial[0] + (t + W - 1) * initial[1], mask=real_d & earlier, other=0)
    return value


@triton.jit
def _forward(
    x, weight, bias, initial, route, route_batch, y, final, S, routes, channels,
    SILU: tl.constexpr, W: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weight (K, W, D); bias (K, D); initial and final (B, K, W - 1, D)."""
    t, b, k, row, d, real_d, chunk = _where(S, routes, channels, T, BLOCK)
    table = None if route is None else route + b * route_batch + k * S
    before = None if initial is None else (initial + row * (W - 1) * channels + d, channels)
    x_at = place(x, b, k, 0, d)
    y_at = place(y, b, k, 0, d)
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.load(weight + (k * W + j) * channels + d, mask=real_d, other=0),)
    shift = tl.zeros((BLOCK,), tl.float32)
    if bias is not None:
        shift = tl.load(bias + k * channels + d, mask=real_d, other=0)
    inputs = ()
    for i in tl.static_range(T + W - 1):
        inputs = inputs + (_input(x, x_at, table, before, t + i - (W - 1), S, real_d, W),)
    for i in tl.static_range(T):
        out = shift
        for j in tl.static_range(W):
            out += taps[j] * inputs[i + j]
        if SILU:
            out *= tl.sigmoid(out)
        token, read, keep, inside = visit(table, t + i, S)
        store_row(y, y_at, token, keep & real_d, out)
    if t + T >= S:  # the last chunk: the state is the last W - 1 inputs
        for j in tl.static_range(W - 1):
            value = _input(x, x_at, table, before, S - (W - 1) + j, S, real_d, W)
            tl.store(final + (row * (W - 1) + j) * channels + d, value, mask=real_d)


@triton.jit
def _backward(
    grad, grad_state, x, weight, bias, initial, route, route_batch, dx, dweight, dbias, dinitial, S, routes, channels,
    SILU: tl.constexpr, BY_STEP: tl.constexpr, W: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_state and dinitial (B, K, W - 1, D); dweight (B, chunks, K, W, D) and dbias (B, chunks, K, D).

    Takes the gradients of the inputs of T steps, from W - 1 before the first on (those are `initial`), and the weights'
    shares of the outputs of the same steps.
    """
    t, b, k, row, d, real_d, chunk = _where(S + W - 1, routes, channels, T, BLOCK)
    t -= W - 1
    table = None if route is None else route + b * route_batch + k * S
    before = None if initial is None else (initial + row * (W - 1) * channels + d, channels)
    x_at = place(x, b, k, 0, d)
    dx_at = place(dx, b, k, 0, d)
    grad_at = place(grad, b, k, 0, d)
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.load(weight + (k * W + j) * channels + d, mask=real_d, other=0),)
    shift = tl.zeros((BLOCK,), tl.float32)
    if bias is not None:
        shift = tl.load(bias + k * channels + d, mask=real_d, other=0)

    inputs = ()  # of steps t - (W - 1) .. t + T + (W - 1) - 1
    for i in tl.static_range(T + 2 * (W - 1)):
        inputs = inputs + (_input(x, x_at, table, before, t + i - (W - 1), S, real_d, W),)
    slopes = ()  # gradients of the outputs before SiLU, of steps t .. t + T + (W - 1) - 1
    for i in tl.static_range(T + W - 1):
        token, read, keep, inside = visit(table, tl.maximum(t + i, 0), S)
        slope = load_row(grad, grad_at, token, keep & (t + i >= 0) & real_d)
        if SILU:
            out = shift
            for j in tl.static_range(W):
                out += taps[j] * inputs[i + j]
            gate = tl.sigmoid(out)
            slope *= gate * (1 + out * (1 - gate))
        slopes = slopes + (slope,)

    for i in tl.static_range(T):
        value = tl.zeros((BLOCK,), tl.float32)
        for j in tl.static_range(W):  # the input of step t + i is tap W - 1 - j of step t + i + j
            value += taps[W - 1 - j] * slopes[i + j]
        at = t + i
        if grad_state is not None:
            last = at - (S - (W - 1))
            kept = (last >= 0) & (at < S) & real_d
            value += tl.load(grad_state + (row * (W - 1) + last) * channels + d, mask=kept, other=0)
        token, read, keep, inside = visit(table, tl.maximum(at, 0), S)
        to = tl.cast(at, tl.int64) if BY_STEP else token
        store_row(dx, dx_at, to, read & (at >= 0) & real_d, value)
        if dinitial is not None:
            tl.store(dinitial + (row * (W - 1) + at + W - 1) * channels + d, value, mask=(at < 0) & real_d)

    share = (b * tl.cdiv(S + W - 1, T) + chunk) * routes + k
    for j in tl.static_range(W):
        value = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(T):
            value += slopes[i] * inputs[i + j]
        tl.store(dweight + (share * W + j) * channels + d, value, mask=real_d)
    if bias is not None:
        value = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(T):
            value += slopes[i]
        tl.store(dbias + share * channels + d, value, mask=real_d)


class _Call:
    """A call's inputs as the kernels take them."""

    def __init__(self, x, weight, bias, silu, initial_state, route, merge):
        self.batch, self.routes, self.length = visited((x,), route)
        self.device, self.dtype = x.device, x.dtype
        self.channels, self.width = weight.shape[1:]
        self.steps = self.length if route is None else route.shape[-1]
        self.route = None if route is None else route.contiguous()
        self.x = rows(x)
        self.weight = weight.float().mT.contiguous()
        self.bias = None if bias is None else bias.float().contiguous()
        self.initial = None if initial_state is None else initial_state.float().mT.contiguous()
        self.table = self.route, 0 if route is None or route.ndim == 2 else self.routes * self.steps
        self.sizes = self.steps, self.routes, self.channels
        # Channels of a program: four a lane are loaded at once, and share the arithmetic of addresses.
        self.block = next((width for width in (128, 64) if self.channels % width == 0), 32)

    def new(self, *shape: int, dtype=torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def new_state(self) -> Tensor:
        return self.new(self.batch, self.routes, self.width - 1, self.channels)

    def chunks(self, steps: int, size: int) -> tuple[int, int]:
        """(chunks of `size` steps, programs)."""
        chunks = -(-steps // size)
        return chunks, self.batch * self.routes * chunks * -(-self.channels // self.block)


def forward(*args) -> tuple[Tensor, Tensor]:
    """`_causal_conv1d` in grid order, see `Implementation.forward`."""
    silu, merge = args[3], args[-1]
    call = _Call(*args)
    added = merge and call.routes > 1
    y = call.new(call.batch, call.routes, call.length, call.channels, dtype=torch.float32 if added else call.dtype)
    if call.route is not None and not is_permutation(call.route, call.length):
        y.zero_()
    final = call.new_state()
    _, programs = call.chunks(call.steps, FORWARD_STEPS)
    launch(
        _forward, programs, call.x, call.weight, call.bias, call.initial, *call.table, rows(y), final, *call.sizes,
        SILU=silu, W=call.width, T=FORWARD_STEPS, BLOCK=call.block,
    )  # fmt: skip
    if merge:
        y = y.sum(1).to(call.dtype) if added else y[:, 0]
    return y, final.mT


def backward(grad_output: Tensor, grad_state: Tensor | None, *args) -> list[Tensor]:
    """Its gradients, see `Implementation.backward`."""
    x, weight, bias, silu, initial_state, route, merge = args
    call = _Call(*args)
    grad_state = None if grad_state is None else grad_state.float().mT.contiguous()
    dx = TokenGradient(x, call.routes, call.route)
    chunks, programs = call.chunks(call.steps + call.width - 1, BACKWARD_STEPS)
    dweight = call.new(call.batch, chunks, call.routes, call.width, call.channels)
    dbias = None if bias is None else call.new(call.batch, chunks, call.routes, call.channels)
    dinitial = None if initial_state is None else call.new_state()
    launch(
        _backward, programs, rows(grad_output.unsqueeze(1) if merge else grad_output), grad_state, call.x, call.weight,
        call.bias, call.initial, *call.table, dx.rows, dweight, dbias, dinitial, *call.sizes,
        SILU=silu, BY_STEP=dx.by_step, W=call.width, T=BACKWARD_STEPS, BLOCK=call.block,
    )  # fmt: skip
    grads = [dx.finish(), dweight.sum((0, 1)).mT.to(weight.dtype)]
    if bias is not None:
        grads.append(dbias.sum((0, 1)).to(bias.dtype))
    if initial_state is not None:
        grads.append(dinitial.mT.to(initial_state.dtype))
    return grads
