"""WKV of RWKV-4 in Triton, on the kernels of `bi_wkv`: the past alone, from a state and to one.

The largest exponent after the last step is a part of the state, so it has a gradient, which is that of the key or the
first exponent it comes from. It is found in plain torch, where a final state has a gradient at all.
"""

import torch
from torch import Tensor

from ...ops.wkv4 import EMPTY
from ...visits import read
from . import bi_wkv
from .bi_wkv import Tiles
from .gla import merged, per_route


def _sum(state: Tensor | None) -> Tensor | None:
    """(B, K, D, 3) as the kernels have it, (B, K, 3, D)."""
    return None if state is None else state.float().mT.contiguous()


def _last_top(k: Tensor, w: Tensor, top: Tensor, route: Tensor | None) -> Tensor:
    """The largest exponent after the last step, (B, K, D)."""
    keys = read(k, route)
    age = torch.arange(keys.shape[2] - 1, -1, -1, dtype=w.dtype, device=w.device)
    return torch.maximum(top - keys.shape[2] * w, (keys - age[:, None] * w[:, None]).amax(2))


def forward(k, v, w, u, initial_state, route, merge):
    tiles = Tiles(k, v, w, u, route, bi_wkv.TILE, causal=True)
    output, state = tiles.forward(torch.float32 if merge else k.dtype, _sum(initial_state))
    return merged(output, merge, k.dtype), state.mT


def backward(grad_output, grad_state, k, v, w, u, initial_state, route, merge) -> list[Tensor]:
    tiles, first = Tiles(k, v, w, u, route, bi_wkv.TILE_BACKWARD, causal=True), _sum(initial_state)
    dk, dv, dw, du, ahead, of_top = tiles.backward(per_route(grad_output, merge), first, _sum(grad_state))
    if first is not None:
        num, den, top = first.unbind(2)
        x, y, exponent = ahead.unbind(2)
        weight = torch.exp(top + exponent)
        of_state = torch.stack((weight * x, weight * y, weight * (x * num + y * den)), -1)
    if of_top is not None:
        top = torch.full_like(of_top, EMPTY) if first is None else top
        _, pull = torch.func.vjp(lambda k, w, top: _last_top(k, w, top, route), k.float(), w.float(), top)
        more_k, more_w, more_top = pull(of_top)
        dk, dw = dk + more_k, dw + more_w
        if first is not None:
            of_state[..., 2] += more_top
    grads = [dk, dv, dw, du] if first is None else [dk, dv, dw, du, of_state]
    return [grad.to(x.dtype) for grad, x in zip(grads, (k, v, w, u, initial_state))]
