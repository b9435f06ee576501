"""Titans' memory: weights that are trained, with momentum and weight decay, one step for each chunk of tokens.

The gradients of a batch of chunks are taken at the weights that began it; what is left is elementwise, a step for each
chunk. Weights are kept flat, so that a model of one matrix and one of two are the same recurrence.
"""

from math import pi
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..exported import in_pieces
from ..recurrence import given_states, public, recurrence

__all__ = ["titans_memory"]


def _matrices(weights: Tensor, size: int, hidden: int) -> tuple[Tensor, Tensor | None]:
    """Flat weights (..., n) as matrices: (size, size) and none, or (size, hidden) and (hidden, size)."""
    if not hidden:
        return weights.unflatten(-1, (size, size)), None
    first, second = weights.split(size * hidden, -1)
    return first.unflatten(-1, (size, hidden)), second.unflatten(-1, (hidden, size))


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y, of the definition: element by element, which autocast leaves as it is also in the backward pass."""
    return (x[..., None] * y[..., None, :, :]).sum(-2)


def _answer(x: Tensor, weights: Tensor, hidden: int, product: Callable = torch.matmul) -> Tensor:
    """M(x) for x (..., C, D) and flat weights (..., n)."""
    first, second = _matrices(weights, x.shape[-1], hidden)
    z = product(x, first)
    return z if second is None else product(F.gelu(z), second)


def _gradient(
    k: Tensor, v: Tensor, lr: Tensor, weights: Tensor, hidden: int, product: Callable = torch.matmul
) -> Tensor:
    """Gradient (..., n) of sum_i sigmoid(lr_i) mean((M(k_i) - v_i)^2) for k, v (..., C, D) and lr (..., C)."""
    first, second = _matrices(weights, k.shape[-1], hidden)
    rate = (2 / v.shape[-1]) * lr.sigmoid()[..., None]
    z = product(k, first)
    if second is None:
        return product(k.mT, rate * (z - v)).flatten(-2)
    normal = 0.5 * (1 + torch.erf(z * 0.5**0.5))  # gelu is z times this
    slope = normal + z * torch.exp(-0.5 * z.square()) * (2 * pi) ** -0.5
    error = rate * (product(z * normal, second) - v)
    steps = product(k.mT, product(error, second.mT) * slope), product((z * normal).mT, error)
    return torch.cat([step.flatten(-2) for step in steps], -1)


def _clipped(gradient: Tensor, clip: float) -> Tensor:
    """G / sqrt(1 + |G|^2 / clip^2), whose norm stays below `clip`; G as it is for 0."""
    if not clip:
        return gradient
    return gradient * torch.rsqrt(1 + gradient.square().sum(-1, keepdim=True) / clip**2)


def _wrong(chunk, per_batch, hidden, clip) -> str | None:
    if chunk < 1 or per_batch < 1:
        return f"chunk and per_batch are at least 1, got {chunk} and {per_batch}"
    return f"hidden and clip are not negative, got {hidden} and {clip}" if hidden < 0 or clip < 0 else None


@recurrence(
    "q k v: B K L H D; lr mom dec: B K L H",
    "B K L H D",
    state="""
    weights: B R H (2*D*hidden or D*D); momentum: B R H (2*D*hidden or D*D); base: B R H (2*D*hidden or D*D);
    gradient: B R H (2*D*hidden or D*D); gates: B R H 2
    """,
    requires=_wrong,
    # Per weight: answer of a key, gradient, readout 2 each, and 1 through the second matrix; a step of 4 for a chunk.
    flops="B * R * S * H * (2 * D * hidden or D * D) * (6 + (hidden > 0) + 4 / chunk)",
    values=dict(
        weights=lambda x: 0.5 * x,
        momentum=lambda x: 0.1 * x,
        k=lambda x: F.normalize(x, dim=-1),
        v=lambda x: 0.5 * x,
        lr=lambda x: x - 1,
    ),
    sizes=dict(chunk=2, per_batch=2),
)
def _titans_memory(
    q, k, v, lr, mom, dec, chunk: int, per_batch: int, hidden: int, clip: float,
    weights, momentum, base, gradient, gates, position: int,
):  # fmt: skip
    """`base` are the weights that began the batch of chunks, `gradient` and `gates` the sums of the chunk at hand."""
    outputs = []
    for t, (q_t, k_t, v_t, lr_t, mom_t, dec_t) in enumerate(
        zip(*(x.unbind(2) for x in (q, k, v, lr, mom, dec))), position
    ):
        base = weights if t % (chunk * per_batch) == 0 else base
        gradient = gradient + _gradient(k_t[..., None, :], v_t[..., None, :], lr_t[..., None], base, hidden, _product)
        gates = gates + torch.stack((mom_t, dec_t), -1)
        if (t + 1) % chunk == 0:
            keep, forget = (gates / chunk).sigmoid().unsqueeze(-2).unbind(-1)
            momentum = keep * momentum - _clipped(gradient, clip)
            weights = (1 - forget) * weights + momentum
            gradient, gates = torch.zeros_like(gradient), torch.zeros_like(gates)
        outputs.append(_answer(q_t[..., None, :], weights, hidden, _product).squeeze(-2))
    return torch.stack(outputs, 2), (weights, momentum, base, gradient, gates)


@_titans_memory.chunked
def _titans_memory_chunked(
    q, k, v, lr, mom, dec, chunk, per_batch, hidden, clip, weights, momentum, base, gradient, gates, position
):
    """A batch at a time, of which the chunks' gradients are taken at once. A token reads what the chunks before it, and
    its own if it is the last of it, made of the weights."""
    length, span = q.shape[2], chunk * per_batch
    lead = position % span
    q, k, v, lr, mom, dec = (x.transpose(2, 3) for x in (q, k, v, lr, mom, dec))
    sizes = [min(span - lead, length)]
    sizes += [span] * ((length - sizes[0]) // span) + [(length - sizes[0]) % span]
    pieces = zip(*(x.split([n for n in sizes if n], 3) for x in (q, k, v, lr, torch.stack((mom, dec), -1))))
    outputs = []
    for q_p, *tokens in pieces:
        base = weights if lead == 0 else base
        tokens_before = lead % chunk  # of the chunk at hand
        padding = -(tokens_before + q_p.shape[3]) % chunk
        k_p, v_p, lr_p, gates_p = (
            F.pad(x, (0, 0) * (x.ndim - 4) + (tokens_before, padding)).unflatten(3, (-1, chunk)) for x in tokens
        )
        steps = _gradient(k_p, v_p, lr_p, base.unsqueeze(3), hidden)
        sums = gates_p.sum(4)
        steps = torch.cat((gradient.unsqueeze(3) + steps[:, :, :, :1], steps[:, :, :, 1:]), 3)
        sums = torch.cat((gates.unsqueeze(3) + sums[:, :, :, :1], sums[:, :, :, 1:]), 3)
        after = [weights]
        for c in range(steps.shape[3] - (padding > 0)):
            keep, forget = (sums[:, :, :, c] / chunk).sigmoid().unsqueeze(-2).unbind(-1)
            momentum = keep * momentum - _clipped(steps[:, :, :, c], clip)
            weights = (1 - forget) * weights + momentum
            after.append(weights)
        gradient, gates = (x[:, :, :, -1] if padding else torch.zeros_like(x[:, :, :, -1]) for x in (steps, sums))
        # One place later, a chunk's last token stands with the tokens that read what it makes.
        front = tokens_before + 1
        rows = F.pad(q_p, (0, 0, front, -(front + q_p.shape[3]) % chunk)).unflatten(3, (-1, chunk))
        answers = _answer(rows, torch.stack(after, 3)[:, :, :, : rows.shape[3]], hidden).flatten(3, 4)
        outputs.append(answers[:, :, :, front : front + q_p.shape[3]])
        lead = 0
    return torch.cat(outputs, 3).transpose(2, 3), (weights, momentum, base, gradient, gates)


@_titans_memory.exported
def _titans_memory_exported(*inputs):
    chunk, per_batch = inputs[6:8]
    return in_pieces(_titans_memory, inputs, chunk * per_batch)


@public(_titans_memory)
def titans_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    mom: Tensor,
    dec: Tensor,
    chunk: int = 16,
    per_batch: int = 1,
    hidden: int = 0,
    clip: float = 0.0,
    *,
    initial_state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None,
    position: int = 0,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """The long-term memory of Titans: a linear map or an MLP that learns keys' values while it is read.

        G_c = d/dW sum_{i in c} sigmoid(lr_i) mean((M(k_i; W) - v_i)^2)   at the weights that began the batch of chunk c
        S_c = sigmoid(mean_c mom) S_{c-1} - G_c
        W_c = (1 - sigmoid(mean_c dec)) W_{c-1} + S_c
        o_t = M(q_t; W)            after all chunks that are complete at t, with M(x) = x W or gelu(x W_0) W_1

    Behrouz et al., "Titans: Learning to Memorize at Test Time", 2025, arXiv 2501.00663, where a chunk is a token.
    Chunks and batches are those of the public code titans-pytorch (MIT), without the norms around it. The last token of
    a chunk reads what the chunk made; tokens of a chunk that is not complete are in the state only. Nothing bounds the
    weights but the data (unit keys, small rates) and `clip`, which is linescan's own.

    Args:
        q, k, v: queries, keys and values (B, K or 1, L, H, D).
        lr: learning rates before their sigmoid (B, K or 1, L, H).
        mom: how much of the momentum is kept, before its sigmoid (B, K or 1, L, H).
        dec: weight decay before its sigmoid (B, K or 1, L, H).
        chunk: tokens of a step.
        per_batch: chunks whose gradients are taken at the same weights.
        hidden: channels between two matrices with an exact gelu; 0 for one matrix.
        clip: G is divided by sqrt(1 + |G|^2 / clip^2), so that its norm stays below clip; 0 to leave it.
        initial_state: five tensors. weights: (B, K, H, 2*D*hidden or D*D), the matrices as (in, out), flat, one behind
            the other; momentum, base, gradient: S, the weights that began the batch of chunks and the sum of the
            gradients of the chunk at hand, as weights; gates: the sums of mom and dec over it (B, K, H, 2). Two
            matrices of zeros learn nothing: start from others.
        position: tokens before the first one, which says where its chunk and batch end; where a batch begins, base,
            gradient and gates have no part.
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token has key 0 and
            gates of 0.

    Returns:
        (B, K, L, H, D), merged (B, L, H, D).
    """
    states = given_states("titans_memory", initial_state)
    inputs = q, k, v, lr, mom, dec, chunk, per_batch, hidden, clip, *states, position
    return _titans_memory(*inputs, route=route, merge=merge, return_final_state=return_final_state)
