"""What the Triton kernels share: tiles, rows read through a route, launching, and where gradients go.

Only the kernels' modules import this one, and only when a call needs them: `import linescan` must not import triton.
"""

from typing import Callable, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...visits import is_permutation, read

__all__ = [
    "Rows",
    "TokenGradient",
    "again",
    "channels_of",
    "in_time",
    "launch",
    "load_row",
    "place",
    "processors",
    "rows",
    "split",
    "stack",
    "store_row",
    "unstack",
    "visit",
    "visits",
]


class Rows(NamedTuple):
    """A token tensor (B, K or 1, L, [G,] C) as a kernel reads it: a pointer, and strides in elements.

    The stride of an axis that is shared (one route for all K) is 0. Channels stand next to each other.
    """

    data: Tensor
    batch: int
    route: int
    token: int
    group: int


def rows(x: Tensor | None) -> Rows | None:
    """`x` (B, K or 1, L, C) or (B, K or 1, L, G, C), whatever its strides; copied if channels are not neighbours."""
    if x is None:
        return None
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    batch, route, token, *group = x.stride()[:-1]
    return Rows(x, batch, route if x.shape[1] > 1 else 0, token, *group or (0,))


def launch(kernel, programs: int, *args, **constants) -> None:
    """Runs `programs` programs of one warp each.

    One warp: no barrier is ever needed for a tile's sums, and small programs pack a multiprocessor evenly. An SM of
    Hopper holds up to 32 of them, which is what hides the latency of memory.
    """
    kernel[(programs,)](*args, **constants, num_warps=1)


def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def split(programs: int, steps: int, multiple: int, device: torch.device) -> tuple[int, int]:
    """(chunks, steps in each, a multiple of `multiple`): how to cut time so that the programs fill the device.

    A cut scan reads its inputs twice, so time stays whole from four warps a multiprocessor on. Below, chunks are as
    many as make eight, but not shorter than 64 steps, where the carried states would cost as much as the tokens.
    """
    sms = processors(device)
    wanted = 1 if programs >= 4 * sms else min(-(-8 * sms // programs), max(1, steps // 64))
    size = -(-steps // (wanted * multiple)) * multiple
    return -(-steps // size), size


# -- in kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def visit(route, t, steps):
    """(token read at step t, whether there is one, whether its output is kept, whether t is a step at all)."""
    inside = t < steps
    if route is None:
        token = tl.cast(t, tl.int64)
        read = inside
        keep = inside
    else:
        entry = tl.load(route + t, mask=inside, other=-1)
        token = tl.maximum(tl.where(entry < 0, -2 - entry, entry), 0).to(tl.int64)
        read = entry != -1
        keep = entry >= 0
    return token, read, keep, inside


@triton.jit
def visits(route, route_batch, b, k, t, steps):
    """`visit` of steps t by route k of sample b; the table is a pointer or None, and a sample's is `route_batch` on."""
    return visit(None if route is None else route + b * route_batch + k * steps, t, steps)


@triton.jit
def channels_of(pieces, K, D, LANES: tl.constexpr):
    """(piece of time, sample, route, channels, which of them exist) of this program, where states are vectors."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(D, LANES)
    channels = pid % blocks * LANES + tl.arange(0, LANES)
    row = (pid // blocks // pieces).to(tl.int64)
    return pid // blocks % pieces, row // K, row % K, channels, channels < D


@triton.jit
def place(x, b, k, g, index):
    """Pointers to channels `index` of token 0. b, k and g are 64 bits wide: a batch may exceed 2^31 numbers."""
    return x.data + (b * x.batch + k * x.route + g * x.group) + index


@triton.jit
def load_row(x, at, token, mask):
    """A token's channels in float32, zeros where masked; `at` from `place`."""
    return tl.load(at + token * x.token, mask=mask, other=0).to(tl.float32)


@triton.jit
def store_row(x, at, token, mask, value):
    """Writes a token's channels."""
    tl.store(at + token * x.token, value.to(x.data.dtype.element_ty), mask=mask)


# Rows of T steps are one load of (T, ...) and one store, not T of them: the compiler's time grows with the product of
# the loads and stores of a kernel and the square of its operations. T is a power of two, and lies in registers: that
# neither of these two moves a value between threads is for layouts in which the last axis fills the warp.


@triton.jit
def unstack(x):
    """The T tensors of (T, R, C)."""
    T: tl.constexpr = x.shape[0]
    if T == 2:
        return tl.split(tl.permute(x, (1, 2, 0)))
    else:
        halves = tl.reshape(x, (2, T // 2, x.shape[1], x.shape[2]))
        first, second = tl.split(tl.permute(halves, (1, 2, 3, 0)))
        return unstack(first) + unstack(second)


@triton.jit
def stack(xs):
    """T tensors (R, C) as one."""
    T: tl.constexpr = len(xs)
    if T == 2:
        return tl.permute(tl.join(xs[0], xs[1]), (2, 0, 1))
    else:
        both = tl.permute(tl.join(stack(xs[: T // 2]), stack(xs[T // 2 :])), (3, 0, 1, 2))
        return tl.reshape(both, (T, both.shape[2], both.shape[3]))


# -- where gradients of token inputs go -------------------------------------------------------------------------------


class TokenGradient:
    """The gradient of a token input (B, K or 1, L, ...), which K routes and several programs give shares of.

    Every program writes its own share and the shares are added up in a fixed order, so no atomics and the same bits in
    every run. A route that is a permutation writes a token once, so its share goes straight to the token's place;
    for any other table shares are kept by step and gathered at the end.

    Args:
        x: the input.
        routes: K.
        route: the table.
        partials: programs that each hold a share of all channels' sum (for B and C).
    """

    def __init__(self, x: Tensor, routes: int, route: Tensor | None, partials: int = 1):
        self.like, self.route = x, route
        self.by_step = route is not None and not is_permutation(route, x.shape[2])
        places = route.shape[-1] if self.by_step else x.shape[2]
        whole = partials == 1 and x.shape[1] == routes and not self.by_step
        shape = (x.shape[0], routes, places, *x.shape[3:])
        self.shares = torch.empty((partials, *shape), dtype=x.dtype if whole else torch.float32, device=x.device)

    @property
    def rows(self) -> Rows:
        """Where the first program writes; `stride` further, the second."""
        return rows(self.shares[0])

    @property
    def stride(self) -> int:
        return self.shares.stride(0)

    def finish(self) -> Tensor:
        """The sum of all shares, in the input's shape and dtype."""
        grad = self.shares[0] if len(self.shares) == 1 else self.shares.sum(0)
        if self.by_step:
            grad = self._gather(grad)
        if self.like.shape[1] < grad.shape[1]:
            grad = grad.sum(1, keepdim=True)
        return grad.to(self.like.dtype)

    def of_steps(self, grad: Tensor) -> Tensor:
        """`finish`, of a gradient (B, K, S, ...) in time order."""
        share = self.shares[0]
        if self.route is None or self.by_step:
            share.copy_(grad)
        else:
            table = self._table(*share.shape[:2])
            share.scatter_(2, table.reshape(*table.shape, *[1] * (grad.ndim - 3)).expand_as(grad), grad.to(share.dtype))
        return self.finish()

    def _table(self, batch: int, routes: int) -> Tensor:
        table = self.route.long().expand(batch, -1, -1) if self.route.ndim == 2 else self.route.long()
        return table.expand(batch, routes, -1)

    def _gather(self, grad: Tensor) -> Tensor:
        batch, routes, _, *rest = grad.shape
        length = self.like.shape[2]
        table = self._table(batch, routes)
        row = torch.arange(batch * routes, device=grad.device).view(batch, routes, 1) * length
        token = row + torch.where(table < 0, -2 - table, table)
        token = torch.where(table == -1, batch * routes * length, token).flatten()  # one more row takes the padding
        grad = grad.masked_fill((table == -1).reshape(*table.shape, *[1] * len(rest)), 0)
        out = grad.new_zeros(batch * routes * length + 1, *rest)
        out.index_put_((token,), grad.flatten(0, 2), accumulate=True)  # sorts on a GPU: no atomics
        return out[:-1].view(batch, routes, length, *rest)


# -- plain torch around kernels ---------------------------------------------------------------------------------------


class _InTime(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, route):
        ctx.save_for_backward(x, route)
        return read(x, route)

    @staticmethod
    def backward(ctx, grad):
        x, route = ctx.saved_tensors
        return TokenGradient(x, grad.shape[1], route).of_steps(grad), None


def in_time(x: Tensor, route: Tensor | None) -> Tensor:
    """`read`, with a gradient that is added up in a fixed order."""
    return x if route is None else _InTime.apply(x, route)


def again(forward: Callable) -> Callable:
    """The backward of an implementation that is kernels with plain torch around them: runs `forward` again.

    The kernels are `torch.autograd.Function`s, which `torch.func` would hand tensors without memory.
    """

    def backward(grad_output, grad_state, *args) -> list[Tensor]:
        with torch.enable_grad():
            args = [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in args]
            inputs = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
            output, states = forward(*args)
        states = states if isinstance(states, tuple) else (states,)
        grads = grad_state if isinstance(grad_state, tuple) else (grad_state,)
        pairs = [(output, grad_output), *zip(states, grads)]
        outputs, grads = zip(*[(x, grad) for x, grad in pairs if grad is not None and x.requires_grad])
        return list(torch.autograd.grad(outputs, inputs, grads, allow_unused=True, materialize_grads=True))

    return backward
