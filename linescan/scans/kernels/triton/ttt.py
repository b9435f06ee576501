"""TTT-Linear in Triton: one program walks along a head, and holds its weights in registers.

Mini-batches are serial, and a few small products each. The weights that enter one are all that the backward needs of
the forward, which runs again to have them. Rates, one number a head and step, are plain torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.ttt import EPS
from ...visits import is_permutation, visited
from .common import TokenGradient, again, in_time, rows, visits
from .gla import _power, merged

# -- inside a mini-batch ----------------------------------------------------------------------------------------------
# Tiles are turned, (channels, C), and the weights with them, (channels out, channels in): so every product has channels
# for its rows, which is what tensor cores share out between warps.


@triton.jit
def _tile(x, b, k, head, at, real, channels, D: tl.constexpr):
    """Tokens `at` of a head of x, a Rows, as (channels, C) in float32; zeros where not `real`."""
    start = x.data + b * x.batch + k * x.route + head * x.group
    mask = real[None, :] & (channels < D)[:, None]
    return tl.load(start + at[None, :] * x.token + channels[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(x, b, k, head, at, real, channels, value, D: tl.constexpr):
    start = x.data + b * x.batch + k * x.route + head * x.group
    mask = real[None, :] & (channels < D)[:, None]
    tl.store(start + at[None, :] * x.token + channels[:, None], value.to(x.data.dtype.element_ty), mask=mask)


@triton.jit
def _heads(x, b, r, head, step, inside):
    """Numbers of a head in time order (1, C)."""
    start = x.data + b * x.batch + r * x.route + head
    return tl.load(start + step * x.token, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _matrix(x, D: tl.constexpr, BD: tl.constexpr):
    """Places and masks of the weights, turned, and of their last row (BD, 1) in (D + 1, D) at x."""
    i = tl.arange(0, BD)
    mask = (i < D)[:, None]
    return x + i[:, None] + i[None, :] * D, mask & (i < D)[None, :], (x + D * D + i)[:, None], mask


@triton.jit
def _kept(x, D: tl.constexpr, BD: tl.constexpr):
    """The weights, turned, and their last row, from (D + 1, D) at x."""
    at, mask, at_row, row_mask = _matrix(x, D, BD)
    return tl.load(at, mask=mask, other=0.0), tl.load(at_row, mask=row_mask, other=0.0)


@triton.jit
def _keep(x, weights, weights_row, D: tl.constexpr, BD: tl.constexpr):
    """Stores the weights, turned, and their last row in (D + 1, D) at x."""
    at, mask, at_row, row_mask = _matrix(x, D, BD)
    tl.store(at, weights, mask=mask)
    tl.store(at_row, weights_row, mask=row_mask)


@triton.jit
def _place(n, lead, route, route_batch, b, r, S, MINI: tl.constexpr, C: tl.constexpr):
    """(step, token, read, written, inside) of mini-batch n; of the first, `lead` places were taken before."""
    i = tl.arange(0, C)
    step = n * MINI - lead + i
    step = tl.where((i < MINI) & (step >= 0), step, S)
    token, read, written, inside = visits(route, route_batch, b, r, step, S)
    return step, token, read, written, inside


@triton.jit
def _over_channels(x):
    return tl.sum(x, 0)[None, :]


@triton.jit
def _over_tokens(x):
    return tl.sum(x, 1)[:, None]


@triton.jit
def _normalized(z, real, D: tl.constexpr, EPS: tl.constexpr):
    """z (channels, C), those that are `real`, with mean 0 and variance 1, and 1 / standard deviation (1, C)."""
    z = tl.where(real, z - _over_channels(z) / D, 0.0)
    factor = tl.rsqrt(_over_channels(z * z) / D + EPS)
    return z * factor, factor


@triton.jit
def _through(x, normal, real, D: tl.constexpr):
    """x less its parts along 1 and along `normal`: the derivative of a layer norm is this times its factor."""
    along = normal * (_over_channels(x * normal) / D)
    return tl.where(real, x - _over_channels(x) / D - along, 0.0)


@triton.jit
def _learn(
    keys, queries, values, lr, weight, bias, start, start_row, pending, pending_row, real,
    D: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(normal, factor, inner, slope) of what keys read; (scores (keys, queries), changes, readout) of queries."""
    i = tl.arange(0, keys.shape[1])
    normal, factor = _normalized(tl.dot(start, keys, input_precision=PRECISION) + start_row, real, D, EPS)
    inner = weight * (weight * normal + bias - (values - keys))
    slope = factor * _through(inner, normal, real, D)
    scores = tl.dot(tl.trans(keys), queries, input_precision=PRECISION) + 1.0
    scores = tl.where(i[:, None] <= i[None, :], scores, 0.0)
    changes = tl.dot(pending, queries, input_precision=PRECISION) + pending_row
    changes += tl.dot(lr * slope, scores, input_precision=PRECISION)
    readout = tl.dot(start, queries, input_precision=PRECISION) + start_row
    return normal, factor, inner, slope, scores, changes, readout


# -- kernels ----------------------------------------------------------------------------------------------------------
# Arguments that both share:
#     q, k, v           Rows of the tokens
#     lr, rate          Rows of numbers a head, in time order
#     weight, bias      (H, D) of the layer norm
#     start, pending    (rows, D + 1, D)
#     states            (rows, N, D + 1, D): the weights that enter each mini-batch, or None


@triton.jit
def _forward(
    q, k, v, lr, rate, weight, bias, route, route_batch, start, pending, states, out, last, last_pending,
    scale, lead, N, H, K, S,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, MINI: tl.constexpr, RESIDUAL: tl.constexpr,
    EPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, r, head = row // (H * K), row // H % K, row % H
    channels = tl.arange(0, BD)
    real = (channels < D)[:, None]
    w = tl.load((weight + head * D + channels)[:, None], mask=real, other=0.0)
    shift = tl.load((bias + head * D + channels)[:, None], mask=real, other=0.0)
    weights, weights_row = _kept(start + row * (D + 1) * D, D, BD)
    waiting, waiting_row = _kept(pending + row * (D + 1) * D, D, BD)
    for n in range(0, N):
        if states is not None:
            _keep(states + (row * N + n) * (D + 1) * D, weights, weights_row, D, BD)
        step, token, read, written, inside = _place(n, lead, route, route_batch, b, r, S, MINI, C)
        keys = _tile(k, b, r, head, token, read, channels, D)
        queries = _tile(q, b, r, head, token, read, channels, D)
        values = _tile(v, b, r, head, token, read, channels, D)
        learning, reading = _heads(lr, b, r, head, step, inside), _heads(rate, b, r, head, step, inside)
        _, _, _, slope, _, changes, readout = _learn(
            keys, scale * queries, values, learning, w, shift, weights, weights_row, waiting, waiting_row, real,
            D, EPS, PRECISION,
        )  # fmt: skip
        readout -= reading * changes
        normal, _ = _normalized(readout, real, D, EPS)
        result = (readout if RESIDUAL else queries) + w * normal + shift
        _store(out, b, r, head, token, written, channels, result, D)
        waiting += tl.dot(learning * slope, tl.trans(keys), input_precision=PRECISION)
        waiting_row += _over_tokens(learning * slope)
        full = (n + 1) * MINI - lead <= S  # the mini-batch
        final = tl.sum(tl.where(tl.arange(0, C)[None, :] == MINI - 1, reading, 0.0))  # 0 where not full
        weights -= final * waiting
        weights_row -= final * waiting_row
        waiting = tl.where(full, 0.0, waiting)
        waiting_row = tl.where(full, 0.0, waiting_row)
    _keep(last + row * (D + 1) * D, weights, weights_row, D, BD)
    _keep(last_pending + row * (D + 1) * D, waiting, waiting_row, D, BD)


@triton.jit
def _backward(
    q, k, v, lr, rate, weight, bias, route, route_batch, pending, states, grad, grad_last, grad_pending,
    dq, dk, dv, dlr, drate, dweight, dbias, dstart, dpending, scale, lead, N, H, K, S,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, MINI: tl.constexpr, RESIDUAL: tl.constexpr,
    EPS: tl.constexpr, PRECISION: tl.constexpr, BY_STEP: tl.constexpr,
):  # fmt: skip
    """dweight, dbias: (rows, D), a share of every row; dlr, drate: Rows in time order."""
    row = tl.program_id(0).to(tl.int64)
    b, r, head = row // (H * K), row // H % K, row % H
    i = tl.arange(0, C)
    channels = tl.arange(0, BD)
    real = (channels < D)[:, None]
    w = tl.load((weight + head * D + channels)[:, None], mask=real, other=0.0)
    shift = tl.load((bias + head * D + channels)[:, None], mask=real, other=0.0)
    of_w, of_shift = tl.zeros((BD, 1), tl.float32), tl.zeros((BD, 1), tl.float32)
    of_weights, of_weights_row = _kept(grad_last + row * (D + 1) * D, D, BD)
    of_waiting, of_waiting_row = _kept(grad_pending + row * (D + 1) * D, D, BD)
    for back in range(0, N):
        n = N - 1 - back
        weights, weights_row = _kept(states + (row * N + n) * (D + 1) * D, D, BD)
        at, mask, at_row, row_mask = _matrix(pending + row * (D + 1) * D, D, BD)  # later ones begin with nothing
        waiting = tl.load(at, mask=mask & (n == 0), other=0.0)
        waiting_row = tl.load(at_row, mask=row_mask & (n == 0), other=0.0)
        step, token, read, written, inside = _place(n, lead, route, route_batch, b, r, S, MINI, C)
        keys = _tile(k, b, r, head, token, read, channels, D)
        queries = scale * _tile(q, b, r, head, token, read, channels, D)
        values = _tile(v, b, r, head, token, read, channels, D)
        grads = _tile(grad, b, r, head, token, written, channels, D)
        learning, reading = _heads(lr, b, r, head, step, inside), _heads(rate, b, r, head, step, inside)
        normal, factor, inner, slope, scores, changes, readout = _learn(
            keys, queries, values, learning, w, shift, weights, weights_row, waiting, waiting_row, real,
            D, EPS, PRECISION,
        )  # fmt: skip
        steps = learning * slope
        read_normal, read_factor = _normalized(readout - reading * changes, real, D, EPS)

        # The output.
        of_w += _over_tokens(grads * read_normal)
        of_shift += _over_tokens(grads)
        of_readout = read_factor * _through(w * grads, read_normal, real, D)
        of_query = tl.zeros((BD, C), tl.float32)
        if RESIDUAL:
            of_readout += grads
        else:
            of_query += grads
        of_rate = -_over_channels(of_readout * changes)
        of_changes = -reading * of_readout

        # The weights that the mini-batch leaves, if it is full.
        full = (n + 1) * MINI - lead <= S
        is_last = (i == MINI - 1)[None, :]  # no step where not full
        final = tl.sum(tl.where(is_last, reading, 0.0))
        sums = waiting + tl.dot(steps, tl.trans(keys), input_precision=PRECISION)
        share = tl.sum(tl.sum(of_weights * sums, 1), 0)
        share += tl.sum(tl.sum(of_weights_row * (waiting_row + _over_tokens(steps)), 1), 0)
        of_rate -= tl.where(is_last, share, 0.0)
        of_waiting = tl.where(full, -final * of_weights, of_waiting)
        of_waiting_row = tl.where(full, -final * of_weights_row, of_waiting_row)

        # The slopes, and the layer norm under them.
        of_steps = tl.dot(of_changes, tl.trans(scores), input_precision=PRECISION)
        of_steps += tl.dot(of_waiting, keys, input_precision=PRECISION) + of_waiting_row
        of_scores = tl.dot(tl.trans(steps), of_changes, input_precision=PRECISION)
        of_scores = tl.where(i[:, None] <= i[None, :], of_scores, 0.0)
        of_lr = _over_channels(of_steps * slope)
        of_slope = learning * of_steps
        of_inner = factor * _through(of_slope, normal, real, D)
        with_inner, with_slope = _over_channels(inner * normal) / D, _over_channels(of_slope * normal) / D
        of_normal = w * w * of_inner - factor * (of_slope * with_inner + inner * with_slope)
        of_w += _over_tokens(of_inner * (2 * w * normal + shift - (values - keys)))
        of_shift += _over_tokens(of_inner * w)
        of_z = factor * _through(of_normal, normal, real, D)
        of_z -= factor * normal * (_over_channels(of_slope * slope) / D)  # through the factor of the slope
        of_target = -w * of_inner

        of_query += scale * tl.dot(keys, of_scores, input_precision=PRECISION)
        of_query += scale * tl.dot(tl.trans(weights), of_readout, input_precision=PRECISION)
        of_query += scale * tl.dot(tl.trans(waiting), of_changes, input_precision=PRECISION)
        of_key = tl.dot(queries, tl.trans(of_scores), input_precision=PRECISION) - of_target
        of_key += tl.dot(tl.trans(of_waiting), steps, input_precision=PRECISION)
        of_key += tl.dot(tl.trans(weights), of_z, input_precision=PRECISION)
        of_weights += tl.dot(of_readout, tl.trans(queries), input_precision=PRECISION)
        of_weights += tl.dot(of_z, tl.trans(keys), input_precision=PRECISION)
        of_weights_row += _over_tokens(of_readout) + _over_tokens(of_z)
        of_waiting += tl.dot(of_changes, tl.trans(queries), input_precision=PRECISION)
        of_waiting_row += _over_tokens(of_changes)

        place = step.to(tl.int64) if BY_STEP else token
        _store(dq, b, r, head, place, read, channels, of_query, D)
        _store(dk, b, r, head, place, read, channels, of_key, D)
        _store(dv, b, r, head, place, read, channels, of_target, D)
        at_heads = b * dlr.batch + r * dlr.route + head + step[None, :] * dlr.token
        tl.store(dlr.data + at_heads, of_lr, mask=inside[None, :])
        tl.store(drate.data + at_heads, of_rate, mask=inside[None, :])
    tl.store((dweight + row * D + channels)[:, None], of_w, mask=real)
    tl.store((dbias + row * D + channels)[:, None], of_shift, mask=real)
    _keep(dstart + row * (D + 1) * D, of_weights, of_weights_row, D, BD)
    _keep(dpending + row * (D + 1) * D, of_waiting, of_waiting_row, D, BD)


# -- on the host ------------------------------------------------------------------------------------------------------


class MiniBatches(torch.autograd.Function):
    """The kernels as a function that plain torch can stand around.

    Takes q, k, v in grid order, lr and rate (B, K, S, H) in time order, weight, bias, start and pending, these in
    float32; and route, mini_batch, scale, residual, position. Returns outputs in grid order and float32, and the last
    start and pending.
    """

    @staticmethod
    def _common(q, k, v, lr, rate, weight, bias, start, pending, route, mini_batch, scale, residual, position):
        """Arguments of both kernels: those before the states, numbers, constants; and the number of mini-batches."""
        batch, routes, steps, heads = lr.shape
        lead, width = position % mini_batch, _power(q.shape[4])
        chunks = triton.cdiv(lead + steps, mini_batch)
        table = route, 0 if route is None or route.ndim == 2 else route.stride(0)
        inputs = *(rows(x) for x in (q, k, v, lr, rate)), weight, bias, *table
        exact = torch.float32 in (q.dtype, k.dtype, v.dtype)
        constants = dict(
            D=q.shape[4], BD=width, C=_power(mini_batch), MINI=mini_batch, RESIDUAL=residual, EPS=EPS,
            PRECISION="tf32x3" if exact else "tf32", num_warps=max(1, width // 8), num_stages=1,
        )  # fmt: skip
        return inputs, (float(scale), lead, chunks, heads, routes, steps), constants

    @staticmethod
    def forward(ctx, *args):
        q, lr, start, pending, route = args[0], args[3], *args[7:10]
        inputs, numbers, constants = MiniBatches._common(*args)
        batch, routes, _, heads = lr.shape
        whole = route is None or is_permutation(route, q.shape[2])
        out = (torch.empty if whole else torch.zeros)(
            batch, routes, q.shape[2], heads, q.shape[4], dtype=torch.float32, device=q.device
        )
        last, last_pending = torch.empty_like(start), torch.empty_like(pending)
        count = batch * routes * heads
        states = start.new_empty(count, numbers[2], *start.shape[3:]) if any(ctx.needs_input_grad) else None
        _forward[(count,)](*inputs, start, pending, states, rows(out), last, last_pending, *numbers, **constants)
        ctx.save_for_backward(*args[:10], states)
        ctx.options = args[10:]
        return out, last, last_pending

    @staticmethod
    def backward(ctx, grad, grad_last, grad_pending):
        *args, states = ctx.saved_tensors
        q, k, v, lr, _, _, _, start, pending, route = args
        inputs, numbers, constants = MiniBatches._common(*args, *ctx.options)
        batch, routes, _, heads = lr.shape
        count = len(states)
        tokens = [TokenGradient(x, routes, route) for x in (q, k, v)]
        dlr, drate = torch.empty_like(lr), torch.empty_like(lr)
        dweight, dbias = lr.new_empty(count, q.shape[4]), lr.new_empty(count, q.shape[4])
        dstart, dpending = torch.empty_like(start), torch.empty_like(pending)
        _backward[(count,)](
            *inputs, pending, states, rows(grad), grad_last.contiguous(), grad_pending.contiguous(),
            *(x.rows for x in tokens), rows(dlr), rows(drate), dweight, dbias, dstart, dpending, *numbers, **constants,
            BY_STEP=tokens[0].by_step,
        )  # fmt: skip
        of_norm = (x.view(-1, heads, q.shape[4]).sum(0) for x in (dweight, dbias))
        return *(x.finish() for x in tokens), dlr, drate, *of_norm, dstart, dpending, *[None] * 5


def forward(
    q, k, v, lr, eta, token, weight, bias, mini_batch, scale, residual, start, pending, position, route, merge
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    given = [x for x in (q, k, v, lr, eta) if x is not None]
    batch, routes, _ = visited(given, route)
    lr, rate = (None if x is None else in_time(x, route).float().expand(batch, routes, -1, -1) for x in (lr, eta))
    rate = torch.ones_like(lr) if rate is None else rate
    if token is not None:
        places = (position + torch.arange(lr.shape[2], device=lr.device)) % mini_batch
        rate = rate * token.float().clamp_min(0)[places][:, None]
    shape = batch, routes, lr.shape[3], q.shape[4] + 1, q.shape[4]
    start, pending = (lr.new_zeros(shape) if x is None else x.float().contiguous() for x in (start, pending))
    small = weight.float().contiguous(), bias.float().contiguous(), start, pending
    options = None if route is None else route.contiguous(), mini_batch, scale, residual, position
    output, *states = MiniBatches.apply(q, k, v, lr.contiguous(), rate.contiguous(), *small, *options)
    return merged(output, merge, q.dtype), tuple(states)


backward = again(forward)
