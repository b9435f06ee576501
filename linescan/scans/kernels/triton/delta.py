"""The delta rules in Triton, on the kernels of `dplr`: `a` is k, which reads the decayed state, and b is -beta k."""

import torch
from torch import Tensor

from ...recurrence import precise
from .dplr import LowRank
from .gla import merged, per_route


def _low_rank(q, k, v, g, beta, scale, initial_state, route) -> LowRank:
    if g is None:
        g = torch.zeros(*beta.shape, device=beta.device)
    elif g.shape[-1] == 1 < k.shape[-1]:
        g = g[..., 0]
    written = precise(beta)[..., None] * precise(k)
    return LowRank(q, written, v, k, None, g, scale, initial_state, route, late=False)


def forward(*args) -> tuple[Tensor, Tensor]:
    *inputs, merge = args
    q = inputs[0]
    output, state = _low_rank(*inputs).forward(torch.float32 if merge else q.dtype)
    return merged(output, merge, q.dtype), state


def backward(grad_output, grad_state, *args) -> list[Tensor]:
    *inputs, merge = args
    q, k, v, g, beta, _, initial_state, _ = inputs
    grads = _low_rank(*inputs).backward(per_route(grad_output, merge), grad_state)
    of_written, key, factor = grads["k"], precise(k), precise(beta)[..., None]
    found = {
        "q": (q, grads["q"]),
        "k": (k, (grads["a"] + (factor * of_written).sum_to_size(k.shape))),
        "v": (v, grads["v"]),
        "g": (g, None if g is None else grads["g"].reshape(g.shape)),
        "beta": (beta, (key * of_written).sum(-1).sum_to_size(beta.shape)),
        "initial_state": (initial_state, grads["initial_state"]),
    }
    return [grad.to(x.dtype) for x, grad in found.values() if x is not None]
