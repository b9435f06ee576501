"""What chunked forms are made of: pieces of time, elementwise scans in about 2 sqrt(T) vectorised steps, and for matrix
states the scores inside chunks, under decay, and the states between them."""

from math import inf, isqrt
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._compat import is_transformed

__all__ = [
    "decayed_scores",
    "gated_outer_products",
    "join",
    "linear_scan",
    "numbers_at_a_time",
    "running",
    "running_max",
    "segment_sums",
    "solve_unit_lower",
    "split",
    "steps_at_a_time",
    "through_chunks",
]

CHUNK = 32  # tokens that one matrix product covers; a power of two
_MILD = 16.0  # a chunk's log decay up to which exp of its gates' sums is exact enough, and far from overflow


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


def _apply(function: type[torch.autograd.Function], *inputs):
    """`function.apply`, whose own work is that of a small scan, only where a gradient may be asked for."""
    if (
        torch.compiler.is_compiling()
        or is_transformed()
        or torch.is_grad_enabled()
        and any([isinstance(x, Tensor) and x.requires_grad for x in inputs])
    ):
        return function.apply(*inputs)
    return function.forward(*inputs)


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
    return _apply(_LinearScan, a, x, initial, reverse, chunk)


# -- matrix states ---------------------------------------------------------------------------------------------------


def split(*tokens: Tensor) -> list[Tensor]:
    """Tokens in time order (B, K, T, H, d) as chunks (B, K, H, N, C, d), zeros after the last token.

    C is `CHUNK`, or less for a shorter sequence. Zero keys and zero gates leave a state as it is.
    """
    length = tokens[0].shape[2]
    size = min(CHUNK, 1 << (length - 1).bit_length())
    padding = -length % size
    tokens = [x.transpose(2, 3) for x in tokens]
    tokens = [F.pad(x, (0, 0, 0, padding)) if padding else x for x in tokens]
    return [x.contiguous().unflatten(3, (-1, size)) for x in tokens]


def join(chunks: Tensor, length: int) -> Tensor:
    """(B, K, H, N, C, d) back to (B, K, T, H, d)."""
    return chunks.flatten(3, 4)[:, :, :, :length].transpose(2, 3)


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(..., C, d) as left and right halves of blocks of two `size` tokens: views (..., blocks, size, d)."""
    return x.unflatten(-2, (-1, 2, size)).unbind(-3)


def _corners(scores: Tensor, size: int) -> Tensor:
    """Where right halves meet left ones: the view (..., blocks, size, size) of scores (..., C, C)."""
    tiles = scores.unflatten(-2, (-1, 2, size)).unflatten(-1, (-1, 2, size))
    return tiles.select(-5, 1).select(-2, 0).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _boundaries(before: Tensor, after: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For halves of 1, 2, 4... tokens: the size, the decay from the boundary to each token of the right half, and from
    each token of the left half to the boundary.

    `before` comes in as the gates, `after` as zeros; in place, they grow into the sums that `decayed_scores` returns.
    """
    size = 1
    while size < before.shape[-2]:
        (before_left, before_right), (after_left, _) = _halves(before, size), _halves(after, size)
        yield size, before_right.exp(), after_left.exp()
        after_left += before_right[..., -1:, :]
        before_right += before_left[..., -1:, :]
        size *= 2


def _is_mild(g: Tensor) -> bool:
    """Whether no chunk decays beyond e^-16. On a GPU, where asking would stop its queue, the answer is no."""
    return g.is_cpu and bool(g.sum(-2).amin() > -_MILD)


class _DecayedScores(torch.autograd.Function):
    @staticmethod
    def forward(q, k, g):
        if _is_mild(g):
            before = g.cumsum(-2)
            decay = before.exp()
            return ((q * decay) @ (k / decay).mT).tril_(), before, before[..., -1:, :] - before
        leading = torch.broadcast_shapes(q.shape[:-1], k.shape[:-1], g.shape[:-1])
        scores = q.new_zeros(*leading, q.shape[-2])
        scores.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
        before, after = g.clone(), torch.zeros_like(g)
        for size, arriving, leaving in _boundaries(before, after):
            right, left = _halves(q, size)[1] * arriving, _halves(k, size)[0] * leaving
            _corners(scores, size).copy_(right @ left.mT)
        return scores, before, after

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad, grad_before, grad_after):
        q, k, g = ctx.saved_tensors
        if _is_mild(g):
            decay, below = g.cumsum(-2).exp(), grad.tril(-1)
            of_q = (below @ (k / decay) * decay).sum_to_size(q.shape)
            of_k = (below.mT @ (q * decay) / decay).sum_to_size(k.shape)
        else:
            of_q, of_k = torch.zeros_like(q), torch.zeros_like(k)
            for size, arriving, leaving in _boundaries(g.clone(), torch.zeros_like(g)):
                q_right, k_left, corner = _halves(q, size)[1], _halves(k, size)[0], _corners(grad, size)
                right, left = corner @ (k_left * leaving) * arriving, corner.mT @ (q_right * arriving) * leaving
                _halves(of_q, size)[1].add_(right.sum_to_size(q_right.shape))
                _halves(of_k, size)[0].add_(left.sum_to_size(k_left.shape))
        # A score has a factor exp(b_i - b_j), b the running sum of the gates: so b's gradient is q dq - k dk, and a
        # gate's is the sum of b's from there on. The diagonal, without a gate, comes in after it: in b's gradient it
        # would leave the rounding errors of two equal terms.
        of_b = (q * of_q).sum_to_size(g.shape) - (k * of_k).sum_to_size(g.shape) + grad_before
        of_g = of_b.flip(-2).cumsum(-2).flip(-2) + F.pad(grad_after[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)
        own = grad.diagonal(dim1=-2, dim2=-1)[..., None]
        return of_q + (own * k).sum_to_size(q.shape), of_k + (own * q).sum_to_size(k.shape), of_g


def decayed_scores(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention scores inside chunks, under decay, by halving.

        scores[i, j] = sum_c q[i, c] k[j, c] exp(g[j+1, c] + ... + g[i, c])   for j <= i, otherwise 0

    A block of tokens is two halves. A query in the right half meets a key in the left half across the boundary between
    them, so the decay is a factor exp(gates from the boundary to i) of the query times a factor exp(gates from j to the
    boundary) of the key, and the square of scores is one matrix product. Gates are only ever added, so no exponent is
    positive and none comes from a difference of long sums. Where whole chunks decay so little that neither matters,
    one boundary, in front of the first token, serves all of them.

    Args:
        q, k: (..., C, d), C a power of two; leading axes broadcast.
        g: (..., C, d) or (..., C, 1), log decays <= 0.

    Returns:
        scores (..., C, C); the gates summed from the chunk's start up to and with i, and from after i to the chunk's
        end, both shaped like g. Differentiable once.
    """
    return _apply(_DecayedScores, q, k, g)


def segment_sums(g: Tensor) -> tuple[Tensor, Tensor]:
    """Log decays (..., T) -> their sums over (j, i], (..., T, T) with -inf above the diagonal; their sums up to i.

    Summed for every j by itself: differences of one long sum would lose what a strong decay before j has swallowed.
    """
    above = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu()
    sums = g.unsqueeze(-1).expand(*g.shape, g.shape[-1]).masked_fill(above, 0).cumsum(-2)
    return sums.masked_fill(above.triu(1), -inf), g.cumsum(-1)


def running(decay: Tensor, added: Tensor, state: Tensor, dim: int) -> Tensor:
    """All states of state = decay * state + added along axis `dim`: the first one, then one after every step."""
    states = [state]
    for kept, new in zip(decay.unbind(dim), added.unbind(dim)):
        states.append(kept * states[-1] + new)
    return torch.stack(states, dim)


def gated_outer_products(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor):
    """Gated linear attention in matrix products: S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t.

    A few chunks at a time on a CPU, so that their tensors stay in its cache.

    Args:
        q, k: (B, K, T, H, dk).
        v: (B, K, T, H, dv).
        g: log decays <= 0 (B, K, T, H, dk), or (B, K, T, H, 1) for one per head.
        scale: of the queries.
        state: before the first token (B, K, H, dk, dv).

    Returns:
        Outputs (B, K, T, H, dv), and the state after the last token.
    """
    outputs = []
    steps = steps_at_a_time(max(q, v, key=Tensor.numel), 4, CHUNK)
    for piece in zip(*(x.split(steps, 2) for x in (q, k, v, g))):
        output, state = _piece(*piece, scale=scale, state=state)
        outputs.append(output)
    return torch.cat(outputs, 2), state


def _piece(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor):
    length = q.shape[2]
    q, k, v, g = split(scale * q, k, v, g)
    scores, before, after = decayed_scores(q, k, g)
    kept = before[..., -1, :, None].exp()  # what a whole chunk leaves of a state
    states = running(kept, (k * after.exp()).mT @ v, state, 3)
    return join(scores @ v + (q * before.exp()) @ states[:, :, :, :-1], length), states[:, :, :, -1]


def through_chunks(transition, added, readout, output, state, length) -> tuple[Tensor, Tensor]:
    """Output and final state, where chunk n maps S to transition_n S + added_n and outputs readout_n S + output_n.

    Args:
        transition, added: (B, K, H, N, dk, dk) and (B, K, H, N, dk, dv).
        readout, output: (B, K, H, N, C, dk) and (B, K, H, N, C, dv).
    """
    entering = []
    for kept, new in zip(transition.unbind(3), added.unbind(3)):
        entering.append(state)
        state = kept @ state + new
    return join(output + readout @ torch.stack(entering, 3), length), state


def solve_unit_lower(lower: Tensor, *sides: Tensor) -> tuple[Tensor, ...]:
    """(I + the strictly lower part of `lower`)^-1 times each of `sides`."""
    solution = torch.linalg.solve_triangular(lower, torch.cat(sides, -1), upper=False, unitriangular=True)
    return solution.split([x.shape[-1] for x in sides], -1)
