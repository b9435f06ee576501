"""Gated linear attention and its relatives: a matrix state per head that decays and takes in one outer product a token.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T          o_t = scale * S_t^T q_t

- `gla`: a log decay for every key channel. Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient
  Training", 2023, arXiv 2312.06635, equation 3.
- `simple_gla`: one log decay a head. The same paper, table 1; the core of Mamba-2 (Dao and Gu, 2024, arXiv 2405.21060).
- `retention`: one constant decay a head. Sun et al., "Retentive Network", 2023, arXiv 2307.08621, equations 5 to 8.
- `hgrn2`: keys tied to the forget gate. Qin et al., "HGRN2: Gated Linear RNNs with State Expansion", 2024,
  arXiv 2404.07904, equation 5.

Bidirectional forms are two routes, a row order and its reverse, over the same q, k, v with one set of gates a route.
"""

from typing import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunks import steps_at_a_time
from .recurrence import call, check_shapes, recurrence

__all__ = ["gla", "simple_gla", "retention", "hgrn2"]

CHUNK = 32  # tokens that one matrix product covers; a power of two
_MILD = 16.0  # a chunk's log decay up to which exp of its gates' sums is exact enough, and far from overflow


# -- what the head-wise recurrences share ---------------------------------------------------------------------------


def head_shapes(batch, routes, length, q, k, v, *_):
    """Output and state shapes of a recurrence over q, k (..., H, dk) and v (..., H, dv)."""
    return (batch, routes, length, *v.shape[3:]), (batch, routes, q.shape[3], q.shape[4], v.shape[4])


def head_flops(q, k, v, *_):
    """Decay and update of a dk x dv state (3 operations an element) and its readout (2)."""
    routes = max(q[1], k[1], v[1])
    return 5 * q[0] * routes * q[2] * q[3] * q[4] * v[4]


def empty_state(q: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    """The state before the first token (B, K, H, dk, dv): the one given, or zeros."""
    if initial_state is not None:
        return initial_state
    return q.new_zeros(*q.shape[:2], *q.shape[3:], v.shape[-1])


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
    return _DecayedScores.apply(q, k, g)


def running(decay: Tensor, added: Tensor, state: Tensor, dim: int) -> Tensor:
    """All states of state = decay * state + added along axis `dim`: the first one, then one after every step."""
    states = [state]
    for kept, new in zip(decay.unbind(dim), added.unbind(dim)):
        states.append(kept * states[-1] + new)
    return torch.stack(states, dim)


# -- the recurrences ------------------------------------------------------------------------------------------------


def _sequential(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None):
    """The definition, for g (B, K, T, H, dk) or (B, K, T, H, 1)."""
    state = empty_state(q, v, initial_state)
    outputs = []
    for q_t, k_t, v_t, g_t in zip(*(x.unbind(2) for x in (q, k, v, g))):
        state = g_t.exp()[..., None] * state + k_t[..., None] * v_t[..., None, :]
        outputs.append(scale * (q_t[..., None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 2), state


def _in_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None):
    """The same in matrix products, a few chunks at a time on a CPU, so that their tensors stay in its cache."""
    state, outputs = empty_state(q, v, initial_state), []
    steps = steps_at_a_time(max(q, v, key=Tensor.numel), 4, CHUNK)
    for piece in zip(*(x.split(steps, 2) for x in (q, k, v, g))):
        output, state = _piece(*piece, scale, state)
        outputs.append(output)
    return torch.cat(outputs, 2), state


def _piece(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor):
    length = q.shape[2]
    q, k, v, g = split(scale * q, k, v, g)
    scores, before, after = decayed_scores(q, k, g)
    kept = before[..., -1, :, None].exp()  # what a whole chunk leaves of a state
    states = running(kept, (k * after.exp()).mT @ v, state, 3)
    return join(scores @ v + (q * before.exp()) @ states[:, :, :, :-1], length), states[:, :, :, -1]


@recurrence(tokens=("q", "k", "v", "g"), shapes=head_shapes, flops=head_flops)
def _gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _sequential(q, k, v, g, scale, initial_state)


@_gla.chunked
def _gla_chunked(q, k, v, g, scale, initial_state):
    return _in_chunks(q, k, v, g, scale, initial_state)


@recurrence(tokens=("q", "k", "v", "g"), shapes=head_shapes, flops=head_flops)
def _simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _sequential(q, k, v, g[..., None], scale, initial_state)


@_simple_gla.chunked
def _simple_gla_chunked(q, k, v, g, scale, initial_state):
    return _in_chunks(q, k, v, g[..., None], scale, initial_state)


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated linear attention: S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.

    Yang et al., 2023, arXiv 2312.06635, equation 3. The state is float32 under half precision.

    Args:
        q, k: queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        g: log decays <= 0 of the key channels (B, K or 1, L, H, dk); -inf forgets everything before the token.
        scale: of the queries; dk ** -0.5 by default.
        initial_state: (B, K, H, dk, dv); zeros by default.
        route: table (K, S) or (B, K, S), see `linescan.scans.recurrence`. A padding token leaves the state as it is.
        merge: None, or "sum" to add up the outputs of the routes.
        return_final_state: also return the state after the last step.

    Returns:
        (B, K, L, H, dv) in q's dtype, or (B, L, H, dv) with `merge`; with `return_final_state`, a pair of that and the
        state (B, K, H, dk, dv).

    Raises:
        ValueError: a shape that does not fit the others, or an unknown `merge`.
    """
    check_shapes(
        "gla",
        route,
        q=(q, "B K L H dk"),
        k=(k, "B K L H dk"),
        v=(v, "B K L H dv"),
        g=(g, "B K L H dk"),
        initial_state=(initial_state, "B R H dk dv"),
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return call(
        _gla, q, k, v, g, scale, initial_state, route=route, merge=merge, return_final_state=return_final_state
    )


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention with one gate a head: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.

    Yang et al., 2023, arXiv 2312.06635, table 1; with q = C, k = B, v = dt x, g = dt A the core of SSD (Dao and Gu,
    2024, arXiv 2405.21060).

    Args:
        g: log decays <= 0 of the heads (B, K or 1, L, H).

    All else as in `gla`.
    """
    check_shapes(
        "simple_gla",
        route,
        q=(q, "B K L H dk"),
        k=(k, "B K L H dk"),
        v=(v, "B K L H dv"),
        g=(g, "B K L H"),
        initial_state=(initial_state, "B R H dk dv"),
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return call(
        _simple_gla, q, k, v, g, scale, initial_state, route=route, merge=merge, return_final_state=return_final_state
    )


def retention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor | tuple[Tensor, Tensor]:
    """Retention: S_t = gamma_h S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, gamma_h = 1 - 2^(-5-h) for head h from 0.

    Sun et al., 2023, arXiv 2307.08621, equations 5 to 8, without the rotation of q and k and the norm after it.

    Args:
        q, k: queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        options: those of `gla`.
    """
    batch, _, length, heads = q.shape[:4] if q.ndim == 5 else (0, 0, 0, 0)
    g = torch.log1p(-(2.0 ** (-5 - torch.arange(heads, device=q.device, dtype=torch.float64))))
    g = g.to(torch.promote_types(q.dtype, torch.float32)).expand(batch, 1, length, heads)
    return simple_gla(q, k, v, g, **options)


def hgrn2(
    q: Tensor, f: Tensor, v: Tensor, lower_bound: float | Tensor = 0.0, **options
) -> Tensor | tuple[Tensor, Tensor]:
    """HGRN2: a_t = lb + (1 - lb) sigmoid(f_t), S_t = diag(a_t) S_{t-1} + (1 - a_t) v_t^T, o_t = scale S_t^T silu(q_t).

    Qin et al., 2024, arXiv 2404.07904, equation 5. The key 1 - a and the log decay are both taken from f itself, so
    neither loses digits where the gate saturates.

    Args:
        q: output gates before their activation (B, K or 1, L, H, dk).
        f: forget gates before their activation (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        lower_bound: of the forget gates, in [0, 1): a number, or a tensor that broadcasts with f.
        options: those of `gla`.
    """
    f = f.to(torch.promote_types(f.dtype, torch.float32))
    bound = torch.as_tensor(lower_bound, dtype=f.dtype, device=f.device)
    k = (1 - bound) * torch.sigmoid(-f)
    floor = bound.clamp_min(torch.finfo(f.dtype).tiny).log()
    g = torch.logaddexp(floor, torch.log1p(-bound) + F.logsigmoid(f))
    return gla(F.silu(q), k, v, g, **options)
