"""Log-linear attention: a gated linear attention whose past is kept in O(log T) buckets with a weight each.

For query t, token j lies in the bucket of level bit_length(t ^ j), positions counted from 0: level 0 is t itself, level
l the left sibling of the block of 2^(l-1) tokens that t stands in. So the buckets are those of a Fenwick tree, and the
levels those of halving: a chunk weighs its decayed scores by level, larger blocks pass a state from left to right half.

With the transition of the gated delta rule there is no decay to take out of a state: the chunks pass on, one after
another, every bucket.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import decayed_scores, join, solve_unit_lower, split
from ..recurrence import public, recurrence

__all__ = ["log_linear_attention", "log_linear_gated_delta_rule"]


def _wrong(H, G, levels, S, position, buckets) -> str | None:
    if H % G:
        return f"{H} heads of v cannot share {G} heads of q and k evenly"
    end = position + S
    needed = (end - 1).bit_length() + 1
    if levels < needed:
        return f"tokens {position} to {end - 1} need {needed} levels, lam has {levels}"
    if buckets is not None and buckets < position.bit_length():
        return f"{position} tokens fill {position.bit_length()} buckets, initial_state has {buckets}"
    return None


def _initial(initial_state: Tensor, levels: int, position: int) -> list[Tensor]:
    """The buckets: bucket b holds 2^b tokens or, where bit b of the position is 0, nothing."""
    buckets = [torch.zeros_like(initial_state[:, :, 0])] * levels
    for bit, _ in _full(position):
        buckets[bit] = initial_state[:, :, bit]
    return buckets


def _step(buckets: list[Tensor], new: Tensor, lam: Tensor, t: int) -> tuple[Tensor, list[Tensor]]:
    """What token t reads of its own `new` and of the buckets, by level, and the buckets after it."""
    read = lam[..., :1, None] * new
    for level, state in enumerate(buckets[:-1], 1):
        read = read + lam[..., level, None, None] * state
    full = (~t & (t + 1)).bit_length() - 1  # as in adding 1 to t, buckets below the lowest 0 bit merge into it
    merged = sum(buckets[:full], new)
    return read, [torch.zeros_like(new)] * full + [merged] + buckets[full + 1 :]


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Groups (B, K, T, G, dk) as heads (B, K, T, H, dk)."""
    return x if x.shape[3] == heads else x.repeat_interleave(heads // x.shape[3], 3)


@recurrence(
    "q k: B K L G dk; v: B K L H dv; g: B K L H; lam: B K L H levels; initial_state?: B R buckets H dk dv",
    "B K L H dv",
    state="B R levels H dk dv",
    scale=lambda dk: dk**-0.5,
    requires=_wrong,
    # Every token reads half of its buckets on average, updates one, and takes part in one merge per level.
    flops="B * R * S * H * (S.bit_length() + 4) * dk * dv",
    values=dict(g=F.logsigmoid, lam=F.softplus),
    sizes=dict(G=2, levels=9, buckets=9),
)
def _log_linear_attention(q, k, v, g, lam, scale: float, initial_state, position: int):
    q, k = (_per_head(x, v.shape[3]) for x in (q, k))
    buckets, outputs = _initial(initial_state, lam.shape[-1], position), []
    for t, (q_t, k_t, v_t, g_t, lam_t) in enumerate(zip(*(x.unbind(2) for x in (q, k, v, g, lam))), position):
        buckets = [g_t.exp()[..., None, None] * state for state in buckets]
        read, buckets = _step(buckets, k_t[..., None] * v_t[..., None, :], lam_t, t)
        outputs.append(scale * (q_t[..., None] * read).sum(-2))
    return torch.stack(outputs, 2), torch.stack(buckets, 2)


@_log_linear_attention.chunked
def _log_linear_attention_chunked(q, k, v, g, lam, scale, initial_state, position):
    length, levels, end = q.shape[2], lam.shape[-1], position + q.shape[2]
    q, k = (_per_head(x, v.shape[3]) for x in (q, k))
    # Empty tokens in front let blocks of up to `length` tokens begin at multiples of their size.
    lead = position % (1 << (length - 1).bit_length())
    start = position - lead
    q, k, v, g, lam = split(*(F.pad(x, (0, 0, 0, 0, lead, 0)) for x in (scale * q, k, v, g[..., None], lam)))
    chunks, size = q.shape[3:5]

    # Inside chunks: scores weighed by level.
    scores, before, after = decayed_scores(q, k, g)
    o = (scores * _weights_within(lam, start)) @ v

    # Between blocks of 1, 2, 4... chunks: chunks in a right half read the state of the left half.
    states, totals = (k * after.exp()).mT @ v, before[..., -1:, :]
    span = 1
    while span < chunks:
        right = [n for n in range(chunks) if n & span]
        left = torch.tensor([n // span - 1 for n in right], device=q.device)
        right = torch.tensor(right, device=q.device)
        weight = lam[..., ((start + span * size) ^ start).bit_length(), None] * before.exp()
        o = o.index_add(3, right, (q * weight).index_select(3, right) @ states.index_select(3, left))
        before = before.index_add(3, right, totals.index_select(3, left).expand(-1, -1, -1, -1, size, -1))
        if states.shape[3] % 2:
            states, totals = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (states, totals))
        (s_left, s_right), (t_left, t_right) = (x.unflatten(3, (-1, 2)).unbind(4) for x in (states, totals))
        states, totals = t_right.exp() * s_left + s_right, t_left + t_right
        span *= 2

    # What the buckets hold at the end: one range of tokens each, decayed from there.
    k, v, g = (x.flatten(3, 4)[:, :, :, : lead + length] for x in (k, v, g))
    tail = F.pad(g[:, :, :, 1:], (0, 0, 0, 1)).flip(3).cumsum(3).flip(3)
    k = k * tail.exp()
    buckets = [torch.zeros_like(initial_state[:, :, 0])] * levels
    for bit, first in _full(end):
        here = slice(max(first, start) - start, max(first + (1 << bit), start) - start)
        buckets[bit] = k[:, :, :, here].mT @ v[:, :, :, here]
    if position:
        # A bucket from before stays in one piece, so that it has one level a query and goes into one bucket.
        place = start + torch.arange(chunks * size, device=q.device).unflatten(0, (chunks, size))
        q, kept = q * before.exp(), g.sum(3).exp()[..., None]
        for bit, first in _full(position):
            old = initial_state[:, :, bit]
            level = _bit_length(place ^ first).clamp_max(levels - 1)[..., None]
            o = o + (q * lam.gather(-1, level.expand(*o.shape[:-1], 1))) @ old[:, :, :, None]
            into = next(b for b, begin in _full(end) if begin <= first < begin + (1 << b))
            buckets[into] = buckets[into] + kept * old
    return join(o, lead + length)[:, :, lead:], torch.stack(buckets, 2)


def _weights_within(lam: Tensor, start: int) -> Tensor:
    """Weights (..., C, C) of the tokens of a chunk that begins at `start` for each other, from lam (..., C, levels)."""
    place = start + torch.arange(lam.shape[-2], device=lam.device)
    # Above the diagonal there may be levels beyond the last, where scores are 0.
    level = _bit_length(place[:, None] ^ place).clamp_max(lam.shape[-1] - 1)
    return lam.gather(-1, level.expand(*lam.shape[:-1], -1))


def _bit_length(x: Tensor) -> Tensor:
    return (x[..., None] >= 1 << torch.arange(62, device=x.device)).sum(-1)


def _full(position: int) -> list[tuple[int, int]]:
    """The buckets that hold tokens when `position` tokens have passed: (b, first of its 2^b tokens)."""
    return [(b, position >> b + 1 << b + 1) for b in range(position.bit_length()) if position >> b & 1]


_log_linear_attention.exported(_log_linear_attention.definition)  # every token merges other buckets: no equal pieces


@public(_log_linear_attention)
def log_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    lam: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    position: int = 0,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-linear attention: a weight for every bucket of the past, in the form with the scalar gates of Mamba-2.

        o_t = scale * sum_{j <= t} lam_t[bit_length(t ^ j)] exp(g_{j+1} + ... + g_t) (q_t . k_j) v_j

    Guo et al., "Log-Linear Attention", 2025, arXiv 2506.04761, section 3.2, where the scale is 1. Time is O(T log T),
    the state O(log T) matrices per head.

    Args:
        q, k: queries and keys (B, K or 1, L, G, dk); H / G heads share one of the G groups.
        v: values (B, K or 1, L, H, dv).
        g: log decays <= 0 of the heads (B, K or 1, L, H).
        lam: weights of the levels (B, K or 1, L, H, levels); T tokens have ceil(log2 T) + 1 levels.
        scale: of the queries; dk ** -0.5 by default.
        initial_state: the buckets after `position` tokens (B, K, buckets, H, dk, dv), bucket b the state of 2^b tokens
            and read only where bit b of `position` is 1. The final state has as many buckets as there are levels.
        position: tokens before the first one.
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token takes a position
            and adds nothing.

    Returns:
        (B, K, L, H, dv), merged (B, L, H, dv).
    """
    inputs = q, k, v, g, lam, scale, initial_state, position
    return _log_linear_attention(*inputs, route=route, merge=merge, return_final_state=return_final_state)


@recurrence(
    "q k: B K L H dk; v: B K L H dv; g beta: B K L H; lam: B K L H levels; initial_state?: B R buckets H dk dv",
    "B K L H dv",
    state="B R levels H dk dv",
    scale=1.0,
    requires=lambda levels, S, position, buckets: _wrong(1, 1, levels, S, position, buckets),
    # Half of the buckets hold something: each is decayed, answers a key, is corrected and read.
    flops="B * R * S * H * (9 * S.bit_length() // 2 + 7) * dk * dv",
    values=dict(k=lambda x: F.normalize(x, dim=-1), g=F.logsigmoid, beta=lambda x: 2 * x.sigmoid(), lam=F.softplus),
    sizes=dict(levels=9, buckets=9),
)
def _log_linear_gated_delta_rule(q, k, v, g, beta, lam, scale: float, initial_state, position: int):
    buckets, outputs = _initial(initial_state, lam.shape[-1], position), []
    tokens = zip(*(x.unbind(2) for x in (q, k, v, g, beta, lam)))
    for t, (q_t, k_t, v_t, g_t, beta_t, lam_t) in enumerate(tokens, position):
        key, written = k_t[..., None], (beta_t[..., None] * k_t)[..., None]
        buckets = [g_t.exp()[..., None, None] * state for state in buckets]
        buckets = [state - written * (key * state).sum(-2, keepdim=True) for state in buckets]
        read, buckets = _step(buckets, written * v_t[..., None, :], lam_t, t)
        outputs.append(scale * (q_t[..., None] * read).sum(-2))
    return torch.stack(outputs, 2), torch.stack(buckets, 2)


@_log_linear_gated_delta_rule.chunked
def _log_linear_gated_delta_rule_chunked(q, k, v, g, beta, lam, scale, initial_state, position):
    length, levels, end = q.shape[2], lam.shape[-1], position + q.shape[2]
    q, k, v, g, beta, lam = split(scale * q, k, v, g[..., None], beta[..., None], lam)
    size = q.shape[4]
    decay, before, after = decayed_scores(torch.ones_like(g), torch.ones_like(g), g)
    scores, overlap = q @ k.mT * decay, k @ k.mT * decay
    # What all tokens of a chunk write, from their values and, less, from what the state that enters it answers.
    (written,) = solve_unit_lower(beta * overlap, torch.diag_embed(beta.squeeze(-1)))
    kept = k * before.exp()
    keys = (k * after.exp()).mT @ written
    readout = q * before.exp() - scores @ (written @ kept)
    transition = torch.diag_embed(before[..., -1, :].exp().expand_as(k[..., -1, :])) - keys @ kept

    outputs, start = [], position
    buckets = [(first, initial_state[:, :, bit]) for bit, first in _full(position)]  # with their first tokens
    for n in range(q.shape[3]):
        lam_n, v_n, stop = lam[:, :, :, n], v[:, :, :, n], min(start + size, end)
        o = (scores[:, :, :, n] @ written[:, :, :, n] * _weights_within(lam_n, start)) @ v_n
        place = start + torch.arange(size, device=q.device)
        for first, state in buckets:
            level = _bit_length(place ^ first).clamp_max(levels - 1)[:, None]
            o = o + (readout[:, :, :, n] * lam_n.gather(-1, level.expand(*o.shape[:-1], 1))) @ state
        outputs.append(o)
        passed = [(first, transition[:, :, :, n] @ state) for first, state in buckets]
        buckets = []
        for bit, first in _full(stop):  # what was passed on and what is new, by the bucket that it is in now
            last = first + (1 << bit)
            parts = [state for begin, state in passed if first <= begin < last]
            inside = (place >= first) & (place < last)
            if last > start:
                parts.append(keys[:, :, :, n] @ (v_n * inside[:, None]))
            if parts:
                buckets.append((first, sum(parts)))
        start += size
    state = [torch.zeros_like(initial_state[:, :, 0])] * levels
    for bit, first in _full(end):
        state[bit] = next((x for begin, x in buckets if begin == first), state[bit])
    return join(torch.stack(outputs, 3), length), torch.stack(state, 2)


_log_linear_gated_delta_rule.exported(_log_linear_gated_delta_rule.definition)


@public(_log_linear_gated_delta_rule)
def log_linear_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lam: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    position: int = 0,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-linear gated delta rule: a weight for every bucket of the past, all of which take the rule's transition.

        S_{t,l} = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1,l}    for every bucket l,    then    S_{t,0} = beta_t k_t v_t^T
        o_t = scale * sum_l lam_t[l] S_{t,l}^T q_t

    Guo et al., "Log-Linear Attention", 2025, arXiv 2506.04761, section 3.3. With equal weights it is
    `gated_delta_rule`. Buckets are those of `log_linear_attention`.

    Args:
        q, k: queries and keys, the keys of norm 1 (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        g: log decays <= 0 of the heads (B, K or 1, L, H).
        beta: how much of an error is corrected (B, K or 1, L, H).
        lam: weights of the levels (B, K or 1, L, H, levels); T tokens have ceil(log2 T) + 1 levels.
        scale: of the queries; 1 by default, as in the paper.
        initial_state: (B, K, buckets, H, dk, dv), as of `log_linear_attention`.

    All else as of `log_linear_attention`.
    """
    inputs = q, k, v, g, beta, lam, scale, initial_state, position
    return _log_linear_gated_delta_rule(*inputs, route=route, merge=merge, return_final_state=return_final_state)
