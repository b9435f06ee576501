"""HGRN: an elementwise gated sum, h_t = exp(g_t) h_{t-1} + x_t."""

import torch.nn.functional as F
from torch import Tensor

from ..chunks import linear_scan, running
from ..recurrence import public, recurrence

__all__ = ["hgrn"]


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
