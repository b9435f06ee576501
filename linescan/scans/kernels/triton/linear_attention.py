"""Linear attention in Triton, on the kernels of `gla`: all gates are zero, and a column of ones counts the keys.

The division by what is counted is plain torch.
"""

import torch
from torch import Tensor

from ...ops.linear_attention import _counted, _normalized
from .gla import Chunks, merged, per_route


def _chunks(q, k, v, scale, normalize, initial_state, route) -> Chunks:
    open_gates = torch.zeros(*v.shape[:1], 1, *v.shape[2:4], device=v.device)
    return Chunks(q, k, _counted(v, normalize), open_gates, scale, initial_state, route)


def forward(*args) -> tuple[Tensor, Tensor]:
    *inputs, merge = args
    q, normalize = inputs[0], inputs[4]
    output, state = _chunks(*inputs).forward(torch.float32 if merge or normalize else q.dtype)
    return merged(_normalized(output, normalize), merge, q.dtype), state


def backward(grad_output, grad_state, *args) -> list[Tensor]:
    *inputs, merge = args
    q, k, v, _, normalize, initial_state, _ = inputs
    chunks, grad = _chunks(*inputs), per_route(grad_output, merge)
    if normalize:
        output = chunks.forward(torch.float32)[0]
        grad = torch.func.vjp(lambda x: _normalized(x, True), output)[1](grad.float().expand_as(output[..., :-1]))[0]
    grads = chunks.backward(grad, grad_state)
    found = grads["q"], grads["k"], grads["v"][..., : v.shape[-1]], grads["initial_state"]
    return [grad.to(x.dtype) for grad, x in zip(found, (q, k, v, initial_state)) if x is not None]
