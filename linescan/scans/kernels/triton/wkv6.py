"""WKV of RWKV-6 in Triton, on the kernels of `gla`: a gate late, and with a bonus for the token itself."""

import torch
from torch import Tensor

from .gla import Chunks, merged, per_route


def _chunks(r, k, v, w, u, scale, initial_state, route) -> Chunks:
    return Chunks(r, k, v, w, scale, initial_state, route, bonus=u.float().contiguous())


def forward(*args) -> tuple[Tensor, Tensor]:
    *inputs, merge = args
    r = inputs[0]
    output, state = _chunks(*inputs).forward(torch.float32 if merge else r.dtype)
    return merged(output, merge, r.dtype), state


def backward(grad_output, grad_state, *args) -> list[Tensor]:
    *inputs, merge = args
    u, initial_state = inputs[4], inputs[6]
    grads = _chunks(*inputs).backward(per_route(grad_output, merge), grad_state)
    found = [*(grads[name] for name in ("q", "k", "v", "g")), grads["bonus"].to(u.dtype)]
    return found if initial_state is None else [*found, grads["initial_state"].to(initial_state.dtype)]
