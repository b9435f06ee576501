"""SSD (Mamba-2) in Triton, on the kernels of `gla`: queries C, keys B times the step sizes, values x, gates A dt.

Step sizes and gates, one number a head, are made in time order in plain torch: a padding step has a size, too. The skip
and the gate of the output are plain torch as well, in grid order.
"""

import torch
from torch import Tensor

from ...ops.ssd import _output, _step_sizes
from ...visits import is_permutation, read, visited, write
from .common import TokenGradient
from .gla import Chunks, merged, per_route


class _Call:
    """The parts of one call, in float32 where they are small."""

    def __init__(self, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state, route):
        self.batch, self.routes, self.length = visited([v for v in (x, dt, B, C, z) if v is not None], route)
        self.route = route
        self.settings = dt_softplus, dt_min, dt_max
        dt = read(dt, route)
        dt = dt.expand(-1, self.routes, *dt.shape[2:])
        self.small = [None if v is None else v.float() for v in (dt, A, dt_bias)]
        g, step = self.gates(*self.small)
        self.chunks = Chunks(C, B, x, g, 1.0, initial_state, route, weight=step, stepwise=True)
        bare = D is None and z is None
        self.around = [v if v is None or bare else v.float() for v in (x, D, z)]

    def gates(self, dt: Tensor, A: Tensor, dt_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """(log decays, step sizes), both (B, K, S, H)."""
        step = _step_sizes(dt, dt_bias, *self.settings)
        return A[:, None] * step, step

    def finish(self, y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
        """The operator's output of what the heads read: skip and gate, zero where no step of the route writes."""
        y = _output(y, x, D, z)
        if self.route is None or is_permutation(self.route, self.length):
            return y
        steps = y.new_ones(self.batch, self.routes, self.route.shape[-1], 1, 1)
        return y * write(steps, self.route, self.length)


def forward(*args) -> tuple[Tensor, Tensor]:
    *inputs, merge = args
    call = _Call(*inputs)
    y, state = call.chunks.forward(torch.float32)
    return merged(call.finish(y, *call.around), merge, inputs[0].dtype), state


def backward(grad_output, grad_state, *args) -> list[Tensor]:
    *inputs, _ = args
    merge = args[-1]
    x, dt, A, B, C, D, z, dt_bias, *_, initial_state, _ = inputs
    call = _Call(*inputs)
    grad = per_route(grad_output, merge).float().expand(-1, call.routes, *[-1] * 3)
    y = call.chunks.forward(torch.float32)[0] if z is not None else torch.zeros_like(grad)
    of_y, of_x, of_D, of_z = _pull(call.finish, [y, *call.around], grad)
    found = call.chunks.backward(of_y, grad_state)
    of_dt, of_A, of_bias = _pull(call.gates, call.small, (found["g"], found["weight"]))
    grads = {
        "x": found["v"] + of_x,
        "dt": TokenGradient(dt, call.routes, call.route).of_steps(of_dt),
        "A": of_A,
        "B": found["k"],
        "C": found["q"],
        "D": of_D,
        "z": of_z,
        "dt_bias": of_bias,
        "initial_state": found["initial_state"],
    }
    given = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return [grad.to(like.dtype) for grad, like in zip(grads.values(), given) if like is not None]


def _pull(function, inputs, grads) -> list[Tensor | None]:
    """The gradients of a function's inputs that are not None."""
    present = [v is not None for v in inputs]

    def of(*tensors):
        tensors = iter(tensors)
        return function(*(next(tensors) if there else None for there in present))

    _, pull = torch.func.vjp(of, *(v for v in inputs if v is not None))
    found = iter(pull(grads))
    return [next(found) if there else None for there in present]
