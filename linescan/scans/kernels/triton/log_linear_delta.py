"""The log-linear gated delta rule in Triton: by halving, on the kernels of `dplr`.

Of two neighbouring blocks of 2^l steps, the right one reads the state of the left one as its level l + 1, weighed,
while its own keys correct that state: a delta rule that starts from it and adds no values. The blocks of one size run
at once, as sequences of their own, and what arrives at their ends makes the states of blocks twice as long. Blocks of
up to CHUNK steps are small products in plain torch.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...chunks import decayed_scores, solve_unit_lower
from ...ops.log_linear import _full, _log_linear_gated_delta_rule, _weights_within
from .common import again, in_time
from .dplr import Rule

CHUNK = 16  # steps; a power of two


def _core(dtype, q, k, v, g, beta, lam, scale, initial_state, position):
    """The recurrence in time order, with what the kernels multiply in `dtype`."""
    length, levels, dv = q.shape[2], lam.shape[-1], v.shape[-1]
    q, written = scale * q, beta[..., None] * k

    # Inside chunks: scores of what all tokens write, weighed by level.
    def chunks(x):  # (B, K, H, N, C, d)
        return F.pad(x, (0, 0, 0, 0, 0, -length % CHUNK)).unflatten(2, (-1, CHUNK)).movedim(4, 2)

    q_c, k_c, v_c, g_c, beta_c, lam_c = map(chunks, (q, k, v, g[..., None], beta[..., None], lam))
    decay, _, after = decayed_scores(torch.ones_like(g_c), torch.ones_like(g_c), g_c)
    (answers,) = solve_unit_lower(beta_c * (k_c @ k_c.mT) * decay, torch.diag_embed(beta_c.squeeze(-1)))
    scores = (q_c @ k_c.mT * decay) @ answers * _weights_within(lam_c, 0)
    out = (scores @ v_c).movedim(2, 4).flatten(2, 3)[:, :, :length]
    keys = (k_c * after.exp()).mT @ answers  # with these, values go into the state at a chunk's end
    states = keys @ v_c

    # What the buckets hold at the end: parts of the last chunk, if it is not full, and blocks of chunks.
    buckets = [torch.zeros_like(states[:, :, :, 0])] * levels
    for bit, first in _full(length):
        if 1 << bit < CHUNK:
            at = first % CHUNK
            here = slice(at, at + (1 << bit))
            buckets[bit] = keys[:, :, :, -1, :, here] @ v_c[:, :, :, -1, here]

    span = CHUNK
    while span < length:

        def right(x):  # (B * pairs, K, span, H, ...), the right halves as samples
            padding = -length % (2 * span)
            x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, padding)).unflatten(2, (-1, 2, span))[:, :, :, 1]
            return x.movedim(2, 1).flatten(0, 1)

        if states.shape[3] % 2:
            states = F.pad(states, (0, 0, 0, 0, 0, 1))
        left, own = states.unflatten(3, (-1, 2)).unbind(4)
        pairs = left.shape[3]
        queries, keys = right(q * lam[..., span.bit_length(), None]).to(dtype), right(k).to(dtype)
        nothing = queries.new_zeros(dv).expand(*queries.shape[:-1], dv)
        entering = left.movedim(3, 1).flatten(0, 1)
        more, passed = Rule.apply(queries, right(written), nothing, keys, right(g), entering)
        more = F.pad(more.unflatten(0, (-1, pairs)), (0, 0, 0, 0, span, 0))  # (B, pairs, K, 2 span, H, dv)
        out = out + more.movedim(1, 2).flatten(2, 3)[:, :, :length]
        passed = passed.unflatten(0, (-1, pairs)).movedim(1, 3)
        if length & span:  # the last block of this size has no other half of it, but for steps that are smaller blocks
            buckets[span.bit_length() - 1] = passed[:, :, :, -1]
        states, span = passed + own, 2 * span
    if length & span:
        buckets[span.bit_length() - 1] = states[:, :, :, 0]
    return out, torch.stack(buckets, 2)


def forward(*args) -> tuple[Tensor, Tensor]:
    core = partial(_core, args[0].dtype)
    return _log_linear_gated_delta_rule._through_route(core, in_time)(*args)


backward = again(forward)
