"""What recurrences are given: gates, decays and normalised keys, made of projections of the tokens.

Each is a function of numbers side by side, or of the channels of a head: plain torch, differentiable any number of
times. Where a kernel is registered (`Gate.kernel`), it does all of one in a single pass over memory and its gradient in
another; torch takes a pass for every operation.
"""

from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .recurrence import is_forced, is_plain, wants_gradient

__all__ = [
    "GATES",
    "Gate",
    "blend",
    "erase",
    "exponential",
    "forget",
    "linear_unit",
    "log_sigmoid",
    "share",
    "sigmoid",
    "unit",
]


class Kernel(NamedTuple):
    """What computes a gate in one pass; all of its tensors are float32.

    Attributes:
        supports: (*inputs) -> whether it serves them.
        forward: (*inputs) -> the output, or a tuple of both.
        backward: (gradients of the outputs, *inputs) -> those of the tensors among the inputs, in order.
    """

    supports: Callable[..., bool]
    forward: Callable
    backward: Callable


class Gate:
    """A function of tensors (B, K or 1, L, channels), or with heads (B, K or 1, L, H, channels), and of numbers.

    Attributes:
        form: the function in torch.
        kernel: of one pass, if there is one.
    """

    def __init__(self, form: Callable):
        self.form = form
        self.kernel: Kernel | None = None

    def __call__(self, *inputs):
        kernel = self.kernel
        if kernel is None or not is_plain(inputs) or is_forced() or not kernel.supports(*inputs):
            return self.form(*inputs)
        return _Recorded.apply(self, *inputs) if wants_gradient(inputs) else kernel.forward(*inputs)


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, *inputs):
        ctx.gate, ctx.others = gate, [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        return gate.kernel.forward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        tensors = list(ctx.saved_tensors)
        inputs = [tensors.pop(0) if x is None else x for x in ctx.others]
        if torch.is_grad_enabled():  # the gradient will be differentiated too
            wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
            outputs = ctx.gate.form(*inputs)
            found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
            return None, *(next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in inputs)
        found = iter(ctx.gate.kernel.backward(grads, *inputs))
        return None, *(next(found) if isinstance(x, Tensor) else None for x in inputs)


GATES: dict[str, Gate] = {}  # by name


def _gate(form: Callable) -> Gate:
    gate = GATES[form.__name__] = Gate(form)
    gate.__doc__ = form.__doc__
    return gate


@_gate
def log_sigmoid(x: Tensor, factor: float) -> Tensor:
    """factor * log(sigmoid(x))."""
    return factor * F.logsigmoid(x)


@_gate
def sigmoid(x: Tensor, factor: float) -> Tensor:
    """factor * sigmoid(x)."""
    return factor * x.sigmoid()


@_gate
def exponential(x: Tensor, factor: float) -> Tensor:
    """factor * exp(x), of an x of at most 20: beyond, the gradient of a decay exp(-exp(x)) would be inf * 0."""
    return factor * x.clamp_max(20).exp()


@_gate
def forget(x: Tensor) -> tuple[Tensor, Tensor]:
    """What a gate forgets, 1 - sigmoid(x), and the log of what it keeps: neither loses digits where it saturates."""
    return torch.sigmoid(-x), F.logsigmoid(x)


@_gate
def share(x: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(gate) of x and of y."""
    opened = gate.sigmoid()
    return opened * x, opened * y


@_gate
def blend(x: Tensor, gate: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """HGRN's input (1 - exp(g)) x, and its log decay g = factor * log(sigmoid(gate))."""
    g = factor * F.logsigmoid(gate)
    return -torch.expm1(g) * x, g


STEEPEST = 1000.0  # the derivative of the linear unit's square root, at most


def _root(x: Tensor) -> Tensor:
    """The square root with a derivative of at most `STEEPEST`."""
    steep = x <= (0.5 / STEEPEST) ** 2
    flat = x.detach().sqrt() + STEEPEST * (x - x.detach())
    return torch.where(steep, flat, x.masked_fill(steep, 1.0).sqrt())


@_gate
def linear_unit(x: Tensor, gate_x: Tensor, gate_a: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """The RG-LRU's input sqrt(1 - exp(2 g)) sigmoid(gate_x) x, and its log decay g = rate sigmoid(gate_a).

    `rate` (D,) <= 0. The derivative of the square root is at most 1000.
    """
    g = rate * gate_a.sigmoid()
    return _root(-torch.expm1(2 * g)) * gate_x.sigmoid() * x, g


@_gate
def unit(x: Tensor) -> Tensor:
    """x over its length by head, or over 1e-12."""
    return F.normalize(x, dim=-1)


@_gate
def erase(x: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    """What `dplr` removes: -u and strength u, of u = unit(x) and a strength per head (B, K or 1, L, H)."""
    removed = F.normalize(x, dim=-1)
    return -removed, removed * strength.unsqueeze(-1)
