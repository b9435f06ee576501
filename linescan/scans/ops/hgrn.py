"""HGRN: an elementwise gated sum, h_t = exp(g_t) h_{t-1} + x_t.

Qin et al., "Hierarchically Gated Recurrent Neural Network for Sequence Modeling", 2023, arXiv 2311.04823, equation 4,
in its real form.
"""

import torch
from torch import Tensor

from ..chunks import linear_scan, running
from ..recurrence import call, check_shapes, recurrence

__all__ = ["hgrn"]


def _shapes(batch, routes, length, x, *_):
    return (batch, routes, length, x.shape[3]), (batch, routes, x.shape[3])


def _flops(x, g, *_):
    return 2 * x[0] * max(x[1], g[1]) * x[2] * x[3]


@recurrence(tokens=("x", "g"), shapes=_shapes, flops=_flops)
def _hgrn(x: Tensor, g: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    state = torch.zeros_like(x[:, :, 0]) if initial_state is None else initial_state
    states = running(g.exp(), x, state, 2)
    return states[:, :, 1:], states[:, :, -1]


@_hgrn.chunked
def _hgrn_chunked(x, g, initial_state):
    state = torch.zeros_like(x[:, :, 0]) if initial_state is None else initial_state
    states = linear_scan(g.exp(), x, state)
    return states[:, :, 1:], states[:, :, -1]


def hgrn(
    x: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Elementwise gated recurrence: h_t = exp(g_t) h_{t-1} + x_t; the output is h.

    Qin et al., 2023, arXiv 2311.04823, equation 4: x = (1 - a) * candidate, g = log a. The state is float32 under half
    precision.

    Args:
        x: inputs (B, K or 1, L, D).
        g: log decays <= 0 (B, K or 1, L, D).
        initial_state: (B, K, D); zeros by default.
        route: table (K, S) or (B, K, S), see `linescan.scans.recurrence`. A padding token leaves the state as it is.
        merge: None, or "sum" to add up the outputs of the routes.
        return_final_state: also return the state after the last step.

    Returns:
        (B, K, L, D) in x's dtype, or (B, L, D) with `merge`; with `return_final_state`, a pair of that and the state
        (B, K, D).

    Raises:
        ValueError: a shape that does not fit the others, or an unknown `merge`.
    """
    check_shapes("hgrn", route, x=(x, "B K L D"), g=(g, "B K L D"), initial_state=(initial_state, "B R D"))
    return call(_hgrn, x, g, initial_state, route=route, merge=merge, return_final_state=return_final_state)
