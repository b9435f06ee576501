"""Elementwise gated sums, h_t = exp(g_t) h_{t-1} + x_t: HGRN, and the RG-LRU, which makes g and x of its gates."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import gates
from ..chunks import linear_scan, running
from ..recurrence import check_arguments, precise, public, recurrence

__all__ = ["hgrn", "rg_lru"]

DECAY = 8.0  # c of the RG-LRU


@recurrence("x g: B K L D", "B K L D", state="B R D", flops="2 * B * R * S * D", values=dict(g=F.logsigmoid))
def _hgrn(x, g, initial_state):
    states = running(g.exp(), x, initial_state, 2)
    return states[:, :, 1:], states[:, :, -1]


@_hgrn.chunked
def _hgrn_chunked(x, g, initial_state):
    states = linear_scan(g.exp(), x, initial_state)
    return states[:, :, 1:], states[:, :, -1]


@public(_hgrn)
def hgrn(
    x: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """HGRN: an elementwise gated recurrence, whose output is its state.

        h_t = exp(g_t) h_{t-1} + x_t

    Qin et al., "Hierarchically Gated Recurrent Neural Network for Sequence Modeling", 2023, arXiv 2311.04823, equation
    4 in its real form: x = (1 - a) * candidate, g = log a.

    Args:
        x: inputs (B, K or 1, L, D).
        g: log decays <= 0 (B, K or 1, L, D).
        initial_state: (B, K, D).
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token leaves the state
            as it is.

    Returns:
        (B, K, L, D), merged (B, L, D).
    """
    return _hgrn(x, g, initial_state, route=route, merge=merge, return_final_state=return_final_state)


@public(
    _hgrn,
    "x gate_x gate_a: B K L D; a_param: D; reset?: bool B K L",
    state="B R D",
    values=dict(a_param=lambda x: x - 3),
)
def rg_lru(
    x: Tensor,
    gate_x: Tensor,
    gate_a: Tensor,
    a_param: Tensor,
    reset: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """RG-LRU: an elementwise recurrence whose input is scaled so that the state keeps its variance.

        log a_t = -8 softplus(a_param) sigmoid(gate_a_t)
        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) sigmoid(gate_x_t) x_t
        h_t = sigmoid(gate_x_t) x_t                                 at a reset

    De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models", 2024,
    arXiv 2402.19427, equations 1 to 4; RecurrentGemma's code resets at the first token of every sequence. It is `hgrn`
    on these inputs. The derivative of the square root is at most 1000, as there.

    Args:
        x: inputs (B, K or 1, L, D).
        gate_x: input gates before their sigmoid (B, K or 1, L, D).
        gate_a: recurrence gates before their sigmoid (B, K or 1, L, D).
        a_param: decay of the channels before its softplus (D,).
        reset: where a sequence begins (B, K or 1, L); there the state is dropped and the input not scaled.
        initial_state: (B, K, D).
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token leaves the state
            as it is.

    Returns:
        (B, K, L, D), merged (B, L, D).
    """
    check_arguments("rg_lru", x, gate_x, gate_a, a_param, reset, initial_state, route=route)
    rate = -DECAY * F.softplus(precise(a_param))
    scaled, g = gates.linear_unit(precise(x), precise(gate_x), precise(gate_a), rate)
    if reset is not None:
        unscaled = precise(gate_x).sigmoid() * precise(x)
        scaled, g = torch.where(reset[..., None], unscaled, scaled), g.masked_fill(reset[..., None], -torch.inf)
    result = _hgrn(scaled, g, initial_state, route=route, merge=merge, return_final_state=return_final_state)
    return (result[0].to(x.dtype), result[1]) if return_final_state else result.to(x.dtype)
