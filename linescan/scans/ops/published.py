"""Operators as published kernels compute them, where these depart from their papers. For weights trained with them."""

import torch
from torch import Tensor

from ..chunks import linear_scan, running_max

__all__ = ["bi_wkv_kernel"]

PIECES = 32  # that the kernel cuts a sequence into
LEAST = 1e-6  # what it adds to a sum of weights of which the largest is 1
EMPTY = -1e38  # the exponent of a sum without terms


def bi_wkv_kernel(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Bi-WKV as the CUDA kernels of Vision-RWKV compute it; `linescan.scans.bi_wkv` is the paper's equation.

    The kernel cuts a sequence of T tokens into 32 pieces. A piece begins with the sums over the tokens before and
    behind its first, decayed by a step too many, and goes on from there by the equation's recurrences: the sum over
    the tokens behind is carried on by dividing by decays. So token t of a piece that begins at s misses 1 - e^-w of
    both sums at s, times e^(-(t-s)w) and e^((t-s)w): O(w T / 32) of the result.

    Differentiable. The order of the tokens is the stored one: pieces have no meaning along a route.

    Args:
        k, v: keys and values (B, T, D).
        w: decay of a step (D,); may be negative.
        u: bonus of the token itself (D,).

    Returns:
        (B, T, D) in k's dtype.

    Raises:
        ValueError: the shapes do not fit.
    """
    if k.ndim != 3 or k.shape != v.shape or not w.shape == u.shape == k.shape[2:]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (k, v, w, u))
        raise ValueError(f"bi_wkv_kernel: k and v are (B, T, D), w and u (D,); got {shapes}")
    dtype = k.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    k, v, w, u = (x.to(compute) for x in (k, v, w, u))
    length = k.shape[1]
    past = [x[..., :-1, :] for x in _sums(k, v, w, reverse=False)]
    future = [x[..., 1:, :] for x in _sums(k, v, w, reverse=True)]
    step = torch.arange(length, device=k.device)
    begin = step - step % max(-(-length // PIECES), 1)
    distance = (step - begin).to(compute)[:, None] * w
    missed = torch.expm1(-w)
    terms = [(v, torch.ones_like(v), u + k), past, future]
    for total, sign in ((past, -1), (future, 1)):
        num, den, top = (x.index_select(1, begin) for x in total)
        terms.append((missed * num, missed * den, top + sign * distance))
    most = torch.stack([top for _, _, top in terms[:3]]).detach().amax(0)
    num = sum(n * torch.exp(top - most) for n, _, top in terms)
    den = sum(d * torch.exp(top - most) for _, d, top in terms)
    return (num / (den + LEAST)).to(dtype)


def _sums(k: Tensor, v: Tensor, w: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of e^(k - top) v and e^(k - top), decayed, over none of the tokens to all of them, and their tops."""
    start = k.new_zeros(len(k), k.shape[2])
    tops = running_max(-w[None], k, start + EMPTY, reverse)
    before, after = (tops[:, 1:], tops[:, :-1]) if reverse else (tops[:, :-1], tops[:, 1:])
    keep, add = torch.exp(before - after - w), torch.exp(k - after)
    num, den = linear_scan(keep, torch.stack((add * v, add)), torch.stack((start, start)), reverse)
    return num, den, tops
