"""Mamba-3: a state space with a trapezoidal input and a rotation of B and C by angles that add up along the route.

The input of a token is shared between its own step and the next one, so that, in the chunked form, a key is weighed by
both. The ranks of the form with several inputs and outputs ("MIMO") are further tokens of the same step.
"""

from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import running, segment_sums, split
from ..recurrence import check_arguments, given_states, public, recurrence

__all__ = ["mamba3", "mamba3_mimo"]

TURN = 2 * pi
VALUES = dict(a=lambda x: -F.softplus(x), dt=lambda x: F.softplus(x - 1), last_key=torch.sigmoid)


def _wrong(H, G, N, A) -> str | None:
    if H % G:
        return f"{H} heads of v cannot share {G} groups of q and k evenly"
    return f"{A} angles turn {2 * A} of q's channels, it has {N}" if 2 * A > N else None


def _rotated(x: Tensor, bias: Tensor, angle: Tensor) -> Tensor:
    """x (..., rank, G, N) with its bias, for every head, turned: (..., H, rank, N), by angle (..., H, A).

    Pairs of neighbouring channels are turned, the first A of them.
    """
    x = x.movedim(-2, -3)
    x = x.repeat_interleave(bias.shape[0] // x.shape[-3], -3) + bias
    turned, rest = x.split((2 * angle.shape[-1], x.shape[-1] - 2 * angle.shape[-1]), -1)
    even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)
    return torch.cat((torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2), rest), -1)


def _output(y: Tensor, v: Tensor, z: Tensor | None, D: Tensor | None, mimo_z, mimo_o) -> Tensor:
    """The ranks' readouts y (..., H, rank, P), to which v, as they took it in, is added; gated and summed."""
    if D is not None:
        y = y + D[:, None, None] * v
    if z is not None:
        y = y * F.silu(z.unsqueeze(-2) if mimo_z is None else z.unsqueeze(-2) * mimo_z)
    return y.sum(-2) if mimo_o is None else (y * mimo_o).sum(-2)


def _values(v: Tensor, mimo_v: Tensor | None, rank: int) -> Tensor:
    """(..., H, P) -> (..., H, rank, P)."""
    v = v.unsqueeze(-2)
    return v.expand(*v.shape[:-2], rank, -1) if mimo_v is None else v * mimo_v


@recurrence(
    """
    q k: B K L rank G N; v z?: B K L H P; a dt trap: B K L H; angle: B K L H A; q_bias k_bias: H rank N; D?: H;
    mimo_v? mimo_z? mimo_o?: H rank P
    """,
    "B K L H P",
    state="memory: B R H N P; turned: B R H A; last_key: B R H rank N; last_value: B R H rank P",
    requires=_wrong,
    flops="B * R * S * H * N * P * (3 + 6 * rank)",  # decay and two updates; two products and a readout per rank
    values=VALUES,
    sizes=dict(G=2, A=1, N=4, rank=2),
)
def _mamba3_mimo(
    q, k, v, a, dt, trap, angle, q_bias, k_bias, D, z, mimo_v, mimo_z, mimo_o, memory, turned, last_key, last_value
):
    share, v = trap.sigmoid(), _values(v, mimo_v, q.shape[3])
    angles = []
    for step in (pi * torch.tanh(angle) * dt[..., None]).unbind(2):
        turned = torch.remainder(turned + step, TURN)
        angles.append(turned)
    angles = torch.stack(angles, 2)
    keys, queries = _rotated(k, k_bias, angles), _rotated(q, q_bias, angles)
    decay = (a * dt).exp()[..., None, None]
    own, carried = (share * dt)[..., None, None] * keys, ((1 - share) * dt)[..., None, None]
    outputs = []
    for q_t, k_t, v_t, own_t, carried_t, decay_t in zip(
        *(x.unbind(2) for x in (queries, keys, v, own, carried, decay))
    ):
        late = ((carried_t * last_key)[..., None] * last_value[..., None, :]).sum(-3)
        memory = decay_t * (memory + late) + (own_t[..., None] * v_t[..., None, :]).sum(-3)
        outputs.append((q_t[..., None] * memory[..., None, :, :]).sum(-2))
        last_key, last_value = k_t, v_t
    output = _output(torch.stack(outputs, 2), v, z, D, mimo_z, mimo_o)
    return output, (memory, turned, last_key, last_value)


def _by_scan(
    scan,
    q,
    k,
    v,
    a,
    dt,
    trap,
    angle,
    q_bias,
    k_bias,
    D,
    z,
    mimo_v,
    mimo_z,
    mimo_o,
    memory,
    turned,
    last_key,
    last_value,
):
    """The definition, of a plain scan: a key counts for its own step and, from the next step on, for that one.

    scan(queries, keys (B, K, T, H, rank, N), values (B, K, T, H, rank, P), log decays (B, K, T, H), state) returns what
    queries read of all keys up to their own token, of every rank, and the last state.
    """
    share, v = trap.sigmoid(), _values(v, mimo_v, q.shape[3])
    step = pi * torch.tanh(angle.double()) * dt[..., None].double()  # of long sums only the last turn counts
    angles = torch.remainder(turned[:, :, None] + step.cumsum(2), TURN).to(dt.dtype)
    key, query = _rotated(k, k_bias, angles), _rotated(q, q_bias, angles)  # (B, K, T, H, rank, N)
    carried = (1 - share) * dt
    ahead = F.pad(carried[:, :, 1:], (0, 0, 0, 1))
    memory = memory + ((carried[:, :, 0, :, None, None] * last_key)[..., None] * last_value[..., None, :]).sum(-3)
    y, memory = scan(query, (share * dt + ahead)[..., None, None] * key, v, a * dt, memory)
    y = y - ahead[..., None, None] * (query @ key.mT) @ v
    output = _output(y, v, z, D, mimo_z, mimo_o)
    return output, (memory, angles[:, :, -1], key[:, :, -1], v[:, :, -1])


def _scan_in_chunks(query: Tensor, key: Tensor, v: Tensor, g: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    length, rank = query.shape[2], query.shape[4]

    def ranks(x):  # (B, K, H, N, C * rank, d), the ranks of a token next to each other
        x = split(x.flatten(4))[0]
        return x.unflatten(-1, (rank, -1)).flatten(-3, -2)

    query, key, v = ranks(query), ranks(key), ranks(v)
    within, before = segment_sums(split(g[..., None])[0].squeeze(-1))
    decay = within.exp().repeat_interleave(rank, -2).repeat_interleave(rank, -1)
    reach, left = before.exp(), within[..., -1, :].exp()
    added = (key * left.repeat_interleave(rank, -1)[..., None]).mT @ v
    states = running(before[..., -1].exp()[..., None, None], added, memory, 3)
    y = (query @ key.mT * decay) @ v
    y = y + (query * reach.repeat_interleave(rank, -1)[..., None]) @ states[:, :, :, :-1]
    y = y.unflatten(-2, (-1, rank)).flatten(3, 4)[:, :, :, :length].transpose(2, 3)  # (B, K, T, H, rank, P)
    return y, states[:, :, :, -1]


@_mamba3_mimo.chunked
def _mamba3_mimo_chunked(
    q, k, v, a, dt, trap, angle, q_bias, k_bias, D, z, mimo_v, mimo_z, mimo_o, memory, turned, last_key, last_value
):
    return _by_scan(
        _scan_in_chunks, q, k, v, a, dt, trap, angle, q_bias, k_bias, D, z, mimo_v, mimo_z, mimo_o, memory, turned,
        last_key, last_value,
    )  # fmt: skip


@public(
    _mamba3_mimo,
    "q k: B K L G N; v z?: B K L H P; a dt trap: B K L H; angle: B K L H A; q_bias k_bias: H N; D?: H",
    state="memory: B R H N P; turned: B R H A; last_key: B R H N; last_value: B R H P",
    requires=_wrong,
    values=VALUES,
    sizes=dict(G=2, A=1, N=4),
)
def mamba3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    dt: Tensor,
    trap: Tensor,
    angle: Tensor,
    q_bias: Tensor,
    k_bias: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    initial_state: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The recurrence of Mamba-3, with one input and output per head channel ("SISO").

        th_t = th_{t-1} + pi tanh(angle_t) dt_t,   k'_t = R(th_t) (k_t + k_bias),   q'_t = R(th_t) (q_t + q_bias)
        S_t = al_t S_{t-1} + (1 - la_t) dt_t al_t k'_{t-1} v_{t-1}^T + la_t dt_t k'_t v_t^T
        o_t = (S_t^T q'_t + D v_t) silu(z_t)            with al_t = exp(a_t dt_t), la_t = sigmoid(trap_t)

    Lahoti et al., "Mamba-3: Improved Sequence Modeling using State Space Principles", 2026, arXiv 2603.15569. R turns
    the pairs of neighbouring channels (2i, 2i+1) by th_i, the first A of them.

    Args:
        q, k: what Mamba calls C and B (B, K or 1, L, G, N), one row for each of G groups of H / G neighbouring heads.
        v: inputs (B, K or 1, L, H, P).
        a: decay rates < 0 (B, K or 1, L, H).
        dt: step sizes >= 0 (B, K or 1, L, H).
        trap: how much of an input enters at its own step, before its sigmoid (B, K or 1, L, H).
        angle: speed of the rotation before its tanh (B, K or 1, L, H, A), A at most N / 2.
        q_bias, k_bias: (H, N).
        D: weight of the input in the output (H,).
        z: gate of the output (B, K or 1, L, H, P).
        initial_state: four tensors. memory: S (B, K, H, N, P), which the authors' code keeps as (H, P, N); turned: th
            between 0 and 2 pi (B, K, H, A); last_key: k' of the last token (B, K, H, N); last_value: v of it
            (B, K, H, P).
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token has dt = 0: what
            the token before it had left for the next step is lost.

    Returns:
        (B, K, L, H, P), merged (B, L, H, P).
    """
    states = given_states("mamba3", initial_state)
    check_arguments("mamba3", q, k, v, a, dt, trap, angle, q_bias, k_bias, D, z, *states, route=route)
    memory, turned, *last = states
    last = [None if x is None else x.unsqueeze(3) for x in last]
    q, k = q.unsqueeze(3), k.unsqueeze(3)
    inputs = (
        q,
        k,
        v,
        a,
        dt,
        trap,
        angle,
        q_bias[:, None],
        k_bias[:, None],
        D,
        z,
        None,
        None,
        None,
        memory,
        turned,
        *last,
    )
    result = _mamba3_mimo(*inputs, route=route, merge=merge, return_final_state=return_final_state)
    if not return_final_state:
        return result
    o, (memory, turned, *last) = result
    return o, (memory, turned, *(x.squeeze(3) for x in last))


@public(_mamba3_mimo)
def mamba3_mimo(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    dt: Tensor,
    trap: Tensor,
    angle: Tensor,
    q_bias: Tensor,
    k_bias: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    mimo_v: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    *,
    initial_state: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The recurrence of Mamba-3 with several inputs and outputs ("MIMO"): a step of a higher rank on the same state.

        S_t = al_t S_{t-1} + (1 - la_t) dt_t al_t sum_r k'_{t-1,r} v_{t-1,r}^T + la_t dt_t sum_r k'_{t,r} v_{t,r}^T
        y_{t,r} = (S_t^T q'_{t,r} + D v_{t,r}) silu(z_{t,r})
        o_t = sum_r mimo_o_r y_{t,r}                    with v_{t,r} = mimo_v_r v_t and z_{t,r} = mimo_z_r z_t

    Lahoti et al., 2026, arXiv 2603.15569. The authors' TileLang kernel turns channels i and i + N/2 together: weights
    of q and k made for it have their channels in another order.

    Args:
        q, k: C and B of every rank (B, K or 1, L, rank, G, N).
        q_bias, k_bias: (H, rank, N).
        mimo_v, mimo_z, mimo_o: what values, gates and outputs are multiplied with for every rank (H, rank, P).
        initial_state: four tensors. memory: (B, K, H, N, P); turned: (B, K, H, A); last_key: (B, K, H, rank, N);
            last_value: times mimo_v (B, K, H, rank, P).

    All else as of `mamba3`.
    """
    states = given_states("mamba3_mimo", initial_state)
    inputs = q, k, v, a, dt, trap, angle, q_bias, k_bias, D, z, mimo_v, mimo_z, mimo_o, *states
    return _mamba3_mimo(*inputs, route=route, merge=merge, return_final_state=return_final_state)
