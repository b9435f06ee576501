"""What chunked forms are made of: pieces of time, and elementwise scans in about 2 sqrt(T) vectorised steps."""

from math import isqrt
from typing import Callable, NamedTuple

import torch
from torch import Tensor

__all__ = ["numbers_at_a_time", "steps_at_a_time", "running_max", "linear_scan"]


def numbers_at_a_time(device: torch.device) -> int:
    """Numbers in a tensor that a CPU keeps in its cache, or that a GPU has plenty of room for."""
    return 2**18 if device.type == "cpu" else 2**25


def steps_at_a_time(x: Tensor, tensors: int = 1, multiple: int = 1) -> int:
    """Steps of tokens x (B, K, T, ...) to take at a time, so that so many tensors like x have that many numbers."""
    return max(1, numbers_at_a_time(x.device) * x.shape[2] // max(1, x.numel() * tensors * multiple)) * multiple


class _Semiring(NamedTuple):
    """What a scan h_t = a_t * h_{t-1} + x_t means by "*" and "+"."""

    fold: Callable  # x, a, h: x becomes a * h + x, in place
    join: Callable  # a, b: a becomes a * b, in place


_LINEAR = _Semiring(lambda x, a, h: x.addcmul_(a, h), Tensor.mul_)
_MAX_PLUS = _Semiring(lambda x, a, h: torch.maximum(x, a + h, out=x), Tensor.add_)


def _scan(ring: _Semiring, a: Tensor, x: Tensor, initial: Tensor, reverse: bool, chunk: int | None) -> Tensor:
    """The scan of `linear_scan` with any meaning of times and plus.

    Every chunk is scanned from nothing, all chunks at once; then the states that enter the chunks, one after another;
    then each of them is added to its chunk. The last chunk's empty places come after all tokens, so they hold anything.
    """
    length, channels = x.shape[-2:]
    size = chunk or isqrt(max(length - 1, 0)) + 1
    chunks = -(-length // size)
    h = x.new_empty(*x.shape[:-2], chunks * size + 1, channels)
    states = slice(chunks * size - length, None) if reverse else slice(length + 1)
    inside = h[..., :-1, :] if reverse else h[..., 1:, :]
    tokens = slice(chunks * size - length, None) if reverse else slice(length)
    inside[..., tokens, :] = x
    h[..., -1 if reverse else 0, :] = initial
    inside = inside.unflatten(-2, (chunks, size))
    if a.shape[-2] == 1:  # one factor for all steps: one chunk's products serve every chunk
        within = a.unsqueeze(-3).repeat_interleave(size, -2)
    else:
        within = a.new_empty(*a.shape[:-2], chunks * size, channels)
        within[..., tokens, :] = a
        within = within.unflatten(-2, (chunks, size))
    forth = slice(None, None, -1 if reverse else 1)
    steps, factors = inside.unbind(-2)[forth], within.unbind(-2)[forth]
    for i in range(1, size):
        ring.fold(steps[i], factors[i], steps[i - 1])
        ring.join(factors[i], factors[i - 1])
    within = within.expand(*within.shape[:-3], chunks, size, channels)
    ends, whole = (x[..., 0 if reverse else -1, :].unbind(-2)[forth] for x in (inside, within))
    for end, factor, start in zip(ends, whole, h[..., ::size, :].unbind(-2)[forth]):
        ring.fold(end, factor, start)
    entering = h[..., size::size, :] if reverse else h[..., :-1:size, :]
    rest = slice(1, None) if reverse else slice(size - 1)
    ring.fold(inside[..., rest, :], within[..., rest, :], entering.unsqueeze(-2))
    return h[..., states, :]


def running_max(decay: Tensor, x: Tensor, initial: Tensor, reverse: bool = False, chunk: int | None = None) -> Tensor:
    """States 0..T of h_{t+1} = max(h_t + decay_t, x_t), h_0 = initial, without a gradient; else as `linear_scan`."""
    return _scan(_MAX_PLUS, decay.detach(), x.detach(), initial.detach(), reverse, chunk)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(a, x, initial, reverse, chunk):
        return _scan(_LINEAR, a, x, initial, reverse, chunk)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, _, _, ctx.reverse, ctx.chunk = inputs
        ctx.save_for_backward(a, output)

    @staticmethod
    def backward(ctx, grad):
        """The adjoint is the same scan the other way: it starts from the last state's gradient."""
        a, h = ctx.saved_tensors
        if ctx.reverse:
            adjoint = _scan(_LINEAR, a, grad[..., 1:, :], grad[..., 0, :], False, ctx.chunk)
            of_x, of_initial, read = adjoint[..., :-1, :], adjoint[..., -1, :], h[..., 1:, :]
        else:
            adjoint = _scan(_LINEAR, a, grad[..., :-1, :], grad[..., -1, :], True, ctx.chunk)
            of_x, of_initial, read = adjoint[..., 1:, :], adjoint[..., 0, :], h[..., :-1, :]
        return (of_x * read).sum_to_size(a.shape), of_x, of_initial, None, None


def linear_scan(a: Tensor, x: Tensor, initial: Tensor, reverse: bool = False, chunk: int | None = None) -> Tensor:
    """States 0..T of h_{t+1} = a_t h_t + x_t from h_0 = initial, elementwise, in about 2 sqrt(T) vectorised steps.

    Args:
        a: (..., T, D) factors, or (..., 1, D) for the same at every step; stable for |a| <= 1.
        x: (..., T, D), possibly with more leading axes than `a`, which then serves them all.
        initial: as x without its T axis.
        reverse: h_t = a_t h_{t+1} + x_t from h_T = initial instead.
        chunk: steps a chunk; sqrt(T) if None.

    Returns:
        (..., T + 1, D), the initial state among them (first, or last if reversed). Differentiable once.
    """
    return _LinearScan.apply(a, x, initial, reverse, chunk)
