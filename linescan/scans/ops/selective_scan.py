"""Selective scan (S6), the recurrence of Mamba."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import numbers_at_a_time
from ..exported import loop
from ..matmul import project_routes, project_routes_backward
from ..recurrence import public, recurrence, without_autocast

__all__ = ["selective_scan"]


def _grouped(x: Tensor) -> Tensor:
    return x.unsqueeze(-2) if x.ndim == 4 else x


def widen(*inputs) -> list:
    """The operator's inputs in their general form: B and C with groups, and without `delta_weight`.

    Step sizes of low rank are made, in float32 at least on a CPU.
    """
    *inputs, weight = inputs
    inputs[3:5] = map(_grouped, inputs[3:5])
    if weight is not None:
        delta = inputs[1]
        dtype = delta.dtype if delta.is_cuda else torch.promote_types(delta.dtype, torch.float32)
        with without_autocast(delta.device.type):
            inputs[1] = project_routes(delta.to(dtype), weight.to(dtype))
    return inputs


def narrow(grads, *inputs) -> list[Tensor]:
    """The gradients of the operator's inputs from those of the widened ones."""
    delta, weight = inputs[1], inputs[-1]
    grads = [*grads[:3], *(grad.view(x.shape) for grad, x in zip(grads[3:5], inputs[3:5])), *grads[5:]]
    if weight is None:
        return grads
    of_steps = grads[1]
    with torch.autocast(delta.device.type, enabled=False):
        of_delta, of_weight = project_routes_backward(of_steps, delta.to(of_steps.dtype), weight.to(of_steps.dtype))
    return [grads[0], of_delta.to(delta.dtype), *grads[2:], of_weight.to(weight.dtype)]


def _step_sizes(delta, delta_bias, delta_softplus):
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    return F.softplus(delta) if delta_softplus else delta


def _output(y, u, D, z):
    if D is not None:
        y = y + D[:, None] * u
    return y if z is None else y * F.silu(z)


@recurrence(
    """
    u z?: B K L D; delta: B K L (rank if with_delta_weight else D); A: R D N; B C: B K L [G] N; D? delta_bias?: R D;
    delta_weight?: K D rank
    """,
    "B K L D",
    state="B R D N",
    requires=lambda D, G: f"{D} channels do not divide into the {G} groups of B and C" if D % G else None,
    flops="9 * B * R * S * D * N + (2 * B * R * L * D * rank if with_delta_weight else 0)",
    values=dict(A=lambda x: -x.exp(), delta=lambda x: x - 2),
    sizes=dict(G=2, rank=2),
)
def _selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus: bool, initial_state, delta_weight):
    if delta_weight is not None:
        delta = (delta[..., None, :] * delta_weight[:, None]).sum(-1)  # no product that autocast knows
    step = _step_sizes(delta, delta_bias, delta_softplus)
    B, C = (x.repeat_interleave(u.shape[-1] // x.shape[-2], -2) for x in map(_grouped, (B, C)))  # (B, K, T, D, N)
    state, outputs = initial_state, []
    for s_t, u_t, B_t, C_t in zip(step.unbind(2), u.unbind(2), B.unbind(2), C.unbind(2)):
        s_t, u_t = s_t.unsqueeze(-1), u_t.unsqueeze(-1)
        state = torch.exp(s_t * A) * state + s_t * B_t * u_t
        outputs.append((C_t * state).sum(-1))
    return _output(torch.stack(outputs, 2), u, D, z), state


# The chunked form. Everything over N and D is done for a chunk of steps at once, in buffers that fit a CPU's cache;
# only h_t = a_t h_{t-1} + x_t B_t runs step by step, one in-place operation a step. Inside, time comes first and
# channels last:
#     step, x, u, y (T, B, K, G, 1, D/G)    B, C (T, B, K, G, N, 1)    A (K, G, N, D/G)    state (B, K, G, N, D/G)

_STEPS = 16  # a chunk has at least so many, that the states between chunks stay few


def _blocks(A: Tensor, batch: int) -> tuple[list[slice], int]:
    """The parts of the batch to do one after the other, and the steps in a chunk."""
    budget = max(1, numbers_at_a_time(A.device) // A.numel())
    samples = min(batch, max(1, budget // _STEPS))
    return [slice(i, i + samples) for i in range(0, batch, samples)], max(_STEPS, budget // samples)


def _channels_last(state: Tensor, groups: int) -> Tensor:
    return state.unflatten(-2, (groups, -1)).mT.contiguous()


def _channels_first(state: Tensor) -> Tensor:
    return state.mT.flatten(-3, -2)


def _time_first(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(-1, (groups, 1, -1)).movedim(2, 0).contiguous()


def _time_third(x: Tensor) -> Tensor:
    return x.movedim(0, 2).flatten(-3)


def _states(step: Tensor, x: Tensor, A: Tensor, B: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states of a chunk that starts in `state`, both (T, B, K, G, N, D/G)."""
    decay = (step * A).exp_()
    states = x * B
    for decay_t, state_t in zip(decay, states):
        state = state_t.addcmul_(decay_t, state)
    return decay, states


def _scan(step: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, size: int):
    """Output before skip and gate, the final state, and the states that the chunks start in."""
    outputs, starts = [], []
    for step_c, x_c, B_c, C_c in zip(step.split(size), x.split(size), B.split(size), C.split(size)):
        starts.append(state)
        _, states = _states(step_c, x_c, A, B_c, state)
        outputs.append(C_c.mT @ states)
        state = states[-1].clone()
    return torch.cat(outputs), state, starts


def _adjoint(grad, grad_state, step, x, u, A, B, C, starts: list[Tensor], size: int):
    """Gradients of u, step, A, B, C and the initial state of `_scan` at x = step * u; makes the states once more.

    g_t = dL/dh_t runs backwards as h does forwards: g_t = C_t dL/dy_t + a_{t+1} g_{t+1}.
    """
    grad_u, grad_step, grad_B, grad_C = (torch.empty_like(x) for x in (x, x, B, C))
    grad_A = torch.zeros_like(A)
    chunks = [slice(i, i + size) for i in range(0, len(x), size)]
    for t, start in zip(reversed(chunks), reversed(starts)):
        decay, states = _states(step[t], x[t], A, B[t], start)
        g = grad[t] * C[t]
        g[-1] += grad_state
        for i in range(len(g) - 1, 0, -1):
            g[i - 1].addcmul_(decay[i], g[i])
        grad_state = decay[0] * g[0]
        grad_C[t] = states @ grad[t].mT
        grad_B[t] = g @ x[t].mT
        grad_x = B[t].mT @ g
        grad_u[t] = step[t] * grad_x
        exponent = decay.mul_(g)  # gradient of step * A
        exponent[1:] *= states[:-1]
        exponent[0] *= start
        grad_step[t] = torch.mul(exponent, A, out=g).sum(-2, keepdim=True).addcmul_(u[t], grad_x)
        grad_A += exponent.mul_(step[t]).sum((0, 1))
    return grad_u, grad_step, grad_A, grad_B, grad_C, grad_state


def _prepare(u, delta, A, B, C, delta_bias, delta_softplus, initial_state):
    """step, x, u, A, B, C and the first state in the layout above."""
    groups = B.shape[-2]
    step = _time_first(_step_sizes(delta, delta_bias, delta_softplus), groups)
    u = _time_first(u, groups)
    B, C = (x.unsqueeze(-1).movedim(2, 0).contiguous() for x in (B, C))
    return step, step * u, u, _channels_last(A, groups), B, C, _channels_last(initial_state, groups)


@_selective_scan.chunked
def _chunked(*inputs):
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state = widen(*inputs)
    step, x, _, A, B_, C_, state = _prepare(u, delta, A, B, C, delta_bias, delta_softplus, initial_state)
    blocks, size = _blocks(A, len(u))
    parts = [_scan(step[:, b], x[:, b], A, B_[:, b], C_[:, b], state[b], size)[:2] for b in blocks]
    outputs, states = zip(*parts)
    return _output(_time_third(torch.cat(outputs, 1)), u, D, z), _channels_first(torch.cat(states))


@_selective_scan.chunked_backward
def _chunked_backward(grad, grad_state, *inputs):
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state = widen(*inputs)
    groups = B.shape[-2]
    step, x, u_, A_, B_, C_, state = _prepare(u, delta, A, B, C, delta_bias, delta_softplus, initial_state)
    grad_state = _channels_last(grad_state, groups)
    ungated = grad if z is None else grad * F.silu(z)
    grad_y = _time_first(ungated, groups)
    blocks, size = _blocks(A, len(u))
    parts, outputs = [], []
    for b in blocks:
        y, _, starts = _scan(step[:, b], x[:, b], A_, B_[:, b], C_[:, b], state[b], size)
        outputs.append(y)
        parts.append(
            _adjoint(grad_y[:, b], grad_state[b], step[:, b], x[:, b], u_[:, b], A_, B_[:, b], C_[:, b], starts, size)
        )
    grad_u, grad_step, grad_A, grad_B, grad_C, grad_state = zip(*parts)
    grad_u, grad_delta = (_time_third(torch.cat(g, 1)) for g in (grad_u, grad_step))
    grad_B, grad_C = (torch.cat(g, 1).movedim(0, 2).squeeze(-1) for g in (grad_B, grad_C))
    if delta_softplus:
        raw = delta if delta_bias is None else delta + delta_bias[:, None]
        grad_delta = torch.ops.aten.softplus_backward(grad_delta, raw, 1, 20)
    grads = [grad_u, grad_delta, _channels_first(sum(grad_A)), grad_B, grad_C]
    if D is not None:
        grads[0] = grad_u + D[:, None] * ungated
        grads.append((ungated * u).sum(2).sum(0))
    if z is not None:
        y = _output(_time_third(torch.cat(outputs, 1)), u, D, None)
        grads.append(torch.ops.aten.silu_backward(grad * y, z))
    if delta_bias is not None:
        grads.append(grad_delta.sum(2).sum(0))
    grads.append(_channels_first(torch.cat(grad_state)))
    return narrow(grads, *inputs)


@_selective_scan.exported
def _exported(*inputs):
    """All but the states is done for every token, or every piece of tokens, at once; channels stand last."""
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state = widen(*inputs)
    groups = B.shape[-2]
    step = _step_sizes(delta, delta_bias, delta_softplus)

    def by_group(x: Tensor) -> Tensor:
        return x.unflatten(-1, (groups, 1, -1))  # (B, K, T, G, 1, D/G)

    def body(states, tokens, others):
        (state,), (step, x, B, C), (A,) = states, tokens, others
        decays, added = (step * A[:, None]).exp(), x * B.unsqueeze(-1)
        after = []
        for decay, new in zip(decays.unbind(2), added.unbind(2)):
            state = decay * state + new
            after.append(state)
        return [state], [(C.unsqueeze(-2) @ torch.stack(after, 2)).squeeze(-2)]

    first, A = (x.unflatten(-2, (groups, -1)).mT for x in (initial_state, A))  # (B, K, G, N, D/G), (K, G, N, D/G)
    (last,), (y,) = loop(body, [first], [by_group(step), by_group(step * u), B, C], [A])
    return _output(y.flatten(-2), u, D, z), _channels_first(last)


@public(_selective_scan)
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    delta_weight: Tensor | None = None,
    initial_state: Tensor | None = None,
    route: Tensor | None = None,
    merge: str | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan: every channel d carries a state of N numbers.

        s_t = softplus(delta_t + delta_bias)                       (or delta_t + delta_bias)
        h_t[d, n] = exp(s_t[d] A[d, n]) h_{t-1}[d, n] + s_t[d] B_t[n] u_t[d]
        y_t[d] = (sum_n C_t[n] h_t[d, n] + D[d] u_t[d]) silu(z_t[d])

    Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv 2312.00752, equation 2,
    with the zero-order hold for A and the Euler rule for B, as the authors' implementation has it.

    Args:
        u: inputs (B, K or 1, L, D).
        delta: step sizes (B, K or 1, L, D); with `delta_weight` the few numbers that they are made of,
            (B, K or 1, L, rank).
        A: negative decay rates (K, D, N).
        B, C: (B, K or 1, L, N), or (B, K or 1, L, G, N) with one row for each of G groups of D / G neighbouring
            channels.
        D: weight of the input in the output (K, D).
        z: gate of the output (B, K or 1, L, D).
        delta_bias: added to delta (K, D).
        delta_softplus: pass the step sizes through softplus, which is linear above 20, as torch's.
        delta_weight: (K or 1, D, rank), makes step sizes `delta_weight[k] @ delta_t` of low rank. They are then made
            again in the backward pass, not stored: in the 2D models, with their four routes, most of a block's memory.
        initial_state: (B, K, D, N).
        route, merge, return_final_state: as of every recurrence (docs/recurrences.md). A padding token takes a step of
            the size that `delta_bias` alone gives.

    Returns:
        (B, K, L, D), merged (B, L, D).
    """
    if isinstance(B, Tensor) and isinstance(C, Tensor) and B.ndim != C.ndim:
        B, C = map(_grouped, (B, C))
    inputs = u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, delta_weight
    return _selective_scan(*inputs, route=route, merge=merge, return_final_state=return_final_state)
