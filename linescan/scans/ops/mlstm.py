"""mLSTM: a matrix memory with exponential input gates, whose readout is normalised.

The state is kept relative to e^m, m the largest exponent in it so far. The sum of the keys is one more column of the
matrix, as in `linear_attention`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import join, running, segment_sums, split
from ..recurrence import given_states, public, recurrence

__all__ = ["mlstm"]

EPS = 1e-6  # added to the normaliser, in the scale of the state
EMPTY = -1e38  # the exponent of a sum without terms: finite, so that differences are never nan


def _empty(memory: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    return memory, top + EMPTY


def _normalized(o: Tensor, top: Tensor) -> Tensor:
    """Readouts (..., dv + 1) -> (..., dv), with the states' exponents (...)."""
    least = (-top).clamp_max(math.log(torch.finfo(top.dtype).max)).exp()
    return o[..., :-1] / (torch.maximum(o[..., -1].abs(), least) + EPS)[..., None]


@recurrence(
    "q k: B K L H dk; v: B K L H dv; i f: B K L H",
    "B K L H dv",
    state="memory: B R H dk dv+1; top: B R H",
    empty=_empty,
    scale=lambda dk: dk**-0.5,
    flops="5 * B * R * S * H * dk * (dv + 1)",  # per element of a state: decay and update 3, readout 2
    values=dict(f=lambda x: x + 2),
)
def _mlstm(q, k, v, i, f, scale: float, memory, top):
    outputs = []
    forget = F.logsigmoid(f)
    for q_t, k_t, v_t, i_t, f_t in zip(*(x.unbind(2) for x in (q, k, F.pad(v, (0, 1), value=1.0), i, forget))):
        before = top + f_t
        top = torch.maximum(before, i_t)
        added = (i_t - top).exp()[..., None] * k_t
        memory = (before - top).exp()[..., None, None] * memory + added[..., None] * v_t[..., None, :]
        outputs.append(_normalized(scale * (q_t[..., None] * memory).sum(-2), top))
    return torch.stack(outputs, 2), (memory, top)


@_mlstm.chunked
def _mlstm_chunked(q, k, v, i, f, scale, memory, top):
    length = q.shape[2]
    q, k, v, i, f = split(scale * q, k, F.pad(v, (0, 1), value=1.0), i[..., None], F.logsigmoid(f)[..., None])
    i, f = i.squeeze(-1), f.squeeze(-1)
    after_last = torch.arange(i.shape[3] * i.shape[4], device=i.device).view(i.shape[3:]) >= length
    i = i.masked_fill(after_last, EMPTY)
    within, before = segment_sums(f)
    exponents = within + i[..., None, :]  # of token j in the state at token t

    # The largest exponents: at the borders of chunks, then at every token.
    own, tops = exponents[..., -1, :].amax(-1), [top]
    for forget, largest in zip(before[..., -1].unbind(3), own.unbind(3)):
        tops.append(torch.maximum(tops[-1] + forget, largest))
    tops = torch.stack(tops, 3)
    entering, leaving = tops[..., :-1], tops[..., 1:]
    arriving = before + entering[..., None]
    largest = torch.maximum(arriving, exponents.amax(-1))

    kept = (before[..., -1] + entering - leaving).exp()[..., None, None]
    added = (k * (exponents[..., -1, :] - leaving[..., None]).exp()[..., None]).mT @ v
    states = running(kept, added, memory, 3)
    o = (q @ k.mT * (exponents - largest[..., None]).exp()) @ v
    o = o + (q * (arriving - largest).exp()[..., None]) @ states[:, :, :, :-1]
    return join(_normalized(o, largest), length), (states[:, :, :, -1], tops[..., -1])


@public(_mlstm)
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """mLSTM, the matrix memory of xLSTM.

        C_t = sigmoid(f_t) C_{t-1} + e^{i_t} k_t v_t^T
        n_t = sigmoid(f_t) n_{t-1} + e^{i_t} k_t
        o_t = scale * C_t^T q_t / max(|scale * q_t . n_t|, 1)

    Beck et al., "xLSTM: Extended Long Short-Term Memory", 2024, arXiv 2405.04517, equations 19 to 27; its form for
    images is Alkin et al., "Vision-LSTM", 2024, arXiv 2406.04303. Sums are kept relative to e^m, m_t = max(m_{t-1} +
    log sigmoid(f_t), i_t). As in both, 1e-6 is added to the denominator relative to e^m, and so weighs e^m: an empty
    state has m = -inf, which is the parallel form of Vision-LSTM; the kernels of xLSTM start at m = 0.

    Args:
        q, k: queries and keys (B, K or 1, L, H, dk).
        v: values (B, K or 1, L, H, dv).
        i: input gates before their exponential (B, K or 1, L, H).
        f: forget gates before their sigmoid (B, K or 1, L, H).
        scale: of the queries; dk ** -0.5 by default.
        initial_state: a pair. memory: C e^-m and, as its last column, n e^-m (B, K, H, dk, dv+1); top: m (B, K, H),
            -1e38 where nothing is in the sums.
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token has gates
            i = f = 0.

    Returns:
        (B, K, L, H, dv), merged (B, L, H, dv).
    """
    inputs = q, k, v, i, f, scale, *given_states("mlstm", initial_state)
    return _mlstm(*inputs, route=route, merge=merge, return_final_state=return_final_state)
